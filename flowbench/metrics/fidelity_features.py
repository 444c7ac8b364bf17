"""DINOv2 and CLIP features through torch-fidelity's own classes, where their weights are at hand."""

from __future__ import annotations

import hashlib
import warnings
from pathlib import Path

import torch
from torch import Tensor, nn

from flowbench.core.packages import sha256_of
from flowbench.core.places import expand
from flowbench.metrics.classifier import weights_checksum
from flowbench.metrics.features import as_rgb, in_batches

__all__ = ["FIDELITY_DIMENSIONS", "FidelityFeatures"]

CPU_BATCH = 16
FIDELITY_DIMENSIONS = {"dinov2-vit-s-14": 384, "clip-vit-b-32": 512}


class FidelityFeatures:
    """DINOv2 ViT-S/14 (Oquab et al., 2023, arXiv 2304.07193) or CLIP ViT-B/32 (Radford et al., 2021, arXiv 2103.00020).

    Pictures are scaled to 224 x 224 as torch-fidelity does it: bilinear as in TensorFlow 1, without antialiasing, then
    normalised as the network was trained. Nothing is downloaded: the files must lie in torch hub's folder, or, for
    CLIP, at ``path``. DINOv2 runs the code of its repository in that folder.

    Args:
        name: ``dinov2-vit-s-14`` or ``clip-vit-b-32``.
        path: CLIP's TorchScript file, whose SHA-256 is verified.
        device: where the network runs.

    Raises:
        ValueError: one line: another name, or files that are missing or wrong.
    """

    def __init__(self, name: str, path: str | Path | None = None, *, device: str | torch.device = "cpu") -> None:
        if name not in FIDELITY_DIMENSIONS:
            raise ValueError(f"name must be one of {', '.join(FIDELITY_DIMENSIONS)}, got {name!r}")
        self.name = name
        self.dimension = FIDELITY_DIMENSIONS[name]
        self.protocol = f"{name}/bilinear-224"
        self.device = torch.device(device)
        # Their constructors draw initial weights from the global generator.
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            network = _clip(name, path) if name.startswith("clip") else _dinov2(name, path)
        self.checksum = hashlib.sha256(f"{weights_checksum(network)}|{self.protocol}".encode()).hexdigest()
        self._network = network.eval().requires_grad_(False).to(self.device)

    def __call__(self, images: Tensor) -> Tensor:
        """Features of pictures.

        Args:
            images: uint8 (N, 1 or 3, H, W) in 0..255; grey ones are replicated.

        Returns:
            float32 (N, dimension) on ``device``.

        Raises:
            ValueError: another dtype or shape.
        """
        pictures = as_rgb(images)
        if not len(pictures):
            return torch.empty(0, self.dimension, device=self.device)
        return in_batches(lambda part: self._network(part)[0], pictures, self.device, CPU_BATCH)


def _clip(name: str, path: str | Path | None) -> nn.Module:
    from torch_fidelity.feature_extractor_clip import MODEL_METADATA, FeatureExtractorCLIP

    expected = MODEL_METADATA[name]["hash"]
    # The name under which torch-fidelity keeps it.
    file = expand(path) if path else _checkpoints() / f"{name}-{expected}.pt"
    if not file.is_file():
        raise ValueError(
            f"no weights for {name}: {file} does not exist; run torch_fidelity.feature_extractor_clip."
            f"FeatureExtractorCLIP({name!r}, ['clip']) once where there is a network and copy the file there"
        )
    found = sha256_of(file)
    if found != expected:
        raise ValueError(f"{file} has sha256 {found}, expected {expected}; delete it")
    return FeatureExtractorCLIP(name, ["clip"], feature_extractor_weights_path=str(file))


def _dinov2(name: str, path: str | Path | None) -> nn.Module:
    if path is not None:
        raise ValueError(f"{name} takes no file of weights: torch-fidelity loads it from torch hub's folder")
    from torch_fidelity.feature_extractor_dinov2 import MODEL_METADATA, FeatureExtractorDinoV2

    model = MODEL_METADATA[name]
    needed = [
        Path(torch.hub.get_dir()) / "facebookresearch_dinov2_main",
        _checkpoints() / f"{model}_pretrain.pth",
    ]
    missing = [str(file) for file in needed if not file.exists()]
    if missing:
        raise ValueError(
            f"no weights for {name}: missing {' and '.join(missing)}; run torch.hub.load('facebookresearch/dinov2', "
            f"{model!r}) once where there is a network and copy torch hub's folder"
        )
    return FeatureExtractorDinoV2(name, ["dinov2"])


def _checkpoints() -> Path:
    return Path(torch.hub.get_dir()) / "checkpoints"
