"""What may happen to pictures while they are optimised: casts, noise, stripes, contrast, blur.

Each perturbation is a function (z, amount, generator) -> z + δ with

    z: float (B, C, S, S), of a pixel prior in [-1, 1];
    amount: (B,), how much of it: see each;
    generator: of all that is random, on z's device.

δ of the additive ones (cast, noise, stripes) has the RMS `amount`, before anything is clamped.
`perturb` scales them to latents, and keeps pictures in [-1, 1].
"""

import math
from collections.abc import Callable
from dataclasses import asdict, astuple, dataclass, field

import torch
from torch import Tensor

from lmc.errors import require

Perturbation = Callable[[Tensor, Tensor, torch.Generator], Tensor]


def cast(z: Tensor, amount: Tensor, generator: torch.Generator) -> Tensor:
    """A cast of colour, by a coin's throw for each picture even or smooth in space."""
    even, smooth = even_cast(z, amount, generator), smooth_cast(z, amount, generator)
    return torch.where(_coins(z, generator), even, smooth)


def even_cast(z: Tensor, amount: Tensor, generator: torch.Generator) -> Tensor:
    """The same number added to every pixel of a channel."""
    return z + _wide(amount) * _unit(_randn(z, generator, 1)).expand_as(z)


def smooth_cast(z: Tensor, amount: Tensor, generator: torch.Generator) -> Tensor:
    """Another cast at each of the four corners, and in between what lies between them."""
    corners = _randn(z, generator, 2)
    field = torch.nn.functional.interpolate(
        corners, z.shape[2:], mode="bilinear", align_corners=True
    )
    return z + _wide(amount) * _unit(field)


def noise(z: Tensor, amount: Tensor, generator: torch.Generator) -> Tensor:
    """Gaussian noise, by a coin's throw for each picture white or of low frequencies.

    The latter falls off as exp(−(k / k_0)² / 2), k_0 log-uniform in [1, S / 2] cycles a picture.
    """
    white = _randn(z, generator, z.shape[2])
    reach = (z.shape[2] / 2) ** _rand(z, generator)
    low = _filtered(white, (-((_radius(z) / _wide(reach)[:, 0]) ** 2) / 2).exp()[:, None])
    return z + _wide(amount) * _unit(torch.where(_coins(z, generator), white, low))


def band_noise(
    z: Tensor, amount: Tensor, generator: torch.Generator, low: float, high: float
) -> Tensor:
    """Gaussian noise of the frequencies in [low, high) cycles a picture alone."""
    radius = _radius(z)
    inside = ((radius >= low) & (radius < high)).to(z.dtype)
    return z + _wide(amount) * _unit(_filtered(_randn(z, generator, z.shape[2]), inside))


def stripes(z: Tensor, amount: Tensor, generator: torch.Generator) -> Tensor:
    """A plane wave of any frequency, orientation, phase and colour.

    Its greater frequency, across or down, is log-uniform in [1, S / 2] cycles a picture: the
    checkerboard is among them.
    """
    return band_stripes(z, amount, generator, 1, z.shape[2] / 2)


def band_stripes(
    z: Tensor, amount: Tensor, generator: torch.Generator, low: float, high: float
) -> Tensor:
    """Stripes whose greater frequency is log-uniform in [low, high] cycles a picture."""
    greater = low * (high / low) ** _rand(z, generator)
    turn = 2 * math.pi * _rand(z, generator)
    across, down = turn.cos(), turn.sin()
    scale = greater / torch.maximum(across.abs(), down.abs())
    phase = 2 * math.pi * _rand(z, generator)
    place = torch.arange(z.shape[2], device=z.device, dtype=z.dtype) * 2 * math.pi / z.shape[2]
    wave = _wide(scale * down) * place[:, None] + _wide(scale * across) * place + _wide(phase)
    colour = _randn(z, generator, 1)
    return z + _wide(amount) * _unit(colour * wave.cos())


