"""A prior of your own, by the protocol `lmc.Prior`: no base class, and nothing is registered.

    python examples/own_prior.py red

In a training it is `--model.prior own_prior.Colours` (with PYTHONPATH=examples). This one has no
weights: its pictures are of one colour and noise, whose best denoiser is a line of algebra. A model
of another library goes into `predict`.
"""

import sys
from collections.abc import Sequence

import torch
from torch import Tensor

from lmc import SDS
from lmc.priors import Embedding
from lmc.schedule import Schedule

COLOURS = {"": (0.0, 0.0, 0.0), "red": (0.8, -0.8, -0.8), "blue": (-0.8, -0.8, 0.8)}


class Colours:
    """Pictures z = c + s n of a colour c and white noise n, so that in closed form

        E[z | z_t] = c + alpha_t s² / (alpha_t² s² + sigma_t²) · (z_t - alpha_t c).

    Args:
        image_size: side in pixels.
        spread: s.
    """

    channels, latent = 3, False

    def __init__(self, image_size: int = 16, spread: float = 0.1) -> None:
        self.image_size, self.spread = image_size, spread
        steps = torch.linspace(0, 1, 1000, dtype=torch.float64)
        self.schedule = Schedule((steps * torch.pi / 2).cos().square().clamp(1e-4, 0.9999))
        # What tells it from other priors: a corrector that is trained with it will ask for this.
        self.identity = {
            "pretrained": "colours",
            "digest": f"colours {spread}",
            "prediction_type": "sample",
            "image_size": image_size,
            "channels": 3,
        }

    def to(self, device: torch.device | str) -> None:
        """There is nothing to load or move."""

    def encode(self, image: Tensor) -> Tensor:
        return image

    def decode(self, z: Tensor) -> Tensor:
        return z

    def embed(self, prompts: Sequence[str]) -> Embedding:
        return Embedding({"colour": torch.tensor([COLOURS[prompt] for prompt in prompts])})

    @torch.no_grad()
    def predict(self, z_t: Tensor, t: Tensor, embedding: Embedding) -> tuple[Tensor, Tensor]:
        alpha_t, sigma_t = self.schedule.coefficients(t, z_t.dtype)
        colour = embedding.tensors["colour"].to(z_t)[:, :, None, None]
        variance = self.spread**2
        gain = alpha_t * variance / (alpha_t**2 * variance + sigma_t**2)
        z_hat = colour + gain * (z_t - alpha_t * colour)
        return (z_t - alpha_t * z_hat) / sigma_t, z_hat


if __name__ == "__main__":
    from own_loop import optimise

    image = optimise(Colours(), SDS(guidance_scale=1.0), sys.argv[1], steps=200)
    print(f"{sys.argv[1]}: {[round(x, 2) for x in image.mean((0, 2, 3)).tolist()]}")
