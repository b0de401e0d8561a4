"""The surface of a field on a grid as triangles, by surface nets [Gibson 1998], and PLY files."""

from itertools import product
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from lmc.files import whole

CORNERS = tuple(product((0, 1), repeat=3))  # of a cell of the grid: z, y, x
EDGES = tuple(
    (a, b)
    for a, b in product(CORNERS, CORNERS)
    if a < b and sum(p != q for p, q in zip(a, b, strict=True)) == 1
)


def surface(field: Tensor, level: float) -> tuple[Tensor, Tensor]:
    """Where a field is `level`: a closed mesh, a vertex a cell, a square of two triangles an edge.

    Args:
        field: (D, H, W), interpolated between its points, and 0 beyond them.
        level: above 0.

    Returns:
        Vertices (V, 3), x, y, z in steps of the grid (x along W), and faces int64 (F, 3), whose
        corners run anticlockwise as seen from where the field is less.
    """
    field = F.pad(field, (1,) * 6)
    sides = [n - 1 for n in field.shape]

    def shifted(corner: tuple[int, ...]) -> Tensor:
        z, y, x = (slice(o, o + n) for o, n in zip(corner, sides, strict=True))
        return field[z, y, x]

    total, count = field.new_zeros(*sides, 3), field.new_zeros(sides)
    for a, b in EDGES:
        low, high = shifted(a), shifted(b)
        crosses = (low > level) != (high > level)
        share = torch.where(crosses, (level - low) / (high - low), 0)
        at = field.new_tensor(a) + share[..., None] * (field.new_tensor(b) - field.new_tensor(a))
        total += torch.where(crosses[..., None], at, 0)
        count += crosses
    cells = count.nonzero()
    points = cells + total[count > 0] / count[count > 0][:, None] - 1  # of the field unpadded
    number = torch.full(sides, -1)
    number[tuple(cells.T)] = torch.arange(len(cells))
    faces = []
    for axis in range(3):
        following = field.roll(-1, axis)
        entering = (field > level) & (following <= level)
        leaving = (field <= level) & (following > level)
        # The four cells around an edge, in a turn about its axis. z, y, x is left-handed.
        v, u = ((axis + 1) % 3, (axis + 2) % 3)
        for where, turn in ((entering, 1), (leaving, -1)):
            edges = where.nonzero()
            around = []
            for back_u, back_v in ((0, 0), (1, 0), (1, 1), (0, 1))[::turn]:
                cell = edges.clone()
                cell[:, u] -= back_u
                cell[:, v] -= back_v
                around.append(number[tuple(cell.T)])
            square = torch.stack(around, dim=1)
            faces += [square[:, [0, 1, 2]], square[:, [0, 2, 3]]]
    return points.flip(1), torch.cat(faces)


def write_ply(file: Path, points: Tensor, faces: Tensor, colours: Tensor) -> None:
    """Write a mesh as binary PLY.

    Args:
        file: to write, whole or not at all.
        points: (V, 3).
        faces: numbers of points, (F, 3).
        colours: of the points, (V, 3) in [0, 1].
    """
    kinds = {**dict.fromkeys("xyz", "float"), **dict.fromkeys(("red", "green", "blue"), "uchar")}
    types = [(name, "<f4" if kind == "float" else "u1") for name, kind in kinds.items()]
    vertex = np.empty(len(points), types)
    for name, value in zip(kinds, [*points.T, *(colours.T * 255).round()], strict=True):
        vertex[name] = value.cpu().numpy()
    face = np.empty(len(faces), [("count", "u1"), ("points", "<i4", 3)])
    face["count"], face["points"] = 3, faces.cpu().numpy()
    header = [
        *("ply", "format binary_little_endian 1.0", f"element vertex {len(points)}"),
        *(f"property {kind} {name}" for name, kind in kinds.items()),
        *(f"element face {len(faces)}", "property list uchar int vertex_indices", "end_header\n"),
    ]
    with whole(file) as partial:
        partial.write_bytes("\n".join(header).encode() + vertex.tobytes() + face.tobytes())
