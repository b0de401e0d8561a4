"""DreamSampler against closed forms and diffusers' DDIM; its command line on a tiny pipeline."""

import json
import shlex
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from scipy.ndimage import gaussian_filter
from test_evaluate import build_clip_folder
from torch import Tensor, nn

from lmc.cli import load, main, parser_of
from lmc.dreamsampler import (
    AveragePooling,
    Canvas,
    DataConsistency,
    DreamSampler,
    GaussianBlur,
    Inpainting,
    data_weight,
    mix_noise,
    posterior_deviation,
)
from lmc.measure.metrics import rmse
from lmc.one_image.job import read_image
from lmc.priors import DiffusersPrior
from lmc.priors.prompts import TextPrompts
from lmc.renderers.adam import ScheduledAdam
from lmc.renderers.drawing import Drawing, vectorise
from lmc.renderers.svg import SVG
from lmc.schedule import FlowSchedule, Schedule

import worlds
from gaussian import GaussianPrior, cosine_alphas_cumprod, power_spectrum, small_prior

SIZE = 8


def generators(count: int, first: int = 0) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(first + i) for i in range(count)]


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def sample(prior, sampler: DreamSampler, z: Tensor, target: str = "", **more) -> Tensor:
    """What becomes of z itself as the parameters."""
    canvas = Canvas(prior, z)
    base, goal = (prior.embed([prompt]).expand(len(z)) for prompt in ("", target))
    sampler(prior, canvas, base, goal, generators(len(z)), **more)
    return canvas.z.detach()


class Linear(nn.Module):
    """An image as a linear function of few parameters, and another parameter that is frozen."""

    def __init__(self, side: int) -> None:
        super().__init__()
        self.basis = draw(5, 3 * side * side, seed=1) / 20
        self.side, self.offset = side, nn.Parameter(torch.ones(1).double(), requires_grad=False)
        self.psi = nn.Parameter(draw(1, 5, seed=2))

    def forward(self) -> Tensor:
        return (self.psi @ self.basis).view(1, 3, self.side, self.side) + self.offset


def coefficients(prior, time: float) -> tuple[Tensor, Tensor]:
    return prior.schedule.coefficients(torch.tensor([time], dtype=torch.float64))


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_the_mixed_noise_has_unit_variance(eta):
    schedule = Schedule(cosine_alphas_cumprod())
    times = torch.linspace(0.98, 0.02, 49, dtype=torch.float64)
    alpha, sigma = schedule.coefficients(times)
    deviation = eta * posterior_deviation(alpha[:-1], alpha[1:])
    one, zero = torch.ones(()).double(), torch.zeros(()).double()
    of_eps_hat = mix_noise(one, zero, sigma[1:], deviation)
    of_eps = mix_noise(zero, one, sigma[1:], deviation)
    torch.testing.assert_close(of_eps_hat**2 + of_eps**2, torch.ones(48, 1, 1, 1).double())
    assert (of_eps > 0).all() == (eta > 0)
    e = mix_noise(draw(20_000), draw(20_000, seed=1), sigma[20], deviation[19])
    assert e.std().item() == pytest.approx(1, abs=0.02)
    # DDPM's posterior, from the product of the two gaussians q(z_u | z_t) q(z_t | z).
    bar_u, bar_t = alpha[:-1] ** 2, alpha[1:] ** 2
    step = bar_u / bar_t
    expected = (step / (1 - step) + 1 / (1 - bar_t)) ** -0.5
    torch.testing.assert_close(posterior_deviation(alpha[:-1], alpha[1:]), expected)


@pytest.mark.parametrize("guidance_scale", [0.0, 1.0, 3.0])
def test_the_gradient_is_the_difference_of_noises(guidance_scale):
    """One step: ψ moves by −ζ (sigma_t/alpha_t)(eps_hat − e) ∂z/∂ψ, with e the noise given."""
    prior, renderer, e = small_prior(SIZE), Linear(SIZE), draw(1, 3, SIZE, SIZE)
    psi, z, start = renderer.psi.detach().clone(), renderer().detach(), 0.6
    alpha, sigma = coefficients(prior, start)
    t = torch.tensor([start]).double()
    (null, _), (dog, _) = (
        prior.predict(alpha * z + sigma * e, t, prior.embed([p])) for p in ("", "dog")
    )
    gradient = sigma / alpha * (null + guidance_scale * (dog - null) - e)
    sampler = DreamSampler(1, start, guidance_scale, step_size=0.1)
    base, target = prior.embed([""]), prior.embed(["dog"])
    sampler(prior, renderer, base, target, generators(1), e)
    expected = psi - 0.1 * gradient.flatten(1) @ renderer.basis.T
    torch.testing.assert_close(renderer.psi.detach(), expected)
    assert renderer.offset.item() == 1 and renderer.offset.grad is None


