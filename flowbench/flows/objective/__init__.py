"""Training objectives: what a network predicts, and how its errors are weighted over time."""
