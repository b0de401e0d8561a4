"""Vector graphics as what score distillation optimises: rates of their own, vanished paths anew."""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lmc.errors import require
from lmc.renderers.adam import ScheduledAdam
from lmc.renderers.protocol import Begun
from lmc.renderers.svg import SVG, learning_rate


class Drawing(nn.Module):
    """A `GroupedRenderer` of one SVG, as VectorFusion optimises it.

    Args:
        svg: what is optimised.
        points_lr: Adam's for the points, in pixels of the raster.
        colours_lr: for colours and opacity, in [0, 1].
        warm_up: the share of the run in which both rise to that; then they fall along a cosine.
        anew: steps between two looks for paths that have vanished, which start anew in the first
            half of the run; 0 is never.

    Raises:
        ValueError: an argument out of its range.
    """

    def __init__(
        self,
        svg: SVG,
        points_lr: float = 0.2,
        colours_lr: float = 0.02,
        warm_up: float = 0.1,
        anew: int = 50,
    ) -> None:
        super().__init__()
        require(points_lr > 0, "points_lr", "above 0", points_lr)
        require(colours_lr > 0, "colours_lr", "above 0", colours_lr)
        require(0 <= warm_up <= 1, "warm_up", "a share of the run, 0 … 1", warm_up)
        require(anew >= 0, "anew", "at least 0", anew)
        self.svg, self.points_lr, self.colours_lr = svg, points_lr, colours_lr
        self.warm_up, self.anew = warm_up, anew

    def forward(self) -> Tensor:
        """The raster, (1, 3, H, W) in [-1, 1]."""
        return self.svg()

    def groups(self, step: int, steps: int) -> list[dict[str, Any]]:
        """See `GroupedRenderer`."""
        share = learning_rate(step, steps, round(self.warm_up * steps))
        return self.svg.parameter_groups(self.points_lr * share, self.colours_lr * share)

    def after(self, step: int, steps: int, generator: torch.Generator) -> Begun | None:
        """Start paths anew that are hardly seen, or hardly there; see `GroupedRenderer`."""
        if not self.anew or (step + 1) % self.anew or step + 1 > steps / 2:
            return None
        return self.svg.reinitialise(generator, min_opacity=0.05, min_area=2.0)

    def save(self, folder: Path, stems: Sequence[str]) -> None:
        """Write STEM.svg."""
        self.svg.save(folder / f"{stems[0]}.svg")


def vectorise(
    drawing: Drawing,
    image: Tensor,
    steps: int,
    generator: torch.Generator,
    track: Callable[[range], Iterable[int]] = iter,
) -> None:
    """Fit a drawing to an image by Adam, at its rates: the mean squared difference of the raster.

    Args:
        drawing: begins as it is; changed in place.
        image: (1, 3, H, W) in [-1, 1], of the raster's size, on the drawing's device.
        steps: of Adam.
        generator: on the CPU; draws vanished paths anew.
        track: wraps the steps, to show progress.
    """
    adam = ScheduledAdam(partial(drawing.groups, steps=steps))
    for step in track(range(steps)):
        adam.down((drawing() - image).square().mean(), step)
        adam.forget(drawing.after(step, steps, generator))
