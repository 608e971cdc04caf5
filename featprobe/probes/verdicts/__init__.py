"""Heads that give each image a verdict."""
