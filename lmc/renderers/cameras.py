"""Cameras around a 3D scene, and where they are drawn from [METHOD section 10].

x points to the right of who stands in front, y up, z towards them: the camera of azimuth 0 and
elevation 0 is on the z axis and sees the scene from the front.
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from lmc.errors import require

SUFFIXES = (", front view", ", side view", ", back view", ", overhead view")

Range = tuple[float, float]


@dataclass(frozen=True, eq=False)
class Cameras:
    """N cameras that look at the origin, and the light; on the CPU.

    Attributes:
        distance: to the origin, float (N,).
        elevation: above the x-z plane in degrees, -90 … 90, (N,).
        azimuth: in degrees, (N,); 0 is in front, 90 to the right of who stands there.
        field_of_view: in degrees, of height and width alike, (N,).
        light: the direction towards the light, unit length, (N, 3); None: from each camera.
        background: its colour in [-1, 1], (N, 3); None: the one that the scene has learnt.
    """

    distance: Tensor
    elevation: Tensor
    azimuth: Tensor
    field_of_view: Tensor
    light: Tensor | None = None
    background: Tensor | None = None

    def __len__(self) -> int:
        return len(self.distance)

    def __getitem__(self, which: slice) -> "Cameras":
        """Some of them."""
        given = {name: value for name, value in vars(self).items() if value is not None}
        return Cameras(**{name: value[which] for name, value in given.items()})

    @property
    def suffix(self) -> list[int]:
        """Which of SUFFIXES each view's prompt gets, N numbers.

        Overhead above 60° of elevation, else front within ±45° of azimuth 0, back beyond ±135°.
        """
        turned = ((self.azimuth + 180) % 360 - 180).abs()
        side = (turned > 45).long() + (turned > 135).long()
        return torch.where(self.elevation > 60, 3, side).tolist()

    @property
    def axes(self) -> Tensor:
        """Right, up and backwards (from the origin to the camera) of each, (N, 3 axes, 3)."""
        e, a = self.elevation.deg2rad(), self.azimuth.deg2rad()
        flat = torch.zeros_like(e)
        right = torch.stack([a.cos(), flat, -a.sin()], dim=1)
        up = torch.stack([-e.sin() * a.sin(), e.cos(), -e.sin() * a.cos()], dim=1)
        back = torch.stack([e.cos() * a.sin(), e.sin(), e.cos() * a.cos()], dim=1)
        return torch.stack([right, up, back], dim=1)

    @property
    def position(self) -> Tensor:
        """(N, 3)."""
        return self.distance[:, None] * self.axes[:, 2]

    def rays(self, size: int) -> Tensor:
        """Directions of unit length through the centres of size x size pixels, (N, size, size, 3).

        The first row of pixels is the top.
        """
        across = ((torch.arange(size) + 0.5) * 2 / size - 1).to(self.distance)
        extent = (self.field_of_view / 2).deg2rad().tan()[:, None, None]
        right, up, back = (axis[:, None, None] for axis in self.axes.unbind(1))
        x, y = extent * across, extent * -across[:, None]
        return F.normalize(x[..., None] * right + y[..., None] * up - back, dim=-1)


@dataclass(frozen=True)
class Orbits:
    """Where cameras are drawn from, each uniformly; the defaults are DreamFusion's.

    Attributes:
        distance: to the origin, least and most.
        field_of_view: in degrees.
        elevation: in degrees.
        azimuth: in degrees; to keep to the front: -30 … 30.
        random_background: the share of draws whose views have backgrounds of random colours, so
            that a scene cannot rely on its own.

    Raises:
        ValueError: an empty range, or one outside what there is.
    """

    distance: Range = (1.5, 2.0)
    field_of_view: Range = (40.0, 70.0)
    elevation: Range = (-10.0, 90.0)
    azimuth: Range = (-180.0, 180.0)
    random_background: float = 0.0

    def __post_init__(self) -> None:
        for name, least, most in (
            ("distance", 1e-3, 1e3),
            ("field_of_view", 1, 170),
            ("elevation", -90, 90),
            ("azimuth", -360, 360),
        ):
            low, high = getattr(self, name)
            what = f"[least, most] within {least:g} … {most:g}"
            require(least <= low <= high <= most, name, what, [low, high])
        share = self.random_background
        require(0 <= share <= 1, "random_background", "a share, 0 … 1", share)

    def draw(self, count: int, generator: torch.Generator) -> Cameras:
        """Random cameras; the light is about where the camera is, as DreamFusion has it.

        Args:
            count: how many, N.
            generator: on the CPU.
        """
        require(count >= 1, "count", "at least 1", count)
        ranges = (self.distance, self.elevation, self.azimuth, self.field_of_view)
        places = torch.rand(4, count, generator=generator)
        away = torch.randn(count, 3, generator=generator)
        colours = torch.rand(count, 3, generator=generator) * 2 - 1
        share = float(torch.rand((), generator=generator))
        cameras = Cameras(
            *[low + (high - low) * u for u, (low, high) in zip(places, ranges, strict=True)]
        )
        background = colours if share < self.random_background else None
        light = F.normalize(cameras.position + away, dim=1)
        return replace(cameras, light=light, background=background)

    def turntable(self, count: int, elevation: float = 15.0) -> Cameras:
        """Cameras around the scene once, from the front, or to and fro in a part of the circle.

        Args:
            count: how many, N; the last is one step before the first.
            elevation: of all, in degrees. Distance and field of view are the middle of their range.
        """
        require(count >= 1, "count", "at least 1", count)
        require(-90 <= elevation <= 90, "elevation", "within -90 … 90", elevation)
        low, high = self.azimuth
        turn, middle = torch.arange(count) / count, (low + high) / 2
        swing = middle + (high - low) / 2 * (2 * math.pi * turn).sin()
        azimuth = 360 * turn if high - low >= 360 else swing  # a whole circle has a front
        means = [sum(each) / 2 for each in (self.distance, self.field_of_view)]
        distance, field_of_view = (torch.full((count,), mean) for mean in means)
        return Cameras(distance, torch.full((count,), float(elevation)), azimuth, field_of_view)
