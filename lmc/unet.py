"""The papers' U-Net, shared by the corrector and the translator. Knows nothing of diffusion."""

import math
from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

ENCODING = 10  # dimensions of the frequency encoding [LMC, App. A]

Norm = Literal["none", "group"]


def frequency_encoding(x: Tensor, dim: int = ENCODING) -> Tensor:
    """sin(2^k π x), cos(2^k π x) for k = 0 … dim/2 − 1.

    Args:
        x: float (B,), in [0, 1).
        dim: even.

    Returns:
        (B, dim), the dtype of `x`, in [-1, 1].
    """
    angles = x[:, None] * math.pi * 2.0 ** torch.arange(dim // 2, device=x.device, dtype=x.dtype)
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def concatenate_condition(image: Tensor, condition: Tensor) -> Tensor:
    """Append `condition` (B, D) to every pixel of `image` (B, C, H, W): (B, C + D, H, W)."""
    planes = condition.to(image.dtype)[:, :, None, None].expand(-1, -1, *image.shape[2:])
    return torch.cat([image, planes], dim=1)


class UNet(nn.Module):
    """A standard U-Net: two Conv/ReLU per level, max-pooling down, skip connections, a last Conv.

    `widths` are the filters of the levels going down, the last one being the middle level; the way
    up mirrors them. Five widths make nine levels, six make eleven.

    Args:
        in_channels: of the input, encodings included.
        out_channels: of the output.
        widths: filters per level; each level but the last halves the resolution after it.
        norm: 'none' as in the paper, or 'group' (groups of eight channels, before each ReLU), which
            a short training needs.
        bounded: end in tanh, so that the output is in (-1, 1).

    Raises:
        ValueError: fewer than two widths, an unknown norm, or a width it cannot split.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        widths: Sequence[int],
        norm: Norm = "none",
        bounded: bool = True,
    ) -> None:
        super().__init__()
        if len(widths) < 2 or min(widths) < 1:
            raise ValueError(f"widths needs at least two positive numbers, got {list(widths)}")
        if norm not in get_args(Norm):
            raise ValueError(f"unknown norm {norm!r}; known are {', '.join(get_args(Norm))}")
        if norm == "group" and any(width % 8 for width in widths):
            raise ValueError(f"norm 'group' needs widths that 8 divides, got {list(widths)}")
        *sides, middle = widths
        inputs = [in_channels, *sides]
        self.down = nn.ModuleList(_level(i, o, norm) for i, o in zip(inputs, sides, strict=False))
        self.middle = _level(sides[-1], middle, norm)
        below = [*sides[1:], middle]
        self.up = nn.ModuleList(
            _level(lower + side, side, norm) for lower, side in zip(below, sides, strict=True)
        )
        self.last = nn.Conv2d(sides[0], out_channels, 1)
        self.bounded = bounded

    @property
    def factor(self) -> int:
        """What has to divide the sides of an image, which each level but the last halves."""
        return 2 ** len(self.down)

    def check_size(self, size: int) -> None:
        """Refuse a side in pixels that cannot be halved once per level.

        Raises:
            ValueError: names the sizes around it that can.
        """
        below = size // self.factor * self.factor
        if size < 1 or size != below:
            would = " or ".join(str(each) for each in (below, below + self.factor) if each > 0)
            raise ValueError(
                f"a U-Net of {len(self.down) + 1} widths halves the image {len(self.down)} times, "
                f"which a side of {size} cannot be: {would} would do"
            )

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_channels, H, W) to (B, out_channels, H, W).

        Raises:
            ValueError: H or W cannot be halved once per level.
        """
        if x.shape[2] % self.factor or x.shape[3] % self.factor:
            raise ValueError(f"{x.shape[3]} x {x.shape[2]} pixels: {self.factor} must divide both")
        skips = []
        for level in self.down:
            x = level(x)
            skips.append(x)
            x = F.max_pool2d(x, 2)
        x = self.middle(x)
        for level, skip in zip(reversed(self.up), reversed(skips), strict=True):
            x = level(torch.cat([F.interpolate(x, scale_factor=2.0), skip], dim=1))
        x = self.last(x)
        return x.tanh() if self.bounded else x


def _level(in_channels: int, out_channels: int, norm: Norm) -> nn.Sequential:
    """Two times Conv, normalisation, ReLU."""
    layers: list[nn.Module] = []
    for channels in (in_channels, out_channels):
        layers.append(nn.Conv2d(channels, out_channels, 3, padding=1))
        if norm == "group":
            layers.append(nn.GroupNorm(out_channels // 8, out_channels))
        layers.append(nn.ReLU(inplace=True))
    return nn.Sequential(*layers)
