"""Pictures themselves as what score distillation optimises: their pixels, or a prior's latents."""

import torch
from torch import Tensor, nn

from lmc.priors import Prior


class Pixels(nn.Module):
    """The pixels themselves, put back into [-1, 1] after every step.

    The paper says nothing of bounds. Without one a corrector, which has seen pictures only, can be
    led ever further away from them.

    Args:
        image: what to begin with, (B, 3, H, W) in [-1, 1]; see also `grey`.
    """

    def __init__(self, image: Tensor) -> None:
        super().__init__()
        self.image = nn.Parameter(image.detach().clone())

    def forward(self) -> Tensor:
        """The pixels, (B, 3, H, W) in [-1, 1]."""
        with torch.no_grad():
            self.image.clamp_(-1, 1)
        return self.image


class Latents(nn.Module):
    """z of a latent prior; the loss sees z itself, and the VAE decodes the result alone.

    The loss sees whole images at every step, whatever `Synthesis.whole_steps` says.

    Args:
        prior: whose z it is.
        image: what to begin with, (B, 3, S, S) in [-1, 1], S the prior's image_size; encoded when
            the prior is loaded.

    Raises:
        ValueError: an image of another size.
    """

    def __init__(self, prior: Prior, image: Tensor) -> None:
        super().__init__()
        if image.shape[-2:] != (prior.image_size, prior.image_size):
            raise ValueError(
                f"latents are of the prior's images of {prior.image_size} x {prior.image_size} "
                f"pixels, not of {image.shape[-1]} x {image.shape[-2]}"
            )
        self.prior = prior
        self.register_buffer("image", image)
        self.image: Tensor
        self.z = nn.Parameter(torch.empty(0))

    @torch.no_grad()
    def encode(self) -> None:
        """Begin: z of the image. `optimize` calls it once the prior is loaded."""
        self.z.data = self.prior.encode(self.image)

    def forward(self) -> Tensor:
        """The decoded image (B, 3, S, S), about [-1, 1]."""
        return self.prior.decode(self.z)


def grey(count: int, size: int) -> Tensor:
    """50 % grey, float32 (count, 3, size, size): what synthesis begins with."""
    return torch.zeros(count, 3, size, size)
