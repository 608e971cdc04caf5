"""Grids of trainings from one file, here and on a cluster."""
