"""The forms in which a user's own data come."""

from __future__ import annotations

__all__ = ["USER_FORMATS"]

USER_FORMATS = {
    "npz": ".npz file (x, or train/val/test; optional label)",
    "npy": ".npy file (one array)",
    "pt": ".pt file (a tensor, or a dict with the keys of an npz)",
    "image_folder": "folder of images, one subfolder per class",
}
"""Name that stands for a data set of the catalogue -> what ``data.path`` leads to."""
