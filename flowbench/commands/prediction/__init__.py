"""`flowbench predict`: samples, and uses of a trained flow without further training."""