def contrast(z: Tensor, amount: Tensor, generator: torch.Generator) -> Tensor:
    """1 + amount or, by a coin's throw, 1 − amount times the contrast about the picture's mean."""
    sign = torch.where(_coins(z, generator), 1.0, -1.0).to(z.dtype)
    mean = z.mean((1, 2, 3), keepdim=True)
    return mean + (1 + sign * _wide(amount)) * (z - mean)


def blur(z: Tensor, amount: Tensor, generator: torch.Generator) -> Tensor:
    """A Gaussian blur of sigma `amount`, a share of the side; pictures go on mirrored."""
    tall = torch.cat([z, z.flip(2)], 2)
    mirrored = torch.cat([tall, tall.flip(3)], 3)
    sigma = _wide(amount)[:, 0] * z.shape[2]
    cycles = _radius(mirrored) / mirrored.shape[2]  # a pixel
    gain = (-2 * (math.pi * sigma * cycles) ** 2).exp()
    return _filtered(mirrored, gain[:, None])[:, :, : z.shape[2], : z.shape[3]]


def mix(z: Tensor, amount: Tensor, generator: torch.Generator) -> Tensor:
    """z + amount · (z₂ − z), z₂ another picture of the batch: a translation that is half done.

    In a batch of one there is no other.
    """
    by = torch.randint(1, max(2, len(z)), (1,), generator=generator, device=z.device)
    other = (torch.arange(len(z), device=z.device) - by) % len(z)  # the device is not waited for
    return z + _wide(amount) * (z[other] - z)


PERTURBATIONS: dict[str, Perturbation] = {
    each.__name__: each for each in (cast, noise, stripes, contrast, blur, mix)
}
ADDITIVE = ("cast", "noise", "stripes")


def perturb(
    perturbation: Perturbation,
    z: Tensor,
    amount: Tensor,
    generator: torch.Generator,
    latent: bool = False,
    additive: bool = True,
) -> Tensor:
    """z + δ in z's space.

    Args:
        perturbation: see the module.
        z, amount, generator: see the module.
        latent: z is a latent: additive perturbations are in units of the batch's standard
            deviation, and nothing is clamped. Pictures are clamped to [-1, 1].
        additive: whether it is one of those.

    Returns:
        As z.
    """
    scaled = amount * z.std() if latent and additive else amount
    perturbed = perturbation(z, scaled, generator)
    return perturbed if latent else perturbed.clamp(-1, 1)


@dataclass(frozen=True)
class Weights:
    """How often each kind of δ is drawn, relative to the others; 0 leaves it out."""

    none: float = 1.0
    cast: float = 1.0
    noise: float = 1.0
    stripes: float = 1.0
    contrast: float = 1.0
    blur: float = 1.0
    mix: float = 1.0


@dataclass(frozen=True)
class Maxima:
    """The most of each kind of δ: the amount is uniform between 0 and that.

    The RMS of cast, noise and stripes (of a latent in its standard deviations), the change of
    contrast, the blur's sigma as a share of the side, the share of the other picture in the mix.
    """

    cast: float = 0.3
    noise: float = 0.3
    stripes: float = 0.3
    contrast: float = 0.5
    blur: float = 1.5 / 32
    mix: float = 0.5


