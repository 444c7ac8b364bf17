"""A source that is itself a data set: flows from one density to another."""

from __future__ import annotations

import torch
from torch import Tensor

from flowbench.data import get_density
from flowbench.flows import Source

__all__ = ["DatasetSource"]


class DatasetSource(Source):
    """One of the two-dimensional densities of the catalogue as the source, e.g. moons -> eight_gaussians.

    Args:
        dataset: name of a 2-D density.

    Raises:
        ValueError: when the catalogue has no density of that name.

    Example:
        >>> source = DatasetSource("moons")
        >>> source.sample(100, (2,), torch.Generator().manual_seed(0)).shape
        torch.Size([100, 2])
    """

    def __init__(self, dataset: str) -> None:
        super().__init__()
        self.dataset = dataset
        self.density = get_density(dataset)

    def sample(
        self, num: int, shape: tuple[int, ...], generator: torch.Generator, device: torch.device | str = "cpu"
    ) -> Tensor:
        """Draw points on the CPU, from a CPU generator seeded by `generator`, and move them to `device`.

        Raises:
            ValueError: when the flow does not live in the plane.
        """
        if shape != (2,):
            raise ValueError(f"the source {self.dataset} has points of shape (2,), the flow wants {shape}")
        if generator.device.type != "cpu":
            seed = torch.randint(2**62, (), generator=generator, device=generator.device)
            generator = torch.Generator().manual_seed(int(seed))
        return self.density.sample(num, generator).to(device)

    def log_prob(self, x: Tensor) -> Tensor:
        """Exact log-density in nats, float64, shape (B,), where the density has one."""
        return self.density.log_prob(x.cpu()).to(x.device)

    def __repr__(self) -> str:
        return f"DatasetSource({self.dataset!r})"
