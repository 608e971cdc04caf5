"""Convolutions and norms of heads, torch's, written for CPUs and for padded frames; and torch's optimizer."""
