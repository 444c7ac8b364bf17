from __future__ import annotations

import pytest
import torch
from sklearn.datasets import load_sample_images
from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x

from flowbench.core.seeds import generator
from flowbench.metrics import FeatureExtractor, InceptionFeatures, InceptionLogits, extract, inception, weights
from flowbench.metrics.inception import resize_like_tensorflow
from flowbench.metrics.weights import PretrainedWeights, inception_network


@pytest.fixture(scope="module")
def random_state() -> dict[str, torch.Tensor]:
    """Weights that no download brings, at a scale that keeps activations alive, with a classifier."""
    draw, state = generator(0, "inception"), {}
    for name, value in weights._unloaded().state_dict().items():
        if name.endswith("num_batches_tracked"):
            continue
        noise = torch.randn(value.shape, generator=draw)
        if value.ndim > 1:
            state[name] = noise * (2 / value[0].numel()) ** 0.5
        elif name.endswith(("running_var", "bn.weight")):
            state[name] = 1 + 0.1 * noise.abs()
        else:
            state[name] = 0.1 * noise
    return state


@pytest.fixture(scope="module")
def made(random_state):
    """A function that makes extractors of the random network."""

    def make(kind=InceptionFeatures, state=random_state, **options):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(inception, "inception_weights", lambda path: PretrainedWeights(dict(state), "random"))
            return kind(**options)

    return make


@pytest.fixture(scope="module")
def pictures() -> torch.Tensor:
    return torch.randint(0, 256, (3, 3, 32, 32), generator=generator(0, "pictures"), dtype=torch.uint8)


@pytest.fixture(scope="module")
def expected(random_state, pictures) -> tuple[torch.Tensor, torch.Tensor]:
    """torch-fidelity's own features and logits."""
    with torch.no_grad():
        return inception_network(random_state, ("2048", "logits_unbiased"))(pictures)


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("size", [(32, 32), (28, 28), (8, 8), (299, 299), (1, 5), (427, 320)])
def test_resizing_is_torch_fidelitys_bit_for_bit(size):
    images = torch.randint(0, 256, (2, 3, *size), generator=generator(0, "resize")).float()
    theirs = interpolate_bilinear_2d_like_tensorflow1x(images, size=(299, 299), align_corners=False)
    assert torch.equal(resize_like_tensorflow(images, 299), theirs)


def test_features_and_logits_are_torch_fidelitys(made, pictures, expected):
    extractor = made()
    assert isinstance(extractor, FeatureExtractor)
    found = extractor(pictures)
    assert found.shape == (3, extractor.dimension) == (3, 2048)
    assert found.dtype == torch.float32
    assert relative(found, expected[0]) < 1e-5
    assert extractor.has_logits
    assert relative(extractor.logits(pictures), expected[1]) < 1e-5
    logits = made(InceptionLogits)
    assert torch.equal(logits(pictures), extractor.logits(pictures))
    assert logits.dimension == logits(pictures).shape[1] == 1008
    assert logits.checksum != extractor.checksum


def test_names_tell_the_protocol(made):
    exact, fast = made(), made(precision="bfloat16")
    assert (exact.name, exact.protocol) == ("inception", "inception-v3-compat/bilinear-299")
    assert (fast.name, fast.protocol) == ("inception-bf16", "inception-v3-compat/bilinear-299/bf16")
    assert exact.checksum != fast.checksum
    with pytest.raises(ValueError, match="precision must be float32 or bfloat16, got 'half'"):
        made(precision="half")


@pytest.mark.slow
def test_half_precision_is_near_but_another_network(made, pictures, expected):
    found = made(precision="bfloat16")(pictures)
    assert found.dtype == torch.float32
    assert 1e-4 < relative(found, expected[0]) < 0.1


