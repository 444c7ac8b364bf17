"""Value grid: dequantise, quantise, pictures."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flowbench.data import DataSpec


def spec(levels: int | None = 17, shape: tuple[int, ...] = (1, 8, 8)) -> DataSpec:
    return DataSpec("test", "1", shape, None, levels)


@settings(max_examples=20, deadline=None)
@given(levels=st.integers(2, 256), seed=st.integers(0, 2**32))
def test_quantise_inverts_dequantise(levels: int, seed: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    k = torch.randint(levels, (50, 1, 8, 8), generator=rng).to(torch.uint8)
    x = spec(levels).dequantize(k, rng)
    assert x.dtype == torch.float32
    assert -1.0 < x.min()
    assert x.max() < 1.0
    assert torch.equal(spec(levels).quantize(x), k)


def test_offsets_at_both_edges_stay_in_their_bin() -> None:
    for levels in range(2, 257):
        k = torch.arange(levels, dtype=torch.uint8)
        for offset in (0.0, 0.5, 1.0):
            x = spec(levels).to_model(k, offset)
            assert torch.equal(spec(levels).quantize(x), k)
            assert x.abs().max() < 1.0


def test_dequantised_values_fill_their_bin_uniformly() -> None:
    k = torch.full((100_000,), 5)
    x = spec(17).dequantize(k, torch.Generator().manual_seed(0)).double()
    low = 2.0 * 5 / 17 - 1.0
    u = (x - low) / spec(17).bin_width
    assert abs(u.mean() - 0.5) < 4 * (1 / 12 / 100_000) ** 0.5
    assert abs(u.var() - 1 / 12) < 1e-3
    assert u.min() > 0
    assert u.max() < 1


def test_eight_bit_grid_is_tarflows() -> None:
    assert spec(256).bin_width == 1 / 128
    centre = spec(256).to_model(torch.tensor([0, 255]))
    assert torch.allclose(centre, torch.tensor([-1 + 1 / 256, 1 - 1 / 256]))


def test_quantise_clips_what_a_model_may_produce() -> None:
    x = torch.tensor([-torch.inf, -5.0, -1.0, 1.0, 5.0, torch.inf])
    assert spec(17).quantize(x).tolist() == [0, 0, 0, 16, 16, 16]


def test_pictures() -> None:
    k = torch.arange(17, dtype=torch.uint8)
    picture = spec(17).to_uint8(spec(17).to_model(k))
    assert picture.dtype == torch.uint8
    assert picture[0] == 0
    assert picture[8] == 127
    assert picture[16] == 255
    grey = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(spec(256).to_uint8(spec(256).to_model(grey)), grey)
    assert spec(None).to_uint8(torch.tensor([-1.0, 0.0, 1.0, 9.0])).tolist() == [0, 128, 255, 255]


def test_modality_and_sizes() -> None:
    assert spec().modality == "image"
    assert spec().num_dims == 64
    assert spec(None, (2,)).modality == "vector"


@pytest.mark.parametrize("shape", [(), (3, 3), (0,), (1, 0, 8)])
def test_bad_shape(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"shape(\[\d\])? must be"):
        spec(shape=shape)


@pytest.mark.parametrize("levels", [0, 1, 257])
def test_bad_levels(levels: int) -> None:
    with pytest.raises(ValueError, match=r"levels must be a whole number in \[2, 256\] or None, got"):
        spec(levels)


def test_continuous_data_have_no_grid() -> None:
    for call in (lambda: spec(None).bin_width, lambda: spec(None).quantize(torch.zeros(3))):
        with pytest.raises(ValueError, match="no grey levels"):
            call()
    with pytest.raises(ValueError, match="only images"):
        spec(None, (2,)).to_uint8(torch.zeros(3, 2))


@pytest.mark.parametrize("levels", [17, None])
def test_nan_is_never_a_picture(levels: int | None) -> None:
    with pytest.raises(ValueError, match="NaN"):
        spec(levels).to_uint8(torch.tensor([0.0, torch.nan]))
