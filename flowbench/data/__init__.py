"""Data: the one datamodule and the catalogue of datasets."""

from __future__ import annotations

from typing import TYPE_CHECKING

from flowbench.core.lazy import lazy_exports

if TYPE_CHECKING:
    from flowbench.data.batch import Batch
    from flowbench.data.catalogue import get, list_datasets, register
    from flowbench.data.columns import Column
    from flowbench.data.datamodule import FlowDataModule
    from flowbench.data.dataset_entry import DatasetEntry
    from flowbench.data.declaration import Declaration
    from flowbench.data.densities import DENSITIES, Density2D, get_density
    from flowbench.data.grouped_sampler import GroupedSampler
    from flowbench.data.samplers import BatchIndex, EndlessSampler, ShardedSampler
    from flowbench.data.spec import DataSpec, Units
    from flowbench.data.spec_base import Spec
    from flowbench.data.spec_kinds import GraphSpec, TokenSpec, VideoSpec
    from flowbench.data.split import SPLITS, Split
    from flowbench.data.user_formats import USER_FORMATS

__all__ = [
    "DENSITIES",
    "SPLITS",
    "USER_FORMATS",
    "Batch",
    "BatchIndex",
    "Column",
    "DataSpec",
    "DatasetEntry",
    "Declaration",
    "Density2D",
    "EndlessSampler",
    "FlowDataModule",
    "GraphSpec",
    "GroupedSampler",
    "ShardedSampler",
    "Spec",
    "Split",
    "TokenSpec",
    "Units",
    "VideoSpec",
    "get",
    "get_density",
    "list_datasets",
    "register",
]

__getattr__ = lazy_exports(__name__)
