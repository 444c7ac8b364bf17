"""The velocity of a network that remembers the steps of one solve."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

from flowbench.flows import Field
from flowbench.networks.hybrid_attention import Entry
from flowbench.networks.hybrid_dit import HybridDiT, Memory

__all__ = ["RecurrentField", "RecurrentNetwork"]


@dataclass
class _Branch:
    """The conditional or the null branch of guidance: its memory, and its first evaluation since the last commit."""

    memory: Memory
    x: Tensor | None = None
    entries: tuple[Entry, ...] = ()


@dataclass
class RecurrentNetwork:
    """A network of sequences as guidance calls it, ``(x, t, label)``, with a memory of the steps that were committed.

    The steps of a solve are the images of a sequence: each is given its predecessors, and nothing of a step that is
    not committed. The conditional and the null branch have a memory each; a branch remembers the steps at whose start
    it was evaluated. An object serves one solve: the next one begins with another, so nothing leaks between batches.

    Attributes:
        network: gives velocities and entries of the memory.
        window: steps that are remembered, the last ones; None is all.
    """

    network: HybridDiT
    window: int | None = None
    _branches: dict[bool, _Branch] = field(default_factory=dict)

    def __call__(self, x: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        """The velocity of states (B, *D), given the committed steps."""
        branch = self._branches.setdefault(label is None, _Branch(self.network.empty_memory()))
        velocity, entries = self.network.extend(x, t, label, branch.memory)
        if branch.x is None:
            branch.x, branch.entries = x, entries
        return velocity

    def commit(self, x: Tensor) -> None:
        """Remember the step that began with these very states, in every branch that was evaluated there.

        Raises:
            ValueError: by a solver that has not evaluated the field at the start of its step.
        """
        begun = [branch for branch in self._branches.values() if branch.x is x]
        if not begun:
            raise ValueError(
                "this solver does not evaluate the field at the start of each step, which a memory is made of: take "
                "Euler, Midpoint, Heun or RungeKutta4"
            )
        for branch in begun:
            branch.memory = self.network.remembered(branch.memory, branch.entries, self.window)
        for branch in self._branches.values():
            branch.x, branch.entries = None, ()


class RecurrentField:
    """A field over a recurrent network, which solvers commit their steps to; see :data:`flowbench.flows.Field`.

    Attributes:
        path: start of every committed step: time, states and velocity, each of the solve so far.

    Args:
        velocity: ``velocity(t, x)``, guided or not, of the network.
        network: what the velocity is made of.
        keeps_path: keep the starts of the steps.
    """

    def __init__(self, velocity: Field, network: RecurrentNetwork, keeps_path: bool = False) -> None:
        self.velocity: Callable[[Tensor, Tensor], Tensor] = velocity
        self.network = network
        self.keeps_path = keeps_path
        self.path: list[tuple[float, Tensor, Tensor]] = []
        self._first: Tensor | None = None

    def __call__(self, t: Tensor, x: Tensor) -> Tensor:
        """The velocity, shape of x."""
        found = self.velocity(t, x)
        if self._first is None:
            self._first = found
        return found

    def commit(self, t: float, x: Tensor) -> None:
        """Remember the step from x at t."""
        self.network.commit(x)
        assert self._first is not None, "a step is evaluated before it is committed"
        if self.keeps_path:
            self.path.append((t, x, self._first))
        self._first = None
