"""Anomalies: which test samples are not of the kind that a module was trained on."""