@dataclass(frozen=True)
class Restoring:
    """A training of b̂ that pulls perturbations back: b̂(z + δ, t) = ẑ_t(z) + δ.

    On average over t and eps, LMC-SDS's corrective term b − ẑ_t moves z along ẑ_t(z) − b(z, t). A
    perturbation δ of z therefore grows by (J_ẑ − J_b) δ: where the denoiser answers it more than b
    does. b trained on clean pictures alone is free to answer as little as it likes, and
    pictures run away in whatever it does not answer: casts of colour, stripes, checkerboards.
    Trained so, b answers δ whole, J_b δ = δ, and as the denoiser answers no perturbation more than
    whole, z is pulled back along δ; on clean pictures b stays the paper's, so that nothing
    pulls along the manifold and detail is kept. The triplet is the clean picture's: there is no
    further evaluation of the denoiser. b̂ is trained without Eq. 10's normalisation, which would
    cancel what it answers to contrast, and applied with it: of pictures of strong contrast the
    denoiser is sure at times where b̂ is not, and their contrast would grow without it.

    Args:
        weights: how often each kind is drawn.
        maxima: of each kind the most.

    Raises:
        ValueError: a number out of its range.
    """

    weights: Weights = field(default_factory=Weights)
    maxima: Maxima = field(default_factory=Maxima)

    def __post_init__(self) -> None:
        for option, given in (("weights", self.weights), ("maxima", self.maxima)):
            for name, number in asdict(given).items():
                where = f"model.restoring.{option}.{name}"
                require(0 <= number < math.inf, where, "at least 0", number)
        for name in ("contrast", "mix"):
            most = getattr(self.maxima, name)
            require(most <= 1, f"model.restoring.maxima.{name}", "at most 1", most)
        drawn = sum(asdict(self.weights).values()) - self.weights.none
        require(drawn > 0, "model.restoring.weights", "above 0 of one kind", self.weights)

    def perturb(self, z: Tensor, generator: torch.Generator, latent: bool = False) -> Tensor:
        """z + δ, another kind and amount for each sample.

        Args:
            z: clean, float (B, C, S, S).
            generator: on z's device.
            latent: see `perturb`.

        Returns:
            As z; z itself where the kind is none.
        """
        # Made on the device: to copy them there would wait for it.
        each_weight = (
            torch.full((1,), weight, device=z.device) for weight in astuple(self.weights)
        )
        weights = torch.cat([*each_weight])
        kinds = torch.multinomial(weights, len(z), replacement=True, generator=generator)
        share = _rand(z, generator)
        perturbed = z
        for number, (name, weight) in enumerate(asdict(self.weights).items()):
            if name == "none" or not weight:
                continue
            amount = share * getattr(self.maxima, name)
            how = PERTURBATIONS[name]
            # Of all samples, and then of those that it was drawn for: other samples' randomness
            # does not depend on which these are.
            each = perturb(how, z, amount, generator, latent, name in ADDITIVE)
            perturbed = torch.where(_wide(kinds == number), each, perturbed)
        return perturbed


def _wide(values: Tensor) -> Tensor:
    """(B,) as (B, 1, 1, 1)."""
    return values.view(-1, 1, 1, 1)


def _rand(z: Tensor, generator: torch.Generator) -> Tensor:
    """A number in [0, 1) for each sample, (B,)."""
    return torch.rand(len(z), generator=generator, device=z.device, dtype=z.dtype)


def _randn(z: Tensor, generator: torch.Generator, side: int) -> Tensor:
    """Standard normal (B, C, side, side)."""
    shape = (*z.shape[:2], side, side)
    return torch.randn(shape, generator=generator, device=z.device, dtype=z.dtype)


def _coins(z: Tensor, generator: torch.Generator) -> Tensor:
    """A coin's throw for each sample, bool (B, 1, 1, 1)."""
    return _wide(_rand(z, generator) < 0.5)


def _unit(delta: Tensor) -> Tensor:
    """Each sample divided by its RMS."""
    rms = delta.square().mean((1, 2, 3), keepdim=True).sqrt()
    return delta / rms.clamp_min(1e-12)


def _radius(z: Tensor) -> Tensor:
    """The frequencies of `rfft2` in cycles a picture, (S, S // 2 + 1)."""
    size = z.shape[2]
    down = torch.fft.fftfreq(size, 1 / size, device=z.device, dtype=z.dtype)
    across = torch.fft.rfftfreq(size, 1 / size, device=z.device, dtype=z.dtype)
    return (down[:, None].square() + across.square()).sqrt()


def _filtered(z: Tensor, gain: Tensor) -> Tensor:
    """z with its frequencies times `gain`, which broadcasts to `rfft2`'s."""
    return torch.fft.irfft2(torch.fft.rfft2(z) * gain, s=z.shape[2:])