@pytest.mark.slow
def test_features_do_not_depend_on_batches_or_on_what_surrounds_them(made, pictures, expected, monkeypatch):
    extractor = made()
    assert relative(extract(extractor, pictures, batch_size=1), expected[0]) < 1e-5
    monkeypatch.setattr(inception, "CPU_BATCH", 2)
    assert relative(extractor(pictures), expected[0]) < 1e-5
    state = torch.get_rng_state()
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.enable_grad():
        found = extractor(pictures)
    assert relative(found, expected[0]) < 1e-5
    assert not found.requires_grad
    assert torch.equal(torch.get_rng_state(), state)
    torch.set_default_dtype(torch.float64)
    try:
        assert relative(extractor(pictures), expected[0]) < 1e-5
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.slow
def test_grey_pictures_are_replicated(made, pictures):
    extractor, grey = made(), pictures[:, :1]
    assert torch.equal(extractor(grey), extractor(grey.repeat(1, 3, 1, 1)))
    assert extractor(pictures[:0]).shape == (0, 2048)
    for wrong in (pictures.float(), pictures[:, :2], pictures[0]):
        with pytest.raises(ValueError, match=r"images must be uint8 of shape \(N, 1 or 3, H, W\), got torch"):
            extractor(wrong)


@pytest.mark.slow
def test_the_score_needs_the_classifier(made, random_state, pictures):
    headless = {name: value for name, value in random_state.items() if not name.startswith("fc.")}
    extractor = made(state=headless)
    assert not extractor.has_logits
    with pytest.raises(ValueError, match="weights from random lack the classifier, which the Inception score needs"):
        extractor.logits(pictures)
    zeros = headless | {"fc.weight": torch.zeros(1008, 2048), "fc.bias": torch.zeros(1008)}
    for state in (headless, zeros):
        with pytest.raises(ValueError, match="lack the classifier"):
            made(InceptionLogits, state=state)


def test_photographs_have_the_features_of_the_tensorflow_graph(made, inception_state):
    """Numbers of a TorchScript port of the graph that shares no code with torch-fidelity or with us."""
    photographs = torch.stack([torch.from_numpy(i.copy()) for i in load_sample_images().images]).permute(0, 3, 1, 2)
    found = made(state=inception_state)(photographs)
    first = [[0.114125, 0.131427, 0.070251, 0.048204, 0.252507, 0.675055]]
    second = [[0.241572, 0.09933, 0.364059, 0.58392, 0.043616, 0.286784]]
    torch.testing.assert_close(found[:, :6], torch.tensor(first + second), rtol=0, atol=1e-4)
    torch.testing.assert_close(found.norm(dim=1), torch.tensor([17.110582, 19.626263]), rtol=1e-4, atol=0)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Metric `Kernel Inception Distance` will save all")
def test_kid_of_the_torchmetrics_documentation(made, inception_state, tmp_path):
    """The documentation of torchmetrics 1.9 prints (0.0312, 0.0025) for torch-fidelity's own file of weights."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    from torchmetrics.image.kid import KernelInceptionDistance

    class Features(torch.nn.Module):
        num_features = 2048

        def __init__(self) -> None:
            super().__init__()
            self.extractor = made(state=inception_state)

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return self.extractor(images)

    metric = KernelInceptionDistance(feature=Features(), subset_size=50)
    path = tmp_path / "weights.pth"
    torch.save(inception_network(inception_state).state_dict(), path)
    torch.manual_seed(42)
    # The documentation's images come after the initial weights of the network that it builds.
    FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], feature_extractor_weights_path=path)
    first = torch.randint(0, 200, (100, 3, 299, 299), dtype=torch.uint8)
    second = torch.randint(100, 255, (100, 3, 299, 299), dtype=torch.uint8)
    metric.update(first, real=True)
    metric.update(second, real=False)
    mean, std = metric.compute()
    assert float(mean) == pytest.approx(0.0312, abs=1e-4)
    assert float(std) == pytest.approx(0.0025, abs=1e-4)
