"""Defects and calls: how many defects are found, at how many false calls, by size and by part."""
