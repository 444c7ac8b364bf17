"""The one datamodule."""

from __future__ import annotations

import copy
import warnings
from dataclasses import replace
from functools import cached_property
from typing import Literal, cast

import torch
from lightning import LightningDataModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader

from flowbench.core.checks import check_count, check_number, check_seed
from flowbench.core.places import data_root
from flowbench.core.remarks import say_once
from flowbench.core.seeds import generator
from flowbench.data import catalogue
from flowbench.data.batch import Batch, check_groups
from flowbench.data.columns import check_column_name
from flowbench.data.dataset_entry import DatasetEntry
from flowbench.data.declaration import Declaration
from flowbench.data.grouped_sampler import GroupedSampler
from flowbench.data.samplers import BatchIndex, EndlessSampler, ShardedSampler, rows_of
from flowbench.data.spec import DataSpec
from flowbench.data.split import SPLITS, Split, stratified_order
from flowbench.data.split_dataset import SplitDataset

__all__ = ["FlowDataModule"]


class FlowDataModule(LightningDataModule):
    """Loads a dataset of the catalogue, or the user's own, and serves batches in model space.

    Training is an endless stream whose order is a function of (seed, samples drawn): a run resumed from
    ``trainer.global_step`` sees the batches it would have seen. Give the trainer ``max_steps`` and an integer
    ``val_check_interval`` with ``check_val_every_n_epoch=None``; an epoch never ends. (Automatic optimisation
    with one optimiser is assumed: ``global_step`` counts its steps.) Evaluation covers a split exactly once,
    without padding, on any number of processes.

    Args:
        dataset: a name of the catalogue, or ``npz``, ``npy``, ``pt``, ``image_folder`` for your own data at
            ``path``.
        path: your file or folder.
        image_size: ``image_folder`` only: shorter side scaled to this many pixels, 1 to 65,536, centre square kept.
        shape: of one sample of your own data, (d,) or (C, H, W), where you know it beforehand: data of another shape
            are refused, and ``flowbench count`` needs no data.
        num_classes: of your own data, declared together with ``shape``; None declares them unlabelled.
        levels: of your own data: the values are integers 0..levels-1, 2 to 256; None is 256 for uint8 images.
        value_range: of your own float images: [low, high], which becomes [-1, 1].
        standardize: of your own vectors: shift and scale every dimension so that the training split has mean 0 and
            standard deviation 1. Likelihoods and written samples stay in the file's units. False takes the values as
            they are; None refuses values that are far from that.
        batch_size: samples per training batch over all processes, >= 1.
        group_size: so many consecutive training samples share a class, >= 1, a divisor of ``batch_size``: a family of
            sequences sees ``batch_size / group_size`` of them, every other family a batch of ``batch_size``. Classes
            keep their frequencies, and samples are used equally often; see
            :class:`~flowbench.data.GroupedSampler`. Evaluation is never grouped.
        eval_batch_size: most samples per evaluation batch and process, >= 1; does not change a metric. (The training
            objective on the validation split draws its noise and its pairs by the batch, so ``val/loss`` depends on
            this and on the number of processes.)
        num_workers: worker processes per loader, 0 to 1,000; does not change batches.
        train_on_val: train on the training and the validation split together, as published recipes do: the whole
            canonical training set of MNIST or CIFAR-10. ``val`` stays, but is then a part of the training data and
            only a look.
        train_size: train on this many samples of the training split, >= 1; None is all. The samples are keyed by the
            seed, hold the classes in proportion, and those of a smaller size are among those of a larger one. All that
            is compared with the training split, references and metrics, still takes the whole of it.
        random_flip: mirror each training image left to right with probability 1/2, keyed by (seed, position in the
            stream). Evaluation never does. Refused for catalogue datasets whose mirror images are no samples.
        dequantize: ``uniform``: grey levels get uniform noise within their bin, as likelihoods in bits/dim
            require. ``none``: bin centres; a density fitted to them concentrates on a lattice, so likelihoods
            mean nothing. Continuous data are never changed.
        label_noise: share of training labels replaced by labels drawn uniformly from all classes, in [0, 1], keyed by
            (seed, sample): what classifier-free guidance is put to the test with. Everything that is measured keeps
            the true labels.
        condition: name of a column of the data that becomes the batches' ``condition``: maps that a flow is trained
            under, say. None is none.
        seed: keys the order, the dequantisation and the noise of labels, >= 0; None means 0.

    Raises:
        ValueError: for an unknown dataset or an option out of range.

    Example:
        >>> data = FlowDataModule("digits", batch_size=32)
        >>> data.spec.summary, data.spec.levels
        ('images 1x8x8', 17)
        >>> data.setup("fit")
        >>> batch = next(iter(data.train_dataloader()))
        >>> batch.x.shape
        torch.Size([32, 1, 8, 8])
    """

    def __init__(
        self,
        dataset: str = "digits",
        path: str | None = None,
        image_size: int | None = None,
        shape: tuple[int, ...] | None = None,
        num_classes: int | None = None,
        levels: int | None = None,
        value_range: tuple[float, float] | None = None,
        standardize: bool | None = None,
        batch_size: int = 128,
        group_size: int = 1,
        eval_batch_size: int = 512,
        num_workers: int = 0,
        train_on_val: bool = False,
        train_size: int | None = None,
        random_flip: bool = False,
        dequantize: Literal["uniform", "none"] = "uniform",
        label_noise: float = 0.0,
        condition: str | None = None,
        seed: int | None = None,
    ) -> None:
        super().__init__()
        values = Declaration(levels, value_range, standardize)
        catalogue.check(dataset, path, image_size, random_flip, values)
        catalogue.check_declaration(dataset, shape, num_classes)
        check_count("batch_size", batch_size)
        check_count("group_size", group_size, hint="1 is no groups")
        check_groups(batch_size, group_size)
        check_count("eval_batch_size", eval_batch_size)
        check_count("num_workers", num_workers, at_least=0, at_most=1000)
        check_count("train_size", train_size, or_none=True, hint="null is the whole training split")
        check_number("label_noise", label_noise, at_least=0, at_most=1, hint="0.3 replaces 30 % of the labels")
        check_seed("seed", seed, or_none=True)
        if dequantize not in ("uniform", "none"):
            raise ValueError(f"dequantize: must be 'uniform' or 'none', got {dequantize!r}")
        self.dataset = dataset
        self.path = path
        self.image_size = image_size
        self.declared = None if shape is None else (tuple(shape), num_classes)
        self.declared_values = values
        self.batch_size = batch_size
        self.group_size = group_size
        self.eval_batch_size = eval_batch_size
        self.num_workers = num_workers
        self.train_on_val = train_on_val
        self.train_size = train_size
        self.random_flip = random_flip
        self.dequantize = dequantize
        self.label_noise = label_noise
        self.condition = condition
        self.seed = 0 if seed is None else seed
        if path is None and condition is not None:
            _ = self.entry  # names its columns, and nothing is read

    @cached_property
    def entry(self) -> DatasetEntry:
        """The dataset's entry; the user's own data are read at the first access, and what they are is printed."""
        entry = catalogue.get(self.dataset, self.path, self.image_size, self.random_flip, self.declared_values)
        found = (entry.spec.shape, entry.spec.num_classes)
        if self.declared not in (None, found):
            raise ValueError(
                f"{self.path}: holds samples of shape {found[0]} in {found[1]} classes, but data.shape and "
                f"data.num_classes declare {self.declared[0]} and {self.declared[1]}; make them agree"
            )
        if self.condition is not None:
            check_column_name("data.condition", self.condition, entry.columns, entry.name)
        if entry.understood:
            say_once(f"data: {entry.understood}")
        return entry

    @property
    def spec(self) -> DataSpec:
        """Shape, classes and value grid; available before ``setup``.

        Typed as flows take it, which refuse other kinds; a module for another kind receives that kind.
        """
        return cast(DataSpec, self.entry.spec)

    @property
    def known_spec(self) -> DataSpec:
        """The specification from the catalogue or the user's declaration, else from the data, which are read."""
        if self.declared is None:
            return self.spec
        return catalogue.declared_spec(self.dataset, *self.declared)

    @cached_property
    def _splits(self) -> dict[str, Split]:
        splits = self.entry.load(data_root(self.dataset))
        self.entry.check_splits(splits)
        return {**splits, "train": splits["train"].join(splits["val"])} if self.train_on_val else splits

    def split(self, name: str) -> Split:
        """The samples of ``train``, ``val`` or ``test``; ValueError for another name.

        With ``train_on_val`` the training split is followed by the validation split.
        """
        if name not in SPLITS:
            raise ValueError(f"split: must be one of {', '.join(SPLITS)}, got {name!r}")
        return self._splits[name]

    @cached_property
    def train_indices(self) -> Tensor | None:
        """Places in the training split of the samples that are trained on, ascending, int64; None is all of it.

        Raises:
            ValueError: the split has fewer than ``train_size``.
        """
        if self.train_size is None:
            return None
        split = self.split("train")
        check_train_size(self.train_size, len(split), self.dataset)
        order = stratified_order(len(split), f"train_size/{self.seed}", split.label)
        return order[: self.train_size].sort().values

    @property
    def num_train(self) -> int:
        """Number of samples that are trained on: of one epoch."""
        return len(self.split("train")) if self.train_indices is None else len(self.train_indices)

    @property
    def train_places(self) -> Tensor:
        """Places in the training split of the samples that are trained on, ascending, int64 (num_train,)."""
        return torch.arange(len(self.split("train"))) if self.train_indices is None else self.train_indices

    def centred(self) -> FlowDataModule:
        """The same data at the centres of their bins, without a trainer: training batches are whole global ones.

        Data that are loaded are shared.
        """
        made = copy.copy(self)
        made.trainer, made.dequantize = None, "none"
        return made

    def model_values(self, name: str, indices: Tensor | slice | None = None) -> Tensor:
        """Samples of a split in model space: exactly what evaluation batches hold.

        Dequantised by (seed, split, sample index), so a chunk is the same as that chunk of the whole. Computed at
        each call. The whole of a large split takes gigabytes; take it chunk by chunk.

        Args:
            name: ``train``, ``val`` or ``test``.
            indices: which samples, int64 (M,) or a slice; None is all.

        Returns:
            float32, shape (M, *D).
        """
        item = BatchIndex(self._indices(name, indices))
        return self._dataset(name).model_values(self._rows(name, indices), item)

    def uint8_images(self, name: str, indices: Tensor | slice | None = None) -> Tensor:
        """Samples of a split as 8-bit pictures; equal to ``spec.to_uint8(model_values(name, indices))``.

        Quantised images are never dequantised on the way, which makes it fast.

        Args:
            name: ``train``, ``val`` or ``test``.
            indices: which samples, int64 (M,) or a slice; None is all.

        Returns:
            uint8, shape (M, C, H, W), a copy.

        Raises:
            ValueError: for vectors.
        """
        values = self._rows(name, indices)
        return self.spec.to_uint8(values) if self.spec.levels is None else self.spec.grid_to_uint8(values)

    def columns(self, name: str, indices: Tensor | slice | None = None) -> dict[str, Tensor]:
        """Columns of the data as evaluation batches hold them.

        Args:
            name: ``train``, ``val`` or ``test``.
            indices: which samples, int64 (M,) or a slice; None is all.

        Returns:
            By name, first dimension M.
        """
        return {column: _taken(values, indices) for column, values in self.split(name).columns.items()}

    def conditions(self, name: str, indices: Tensor | slice | None = None) -> Tensor | None:
        """The column that ``data.condition`` names, as :meth:`columns` has it; None where it names none."""
        return None if self.condition is None else _taken(self.split(name).columns[self.condition], indices)

    def _rows(self, name: str, indices: Tensor | slice | None) -> Tensor:
        return _taken(self.split(name).values, indices)

    def _indices(self, name: str, indices: Tensor | slice | None) -> Tensor:
        if isinstance(indices, Tensor):
            return indices
        every = torch.arange(len(self.split(name)))
        return every if indices is None else every[indices]

    @property
    def samples_seen(self) -> int:
        """Samples drawn from the training stream by all processes so far; 0 without a trainer."""
        if self.trainer is None:
            return 0
        return self.trainer.global_step * self.trainer.accumulate_grad_batches * self.batch_size

    def train_batch_at(self, position: int) -> Batch:
        """This process's part of the training batch that begins at ``position`` samples of the stream."""
        return self._train_dataset()[self._stream().batch_at(position)]

    def train_batch_of(self, indices: Tensor, position: int) -> Batch:
        """This process's part of the training batch at ``position`` with other samples in it than the stream's.

        What a place in the stream keys, mirroring and dequantisation, is as for the stream's own. Such samples are in
        no groups: the batch's ``group_size`` is 1 whatever ``data.group_size`` says.

        Args:
            indices: places in the training split, as many as the stream gives this process, int64 (B,) on the CPU.
            position: of the global batch.
        """
        return self._train_dataset()[BatchIndex(indices, position)]

    @property
    def train_label(self) -> Tensor | None:
        """Labels of the whole training split as training batches have them, ``label_noise`` included."""
        return self._noisy_labels if self.label_noise else self.split("train").label

    def setup(self, stage: str) -> None:
        """Load the data and refuse trainer settings that would break the promises above.

        Args:
            stage: Lightning's name of the stage; all splits are loaded for each.

        Raises:
            ValueError: when the trainer would replace the samplers, or batches cannot be shared evenly.
        """
        _ = self._splits
        if self.trainer is None:
            return
        self.check_trainer(self.trainer)
        if stage == "fit":
            self._stream()
        # True of images decoded one by one; here a batch is one indexing operation in memory or in a memory map.
        warnings.filterwarnings("ignore", message=".*does not have many workers.*")

    def check_trainer(self, trainer: Trainer) -> None:
        """Refuse trainer settings that would break the promises above, and options that such data do not have.

        No data are read but the user's own without a declared shape.

        Raises:
            ValueError: when the trainer would replace the samplers, batches cannot be shared evenly among the
                processes, or labels that are not there shall be noisy.
        """
        injects = trainer._accelerator_connector.use_distributed_sampler
        if trainer.world_size > 1 and injects:
            raise ValueError("trainer.use_distributed_sampler: True would pad evaluation with repeats; set it to False")
        # Lightning sets this attribute without declaring it.
        overfit = getattr(trainer, "overfit_batches", 0)
        if overfit:
            raise ValueError(
                f"trainer.overfit_batches: {overfit} does not fit an endless stream; train on a small npz instead"
            )
        # Samplers of the smallest split have refusals of their own.
        if self.group_size == 1:
            EndlessSampler(1, self.batch_size, self.seed, 0, trainer.world_size)
        else:
            group = torch.zeros(self.group_size, dtype=torch.int64)
            GroupedSampler(group, self.group_size, self.batch_size, self.seed, 0, trainer.world_size)
        if self.label_noise and self.known_spec.num_classes is None:
            raise ValueError(_no_labels(self.dataset, "label_noise", 0))
        if self.group_size > 1 and self.known_spec.num_classes is None:
            raise ValueError(_no_labels(self.dataset, "group_size", 1))

    def train_dataloader(self) -> DataLoader[Batch]:
        """The endless stream, from :attr:`samples_seen` on; it has no length."""
        return self._loader(self._train_dataset(), self._stream())

    def val_dataloader(self) -> DataLoader[Batch]:
        """The validation split, once."""
        return self.evaluation_loader("val")

    def test_dataloader(self) -> DataLoader[Batch]:
        """The test split, once."""
        return self.evaluation_loader("test")

    def evaluation_loader(self, name: str, num: int | None = None) -> DataLoader[Batch]:
        """A split once, in the order of its indices, shared out over the processes without padding.

        Args:
            name: `train`, `val` or `test`.
            num: samples, counted from the first; None takes all.
        """
        dataset = self._dataset(name)
        count = len(dataset) if num is None else min(num, len(dataset))
        return self._loader(dataset, ShardedSampler(count, self.eval_batch_size, *self._shard()))

    def _shard(self) -> tuple[int, int]:
        """This process's rank and the number of processes."""
        return (0, 1) if self.trainer is None else (self.trainer.global_rank, self.trainer.world_size)

    def _stream(self) -> EndlessSampler:
        members, shard, start = self.train_indices, self._shard(), self._position
        if self.group_size == 1:
            return EndlessSampler(self.num_train, self.batch_size, self.seed, *shard, start=start, members=members)
        label = self.train_label
        if label is None:
            raise ValueError(_no_labels(self.dataset, "group_size", 1))
        label = label if members is None else label[members]
        return GroupedSampler(label, self.group_size, self.batch_size, self.seed, *shard, start=start, members=members)

    def _position(self) -> int:
        return self.samples_seen

    def _dataset(self, name: str, batch_size: int = 0, rows: slice = slice(None)) -> SplitDataset:
        uniform = self.dequantize == "uniform"
        flip = self.random_flip and name == "train"
        spatial = {column for column, declared in self.entry.columns.items() if declared.spatial}
        keys = (name, self.seed, uniform, batch_size, rows, flip)
        return SplitDataset(self.spec, self.split(name), *keys, spatial, self.condition)

    def _train_dataset(self) -> SplitDataset:
        dataset = self._dataset("train", self.batch_size, rows_of(self.batch_size, *self._shard()))
        if self.label_noise:
            dataset.split = replace(dataset.split, label=self._noisy_labels)
        return dataset

    @cached_property
    def _noisy_labels(self) -> Tensor:
        label, classes = self.split("train").label, self.spec.num_classes
        if label is None or classes is None:
            raise ValueError(_no_labels(self.dataset, "label_noise", 0))
        rng = generator(self.seed, "label-noise")
        replaced = torch.rand(len(label), generator=rng) < self.label_noise
        return torch.where(replaced, torch.randint(classes, (len(label),), generator=rng), label)

    def _loader(self, dataset: SplitDataset, sampler: EndlessSampler | ShardedSampler) -> DataLoader[Batch]:
        # batch_size=None: the sampler yields whole batches and the dataset gathers them, nothing is collated.
        return DataLoader(
            dataset, batch_size=None, sampler=sampler, num_workers=self.num_workers, pin_memory=self._feeds_a_gpu()
        )

    def _feeds_a_gpu(self) -> bool:
        return self.trainer is not None and self.trainer.strategy.root_device.type == "cuda"


def _taken(values: Tensor, indices: Tensor | slice | None) -> Tensor:
    """Rows of a split."""
    if isinstance(indices, Tensor):
        return values.index_select(0, indices)
    return values if indices is None else values[indices]


def check_train_size(size: int | None, num_train: int | None, dataset: str) -> None:
    """Refuse more training samples than there are.

    Args:
        size: ``data.train_size``; None is the whole split.
        num_train: samples of the training split; None where that is not known.
        dataset: its name, for the message.

    Raises:
        ValueError: the split is smaller.
    """
    if size is not None and num_train is not None and size > num_train:
        raise ValueError(f"data.train_size: {dataset} has {num_train} training samples, got {size}; null takes all")


def _no_labels(dataset: str, option: str, off: int) -> str:
    return f"{option}: {dataset} has no labels; set it to {off}"