def test_a_step_goes_towards_the_denoised_image():
    """By ζ of the way; n steps towards one z_hat by 1 − (1 − ζ)^n."""
    prior, e = small_prior(SIZE), draw(1, 3, SIZE, SIZE)
    z = prior.sample(1, "cat", generators(1)[0])
    alpha, sigma = coefficients(prior, 0.6)
    _, z_hat = prior.predict(
        alpha * z + sigma * e, torch.tensor([0.6]).double(), prior.embed(["dog"])
    )
    for steps, share in ((1, 0.2), (3, 1 - 0.8**3)):
        sampler = DreamSampler(1, 0.6, step_size=0.2, inner_steps=steps)
        moved = sample(prior, sampler, z, "dog", eps=e)
        torch.testing.assert_close(moved, z + share * (z_hat - z))


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_without_penalty_it_is_ddim(eta):
    """ζ = 1, λ = 0, z as the parameters: diffusers' DDIM with the same noise; η = 1 is DDPM."""
    prior, steps = small_prior(SIZE), 49
    scheduler = DDIMScheduler(
        trained_betas=np.diff(1 - np.append(1, prior.schedule.alphas_cumprod))
        / np.append(1, prior.schedule.alphas_cumprod)[:-1],
        clip_sample=False,
    )
    scheduler.set_timesteps(50)  # 980, 960, …, 20, 0
    scheduler.alphas_cumprod = prior.schedule.alphas_cumprod
    rng, null = generators(1)[0], prior.embed([""])
    x = torch.randn(3, SIZE, SIZE, generator=rng, dtype=torch.float64)[None]
    alpha, sigma = coefficients(prior, 0.98)
    start = prior.sample(1, "", torch.Generator().manual_seed(5))
    x = alpha * start + sigma * x
    for timestep in scheduler.timesteps[:steps]:
        eps, _ = prior.predict(x, timestep[None].double() / 1000, null)
        noise = torch.randn(3, SIZE, SIZE, generator=rng, dtype=torch.float64)[None]
        given = {"eta": eta, "variance_noise": noise} if eta else {}
        out = scheduler.step(eps, timestep, x, **given)
        x = out.prev_sample
    sampled = sample(prior, DreamSampler(steps, 0.98, eta=eta), start)
    torch.testing.assert_close(sampled, out.pred_original_sample, atol=1e-8, rtol=1e-6)


@pytest.mark.parametrize(("scale", "each"), [(0.0, 1), (1.0, 1), (3.0, 2)])
def test_evaluations(scale, each):
    prior = small_prior(SIZE)
    z = prior.sample(2, "cat", generators(1)[0])
    sample(prior, DreamSampler(5, guidance_scale=scale, inner_steps=3), z, "dog")
    assert (prior.calls, prior.evaluations) == (5, 5 * each * 2)
    prior.calls = prior.evaluations = 0
    DreamSampler(5, guidance_scale=scale).invert(prior, z, prior.embed(["", ""]))
    assert (prior.calls, prior.evaluations) == (5, 5 * 2)


def test_as_published_the_guidance_is_damped_and_not_taken_along():
    """Two steps written out, of z itself with ζ = 1: z becomes the guided z_hat."""
    prior, omega = small_prior(SIZE), 7.5
    sampler = DreamSampler(2, 0.6, omega, as_published=True)
    z, eps = draw(2, 3, SIZE, SIZE, seed=3), draw(2, 3, SIZE, SIZE, seed=4)
    found = sample(prior, sampler, z, "dog", eps=eps)
    for time in (0.6, 0.3):
        alpha, sigma = coefficients(prior, time)
        t = torch.full((2,), time, dtype=torch.float64)
        z_t = alpha * z + sigma * eps
        eps, _ = prior.predict(z_t, t, prior.embed([""] * 2))
        target, _ = prior.predict(z_t, t, prior.embed(["dog"] * 2))
        guided = eps + alpha**2 * omega * (target - eps)
        z = (z_t - sigma * guided) / alpha
    torch.testing.assert_close(found, z, rtol=0, atol=1e-12)
    ours = sample(prior, DreamSampler(2, 0.6, omega), draw(2, 3, SIZE, SIZE, seed=3), "dog")
    assert not torch.allclose(found, ours, atol=0.1)


def test_null_edits_come_back_to_the_source():
    """Nearer with more steps, whatever ω, while another prompt goes to its own images."""
    prior = small_prior(SIZE)
    z = prior.sample(2, "", generators(1)[0])
    for scale in (0.0, 4.0):
        errors = []
        for steps in (5, 20, 80):
            sampler = DreamSampler(steps, 0.8, guidance_scale=scale)
            eps = sampler.invert(prior, z, prior.embed(["", ""]))
            errors.append((sample(prior, sampler, z, "", eps=eps) - z).square().mean().item())
        assert errors[0] > 2 * errors[1] > 4 * errors[2]
    sampler = DreamSampler(80, 0.8, guidance_scale=1.0)
    eps = sampler.invert(prior, z, prior.embed(["", ""]))
    moved = sample(prior, sampler, z, "dog", eps=eps) - z
    dog = prior.means["dog"]
    assert (moved * dog).sum((1, 2, 3)).min() > 0.5 * dog.square().sum()


