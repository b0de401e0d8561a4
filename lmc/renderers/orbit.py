"""A scene as what score distillation optimises: views at random, light, finer voxels in time."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lmc.errors import require
from lmc.renderers.cameras import SUFFIXES, Orbits
from lmc.renderers.protocol import Seen
from lmc.renderers.scene import Scene, Shading, vertices

SURFACE = 10.0  # the density of it in a mesh
REGULARISERS = ("sparsity", "opacity", "orientation")


class OrbitedScene(nn.Module):
    """A `ViewRenderer` and `GroupedRenderer` of a scene, as DreamFusion optimises one.

    Args:
        scene: what is optimised.
        orbits: where cameras are drawn from.
        size: of the views in pixels.
        views: a step.
        lr: Adam's; its betas are 0.9 and 0.99.
        ambient: the share of the run in which a surface just has its colour. After it half of the
            steps see it in diffuse light, and half so without colours.
        weights: of the regularisers, see `Scene.regularisers`; of two numbers it goes from the
            first to the second along a line, in the first half of the run.
        finer: resolutions by the share of the run after which the voxels become as fine as that;
            ever finer.

    Raises:
        ValueError: an argument out of its range, or a camera inside the scene.
    """

    suffixes: Sequence[str] = SUFFIXES

    def __init__(
        self,
        scene: Scene,
        orbits: Orbits,
        size: int = 64,
        views: int = 1,
        lr: float = 0.01,
        ambient: float = 0.2,
        weights: Mapping[str, float | tuple[float, float]] | None = None,
        finer: Mapping[float, int] | None = None,
    ) -> None:
        super().__init__()
        require(views >= 1, "views", "at least 1", views)
        require(lr > 0, "lr", "above 0", lr)
        require(0 <= ambient <= 1, "ambient", "a share of the run, 0 … 1", ambient)
        self.weights: dict[str, float | tuple[float, float]] = {"sparsity": 1.0, **(weights or {})}
        for name in self.weights:
            require(name in REGULARISERS, "weights", f"of {', '.join(REGULARISERS)}", name)
        self.finer, before = dict(sorted((finer or {}).items())), scene.resolution
        for share, resolution in self.finer.items():
            require(0 < share <= 1, "finer", "by shares of the run, above 0 and at most 1", share)
            what = f"ever finer, above {before} after {share:g} of the run"
            require(resolution > before, "finer", what, resolution)
            before = resolution
        scene.check(orbits.distance[0])
        self.scene, self.orbits, self.size, self.views = scene, orbits, size, views
        self.lr, self.ambient = lr, ambient

    def forward(self) -> Tensor:
        """The scene from the front, (1, 3, size, size) in [-1, 1]."""
        return self.scene(self.orbits.turntable(1, self._elevation), self.size)

    @property
    def _elevation(self) -> float:
        """That it is shown from: a little above, where cameras are drawn there."""
        low, high = self.orbits.elevation
        return min(max(15.0, low), high)

    def see(self, step: int, steps: int, generator: torch.Generator) -> Seen:
        """See `ViewRenderer`."""
        cameras = self.orbits.draw(self.views, generator)
        lit = step >= self.ambient * steps
        drawn = float(torch.rand((), generator=generator))
        shading: Shading = "ambient"
        if lit:
            shading = "diffuse" if drawn < 0.5 else "textureless"
        rendering = self.scene.render(cameras, self.size, shading, generator)
        weights = {name: _between(each, 2 * step / steps) for name, each in self.weights.items()}
        weights = {name: weight for name, weight in weights.items() if weight}
        terms = self.scene.regularisers(rendering) if weights else {}
        penalty = sum(weight * terms[name] for name, weight in weights.items())
        return Seen(rendering.image, cameras.suffix, penalty)

    def groups(self, step: int, steps: int) -> list[dict[str, Any]]:
        """See `GroupedRenderer`."""
        return [{**group, "betas": (0.9, 0.99)} for group in self.scene.parameter_groups(self.lr)]

    def after(self, step: int, steps: int, generator: torch.Generator) -> None:
        """Make the voxels finer where it is time."""
        for share, resolution in self.finer.items():
            if step + 1 == max(1, round(share * steps)):
                self.scene.upsample(resolution)

    def save(self, folder: Path, stems: Sequence[str]) -> None:
        """Write STEM/, see `Scene.save`, the surface as STEM.ply, and STEM.gif, a turntable.

        The surface is where the density is `SURFACE`, or half its most in the ball where that is
        less; where there is nothing, no STEM.ply is written.
        """
        stem, scene = stems[0], self.scene
        scene.save(folder / stem)
        inside = vertices(scene.resolution, scene.radius).norm(dim=-1) <= scene.radius
        most = float((F.softplus(scene.density.detach()[0, 0]).cpu() * inside).max())
        if most > 0:
            scene.export_ply(folder / f"{stem}.ply", min(SURFACE, most / 2))
        gif = folder / f"{stem}.gif"
        scene.turntable_gif(gif, size=self.size, orbits=self.orbits, elevation=self._elevation)


def _between(weight: float | tuple[float, float], share: float) -> float:
    """A weight at a share of its way."""
    first, last = (weight, weight) if isinstance(weight, int | float) else weight
    return first + (last - first) * min(1.0, share)
