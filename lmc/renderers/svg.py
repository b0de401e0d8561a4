"""Vector graphics: closed cubic Bézier paths whose points, colours and opacity are optimised."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lmc.errors import require
from lmc.renderers import raster, svg_file


class SVG(nn.Module):
    """Filled paths over a background, drawn in order, as a raster.

    Fill is nonzero, as SVG's default is: a contour inside another one that runs the other way is a
    hole. Parameters:

    * `points`, float32 (N, 3, 2), in the units of the viewBox: of each of the N segments of all
      contours, in order, its first point and its two control points. It ends where the next segment
      of its contour begins, the last one where the first does: contours are closed.
    * `colours`, float32 (P, 3), and `opacity`, float32 (P,), of each path, in [0, 1].
    * `background`, float32 (3,), in [0, 1]. It asks for no gradient unless the caller says
      `svg.background.requires_grad_()`.

    Colours and opacity are the values themselves, put back into [0, 1] when rendered: at a bound
    the gradient is as elsewhere, none is dead. Gradients are finite for any finite points, those of
    paths without area too.

    On CUDA sums are not deterministic, and rendering waits for the device.

    Args:
        paths: of each path its contours, float (S, 3, 2) each, as in `points`; any numbers of them
            and any S.
        colours: (P, 3) in [0, 1].
        opacity: (P,) in [0, 1].
        size: of the raster in pixels, height and width or one number for both. The viewBox is
            shown whole, in the middle.
        viewbox: left, top, width and height of what is seen.
        background: three values in [0, 1].

    Raises:
        ValueError: no paths, empty contours, other shapes, points that are not finite.
    """

    def __init__(
        self,
        paths: Sequence[Sequence[Tensor]],
        colours: Tensor,
        opacity: Tensor,
        size: int | tuple[int, int],
        viewbox: svg_file.Viewbox,
        background: Sequence[float] = (1.0, 1.0, 1.0),
    ) -> None:
        super().__init__()
        self.height, self.width = (size, size) if isinstance(size, int) else size
        require(min(self.height, self.width) >= 1, "size", "at least 1", size)
        require(min(viewbox[2:]) > 0, "viewbox", "of a width and height above 0", viewbox)
        contours = [contour for path in paths for contour in path]
        if not paths or not all(paths) or not all(map(len, contours)):
            raise ValueError("there must be a path, and every path and contour must have a segment")
        if any(contour.shape[1:] != (3, 2) for contour in contours):
            raise ValueError("contours must be (segments, 3 points, 2)")
        if colours.shape != (len(paths), 3) or opacity.shape != (len(paths),):
            raise ValueError(f"colours and opacity must be of the {len(paths)} paths")
        self.viewbox = viewbox
        self.sizes = [[len(contour) for contour in path] for path in paths]
        self.points = nn.Parameter(torch.cat(contours).detach().float())
        self.colours = nn.Parameter(colours.detach().float().clone())
        self.opacity = nn.Parameter(opacity.detach().float().clone())
        self.background = nn.Parameter(torch.tensor(background).float(), requires_grad=False)
        if not all(value.isfinite().all() for value in self.parameters()):
            raise ValueError("points, colours and opacity must be finite")
        after, offset = [], 0
        for count in map(len, contours):
            after.append(offset + (torch.arange(count) + 1) % count)
            offset += count
        path_of = torch.arange(len(paths)).repeat_interleave(torch.tensor([*map(sum, self.sizes)]))
        self._after: Tensor  # (N,), the segment at whose first point one ends
        self._path_of: Tensor  # (N,)
        self.register_buffer("_after", torch.cat(after), persistent=False)
        self.register_buffer("_path_of", path_of, persistent=False)

    @classmethod
    def random(cls, paths: int, size: int, generator: torch.Generator, segments: int = 4) -> "SVG":
        """Small blobs anywhere, of any colour, on white: what synthesis starts from [VectorFusion].

        Args:
            paths: how many.
            size: side of the raster, and of the viewBox.
            generator: on the CPU.
            segments: of each path.

        Raises:
            ValueError: not at least one path, segment or pixel.
        """
        for name, value in (("paths", paths), ("segments", segments), ("size", size)):
            require(value >= 1, name, "at least 1", value)
        viewbox = (0.0, 0.0, float(size), float(size))
        contours, colours, opacity = [], [], []
        for _ in range(paths):
            blob, colour, alpha = _blob([segments], viewbox, generator)
            contours.append(blob)
            colours.append(colour)
            opacity.append(alpha)
        return cls(contours, torch.stack(colours), torch.stack(opacity), size, viewbox)

    @classmethod
    def read(cls, file: Path, size: int | tuple[int, int]) -> "SVG":
        """An SVG file's paths; see `svg_file.read` for what is read and raised.

        Args:
            file: to read.
            size: of the raster.
        """
        drawing = svg_file.read(file)
        return cls(
            [[torch.from_numpy(contour) for contour in path] for path in drawing.paths],
            torch.tensor(drawing.colours),
            torch.tensor(drawing.opacity),
            size,
            drawing.viewbox,
            drawing.background,
        )

    @torch.no_grad()
    def save(self, file: Path) -> None:
        """Write an SVG file, whole or not at all; `read` gives the same parameters.

        Raises:
            OSError: it cannot be written.
        """
        self._put_back()
        contours = iter(self.points.cpu().double().split([n for path in self.sizes for n in path]))
        drawing = svg_file.Drawing(
            self.viewbox,
            tuple(self.background.tolist()),
            [[next(contours).numpy() for _ in path] for path in self.sizes],
            self.colours.tolist(),
            self.opacity.tolist(),
        )
        svg_file.write(file, drawing, self.height, self.width)

    def parameter_groups(self, points_lr: float, colours_lr: float) -> list[dict[str, Any]]:
        """For an optimiser: the points, and the colours, opacity and background.

        Args:
            points_lr: in pixels of the raster, so that it suits every viewBox.
            colours_lr: of values in [0, 1].
        """
        fills = [self.colours, self.opacity, self.background]
        return [
            {"params": [self.points], "lr": points_lr / self._placing()[0]},
            {"params": [value for value in fills if value.requires_grad], "lr": colours_lr},
        ]

    def forward(self) -> Tensor:
        """The raster, (1, 3, H, W) in [-1, 1], in the points' dtype.

        Each path is drawn anew for its gradient, so that of the pixels one picture a path is kept:
        64 paths of 4 segments take 110 MB at most at 256 x 256, with their gradient, and 430 MB at
        512 x 512 (measured on a CPU).
        """
        self._put_back()
        # copies: putting the parameters back must not spoil the gradient of a picture before
        fills = torch.cat([self.colours, self.opacity[:, None]], 1)
        image = self.background.clone()[:, None, None].expand(3, self.height, self.width)
        for fill, (index, area) in zip(fills, self._areas(), strict=True):
            args = (image, index, area, fill)
            image = checkpoint(self._over, *args, use_reentrant=False, preserve_rng_state=False)
        return 2 * image[None] - 1

    @torch.no_grad()
    def areas(self) -> Tensor:
        """Pixels that each path covers within the raster, (P,)."""
        return torch.stack(
            [
                raster.coverage(index, area, self.height, self.width).sum()
                for index, area in self._areas()
            ]
        )

    @torch.no_grad()
    def reinitialise(
        self, generator: torch.Generator, min_opacity: float, min_area: float
    ) -> dict[nn.Parameter, list[int]]:
        """Start paths that vanished anew, as blobs with as many segments, in their places in order.

        Args:
            generator: on the CPU.
            min_opacity: a path of less has vanished.
            min_area: likewise, in pixels within the raster.

        Returns:
            The rows of `points`, `colours` and `opacity` that they have.
        """
        vanished = (self.opacity < min_opacity) | (self.areas() < min_area)
        numbers = vanished.nonzero().flatten().tolist()
        starts = [0]
        for path in self.sizes:
            starts.append(starts[-1] + sum(path))
        for i in numbers:
            blob, colour, alpha = _blob(self.sizes[i], self.viewbox, generator)
            self.points[starts[i] : starts[i + 1]] = torch.cat(blob).to(self.points)
            self.colours[i], self.opacity[i] = colour.to(self.colours), alpha.to(self.opacity)
        rows = [row for i in numbers for row in range(starts[i], starts[i + 1])]
        return {self.points: rows, self.colours: numbers, self.opacity: numbers}

    @torch.no_grad()
    def _put_back(self) -> None:
        for value in (self.colours, self.opacity, self.background):
            value.clamp_(0, 1)

    def _placing(self) -> tuple[float, float, float]:
        """Pixels a unit of the viewBox, and the pixel of its origin: (x, y)."""
        left, top, width, height = self.viewbox
        scale = min(self.width / width, self.height / height)
        x, y = ((self.width - scale * width) / 2, (self.height - scale * height) / 2)
        return scale, x - scale * left, y - scale * top

    def _areas(self) -> list[tuple[Tensor, Tensor]]:
        """What `raster.areas` says of each path."""
        scale, x, y = self._placing()
        points = self.points * scale + self.points.new_tensor([x, y])
        lines, segment = raster.flatten(torch.cat([points, points[self._after, :1]], 1))
        count = len(self.sizes)
        return raster.areas(lines, self._path_of[segment], count, self.height, self.width)

    def _over(self, image: Tensor, index: Tensor, area: Tensor, fill: Tensor) -> Tensor:
        """A path over what is drawn before it, (3, H, W)."""
        share = fill[3] * raster.coverage(index, area, self.height, self.width)
        return image + share * (fill[:3, None, None] - image)


def learning_rate(step: int, steps: int, warm_up: int) -> float:
    """What to multiply learning rates by at `step`, counted from 0: a line up, then half a cosine.

    Args:
        steps: in all.
        warm_up: steps until it is 1; 0 begins there.
    """
    if step < warm_up:
        return (step + 1) / (warm_up + 1)
    return (1 + math.cos(math.pi * (step - warm_up) / max(1, steps - warm_up))) / 2


def _blob(
    sizes: Sequence[int], viewbox: svg_file.Viewbox, generator: torch.Generator
) -> tuple[list[Tensor], Tensor, Tensor]:
    """A small shape somewhere, with a contour of each number of segments; its colour and opacity.

    Its points lie around a circle of 2 % to 8 % of the viewBox.
    """

    def uniform(least: float, most: float, *shape: int) -> Tensor:
        return least + (most - least) * torch.rand(*shape, generator=generator)

    centre = torch.tensor(viewbox[:2]) + torch.tensor(viewbox[2:]) * uniform(0, 1, 2)
    radius = min(viewbox[2:]) * uniform(0.02, 0.08, 1)
    contours = []
    for count in sizes:
        angle = 2 * math.pi * torch.arange(3 * count) / (3 * count)
        around = torch.stack([angle.cos(), angle.sin()], -1)
        contour = centre + radius * uniform(0.7, 1.3, 3 * count, 1) * around
        contours.append(contour.view(count, 3, 2))
    return contours, uniform(0, 1, 3), uniform(0.7, 1, 1)[0]
