"""DreamSampler [Kim, Park, Ye]: reverse diffusion as distillation steps on one image.

An algorithm over one image (or a batch, each its own), not a training loss: where a score
distillation loss draws t and eps anew, it walks down a grid of times and takes the noise along.
Editing and inverse problems are two ways to call it.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.transforms.functional import gaussian_blur, pad

from lmc.priors import Embedding, Prior
from lmc.renderers.adam import ScheduledAdam
from lmc.renderers.protocol import GroupedRenderer
from lmc.schedule import Coefficients, FlowSchedule, add_noise, ddim_step, guide
from lmc.shards.images import resize

Penalty = Callable[[Tensor], Tensor]
Track = Callable[[Sequence[float]], Iterable[float]]
CLEAN: Coefficients = (1.0, 0.0)  # alpha and sigma at t = 0


class Canvas(nn.Module):
    """z itself as the parameters: the pixels of a pixel prior, the latents of a latent one.

    Args:
        prior: decodes z.
        z: where it starts, float32 or float64 (B, C, H, W); copied.
    """

    def __init__(self, prior: Prior, z: Tensor) -> None:
        super().__init__()
        self.prior = prior
        self.z = nn.Parameter(z.detach().clone())

    def forward(self) -> Tensor:
        """The images, (B, 3, H, W) in about [-1, 1]."""
        return self.prior.decode(self.z)


@dataclass(frozen=True)
class DreamSampler:
    """The algorithm and its knobs.

    Down a grid of times t, with eps_hat at first N(0, I) or what `invert` gives:

        z_t = alpha_t z + sigma_t e,   e = (√(1 − ᾱ_t − η² β²) eps_hat + η β eps) / √(1 − ᾱ_t)
        eps_hat ← eps_base + ω (eps_target − eps_base) at z_t
        z_hat = (z_t − sigma_t eps_hat) / alpha_t
        ψ ← ψ − ζ [(z − z_hat) ∂z/∂ψ + λ ∇R(ψ)],   z_hat constant, `inner_steps` times

    (z − z_hat) is (sigma_t/alpha_t)(eps_hat − e). β is the deviation of DDPM's posterior of the
    step that arrives at t (none does at the first t, where β = 0), so that e has unit variance, and
    with ζ = 1, λ = 0 and z itself as ψ this is DDIM sampling with its η, at η = 1 DDPM's.

    Args:
        steps: times on the grid: start · i / steps for i = steps, …, 1. Each costs one denoiser
            evaluation an image at ω = 0 or 1, else two; `as_published` always two.
        start: the first and highest time, in (0, 1).
        guidance_scale: ω, from the base prompt to the target; 0 is the base prompt's prediction.
        eta: η in [0, 1], the share of fresh noise.
        step_size: ζ.
        inner_steps: gradient steps on ψ at each t, towards one z_hat.
        as_published: as the authors' code has it, whose pictures differ visibly: ᾱ_t ω in place of
            ω, so that the prompt counts little at high noise, and eps_base as the eps_hat that is
            taken along, so that only z_hat is guided.

    Raises:
        ValueError: a knob out of its range.
    """

    steps: int = 50
    start: float = 0.98
    guidance_scale: float = 1.0
    eta: float = 0.0
    step_size: float = 1.0
    inner_steps: int = 1
    as_published: bool = False

    def __post_init__(self) -> None:
        for name in ("steps", "inner_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0 < self.start < 1:
            raise ValueError(f"start must be a time between 0 and 1, got {self.start}")
        if self.guidance_scale < 0:
            raise ValueError(f"guidance_scale must not be negative, got {self.guidance_scale}")
        if not 0 <= self.eta <= 1:
            raise ValueError(f"eta must be in [0, 1], got {self.eta}")
        if self.step_size <= 0:
            raise ValueError(f"step_size must be positive, got {self.step_size}")

    @property
    def times(self) -> list[float]:
        """The grid, descending, without 0."""
        return [self.start * i / self.steps for i in range(self.steps, 0, -1)]

    def __call__(
        self,
        prior: Prior,
        renderer: nn.Module,
        base: Embedding,
        target: Embedding,
        generators: Sequence[torch.Generator],
        eps: Tensor | None = None,
        penalty: Penalty | None = None,
        track: Track = iter,
    ) -> None:
        """Change the parameters of `renderer` in place.

        Args:
            renderer: its forward() renders the images, (B, 3, H, W) in about [-1, 1], of any size;
                they are resized and encoded, except a `Canvas`'s, which has z. A `GroupedRenderer`
                is moved by Adam at its own rates, not by ζ; a step of its schedule is one of the
                grid, and what it draws anew is drawn by the first generator.
            base, target: embeddings, B rows each.
            generators: on the CPU, one an image, so that none depends on the others in the batch.
            eps: eps_hat to start with, as z; drawn if None.
            penalty: λ R, from the rendered images to (B,), differentiable.
            track: wraps the grid, to show progress.

        Raises:
            ValueError: a flow prior, or not as many generators as images; or the steps diverged.
        """
        check_prior(prior)
        grouped = renderer if isinstance(renderer, GroupedRenderer) else None
        adam = ScheduledAdam(partial(grouped.groups, steps=self.steps)) if grouped else None
        down = adam.down if adam else _descent(renderer, self.step_size)
        eps_hat, above = eps, None
        for step, time in enumerate(track(self.times)):
            with torch.no_grad():
                z = _latent(prior, renderer)
                t = torch.full((len(z),), time, dtype=z.dtype, device=z.device)
                alpha_t, sigma_t = prior.schedule.coefficients(t, z.dtype)
                if eps_hat is None:
                    eps_hat = _noise(z, generators)
                elif above is not None and self.eta > 0:
                    deviation = self.eta * posterior_deviation(above, alpha_t)
                    eps_hat = mix_noise(eps_hat, _noise(z, generators), sigma_t, deviation)
                z_t = add_noise(z, eps_hat, alpha_t, sigma_t)
                scale: Tensor | float = self.guidance_scale
                if self.as_published:
                    scale = scale * alpha_t.square()
                eps_base, guided = _guided(prior, z_t, t, base, target, scale)
                eps_hat = eps_base if self.as_published else guided
                z_hat = ddim_step(z_t, guided, (alpha_t, sigma_t), CLEAN)
                above = alpha_t
            for _ in range(self.inner_steps):
                with torch.enable_grad():
                    image = renderer() if penalty else None
                    objective = (_latent(prior, renderer, image) - z_hat).square().sum() / 2
                    if penalty and image is not None:
                        objective = objective + penalty(image).sum()
                down(objective, step)
            if not all(p.isfinite().all() for p in renderer.parameters()):
                raise ValueError(
                    f"the parameters are not finite any more at t = {time:.3f}: lower step_size, "
                    "the penalty's weight or guidance_scale"
                )
            if grouped and adam:
                adam.forget(grouped.after(step, self.steps, generators[0]))

    @torch.no_grad()
    def invert(self, prior: Prior, z: Tensor, base: Embedding, track: Track = iter) -> Tensor:
        """The eps_hat to start with so that the base prompt alone leads back to `z`.

        DDIM inversion up the grid, along the base prompt's prediction [DDIM, Sec. 4.3]; at t = 0
        the image is clean. It costs one evaluation an image and step; the more steps, the nearer
        does the base prompt come back to `z`.

        Args:
            z: clean images in the prior's space, (B, C, H, W).
            base: the embeddings of what `z` shows, or of '', B rows.
            track: see `__call__`.

        Returns:
            As z: z_T = alpha_T z + sigma_T eps_hat at T = `start`.

        Raises:
            ValueError: a flow prior.
        """
        check_prior(prior)
        z_t, here, below = z, CLEAN, 0.0
        for time in track(self.times[::-1]):
            t = torch.full((len(z),), below, dtype=z.dtype, device=z.device)
            eps, _ = prior.predict(z_t, t, base)
            there = prior.schedule.coefficients(torch.full_like(t, time), z.dtype)
            z_t = ddim_step(z_t, eps, here, there)
            here, below = there, time
        alpha_t, sigma_t = here
        return (z_t - alpha_t * z) / sigma_t


class Operator(Protocol):
    """What a measurement is of an image; linear or not, differentiable, without randomness."""

    def __call__(self, image: Tensor) -> Tensor:
        """A g(ψ): images (B, 3, H, W) to measurements (B, …)."""
        ...


@dataclass(frozen=True)
class Inpainting:
    """A keeps the known pixels and makes the others 0.

    Args:
        known: bool (H, W).
    """

    known: Tensor
    squared_norm = 1.0  # ‖A‖², here and below

    def __call__(self, image: Tensor) -> Tensor:
        return image * self.known.to(image.device)


@dataclass(frozen=True)
class AveragePooling:
    """A averages squares of factor x factor pixels.

    Args:
        factor: divides the image's height and width.

    Raises:
        ValueError: when called with an image that it does not divide.
    """

    factor: int

    @property
    def squared_norm(self) -> float:
        return self.factor**-2

    def __call__(self, image: Tensor) -> Tensor:
        check_factor(self.factor, *image.shape[-2:])
        return F.avg_pool2d(image, self.factor)


@dataclass(frozen=True)
class GaussianBlur:
    """A blurs with a gaussian cut off at three deviations, the image mirrored at its borders.

    The outermost pixels are mirrored too: A is then symmetric and its norm 1.

    Args:
        sigma: its deviation in pixels.
    """

    sigma: float
    squared_norm = 1.0

    def __call__(self, image: Tensor) -> Tensor:
        reach = math.ceil(3 * self.sigma)
        wide = pad(image, [reach], padding_mode="symmetric")
        wide = gaussian_blur(wide, [2 * reach + 1] * 2, [self.sigma] * 2)
        return wide[..., reach:-reach, reach:-reach]


@dataclass(frozen=True)
class DataConsistency:
    """The penalty λ R = λ ‖y − A g(ψ)‖², summed over what an image's measurement has.

    Args:
        operator: A.
        measurement: y, (B, …) or one of all, (1, …).
        weight: λ.
    """

    operator: Operator
    measurement: Tensor
    weight: float

    def __call__(self, image: Tensor) -> Tensor:
        """(B,), differentiable.

        Raises:
            ValueError: what the operator gives has another shape than the measurement.
        """
        measured = self.operator(image)
        if measured.shape[1:] != self.measurement.shape[1:]:
            raise ValueError(
                f"the measurement is {tuple(self.measurement.shape[1:])}, the operator gives "
                f"{tuple(measured.shape[1:])}"
            )
        return self.weight * (measured - self.measurement).square().flatten(1).sum(1)


def data_weight(gamma: float, lambda_dc: float, lambda_sds: float = 1.0) -> float:
    """λ = γ λ_DC / ((1 − γ) λ_SDS), of an objective (1 − γ) λ_SDS ½‖z − z_hat‖² + γ λ_DC R.

    Raises:
        ValueError: γ is outside [0, 1), or a λ is negative or λ_SDS 0.
    """
    if not 0 <= gamma < 1:
        raise ValueError(f"gamma must be in [0, 1), got {gamma}")
    if lambda_dc < 0 or lambda_sds <= 0:
        raise ValueError(f"lambda_dc ({lambda_dc}) and lambda_sds ({lambda_sds}) must be positive")
    return gamma * lambda_dc / ((1 - gamma) * lambda_sds)


def check_prior(prior: Prior) -> None:
    """Refuse a flow prior.

    Raises:
        ValueError: z_hat's noise is not a DDPM's.
    """
    if isinstance(prior.schedule, FlowSchedule):
        name = getattr(prior, "pretrained", type(prior).__name__)
        raise ValueError(
            f"DreamSampler needs a variance-preserving (DDPM) prior: {name} is a flow prior, for "
            "which DDPM's posterior is not defined"
        )


def check_sigma(sigma: float, side: int) -> None:
    """Refuse the deviation of a blur.

    Raises:
        ValueError: it is not positive, or reaches over an image of so many pixels a side.
    """
    if not sigma > 0 or math.ceil(3 * sigma) >= side:
        raise ValueError(
            f"sigma must be positive and a third of the image's {side} pixels at most, got {sigma}"
        )


def check_factor(factor: int, *sides: int) -> None:
    """Refuse a pooling factor.

    Raises:
        ValueError: it is below 1 or divides not all the sides.
    """
    if factor < 1 or any(side % factor for side in sides):
        size = " x ".join(map(str, sides))
        raise ValueError(f"the factor {factor} does not divide an image of {size} pixels")


def posterior_deviation(alpha_above: Tensor, alpha_t: Tensor) -> Tensor:
    """β = √((1 − ᾱ_t)/(1 − ᾱ_u)) √(1 − ᾱ_u/ᾱ_t), DDPM's deviation of z_t given z_u and z.

    Args:
        alpha_above, alpha_t: √ᾱ of the time u > t above and of t, (B, 1, 1, 1).
    """
    bar_u, bar_t = alpha_above.square(), alpha_t.square()
    return ((1 - bar_t) / (1 - bar_u) * (1 - bar_u / bar_t)).sqrt()


def mix_noise(eps_hat: Tensor, eps: Tensor, sigma_t: Tensor, deviation: Tensor) -> Tensor:
    """e = (√(σ_t² − δ²) eps_hat + δ eps) / σ_t with δ = η β: unit variance if both have it."""
    kept = (sigma_t.square() - deviation.square()).clamp(min=0).sqrt()
    return (kept * eps_hat + deviation * eps) / sigma_t


def _descent(renderer: nn.Module, step_size: float) -> Callable[[Tensor, int], None]:
    """How a renderer goes down an objective by ζ, at any step."""
    sgd = torch.optim.SGD([p for p in renderer.parameters() if p.requires_grad], lr=step_size)

    def down(objective: Tensor, step: int) -> None:
        sgd.zero_grad()
        objective.backward()
        sgd.step()

    return down


def _latent(prior: Prior, renderer: nn.Module, image: Tensor | None = None) -> Tensor:
    """z of what the renderer gives, or gave, with gradient; a `Canvas` need not be decoded."""
    if isinstance(renderer, Canvas):
        return renderer.z
    return prior.encode(resize(renderer() if image is None else image, prior.image_size))


def _noise(like: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
    if len(generators) != len(like):
        raise ValueError(f"{len(like)} images need as many generators, got {len(generators)}")
    drawn = [torch.randn(like.shape[1:], generator=g, dtype=like.dtype) for g in generators]
    return torch.stack(drawn).to(like.device)


def _guided(
    prior: Prior,
    z_t: Tensor,
    t: Tensor,
    base: Embedding,
    target: Embedding,
    scale: Tensor | float,
) -> tuple[Tensor, Tensor]:
    """eps_base, and eps_base + scale (eps_target − eps_base), in one call.

    At a scale 0 or 1 that is a number both are the one that is needed, of one evaluation.
    """
    if isinstance(scale, int | float) and scale in (0, 1):
        eps, _ = prior.predict(z_t, t, target if scale else base)
        return eps, eps
    eps, _ = prior.predict(z_t.repeat(2, 1, 1, 1), t.repeat(2), Embedding.cat([base, target]))
    eps_base, eps_target = eps.chunk(2)
    return eps_base, guide(eps_base, eps_target, scale)
