"""Guidance of velocities."""
