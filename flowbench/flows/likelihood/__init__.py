"""Likelihoods of continuous flows."""
