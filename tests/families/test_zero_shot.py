"""Zero-shot uses against closed forms: Gaussian flows whose conditionals and posteriors are known."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats
from torch import nn

from flowbench.data import DataSpec
from flowbench.families import DatasetSource, FlowMatching, FlowModule, PixelSpace, TARFlow
from flowbench.families.conditioning.masks import make_mask
from flowbench.families.zero_shot import (
    classify,
    clopper_pearson,
    edit,
    inpaint,
    interpolate,
    reconstruct,
    slerp,
)
from flowbench.flows import (
    DormandPrince,
    ExactDivergence,
    Midpoint,
    RungeKutta4,
    VariancePreservingPath,
    log_likelihood,
)
from flowbench.seeds import indexed_normal
from tests.contract.builders import IMAGES, POINTS, build, perturb

IMAGE = DataSpec("image", "1", (1, 4, 4), num_classes=3)


class GaussianFlow(FlowModule):
    """x = mean_k + L_k z in raster order, L_k lower triangular: one autoregressive block in closed form.

    Label None, and the null label, are class 0's.
    """

    density = "exact"

    def __init__(self, spec: DataSpec = IMAGE, *, conditional: bool = False, order: int = 1, **options) -> None:
        super().__init__(spec, conditional=conditional, **options)
        rng = np.random.default_rng(0)
        dims, count = spec.num_dims, spec.num_classes
        self.order = order
        self.mean = torch.tensor(rng.normal(size=(count, dims)))
        lower = np.tril(rng.normal(size=(count, dims, dims)) * 0.4, -1)
        lower += rng.uniform(0.5, 1.5, size=(count, dims))[:, :, None] * np.eye(dims)
        self.lower = torch.tensor(lower)
        self.dummy = nn.Parameter(torch.zeros(()))

    def _of(self, label, num):
        k = torch.zeros(num, dtype=torch.long) if label is None else label % self.spec.num_classes
        return self.mean[k], self.lower[k]

    def flow_encode(self, z, label):
        mean, lower = self._of(label, len(z))
        flat = (z.flatten(1) - mean).flip(1) if self.order < 0 else z.flatten(1) - mean
        noise = torch.linalg.solve_triangular(lower.to(flat), flat.unsqueeze(-1), upper=False).squeeze(-1)
        return (noise.flip(1) if self.order < 0 else noise).view_as(z)

    def flow_sample(self, noise, label, network_evaluations, guidance):
        mean, lower = self._of(label, len(noise))
        flat = noise.flatten(1).flip(1) if self.order < 0 else noise.flatten(1)
        moved = (lower.to(flat) @ flat.unsqueeze(-1)).squeeze(-1)
        return ((moved.flip(1) if self.order < 0 else moved) + mean.to(flat)).view_as(noise), 1.0

    def flow_log_prob(self, x, label, index, seed):
        _, lower = self._of(label, len(x))
        logdet = lower.diagonal(dim1=1, dim2=2).log().sum(1)
        return self.source.log_prob(self.flow_encode(x, label)) - logdet

    def flow_loss(self, x, label, rng):
        raise AssertionError("not trained")

    def trajectory(self, noise, condition=None, num_points=33):
        raise AssertionError("not drawn")


def data(spec: DataSpec = IMAGE, num: int = 5, seed: int = 0) -> torch.Tensor:
    return torch.randn(num, *spec.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ---- there and back -----------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", [IMAGES, POINTS], ids=lambda spec: spec.name)
@pytest.mark.parametrize("conditional", [False, True])
def test_an_autoregressive_flow_returns_its_data_in_float64(spec, conditional):
    module = build("tarflow", spec, conditional=conditional).double().eval()
    x = data(spec) * 0.5
    label = torch.arange(5) % 3 if conditional else None
    found = reconstruct(module, x, label)
    assert float((found.noise - x).abs().max()) > 0.05
    assert float(found.flow_error.max()) < 1e-10
    assert float(found.data_error.max()) < 1e-10
    assert found.autoencoder_psnr is None
    assert found.network_evaluations == 2


def test_encoding_is_the_inverse_of_sampling_and_keeps_the_density():
    """log p(x) = log N(z) + log |dz/dx|, the Jacobian by differences."""
    module = build("tarflow", IMAGES, conditional=True).double().eval()
    x, label = data(IMAGES, 2) * 0.5, torch.tensor([0, 2])
    noise = module.encode(x, label)
    assert not noise.requires_grad
    torch.testing.assert_close(module.flow_decode(noise, label)[0], x, rtol=0, atol=1e-10)

    step = 1e-5
    probes = x[:1] + step * torch.eye(16, dtype=torch.float64).view(16, 1, 4, 4)
    ahead, behind = (module.encode(p, label[:1].expand(16)).flatten(1) for p in (probes, 2 * x[:1] - probes))
    jacobian = (ahead - behind) / (2 * step)
    expected = module.source.log_prob(noise[:1]) + torch.linalg.slogdet(jacobian)[1]
    torch.testing.assert_close(module.log_prob(x[:1], label[:1]), expected, rtol=0, atol=1e-6)


class LinearField(nn.Module):
    """v = RATE x, whatever the time and the label."""

    RATE = 1.5

    def __init__(self, *_):
        super().__init__()
        self.rate = nn.Parameter(torch.tensor(self.RATE))

    def forward(self, x, t, label=None):
        return self.rate * x


def linear_flow(path=None, **options) -> FlowMatching:
    return FlowMatching(POINTS, LinearField, path=path, **options).double().eval()


@pytest.mark.parametrize("steps", [4, 40])
def test_a_continuous_flow_takes_the_steps_of_its_solver_backward(steps):
    """The midpoint rule on v = a x multiplies by 1 + ah + (ah)^2 / 2 at each step, and by its value at -h backward."""
    module, x = linear_flow(solver=Midpoint(steps)), data(POINTS)
    step = LinearField.RATE / steps
    ahead, back = (1 + h + h**2 / 2 for h in (step, -step))
    torch.testing.assert_close(module.encode(x), x * back**steps, rtol=0, atol=1e-12)
    found = reconstruct(module, x)
    error = (x * ((ahead * back) ** steps - 1)).abs().amax(1)
    torch.testing.assert_close(found.flow_error, error, rtol=0, atol=1e-12)
    assert found.network_evaluations == 4 * steps


def test_encoding_approaches_the_exact_flow():
    x = data(POINTS)
    fine = linear_flow(solver=RungeKutta4(100)).encode(x)
    torch.testing.assert_close(fine, x * math.exp(-LinearField.RATE), rtol=0, atol=1e-8)
    adaptive = linear_flow(solver=DormandPrince(1e-10, 1e-10))
    torch.testing.assert_close(adaptive.encode(x), x * math.exp(-LinearField.RATE), rtol=0, atol=1e-8)
    assert reconstruct(adaptive, x).network_evaluations is None


def test_a_path_that_is_singular_at_its_end_is_encoded_from_just_before():
    path = VariancePreservingPath()
    first, last = path.interval
    assert last < 1
    found = linear_flow(path, solver=RungeKutta4(100)).encode(data(POINTS))
    expected = data(POINTS) * math.exp(-LinearField.RATE * (last - first))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)


def test_a_continuous_flow_encodes_to_where_its_likelihood_ends():
    """Against the source end of the instantaneous change of variables."""
    module = build("wcfm", POINTS, solver=RungeKutta4(40)).double().eval()
    x = data(POINTS)
    solver = RungeKutta4(80)
    expected = log_likelihood(module.field(None), x, module.source.log_prob, solver, ExactDivergence()).source
    assert float((expected - x).abs().max()) > 1e-2
    torch.testing.assert_close(module.encode(x), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["starflow", "latent_cfm"])
def test_latent_families_report_the_autoencoder_apart(name):
    module = build(name, IMAGES).eval()
    x = data(IMAGES).float() * 0.5
    found, again = reconstruct(module, x), reconstruct(module, x)
    assert torch.equal(found.noise, again.noise)  # the mean, not a draw
    plain = module.space.decode(module.space.encode_mean(x))
    mse = (plain - x).flatten(1).square().mean(1)
    torch.testing.assert_close(found.autoencoder_psnr, 20 * torch.log10(2 / mse.sqrt()))
    assert float(found.flow_error.max()) < 1e-3
    assert float(found.data_error.max()) > 10 * float(found.flow_error.max())


def test_encode_refuses_other_shapes_and_labels():
    module = GaussianFlow()
    with pytest.raises(ValueError, match=r"expected points of shape \(1, 4, 4\), got \(1, 2, 2\)"):
        module.encode(torch.zeros(3, 1, 2, 2))
    with pytest.raises(ValueError, match="unconditional"):
        module.encode(torch.zeros(3, 1, 4, 4), torch.zeros(3, dtype=torch.long))


# ---- edits --------------------------------------------------------------------------------------------


def test_an_edit_moves_between_the_closed_forms_of_two_classes():
    module = GaussianFlow(conditional=True)
    x, label = data(), torch.tensor([0, 1, 2, 1, 0])
    found = edit(module, x, label, torch.tensor([2, 0]))
    for i in range(5):
        k = int(label[i])
        noise = np.linalg.solve(module.lower[k].numpy(), x[i].flatten().numpy() - module.mean[k].numpy())
        for j, target in enumerate((2, 0)):
            expected = module.mean[target].numpy() + module.lower[target].numpy() @ noise
            np.testing.assert_allclose(found.x[i, j].flatten().numpy(), expected, atol=1e-10)
    np.testing.assert_allclose(found.x[0, 1], x[0], atol=1e-10)  # its own class gives it back
    assert found.network_evaluations == 1.5


def test_an_edit_is_guided_on_request():
    module = build("tarflow", IMAGES, conditional=True).eval()
    x, label = data(IMAGES).float() * 0.5, torch.arange(5) % 3
    plain, guided = (edit(module, x, label, torch.tensor([1]), guidance=s) for s in (1.0, 3.0))
    assert torch.equal(plain.noise, guided.noise)
    assert float((plain.x - guided.x).abs().max()) > 1e-3
    assert guided.network_evaluations == plain.network_evaluations + 1


@pytest.mark.parametrize(
    ("conditional", "targets", "guidance", "expected"),
    [
        (False, [0], 1.0, "edit needs a flow that knows classes"),
        (True, [], 1.0, "one class at least"),
        (True, [7], 1.0, r"labels must lie in 0\.\.3"),
        (True, [0], 2.0, "null label"),
    ],
)
def test_edits_that_cannot_be_are_refused_in_one_line(conditional, targets, guidance, expected):
    module = GaussianFlow(conditional=conditional, label_dropout=0.0)
    label = torch.zeros(5, dtype=torch.long) if conditional else None
    with pytest.raises(ValueError, match=expected) as caught:
        edit(module, data(), label, torch.tensor(targets, dtype=torch.long), guidance)
    assert "\n" not in str(caught.value)


# ---- interpolation ------------------------------------------------------------------------------------


def test_slerp_keeps_norms_and_turns_at_constant_speed():
    first, second = data(num=6, seed=1), data(num=6, seed=2)
    t = torch.linspace(0, 1, 9, dtype=torch.float64)
    path = slerp(first, second, t).flatten(2)
    torch.testing.assert_close(path[:, 0], first.flatten(1))
    torch.testing.assert_close(path[:, -1], second.flatten(1))
    ends = first.flatten(1).norm(dim=1)[:, None], second.flatten(1).norm(dim=1)[:, None]
    torch.testing.assert_close(path.norm(dim=2), (1 - t) * ends[0] + t * ends[1])
    unit = (path / path.norm(dim=2, keepdim=True)).numpy()
    angles = np.arccos((unit[:, 1:] * unit[:, :-1]).sum(2))
    np.testing.assert_allclose(angles, np.broadcast_to(angles[:, :1], angles.shape), atol=1e-9)
    # All in the plane of the two ends.
    assert all(np.linalg.matrix_rank(rows.numpy(), tol=1e-9) == 2 for rows in path)


def test_the_middle_of_a_great_circle_is_typical_noise_and_that_of_a_line_is_not():
    rng = torch.Generator().manual_seed(0)
    first, second = (torch.randn(400, 256, generator=rng) for _ in range(2))
    middle = slerp(first, second, torch.tensor([0.5]))[:, 0]
    assert float(middle.std()) == pytest.approx(1.0, abs=0.02)
    assert float(((first + second) / 2).std()) == pytest.approx(math.sqrt(0.5), abs=0.02)


def test_slerp_of_parallel_and_opposite_points():
    a = torch.tensor([[3.0, 4.0]])
    torch.testing.assert_close(slerp(a, 2 * a, torch.tensor([0.0, 0.5, 1.0]))[0], torch.cat([a, 1.5 * a, 2 * a]))
    with pytest.raises(ValueError, match="opposite directions"):
        slerp(a, -a, torch.tensor([0.5]))
    assert slerp(0 * a, a, torch.tensor([0.5])).isfinite().all()


def test_interpolation_starts_and_ends_at_the_data():
    module = GaussianFlow()
    first, second = data(num=3, seed=1), data(num=3, seed=2)
    found = interpolate(module, first, second, 5)
    assert found.x.shape == (3, 5, 1, 4, 4)
    torch.testing.assert_close(found.x[:, 0], first, rtol=0, atol=1e-10)
    torch.testing.assert_close(found.x[:, -1], second, rtol=0, atol=1e-10)
    assert found.network_evaluations == pytest.approx(1 + 2 / 5)


@pytest.mark.parametrize(
    ("module", "steps", "expected"),
    [
        (GaussianFlow(), 1, "steps must be >= 2, got 1"),
        (GaussianFlow(conditional=True, label_dropout=0.0), 3, "trained null label"),
    ],
)
def test_interpolations_that_cannot_be_are_refused(module, steps, expected):
    with pytest.raises(ValueError, match=expected):
        interpolate(module, data(), data(), steps)


def test_interpolation_wants_gaussian_noise():
    module = build("cfm", POINTS, source=DatasetSource("moons"))
    with pytest.raises(ValueError, match=r"starts from DatasetSource\('moons'\)"):
        interpolate(module, data(POINTS).float(), data(POINTS).float(), 3)


# ---- inpainting ---------------------------------------------------------------------------------------


def conditional_of(module: GaussianFlow, k: int, known: np.ndarray, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and covariance of the unknown values given the known ones, by the Schur complement."""
    lower, mean = module.lower[k].numpy(), module.mean[k].numpy()
    covariance = lower @ lower.T
    gain = covariance[np.ix_(~known, known)] @ np.linalg.inv(covariance[np.ix_(known, known)])
    rest = covariance[np.ix_(~known, ~known)] - gain @ covariance[np.ix_(known, ~known)]
    return mean[~known] + gain @ (x[known] - mean[known]), rest


