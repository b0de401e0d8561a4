"""The corrector b̂_ψ and the normalised space it is trained and applied in. Never calls a prior.

`Corrector` is the paper's U-Net. `FilterCorrector` is estimated in closed form from a few thousand
triplets, and `IdentityCorrector` corrects nothing; all three are used alike.
"""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from huggingface_hub.errors import HFValidationError
from torch import Tensor, nn

from lmc.hub import HubNetwork, load_released
from lmc.schedule import TIME_RANGE
from lmc.triplets import Triplets
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

    b̂(z, t) = o_t + F⁻¹[ G_t F[z] ]
    G_t = E[F[ẑ] F[z]ᴴ] E[F[z] F[z]ᴴ]⁻¹,  o_t = m̂_t − F⁻¹[ G_t F[m_t] ]

    for each frequency, with F[z] and F[ẑ] as vectors over the channels, of z and z_hat = ẑ less
    their mean images m_t and m̂_t. G and o are estimated in bins of t (`estimate_filter`) and
    interpolated linearly between the bins' centres. No equation of the paper: among all b̂ that
    filter and add an image it is the one with the least ‖z_hat − b̂‖². Denoisers treat brightness
    and colour differently, which a filter of each channel by itself (`mix_channels` false) cannot
    tell.

    Args:
        channels, size: of z: (channels, size, size).
        bins: of t.
        time_range: what the bins divide evenly.
        mix_channels: G is a matrix over channels; false: G = E[F[ẑ] F[z]*] / E|F[z]|², a number
            for each channel, C times smaller, for latents of many channels.
        statistics, prior: see `BiasCorrector`.

    Raises:
        ValueError: no bins, or unknown statistics.
    """

    def __init__(
        self,
        channels: int,
        size: int,
        bins: int = 16,
        time_range: tuple[float, float] = TIME_RANGE,
        mix_channels: bool = True,
        statistics: Statistics = "image",
        prior: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(statistics, prior)
        if bins < 1:
            raise ValueError(f"bins must be at least 1, got {bins}")
        low, high = time_range
        self.time_range, self.mix_channels = (low, high), mix_channels
        # Real and imaginary part last: a release has no complex numbers.
        matrix = (channels, channels) if mix_channels else (channels,)
        self.register_buffer("gain", torch.zeros(bins, *matrix, size, size // 2 + 1, 2))
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
        if z.shape[1:] != self.offset.shape[1:]:
            here, there = tuple(z.shape[1:]), tuple(self.offset.shape[1:])
            raise ValueError(f"z is {here}, the filter was estimated at {there}")
        with torch.autocast(z.device.type, enabled=False):
            wide = z.to(torch.promote_types(z.dtype, torch.float32))
            gain = torch.view_as_complex(self._at(t, self.gain.to(wide.dtype)))
            filtered = apply_gain(gain, torch.fft.rfft2(wide), self.mix_channels)
            return torch.fft.irfft2(filtered, s=z.shape[2:]) + self._at(
                t, self.offset.to(wide.dtype)
            )

    def _at(self, t: Tensor, by_bin: Tensor) -> Tensor:
        """Values (bins, …) interpolated between the centres of the bins: (B, …)."""
        last = len(by_bin) - 1
        at = (self.bin(t.to(by_bin.dtype)) - 0.5).clamp(0, last)
        below = at.floor().long()
        share = (at - below).view(-1, *[1] * (by_bin.ndim - 1))
        return torch.lerp(by_bin[below], by_bin[(below + 1).clamp(max=last)], share)


def apply_gain(gain: Tensor, spectrum: Tensor, mix_channels: bool) -> Tensor:
    """G F[z] by frequency: (B, C, C, H, W) or (B, C, H, W), and (B, C, H, W), complex."""
    return torch.einsum("bijhw,bjhw->bihw", gain, spectrum) if mix_channels else gain * spectrum


class _Moments:
    """Sums over triplets of one bin of t, in the Fourier domain: what a gain is made of."""

    def __init__(self, channels: int, size: int) -> None:
        shape = (size, size // 2 + 1)
        self.count = 0
        self.z, self.z_hat = torch.zeros(2, channels, *shape, dtype=torch.complex128)
        self.zz, self.zz_hat = torch.zeros(2, channels, channels, *shape, dtype=torch.complex128)

    def add(self, z: Tensor, z_hat: Tensor) -> None:
        """Some triplets' F[z] and F[z_hat], each (N, C, H, W)."""
        self.count += len(z)
        self.z += z.sum(0)
        self.z_hat += z_hat.sum(0)
        self.zz += torch.einsum("nihw,njhw->ijhw", z, z.conj())
        self.zz_hat += torch.einsum("nihw,njhw->ijhw", z_hat, z.conj())

    def gain(self, mix_channels: bool) -> Tensor:
        """G, complex (C, C, H, W) or (C, H, W)."""
        covariance = self.zz / self.count - _outer(self.z / self.count, self.z / self.count)
        cross = self.zz_hat / self.count - _outer(self.z_hat / self.count, self.z / self.count)
        variance = covariance.diagonal().movedim(-1, 0).real
        # Against frequencies that the pictures do not have: below an eighth bit's rounding.
        ridge = 1e-6 * variance.mean()
        if not mix_channels:
            return cross.diagonal().movedim(-1, 0) / (variance + ridge)
        # And a thousandth of the channels' mean variance, against channels that are all but equal,
        # as those of grey pictures are.
        added = 1e-3 * variance.mean(0) + ridge
        matrices = covariance.permute(2, 3, 0, 1) + torch.diag_embed(
            added[..., None].expand(*added.shape, len(variance))
        )
        solved = torch.linalg.solve(matrices, cross.permute(2, 3, 0, 1), left=False)
        return solved.permute(2, 3, 0, 1)


