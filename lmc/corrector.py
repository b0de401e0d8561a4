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
from lmc.schedule import time_bin
from lmc.unet import (
    ENCODING,
    Norm,
    UNet,
    concatenate_condition,
    frequency_encoding,
)

Statistics = Literal["image", "channel", "none", "calibrated"]
RATIO_BINS = 20  # of t, over [0, 1]
RATIO_RATE = 0.02  # how much one sample moves the running mean of its bin


def normalise(
    b_hat: Tensor, z_hat: Tensor, statistics: Statistics = "image", ratio: Tensor | None = None
) -> Tensor:
    """b(z, t): `b_hat` with its standard deviation replaced by that of `z_hat`, its mean kept.

    b = σ(z_hat)/σ(b_hat) (b_hat − μ(b_hat)) + μ(b_hat)   [LMC, Eq. 10]

    A b̂ that predicts the mean of z_hat over eps has less contrast than one z_hat, which Eq. 10 then
    gives it: on the prior's own pictures b is bolder than the mean of z_hat, and b − z_hat takes
    contrast away at every frequency, a haze. 'calibrated' divides by what the ratio of the two
    deviations is there on average, so that it is only what a picture has beyond that.

    Args:
        b_hat: the network's output, float (B, C, H, W).
        z_hat: the prior's one-step estimate, the same shape.
        statistics: μ and σ per 'image' (over C, H, W: the paper's) or per 'channel' (over H, W);
            'none' leaves `b_hat` as it is; 'calibrated' is per image, with σ(z_hat) / `ratio`.
        ratio: of 'calibrated': the mean of σ(z_hat)/σ(b_hat) at each one's t, (B,).

    Returns:
        (B, C, H, W), float32 or wider. Where σ(b_hat) is 0 the result is its mean, not NaN.
    """
    b_hat = b_hat.to(torch.promote_types(z_hat.dtype, torch.float32))
    if statistics == "none":
        return b_hat
    dims = (2, 3) if statistics == "channel" else (1, 2, 3)
    mean = b_hat.mean(dims, keepdim=True)
    centred = b_hat - mean
    # The floor, a deviation of 1e-4, is far below any picture's and far above what rounding leaves
    # of a flat one; the clamp also keeps the root's gradient finite at 0.
    deviation = centred.square().mean(dims, keepdim=True).clamp_min(1e-8).sqrt()
    wanted = z_hat.std(dims, correction=0, keepdim=True)
    if statistics == "calibrated":
        assert ratio is not None
        wanted = wanted / ratio.view(-1, 1, 1, 1)
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
        if statistics == "calibrated":  # no part of other correctors, nor of older releases
            self.register_buffer("ratio", torch.ones(RATIO_BINS))
        self.ratio: Tensor

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
        return self.normalised(self(z, t), t, z_hat, statistics)

    def normalised(
        self, b_hat: Tensor, t: Tensor, z_hat: Tensor, statistics: Statistics | None = None
    ) -> Tensor:
        """`correct` of what `forward` gave.

        Raises:
            ValueError: 'calibrated', for which it was not trained.
        """
        chosen = statistics or self.statistics
        if chosen != "calibrated":
            return normalise(b_hat, z_hat, chosen)
        self.check_statistics(chosen)
        # Linear between the centres of the bins.
        last = len(self.ratio) - 1
        at = (t.to(self.ratio.dtype) * len(self.ratio) - 0.5).clamp(0, last)
        below = at.floor().long()
        above = (below + 1).clamp(max=last)
        return normalise(
            b_hat, z_hat, chosen, torch.lerp(self.ratio[below], self.ratio[above], at - below)
        )

    def check_statistics(self, statistics: Statistics | None) -> None:
        """Refuse what it cannot be applied with.

        Raises:
            ValueError: 'calibrated', for which it was not trained.
        """
        if statistics == "calibrated" and self.statistics != "calibrated":
            raise ValueError(
                "statistics 'calibrated' need a corrector that was trained with them, this one's "
                f"are {self.statistics!r}"
            )

    @torch.no_grad()
    def calibrate(self, b_hat: Tensor, t: Tensor, z_hat: Tensor, among: Tensor) -> None:
        """Move the running means of σ(z_hat)/σ(b_hat), by t, towards a batch's.

        Args:
            b_hat: of the prior's own pictures, (B, C, H, W).
            t: (B,).
            z_hat: as b_hat.
            among: which of them count, bool (B,).
        """
        dims = (1, 2, 3)
        ratios = z_hat.std(dims, correction=0) / b_hat.std(dims, correction=0).clamp_min(1e-4)
        weights, bins = among.to(ratios.dtype), time_bin(t, len(self.ratio))
        zeros = torch.zeros_like(self.ratio)
        counts = zeros.index_add(0, bins, weights.to(zeros))
        means = zeros.index_add(0, bins, (weights * ratios).to(zeros)) / counts.clamp_min(1)
        self.ratio.lerp_(means, 1 - (1 - RATIO_RATE) ** counts)

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