@pytest.mark.parametrize("rounds", [1, 3])
def test_a_suffix_is_inpainted_from_the_exact_conditional(rounds):
    """Unknown values are the conditional mean plus the Cholesky factor of the Schur complement times the noise."""
    module = GaussianFlow(conditional=True)
    x, label, mask = data(), torch.tensor([0, 1, 2, 1, 0]), make_mask("bottom", (1, 4, 4))
    found = inpaint(module, x, mask, label, rounds=rounds, seed=4)
    fresh = module.source.sample_indexed(torch.arange(5), (1, 4, 4), 4, "inpaint", rounds - 1).double()
    known = ~mask.flatten().numpy()
    for i in range(5):
        mean, covariance = conditional_of(module, int(label[i]), known, x[i].flatten().numpy())
        expected = mean + np.linalg.cholesky(covariance) @ fresh[i].flatten().numpy()[~known]
        np.testing.assert_allclose(found.x[i].flatten().numpy()[~known], expected, atol=1e-9)
    assert torch.equal(found.x[:, :, :2], x[:, :, :2])
    assert float(found.drift.max()) < 1e-12
    assert found.network_evaluations == 1 + 2 * rounds


def test_a_suffix_of_one_autoregressive_block_is_sampled_token_by_token():
    """Against the block's Gaussians evaluated one token at a time by full passes."""
    torch.manual_seed(0)
    module = TARFlow(IMAGES, layers=[2], width=16, head_dim=8, patch_size=2, start="learned", last_order="identity")
    perturb(module, 1, 0.1)
    module = module.double().eval()
    x, mask = data(IMAGES, 3) * 0.5, make_mask("bottom", IMAGES.shape)
    found = inpaint(module, x, mask, rounds=2, seed=9)
    noise = module.source.sample_indexed(torch.arange(3), IMAGES.shape, 9, "inpaint", 1).double()

    def patches(values):
        rows = [values[:, :, a : a + 2, b : b + 2].flatten(1) for a in (0, 2) for b in (0, 2)]
        return torch.stack(rows, 1)

    expected = x.masked_fill(mask, 0.0)
    for row, column in ((2, 0), (2, 2)):
        # The flow is affine in a token given those before it: two probes tell its mean and scale.
        def at(value, row=row, column=column):
            probe = expected.clone()
            probe[:, :, row : row + 2, column : column + 2] = value
            return module.flow_encode(probe, None)[:, :, row : row + 2, column : column + 2]

        zero, one = at(0.0), at(1.0)
        expected[:, :, row : row + 2, column : column + 2] = (
            noise[:, :, row : row + 2, column : column + 2] - zero
        ) / (one - zero)
    torch.testing.assert_close(found.x, expected, rtol=0, atol=1e-9)
    assert float((patches(found.x)[:, 2:] - patches(noise)[:, 2:]).abs().max()) > 1e-2
    assert float(found.drift.max()) < 1e-12


