"""Random square parts of images larger than the prior's, for a loss to see [LMC, Sec. 5.1, App. A].

Of a whole image resized to the prior's size, no gradient reaches what lies above that size's
frequencies. A part of it has them.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from lmc.shards.images import resize

Window = tuple[int, int, int]  # top, left and side in pixels of a square part of an image


def sides(
    given: tuple[int, int] | None, height: int, width: int, image_size: int, option: str
) -> tuple[int, int]:
    """Smallest and largest side of a patch of a height x width image, in pixels.

    Args:
        given: these, where the user says them; None: from `image_size`, or the image's shorter side
            if that is less, to the image's shorter side.
        image_size: the prior's.
        option: the name of `given`, for errors.

    Raises:
        ValueError: patches larger than the image.
    """
    short = min(height, width)
    low, high = given or (min(image_size, short), short)
    if high > short:
        raise ValueError(
            f"{option} [{low}, {high}]: patches of {high} pixels are larger than the image "
            f"of {width} x {height}"
        )
    return low, high


def draw_window(generator: torch.Generator, height: int, width: int, low: int, high: int) -> Window:
    """A random square inside a height x width image, its side uniform in low … high."""

    def below(end: int) -> int:
        return int(torch.randint(end, (), generator=generator))

    side = low + below(high - low + 1)
    return below(height - side + 1), below(width - side + 1), side


def crop(image: Tensor, rows: Sequence[int], windows: Sequence[Window], size: int) -> Tensor:
    """Parts of images, each `resize`d to `size`; differentiable.

    Args:
        image: (B, C, H, W).
        rows: of which image each part is, N numbers below B.
        windows: where in it, N.
        size: of all the parts.

    Returns:
        (N, C, size, size), as `image`.
    """
    return torch.cat(
        [
            resize(image[row : row + 1, :, y : y + side, x : x + side], size)
            for row, (y, x, side) in zip(rows, windows, strict=True)
        ]
    )
