"""What ``predict`` does: draw samples, and the uses of a trained flow that need no training."""
