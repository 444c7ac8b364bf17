"""Solvers of the flow's differential equation, and their time grids."""
