from __future__ import annotations

import pytest
import torch
from sklearn.datasets import load_sample_images

from flowbench.core.seeds import generator
from flowbench.metrics import EfficientNetFeatures, FeatureExtractor, efficientnet, extract
from flowbench.metrics.efficientnet import ConvNorm, EfficientNetLite0
from flowbench.metrics.weights import EFFICIENTNET_SHA256
from tests.closeness import assert_near


@pytest.fixture(scope="module")
def extractor(efficientnet_file) -> EfficientNetFeatures:
    return EfficientNetFeatures(efficientnet_file)


@pytest.fixture(scope="module")
def photographs() -> torch.Tensor:
    """A Chinese temple and a flower, uint8 (2, 3, 427, 640)."""
    return torch.stack([torch.from_numpy(i.copy()) for i in load_sample_images().images]).permute(0, 3, 1, 2)


def test_size_is_the_papers():
    """4,652,008 parameters: what the network's publishers print as 4.7 M."""
    with torch.device("meta"):
        network = EfficientNetLite0()
    assert sum(p.numel() for p in network.parameters()) == 4_652_008
    assert network(torch.empty(2, 3, 224, 224, device="meta")).shape == (2, 1000)


@pytest.mark.parametrize(
    ("kernel", "stride", "padding"), [(3, 2, (0, 1)), (5, 2, (1, 2)), (3, 1, (1, 1)), (5, 1, (2, 2))]
)
def test_padding_is_tensorflows_same(kernel, stride, padding):
    """Brute force: the window of an output pixel begins where TensorFlow's formula puts it."""
    layer = ConvNorm(1, 1, kernel, stride).eval()
    torch.nn.init.ones_(layer.conv.weight)
    image = torch.randn(1, 1, 8, 8, generator=generator(0, "same"))
    padded = torch.nn.functional.pad(image, [*padding, *padding])
    windows = padded.unfold(2, kernel, stride).unfold(3, kernel, stride).sum(dim=(4, 5))
    assert_near(layer(image), windows / (1 + 1e-3) ** 0.5)
    assert layer(image).shape[2] == 8 // stride


def test_logits_are_those_of_the_reference_implementation(extractor, photographs):
    """Recorded from efficientnet_lite_pytorch 0.1.0 with its own weights on the same resized photographs."""
    logits = extractor.logits(photographs)
    recorded = [
        [3.53895, 0.4021, -0.90576, -0.00675, -0.45845, 0.67607],
        [-1.45465, 0.73182, -0.59446, -1.52039, -0.64113, -0.2044],
    ]
    torch.testing.assert_close(logits[:, :6], torch.tensor(recorded), rtol=0, atol=1e-4)
    torch.testing.assert_close(logits.norm(dim=1), torch.tensor([45.2179, 37.2231]), rtol=0, atol=1e-3)
    assert logits.argmax(dim=1).tolist() == [442, 985]  # bell cote, daisy
    torch.testing.assert_close(extractor(photographs).sum(dim=1), torch.tensor([308.3503, 226.2043]), rtol=1e-5, atol=0)


def test_it_is_an_extractor(extractor, photographs, monkeypatch):
    assert isinstance(extractor, FeatureExtractor)
    assert (extractor.name, extractor.protocol) == ("efficientnet-lite0", "efficientnet-lite0/bilinear-224")
    assert extractor.dimension == 1280
    assert extractor.checksum != EFFICIENTNET_SHA256
    pictures = photographs[:, :, :64, :64]
    whole = extractor(pictures)
    assert whole.dtype == torch.float32
    assert not whole.requires_grad
    assert_near(extract(extractor, pictures, batch_size=1), whole, ulps=1024)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_near(extractor(pictures), whole, ulps=1024)
    monkeypatch.setattr(efficientnet, "CPU_BATCH", 1)
    assert_near(extractor(pictures), whole, ulps=1024)
    grey = pictures[:, :1]
    assert torch.equal(extractor(grey), extractor(grey.repeat(1, 3, 1, 1)))
    assert extractor(pictures[:0]).shape == (0, 1280)
    with pytest.raises(ValueError, match="images must be uint8"):
        extractor(pictures.float())
