"""`lmc dreamsampler edit | inpaint | super_resolve | deblur | restore_svg`: on an image file.

A command is a dataclass, so that every knob is a typed key of the command line and of a YAML.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from lmc.configs import parse_seeds
from lmc.device import choose_device
from lmc.dreamsampler import (
    AveragePooling,
    Canvas,
    DataConsistency,
    DreamSampler,
    GaussianBlur,
    Inpainting,
    check_factor,
    check_prior,
    check_sigma,
    data_weight,
)
from lmc.errors import require
from lmc.files import write_json, write_text
from lmc.one_image.job import RECORD, RESULTS, check_out, read_image, save_image
from lmc.priors import Embedding, Prior
from lmc.progress import tracker
from lmc.renderers.drawing import Drawing, vectorise
from lmc.renderers.svg import SVG
from lmc.shards.images import middle_square

# Set streams apart from the seeds people give, from which DreamSampler's noise is drawn: a
# measurement's noise, blobs at first, blobs anew. A CPU's generator reads the low 32 bits alone.
MEASUREMENT, BLOBS, ANEW_BLOBS = 0x6D0A57E3, 0x51B0B5A1, 0x2C3E9F47
# Of the inverse problems of pixels, unless told otherwise.
PIXELS, PIXELS_GAMMA = DreamSampler(steps=50, eta=1.0, step_size=0.1, inner_steps=3), 0.9
ANEW = 5  # times of the grid between two looks for paths that have vanished


@dataclass(kw_only=True)
class Task(ABC):
    """What all commands share.

    Args:
        prior: a variance-preserving prior.
        image: file; its middle square is taken, resized to the prior's resolution.
        out: folder to write the PNGs, settings.yaml and results.json into; the same command again
            does it again, another result is refused.
        prompt: of the result; '' is none.
        sampler: the algorithm's knobs.
        seeds: a result each, with commas; all in one batch.
        device: cpu, cuda, …; default the GPU where there is one.
    """

    prior: Prior
    image: str
    out: str
    prompt: str
    sampler: DreamSampler
    seeds: list[int] | int | str = 0
    device: str = "auto"

    def __post_init__(self) -> None:
        self.each_seed = parse_seeds(self.seeds)

    @abstractmethod
    def check(self) -> None:
        """Read the files and refuse what cannot work, before any weights are loaded.

        Raises:
            FileNotFoundError, ValueError: naming the file or key.
        """

    @abstractmethod
    def sample(self, base: Embedding, target: Embedding) -> tuple[Tensor, dict[str, Tensor]]:
        """The results, (seeds, 3, H, W), and other images by name, each (3, H, W)."""

    def base_prompt(self) -> str:
        """What guidance leads away from."""
        return ""

    def results(self, images: Tensor) -> dict[str, Any]:
        """What is measured on the results."""
        return {}

    def __call__(self, settings: str) -> None:
        """Do it and write the files; `settings` is the YAML written beside them."""
        out = Path(self.out)
        self.device = choose_device(self.device)
        check_prior(self.prior)
        self.check()
        check_out(out, settings)
        base, target = (
            self.prior.embed([prompt]).expand(len(self.each_seed)).to(self.device)
            for prompt in (self.base_prompt(), self.prompt)
        )
        write_text(out / RECORD, settings)
        self.prior.to(self.device)
        images, others = self.sample(base, target)
        names = {f"result-{s}": x for s, x in zip(self.each_seed, images, strict=True)}
        for name, image in (others | names).items():
            save_image(image, out / f"{name}.png")
        results = self.results(images.cpu())
        write_json(out / RESULTS, results)
        for name, value in results.items():
            print(f"{name}: {value}")
        print(f"wrote {out}")

    def generators(self) -> list[torch.Generator]:
        """One a seed."""
        return [torch.Generator().manual_seed(seed) for seed in self.each_seed]

    def read(self, file: str, size: int) -> Tensor:
        """The middle square of an image file, (1, 3, size, size) in [-1, 1]."""
        return middle_square(read_image(Path(file))[None], size)


@dataclass(kw_only=True)
class Edit(Task):
    """Invert a photo, then sample it again, guided from the source prompt to the target's.

    Args:
        prompt: of the result.
        source_prompt: of the photo: inverted with, and guided away from; '' is the null prompt.
    """

    source_prompt: str = ""
    sampler: DreamSampler = field(
        default_factory=lambda: DreamSampler(steps=50, start=0.8, guidance_scale=5.0)
    )

    def check(self) -> None:
        if len(self.each_seed) > 1 and self.sampler.eta == 0:
            raise ValueError("seeds differ only by fresh noise: give one, or sampler.eta above 0")
        self.photo = self.read(self.image, self.prior.image_size)

    def base_prompt(self) -> str:
        return self.source_prompt

    def sample(self, base: Embedding, target: Embedding) -> tuple[Tensor, dict[str, Tensor]]:
        count = len(self.each_seed)
        photo = self.photo.to(self.device).repeat(count, 1, 1, 1)
        with torch.no_grad():
            z = self.prior.encode(photo)
        eps = self.sampler.invert(self.prior, z, base, tracker("inverting"))
        canvas = Canvas(self.prior, z)
        track = tracker("sampling")
        self.sampler(self.prior, canvas, base, target, self.generators(), eps, track=track)
        with torch.no_grad():
            return canvas(), {"source": photo[0]}


@dataclass(kw_only=True)
class InverseProblem(Task):
    """What the inverse problems share: y = A x + noise, R = ‖y − A g(ψ)‖².

    λ = γ λ_DC / ((1 − γ) λ_SDS) and ζ must keep ζ (1 + 2 λ ‖A‖²) below 2, or the steps diverge.

    Args:
        measured: the image is the measurement y already; else it is the original, which is
            degraded first and compared with in the end (PSNR).
        noise: deviation of the noise added to the degraded image, whose range is [-1, 1].
        prompt: of the original; '' is none. With one, set sampler.guidance_scale to 1 or above.
        gamma: γ in [0, 1), the data's share.
        lambda_dc: λ_DC; None is 1/‖A‖²: 1, or factor² for super-resolution.
        lambda_sds: λ_SDS.
    """

    measured: bool = False
    noise: float = 0.0
    prompt: str = ""
    gamma: float = PIXELS_GAMMA
    lambda_dc: float | None = None
    lambda_sds: float = 1.0
    sampler: DreamSampler = field(default_factory=lambda: PIXELS)

    @abstractmethod
    def degradation(self, size: int) -> Any:
        """A of images of size x size, an `lmc.dreamsampler.Operator` with its `squared_norm`.

        Raises:
            ValueError: it does not fit.
        """

    def measured_size(self, size: int) -> int:
        """The side of a measurement of an image of size x size."""
        return size

    def check(self) -> None:
        if self.noise < 0:
            raise ValueError(f"noise must not be negative, got {self.noise}")
        if self.measured and self.noise:
            raise ValueError("noise is for an original to be degraded: leave it 0 if measured")
        size = self.prior.image_size
        self.a = self.degradation(size)
        scale = 1 / self.a.squared_norm if self.lambda_dc is None else self.lambda_dc
        self.weight = data_weight(self.gamma, scale, self.lambda_sds)
        self.check_step_size()
        self.original = None if self.measured else self.read(self.image, size)
        if self.original is None:
            self.y = self.read(self.image, self.measured_size(size))
        else:
            y = self.a(self.original)
            generator = torch.Generator().manual_seed(MEASUREMENT)
            self.y = y + self.noise * torch.randn(y.shape, generator=generator)

    def check_step_size(self) -> None:
        """Refuse a ζ with which the steps diverge.

        Raises:
            ValueError: it is too large for λ.
        """
        longest = 2 / (1 + 2 * self.weight * self.a.squared_norm)
        if self.sampler.step_size >= longest:
            raise ValueError(
                f"sampler.step_size {self.sampler.step_size} diverges with λ = {self.weight:.3g}: "
                f"it must be below {longest:.3g}"
            )

    def sample(self, base: Embedding, target: Embedding) -> tuple[Tensor, dict[str, Tensor]]:
        return self.restore(self.sampler, self.weight, base, target), self.given()

    def restore(
        self, sampler: DreamSampler, weight: float, base: Embedding, target: Embedding
    ) -> Tensor:
        """The images restored as pixels, or latents, with a λ: (seeds, 3, H, W)."""
        size = self.prior.image_size
        grey = torch.zeros(len(self.each_seed), 3, size, size, device=self.device)
        with torch.no_grad():
            canvas = Canvas(self.prior, self.prior.encode(grey))
        sampler(
            self.prior,
            canvas,
            base,
            target,
            self.generators(),
            penalty=self.penalty(weight),
            track=tracker("sampling"),
        )
        with torch.no_grad():
            return canvas().detach()  # z itself may be a parameter

    def penalty(self, weight: float) -> DataConsistency:
        """λ R."""
        return DataConsistency(self.a, self.y.to(self.device), weight)

    def given(self) -> dict[str, Tensor]:
        """The measurement, and the original where it is known."""
        known = {} if self.original is None else {"original": self.original[0]}
        return {"measurement": self.y[0], **known}

    def enlarged(self) -> Tensor:
        """The measurement, bicubic where it is small: (1, 3, S, S), S the prior's resolution."""
        size = [self.prior.image_size] * 2
        return F.interpolate(self.y, size, mode="bicubic") if self.y.shape[-1] < size[0] else self.y

    def results(self, images: Tensor) -> dict[str, Any]:
        """PSNR in dB over the whole image, of the measurement (bicubic where small) and results."""
        if self.original is None:
            return {}
        return {
            "measurement_psnr": psnr(self.enlarged(), self.original),
            "result_psnr": [psnr(image[None], self.original) for image in images],
        }