def test_inversion_follows_the_probability_flow():
    """One step is the prediction at t = 0; many come near the gaussian's own flow.

    Each frequency's z_t / √(alpha_t² S + sigma_t²) is constant on it (the means are 0).
    """
    prior = small_prior(SIZE)
    z, null = prior.sample(2, "", generators(1)[0]), prior.embed(["", ""])
    at_zero, _ = prior.predict(z, torch.zeros(2).double(), null)
    torch.testing.assert_close(DreamSampler(1, 0.8).invert(prior, z, null), at_zero)
    alpha, sigma = coefficients(prior, 0.8)
    spread = ((alpha**2 * prior.spectrum + sigma**2) / prior.spectrum).sqrt()
    z_t = torch.fft.ifft2(spread * torch.fft.fft2(z)).real
    eps = DreamSampler(400, 0.8).invert(prior, z, null)
    assert (eps - (z_t - alpha * z) / sigma).abs().max() < 0.02


def test_an_image_depends_on_its_own_generator_alone():
    prior = small_prior(SIZE)
    z = torch.zeros(3, 3, SIZE, SIZE).double()
    sampler = DreamSampler(4, eta=1.0)
    together = sample(prior, sampler, z)
    torch.testing.assert_close(sample(prior, sampler, z[:1]), together[:1])
    assert (together[0] - together[1]).abs().max() > 0.1
    with pytest.raises(ValueError, match="3 images need as many generators, got 1"):
        sampler(prior, Canvas(prior, z), *[prior.embed([""] * 3)] * 2, generators(1))


MASK = torch.ones(SIZE, SIZE, dtype=torch.bool)
MASK[2:5, 3:6] = False
OPERATORS = {
    "inpainting": Inpainting(MASK),
    "pooling": AveragePooling(2),
    "blur": GaussianBlur(0.8),
}


def matrix(operator) -> Tensor:
    """A of one channel, by what it makes of each pixel alone: (measurements, SIZE²)."""
    pixels = torch.eye(SIZE * SIZE, dtype=torch.float64).view(-1, 1, SIZE, SIZE)
    return operator(pixels).flatten(1).T


@pytest.mark.parametrize("name", list(OPERATORS))
def test_operators(name):
    """Against numpy and scipy; the bound on the norm; the gradient is 2 λ Aᵀ (A x − y)."""
    operator, x = OPERATORS[name], draw(2, 3, SIZE, SIZE)
    expected = {
        "inpainting": lambda: np.where(MASK, x, 0),
        "pooling": lambda: x.numpy().reshape(2, 3, 4, 2, 4, 2).mean((3, 5)),
        "blur": lambda: gaussian_filter(x.numpy(), 0.8, mode="reflect", radius=3, axes=(2, 3)),
    }[name]()
    torch.testing.assert_close(operator(x), torch.from_numpy(expected))
    a = matrix(operator)
    norm = torch.linalg.matrix_norm(a, 2).item() ** 2
    assert norm == pytest.approx(operator.squared_norm, rel=1e-6)
    y = operator(draw(1, 3, SIZE, SIZE, seed=1))
    x.requires_grad_()
    penalty = DataConsistency(operator, y, 0.7)
    (gradient,) = torch.autograd.grad(penalty(x).sum(), x)
    residual = (operator(x) - y).detach().flatten(2)
    torch.testing.assert_close(gradient.flatten(2), 1.4 * residual @ a)
    torch.testing.assert_close(penalty(x).detach(), 0.7 * residual.square().sum((1, 2)))


