"""Source distributions: where a flow starts at time 0."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from flowbench.core.checks import check_scale
from flowbench.core.seeds import derive_seed, indexed_normal

__all__ = ["FittedSource", "GaussianSource", "Source", "log_standard_normal"]

_EXTRA_STATE = "_extra_state"


class Source(nn.Module, ABC):
    """A distribution with a density that is easy to draw from.

    It is a module so that what was fitted to data travels in checkpoints; it has neither parameters nor buffers, and a
    source that is not fitted adds no key to a state dict.

    Example:
        >>> class UniformSource(Source):  # on the cube [0, 1]^d
        ...     def sample(self, num, shape, generator, device="cpu"):
        ...         return torch.rand(num, *shape, generator=generator).to(device)
        ...     def log_prob(self, x):
        ...         return torch.where(((x >= 0) & (x <= 1)).flatten(1).all(1), 0.0, -torch.inf).double()
        >>> UniformSource().sample_indexed([0, 7], (3, 8, 8), seed=0).shape
        torch.Size([2, 3, 8, 8])
    """

    @property
    def needs_fit(self) -> bool:
        """Whether :meth:`fit` must be called before anything is drawn."""
        return False

    @property
    def is_isotropic(self) -> bool:
        """Whether the distribution is the same in all directions from the origin."""
        return False

    @property
    def is_standard_normal(self) -> bool:
        """Whether it is N(0, I), which some paths and conversions require."""
        return False

    @property
    def fit_flops(self) -> float:
        """Operations of the fit that was made here, which count as training; 0 where they are few."""
        return 0.0

    @property
    def fit_seconds(self) -> float:
        """Wall time of that fit; 0 where its operations are not counted."""
        return 0.0

    @property
    def is_paired(self) -> bool:
        """Whether training draws depend on the data point, so that pairs are not independent."""
        return False

    def fit(self, data_points: Tensor, generator: torch.Generator) -> None:
        """Set what depends on the data; nothing for a source that does not.

        Args:
            data_points: training points where the flow lives, shape (N, *D).
            generator: source of every random number.
        """

    @abstractmethod
    def sample(
        self, num: int, shape: tuple[int, ...], generator: torch.Generator, device: torch.device | str = "cpu"
    ) -> Tensor:
        """Draw ``num`` independent points, shape (num, *shape), on ``device``."""

    def sample_for(self, x1: Tensor, generator: torch.Generator) -> Tensor:
        """Draw a source point for each data point of a training batch.

        Args:
            x1: data points, shape (B, *D).
            generator: source of every random number.

        Returns:
            Shape (B, *D), on the device of ``x1``; independent of ``x1`` unless :attr:`is_paired`.
        """
        return self.sample(len(x1), tuple(x1.shape[1:]), generator, x1.device)

    def sample_indexed(
        self,
        indices: Iterable[int] | Tensor,
        shape: tuple[int, ...],
        seed: int,
        *names: str | int,
        device: torch.device | str = "cpu",
    ) -> Tensor:
        """Draw one point per sample index, shape (N, *shape), the same for any batching and world size."""
        rng = torch.Generator()
        rows = [self.sample(1, shape, rng.manual_seed(derive_seed(seed, *names, int(i)))) for i in indices]
        return torch.cat(rows).to(device) if rows else torch.empty((0, *shape), device=device)

    @abstractmethod
    def log_prob(self, x: Tensor) -> Tensor:
        """Log-density in nats of x, shape (B, *D); returns (B,) in float64."""

    def __repr__(self) -> str:
        """Class and options on one line: protocols of measured rows quote it."""
        return f"{type(self).__name__}({self.extra_repr()})"


class GaussianSource(Source):
    """Isotropic normal distribution N(0, std^2 I).

    Args:
        std: standard deviation of each coordinate, in [1e-12, 1e12].

    Example:
        >>> source = GaussianSource()
        >>> source.sample(4, (3, 8, 8), torch.Generator().manual_seed(0)).shape
        torch.Size([4, 3, 8, 8])
        >>> source.log_prob(torch.zeros(1, 2))  # -ln(2 pi)
        tensor([-1.8379], dtype=torch.float64)
        >>> torch.equal(source.sample_indexed([0, 1], (2,), 7)[1:], source.sample_indexed([1], (2,), 7))
        True
    """

    def __init__(self, std: float = 1.0) -> None:
        super().__init__()
        check_scale("std", std)
        self.std = std

    @property
    def is_isotropic(self) -> bool:
        """Always."""
        return True

    @property
    def is_standard_normal(self) -> bool:
        """When the standard deviation is 1."""
        return self.std == 1.0

    def sample(
        self, num: int, shape: tuple[int, ...], generator: torch.Generator, device: torch.device | str = "cpu"
    ) -> Tensor:
        """Draw on the generator's device and move: a CPU generator gives the same noise to every device."""
        return self.std * torch.randn(num, *shape, generator=generator, device=generator.device).to(device)

    def sample_indexed(
        self,
        indices: Iterable[int] | Tensor,
        shape: tuple[int, ...],
        seed: int,
        *names: str | int,
        device: torch.device | str = "cpu",
    ) -> Tensor:
        """Noise keyed by (seed, names, index), see :func:`flowbench.core.seeds.indexed_normal`."""
        return self.std * indexed_normal(indices, shape, seed, *names, device=device)

    def log_prob(self, x: Tensor) -> Tensor:
        """Log-density in nats, summed over the dimensions in float64."""
        return log_standard_normal(x, self.std)

    def __repr__(self) -> str:
        return f"GaussianSource(std={self.std:g})"


