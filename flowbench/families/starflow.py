"""STARFlow: a deep-shallow autoregressive flow on latents."""

from __future__ import annotations

from typing import Any

from flowbench.data import DataSpec
from flowbench.families.architecture import deep_shallow_layers
from flowbench.families.latents.autoencoder import Autoencoder
from flowbench.families.latents.space import Space, latent_space
from flowbench.families.noise.augmentation import Augmentation
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
        architecture: the paper's notation: ``18(6)`` is a deep block of 18 layers and six blocks in all, the shallow
            ones of 2 layers; `width` is named apart. None: as below.
        deep_layers: layers of the block nearest the noise, 1 to 1,000; None is 6.
        shallow_blocks: number of blocks near the data, 1 to 1,000; None is 2.
        shallow_layers: layers of each of them, 1 to 1,000; None is 2.
        augmentation: noise of the latents, in units of their standard deviation (0.3 in the paper); None is none.
        cache_latents: keep the training split's latents on disk instead of encoding every batch.
        space: where the flow lives, in place of a trained autoencoder's latents.
        options: width, patch size, conditioning, sampling and training as in :class:`TARFlow`.

    Example:
        >>> from functools import partial
        >>> from flowbench.data import DataSpec
        >>> from flowbench.networks import KLAutoencoder
        >>> spec = DataSpec("images", "1", (1, 8, 8), levels=17)
        >>> autoencoder = Autoencoder(spec, partial(KLAutoencoder, latent_channels=2, width=8)).eval()
        >>> flow = STARFlow(spec, autoencoder=autoencoder, deep_layers=2, shallow_blocks=1, width=16, head_dim=8)
        >>> flow.flow_shape, flow.sample(flow.draw_noise(torch.arange(3), seed=0)).x.shape
        ((2, 4, 4), torch.Size([3, 1, 8, 8]))
        >>> flow.describe().likelihood
        'bound'
    """

    def __init__(
        self,
        spec: DataSpec,
        *,
        autoencoder: Autoencoder | None = None,
        architecture: str | None = None,
        deep_layers: int | None = None,
        shallow_blocks: int | None = None,
        shallow_layers: int | None = None,
        augmentation: Augmentation | None = None,
        cache_latents: bool = False,
        space: Space | None = None,
        **options: Any,
    ) -> None:
        if space is not None and (autoencoder is not None or cache_latents):
            given = "autoencoder" if autoencoder is not None else "cache_latents"
            raise ValueError(f"{type(self).__name__} has a space of its own here and takes no {given}: leave it out")
        noise_std = augmentation.noise_std if augmentation is not None else 0.0
        super().__init__(
            spec,
            layers=deep_shallow_layers(architecture, deep_layers, shallow_blocks, shallow_layers),
            position="rope",
            start="learned",
            scale="softplus",
            soft_clip=4.0,
            last_order=None if options.get("permutations") else "identity",
            conditioned="deep",
            augmentation=augmentation,
            space=space or latent_space(autoencoder, "STARFlow", noise_std, cache_latents),
            **options,
        )