def test_a_prefix_is_an_approximation_and_says_so():
    """Against the order of the block the known values move; the true conditional has another mean."""
    module = GaussianFlow()
    x, mask = data(num=1).expand(4000, -1, -1, -1), make_mask("top", (1, 4, 4))
    found = inpaint(module, x, mask, rounds=4, seed=1)
    assert float(found.drift.min()) > 1e-3
    assert torch.equal(found.x[:, :, 2:], x[:, :, 2:])
    known = ~mask.flatten().numpy()
    mean, _ = conditional_of(module, 0, known, x[0].flatten().numpy())
    gap = np.abs(found.x.flatten(1).mean(0).numpy()[~known] - mean)
    assert gap.max() > 0.1
    # The same values are a suffix of a flow in the other order.
    assert float(inpaint(GaussianFlow(order=-1), x[:5], mask, seed=1).drift.max()) < 1e-12


def test_what_is_masked_does_not_matter():
    module = build("cfm", IMAGES, conditional=True).eval()
    mask = make_mask("random-0.5", IMAGES.shape, seed=3)
    x = data(IMAGES).float()
    other = torch.where(mask, torch.full_like(x, 7.0), x)
    label = torch.arange(5) % 3
    first, second = (inpaint(module, values, mask, label, rounds=2) for values in (x, other))
    assert torch.equal(first.x, second.x)
    assert first.network_evaluations == 40 + 2 * 80


