"""Images that other people's code made."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from flowbench.data import DataSpec
from flowbench.evaluation import external
from flowbench.evaluation.external import ExternalImages

COLOUR = DataSpec("colour", "1", (3, 5, 4), levels=256)
GREY = DataSpec("grey", "1", (1, 5, 4), levels=256)


def images(num: int, channels: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (num, channels, 5, 4), dtype=np.uint8)


def read(path, spec, **options) -> torch.Tensor:
    return torch.cat([part for _, part in ExternalImages(path, spec, **options).batches()])


@pytest.mark.parametrize("name", ["x.npz", "x.npy"])
@pytest.mark.parametrize("layout", ["first", "last"])
@pytest.mark.parametrize("spec", [COLOUR, GREY], ids=["colour", "grey"])
def test_arrays_with_channels_first_or_last(tmp_path, name, layout, spec):
    expected = images(7, spec.shape[0])
    array = expected if layout == "first" else expected.transpose(0, 2, 3, 1)
    path = tmp_path / name
    (np.savez if name.endswith("npz") else np.save)(path, array)
    assert np.array_equal(read(path, spec).numpy(), expected)


def test_grey_arrays_without_a_channel(tmp_path):
    expected = images(4, 1)
    np.savez_compressed(tmp_path / "x.npz", x=expected[:, 0], label=np.arange(4))
    assert np.array_equal(read(tmp_path / "x.npz", GREY).numpy(), expected)


def test_folders_with_subfolders_in_the_order_of_names(tmp_path, monkeypatch):
    monkeypatch.setattr(external, "CHUNK", 2)
    expected = images(5, 3)
    for number, image in enumerate(expected):
        folder = tmp_path / f"part{number // 3}"
        folder.mkdir(exist_ok=True)
        Image.fromarray(image.transpose(1, 2, 0)).save(folder / f"{number:03}.png")
    (tmp_path / "notes.txt").write_text("not an image")
    assert np.array_equal(read(tmp_path, COLOUR).numpy(), expected)
    assert np.array_equal(read(tmp_path, COLOUR, limit=3).numpy(), expected[:3])
    assert np.array_equal(ExternalImages(tmp_path, COLOUR).at(torch.tensor([4, 0])).numpy(), expected[[4, 0]])


def test_grey_files_stand_for_three_equal_channels_and_the_reverse(tmp_path):
    grey = images(2, 1)
    for number, image in enumerate(grey[:, 0]):
        Image.fromarray(image).save(tmp_path / f"{number}.png")
    assert np.array_equal(read(tmp_path, COLOUR).numpy(), grey.repeat(3, 1))
    for number, image in enumerate(grey[:, 0]):
        Image.fromarray(image).convert("RGB").save(tmp_path / f"{number}.png")
    assert np.array_equal(read(tmp_path, GREY).numpy(), grey)


def test_what_is_refused(tmp_path):
    def refused(path, spec, match):
        with pytest.raises(ValueError, match=match) as caught:
            read(path, spec)
        assert "\n" not in str(caught.value)

    refused(tmp_path / "none", COLOUR, r"--samples: .*none' does not exist")
    refused(tmp_path, DataSpec("points", "1", (2,)), r"only images can be scored from files; points holds points")
    np.save(tmp_path / "float.npy", np.zeros((3, 3, 5, 4)))
    refused(tmp_path / "float.npy", COLOUR, r"holds float64 of shape \(3, 3, 5, 4\); save uint8 images")
    np.save(tmp_path / "size.npy", np.zeros((3, 3, 8, 8), np.uint8))
    refused(tmp_path / "size.npy", COLOUR, r"images of shape \(3, 8, 8\), but colour has \(3, 5, 4\)")
    np.save(tmp_path / "one.npy", images(1, 3))
    refused(tmp_path / "one.npy", COLOUR, r"holds 1 images; at least 2 are needed")
    np.savez(tmp_path / "several.npz", train=images(3, 3), test=images(2, 3))
    refused(tmp_path / "several.npz", COLOUR, r"holds the arrays train, test; call the images 'x'")
    np.save(tmp_path / "objects.npy", np.array([{}, {}], dtype=object), allow_pickle=True)
    refused(tmp_path / "objects.npy", COLOUR, r"cannot be read as npz \(it holds Python objects")
    folder = tmp_path / "colour"
    folder.mkdir()
    for number, image in enumerate(images(2, 3)):
        Image.fromarray(image.transpose(1, 2, 0)).save(folder / f"{number}.png")
    refused(folder, GREY, r"0.png: is a colour image, but grey is grey; convert it")
