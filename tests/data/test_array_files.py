"""What a file may hold beside plain arrays: one line each, or the same values."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from flowbench.data import get

N = 40
VALUES = torch.randn(N, 3, generator=torch.Generator().manual_seed(0))
LABEL = torch.arange(N) % 4


def message(call: Callable[[], object]) -> str:
    with pytest.raises(ValueError) as caught, warnings.catch_warnings():  # noqa: PT011
        warnings.simplefilter("error")  # the line is all that is printed
        call()
    text = str(caught.value)
    assert "\n" not in text
    assert "\x1b" not in text
    return text


def rows(values: Any) -> list[tuple[float, ...]]:
    return sorted(tuple(row) for row in np.asarray(values, dtype=np.float64).tolist())


def stored(path: Path, kind: str = "pt") -> torch.Tensor:
    return torch.cat([split.values for split in get(kind, path).load(Path()).values()])


class Subclass(torch.Tensor):
    """Somebody's own kind of tensor."""


def quantized() -> torch.Tensor:
    return torch.quantize_per_tensor(VALUES, 0.1, 0, torch.qint8)


def nested(layout: torch.layout) -> torch.Tensor:
    return torch.nested.nested_tensor([torch.randn(2, 3), torch.randn(4, 3)], layout=layout)


def scripted() -> nn.Module:
    return torch.jit.trace(nn.Linear(3, 3), torch.zeros(1, 3))


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "coo": (lambda: VALUES.to_sparse(), ": is a sparse tensor (sparse_coo); save x.to_dense()"),
    "csr": (lambda: VALUES.to_sparse_csr(), "(sparse_csr); save x.to_dense()"),
    "csc": (lambda: VALUES.to_sparse_csc(), "(sparse_csc); save x.to_dense()"),
    "bsr": (lambda: VALUES.to_sparse_bsr((2, 1)), "(sparse_bsr); save x.to_dense()"),
    "sparse in a dict": (lambda: {"x": VALUES.to_sparse()}, "'x' is a sparse tensor"),
    "sparse labels": (lambda: {"x": VALUES, "label": LABEL.to_sparse()}, "'label' is a sparse tensor"),
    "quantized": (quantized, "is a quantized tensor; save x.dequantize()"),
    "meta": (lambda: VALUES.to("meta"), "lies on the meta device and has no values"),
    "nested": (lambda: nested(torch.strided), "is a nested tensor, samples of several shapes"),
    "jagged": (lambda: nested(torch.jagged), "is a nested tensor, samples of several shapes"),
    "float8": (lambda: VALUES.to(torch.float8_e4m3fn), "is of type float8_e4m3fn; save float32"),
    "complex": (lambda: VALUES.to(torch.complex64), "type complex64: complex values"),
    "list": (lambda: [VALUES, VALUES], "is a list of 2; save one tensor, or a dict of them"),
    "pair": (lambda: (VALUES, LABEL), "is a tuple of 2; save one tensor"),
    "ragged": (lambda: [[0.0, 1.0], [2.0]], "is a list of unequal lengths"),
    "text": (lambda: "data", "is text, no plain numbers"),
    "nothing": (lambda: None, "is a NoneType, no plain numbers"),
    "number": (lambda: 5, "integers must be images"),
    "extra key": (lambda: {"x": VALUES, "name": "mine"}, "key 'name' is not used; known: label, num_classes, x, y"),
    "extra objects": (lambda: {"x": VALUES, "epoch": {"a": [1]}}, "key 'epoch' is not used"),
    "no label": (lambda: {"x": VALUES, "label": None}, "'label' is a NoneType"),
    "empty dict": (dict, "key 'x' is missing; found: none"),
    "weights of a network": (lambda: nn.Linear(3, 3).state_dict(), "key 'x' is missing; found: bias, weight"),
    "checkpoint": (lambda: {"state_dict": {}, "epoch": 3}, "key 'x' is missing; found: epoch, state_dict"),
    "network": (lambda: nn.Linear(3, 3), "cannot be read as pt (it holds an object of torch.nn.modules.linear.Linear"),
    "path": (lambda: {"x": Path("/")}, "(it holds an object of pathlib.PosixPath, which reading would execute"),
    "own tensors": (lambda: VALUES.as_subclass(Subclass), "which reading would execute; save tensors alone"),
    "own tensors inside": (lambda: {"x": VALUES.as_subclass(Subclass)}, "which reading would execute"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_torch_file_holds_beside_plain_tensors_is_one_line(tmp_path: Path, name: str) -> None:
    make, expected = REFUSED[name]
    path = tmp_path / "mine.pt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.save(make(), path)
    text = message(lambda: get("pt", path))
    assert text.startswith(f"{path}: ")
    assert expected in text


def test_torchscript_is_not_run(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scripted().save(tmp_path / "mine.pt")
    assert "(it holds more than tensors, which reading would execute" in message(
        lambda: get("pt", tmp_path / "mine.pt")
    )


ACCEPTED: dict[str, tuple[Callable[[], Any], torch.Tensor]] = {
    "plain": (lambda: VALUES, VALUES),
    "requires a gradient": (lambda: VALUES.clone().requires_grad_(), VALUES),
    "parameter": (lambda: nn.Parameter(VALUES), VALUES),
    "buffer": (lambda: nn.Buffer(VALUES), VALUES),
    "half": (lambda: VALUES.half(), VALUES.half()),
    "bfloat16": (lambda: VALUES.bfloat16(), VALUES.bfloat16().float()),
    "double": (lambda: VALUES.double(), VALUES),
    "transposed": (lambda: VALUES.T.contiguous().T, VALUES),
    "every second row": (lambda: VALUES.repeat_interleave(2, 0)[::2], VALUES),
    "negative view": (lambda: torch.complex(VALUES, -VALUES).conj().imag, VALUES),
    "lists of numbers": (lambda: VALUES.tolist(), VALUES),
    "dict": (lambda: {"x": VALUES, "y": LABEL, "num_classes": 4}, VALUES),
}


@pytest.mark.parametrize("name", ACCEPTED)
def test_tensors_of_any_make_are_their_values(tmp_path: Path, name: str) -> None:
    make, values = ACCEPTED[name]
    torch.save(make(), tmp_path / "mine.pt")
    assert rows(stored(tmp_path / "mine.pt")) == rows(values)


NUMPY_REFUSED: dict[str, tuple[Any, str]] = {
    "structured": (np.zeros(N, dtype=[("a", "f4")]), "is a structured array, no plain numbers"),
    "dates": (np.zeros((N, 2), dtype="M8[s]"), "is dates, no plain numbers"),
    "durations": (np.zeros((N, 2), dtype="m8[s]"), "is durations, no plain numbers"),
    "text": (np.array(["a"] * N), "is text, no plain numbers"),
    "bytes": (np.array([b"ab"] * N), "is text, no plain numbers"),
    "long double": (np.zeros((N, 2), dtype=np.longdouble), "is of type float128, no plain numbers"),
    "objects": (np.array([print] * N, dtype=object), "it holds Python objects, which reading would execute"),
}


@pytest.mark.parametrize("kind", ["npy", "npz"])
@pytest.mark.parametrize("name", NUMPY_REFUSED)
def test_arrays_without_plain_numbers_are_one_line(tmp_path: Path, name: str, kind: str) -> None:
    array, expected = NUMPY_REFUSED[name]
    if name == "long double" and array.dtype.itemsize == 8:
        pytest.skip("long double is double on this machine")
    path = tmp_path / f"mine.{kind}"
    if kind == "npy":
        np.save(path, array, allow_pickle=True)
    else:
        np.savez(path, x=array)
    text = message(lambda: get(kind, path))
    assert text.startswith(f"{path}: ")
    assert expected in text


def test_an_array_that_is_not_used_is_never_read(tmp_path: Path) -> None:
    np.savez(tmp_path / "mine.npz", x=VALUES.numpy(), names=np.array([print] * N, dtype=object))
    assert "key 'names' is not used" in message(lambda: get("npz", tmp_path / "mine.npz"))


def test_a_damaged_member_of_an_archive_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "mine.npz"
    np.savez(path, x=VALUES.numpy())
    content = bytearray(path.read_bytes())
    content[200:204] = b"\0\0\0\0"
    path.write_bytes(bytes(content))
    assert f"{path}: 'x' cannot be read (BadZipFile: Bad CRC-32" in message(lambda: get("npz", path))


# ---- labels -----------------------------------------------------------------------------------------------

ONE_HOT = np.eye(4)[LABEL.numpy()]
LABELS: dict[str, tuple[Any, str]] = {
    "floats": (LABEL.numpy() * 1.0, "must be integers, got float64; save label.astype('int64')"),
    "bools": (LABEL.numpy() > 1, "must be integers, got bool; save label.astype('int64')"),
    "text": (np.array(list("abcd"))[LABEL.numpy()], "number the classes from 0: np.unique(label, return_inverse=True)"),
    "one-hot": (ONE_HOT, "must have shape (40,), got (40, 4); these are one-hot, save label.argmax(1)"),
    "one-hot integers": (ONE_HOT.astype(int), "save label.argmax(1)"),
    "a column": (LABEL.numpy()[:, None], "must have shape (40,), got (40, 1); save label[:, 0]"),
    "several labels": (np.ones((N, 2), dtype=int), "got (40, 2); give one class per sample"),
    "too few": (LABEL.numpy()[:-1], "must have shape (40,), got (39,); give one per sample"),
    "from one": (LABEL.numpy() + 1, "4 different values from 1 to 4, expected 0 to 3"),
    "with a gap": (LABEL.numpy() * 2, "4 different values from 0 to 6, expected 0 to 3; renumber them or declare"),
    "negative": (LABEL.numpy() - 1, "found -1 to 2"),
    "huge": (LABEL.numpy().astype(np.uint64) + np.uint64(2**63), "labels out of range"),
}


@pytest.mark.parametrize("name", LABELS)
def test_labels_of_another_kind_are_one_line_with_the_remedy(tmp_path: Path, name: str) -> None:
    label, expected = LABELS[name]
    np.savez(tmp_path / "mine.npz", x=VALUES.numpy(), label=label)
    text = message(lambda: get("npz", tmp_path / "mine.npz"))
    assert text.startswith(f"{tmp_path / 'mine.npz'}: ")
    assert expected in text


@pytest.mark.parametrize("dtype", ["u1", "i1", "<i2", ">i4", "i8", "u8"])
def test_integers_of_any_width_are_labels(tmp_path: Path, dtype: str) -> None:
    np.savez(tmp_path / "mine.npz", x=VALUES.numpy(), label=LABEL.numpy().astype(dtype))
    entry = get("npz", tmp_path / "mine.npz")
    labels = torch.cat([split.label for split in entry.load(Path()).values()])
    assert labels.dtype == torch.int64
    assert labels.bincount().tolist() == [10] * 4
