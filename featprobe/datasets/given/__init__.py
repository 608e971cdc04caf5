"""Data sets that are given as arrays, written to the disk so that every command reads them."""