def test_inpainting_is_keyed_by_index_and_seed():
    module, mask, x = GaussianFlow(), make_mask("left", (1, 4, 4)), data()
    whole = inpaint(module, x, mask, seed=2).x
    part = inpaint(module, x[3:], mask, seed=2, index=torch.tensor([3, 4])).x
    torch.testing.assert_close(part, whole[3:], rtol=0, atol=1e-12)
    assert float((inpaint(module, x, mask, seed=3).x - whole).abs().max()) > 0.1


def test_a_round_that_is_not_finite_is_forgotten(monkeypatch):
    module, mask, x = GaussianFlow(), make_mask("left", (1, 4, 4)), data()
    whole, calls = module.flow_decode, []

    def broken(noise, label, guidance=1.0):
        points, cost = whole(noise, label, guidance)
        calls.append(cost)
        return (torch.full_like(points, torch.nan) if len(calls) == 2 else points), cost

    monkeypatch.setattr(module, "flow_decode", broken)
    found = inpaint(module, x, mask, rounds=4, seed=2)
    assert found.x.isfinite().all()
    assert found.drift.isfinite().all()


def test_a_latent_is_unknown_as_soon_as_one_pixel_of_its_cell_is():
    module = build("starflow", IMAGES).eval()
    x, mask = data(IMAGES).float(), torch.zeros(4, 4, dtype=torch.bool)
    mask[0, 3] = True
    found = inpaint(module, x, mask, rounds=2, seed=1)
    assert torch.equal(found.x[:, :, 1:], x[:, :, 1:])
    assert float((found.x[:, 0, 0, 3] - x[:, 0, 0, 3]).abs().min()) > 0
    from flowbench.families.zero_shot import _flow_mask

    latent = _flow_mask(module, mask)
    assert latent.shape == module.flow_shape
    assert latent[0].tolist() == [[False, True], [False, False]]