class FittedSource(Source):
    """A source that is fitted to the data; the fit is an extra state of plain tensors, loadable with ``weights_only``.

    A checkpoint without that state, or with one of other options, leaves the source as it is: it can be given to a
    model that was trained without it, and is fitted then.
    """

    def __init__(self) -> None:
        super().__init__()
        self._values: dict[str, Tensor] = {}
        self._shape: tuple[int, ...] = ()
        self._placed: dict[torch.device, dict[str, Tensor]] = {}
        self._numbers: dict[str, float] = {}

    @property
    def needs_fit(self) -> bool:
        """Until :meth:`fit` was called, or a checkpoint brought the state."""
        return not self._values

    @abstractmethod
    def _fit(self, points: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """What to keep of points (N, d), float64 on the CPU, at least two, finite and not all at the origin."""

    def fit(self, data_points: Tensor, generator: torch.Generator) -> None:
        """Fit the source.

        Args:
            data_points: training points where the flow lives, shape (N, *D), N at least 2.
            generator: source of every random number, on any device.

        Raises:
            ValueError: for fewer than two points, a value that is not finite, or points that are all zero.
        """
        name = type(self).__name__
        if data_points.ndim < 2 or len(data_points) < 2:
            raise ValueError(f"{name} is fitted to at least 2 data points, got shape {tuple(data_points.shape)}")
        points = data_points.detach().flatten(1).double().cpu()
        bad = int((~points.isfinite()).any(1).sum())
        if bad:
            raise ValueError(f"{name}: {bad} of {len(points)} data points hold NaN or infinity; mend the data")
        if not bool(points.any()):
            raise ValueError(f"{name}: all {len(points)} data points are zero, which have no direction; check the data")
        if generator.device.type != "cpu":
            seed = torch.randint(2**62, (), generator=generator, device=generator.device)
            generator = torch.Generator().manual_seed(int(seed))
        self._keep(self._fit(points, generator), tuple(data_points.shape[1:]))

    def _keep(self, values: dict[str, Tensor], shape: tuple[int, ...]) -> None:
        self._values, self._shape, self._placed = values, shape, {}
        self._numbers = {name: float(value) for name, value in values.items() if value.ndim == 0}

    def _fitted(self, name: str, device: torch.device | str = "cpu") -> Tensor:
        """A fitted tensor on a device; the copies are kept, because training needs them at every step."""
        if not self._values:
            raise ValueError(f"{type(self).__name__} is not fitted: call fit(data_points, generator) before using it")
        device = torch.device(device)
        if device not in self._placed:
            self._placed[device] = {key: value.to(device) for key, value in self._values.items()}
        return self._placed[device][name]

    def _number(self, name: str) -> float:
        """A fitted scalar, which no step has to read from a tensor."""
        self._fitted(name)
        return self._numbers[name]

    def _check_shape(self, shape: tuple[int, ...]) -> None:
        if self._values and tuple(shape) != self._shape:
            raise ValueError(
                f"{type(self).__name__} was fitted to points of shape {self._shape}, the flow wants {tuple(shape)}: "
                "fit it to the data of this flow"
            )

    def get_extra_state(self) -> dict[str, Any]:
        """The fitted tensors with the options they belong to."""
        return {"options": repr(self), "shape": list(self._shape), "values": dict(self._values)}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Take the fitted tensors of a checkpoint, unless they belong to other options."""
        if state["values"] and state["options"] == repr(self):
            values = {name: value.cpu() for name, value in state["values"].items()}
            self._keep(values, tuple(state["shape"]))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        """Without the strict check: a state dict without this source's state leaves it as it is."""
        if prefix + _EXTRA_STATE in state_dict:
            super()._load_from_state_dict(state_dict, prefix, *rest)


def log_standard_normal(x: Tensor, std: float = 1.0) -> Tensor:
    """Log-density in nats of N(0, std^2 I) at points (B, *D), float64, shape (B,)."""
    z = x.flatten(1).double() / std
    return -0.5 * z.square().sum(1) - z.shape[1] * (math.log(std) + 0.5 * math.log(2 * math.pi))