@dataclass(kw_only=True)
class Inpaint(InverseProblem):
    """Fill in what a mask marks.

    Args:
        mask: image file of the image's size; what is lighter than mid grey is to be filled in,
            the rest is kept.
    """

    mask: str

    def degradation(self, size: int) -> Inpainting:
        sizes = [tuple(read_image(Path(file)).shape[-2:]) for file in (self.image, self.mask)]
        if sizes[0] != sizes[1]:
            (h, w), (mask_h, mask_w) = sizes
            raise ValueError(
                f"mask {self.mask} is {mask_w} x {mask_h} pixels, image {self.image} {w} x {h}: "
                "they must be of one size"
            )
        # Nearly white is white, nearly black is black: files of photos' formats are never clean.
        white = (read_image(Path(self.mask)).mean(0) > 0).float()[None, None]
        # Known is only what no white pixel was resized into.
        unknown = middle_square(white, size)[0, 0] > 0.005
        if not unknown.any():
            raise ValueError(f"mask {self.mask} has no white to be filled in")
        if unknown.all():
            raise ValueError(f"mask {self.mask} leaves nothing of the image: black is what is kept")
        return Inpainting(~unknown)


@dataclass(kw_only=True)
class SuperResolve(InverseProblem):
    """Find an image whose average pooling is the small one.

    Args:
        factor: between the sides of the result, which has the prior's resolution, and of y.
    """

    factor: int = 4

    def degradation(self, size: int) -> AveragePooling:
        check_factor(self.factor, size, size)
        return AveragePooling(self.factor)

    def measured_size(self, size: int) -> int:
        return size // self.factor