def test_a_flow_of_noisy_points_is_told_noisy_values_and_denoised_once(monkeypatch):
    module = GaussianFlow(space=PixelSpace(IMAGE.shape, noise_std=0.3))
    x, mask = data(), make_mask("bottom", (1, 4, 4))
    seen = []

    def denoise(z, label):
        seen.append(z)
        return z + 5

    monkeypatch.setattr(module, "flow_denoise", denoise)
    found = inpaint(module, x, mask, rounds=3, seed=2)
    noise = indexed_normal(torch.arange(5), (1, 4, 4), 2, "inpaint-noise").double()
    fresh = module.source.sample_indexed(torch.arange(5), (1, 4, 4), 2, "inpaint", 2).double()
    known = ~mask.flatten().numpy()
    for i in range(5):
        noisy = (x[i] + 0.3 * noise[i]).flatten().numpy()
        mean, covariance = conditional_of(module, 0, known, noisy)
        expected = mean + np.linalg.cholesky(covariance) @ fresh[i].flatten().numpy()[~known] + 5
        np.testing.assert_allclose(found.x[i].flatten().numpy()[~known], expected, atol=1e-9)
    assert torch.equal(found.x[:, :, :2], x[:, :, :2])
    assert len(seen) == 1


def test_a_round_that_runs_away_is_not_kept(monkeypatch):
    """The start and one of three rounds overflow; another moves the known values: the remaining one is kept."""
    module, x, mask = GaussianFlow(), data(), make_mask("bottom", (1, 4, 4))
    plain, seen = module.flow_decode, []

    def decode(noise, label, guidance=1.0):
        seen.append(noise)
        points, cost = plain(noise, label, guidance)
        spoilt = {0: torch.inf, 2: torch.nan, 3: 1.0}.get(len(seen) - 1, 0.0)
        return points + spoilt, cost

    monkeypatch.setattr(module, "flow_decode", decode)
    found = inpaint(module, x, mask, rounds=3)
    torch.testing.assert_close(found.x, torch.where(mask, plain(seen[1], None)[0], x), rtol=0, atol=1e-10)
    assert float(found.drift.max()) < 1e-12
    monkeypatch.setattr(module, "flow_decode", lambda noise, label: (torch.full_like(noise, torch.nan), 1.0))
    assert inpaint(module, x, mask, rounds=2).drift.isinf().all()


