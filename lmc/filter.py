"""Correctors in closed form, a linear filter of z that is estimated from triplets, not trained.

`FilterCorrector` is nothing else; `HybridCorrector` is that and a U-Net, trained, for the rest.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lmc.corrector import BiasCorrector, Statistics
from lmc.hub import HubNetwork
from lmc.schedule import TIME_RANGE
from lmc.shards.triplets import Triplets
from lmc.unet import ENCODING, Norm, UNet, concatenate_condition, frequency_encoding


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
        ValueError: no bins, unknown statistics, or 'calibrated' ones, which need a training.
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
        if statistics == "calibrated":
            raise ValueError("statistics 'calibrated' are of correctors that are trained")
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
            gain = torch.view_as_complex(self.interpolated(t, self.gain.to(wide.dtype)))
            filtered = apply_gain(gain, torch.fft.rfft2(wide), self.mix_channels)
            return torch.fft.irfft2(filtered, s=z.shape[2:]) + self.interpolated(
                t, self.offset.to(wide.dtype)
            )

    def interpolated(self, t: Tensor, by_bin: Tensor) -> Tensor:
        """Values (bins, …) interpolated between the centres of the bins: (B, …)."""
        last = len(by_bin) - 1
        at = (self.bin(t.to(by_bin.dtype)) - 0.5).clamp(0, last)
        below = at.floor().long()
        share = (at - below).view(-1, *[1] * (by_bin.ndim - 1))
        return torch.lerp(by_bin[below], by_bin[(below + 1).clamp(max=last)], share)


class HybridCorrector(BiasCorrector, HubNetwork, tags=["score-distillation"]):
    """b̂(z, t) = closed form (z, t) + U-Net([z, enc(t)]): the network has only the rest to learn.

    The U-Net's last layer is zero at first and no tanh follows it, so that training starts as the
    closed form exactly.

    Args:
        channels: of z.
        closed_form: arguments of `FilterCorrector`: size, and those that are not its defaults.
        widths: filters per level of the U-Net; the last is the middle level.
        norm: see `UNet`.
        statistics, prior: see `BiasCorrector`; of the whole.

    Raises:
        ValueError: z has a side that the U-Net cannot halve, or see `UNet` and `FilterCorrector`.
    """

    def __init__(
        self,
        channels: int,
        closed_form: Mapping[str, Any],
        widths: Sequence[int] = (32, 64, 128, 256, 512),
        norm: Norm = "none",
        statistics: Statistics = "image",
        prior: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(statistics, prior)
        self.closed_form = FilterCorrector(channels, **closed_form, statistics=_own(statistics))
        self.unet = UNet(channels + ENCODING, channels, widths, norm, bounded=False)
        self.unet.check_size(closed_form["size"])
        nn.init.zeros_(self.unet.last.weight)
        assert self.unet.last.bias is not None
        nn.init.zeros_(self.unet.last.bias)

    def forward(self, z: Tensor, t: Tensor) -> Tensor:
        """See `BiasCorrector.forward`.

        Raises:
            ValueError: z is not of the closed form's channels and size.
        """
        rest = self.unet(concatenate_condition(z, frequency_encoding(t)))
        return self.closed_form(z, t) + rest

    def begin_with(self, closed_form: FilterCorrector) -> None:
        """Have the filter of a closed-form corrector, of the same channels, size and time range.

        Raises:
            ValueError: it is of others.
        """
        mine, its = self.closed_form.arguments, closed_form.arguments
        for name in ("channels", "size", "time_range"):
            here, there = (plain(arguments[name]) for arguments in (mine, its))
            if here != there:
                raise ValueError(f"the closed form's {name} is {there}, this corrector's {here}")
        kept = {name: its[name] for name in ("size", "bins", "time_range", "mix_channels")}
        if any(mine[name] != its[name] for name in ("bins", "mix_channels")):
            new = FilterCorrector(its["channels"], **kept, statistics=_own(self.statistics))
            self.closed_form = new.to(self.closed_form.gain.device)
            self.arguments["closed_form"] = kept
        self.closed_form.load_state_dict(closed_form.state_dict())


def _own(statistics: Statistics) -> Statistics:
    """Those of a hybrid's closed form by itself."""
    return "image" if statistics == "calibrated" else statistics


def plain(value: Any) -> Any:
    """A pair as a list, which a config that was read has in its place."""
    return list(value) if isinstance(value, tuple) else value


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
