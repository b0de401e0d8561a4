"""The corrector b̂_ψ and the normalised space it is trained and applied in. Never calls a prior.

`Corrector` is the paper's U-Net. `lmc.filter` has one that is estimated in closed form from a few
thousand triplets, and one that is both; `IdentityCorrector` corrects nothing. All are used alike.
"""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from lmc.hub import HubNetwork
from lmc.priors import check_identity, say_unchecked
from lmc.unet import (
    ENCODING,
    Norm,
    UNet,
    concatenate_condition,
    frequency_encoding,
)

Statistics = Literal["image", "channel", "none"]


def normalise(b_hat: Tensor, z_hat: Tensor, statistics: Statistics = "image") -> Tensor:
    """b(z, t): `b_hat` with its standard deviation replaced by that of `z_hat`, its mean kept.

    b = σ(z_hat)/σ(b_hat) (b_hat − μ(b_hat)) + μ(b_hat)   [LMC, Eq. 10]

    Args:
        b_hat: the network's output, float (B, C, H, W).
        z_hat: the prior's one-step estimate, the same shape.
        statistics: μ and σ per 'image' (over C, H, W: the paper's) or per 'channel' (over H, W);
            'none' leaves `b_hat` as it is.

    Returns:
        (B, C, H, W), float32 or wider. Where σ(b_hat) is 0 the result is its mean, not NaN.
    """
    b_hat = b_hat.to(torch.promote_types(z_hat.dtype, torch.float32))
    if statistics == "none":
        return b_hat
    dims = (1, 2, 3) if statistics == "image" else (2, 3)
    mean = b_hat.mean(dims, keepdim=True)
    centred = b_hat - mean
    # The floor, a deviation of 1e-4, is far below any picture's and far above what rounding leaves
    # of a flat one; the clamp also keeps the root's gradient finite at 0.
    deviation = centred.square().mean(dims, keepdim=True).clamp_min(1e-8).sqrt()
    wanted = z_hat.std(dims, correction=0, keepdim=True)
    return wanted / deviation * centred + mean


def corrector_loss(b: Tensor, z_hat: Tensor) -> Tensor:
    """L_k = ‖z_hat − b(z, t)‖², mean over pixels, per image: (B,)  [LMC, Eq. 10]."""
    return (z_hat - b).square().mean((1, 2, 3))


class BiasCorrector(nn.Module, ABC):
    """What every corrector is: b̂(z, t), its statistics, and the one prior it is valid for.

    Args:
        statistics: see `normalise`.
        prior: the identity of the prior it was made for (`Prior.identity`), kept in its config.

    Raises:
        ValueError: unknown statistics.
    """

    def __init__(self, statistics: Statistics, prior: Mapping[str, Any] | None) -> None:
        super().__init__()
        if statistics not in get_args(Statistics):
            known = ", ".join(get_args(Statistics))
            raise ValueError(f"unknown statistics {statistics!r}; known are {known}")
        self.statistics: Statistics = statistics
        self.prior = dict(prior or {})

    @abstractmethod
    def forward(self, z: Tensor, t: Tensor) -> Tensor:
        """b̂(z, t), not normalised.

        Args:
            z: clean images in the prior's space, float (B, C, H, W).
            t: times in (0, 1), float (B,).
        """

    def correct(
        self, z: Tensor, t: Tensor, z_hat: Tensor, statistics: Statistics | None = None
    ) -> Tensor:
        """b(z, t) in the normalised space of `z_hat` [LMC, Eq. 10]; shapes as in `forward`.

        Args:
            statistics: in place of the corrector's own.
        """
        return normalise(self(z, t), z_hat, statistics or self.statistics)

    def digest(self) -> str:
        """SHA-256 of what it corrects by: its kind, statistics and weights."""
        digest = hashlib.sha256(f"{type(self).__name__} {self.statistics}".encode())
        for name, value in sorted(self.state_dict().items()):
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            digest.update(value.cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    def check_prior(self, identity: Mapping[str, Any]) -> None:
        """Refuse any prior but the one this corrector was made for.

        Args:
            identity: `Prior.identity` of the prior about to be used.

        Warns:
            Of what could not be compared; see `lmc.priors.check_identity`.

        Raises:
            ValueError: it is another prior; names what differs.
        """
        try:
            unchecked = check_identity(self.prior, identity)
        except ValueError as error:
            raise ValueError(
                f"a corrector is valid for the prior it was trained on only.\n{error}\n"
                "Train one for this prior: python train_bias.py fit --config …"
            ) from error
        say_unchecked("the corrector", unchecked)


class Corrector(BiasCorrector, HubNetwork, tags=["score-distillation"]):
    """b̂_ψ: predicts what the prior's one-step denoising makes of a clean image [LMC, Sec. 4].

    With the defaults, the paper's nine-level U-Net: 7,849,603 parameters.

    Args:
        channels: of z: 3 for a pixel prior, the latent channels for a latent one.
        widths: filters per level; the last is the middle level.
        norm: see `UNet`.
        bounded: end in tanh; for pixel priors only, a latent has no bound.
        statistics, prior: see `BiasCorrector`.

    Raises:
        ValueError: unknown statistics, or see `UNet`.
    """

    def __init__(
        self,
        channels: int = 3,
        widths: Sequence[int] = (32, 64, 128, 256, 512),
        norm: Norm = "none",
        bounded: bool = True,
        statistics: Statistics = "image",
        prior: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(statistics, prior)
        self.unet = UNet(channels + ENCODING, channels, widths, norm, bounded)

    def forward(self, z: Tensor, t: Tensor) -> Tensor:
        return self.unet(concatenate_condition(z, frequency_encoding(t)))


class IdentityCorrector(BiasCorrector):
    """b̂ = z, for comparison: no blur is corrected but what Eq. 10 rescales. Of every prior."""

    def __init__(self, statistics: Statistics = "image") -> None:
        super().__init__(statistics, None)

    def forward(self, z: Tensor, t: Tensor) -> Tensor:
        return z

    def check_prior(self, identity: Mapping[str, Any]) -> None:
        """Every prior is right."""