@pytest.mark.parametrize("name", list(OPERATORS))
def test_inverse_problems_against_the_posterior_mean(name):
    """The data is met better and better, and the mean result is near E[z | y]."""
    prior = GaussianPrior({"": torch.zeros(3, SIZE, SIZE).double()}, power_spectrum(SIZE))
    operator = OPERATORS[name]
    truth = prior.sample(1, "", torch.Generator().manual_seed(9))
    y = operator(truth)
    a, pixels = matrix(operator), torch.eye(SIZE * SIZE, dtype=torch.float64)
    coloured = torch.fft.fft2(pixels.view(-1, SIZE, SIZE)) * prior.spectrum
    covariance = torch.fft.ifft2(coloured).real.flatten(1)
    inner = a @ covariance @ a.T + 1e-6 * torch.eye(len(a)).double()
    # Pixels that are not measured have rows of zeros, which the 1e-6 keeps invertible.
    posterior = (covariance @ a.T @ torch.linalg.solve(inner, y.flatten(2).mT)).mT
    posterior = posterior.view(1, 3, SIZE, SIZE)

    weight = data_weight(0.9, 1 / operator.squared_norm)
    penalty = DataConsistency(operator, y, weight)
    sampler = DreamSampler(50, eta=1.0, step_size=0.1, inner_steps=10)
    grey = torch.zeros(64, 3, SIZE, SIZE).double()
    found = sample(prior, sampler, grey, penalty=penalty)
    assert (penalty(found) < 0.02 * penalty(grey)).all()
    start = torch.nn.functional.interpolate(y, (SIZE, SIZE)) if name == "pooling" else y

    def distance(image: Tensor) -> float:
        return (image - posterior).square().mean().item()

    assert distance(found.mean(0, keepdim=True)) < 0.5 * distance(start)
    without = sample(prior, sampler, grey).mean(0, keepdim=True)
    assert distance(found.mean(0, keepdim=True)) < 0.5 * distance(without)
    assert (found - found.mean(0)).square().mean() > 1e-3, "they differ"


def test_the_penalty_enters_with_its_weight():
    """One step from z: −ζ [(z − z_hat) + 2 λ Aᵀ(A z − y)]."""
    prior, e, operator = small_prior(SIZE), draw(1, 3, SIZE, SIZE), OPERATORS["blur"]
    z, y = draw(1, 3, SIZE, SIZE, seed=1), draw(1, 3, SIZE, SIZE, seed=2)
    sampler = DreamSampler(1, 0.5, step_size=0.01)
    without = sample(prior, sampler, z, eps=e)
    with_it = sample(prior, sampler, z, eps=e, penalty=DataConsistency(operator, y, 3.0))
    residual = (operator(z) - y).flatten(2)
    step = (0.06 * residual @ matrix(operator)).view_as(z)
    torch.testing.assert_close(with_it, without - step)


