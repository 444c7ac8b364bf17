"""Autoregressive flows: affine blocks, their inverses and their guidance."""
