"""Pairings: which source point meets which data point in training."""