def test_any_renderer_and_a_nonlinear_operator(family_folder):
    """Of another size than the prior's, through a VAE; latents too, decoded for the penalty."""
    prior = DiffusersPrior(str(family_folder("sd15")))
    null = prior.embed([""])
    prior.to("cpu")

    def squashed(image: Tensor) -> Tensor:
        return nn.functional.adaptive_avg_pool2d(image, 4).tanh()

    class Field(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.colours = nn.Parameter(torch.zeros(1, 3, 4, 4))

        def forward(self) -> Tensor:
            return nn.functional.interpolate(self.colours, (48, 48), mode="bilinear")

    with torch.no_grad():
        z = prior.encode(torch.zeros(1, 3, 32, 32))
        y = squashed(prior.decode(draw(*z.shape).float()))
    penalty = DataConsistency(squashed, y, 100.0)
    for renderers in ((Field(), Field()), (Canvas(prior, z), Canvas(prior, z))):
        for renderer, given in zip(renderers, (None, penalty), strict=True):
            DreamSampler(3, 0.5, step_size=1e-3, inner_steps=10)(
                prior, renderer, null, null, generators(1), penalty=given
            )
        without, with_it = (penalty(renderer()).item() for renderer in renderers)
        assert with_it < 0.8 * without


def test_a_renderer_with_rates_of_its_own_is_moved_by_adam_at_them():
    """The first step of Adam is its rate, down the gradient's sign; the rate falls with t."""

    class Rated(Linear):
        def groups(self, step: int, steps: int) -> list[dict]:
            return [{"params": [self.psi], "lr": 0.3 * (1 - step / steps)}]

        def after(self, step: int, steps: int, generator: torch.Generator) -> None:
            seen.append((step, steps, generator, self.psi.detach().clone()))

    prior, e, seen = small_prior(SIZE), draw(1, 3, SIZE, SIZE), []
    slow, start = Linear(SIZE), Linear(SIZE).psi.detach()
    null, (host,) = prior.embed([""]), generators(1)
    DreamSampler(1, 0.6, step_size=1e-3)(prior, slow, null, null, [host], e)
    renderer = Rated(SIZE)
    DreamSampler(2, 0.6, step_size=1e9)(prior, renderer, null, null, [host], e)
    assert [each[:3] for each in seen] == [(0, 2, host), (1, 2, host)]
    uphill = (start - slow.psi.detach()).sign()
    torch.testing.assert_close(seen[0][3], start - 0.3 * uphill)
    assert (seen[1][3] - seen[0][3]).abs().max() <= 0.15 * 1.01


def test_a_renderer_whose_parameters_become_others_goes_on_with_them():
    """As those of a scene do when its voxels become finer: Adam begins anew with what is there."""

    class Growing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.colours = nn.Parameter(torch.zeros(1, 3, 2, 2))

        def forward(self) -> Tensor:
            return nn.functional.interpolate(self.colours, (SIZE, SIZE), mode="bilinear")

        def groups(self, step: int, steps: int) -> list[dict]:
            return [{"params": [self.colours], "lr": 0.1}]

        def after(self, step: int, steps: int, generator: torch.Generator) -> None:
            seen.append(self.colours.detach().clone())
            if step == 1:
                finer = nn.functional.interpolate(self.colours.detach(), (4, 4), mode="nearest")
                self.colours = nn.Parameter(finer)

    prior, seen = small_prior(SIZE), []
    null = prior.embed([""])
    DreamSampler(4, 0.6)(prior, Growing(), null, null, generators(1))
    assert [each.shape[-1] for each in seen] == [2, 2, 4, 4]
    assert (seen[3] - seen[2]).abs().max() > 0.01


def test_a_path_that_starts_anew_has_no_past():
    """Of a gradient that ended, Adam moves the others on, and not the new one."""
    drawing = Drawing(SVG.random(3, 16, torch.Generator().manual_seed(0)), anew=10)
    svg, adam = drawing.svg, ScheduledAdam(partial(drawing.groups, steps=100))
    for step in range(10):
        adam.down((svg.points * draw(*svg.points.shape).sign()).sum() + svg.opacity.sum(), step)
    with torch.no_grad():
        svg.opacity[1] = 0.01
    begun = drawing.after(9, 100, torch.Generator())
    adam.forget(begun)
    new = svg.points.detach().clone()
    assert 1 in begun[svg.colours] and svg.opacity[1] >= 0.7
    adam.down(0 * (svg.points.sum() + svg.opacity.sum() + svg.colours.sum()), 10)
    moved = [not torch.equal(a, b) for a, b in zip(new.split(4), svg.points.split(4), strict=True)]
    assert moved == [path not in begun[svg.colours] for path in range(3)] and any(moved)


def drawn(*corners: tuple[float, float], size: int = 16) -> SVG:
    """A blue rectangle of these corners (x, y) on light grey, of straight sides."""
    (left, top), (right, bottom) = corners
    points = torch.tensor([[left, top], [right, top], [right, bottom], [left, bottom]])
    side = points.roll(-1, 0) - points
    contour = torch.stack([points, points + side / 3, points + 2 * side / 3], 1)
    box = (0.0, 0.0, float(size), float(size))
    fill = torch.tensor([[0.1, 0.2, 0.8]])
    return SVG([[contour]], fill, torch.ones(1), size, box, (0.9, 0.9, 0.9))


@pytest.mark.parametrize("name", ["pooling", "blur"])
def test_the_drawing_that_was_measured_is_found(name):
    """Its edges, within a tenth of a pixel, by a prior that knows nothing of them."""
    truth, found = drawn((3.3, 4.2), (12.4, 11.7)), drawn((4.5, 5.5), (11.0, 10.0))
    operator = OPERATORS[name]
    original = truth().detach()
    penalty = DataConsistency(operator, operator(original), data_weight(0.999, 1.0))
    prior = small_prior(16)
    null = prior.embed([""])
    sampler = DreamSampler(20, start=0.3, inner_steps=10)
    drawing = Drawing(found, points_lr=0.1, colours_lr=0.01, anew=0)
    before = (drawing() - original).square().mean()
    sampler(prior, drawing, null, null, generators(1), penalty=penalty)
    assert (drawing() - original).square().mean() < 1e-3 * before
    torch.testing.assert_close(found.points[:, 0], truth.points[:, 0], atol=0.1, rtol=0)


def test_an_image_is_vectorised():
    """The paths' background too, where it asks for it; the same seed gives the same."""
    original = drawn((3.3, 4.2), (12.4, 11.7))().detach()
    images = []
    for _ in range(2):
        svg = drawn((4.5, 5.5), (11.0, 10.0))
        svg.background.data.fill_(0.5)
        svg.background.requires_grad_()
        drawing = Drawing(svg, 0.1, 0.02)
        vectorise(drawing, original, 100, generators(1)[0])
        images.append(drawing().detach())
    assert (images[0] - original).square().mean() < 1e-3
    assert torch.equal(*images)


def test_what_is_refused():
    prior, z = small_prior(SIZE), torch.zeros(1, 3, SIZE, SIZE).double()
    for knob, value, message in (
        ("steps", 0, "steps must be at least 1, got 0"),
        ("inner_steps", 0, "inner_steps must be at least 1"),
        ("start", 1.0, "start must be a time between 0 and 1"),
        ("guidance_scale", -1.0, "guidance_scale must not be negative, got -1"),
        ("eta", 1.5, r"eta must be in \[0, 1\]"),
        ("step_size", 0.0, "step_size must be positive"),
    ):
        with pytest.raises(ValueError, match=message):
            DreamSampler(**{knob: value})
    with pytest.raises(ValueError, match="not finite any more"):
        sample(prior, DreamSampler(50, step_size=1e12, inner_steps=50), z)
    with pytest.raises(ValueError, match="the factor 3 does not divide an image of 8 x 8"):
        AveragePooling(3)(z)
    with pytest.raises(ValueError, match=r"is \(3, 8, 8\), the operator gives \(3, 4, 4\)"):
        DataConsistency(AveragePooling(2), z, 1.0)(z)
    for knobs in ((1.0, 1.0, 1.0), (0.5, -1.0, 1.0), (0.5, 1.0, 0.0)):
        with pytest.raises(ValueError):
            data_weight(*knobs)
    assert data_weight(0.8, 3.0, 2.0) == pytest.approx(0.8 * 3 / (0.2 * 2))
    prior.schedule = FlowSchedule()
    with pytest.raises(ValueError, match="GaussianPrior is a flow prior"):
        sample(prior, DreamSampler(1), z)
    with pytest.raises(ValueError, match="GaussianPrior is a flow prior"):
        DreamSampler(1).invert(prior, z, prior.embed([""]))


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    """A wide photo, masks of its and another size and an empty one, a small and a broken file."""
    pixels = draw(3, 16, 20).float().clamp(-1, 1)
    half = -torch.ones(3, 16, 20)
    half[:, 4:12, 6:12] = 1
    smeared = half * 0.9 + 0.05 * draw(1, 16, 20).float().clamp(-1, 1)  # as a JPEG's, nearly clean
    images = {
        "photo": pixels,
        "mask": half,
        "other": half[:, :, :16],
        "smeared": smeared,
        "empty": -torch.ones(3, 16, 20),
        "full": 0.9 * torch.ones(3, 16, 20),
        "small": pixels[:, :4, :4],
    }
    paths = {name: tmp_path / f"{name}.png" for name in (*images, "broken")}
    for name, image in images.items():
        paths[name].write_bytes(worlds.png(image))
    paths["broken"].write_bytes(b"no image")
    return paths


def arguments(prior: Path, task: str, image: Path, out: Path, *more: str) -> list[str]:
    return [
        *("dreamsampler", task, "--prior=lmc.priors.DiffusersPrior"),
        f"--prior.init_args.pretrained={prior}",
        *(f"--image={image}", f"--out={out}", "--sampler.steps=3", *more),
    ]


def test_commands(tiny_prior_folder, files, tmp_path, capsys):
    """Each writes its pictures and numbers, and its own settings.yaml gives the same again."""
    for task, more in {
        "edit": ["--prompt=a photo of a dog", "--source_prompt=a cat", "--sampler.eta=0.5"],
        "inpaint": [f"--mask={files['mask']}", "--noise=0.1"],
        "super_resolve": ["--prompt=a cat", "--sampler.guidance_scale=2"],
        "deblur": ["--sigma=1"],
    }.items():
        out, again = tmp_path / task, tmp_path / f"{task}-again"
        main(arguments(tiny_prior_folder, task, files["photo"], out, "--seeds=3,5", *more))
        beside = ["source"] if task == "edit" else ["measurement", "original"]
        pictures = {f"{name}.png" for name in (*beside, "result-3", "result-5")}
        assert {path.name for path in out.iterdir()} == {*pictures, "settings.yaml", "results.json"}
        printed = capsys.readouterr()
        assert "3/3" in printed.err and "sampling" in printed.err
        results = json.loads((out / "results.json").read_text())
        assert len(results.get("result_psnr", [])) == (0 if task == "edit" else 2)
        assert ("measurement_psnr" in printed.out) == (task != "edit")
        main(["dreamsampler", task, f"--config={out}/settings.yaml", f"--out={again}"])
        for name in pictures:
            assert (out / name).read_bytes() == (again / name).read_bytes()
        assert (out / "result-3.png").read_bytes() != (out / "result-5.png").read_bytes()


def restore(prior: Path, image: Path, out: Path, operator: str, *more: str) -> list[str]:
    few = ("--paths=2", "--segments=3", "--vectorise_steps=2", "--sampler.inner_steps=2")
    return [*arguments(prior, "restore_svg", image, out), f"--operator={operator}", *few, *more]


@pytest.mark.parametrize("operator", ["blur", "downsample"])
def test_restore_svg(tiny_prior_folder, files, tmp_path, capsys, operator, monkeypatch):
    """The graphic is the picture; the figures are the pictures'; the same settings, the same."""
    monkeypatch.setattr("lmc.measure.metrics.distances", lambda size: {"lpips": rmse})
    out, again = tmp_path / "out", tmp_path / "again"
    clip = build_clip_folder(tmp_path / "clip")
    more = ("--seeds=3,5", "--baseline", f"--clip={clip}", "--prompt=a cat")
    main(restore(tiny_prior_folder, files["photo"], out, operator, *more))
    kinds = ("vectorised", "raster", "baseline", "result")
    pictures = {f"{kind}-{seed}.png" for kind in kinds for seed in (3, 5)}
    pictures |= {"measurement.png", "original.png"}
    graphics = {"result-3.svg", "result-5.svg"}
    there = {path.name for path in out.iterdir()}
    assert there == {*pictures, *graphics, "settings.yaml", "results.json"}

    printed, results = capsys.readouterr(), json.loads((out / "results.json").read_text())
    for kind in ("measurement", *kinds):
        for column in ("psnr", "lpips", "clip_score"):
            assert f"{kind}_{column}: " in printed.out
            count = np.size(results[f"{kind}_{column}"])
            assert count == (1 if kind == "measurement" else 2)
    assert "vectorising 2/2" in printed.err and "sampling 3/3" in printed.err
    original = read_image(out / "original.png")
    for i, seed in enumerate((3, 5)):
        image = read_image(out / f"result-{seed}.png")
        graphic = SVG.read(out / f"result-{seed}.svg", 16)
        assert len(graphic.sizes) == 2 and graphic.sizes[0] == [3]
        torch.testing.assert_close(graphic().detach()[0], image, atol=1 / 255 + 1e-5, rtol=0)
        expected = -10 * (image - original).square().mean().log10().item() + 10 * np.log10(4)
        assert results["result_psnr"][i] == pytest.approx(expected, abs=0.1)
        assert results["result_lpips"][i] == pytest.approx(rmse(image[None], original[None]), 0.02)
    assert results["result_psnr"] != results["vectorised_psnr"]

    main(["dreamsampler", "restore_svg", f"--config={out}/settings.yaml", f"--out={again}"])
    for name in (*pictures, *graphics):
        assert (out / name).read_bytes() == (again / name).read_bytes()
    assert (out / "result-3.svg").read_bytes() != (out / "result-5.svg").read_bytes()


def test_what_is_random_in_restore_svg_has_streams_of_its_own(
    tiny_prior_folder, files, tmp_path, monkeypatch
):
    """The first blobs, those that start anew, the measurement's noise and the sampler's."""
    drawn: list[float] = []

    class Noted(torch.Generator):
        def manual_seed(self, seed: int) -> torch.Generator:
            super().manual_seed(seed)
            drawn.append(torch.rand((), generator=self).item())
            return super().manual_seed(seed)

    monkeypatch.setattr("lmc.one_image.dreamsampling.torch.Generator", Noted)
    args = restore(tiny_prior_folder, files["photo"], tmp_path / "out", "blur", "--noise=0.1")
    main([*args, "--seeds=0"])
    assert len({*drawn}) == 4


def test_restore_svg_of_a_measurement_of_ones_own(tiny_prior_folder, files, tmp_path, capsys):
    """Nothing to compare with; and ζ does not matter."""
    out, own = tmp_path / "out", ("--measured", "--sampler.step_size=9")
    main(restore(tiny_prior_folder, files["small"], out, "downsample", *own))
    assert (out / "measurement.png").read_bytes() == files["small"].read_bytes()
    assert json.loads((out / "results.json").read_text()) == {}
    assert "psnr" not in capsys.readouterr().out
    there = {path.name for path in out.iterdir()} - {"settings.yaml", "results.json"}
    assert there == {"measurement.png", "vectorised-0.png", "result-0.png", "result-0.svg"}


def test_a_mask_need_not_be_clean(tiny_prior_folder, files, tmp_path):
    for name in ("mask", "smeared"):
        out, mask = tmp_path / name, f"--mask={files[name]}"
        main(arguments(tiny_prior_folder, "inpaint", files["photo"], out, mask))
    one, other = (
        (tmp_path / name / "measurement.png").read_bytes() for name in ("mask", "smeared")
    )
    assert one == other


def test_another_result_is_not_written_over(tiny_prior_folder, files, tmp_path):
    """The same again is; of the refused one nothing is written."""
    deblur = arguments(tiny_prior_folder, "deblur", files["photo"], tmp_path / "out")
    main([*deblur, "--seeds=[7, 8]"])
    kept = {file: file.read_bytes() for file in (tmp_path / "out").iterdir()}
    main([*deblur, "--seeds=[7, 8]"])
    for other in ([*deblur, "--seeds=7"], [*deblur, "--sigma=1"]):
        with pytest.raises(SystemExit, match="holds another result"):
            main(other)
    assert {file: file.read_bytes() for file in (tmp_path / "out").iterdir()} == kept


def test_a_measurement_of_ones_own(tiny_prior_folder, files, tmp_path, capsys):
    """The photo is not degraded, and there is nothing to compare with."""
    out = tmp_path / "out"
    more = ("--measured=true", "--factor=4")
    main(arguments(tiny_prior_folder, "super_resolve", files["small"], out, *more))
    assert (out / "measurement.png").read_bytes() == files["small"].read_bytes()
    assert "psnr" not in capsys.readouterr().out and not (out / "original.png").exists()


def test_print_config(tiny_prior_folder, files, capsys):
    with pytest.raises(SystemExit) as caught:
        main(arguments(tiny_prior_folder, "deblur", files["photo"], Path("x"), "--print_config"))
    assert caught.value.code == 0 and "inner_steps: 3" in capsys.readouterr().out


def test_bad_input_is_found_before_weights_are_loaded(
    tiny_prior_folder, family_folder, files, tmp_path, monkeypatch
):
    def load(*_: object) -> None:
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(DiffusersPrior, "_load", load)
    monkeypatch.setattr(TextPrompts, "encode", load)

    def message(task: str, *more: str, image: str = "photo", prior=tiny_prior_folder) -> str:
        with pytest.raises(SystemExit) as caught:
            main(arguments(prior, task, files[image], tmp_path / "out", *more))
        line = caught.value.code
        assert isinstance(line, str) and line.startswith("lmc: ") and "\n" not in line
        assert not (tmp_path / "out").exists()
        return line

    def mask(name: str) -> str:
        return f"--mask={files[name]}"

    edit = ("edit", "--prompt=a dog")
    assert "broken.png" in message(*edit, image="broken")
    assert "no such image: gone.png" in message(*edit, "--image=gone.png")
    assert "16 x 16 pixels, image" in message("inpaint", mask("other"))
    assert "no white" in message("inpaint", mask("empty"))
    assert "leaves nothing of the image" in message("inpaint", mask("full"))
    assert "broken.png" in message("inpaint", mask("broken"))
    assert "guidance_scale must not be negative" in message(*edit, "--sampler.guidance_scale=-1")
    assert "steps must be at least 1" in message(*edit, "--sampler.steps=0")
    assert "factor 5 does not divide" in message("super_resolve", "--factor=5")
    assert "factor 0 does not" in message("super_resolve", "--factor=0")
    assert "sigma must be positive" in message("deblur", "--sigma=0")
    assert "a third" in message("deblur", "--sigma=9")
    assert "it must be below 0.105" in message("deblur", "--sampler.step_size=0.2")
    assert "noise must not be negative" in message("deblur", "--noise=-1")
    assert "leave it 0 if measured" in message("deblur", "--noise=1", "--measured=true")
    assert "gamma must be in [0, 1)" in message("deblur", "--gamma=1")
    assert "seeds differ only by fresh noise" in message(*edit, "--seeds=[0,1]")
    assert "seeds: 1 comes twice" in message("deblur", "--seeds=[1,1]")
    assert "seeds must be in [0, 2^63), got -1" in message("deblur", "--seeds=-1")
    assert "device 'cpuu' cannot be used here" in message("deblur", "--device=cpuu")
    svg = ("restore_svg", "--operator=blur")
    assert "operator" in message("restore_svg")
    assert "operator" in message("restore_svg", "--operator=smear")
    assert "paths must be at least 1, got 0" in message(*svg, "--paths=0")
    assert "segments must be at least 1, got 0" in message(*svg, "--segments=0")
    assert "points_lr must be above 0" in message(*svg, "--points_lr=0")
    assert "vectorise_steps must be at least 0" in message(*svg, "--vectorise_steps=-1")
    assert "broken.png" in message(*svg, image="broken")
    assert "no such image: gone.png" in message(*svg, "--image=gone.png")
    assert "a third" in message(*svg, "--sigma=9")
    assert "factor 5 does not" in message("restore_svg", "--operator=downsample", "--factor=5")
    assert "clip compares with the prompt: give one" in message(*svg, "--clip=x")
    assert "no such folder: ./gone (CLIP" in message(*svg, "--clip=./gone", "--prompt=a cat")
    flow = family_folder("sd35")
    assert f"{flow} is a flow prior" in message(*edit, prior=flow)
    classes = family_folder("dit")
    assert "no class 'a dog'" in message(*edit, prior=classes)


@pytest.mark.parametrize("config", ["demo-dreamsampler", "demo-restore-svg"])
def test_the_config_opens_with_a_command_that_takes_it(config):
    file = Path(__file__).parents[1] / "configs" / "image" / f"{config}.yaml"
    header = next(line for line in file.read_text().splitlines() if "--config" in line)
    _, _, _, command, *args = shlex.split(header)
    args[args.index("--config") + 1] = str(file)
    name = f"dreamsampler {command}"
    given = parser_of(name, load(name)).parse_args(args)
    assert given.sampler.steps == 50 and given.prior.class_path.endswith("DiffusersPrior")
