"""Noise on training points, and how it is taken out of samples."""
