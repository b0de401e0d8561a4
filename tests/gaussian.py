"""A prior whose every prediction has a closed form: stationary gaussian images.

z ~ N(mu_y, Sigma), Sigma diagonal in the orthonormal Fourier basis with variance S_k, the same for
every channel. z_t = alpha_t z + sigma_t eps is then gaussian too, frequency by frequency, and

    E[z | z_t] = mu + alpha_t S_k / (alpha_t² S_k + sigma_t²) · (z_t − alpha_t mu).
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lmc.priors import Embedding
from lmc.schedule import Schedule


def cosine_alphas_cumprod(steps: int = 1000) -> Tensor:
    """ᾱ of the cosine schedule, betas capped at 0.999 [Nichol & Dhariwal, Eq. 17]; float64."""
    grid = torch.arange(steps + 1, dtype=torch.float64) / steps
    f = ((grid + 0.008) / 1.008 * torch.pi / 2).cos().square()
    return (1 - (1 - f[1:] / f[:-1]).clamp(max=0.999)).cumprod(0)


def power_spectrum(size: int, exponent: float = 2.0, strength: float = 2.0) -> Tensor:
    """S_k = strength / (1 + |k|^exponent), float64 (size, size), |k| in cycles per picture."""
    k = torch.fft.fftfreq(size, 1 / size, dtype=torch.float64)
    radius = (k[:, None].square() + k.square()).sqrt()
    return strength / (1 + radius**exponent)


class GaussianPrior:
    """The Prior protocol over class-wise gaussian images, exact in the precision of z_t.

    Args:
        means: mu_y by prompt; '' is the unconditional one. Each float64 (C, H, W).
        spectrum: S_k, float64 (H, W).

    Attributes:
        evaluations: images passed to `predict` so far.
        calls: calls of `predict` so far.
    """

    def __init__(self, means: Mapping[str, Tensor], spectrum: Tensor) -> None:
        self.means, self.spectrum = dict(means), spectrum
        self.channels, self.image_size, _ = self.means[""].shape
        self.latent, self.schedule = False, Schedule(cosine_alphas_cumprod())
        self.identity: dict[str, Any] = {"pretrained": "gaussian", "digest": "gaussian-0"}
        self.evaluations = self.calls = 0

    def to(self, device: torch.device | str) -> None:
        pass

    def encode(self, image: Tensor) -> Tensor:
        return image

    def decode(self, z: Tensor) -> Tensor:
        return z

    def embed(self, prompts: Sequence[str]) -> Embedding:
        return Embedding({"mean": torch.stack([self.means[prompt] for prompt in prompts])})

    def predict(self, z_t: Tensor, t: Tensor, embedding: Embedding) -> tuple[Tensor, Tensor]:
        # Differentiable on purpose: it is the losses that must let no gradient through.
        self.calls += 1
        self.evaluations += len(z_t)
        alpha_t, sigma_t = self.schedule.coefficients(t, z_t.dtype)
        mean = embedding.tensors["mean"].to(z_t.dtype)
        spectrum = self.spectrum.to(z_t.dtype)
        gain = alpha_t * spectrum / (alpha_t.square() * spectrum + sigma_t.square())
        centred = torch.fft.fft2(z_t - alpha_t * mean, norm="ortho")
        z_hat = mean + torch.fft.ifft2(gain * centred, norm="ortho").real
        return (z_t - alpha_t * z_hat) / sigma_t, z_hat

    def add_lora(self, rank: int) -> dict[str, torch.nn.Parameter]:
        """A LoRA of one number a channel: eps_lora = eps + w z_t."""
        self.lora = torch.nn.Parameter(torch.zeros(self.channels, 1, 1, dtype=torch.float64))
        return {"w": self.lora}

    def predict_lora(self, z_t: Tensor, t: Tensor, embedding: Embedding) -> tuple[Tensor, Tensor]:
        eps, _ = self.predict(z_t, t, embedding)
        alpha_t, sigma_t = self.schedule.coefficients(t, z_t.dtype)
        eps = eps.detach() + self.lora * z_t
        return eps, (z_t - sigma_t * eps) / alpha_t

    def sample(self, count: int, prompt: str, generator: torch.Generator) -> Tensor:
        """Draw z ~ N(mu_y, Sigma), float64 (count, C, H, W)."""
        shape = (count, self.channels, self.image_size, self.image_size)
        white = torch.randn(shape, generator=generator, dtype=torch.float64)
        colour = self.spectrum.sqrt() * torch.fft.fft2(white, norm="ortho")
        return self.means[prompt] + torch.fft.ifft2(colour, norm="ortho").real


def small_prior(size: int = 8, channels: int = 3, seed: int = 0) -> GaussianPrior:
    """Four prompts, '' with mean zero, the others with random means."""
    generator = torch.Generator().manual_seed(seed)
    shape = (channels, size, size)
    means = {"": torch.zeros(shape, dtype=torch.float64)}
    for prompt in ("cat", "dog", "bear"):
        means[prompt] = 0.5 * torch.randn(shape, generator=generator, dtype=torch.float64)
    return GaussianPrior(means, power_spectrum(size))
