"""Weights of pairs, what they do to the marginals, and their temperature."""
