"""Couplings: which source point is paired with which data point of a batch."""
