"""A 3D scene as the parameters: a voxel radiance field, rendered by volume [METHOD section 10]."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from lmc.errors import require
from lmc.files import read_json, whole, write_json
from lmc.renderers.cameras import SUFFIXES, Cameras, Orbits
from lmc.renderers.mesh import surface, write_ply
from lmc.shards.images import to_uint8

__all__ = ["SUFFIXES", "Cameras", "Orbits", "Rendering", "Scene"]

AMBIENT = 0.1  # share of a surface's light that comes from everywhere, under diffuse light
FLAT = 0.1  # slope of the density, before its softplus, that is far below any surface's
TENSORS, CONFIG = "scene.safetensors", "config.json"

Shading = Literal["ambient", "diffuse", "textureless"]


@dataclass(frozen=True, eq=False)
class Rendering:
    """N views, and what their regularisers are made of: the K samples that were not skipped.

    Attributes:
        image: (N, 3, S, S) in [-1, 1].
        opacity: what hides the background, (N, S, S) in [0, 1].
        weights: each sample's share of its pixel, (K,); with 1 - opacity those of a pixel sum to 1.
        points: where the samples are, (K, 3).
        directions: of their rays, away from the camera, (K, 3).
    """

    image: Tensor
    opacity: Tensor
    weights: Tensor
    points: Tensor
    directions: Tensor


class Scene(nn.Module):
    """Density and colour on the vertices of a cube of voxels; the scene is the ball inside it.

    Between vertices both are interpolated trilinearly, the density before its softplus, the colour
    before its sigmoid. It begins as a grey blob, softplus(blob (1 - ‖x‖ / blob_radius)) [Magic3D].

    Args:
        resolution: vertices along a side.
        radius: of the ball. DreamFusion's is 2 with the cameras inside it, though a scene starts
            and stays within 1; here they are outside, and no voxel is spent on where they are.
        samples: of a ray, along its chord of the ball.
        blob: the parameter of the density at the origin.
        blob_radius: where it is 0.
        tolerance: by how much, in [-1, 1], skipping samples may change a pixel. What hardly has
            density and what is behind opaque things is skipped; neither learns anything then.

    Raises:
        ValueError: an argument out of its range.
    """

    def __init__(
        self,
        resolution: int = 32,
        radius: float = 1.0,
        samples: int = 64,
        blob: float = 10.0,
        blob_radius: float = 0.5,
        tolerance: float = 1e-3,
    ) -> None:
        super().__init__()
        require(resolution >= 2, "resolution", "at least 2", resolution)
        require(0 < radius < math.inf, "radius", "above 0", radius)
        require(samples >= 1, "samples", "at least 1", samples)
        require(blob_radius > 0, "blob_radius", "above 0", blob_radius)
        require(0 <= tolerance < 1, "tolerance", "at least 0 and below 1", tolerance)
        self.radius, self.samples, self.tolerance = radius, samples, tolerance
        # The blob is what the parameter begins with. Added to it afterwards, as published, it would
        # be the same function with the same gradients, and Adam would take the same steps.
        far = vertices(resolution, radius).norm(dim=-1)
        self.density = nn.Parameter(blob * (1 - far / blob_radius)[None, None])
        self.colour = nn.Parameter(torch.zeros(1, 3, *far.shape))
        self.background = nn.Parameter(torch.zeros(3))

    @property
    def resolution(self) -> int:
        """Vertices along a side."""
        return self.density.shape[-1]

    def parameter_groups(self, lr: float) -> list[dict[str, Any]]:
        """For an optimiser: the background learns at a tenth of the rate, as in DreamFusion."""
        field = {"params": [self.density, self.colour], "lr": lr}
        return [field, {"params": [self.background], "lr": lr / 10}]

    def upsample(self, resolution: int) -> None:
        """Go on with finer voxels, the same function up to interpolation.

        It is exactly the same at 2 resolution - 1. The parameters are new: so must the optimiser
        be.

        Raises:
            ValueError: `resolution` is not finer.
        """
        finer = resolution > self.resolution
        require(finer, "resolution", f"above the scene's {self.resolution}", resolution)
        for name in ("density", "colour"):
            grid = getattr(self, name).detach()
            fine = F.interpolate(grid, size=[resolution] * 3, mode="trilinear", align_corners=True)
            setattr(self, name, nn.Parameter(fine))

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        # what is loaded may be of finer voxels
        for name in ("density", "colour"):
            there, here = state_dict.get(f"{prefix}{name}"), getattr(self, name)
            if there is not None and there.shape != here.shape:
                setattr(self, name, nn.Parameter(here.new_empty(there.shape)))
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def check(self, distance: float) -> None:
        """Refuse a camera at this distance from the origin, or nearer, that is in the scene.

        Raises:
            ValueError: it is.
        """
        what = f"above the scene's radius of {self.radius:g}, or the camera is inside the scene"
        require(distance > self.radius, "distance", what, distance)

    def forward(
        self,
        cameras: Cameras,
        size: int,
        shading: Shading = "ambient",
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """The image of `render`, (N, 3, size, size) in [-1, 1]."""
        return self.render(cameras, size, shading, generator).image

    def render(
        self,
        cameras: Cameras,
        size: int,
        shading: Shading = "ambient",
        generator: torch.Generator | None = None,
    ) -> Rendering:
        """Views by volume rendering: a sample of density σ stands for its step δ of the ray.

            weight_i = exp(-Σ_{j<i} σ_j δ) (1 - exp(-σ_i δ))
            pixel    = Σ_i weight_i colour_i + exp(-Σ_j σ_j δ) background

        Args:
            cameras: N, outside the scene.
            size: of the views in pixels.
            shading: 'ambient': a surface has its colour; 'diffuse': times
                0.1 + 0.9 max(0, normal · light); 'textureless': so, with all colours white.
            generator: draws each sample within its step, for training, on any device; None: they
                are in the middle.

        Raises:
            ValueError: a camera inside the scene, an unknown shading, no pixels.
        """
        known = get_args(Shading)
        require(shading in known, "shading", f"one of {', '.join(known)}", repr(shading))
        require(size >= 1, "size", "at least 1", size)
        self.check(float(cameras.distance.min()))
        with torch.no_grad():
            origins = cameras.position[:, None, None].expand(-1, size, size, -1)
            origin = origins.reshape(-1, 3).to(self.density)
            direction = cameras.rays(size).reshape(-1, 3).to(self.density)
            places, step = self._places(origin, direction, generator)
            points = origin[:, None] + places[..., None] * direction[:, None]
            kept = self.occupied(points) & (step > 0)[:, None]
            points, ray = points[kept], kept.nonzero()[:, 0]
        sigma = self.densities(points)
        thickness = sigma.new_zeros(kept.shape).masked_scatter(kept, sigma) * step[:, None]
        before = thickness.cumsum(1) - thickness
        weight = (torch.exp(-before) * -torch.expm1(-thickness))[kept]
        through = torch.exp(-thickness.sum(1))
        seen = torch.exp(-before.detach()[kept]) >= self.tolerance / 4
        points, ray, weight = points[seen], ray[seen], weight[seen]
        if shading == "textureless":
            colour = torch.ones_like(points)
        else:
            colour = self._read(self.colour, points).sigmoid()
        if shading != "ambient":
            back = cameras.axes[:, 2] if cameras.light is None else cameras.light
            light = back.to(self.density)[ray.div(size * size, rounding_mode="floor")]
            facing = (self.normals(points) * light).sum(1, keepdim=True).clamp(min=0)
            colour = colour * (AMBIENT + (1 - AMBIENT) * facing)
        behind = self.background.sigmoid()[None]
        if cameras.background is not None:
            behind = ((cameras.background + 1) / 2).to(self.density).repeat_interleave(size**2, 0)
        pixels = (through[:, None] * behind).index_add(0, ray, weight[:, None] * colour)
        shape = (len(cameras), size, size)
        image = (pixels * 2 - 1).unflatten(0, shape).permute(0, 3, 1, 2)
        return Rendering(image, (1 - through).view(shape), weight, points, direction[ray])

    def regularisers(self, rendering: Rendering) -> dict[str, Tensor]:
        """What keeps a scene plausible, by name, scalars, to be weighed.

        sparsity     mean over pixels of sqrt(opacity² + 0.01)
        opacity      mean over pixels of its entropy, -o log o - (1 - o) log(1 - o): all or
                     nothing; o within 0.001 … 0.999
        orientation  Σ w max(0, normal · direction)² / Σ w over the samples, no gradient through
                     w: what is seen faces the camera [Ref-NeRF]
        """
        opaque = rendering.opacity.clamp(1e-3, 1 - 1e-3)
        away = (self.normals(rendering.points) * rendering.directions).sum(1).clamp(min=0)
        weights = rendering.weights.detach()
        return {
            "sparsity": (rendering.opacity.square() + 0.01).sqrt().mean(),
            "opacity": -(opaque * opaque.log() + (1 - opaque) * (1 - opaque).log()).mean(),
            "orientation": (weights * away.square()).sum() / weights.sum().clamp(min=1e-6),
        }

    def densities(self, points: Tensor) -> Tensor:
        """Density per length at points (K, 3) of the ball, (K,), at least 0."""
        return F.softplus(self._read(self.density, points)[:, 0])

    def normals(self, points: Tensor) -> Tensor:
        """Where the density falls most, at points (K, 3) of the ball: (K, 3).

        Of unit length at a surface; shorter, down to 0, where nothing changes. From central
        differences at the vertices, because grid_sample has no second derivative.
        """
        spacing = 2 * self.radius / (self.resolution - 1)
        slopes = torch.stack(torch.gradient(self.density[0, 0], spacing=spacing)[::-1])  # x first
        fall = -self._read(slopes[None], points)
        return fall / (fall.square().sum(1, keepdim=True) + FLAT**2).sqrt()

    def occupied(self, points: Tensor) -> Tensor:
        """Whether points (..., 3) of the ball are in voxels where anything is, bool (...).

        A voxel is empty where no vertex of it has the density that, all along a diameter, would
        change a pixel by half the tolerance. The occupancy grid is made anew each time: that costs
        less than a look at the samples.
        """
        if not self.tolerance:
            return torch.ones_like(points[..., 0], dtype=torch.bool)
        bound = math.log(math.expm1(self.tolerance / (8 * self.radius)))  # before the softplus
        voxels = self.density.detach()[0, 0] > bound
        voxels = voxels[1:] | voxels[:-1]
        voxels = voxels[:, 1:] | voxels[:, :-1]
        voxels = voxels[..., 1:] | voxels[..., :-1]
        cells = self.resolution - 1
        x, y, z = (((points / self.radius + 1) / 2 * cells).long().clamp(0, cells - 1)).unbind(-1)
        return voxels.flatten()[(z * cells + y) * cells + x]

    def _places(
        self, origin: Tensor, direction: Tensor, generator: torch.Generator | None
    ) -> tuple[Tensor, Tensor]:
        """Distances (R, samples) of samples along R rays, and the step that each stands for, (R,).

        A ray that misses the ball has steps of 0.
        """
        nearest = -(origin * direction).sum(1)
        beside = origin.square().sum(1) - nearest.square()
        half = (self.radius**2 - beside).clamp(min=0).sqrt()
        step = 2 * half / self.samples
        within: Any = 0.5
        if generator is not None:
            shape = (len(origin), self.samples)
            within = torch.rand(shape, generator=generator, device=generator.device).to(step)
        count = torch.arange(self.samples, device=step.device) + within
        return (nearest - half)[:, None] + step[:, None] * count, step

    def _read(self, grid: Tensor, points: Tensor) -> Tensor:
        """(1, C, R, R, R) at points (K, 3): (K, C)."""
        where = (points / self.radius)[None, None, None]
        return F.grid_sample(grid, where, align_corners=True)[0, :, 0, 0].T

    def save(self, folder: Path) -> None:
        """Write scene.safetensors and config.json into a folder, which is made."""
        with whole(folder / TENSORS) as partial:
            save_file({k: v.contiguous() for k, v in self.state_dict().items()}, partial)
        options = {name: getattr(self, name) for name in ("radius", "samples", "tolerance")}
        write_json(folder / CONFIG, options)

    @classmethod
    def load(cls, folder: Path) -> "Scene":
        """What `save` wrote.

        Raises:
            OSError: a file is not there.
            ValueError: a file is not what was written; names it.
        """
        options = read_json(folder / CONFIG, ("radius", "samples", "tolerance"))
        try:
            tensors = load_file(folder / TENSORS)
            scene = cls(tensors["density"].shape[-1], **options).to(tensors["density"].dtype)
            scene.load_state_dict(tensors)
        except (SafetensorError, ValueError, LookupError, TypeError, RuntimeError) as error:
            raise ValueError(f"{folder} holds no scene: {error}") from error
        return scene

    @torch.no_grad()
    def export_ply(self, file: Path, density: float = 10.0) -> None:
        """Write the surface where the density is this as a mesh with colours, PLY; y is up.

        Raises:
            ValueError: there is none.
        """
        inside = vertices(self.resolution, self.radius).norm(dim=-1) <= self.radius
        field = F.softplus(self.density[0, 0]).cpu() * inside
        most = float(field.max())
        require(0 < density < most, "density", f"below the scene's most, {most:.3g}", density)
        points, faces = surface(field, density)
        points = (points / (self.resolution - 1) * 2 - 1) * self.radius
        colours = self._read(self.colour, points.to(self.density)).sigmoid()
        write_ply(file, points, faces, colours)

    @torch.no_grad()
    def turntable_gif(
        self,
        file: Path,
        frames: int = 60,
        size: int = 128,
        orbits: Orbits | None = None,
        elevation: float = 15.0,
        shading: Shading = "ambient",
    ) -> None:
        """Write the views of `Orbits.turntable` as a GIF that repeats, in three seconds."""
        cameras, pictures = (orbits or Orbits()).turntable(frames, elevation), []
        for i in range(frames):  # one by one: memory
            pixels = to_uint8(self(cameras[i : i + 1], size, shading)[0]).permute(1, 2, 0)
            pictures.append(Image.fromarray(pixels.contiguous().cpu().numpy()))
        rest: Any = {"append_images": pictures[1:], "duration": max(20, 3000 // frames)}
        with whole(file) as partial:
            pictures[0].save(partial, format="gif", save_all=True, loop=0, **rest)


def vertices(resolution: int, radius: float) -> Tensor:
    """x, y and z of a grid's vertices, float32 (R, R, R, 3): z is the first index, x the last."""
    line = torch.linspace(-radius, radius, resolution)
    z, y, x = torch.meshgrid(line, line, line, indexing="ij")
    return torch.stack([x, y, z], dim=-1)
