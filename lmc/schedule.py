"""Noise schedules, how t is drawn, the four kinds of prediction, and guidance. No networks.

Everything here is a pure function of tensors and keeps their dtype, so that float64 in gives
float64 out. Image tensors are (B, C, H, W); `alpha_t` and `sigma_t` are (B, 1, 1, 1).
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

PredictionType = Literal["epsilon", "v_prediction", "sample", "flow"]
Coefficients = tuple[Tensor | float, Tensor | float]
TIME_RANGE = (0.02, 0.98)  # t ~ U(0.02, 0.98) in both stages [LMC, App. A]


@dataclass(frozen=True)
class Schedule:
    """A discrete variance-preserving (DDPM) noise schedule, read at continuous times.

    Attributes:
        alphas_cumprod: ᾱ on the prior's own grid, float (T,), decreasing, in (0, 1].
    """

    alphas_cumprod: Tensor

    def timestep(self, t: Tensor) -> Tensor:
        """The grid index the denoiser is asked at: round(t T), int64 (B,), in [0, T - 1].

        Args:
            t: times in (0, 1), float (B,).
        """
        steps = len(self.alphas_cumprod)
        return (t * steps).round().long().clamp(0, steps - 1)

    def coefficients(self, t: Tensor, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
        """(alpha_t, sigma_t) = (√ᾱ_t, √(1 − ᾱ_t)) at the grid index of `t`, each (B, 1, 1, 1).

        Args:
            t: times in (0, 1), float (B,).
            dtype: of the result; that of `t` when None.
        """
        # In float64 first: near t = 0, 1 − ᾱ is a difference of nearly equal numbers.
        alpha_bar = self.alphas_cumprod.to(t.device).double()[self.timestep(t)].view(-1, 1, 1, 1)
        dtype = dtype or t.dtype
        return alpha_bar.sqrt().to(dtype), (1 - alpha_bar).sqrt().to(dtype)

    def to(self, device: torch.device | str) -> "Schedule":
        """The same on `device`."""
        return Schedule(self.alphas_cumprod.to(device))


@dataclass(frozen=True)
class FlowSchedule:
    """The straight path of flow matching, z_t = (1 − t) z + t eps: a time *is* the noise's sigma.

    A pipeline's `shift` moves only the sigmas that its sampler stops at, towards the noisy end; the
    network knows sigmas. It therefore plays no part here: t = 0.5 is half noise whatever the shift.

    Attributes:
        steps: what the denoiser calls sigma = 1 (diffusers' num_train_timesteps).
    """

    steps: int = 1000

    def timestep(self, t: Tensor) -> Tensor:
        """What the denoiser is asked at: t · steps, not rounded; (B,), of t's dtype."""
        return t * self.steps

    def coefficients(self, t: Tensor, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
        """(alpha_t, sigma_t) = (1 − t, t), each (B, 1, 1, 1).

        Args:
            t: times in (0, 1), float (B,).
            dtype: of the result; that of `t` when None.
        """
        sigma_t = t.double().view(-1, 1, 1, 1)
        dtype = dtype or t.dtype
        return (1 - sigma_t).to(dtype), sigma_t.to(dtype)

    def to(self, device: torch.device | str) -> "FlowSchedule":
        """The same: there is nothing to move."""
        return self


def check_time_range(time_range: tuple[float, float]) -> tuple[float, float]:
    """`time_range` itself.

    Raises:
        ValueError: it is no interval within [0, 1].
    """
    low, high = time_range
    if not 0 <= low < high <= 1:
        raise ValueError(f"time_range must be an interval within [0, 1], got {list(time_range)}")
    return low, high


def time_bin(t: Tensor, bins: int) -> Tensor:
    """Which of `bins` equal parts of [0, 1] each of t (B,) is in: int64 (B,)."""
    return (t * bins).long().clamp(0, bins - 1)


class TimeSchedule(ABC):
    """How a run draws t.

    Args:
        time_range: t stays in it.

    Attributes:
        shared: one t for the whole batch.

    Raises:
        ValueError: it is no interval within [0, 1].
    """

    shared: bool = False

    def __init__(self, time_range: tuple[float, float] = TIME_RANGE) -> None:
        self.time_range = check_time_range(time_range)

    @abstractmethod
    def draw(
        self, count: int, progress: float, generator: torch.Generator, dtype: torch.dtype
    ) -> Tensor:
        """Times of `count` samples, (count,), on the generator's device.

        Args:
            progress: the share of the run that is done, in [0, 1].
        """


class UniformTime(TimeSchedule):
    """t ~ U(time_range).

    Args:
        time_range: t stays in it.
        shared: one t for the whole batch, in place of one for each sample.

    Raises:
        ValueError: it is no interval within [0, 1].
    """

    def __init__(self, time_range: tuple[float, float] = TIME_RANGE, shared: bool = False) -> None:
        super().__init__(time_range)
        self.shared = shared

    def draw(
        self, count: int, progress: float, generator: torch.Generator, dtype: torch.dtype
    ) -> Tensor:
        low, high = self.time_range
        drawn = 1 if self.shared else count
        t = torch.rand(drawn, generator=generator, device=generator.device, dtype=dtype)
        return (low + (high - low) * t).repeat(count // drawn)


class FallingTime(TimeSchedule):
    """t = 1 − progress, clipped to the range: one t for the whole batch, linearly falling.

    Args:
        time_range: t stays in it.
        jitter: t is raised by U(0, jitter), the small tau of SDI.

    Raises:
        ValueError: no interval, or a negative jitter.
    """

    shared = True

    def __init__(self, time_range: tuple[float, float] = TIME_RANGE, jitter: float = 0.0) -> None:
        super().__init__(time_range)
        if jitter < 0:
            raise ValueError(f"jitter must not be negative, got {jitter}")
        self.jitter = jitter

    def draw(
        self, count: int, progress: float, generator: torch.Generator, dtype: torch.dtype
    ) -> Tensor:
        tau = torch.rand(1, generator=generator, device=generator.device, dtype=dtype)
        return (1 - progress + self.jitter * tau).clamp(*self.time_range).repeat(count)


def add_noise(z: Tensor, eps: Tensor, alpha_t: Tensor, sigma_t: Tensor) -> Tensor:
    """z_t = alpha_t z + sigma_t eps."""
    return alpha_t * z + sigma_t * eps


def ddim_step(z_s: Tensor, eps: Tensor, here: Coefficients, there: Coefficients) -> Tensor:
    """The deterministic DDIM step along `eps` from one time to another, up or down [DDIM, Eq. 12].

    z_there = alpha_there (z_s − sigma_here eps) / alpha_here + sigma_there eps

    Args:
        z_s, eps: (B, C, H, W).
        here, there: (alpha, sigma) of the two times, each (B, 1, 1, 1) or a number; (1, 0) is a
            clean image.
    """
    (alpha, sigma), (alpha_there, sigma_there) = here, there
    return alpha_there * (z_s - sigma * eps) / alpha + sigma_there * eps


def to_eps_and_z_hat(
    raw: Tensor, z_t: Tensor, alpha_t: Tensor, sigma_t: Tensor, prediction_type: PredictionType
) -> tuple[Tensor, Tensor]:
    """Read a denoiser's raw output as (eps, z_hat), with z_t = alpha_t z_hat + sigma_t eps.

    v = alpha_t eps − sigma_t z (variance-preserving priors); flow velocity = eps − z.

    Args:
        raw: the network's output, (B, C, H, W).
        z_t: the noisy input it was computed from, the same shape.

    Raises:
        ValueError: for an unknown `prediction_type`.
    """
    if prediction_type == "epsilon":
        return raw, (z_t - sigma_t * raw) / alpha_t
    if prediction_type == "v_prediction":
        return alpha_t * raw + sigma_t * z_t, alpha_t * z_t - sigma_t * raw
    if prediction_type == "sample":
        return (z_t - alpha_t * raw) / sigma_t, raw
    if prediction_type == "flow":
        return z_t + alpha_t * raw, z_t - sigma_t * raw
    raise ValueError(_unknown(prediction_type))


def from_eps_and_z_hat(
    eps: Tensor, z_hat: Tensor, alpha_t: Tensor, sigma_t: Tensor, prediction_type: PredictionType
) -> Tensor:
    """The raw output that `to_eps_and_z_hat` reads as (eps, z_hat): its inverse.

    Raises:
        ValueError: for an unknown `prediction_type`.
    """
    if prediction_type == "epsilon":
        return eps
    if prediction_type == "v_prediction":
        return alpha_t * eps - sigma_t * z_hat
    if prediction_type == "sample":
        return z_hat
    if prediction_type == "flow":
        return eps - z_hat
    raise ValueError(_unknown(prediction_type))


def guide(eps_uncond: Tensor, eps_cond: Tensor, guidance_scale: Tensor | float) -> Tensor:
    """Classifier-free guidance: eps_uncond + ω (eps_cond − eps_uncond); ω = 1 is eps_cond."""
    return eps_uncond + guidance_scale * (eps_cond - eps_uncond)


def _unknown(prediction_type: str) -> str:
    known = ", ".join(get_args(PredictionType))
    return f"unknown prediction_type {prediction_type!r}; known are {known}"
