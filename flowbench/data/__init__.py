"""Data: the one datamodule and the catalogue of datasets."""

from __future__ import annotations

from flowbench.torchvision_guard import ensure_importable

ensure_importable()

from flowbench.data.batch import Batch  # noqa: E402
from flowbench.data.catalogue import get, list_datasets, register  # noqa: E402
from flowbench.data.datamodule import FlowDataModule  # noqa: E402
from flowbench.data.declaration import Declaration  # noqa: E402
from flowbench.data.densities import DENSITIES, Density2D, get_density  # noqa: E402
from flowbench.data.entry import DatasetEntry  # noqa: E402
from flowbench.data.samplers import BatchIndex, EndlessSampler, ShardedSampler  # noqa: E402
from flowbench.data.spec import DataSpec, Units  # noqa: E402
from flowbench.data.split import SPLITS, Split  # noqa: E402
from flowbench.data.user_data import USER_FORMATS  # noqa: E402

__all__ = [
    "DENSITIES",
    "SPLITS",
    "USER_FORMATS",
    "Batch",
    "BatchIndex",
    "DataSpec",
    "DatasetEntry",
    "Declaration",
    "Density2D",
    "EndlessSampler",
    "FlowDataModule",
    "ShardedSampler",
    "Split",
    "Units",
    "get",
    "get_density",
    "list_datasets",
    "register",
]
