"""Masks by name and from files."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from flowbench.families.conditioning.masks import make_mask


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("left", ["xx..", "xx..", "xx..", "xx.."]),
        ("right", ["..xx", "..xx", "..xx", "..xx"]),
        ("top", ["xxxx", "xxxx", "....", "...."]),
        ("bottom", ["....", "....", "xxxx", "xxxx"]),
        ("center", ["....", ".xx.", ".xx.", "...."]),
    ],
)
def test_named_masks(name, expected):
    found = make_mask(name, (3, 4, 4))
    assert ["".join(".x"[int(v)] for v in row) for row in found] == expected


def test_random_masks_hide_their_share_and_follow_the_seed():
    first, again, other = (make_mask("random-0.25", (1, 8, 8), seed) for seed in (0, 0, 1))
    assert int(first.sum()) == 16
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_masks_of_points():
    assert make_mask("left", (3,)).tolist() == [True, False, False]
    assert make_mask("right", (2,)).tolist() == [False, True]


def test_a_mask_from_a_file(tmp_path):
    pixels = np.zeros((4, 4), dtype=np.uint8)
    pixels[1, 2] = 255
    pixels[3, 0] = 128
    pixels[0, 0] = 127
    Image.fromarray(pixels).save(tmp_path / "hole.png")
    found = make_mask(str(tmp_path / "hole.png"), (1, 4, 4))
    assert found.nonzero().tolist() == [[1, 2], [3, 0]]


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        ("middle", (1, 4, 4), "unknown mask 'middle': choose left, right"),
        ("top", (2,), "unknown mask 'top': choose left, right or random-SHARE for points"),
        ("random-2", (1, 4, 4), r"a share in \(0, 1\]"),
        ("random-x", (1, 4, 4), "got 'random-x'"),
        ("random-0.001", (1, 4, 4), "hides no value"),
        ("none.png", (1, 4, 4), "there is no mask at none.png"),
        ("none.png", (2,), "a PNG masks images"),
    ],
)
def test_bad_masks_are_refused_in_one_line(name, shape, expected):
    with pytest.raises(ValueError, match=expected) as caught:
        make_mask(name, shape)
    assert "\n" not in str(caught.value)


def test_mask_files_that_do_not_fit(tmp_path):
    Image.fromarray(np.zeros((2, 3), dtype=np.uint8)).save(tmp_path / "small.png")
    (tmp_path / "text.png").write_text("no image")
    with pytest.raises(ValueError, match=r"is 2x3, the images are 4x4"):
        make_mask(str(tmp_path / "small.png"), (1, 4, 4))
    with pytest.raises(ValueError, match="cannot be read as an image"):
        make_mask(str(tmp_path / "text.png"), (1, 4, 4))
