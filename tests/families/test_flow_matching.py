"""What one training step of flow matching feeds to its network."""

from __future__ import annotations

import pytest
import torch

from flowbench.families import OTCFM
from flowbench.flows import IndependentCoupling, OptimalTransportCoupling, SinkhornCoupling

from ..contract.builders import POINTS, batch_of, build


class Watched:
    """Records the pairs that reach the path and the labels that reach the network."""

    def __init__(self, module) -> None:
        self.label = self.x0 = self.x1 = None
        path_sample, network = module.path.sample, module.network.forward

        def sample(x0, x1, t, generator=None):
            self.x0, self.x1 = x0, x1
            return path_sample(x0, x1, t)

        def forward(x, t, label=None):
            self.label = label
            return network(x, t, label)

        module.path.sample, module.network.forward = sample, forward


@pytest.mark.parametrize("name", ["ot", "sinkhorn"])
def test_couplings_permute_the_noise_and_never_the_data_or_its_labels(name):
    options = {} if name == "ot" else {"coupling": SinkhornCoupling(epsilon=0.1)}
    module = build("ot_cfm", POINTS, conditional=True, label_dropout=0.0, **options)
    assert isinstance(module, OTCFM)
    watched, batch = Watched(module), batch_of(POINTS, 32)
    module.training_loss(batch, torch.Generator().manual_seed(0))
    assert torch.equal(watched.x1, batch.x)
    assert torch.equal(watched.label, batch.label)


def test_optimal_transport_reorders_the_same_noise_that_independent_pairs_use():
    batch = batch_of(POINTS, 32)

    def noise(coupling):
        module = build("cfm", POINTS, coupling=coupling)
        watched = Watched(module)
        module.training_loss(batch, torch.Generator().manual_seed(0))
        return watched.x0

    plain = noise(IndependentCoupling())
    optimal = noise(OptimalTransportCoupling())
    assert not torch.equal(plain, optimal)
    assert torch.equal(plain.sort(dim=0).values, optimal.sort(dim=0).values)
    assert (optimal - batch.x).square().sum() < (plain - batch.x).square().sum()
