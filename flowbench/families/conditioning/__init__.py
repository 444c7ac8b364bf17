"""Conditions on the grid of a flow's space."""