def test_rounds_below_one_are_refused():
    with pytest.raises(ValueError, match="rounds must be >= 1, got 0"):
        inpaint(GaussianFlow(), data(), make_mask("left", (1, 4, 4)), rounds=0)


# ---- masks --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("left", ["xx..", "xx..", "xx..", "xx.."]),
        ("right", ["..xx", "..xx", "..xx", "..xx"]),
        ("top", ["xxxx", "xxxx", "....", "...."]),
        ("bottom", ["....", "....", "xxxx", "xxxx"]),
        ("center", ["....", ".xx.", ".xx.", "...."]),
    ],
)
def test_named_masks(name, expected):
    found = make_mask(name, (3, 4, 4))
    assert ["".join(".x"[int(v)] for v in row) for row in found] == expected


def test_random_masks_hide_their_share_and_follow_the_seed():
    first, again, other = (make_mask("random-0.25", (1, 8, 8), seed) for seed in (0, 0, 1))
    assert int(first.sum()) == 16
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_masks_of_points():
    assert make_mask("left", (3,)).tolist() == [True, False, False]
    assert make_mask("right", (2,)).tolist() == [False, True]


def test_a_mask_from_a_file(tmp_path):
    pixels = np.zeros((4, 4), dtype=np.uint8)
    pixels[1, 2] = 255
    pixels[3, 0] = 128
    pixels[0, 0] = 127
    Image.fromarray(pixels).save(tmp_path / "hole.png")
    found = make_mask(str(tmp_path / "hole.png"), (1, 4, 4))
    assert found.nonzero().tolist() == [[1, 2], [3, 0]]


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        ("middle", (1, 4, 4), "unknown mask 'middle': choose left, right"),
        ("top", (2,), "unknown mask 'top': choose left, right or random-SHARE for points"),
        ("random-2", (1, 4, 4), r"a share in \(0, 1\]"),
        ("random-x", (1, 4, 4), "got 'random-x'"),
        ("random-0.001", (1, 4, 4), "hides no value"),
        ("none.png", (1, 4, 4), "there is no mask at none.png"),
        ("none.png", (2,), "a PNG masks images"),
    ],
)
def test_bad_masks_are_refused_in_one_line(name, shape, expected):
    with pytest.raises(ValueError, match=expected) as caught:
        make_mask(name, shape)
    assert "\n" not in str(caught.value)


def test_mask_files_that_do_not_fit(tmp_path):
    Image.fromarray(np.zeros((2, 3), dtype=np.uint8)).save(tmp_path / "small.png")
    (tmp_path / "text.png").write_text("no image")
    with pytest.raises(ValueError, match=r"is 2x3, the images are 4x4"):
        make_mask(str(tmp_path / "small.png"), (1, 4, 4))
    with pytest.raises(ValueError, match="cannot be read as an image"):
        make_mask(str(tmp_path / "text.png"), (1, 4, 4))


