"""What share of each pixel lies inside an outline, exactly, with its gradient.

As font rasterisers do it, from the outline alone: its lines are cut at the edges of the pixels, and
each piece adds the signed area beside it. What is stored and computed grows with the length of the
outlines, not with pixels times lines as for distances to them, and the gradient is that of the
areas, right too where a shape is thinner than a pixel. Where an outline crosses itself the signed
areas are added, so that the one pixel of the crossing is off by what overlaps or cancels within it.
"""

import math

import torch
from torch import Tensor

FLATNESS = 0.02  # pixels by which the lines that stand for a curve may miss it
MOST_LINES = 256  # for one curve, should an optimisation throw its points far away
FLAT = 1e-6  # pixels; what is flatter is not cut across, which would divide by it


def flatten(controls: Tensor) -> tuple[Tensor, Tensor]:
    """Cubic Béziers as lines: as many as their bend asks for, evenly in their parameter.

    Args:
        controls: float (N, 4, 2), in pixels.

    Returns:
        Start and end of each line, (L, 2, 2), and of which curve it is, int64 (L,).
    """
    bend = (controls[:, :-2] - 2 * controls[:, 1:-1] + controls[:, 2:]).detach()
    # lines are at most 6/8 of that, over their number squared, away from a cubic
    count = (0.75 / FLATNESS * bend.norm(dim=-1).amax(-1)).sqrt().ceil()
    count = count.clamp(max=MOST_LINES).long().clamp(1, MOST_LINES)  # again: of NaN it is any
    curve, number = _repeat(count)
    t = number[:, None] + number.new_tensor([0, 1])
    t = (t / count[curve, None]).to(controls)[..., None]
    u = 1 - t
    basis = torch.cat([u**3, 3 * u**2 * t, 3 * u * t**2, t**3], -1)[..., None]
    return (basis * controls[curve, None]).sum(-2), curve


def areas(
    lines: Tensor, path: Tensor, paths: int, height: int, width: int
) -> list[tuple[Tensor, Tensor]]:
    """What closed outlines add to the pixels, for `coverage`.

    Args:
        lines: (L, 2, 2), those of a path together.
        path: int64 (L,), of which path each is.
        paths: how many there are.

    Returns:
        Of each path, flat indices (M, 2) of a height x (width + 1) raster and what is added there,
        (M, 2). Summed along a row from the left, that is the mean over a pixel of how often, and
        with which sign, the path winds around its points.
    """
    pieces, row, which = _cut(lines, 1, height)
    path = path[which]
    seen = (row >= 0) & (row < height)
    pieces, row, path = pieces[seen], row[seen], path[seen]
    pieces, column, which = _cut(pieces, 0, width)
    row, path = row[which], path[which]
    seen = column < width  # what is right of the raster has no pixel to its right
    pieces, column, row, path = pieces[seen], column[seen], row[seen], path[seen]
    rise = pieces[:, 1, 1] - pieces[:, 0, 1]
    left = pieces[..., 0].mean(-1) - column  # the share of its pixel's width left of a piece
    left = torch.where(column < 0, 1, left)
    at = row * (width + 1) + column.clamp(min=0)
    index = torch.stack([at, at + (column >= 0)], -1)
    area = torch.stack([rise * (1 - left), rise * left], -1)
    counts = torch.bincount(path, minlength=paths).tolist()
    return list(zip(index.split(counts), area.split(counts), strict=True))


def coverage(index: Tensor, area: Tensor, height: int, width: int) -> Tensor:
    """The share of each pixel that is inside a path by the nonzero rule, (H, W) in [0, 1].

    Args:
        index: (M, 2), see `areas`.
        area: (M, 2).
    """
    winding = area.new_zeros(height * (width + 1)).index_add(0, index.flatten(), area.flatten())
    winding = winding.view(height, -1).cumsum(-1)[:, :-1]
    # An edge between two pixels, one at 1 and one at 0, must not stay there for want of a gradient,
    # and those of |x| and `clamp` are 0 where they bend. Outside, the gradient is that of growing:
    # for this an outline that runs the other way is made to run this way.
    winding = torch.where(winding.detach().sum() < 0, -winding, winding)
    winding = torch.where(winding < 0, -winding, winding)
    return torch.where(winding > 1, 1, winding)


def _repeat(count: Tensor) -> tuple[Tensor, Tensor]:
    """0, 1, …, each `count` times, and beside each how often it was there before."""
    which = torch.repeat_interleave(count)
    return which, torch.arange(len(which), device=count.device) - (count.cumsum(0) - count)[which]


def _cut(lines: Tensor, axis: int, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Lines cut where the coordinate `axis` is one of 0, 1, …, `size`.

    A line that ends at such a place has a piece, of no length, on its other side too: the gradient
    of its end is that of moving on, for this line and the next alike.

    Args:
        lines: (L, 2 ends, 2).

    Returns:
        Pieces (M, 2, 2), in order; the cell of each (M,), from -1, below 0, to `size`, above; and
        of which line it is (M,).
    """
    ends = lines[..., axis]
    flat = (ends[:, 1] - ends[:, 0]).detach().abs() < FLAT
    cells = ends.detach().floor().clamp(-1, size).long()
    cells = torch.where(flat[:, None], cells[:, :1], cells)
    low, high = cells.aminmax(dim=-1)
    which, number = _repeat(high - low + 1)
    cell = low[which] + number
    lines, ends, flat = lines[which], ends[which], flat[which, None]
    below = torch.where(cell < 0, -math.inf, cell)[:, None].to(ends)
    above = torch.where(cell < size, cell + 1, math.inf)[:, None].to(ends)
    cut = torch.where(ends < above, torch.where(ends < below, below, ends), above)
    length = torch.where(flat, 1, ends[:, 1:] - ends[:, :1])
    share = torch.where(flat, ends.new_tensor([0, 1]), (cut - ends[:, :1]) / length)
    other = lines[..., 1 - axis]
    across = other[:, :1] + share * (other[:, 1:] - other[:, :1])
    cut = torch.where(flat, ends, cut)
    return torch.stack([cut, across] if axis == 0 else [across, cut], -1), cell, which
