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


def draw_t_and_eps(
    z: Tensor, generator: torch.Generator, time_range: tuple[float, float] = TIME_RANGE
) -> tuple[Tensor, Tensor]:
    """t ~ U(time_range), (B,), and eps ~ N(0, I), as z; drawn on the generator's device."""
    low, high = time_range
    like = {"generator": generator, "device": generator.device, "dtype": z.dtype}
    t = low + (high - low) * torch.rand(len(z), **like)
    return t.to(z.device), torch.randn(z.shape, **like).to(z.device)


@torch.no_grad()
def sample_triplets(
    prior: Prior, z: Tensor, t: Tensor, eps: Tensor, null: Embedding
) -> Triplets:
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
