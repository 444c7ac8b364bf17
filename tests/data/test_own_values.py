"""What the values of own data are taken for: every doubtful range is asked about, every answer is honoured."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from flowbench.data import DatasetEntry, DataSpec, Declaration, FlowDataModule, get
from flowbench.evaluation.samples import RealSet
from flowbench.tasks.generation import NegativeLogLikelihood
from flowbench.tasks.generation.likelihood import Densities, LogDensities
from tests.evaluation.known import compared

N = 40
RNG = np.random.default_rng(0)
GREY = RNG.integers(0, 256, (N, 6, 5), dtype=np.uint8)
COLOUR = RNG.integers(0, 256, (N, 3, 6, 5), dtype=np.uint8)
NORMAL = RNG.normal(size=(N, 3))
UNIT = RNG.random((N, 1, 4, 4))
LABEL = np.arange(N) % 4


def save(folder: Path, **arrays: Any) -> Path:
    np.savez(folder / "mine.npz", **arrays)
    return folder / "mine.npz"


def message(call: Callable[[], object]) -> str:
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        call()
    text = str(caught.value)
    assert "\n" not in text
    return text


def in_data_units(entry: DatasetEntry) -> np.ndarray:
    """All samples as the file held them: what model space stands for."""
    splits = entry.load(Path()).values()
    parts = [s.values if entry.spec.levels is not None else entry.spec.to_data(s.values) for s in splits]
    return torch.cat(parts).numpy()


def rows(values: np.ndarray) -> np.ndarray:
    flat = values.reshape(len(values), -1).astype(np.float64)
    return flat[np.lexsort(flat.T)]


@dataclass(frozen=True)
class Doubt:
    """Values that may be meant in several ways, the answers, and what each makes of the grid and of the extremes."""

    values: np.ndarray
    question: str
    answers: tuple[tuple[Declaration, int | None], ...]


LEVELS, RANGE, STANDARDIZE = (
    lambda k: Declaration(levels=k),
    lambda *ends: Declaration(value_range=ends),
    lambda flag: Declaration(standardize=flag),
)

DOUBTS = {
    "floats in [0, 1]": Doubt(
        UNIT, "declare data.value_range=[-1,1] or data.value_range=[0,1]", ((RANGE(-1, 1), None), (RANGE(0, 1), None))
    ),
    "floats in [-0.5, 0.5]": Doubt(
        UNIT - 0.5,
        "declare data.value_range=[-1,1] or data.value_range=[-0.5,0.5]",
        ((RANGE(-1, 1), None), (RANGE(-0.5, 0.5), None)),
    ),
    "floats that are all one": Doubt(np.ones((N, 1, 4, 4)), "data.value_range=[0,1]", ((RANGE(0, 1), None),)),
    "floats to 255": Doubt(
        COLOUR.astype(np.float32), "do not lie in [-1, 1]: declare data.value_range=[0,255]", ((RANGE(0, 255), None),)
    ),
    "floats beyond": Doubt(
        UNIT * 7 - 3, "declare data.value_range=[low,high], which becomes [-1, 1]", ((RANGE(-3, 4), None),)
    ),
    "dark uint8": Doubt(
        GREY % 17, "declare data.levels=17 for 17 levels, or data.levels=256", ((LEVELS(17), 17), (LEVELS(256), 256))
    ),
    "black uint8": Doubt(GREY * 0, "declare data.levels=2", ((LEVELS(2), 2), (LEVELS(256), 256))),
    "int64 images": Doubt(
        COLOUR.astype(np.int64), "int64 values from 0 to 255: declare data.levels=256", ((LEVELS(256), 256),)
    ),
    "uint16 images": Doubt(
        (GREY % 10).astype(np.uint16),
        "uint16 values from 0 to 9: declare data.levels=10",
        ((LEVELS(10), 10), (LEVELS(256), 256)),
    ),
    "bool images": Doubt(GREY > 127, "bool values from 0 to 1: declare data.levels=2", ((LEVELS(2), 2),)),
    "bool vectors": Doubt(NORMAL > 0, "bool values from 0 to 1: declare data.levels=2", ((LEVELS(2), 2),)),
    "uint8 vectors": Doubt(GREY.reshape(N, -1), "declare data.levels for vectors", ((LEVELS(256), 256),)),
    "integer vectors": Doubt(GREY.reshape(N, -1).astype(np.int32) % 5, "int32 values from 0 to 4", ((LEVELS(5), 5),)),
    "wide vectors": Doubt(
        NORMAL * 1e7, "declare data.standardize=true", ((STANDARDIZE(True), None), (STANDARDIZE(False), None))
    ),
    "narrow vectors": Doubt(
        NORMAL * 1e-3, "declare data.standardize=true", ((STANDARDIZE(True), None), (STANDARDIZE(False), None))
    ),
    "far vectors": Doubt(
        NORMAL + 50, "declare data.standardize=true", ((STANDARDIZE(True), None), (STANDARDIZE(False), None))
    ),
    "one wide dimension": Doubt(NORMAL * [1, 1, 300], "declare data.standardize=true", ((STANDARDIZE(True), None),)),
    "a constant dimension": Doubt(NORMAL * [1, 0, 1], "dimension 1 is constant", ((STANDARDIZE(False), None),)),
}


@pytest.mark.parametrize("name", DOUBTS)
def test_a_doubtful_range_is_asked_about_and_each_answer_is_honoured(tmp_path: Path, name: str) -> None:
    doubt = DOUBTS[name]
    path = save(tmp_path, x=doubt.values)
    text = message(lambda: get("npz", path))
    assert text.startswith(f"{path}: ")
    assert doubt.question in text
    for declared, levels in doubt.answers:
        with np.errstate(all="raise"):
            entry = get("npz", path, declared=declared) if name != "black uint8" else _with_copies(path, declared)
        assert entry.spec.levels == levels
        largest = float(np.abs(doubt.values.astype(np.float64)).max())
        np.testing.assert_allclose(rows(in_data_units(entry)), rows(doubt.values), rtol=1e-5, atol=1e-5 * largest)


def _with_copies(path: Path, declared: Declaration) -> DatasetEntry:
    with pytest.warns(UserWarning, match="holds only 1 different images"):
        return get("npz", path, declared=declared)


@pytest.mark.parametrize(
    ("values", "low", "high"), [(UNIT, 0.0, 1.0), (COLOUR.astype(np.float32), 0.0, 255.0), (UNIT * 9 - 4, -4.0, 5.0)]
)
def test_a_declared_range_becomes_the_whole_of_model_space(tmp_path, values, low, high):
    values = values.copy()
    values.flat[0], values.flat[1] = low, high
    entry = get("npz", save(tmp_path, x=values), declared=Declaration(value_range=(low, high)))
    model = torch.cat([split.values for split in entry.load(Path()).values()])
    assert (float(model.min()), float(model.max())) == (-1.0, 1.0)
    assert model.mean().item() == pytest.approx((values.mean() - (low + high) / 2) / ((high - low) / 2), rel=1e-4)


CLEAR = {
    "uint8 images": (COLOUR, 256),
    "grey uint8 images": (GREY, 256),
    "float images": (UNIT * 2 - 1, None),
    "float32 images": ((UNIT * 2 - 1).astype(np.float32), None),
    "float16 images": ((UNIT * 2 - 1).astype(np.float16), None),
    "vectors": (NORMAL, None),
    "float16 vectors": (NORMAL.astype(np.float16), None),
    "Fortran order": (np.asfortranarray(COLOUR), 256),
    "strided": (np.repeat(COLOUR, 2, axis=0)[::2], 256),
    "big-endian": (NORMAL.astype(">f8"), None),
    "big-endian 32": (NORMAL.astype(">f4"), None),
}


@pytest.mark.parametrize("name", CLEAR)
def test_what_is_clear_is_taken_without_a_question(tmp_path: Path, name: str) -> None:
    values, levels = CLEAR[name]
    entry = get("npz", save(tmp_path, x=values))
    assert (entry.spec.levels, entry.spec.units) == (levels, None)
    assert rows(in_data_units(entry)) == pytest.approx(rows(values), rel=1e-6)


REFUSED = {
    "negative integers": (COLOUR.astype(np.int64) - 300, None, "no levels 0 to 255; save float32"),
    "large integers": (COLOUR.astype(np.uint16) * 257, None, "uint16 values from 0 to 65535 are no levels"),
    "levels that do not fit": (GREY, LEVELS(17), "do not fit data.levels=17, which means 0 to 16"),
    "levels of floats": (UNIT, LEVELS(17), "data.levels=17 means integers"),
    "range of integers": (GREY, RANGE(0, 255), "data.value_range is for floats, found uint8"),
    "range of vectors": (NORMAL, RANGE(0, 1), "data.value_range is for images"),
    "range that does not fit": (UNIT * 2, RANGE(0, 1), "do not fit data.value_range=[0,1]"),
    "standardized images": (UNIT, STANDARDIZE(True), "data.standardize is for vectors"),
    "standardized integers": (GREY, STANDARDIZE(True), "data.standardize is for floats"),
    "standardized constant": (NORMAL * [1, 0, 0], STANDARDIZE(True), "dimension 1, 2 is constant"),
    "too large for float32": (NORMAL * 1e300, STANDARDIZE(False), "beyond the range of float32"),
    "complex": (NORMAL * 1j, None, "save real and imaginary parts as columns"),
    "grey floats": (UNIT[:, 0], None, "grey images are x[:, None]"),
    "a row of floats": (NORMAL[:, 0], None, "a single column is x[:, None]"),
    "channels last": (COLOUR.transpose(0, 2, 3, 1), None, "channels seem to come last"),
    "channels last floats": (COLOUR.transpose(0, 2, 3, 1) / 255.0, None, "channels seem to come last"),
    "NaN": (np.where(NORMAL > 2, np.nan, NORMAL), None, "NaN or infinite"),
    "one sample": (NORMAL[:1], None, "holds 1 samples; at least 10"),
    "no sample": (NORMAL[:0], None, "holds 0 samples; at least 10"),
    "empty dimension": (COLOUR[:, :, :0], None, "a dimension is empty"),
    "five dimensions": (COLOUR[None], None, "integers must be images"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_meant_is_refused_in_one_line(tmp_path: Path, name: str) -> None:
    values, declared, expected = REFUSED[name]
    path = save(tmp_path, x=values)
    text = message(lambda: get("npz", path, declared=declared))
    assert text.startswith(f"{path}: ")
    assert expected in text


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"levels": 1}, r"levels must be a whole number in \[2, 256\] or None, got 1"),
        ({"levels": 257}, "levels must be"),
        ({"levels": True}, "levels must be"),
        (
            {"value_range": (1.0, 1.0)},
            r"value_range must be two numbers in .*, the first below the second, got \(1.0, 1.0\)",
        ),
        ({"value_range": (0.0, np.inf)}, r"value_range\[1\] must be a number in .*, got inf"),
        ({"value_range": (np.nan, 1.0)}, r"value_range\[0\] must be a number in .*, got nan"),
        ({"value_range": (0.0,)}, "value_range must be a list of 2 numbers, got"),
        ({"levels": 3, "value_range": (0.0, 1.0)}, "levels: means integers, value_range is for floats"),
        ({"levels": 3, "standardize": True}, "levels: means integers"),
        ({"value_range": (0.0, 1.0), "standardize": True}, "standardize: is for vectors, value_range for images"),
    ],
)
def test_declarations_out_of_range_are_refused(options: dict[str, Any], expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        Declaration(**options)


@pytest.mark.parametrize("options", [{"levels": 17}, {"value_range": (0.0, 1.0)}, {"standardize": False}])
def test_the_catalogue_takes_no_declaration(options: dict[str, Any]) -> None:
    (name,) = options
    with pytest.raises(ValueError, match=f"{name}: the catalogue knows the values of 'digits'; remove {name}"):
        FlowDataModule("digits", **options)


# ---- standardisation --------------------------------------------------------------------------------------


def test_standardized_training_points_have_mean_zero_and_deviation_one(tmp_path: Path) -> None:
    raw = NORMAL * [1e-4, 1.0, 1e6] + [0.0, 5.0, 1.7e9]
    entry = get("npz", save(tmp_path, x=raw, label=LABEL), declared=Declaration(standardize=True))
    train = entry.load(Path())["train"].values.double().numpy()
    assert train.mean(axis=0) == pytest.approx(np.zeros(3), abs=1e-6)
    assert train.std(axis=0) == pytest.approx(np.ones(3), rel=1e-6)


def test_the_affine_map_is_that_of_the_training_split_alone(tmp_path: Path) -> None:
    raw = NORMAL * 100
    arrays = {"train": raw[:20], "val": raw[20:30] + 1e4, "test": raw[30:]}
    entry = get("npz", save(tmp_path, **arrays), declared=Declaration(standardize=True))
    assert entry.spec.units.shift == pytest.approx(tuple(raw[:20].mean(axis=0)))
    assert entry.spec.units.scale == pytest.approx(tuple(raw[:20].std(axis=0)))


@pytest.mark.parametrize("dims", [1, 3])
def test_likelihoods_are_those_of_the_files_units(tmp_path: Path, dims: int) -> None:
    raw = NORMAL[:, :dims] * np.array([20.0, 300.0, 0.001])[:dims] + 1000
    np.savez(tmp_path / "mine.npz", train=raw[:20], val=raw[20:30], test=raw[30:])
    data = FlowDataModule("npz", path=str(tmp_path / "mine.npz"), standardize=True)
    test = RealSet(data, "test")
    # A flow that maps the standardised points to themselves: its density is the standard normal's.
    log_prob = torch.distributions.Normal(0.0, 1.0).log_prob(test.points().double()).sum(1)
    answers = compared(test, test, {}, given={LogDensities(): Densities(log_prob)})
    (row,) = NegativeLogLikelihood().measure(answers)
    density = stats.norm(raw[:20].mean(axis=0), raw[:20].std(axis=0))
    assert row.value == pytest.approx(-density.logpdf(raw[30:]).sum(axis=1).mean(), rel=1e-5)
    assert (row.unit, row.protocol) == ("nats", "exact/test/10/data-units")


@given(
    low=st.floats(-1e4, 1e4),
    width=st.floats(1e-3, 1e4),
    values=st.lists(st.floats(-1, 1, width=32), min_size=1, max_size=8),
)
@settings(max_examples=50, deadline=None)
def test_units_go_there_and_back_and_count_their_volume(low: float, width: float, values: list[float]) -> None:
    from flowbench.data import Units

    units = Units((low,), (width,))
    spec = DataSpec("any", "1", (len(values),), units=units)
    x = torch.tensor([values])
    assert torch.allclose(units.from_data(units.to_data(x)), x.double(), atol=1e-9 * (1 + abs(low) / width))
    jacobian = torch.autograd.functional.jacobian(lambda v: units.to_data(v)[0], x[0].double()[None])[:, 0]
    assert spec.log_volume == pytest.approx(torch.linalg.slogdet(jacobian).logabsdet.item(), abs=1e-9)


# ---- what is printed --------------------------------------------------------------------------------------

LINES = {
    "cut": (
        {"x": COLOUR, "label": LABEL},
        {},
        "32 + 4 + 4 (train + val + test, cut 80/10/10 by class), images 3x6x5, uint8 from 0 to 255 on 256 levels, "
        "4 classes of 10 to 10",
    ),
    "given": (
        {"train": NORMAL[:30], "val": NORMAL[30:35], "test": NORMAL[35:]},
        {},
        "30 + 5 + 5 (train + val + test, as given), vectors of 3, float64 from {low:.4g} to {high:.4g} taken as they "
        "are, unlabelled",
    ),
    "standardized": (
        {"x": NORMAL},
        {"standardize": True},
        "32 + 4 + 4 (train + val + test, cut 80/10/10), vectors of 3, float64 from {low:.4g} to {high:.4g} "
        "standardized, unlabelled",
    ),
    "range": (
        {"x": UNIT.astype(np.float32)},
        {"value_range": (0.0, 1.0)},
        "32 + 4 + 4 (train + val + test, cut 80/10/10), images 1x4x4, float32 from {low:.4g} to {high:.4g} where "
        "[0, 1] becomes [-1, 1], unlabelled",
    ),
    "levels": (
        {"x": GREY.astype(np.int64) % 17},
        {"levels": 17},
        "32 + 4 + 4 (train + val + test, cut 80/10/10), images 1x6x5, int64 from 0 to 16 on 17 levels, unlabelled",
    ),
}


@pytest.mark.parametrize("name", LINES)
def test_what_was_understood_is_one_line_on_stderr_once(tmp_path, capsys, name):
    arrays, options, expected = LINES[name]
    path = save(tmp_path, **arrays)
    values = np.concatenate([array for key, array in arrays.items() if key != "label"])
    for _ in range(2):
        _ = FlowDataModule("npz", path=str(path), **options).spec
    printed = capsys.readouterr()
    assert printed.out == ""
    expected = expected.format(low=values.min(), high=values.max())
    assert printed.err.splitlines() == [f"data: npz {path}: {expected}"]


def test_only_the_first_process_prints(tmp_path, capsys, monkeypatch):
    from lightning.pytorch.utilities.rank_zero import rank_zero_only

    monkeypatch.setattr(rank_zero_only, "rank", 1)
    _ = FlowDataModule("npz", path=str(save(tmp_path, x=NORMAL))).spec
    assert capsys.readouterr().err == ""


def test_data_of_the_catalogue_need_no_line(capsys):
    _ = FlowDataModule("digits").split("train")
    assert capsys.readouterr().err == ""