def _outer(one: Tensor, other: Tensor) -> Tensor:
    """(C, H, W) and (C, H, W) to one · other*, (C, C, H, W)."""
    return one[:, None] * other.conj()[None]


@torch.no_grad()
def estimate_filter(
    triplets: Iterable[Triplets],
    identity: Mapping[str, Any],
    bins: int = 16,
    time_range: tuple[float, float] = TIME_RANGE,
    mix_channels: bool = True,
    statistics: Statistics = "image",
) -> FilterCorrector:
    """A `FilterCorrector` from triplets of a prior, in one pass over them.

    Args:
        triplets: batches; a few hundred triplets a bin are enough for 32 x 32 pixels.
        identity: `Prior.identity` of their prior.
        bins, time_range, mix_channels, statistics: see there.

    Raises:
        ValueError: no triplets, or a bin of t with too few.
    """
    corrector: FilterCorrector | None = None
    for batch in triplets:
        if corrector is None:
            _, channels, size, _ = batch.z.shape
            corrector = FilterCorrector(
                channels, size, bins, time_range, mix_channels, statistics, identity
            )
            moments = [_Moments(channels, size) for _ in range(bins)]
        z, z_hat = (torch.fft.rfft2(x.cpu().double()) for x in (batch.z, batch.z_hat))
        index = corrector.bin(batch.t.cpu()).long().clamp(0, bins - 1)
        for k in index.unique().tolist():
            moments[k].add(z[index == k], z_hat[index == k])
    if corrector is None:
        raise ValueError("there are no triplets to estimate a filter from")
    least = channels + 1 if mix_channels else 2
    low, high = time_range
    for k, one in enumerate(moments):
        if one.count < least:
            edges = [low + (high - low) * i / bins for i in (k, k + 1)]
            raise ValueError(
                f"too few triplets: {one.count} with t in [{edges[0]:.3f}, {edges[1]:.3f}], "
                f"{least} are needed; take more, or fewer than {bins} bins"
            )
        gain = one.gain(mix_channels)
        filtered = apply_gain(gain[None], one.z[None] / one.count, mix_channels)[0]
        offset = torch.fft.irfft2(one.z_hat / one.count - filtered, s=(size, size))
        corrector.gain[k] = torch.view_as_real(gain.resolve_conj())
        corrector.offset[k] = offset
    return corrector.eval()


class IdentityCorrector(BiasCorrector):
    """b̂ = z, for comparison: no blur is corrected but what Eq. 10 rescales. Of every prior."""

    def __init__(self, statistics: Statistics = "image") -> None:
        super().__init__(statistics, None)

    def forward(self, z: Tensor, t: Tensor) -> Tensor:
        return z

    def check_prior(self, identity: Mapping[str, Any]) -> None:
        """Every prior is right."""


CORRECTORS: dict[str, type[Corrector | FilterCorrector]] = {
    "bounded": Corrector,
    "size": FilterCorrector,
}  # by a key that only a release of this kind has; older ones lack some others


def load_corrector(pretrained: str) -> BiasCorrector:
    """A released corrector of either kind, from its folder or hub id.

    Raises:
        FileNotFoundError: it is no release folder and cannot be fetched.
        ValueError: it is the release of something else.
    """
    try:
        corrector: Corrector | FilterCorrector = load_released(pretrained, CORRECTORS)
    except (OSError, HFValidationError) as error:
        raise FileNotFoundError(
            f"no released corrector at {pretrained}: train one (train_bias.py) and release it "
            f"(lmc release RUN --out {pretrained})"
        ) from error
    if not corrector.prior:
        raise ValueError(f"{pretrained} names no prior: it is no corrector of train_bias.py")
    return corrector