@dataclass(kw_only=True)
class Deblur(InverseProblem):
    """Find an image whose gaussian blur is the one given.

    Args:
        sigma: of the blur, in pixels at the prior's resolution.
    """

    sigma: float = 1.5

    def degradation(self, size: int) -> GaussianBlur:
        check_sigma(self.sigma, size)
        return GaussianBlur(self.sigma)


@dataclass(kw_only=True)
class RestoreSVG(InverseProblem):
    """Find a vector graphic of which the image is a blurred or a small raster.

    Paths are fitted to the measurement, which vectorises it, then moved by DreamSampler: both by
    Adam, at rates of their own, and `sampler.step_size` is not used.

    Args:
        operator: what was done to the raster.
        sigma: of the blur, in pixels at the prior's resolution.
        factor: of downsample, between the sides of the raster and of y.
        paths: how many closed paths of `segments` cubic Béziers there are, over a background.
        segments: of each path.
        points_lr: the highest rate of Adam for the paths' points, in pixels.
        colours_lr: for colours, opacity and background, in [0, 1].
        vectorise_steps: of Adam, in which the paths are fitted to the measurement first.
        baseline: also restore the raster, as deblur and super_resolve do by default, and vectorise
            that, beginning with the same paths, in as many steps of Adam in all.
        clip: a CLIP, as a folder or hub id: the cosine of the pictures with `prompt`.
        gamma: γ in [0, 1), the data's share.
    """

    operator: Literal["blur", "downsample"]
    sigma: float = 1.5
    factor: int = 4
    paths: int = 64
    segments: int = 4
    points_lr: float = 0.2
    colours_lr: float = 0.02
    vectorise_steps: int = 300
    baseline: bool = False
    clip: str | None = None
    gamma: float = 0.97
    sampler: DreamSampler = field(default_factory=lambda: replace(PIXELS, inner_steps=10))

    def degradation(self, size: int) -> AveragePooling | GaussianBlur:
        if self.operator == "blur":
            check_sigma(self.sigma, size)
            return GaussianBlur(self.sigma)
        check_factor(self.factor, size, size)
        return AveragePooling(self.factor)

    def measured_size(self, size: int) -> int:
        return size if self.operator == "blur" else size // self.factor

    def check(self) -> None:
        require(self.vectorise_steps >= 0, "vectorise_steps", "at least 0", self.vectorise_steps)
        if self.clip is not None and not self.prompt:
            raise ValueError("clip compares with the prompt: give one")
        super().check()
        self.drawings = [self.drawing(seed) for seed in self.each_seed]
        self.pictures: dict[str, Tensor] = {}
        self.judge: Any = None
        if self.clip is not None:
            from lmc.measure.metrics import Clip

            self.judge = Clip(self.clip, self.device)

    def check_step_size(self) -> None:
        """Any will do: it is not used."""

    def sample(self, base: Embedding, target: Embedding) -> tuple[Tensor, dict[str, Tensor]]:
        y = self.enlarged().to(self.device).expand(len(self.each_seed), -1, -1, -1)
        self.pictures["vectorised"] = self.vectorise(self.drawings, y, self.vectorise_steps)
        for i, drawing in enumerate(self.drawings):
            row, drawing.anew = slice(i, i + 1), ANEW
            self.sampler(
                self.prior,
                drawing,
                base.rows(row),
                target.rows(row),
                self.generators()[row],
                penalty=self.penalty(self.weight),
                track=tracker("sampling"),
            )
        with torch.no_grad():
            images = torch.cat([drawing() for drawing in self.drawings])
        if self.baseline:
            sampler = replace(PIXELS, guidance_scale=self.sampler.guidance_scale)
            weight = data_weight(PIXELS_GAMMA, 1 / self.a.squared_norm)
            raster = self.restore(sampler, weight, base, target)
            steps = self.vectorise_steps + self.sampler.steps * self.sampler.inner_steps
            drawings = [self.drawing(seed) for seed in self.each_seed]
            self.pictures["raster"] = raster
            self.pictures["baseline"] = self.vectorise(drawings, raster.clamp(-1, 1), steps)
        named = {
            f"{name}-{seed}": image
            for name, images_of in self.pictures.items()
            for seed, image in zip(self.each_seed, images_of, strict=True)
        }
        return images, self.given() | named

    def drawing(self, seed: int) -> Drawing:
        """Random paths over the measurement's mean colour."""
        generator = torch.Generator().manual_seed(seed ^ BLOBS)
        svg = SVG.random(self.paths, self.prior.image_size, generator, self.segments)
        svg.background.data = (self.y[0].mean((1, 2)).clamp(-1, 1) + 1) / 2
        svg.background.requires_grad_()
        return Drawing(svg, self.points_lr, self.colours_lr)

    def vectorise(self, drawings: Sequence[Drawing], images: Tensor, steps: int) -> Tensor:
        """Fit a drawing a seed to its image (seeds, 3, S, S); the rasters, likewise."""
        for seed, drawing, image in zip(self.each_seed, drawings, images, strict=True):
            generator = torch.Generator().manual_seed(seed ^ ANEW_BLOBS)
            drawing.to(self.device)
            vectorise(drawing, image[None], steps, generator, tracker("vectorising"))
        with torch.no_grad():
            return torch.cat([drawing() for drawing in drawings])

    def __call__(self, settings: str) -> None:
        super().__call__(settings)
        for seed, drawing in zip(self.each_seed, self.drawings, strict=True):
            drawing.svg.save(Path(self.out) / f"result-{seed}.svg")

    def results(self, images: Tensor) -> dict[str, Any]:
        """Of the measurement, the vectorised one, the result and the baseline what can be measured.

        PSNR and, where its weights are on the disk, LPIPS to the original; CLIP score if asked for.
        """
        from lmc.measure.metrics import clip_score, distances

        lpips = distances(self.prior.image_size).get("lpips") if self.original is not None else None
        found: dict[str, Any] = {}
        named = {"measurement": self.enlarged(), **self.pictures, "result": images}
        for name, several in named.items():
            batch = several.cpu().clamp(-1, 1)
            if self.original is not None:
                found[f"{name}_psnr"] = [psnr(image[None], self.original) for image in batch]
            if self.original is not None and lpips is not None:
                original = self.original.expand_as(batch).contiguous()
                found[f"{name}_lpips"] = lpips(batch, original).tolist()
            if self.judge is not None:
                seen, text = (
                    self.judge.images(batch.to(self.device)),
                    self.judge.texts([self.prompt]),
                )
                found[f"{name}_clip_score"] = clip_score(seen, text.expand_as(seen)).tolist()
        return {
            name: values[0] if name.startswith("measurement") else values
            for name, values in found.items()
        }


def psnr(image: Tensor, original: Tensor) -> float:
    """Peak signal-to-noise ratio in dB, of `image` clipped to [-1, 1]."""
    from torchmetrics.functional.image import peak_signal_noise_ratio

    return round(peak_signal_noise_ratio(image.clamp(-1, 1), original, data_range=2.0).item(), 2)
