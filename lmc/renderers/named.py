"""What `lmc synthesize` and `edit` optimise by `--renderer`: made of a `Start` and its own options.

The classes are written as their names are on the command line.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lmc.priors import Prior
from lmc.renderers.cameras import SUFFIXES, Orbits, Range
from lmc.renderers.drawing import Drawing
from lmc.renderers.orbit import OrbitedScene
from lmc.renderers.pixels import Latents, Pixels, grey
from lmc.renderers.scene import Scene
from lmc.renderers.svg import SVG


@dataclass(frozen=True, eq=False)
class Start:
    """What a renderer begins from.

    Attributes:
        prior: the diffusion model; not loaded yet, but its `image_size` is known.
        seeds: B, of the images that it is to render.
        size: of the images in pixels, height and width; a square without an image.
        image: to begin with, (B, 3, H, W) in [-1, 1], of `lmc edit`; None from nothing.
        file: that the image was read from.
        generator: on the CPU, of the first seed, for what is drawn at random.
    """

    prior: Prior
    seeds: Sequence[int]
    size: tuple[int, int]
    image: Tensor | None = None
    file: Path | None = None
    generator: torch.Generator = field(init=False)

    def __post_init__(self) -> None:
        # The steps draw from another one of the same seed.
        generator = torch.Generator().manual_seed(self.seeds[0] ^ 0x5EED)
        object.__setattr__(self, "generator", generator)  # frozen


class Optimised(nn.Module):
    """The base of what `--renderer` names: a `Renderer` whose constructor takes a `Start` first.

    The arguments after it are its options. It may also be a `ViewRenderer`, a `GroupedRenderer` and
    a `SavedRenderer`.

    Attributes:
        batched: it renders all seeds' images at once; else there is one for each seed, one after
            the other.
    """

    batched: bool = False


class pixels(Pixels, Optimised):
    """Pixels, from grey or the image."""

    batched = True

    def __init__(self, start: Start) -> None:
        super().__init__(_image(start))


class latents(Latents, Optimised):
    """z of the prior's VAE, from grey or the image; whole images only.

    Raises:
        ValueError: the prior has no latents, or images of another size.
    """

    batched = True

    def __init__(self, start: Start) -> None:
        if not start.prior.latent:
            raise ValueError("latents: the prior has none, its z are pixels")
        super().__init__(start.prior, _image(start))


class svg(Drawing, Optimised):
    """Filled paths, from random ones or those of an SVG file.

    Args:
        start: see `Start`.
        paths: how many, where they are random.
        segments: of each of those.
        anew: steps between two looks for paths that have vanished, which start anew in the first
            half of the run; 0 is never. The default is 50, and 0 for a file's.
        options: further ones of `Drawing`.

    Raises:
        OSError, ValueError: see `Drawing`, `SVG.read`; or the image to begin with is no SVG.
    """

    def __init__(
        self,
        start: Start,
        paths: int = 64,
        segments: int = 4,
        anew: int | None = None,
        **options: Any,
    ) -> None:
        if start.image is None:
            drawn = SVG.random(paths, start.size[0], start.generator, segments)
        elif start.file is None or start.file.suffix.lower() != ".svg":
            raise ValueError(f"svg: begins with an SVG file, which {start.file} is not")
        else:
            drawn = SVG.read(start.file, start.size)
        if anew is None:
            anew = 50 if start.image is None else 0
        super().__init__(drawn, anew=anew, **options)


class scene(OrbitedScene, Optimised):
    """A 3D scene of voxels, seen from random cameras; the defaults are DreamFusion's.

    Its views are no larger than the prior's images, to which they would be resized.

    Args:
        start: see `Start`.
        resolution: voxels' vertices along a side at first.
        finer: resolutions by the share of the run after which they are those.
        radius: of the ball that the scene is in.
        samples: of a ray.
        blob: the parameter of the density at the origin, at first.
        blob_radius: where it is 0.
        distance: of cameras to the origin, least and most.
        field_of_view: of cameras, in degrees.
        elevation: of cameras, in degrees.
        azimuth: of cameras, in degrees; 0 is in front, [-30, 30] keeps there.
        random_background: the share of draws whose backgrounds have random colours.
        views: a step.
        lr: Adam's.
        ambient: the share of the run in which a surface just has its colour; after it, light.
        sparsity: weight of this regulariser; of two numbers it goes from the first to the second in
            the first half of the run.
        opacity: likewise.
        orientation: likewise.
        suffixes: whether prompts say from where a view is, such as ', back view'.

    Raises:
        ValueError: see `Scene`, `Orbits`, `OrbitedScene`; or there is an image to begin with.
    """

    def __init__(
        self,
        start: Start,
        resolution: int = 32,
        finer: dict[float, int] | None = None,
        radius: float = 1.0,
        samples: int = 64,
        blob: float = 10.0,
        blob_radius: float = 0.5,
        distance: Range = (1.5, 2.0),
        field_of_view: Range = (40.0, 70.0),
        elevation: Range = (-10.0, 90.0),
        azimuth: Range = (-180.0, 180.0),
        random_background: float = 0.0,
        views: int = 1,
        lr: float = 0.01,
        ambient: float = 0.2,
        sparsity: float | tuple[float, float] = 1.0,
        opacity: float | tuple[float, float] = 0.0,
        orientation: float | tuple[float, float] = 0.0,
        suffixes: bool = True,
    ) -> None:
        if start.image is not None:
            raise ValueError("scene: begins with no image: lmc synthesize makes one")
        super().__init__(
            Scene(resolution, radius, samples, blob, blob_radius),
            Orbits(distance, field_of_view, elevation, azimuth, random_background),
            min(start.size[0], start.prior.image_size),
            views,
            lr,
            ambient,
            {"sparsity": sparsity, "opacity": opacity, "orientation": orientation},
            finer,
        )
        self.suffixes = SUFFIXES if suffixes else ("",) * len(SUFFIXES)


def _image(start: Start) -> Tensor:
    """What pictures begin with: the image, or grey."""
    return grey(len(start.seeds), start.size[0]) if start.image is None else start.image


def check_renderer(renderer: Optimised, count: int) -> None:
    """Refuse what does not render as `Renderer` says.

    Args:
        renderer: what was made of a `Start`.
        count: of its seeds.

    Raises:
        ValueError: it does not; names its class.
    """
    name = f"{type(renderer).__module__}.{type(renderer).__qualname__}"
    if isinstance(renderer, Latents):  # which renders only when the prior is loaded
        return
    if not any(parameter.requires_grad for parameter in renderer.parameters()):
        raise ValueError(f"{name} has no parameters to optimise")
    with torch.no_grad():
        try:
            image = renderer()
        except (NotImplementedError, TypeError) as error:
            raise ValueError(f"{name} renders nothing: {error}") from error
    got = tuple(image.shape) if isinstance(image, Tensor) else type(image).__name__
    if not isinstance(image, Tensor) or image.ndim != 4 or image.shape[:2] != (count, 3):
        raise ValueError(f"{name} must render ({count}, 3, height, width), got {got}")
