"""Random square parts of images larger than the prior's, for a loss to see [LMC, Sec. 5.1, App. A].

Of a whole image resized to the prior's size, no gradient reaches what lies above that size's
frequencies. A part of it has them.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lmc.device import to_device

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
    """Parts of images, each `resize`d to `size`, all at once; differentiable.

    Args:
        image: (B, C, H, W).
        rows: of which image each part is, N numbers below B.
        windows: where in it, N.
        size: of all the parts.

    Returns:
        (N, C, size, size), as `image`.
    """
    height, width = image.shape[-2:]
    numbers = torch.tensor([(row, *window) for row, window in zip(rows, windows, strict=True)])
    which, top, left, side = to_device(numbers.T, image.device)
    along_y = _averages(top, side, height, size, image.dtype)
    along_x = _averages(left, side, width, size, image.dtype)
    with torch.autocast(image.device.type, enabled=False):  # which would round the image
        return along_y[:, None] @ image[which] @ along_x[:, None].mT


def _averages(first: Tensor, side: Tensor, length: int, size: int, dtype: torch.dtype) -> Tensor:
    """`resize` of a part of a line as a matrix.

    The pixel i of `size` is the mean of those j of the part near i, weighed by a triangle that is
    as wide as two of the larger pixels: what bilinear interpolation with antialiasing is.

    Args:
        first, side: where the part begins and how many pixels it has, int64 (N,).
        length: of the line.
        size: what the part becomes.

    Returns:
        (N, size, length) of `dtype`.
    """
    like: Any = {"device": first.device, "dtype": dtype}
    scale = side[:, None, None].to(dtype) / size
    j = torch.arange(length, **like) - first[:, None, None]
    centre = (torch.arange(size, **like)[:, None] + 0.5) * scale
    near = 1 - (j + 0.5 - centre).abs() / scale.clamp(min=1)
    weight = torch.where((j >= 0) & (j < side[:, None, None]), near, 0).clamp(min=0)
    return weight / weight.sum(2, keepdim=True)
