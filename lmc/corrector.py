"""The corrector b̂_ψ and the normalised space it is trained and applied in. Never calls a prior.

`Corrector` is the paper's U-Net. `FilterCorrector` is estimated in closed form from a few thousand
triplets, and `IdentityCorrector` corrects nothing; all three are used alike.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from huggingface_hub.errors import HFValidationError
from torch import Tensor, nn

from lmc.schedule import TIME_RANGE
from lmc.triplets import Triplets
from lmc.unet import ENCODING, HubNetwork, Norm, UNet, concatenate_condition, frequency_encoding

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

    def check_prior(self, identity: Mapping[str, Any]) -> None:
        """Refuse any prior but the one this corrector was made for.

        Args:
            identity: `Prior.identity` of the prior about to be used.

        Raises:
            ValueError: it is another prior: other weights of the denoiser, or read otherwise.
        """
        if any(self.prior.get(key) != identity.get(key) for key in ("digest", "prediction_type")):
            mine, other = (
                ", ".join(f"{key} {value}" for key, value in one.items()) or "none recorded"
                for one in (self.prior, identity)
            )
            raise ValueError(
                "a corrector is valid for the prior it was trained on only.\n"
                f"  trained on: {mine}\n  used with:  {other}\n"
                "Train one for this prior: python train_bias.py fit --config …"
            )


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


class FilterCorrector(BiasCorrector, HubNetwork, tags=["score-distillation"]):
    """The closed-form corrector: the least-squares linear filter of z, by frequency and time.

    b̂(z, t) = o_t + F⁻¹[ G_t F[z] ],  G_t = E[F[z_hat] F[z]*] / E|F[z]|²

    per frequency and channel, of z and z_hat less their mean images m and m̂_t; the offset is
    o_t = m̂_t − F⁻¹[ G_t F[m] ]. Both are estimated in bins of t (`estimate_filter`) and
    interpolated linearly between the bins' centres. No equation of the paper: among all b̂ that
    filter and add an image it is the one with the least ‖z_hat − b̂‖². Without the offset it would
    stretch, at high noise levels, what differs from mid-grey, where z_hat is drawn to the mean.

    Args:
        channels, size: of z: (channels, size, size).
        bins: of t.
        time_range: what the bins divide evenly.
        statistics, prior: see `BiasCorrector`.
    """

    def __init__(
        self,
        channels: int,
        size: int,
        bins: int = 16,
        time_range: tuple[float, float] = TIME_RANGE,
        statistics: Statistics = "image",
        prior: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(statistics, prior)
        if bins < 1:
            raise ValueError(f"bins must be at least 1, got {bins}")
        low, high = time_range
        self.time_range = (low, high)
        # Real and imaginary part last: a release has no complex numbers.
        self.register_buffer("gain", torch.zeros(bins, channels, size, size // 2 + 1, 2))
        self.register_buffer("offset", torch.zeros(bins, channels, size, size))
        self.gain: Tensor
        self.offset: Tensor

    def bin(self, t: Tensor) -> Tensor:
        """The bin of t as a real number: k + 0.5 at the centre of bin k; (B,)."""
        low, high = self.time_range
        return (t - low) / (high - low) * len(self.gain)

    def forward(self, z: Tensor, t: Tensor) -> Tensor:
        """See `BiasCorrector.forward`.

        Raises:
            ValueError: z is not (B, channels, size, size).
        """
        _, channels, size, _, _ = self.gain.shape
        if z.shape[1:] != (channels, size, size):
            raise ValueError(
                f"z is {tuple(z.shape[1:])}, the filter was estimated at {(channels, size, size)}"
            )
        with torch.autocast(z.device.type, enabled=False):
            wide = z.to(torch.promote_types(z.dtype, torch.float32))
            gain = torch.view_as_complex(self._at(t, self.gain.to(wide.dtype)))
            filtered = torch.fft.irfft2(gain * torch.fft.rfft2(wide), s=(size, size))
            return filtered + self._at(t, self.offset.to(wide.dtype))

    def _at(self, t: Tensor, by_bin: Tensor) -> Tensor:
        """Values (bins, …) interpolated between the centres of the bins: (B, …)."""
        last = len(by_bin) - 1
        at = (self.bin(t.to(by_bin.dtype)) - 0.5).clamp(0, last)
        below = at.floor().long()
        share = (at - below).view(-1, *[1] * (by_bin.ndim - 1))
        return torch.lerp(by_bin[below], by_bin[(below + 1).clamp(max=last)], share)


@torch.no_grad()
def estimate_filter(
    triplets: Iterable[Triplets],
    identity: Mapping[str, Any],
    bins: int = 16,
    time_range: tuple[float, float] = TIME_RANGE,
    statistics: Statistics = "image",
) -> FilterCorrector:
    """A `FilterCorrector` from triplets of a prior, in one pass over them.

    Args:
        triplets: batches; a few hundred triplets a bin are enough for 32 x 32 pixels.
        identity: `Prior.identity` of their prior.
        bins, time_range, statistics: see there.

    Raises:
        ValueError: no triplets, or a bin of t with fewer than two.
    """
    corrector: FilterCorrector | None = None
    for batch in triplets:
        _, channels, size, _ = batch.z.shape
        if corrector is None:
            corrector = FilterCorrector(channels, size, bins, time_range, statistics, identity)
            cross = torch.zeros(bins, *corrector.gain.shape[1:4], dtype=torch.complex128)
            sum_z, sum_z_hat = torch.zeros_like(cross), torch.zeros_like(cross)
            power, count = torch.zeros_like(cross.real), torch.zeros(bins).double()
        z, z_hat = (torch.fft.rfft2(x.cpu().double()) for x in (batch.z, batch.z_hat))
        index = corrector.bin(batch.t.cpu()).long().clamp(0, bins - 1)
        for total, values in (
            (cross, z_hat * z.conj()),
            (power, z.abs().square()),
            (sum_z, z),
            (sum_z_hat, z_hat),
        ):
            total.index_add_(0, index, values)
        count += torch.bincount(index, minlength=bins)
    if corrector is None:
        raise ValueError("there are no triplets to estimate a filter from")
    if count.min() < 2:
        k, (low, high) = int(count.argmin()), time_range
        edges = [low + (high - low) * i / bins for i in (k, k + 1)]
        raise ValueError(
            f"too few triplets: {int(count[k])} with t in [{edges[0]:.3f}, {edges[1]:.3f}]; take "
            f"more, or fewer than {bins} bins"
        )
    each = count.view(-1, 1, 1, 1)
    mean_z, mean_z_hat = sum_z / each, sum_z_hat / each
    covariance = cross / each - mean_z_hat * mean_z.conj()
    variance = (power / each - mean_z.abs().square()).clamp_min(1e-30)
    gain = covariance / variance
    corrector.gain.copy_(torch.view_as_real(gain))
    corrector.offset.copy_(torch.fft.irfft2(mean_z_hat - gain * mean_z, s=(size, size)))
    return corrector.eval()


class IdentityCorrector(BiasCorrector):
    """b̂ = z, for comparison: no blur is corrected but what Eq. 10 rescales. Of every prior."""

    def __init__(self, statistics: Statistics = "image") -> None:
        super().__init__(statistics, None)

    def forward(self, z: Tensor, t: Tensor) -> Tensor:
        return z

    def check_prior(self, identity: Mapping[str, Any]) -> None:
        """Every prior is right."""


def load_corrector(pretrained: str) -> BiasCorrector:
    """A released corrector of either kind, from its folder or hub id.

    Raises:
        FileNotFoundError: it is no release folder and cannot be fetched.
        ValueError: it is the release of something else.
    """
    corrector: Corrector | FilterCorrector
    try:
        try:
            corrector = FilterCorrector.from_pretrained(pretrained)
        except TypeError:  # the config lacks the filter's size
            corrector = Corrector.from_pretrained(pretrained)
    except (OSError, HFValidationError) as error:
        raise FileNotFoundError(
            f"no released corrector at {pretrained}: train one (train_bias.py) and release it "
            f"(lmc release RUN --out {pretrained})"
        ) from error
    # A translator's weights can have the same names and shapes; it names no prior.
    if not corrector.prior:
        raise ValueError(f"{pretrained} names no prior: it is no corrector of train_bias.py")
    return corrector
