"""Triplets (z, ẑ_t, t): what the prior's one-step denoising makes of clean images [LMC, Sec. 4]."""

from dataclasses import dataclass

import torch
from torch import Tensor

from lmc.priors import Embedding, Prior
from lmc.schedule import add_noise

TIME_RANGE = (0.02, 0.98)  # t ~ U(0.02, 0.98) in both stages [LMC, App. A]


@dataclass(frozen=True)
class Triplets:
    """A batch of triplets.

    Attributes:
        z: clean images in the prior's space, float32 (B, C, H, W).
        z_hat: the prior's unconditional one-step estimates of them, the same shape, unclipped.
        t: times in (0, 1), float32 (B,).
    """

    z: Tensor
    z_hat: Tensor
    t: Tensor


def check_time_range(time_range: tuple[float, float]) -> tuple[float, float]:
    """`time_range` itself.

    Raises:
        ValueError: it is no interval within [0, 1].
    """
    low, high = time_range
    if not 0 <= low < high <= 1:
        raise ValueError(f"time_range must be an interval within [0, 1], got {list(time_range)}")
    return low, high


def draw_t_and_eps(
    z: Tensor, generator: torch.Generator, time_range: tuple[float, float] = TIME_RANGE
) -> tuple[Tensor, Tensor]:
    """t ~ U(time_range), (B,), and eps ~ N(0, I), as z; drawn on the generator's device."""
    low, high = check_time_range(time_range)
    where = generator.device
    t = torch.rand(len(z), generator=generator, device=where, dtype=z.dtype)
    eps = torch.randn(z.shape, generator=generator, device=where, dtype=z.dtype)
    return (low + (high - low) * t).to(z.device), eps.to(z.device)


@torch.no_grad()
def sample_triplets(prior: Prior, z: Tensor, t: Tensor, eps: Tensor, null: Embedding) -> Triplets:
    """One triplet an image: a single denoiser evaluation each, without a prompt.

    Args:
        prior: loaded.
        z: clean images in its space, (B, C, H, W).
        t: times in (0, 1), (B,).
        eps: noise, as z.
        null: the unconditional embedding, B rows.
    """
    z_t = add_noise(z, eps, *prior.schedule.coefficients(t, z.dtype))
    _, z_hat = prior.predict(z_t, t, null)
    return Triplets(z, z_hat, t)