# ---- classes ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prior", [[1 / 3, 1 / 3, 1 / 3], [0.7, 0.2, 0.1]])
def test_the_posterior_of_a_mixture_of_gaussians(prior):
    """Against SciPy's densities and Bayes' rule written out."""
    module = GaussianFlow(conditional=True)
    # Between the means, so that no class is certain.
    x = module.mean.mean(0).view(1, 1, 4, 4) + 0.5 * data(num=20)
    found = classify(module, x, torch.tensor(prior, dtype=torch.float64).log())
    density = np.stack(
        [
            stats.multivariate_normal(mean, lower @ lower.T).logpdf(x.flatten(1).numpy())
            for mean, lower in zip(module.mean.numpy(), module.lower.numpy(), strict=True)
        ],
        axis=1,
    )
    np.testing.assert_allclose(found.log_prob, density, atol=1e-9)
    joint = np.exp(density - density.max(1, keepdims=True)) * prior
    np.testing.assert_allclose(found.log_posterior.exp(), joint / joint.sum(1, keepdims=True), atol=1e-9)
    assert (found.predicted.numpy() == joint.argmax(1)).all()
    assert found.network_evaluations == 3


@pytest.mark.parametrize("name", ["cfm", "latent_cfm", "starflow"])
def test_all_classes_see_the_same_draws(name):
    """Without an effect of the label the posterior is the prior: probes and posterior draws must cancel."""
    module = build(name, IMAGES, conditional=True).eval()
    with torch.no_grad():
        for part in module.modules():
            if isinstance(part, nn.Embedding):
                part.weight.copy_(part.weight[:1].expand_as(part.weight))
    log_prior = torch.tensor([0.5, 0.3, 0.2]).log()
    found = classify(module, data(IMAGES, 3).float() * 0.5, log_prior, index=torch.tensor([5, 1, 8]), seed=3)
    torch.testing.assert_close(found.log_posterior, log_prior.double().expand(3, 3), rtol=0, atol=2e-4)
    assert found.network_evaluations == (3 if name == "starflow" else 3 * 128)


def test_the_bound_of_a_latent_flow_decodes_what_its_sampler_decodes(monkeypatch):
    """log p(x | z) = N(x; D(denoise(z)), s^2): the decoder term alone moves, by the difference of two squares."""
    module = build("starflow", IMAGES).eval()
    x = data(IMAGES).float() * 0.5
    plain = module.log_prob(x, seed=1)
    monkeypatch.setattr(module, "flow_denoise", lambda z, label: 0.8 * z)
    index, width = torch.arange(5), float(module.space.autoencoder.network.decoder_std)
    with_it, without = (module.space.reconstruct(x, index=index, seed=1, denoise=f) for f in (lambda z: 0.8 * z, None))
    squares = [(y - x).flatten(1).square().sum(1) for y in (with_it, without)]
    expected = (squares[1] - squares[0]) / (2 * width**2)
    assert float(expected.abs().min()) > 1e-3
    torch.testing.assert_close(module.log_prob(x, seed=1) - plain, expected.to(plain), rtol=1e-3, atol=1e-3)


def test_classes_need_a_conditional_flow_and_a_prior_of_their_number():
    with pytest.raises(ValueError, match="classify needs a flow that knows classes"):
        classify(GaussianFlow(), data(), torch.zeros(3))
    with pytest.raises(ValueError, match="the prior must name 3 classes"):
        classify(GaussianFlow(conditional=True), data(), torch.zeros(2))


@pytest.mark.parametrize(("successes", "trials"), [(0, 10), (10, 10), (7, 10), (450, 500)])
def test_the_interval_of_a_proportion(successes, trials):
    """Against the definition: the tails of the binomial beyond the interval's ends."""
    low, high = clopper_pearson(successes, trials)
    assert 0 <= low <= successes / trials <= high <= 1
    if successes:
        assert stats.binom.sf(successes - 1, trials, low) == pytest.approx(0.025)
    if successes < trials:
        assert stats.binom.cdf(successes, trials, high) == pytest.approx(0.025)
    with pytest.raises(ValueError, match="got 3 of 2"):
        clopper_pearson(3, 2)
