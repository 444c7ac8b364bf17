"""STARFlow: a deep-shallow autoregressive flow on latents."""

from __future__ import annotations

from typing import Any

from flowbench.data import DataSpec
from flowbench.families.autoencoder import Autoencoder
from flowbench.families.space import latent_space
from flowbench.families.tarflow import TARFlow

__all__ = ["STARFlow"]


class STARFlow(TARFlow):
    """One deep autoregressive block nearest the noise and shallow ones near the data, on an autoencoder's latents.

    Differs from TARFlow by the allocation of depth, a learned start token, the softplus scale with a soft clip, rotary
    positions, and labels (and guidance, in closed form) in the deep block alone.

    References:
        Gu et al. (2025), STARFlow: Scaling Latent Normalizing Flows, arXiv 2506.06276, sec. 3 and prop. 2.

    Args:
        spec: the data's shape, classes and value grid.
        autoencoder: trained; an experiment file names it under ``requires``.
        deep_layers: layers of the block nearest the noise.
        shallow_blocks: number of blocks near the data, >= 1.
        shallow_layers: layers of each of them.
        options: width, patch size, conditioning and training as in :class:`TARFlow`.
    """

    def __init__(
        self,
        spec: DataSpec,
        *,
        autoencoder: Autoencoder | None = None,
        deep_layers: int = 6,
        shallow_blocks: int = 2,
        shallow_layers: int = 2,
        **options: Any,
    ) -> None:
        if shallow_blocks < 1:
            raise ValueError(
                f"shallow_blocks must be >= 1, got {shallow_blocks}: one order alone cannot mix the tokens"
            )
        super().__init__(
            spec,
            layers=[shallow_layers] * shallow_blocks + [deep_layers],
            position="rope",
            start="learned",
            scale="softplus",
            soft_clip=4.0,
            last_order="identity",
            conditioned="deep",
            space=latent_space(autoencoder, "STARFlow"),
            **options,
        )
