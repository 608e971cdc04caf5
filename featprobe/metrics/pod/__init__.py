"""Probability of detection."""
