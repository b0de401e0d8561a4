"""Procedural photographs-in-miniature of animal faces: the demo world, at any resolution.

Every picture is a front view of one animal, built from signed distance functions in "head units":
the head has about radius 1, x points right, y points up, the eyes sit near (+-0.4, 0.1) and the
nose near (0, -0.3) for all animals, so that turning a cat into another animal mostly means
changing ears, coat, muzzle, mane and tail. Fur and background carry random Fourier textures with
a natural amplitude spectrum of about 1/f, indexed by integer frequency so that sizes agree.

All randomness is a counter-based hash of the seed. The same seed gives every class the same pose,
light and background, and gives every size the same picture.
"""

import argparse
import math
from collections.abc import Callable
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

CLASSES: tuple[str, ...] = (
    "cat",
    "bear",
    "dog",
    "lion",
    "squirrel",
    "tiger",
    "raccoon",
    "fox",
    "badger",
)

# Top and bottom colour of the backgrounds: meadows, woods, autumn, snow, soil, rooms.
BACKGROUNDS = (
    ("#b3cadb", "#86a35f"),
    ("#a5bd8c", "#5f7d45"),
    ("#d3dde2", "#93a46f"),
    ("#7f9a72", "#4b6340"),
    ("#c9a878", "#8c6b47"),
    ("#c8d6e2", "#e6eaee"),
    ("#a3a98c", "#86705a"),
    ("#d6c7ae", "#a28a6e"),
    ("#b9bcc0", "#8d8780"),
    ("#9fb6c4", "#b7a888"),
)
DARK, BLACK, WHITE = "#15110f", "#1d1a1a", "#f4f1ea"
PINK = "#d98f8c"

Colour = Tensor | str  # (B, 3, 1, 1) or (3, 1, 1) in [0, 1], or "#rrggbb"
Number = Tensor | float
N_UNIFORMS = 64
# Amplitude spectrum f^-slope, elongation of the grain along y, and level of each texture:
# background light, background colour, coat, and hair (finer, and combed along y).
GRAINS = ((1.05, 1.0, 0.5), (1.5, 1.0, 0.7), (1.0, 1.0, 0.5), (0.9, 4.0, 0.85))


def caption(class_id: int) -> str:
    """The text that goes with a picture of class `class_id`."""
    return f"a photo of a {CLASSES[class_id]}"


# ---------------------------------------------------------------------------------------------
# Randomness


def splitmix64(z: Tensor) -> Tensor:
    """Scramble int64 counters into 64 random bits each (same shape)."""
    z = z * -7046029254386353131  # golden ratio, odd: consecutive counters land far apart
    z = (z ^ ((z >> 30) & 0x3FFFFFFFF)) * -4658895280553007687
    z = (z ^ ((z >> 27) & 0x1FFFFFFFFF)) * -7723592293110705685
    return z ^ ((z >> 31) & 0x1FFFFFFFF)


def uniforms(seeds: Tensor, n: int) -> Tensor:
    """(B,) int64 seeds -> (B, n) floats in [0, 1)."""
    bits = splitmix64(splitmix64(seeds + 1)[:, None] + torch.arange(1, n + 1))
    return ((bits >> 40) & 0xFFFFFF).float() / 2**24


def textures(seeds: Tensor, size: int) -> list[Tensor]:
    """The textures GRAINS names: (B, 1, size, size) each, mean 0, std about 1."""
    kx = torch.arange(size // 2 + 1)
    ky = (torch.fft.fftfreq(size) * size).round().long()[:, None]
    bits = splitmix64(splitmix64(seeds + 2)[:, None, None] + (ky * 65536 + kx) + 2**40)
    # Drop the ambiguous Nyquist frequencies; shift the samples to the pixels' centres.
    keep = (ky.abs() < size / 2) & (kx < size / 2) & ((ky != 0) | (kx != 0))
    shift = torch.polar(keep.float(), (kx + ky) * (math.pi / size))
    result = []
    for i, (slope, stretch, level) in enumerate(GRAINS):
        # 8 + 8 bits of one hash per complex coefficient: a sum of many is gaussian anyway.
        re, im = ((bits >> (16 * i + j) & 0xFF).float() / 255 - 0.5 for j in (0, 8))
        amplitude = level / (kx**2 + (stretch * ky) ** 2).clamp(min=1) ** (slope / 2)
        coefficients = torch.complex(re, im) * (shift * amplitude)
        result.append(torch.fft.irfft2(coefficients, s=(size, size), norm="forward")[:, None])
    return result


# ---------------------------------------------------------------------------------------------
# Colours and shapes. Coordinates are (B, 1, S, S); parameters are numbers or (B, 1, 1, 1).


@lru_cache
def rgb(colour: str) -> Tensor:
    """'#rrggbb' -> (3, 1, 1) in [0, 1]."""
    return torch.tensor([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])[:, None, None]


def plain(colour: Colour) -> Tensor:
    """A colour given by name or by value, as a tensor."""
    return rgb(colour) if isinstance(colour, str) else colour


def ellipse(
    x: Tensor, y: Tensor, cx: Number, cy: Number, rx: float, ry: float, angle: float = 0.0
) -> Tensor:
    """Signed distance (approximate) to an ellipse turned counter-clockwise by `angle` radians."""
    dx, dy = x - cx, y - cy
    if angle:
        c, s = math.cos(angle), math.sin(angle)
        dx, dy = c * dx + s * dy, c * dy - s * dx
    return (torch.hypot(dx / rx, dy / ry) - 1) * min(rx, ry)


def polygon(x: Tensor, y: Tensor, *points: tuple[float, float], rounding: float = 0.0) -> Tensor:
    """Signed distance (approximate outside) to a convex polygon, counter-clockwise corners."""
    distance = torch.full_like(x, -math.inf)
    for (ax, ay), (bx, by) in zip(points, points[1:] + points[:1], strict=True):
        length = math.hypot(bx - ax, by - ay)
        nx, ny = (by - ay) / length, (ax - bx) / length
        edge = nx * x + ny * y - (nx * ax + ny * ay)
        distance = smooth_max(distance, edge, rounding)
    return distance


def segment(
    x: Tensor, y: Tensor, ax: float, ay: float, bx: float, by: float, width: float
) -> Tensor:
    """Signed distance to a line of half-width `width` that tapers to nothing at its end b."""
    dx, dy = bx - ax, by - ay
    t = (((x - ax) * dx + (y - ay) * dy) / (dx * dx + dy * dy)).clamp(0, 1)
    return torch.hypot(x - ax - t * dx, y - ay - t * dy) - width * (1 - 0.8 * t)


def smooth_max(a: Tensor, b: Tensor, radius: float) -> Tensor:
    """Intersection of two shapes whose shared corner is rounded."""
    if not radius:
        return torch.maximum(a, b)
    h = (radius - (a - b).abs()).clamp(min=0)
    return torch.maximum(a, b) + h * h / (4 * radius)


def blend(a: Tensor, b: Tensor, radius: float = 0.3) -> Tensor:
    """Union of two shapes with a rounded seam."""
    return -smooth_max(-a, -b, radius)


class Scene:
    """A batch of pictures in the making: pose, textures, light, and the canvas (B, 3, S, S).

    x, y are the head's coordinates; fx the features' x (eyes), nx the nose's x, which a turned
    head shifts; ax and nax are their mirrored absolute values, for pairs of parts.
    """

    def __init__(self, table: Tensor, grains: list[Tensor]):
        size = grains[0].shape[-1]
        self.table = table
        self.used = 0
        grain, self.tint, self.coat, hair = grains
        axis = (torch.arange(size) + 0.5) * (2 / size) - 1
        u, v = axis.expand(size, size), -axis[:, None].expand(size, size)

        scale, angle = self.u(0.53, 0.62), self.u(-0.21, 0.21)
        dx, dy = u - self.u(-0.07, 0.07), v - self.u(-0.16, -0.02)
        cos, sin = torch.cos(angle) / scale, torch.sin(angle) / scale
        self.x, self.y = cos * dx + sin * dy, cos * dy - sin * dx
        self.turn = turn = self.u(-1, 1)
        self.fx, self.nx = self.x - 0.1 * turn, self.x - 0.16 * turn
        self.ax, self.nax = self.fx.abs(), self.nx.abs()
        self.ear = (self.x + 0.04 * turn).abs()
        self.pixel = (2 / size) / scale

        # Hair grows away from the nose: texture in polar coordinates, mirrored at its borders.
        theta = torch.atan2(self.nx, self.y + 0.3) * (2 / math.pi)
        grid = torch.stack((theta, torch.hypot(self.nx, self.y + 0.3) - 1), -1)[:, 0]
        self.hair = F.grid_sample(hair, grid, padding_mode="reflection", align_corners=False)
        self.wisps = self.hair.clamp(-1.3, 1.3)  # roughens outlines, never eats into a part

        lx, ly = self.u(-1, 1), self.u(0.3, 1)
        self.glint = 0.05 * lx
        self.light = 1 + (0.14 * lx * self.x + 0.16 * ly * self.y).clamp(-0.35, 0.3)
        self.fur_shade = self.light * (0.15 * self.hair + 0.09 * self.coat).exp()
        warmth = self.u(-0.06, 0.06) * torch.tensor([1.0, 0.1, -1.0])[:, None, None]
        self.exposure = self.u(0.88, 1.1) + warmth
        self.canvas = self.background(u, v, grain)
        self.alpha = torch.zeros_like(self.x)

    def u(self, low: float = 0.0, high: float = 1.0) -> Tensor:
        """The next random number of every picture, uniform in [low, high): (B, 1, 1, 1)."""
        self.used += 1
        return low + (high - low) * self.table[:, self.used - 1, None, None, None]

    def maybe(self, probability: float) -> Tensor:
        """1 with the probability, else 0: (B, 1, 1, 1)."""
        return (self.u() < probability).float()

    def pick(self, *colours: str, jitter: float = 0.1) -> Tensor:
        """A random colour of those given, slightly lighter or darker: (B, 3, 1, 1)."""
        index = (self.u().flatten() * len(colours)).long()
        chosen = torch.stack([rgb(colour) for colour in colours])[index]
        return chosen * self.u(1 - jitter, 1 + jitter)

    def background(self, u: Tensor, v: Tensor, grain: Tensor) -> Tensor:
        """Two-tone vertical gradient with blurred discs of light, under a 1/f texture."""
        index = (self.u().flatten() * len(BACKGROUNDS)).long()
        ends = torch.stack([torch.stack([rgb(c) for c in pair]) for pair in BACKGROUNDS])[index]
        height = (v - self.u(-0.4, 0.5)) / self.u(0.15, 0.9) + 0.25 * self.tint
        canvas = torch.lerp(ends[:, 1], ends[:, 0], torch.sigmoid(2 * height))
        glow = torch.zeros_like(self.x)
        for _ in range(4):
            radius = self.u(0.08, 0.3)
            distance = torch.hypot(u - self.u(-1, 1), v - self.u(-0.3, 1))
            glow = glow + ((radius - distance) / 0.08).clamp(0, 1)
        glow = 1 + 0.25 * self.maybe(0.6) * glow
        warm = torch.tensor([0.025, 0.02, -0.03])[:, None, None] * self.tint
        return (canvas + warm) * (glow * (self.u(0.08, 0.17) * grain).exp())

    def cover(self, sdf: Tensor, soft: float = 0.0) -> Tensor:
        """How much of each pixel lies inside a shape, in [0, 1]; `soft` blurs the edge."""
        return (0.5 - sdf / self.pixel.clamp(min=soft)).clamp(0, 1)

    def oval(self, x: Tensor, cx: Number, cy: float, rx: float, ry: float, angle=0.0) -> Tensor:
        """An ellipse in the coordinates (x, self.y), where x says which parts it moves with."""
        return ellipse(x, self.y, cx, cy, rx, ry, angle)

    def paint(self, colour: Colour, mask: Tensor) -> None:
        """Lay a colour over the canvas where the mask is 1."""
        self.canvas = torch.lerp(self.canvas, plain(colour).expand_as(self.canvas), mask)

    def fur(
        self,
        colour: Colour,
        sdf: Tensor,
        rim: float = 0.45,
        fuzz: float = 0.03,
        shadow: float = 0.35,
    ) -> None:
        """A rounded furry part: soft shadow on the parts behind it, fuzzy edge, darker rim."""
        if shadow:
            self.canvas = self.canvas * (1 - shadow * self.alpha * self.cover(sdf - 0.05, 0.4))
        self.part = sdf + fuzz * self.wisps
        edge = 1 - (self.part / -0.45).clamp(0, 1)
        self.shade = self.fur_shade * (1 - rim * edge * edge)
        mask = self.cover(self.part, fuzz)  # hair is too fine for a sharp edge
        self.alpha = torch.maximum(self.alpha, mask)
        self.paint(plain(colour) * self.shade, mask)

    def mark(
        self,
        colour: Colour,
        sdf: Tensor,
        strength: Number = 1.0,
        soft: float = 0.05,
        fuzz: float = 0.04,
    ) -> None:
        """A patch of other fur on the part painted last."""
        sdf = torch.maximum(sdf + fuzz * self.wisps, self.part)
        self.paint(plain(colour) * self.shade, self.cover(sdf, soft) * strength)

    def body(self, colour: Colour, chest: Colour | None = None, width: float = 0.95) -> None:
        """Neck and shoulders, leaving the frame below the head."""
        self.fur(colour, self.oval(self.x, 0, -1.75, width, 1.2), shadow=0)
        if chest is not None:
            self.mark(chest, self.oval(self.x, 0, -1.5, 0.45 * width, 0.9), soft=0.15)

    def eyes(
        self, iris: Colour, x=0.4, y=0.12, r=0.17, pupil=0.5, slit=False, rim: Colour = DARK
    ) -> None:
        """A pair of shining eyes; slit pupils are narrow and tall."""
        squash = 0.85 if slit else 1.0
        lid = self.y - y - 0.72 * r - 0.12 * (self.ax - x)  # keeps them from staring
        eye = torch.maximum(self.oval(self.ax, x, y, r, r * squash), lid)
        self.paint(rim, self.cover(eye - 0.04))
        self.paint(iris, self.cover(eye))
        px, py = (0.055, 0.9 * r * squash) if slit else (pupil * r, pupil * r)
        self.paint(DARK, self.cover(torch.maximum(self.oval(self.ax, x, y, px, py), lid)))
        for side in (-x, x):
            spot = self.oval(self.fx, side + self.glint * r / 0.15, y + 0.25 * r, 0.3 * r, 0.3 * r)
            self.paint("#ffffff", 0.9 * self.cover(spot))

    def nose(self, colour: Colour, y=-0.3, w=0.2, h=0.15, mouth=0.25) -> None:
        """A rounded triangular nose with a shine, and the mouth's line below it."""
        lip = y - h - 0.5 * mouth
        line = torch.minimum(
            segment(self.nax, self.y, 0, y, 0, lip, 0.03),
            segment(self.nax, self.y, 0, lip, mouth, lip + 0.1 * mouth, 0.04),
        )
        self.paint(DARK, 0.75 * self.cover(line))
        corners = ((0, y - h), (w, y + 0.55 * h), (-w, y + 0.55 * h))
        self.paint(colour, self.cover(polygon(self.nx, self.y, *corners, rounding=0.15) - 0.04))
        shine = self.oval(self.nx, self.glint, y + 0.3 * h, 0.4 * w, 0.2 * h)
        self.paint("#ffffff", 0.4 * self.cover(shine))

    def whiskers(self, colour: Colour = WHITE, strength: float = 0.6) -> None:
        """Three long hairs on each side of the muzzle."""
        hairs = [
            segment(self.nax, self.y, 0.3, -0.4 + 0.04 * i, 1.2, -0.42 + 0.2 * i, 0.022)
            for i in (-1, 0, 1)
        ]
        self.paint(colour, strength * self.cover(torch.stack(hairs).amin(0)))

    def picture(self) -> Tensor:
        """The finished pictures under a light of random strength and warmth, in [-1, 1]."""
        return (self.canvas * self.exposure).clamp(0, 1) * 2 - 1


# ---------------------------------------------------------------------------------------------
# The animals


def cat(s: Scene) -> None:
    coat = s.pick("#8b8d92", "#2e2b2d", "#eeeae2", "#d98a42", "#e6cfa4", "#6f675f", "#a08464")
    dark = coat * 0.45
    s.body(coat, coat * 0.5 + 0.45)
    s.fur(coat, polygon(s.ear, s.y, (0.18, 0.55), (0.95, 0.2), (0.85, 1.4), rounding=0.1))
    s.mark(PINK, polygon(s.ear, s.y, (0.4, 0.6), (0.82, 0.45), (0.78, 1.15)), fuzz=0.02)
    shape = blend(s.oval(s.x, 0, 0.05, 0.95, 0.8), s.oval(s.ear, 0.45, -0.3, 0.55, 0.42))
    s.fur(coat, shape)
    tabby = s.maybe(0.5) * s.u(0.5, 0.95)
    bars = torch.minimum(
        segment(s.ax, s.y, 0, 0.85, 0, 0.3, 0.09), segment(s.ax, s.y, 0.3, 0.85, 0.2, 0.4, 0.1)
    )
    for y in (0.0, -0.3):
        bars = torch.minimum(bars, segment(s.ax, s.y, 1.05, y + 0.1, 0.62, y, 0.1))
    s.mark(dark, bars, tabby)
    pale = torch.lerp(coat * 0.75 + 0.2, rgb(WHITE).expand_as(coat), s.maybe(0.5))
    s.mark(pale, s.oval(s.nax, 0.19, -0.47, 0.27, 0.21))
    s.mark(pale, s.oval(s.nx, 0, -0.65, 0.22, 0.2))
    s.eyes(s.pick("#b9c94a", "#e2b93a", "#7fb8dc", "#7fc06a"), r=0.21, slit=True)
    s.nose("#e08a8c", y=-0.3, w=0.12, h=0.1, mouth=0.2)
    s.whiskers()


def dog(s: Scene) -> None:
    coat = s.pick("#a8703c", "#d9a860", "#ece4d4", "#6b4429", "#efe8dc", "#3a3230")
    ears = torch.lerp(coat * 0.62, s.pick("#5a3a22", "#2b2523"), s.maybe(0.4))
    pale = torch.lerp(coat * 0.6 + 0.32, rgb(WHITE).expand_as(coat), s.maybe(0.5))
    s.body(coat, pale)
    s.fur(coat, s.oval(s.x, 0, 0.1, 0.8, 0.85))
    patch = s.maybe(0.4)
    s.mark(ears, s.oval(s.fx, -0.45, 0.2, 0.4, 0.45), patch)
    s.mark(pale, s.oval(s.fx, 0, 0.55, 0.14, 0.6), s.maybe(0.4))
    shape = blend(s.oval(s.ear, 0.72, 0.55, 0.3, 0.26), s.oval(s.ear, 0.97, -0.08, 0.3, 0.75, 0.1))
    s.fur(ears, shape)
    tongue = s.maybe(0.6)
    s.paint("#d9626b", tongue * s.cover(s.oval(s.nx, 0, -1.0, 0.17, 0.3)))
    s.fur(pale, s.oval(s.nx, 0, -0.42, 0.44, 0.5), shadow=0.3)
    s.eyes("#4a2c17", x=0.37, y=0.2, r=0.13, pupil=0.6)
    s.nose(BLACK, y=-0.26, w=0.24, h=0.18, mouth=0.3)


def bear(s: Scene) -> None:
    coat = s.pick("#5a3a24", "#2b2624", "#74492a", "#43301f", "#3a2f2b", "#8a5c36")
    s.body(coat, width=1.3)
    s.fur(coat, s.oval(s.ear, 0.78, 0.78, 0.33, 0.33))
    s.mark(coat * 0.6 + 0.12, s.oval(s.ear, 0.76, 0.74, 0.19, 0.19))
    shape = blend(s.oval(s.x, 0, 0.1, 0.98, 0.86), s.oval(s.x, 0, -0.3, 1.05, 0.6))
    s.fur(coat, shape)
    s.fur(coat * 0.35 + 0.65 * s.pick("#a58358", "#b5946a"), s.oval(s.nx, 0, -0.42, 0.48, 0.42))
    s.eyes("#2a1a10", x=0.38, y=0.14, r=0.075)
    s.nose(BLACK, y=-0.28, w=0.24, h=0.17, mouth=0.2)


def lion(s: Scene) -> None:
    mane = s.pick("#98502a", "#7d431f", "#a8622c", "#6a3a22")
    coat = s.pick("#d9a860", "#e0b56c", "#cf9a52")
    s.body(mane)
    ragged = s.oval(s.x, 0, -0.1, 1.38, 1.4)
    s.fur(mane * 0.75, ragged, fuzz=0.1, rim=0.25)
    s.fur(mane, s.oval(s.x, 0, 0, 1.15, 1.15), fuzz=0.1, rim=0.25, shadow=0)
    s.fur(coat, s.oval(s.ear, 0.72, 0.78, 0.25, 0.25))
    s.mark("#6b4630", s.oval(s.ear, 0.7, 0.75, 0.14, 0.14))
    s.fur(coat, s.oval(s.x, 0, -0.02, 0.8, 0.85), fuzz=0.05)
    s.mark(coat * 0.5 + 0.45, s.oval(s.ax, 0.38, 0.3, 0.2, 0.1), 0.7)
    shape = blend(s.oval(s.nax, 0.2, -0.47, 0.3, 0.24), s.oval(s.nx, 0, -0.7, 0.25, 0.25))
    s.fur("#efdfc2", shape, shadow=0.2)
    s.mark(coat * 0.85, s.oval(s.nx, 0, -0.1, 0.2, 0.35))
    s.eyes("#b8862c", x=0.37, y=0.12, r=0.13, pupil=0.5)
    s.nose("#5a3a34", y=-0.3, w=0.26, h=0.15, mouth=0.25)


def squirrel(s: Scene) -> None:
    coat = s.pick("#a8552a", "#8f6844", "#9c5c34", "#b5622e", "#74503a")
    # The tail rises behind the head's back, so that a turned head tells its side.
    tx = torch.where(s.turn < 0, s.x, -s.x)
    tail = blend(s.oval(tx, 0.86, -0.2, 0.45, 1.15, 0.12), s.oval(tx, 0.95, 0.92, 0.47, 0.44))
    notch = s.oval(tx, 1.46, 0.36, 0.4, 0.13, 0.3)  # the tip curls outwards over it
    s.fur(coat * 0.75 + 0.25, smooth_max(tail, -notch, 0.1), fuzz=0.07, rim=0.3)
    s.mark(coat * 0.75, tail + 0.12, soft=0.15, fuzz=0.08)
    s.mark(coat * 0.5, segment(tx, s.y, 1.3, 0.38, 0.8, 0.55, 0.1), 0.8, soft=0.12)
    s.body(coat, WHITE, width=0.75)
    s.fur(coat, polygon(s.ear, s.y, (0.25, 0.5), (0.7, 0.35), (0.64, 1.3), rounding=0.1), fuzz=0.06)
    shape = blend(s.oval(s.x, 0, 0.1, 0.74, 0.66), s.oval(s.x, 0, -0.3, 0.6, 0.45))
    s.fur(coat, shape)
    s.mark(WHITE, s.oval(s.nax, 0.26, -0.5, 0.3, 0.26))
    s.mark("#f0e2c8", s.oval(s.ax, 0.42, 0.14, 0.28, 0.27))
    s.eyes("#1c120c", x=0.42, y=0.12, r=0.16)
    s.nose("#4a3230", y=-0.32, w=0.1, h=0.09, mouth=0.12)


def tiger(s: Scene) -> None:
    coat = s.pick("#e08a34", "#d97a28", "#e6983f")
    s.body(coat, WHITE, width=1.1)
    s.fur(BLACK, s.oval(s.ear, 0.74, 0.78, 0.31, 0.31))
    s.mark(WHITE, s.oval(s.ear, 0.72, 0.74, 0.17, 0.17))
    shape = blend(s.oval(s.x, 0, 0.08, 0.95, 0.85), s.oval(s.ear, 0.5, -0.35, 0.55, 0.42))
    s.fur(coat, shape)
    s.mark(WHITE, s.oval(s.ax, 0.66, -0.42, 0.36, 0.3))
    s.mark(WHITE, s.oval(s.ax, 0.4, 0.36, 0.24, 0.14))
    stripes = segment(s.ax, s.y, 0, 1.0, 0, 0.35, 0.08)
    for y in (0.48, 0.74):
        stripes = torch.minimum(stripes, segment(s.ax, s.y, 0, y, 0.4, y + 0.1, 0.07))
    for y, x in ((0.55, 0.6), (0.22, 0.68), (-0.1, 0.62), (-0.4, 0.6)):
        stripes = torch.minimum(stripes, segment(s.ax, s.y, 1.1, y + 0.12, x, y - 0.05, 0.12))
    s.mark(BLACK, stripes, s.u(0.85, 1.0))
    shape = blend(s.oval(s.nax, 0.2, -0.48, 0.28, 0.24), s.oval(s.nx, 0, -0.7, 0.22, 0.22))
    s.fur(WHITE, shape, shadow=0.15)
    s.eyes("#d6b23c", x=0.38, y=0.14, r=0.13)
    s.nose("#c9716a", y=-0.3, w=0.22, h=0.13, mouth=0.22)


def raccoon(s: Scene) -> None:
    coat = s.pick("#85827e", "#77706a", "#96908a")
    s.body(coat)
    s.fur(coat * 0.6, s.oval(s.ear, 0.7, 0.78, 0.3, 0.36))
    s.mark(WHITE, s.oval(s.ear, 0.69, 0.74, 0.2, 0.26))
    s.mark(coat * 0.4, s.oval(s.ear, 0.68, 0.68, 0.12, 0.2))
    shape = blend(s.oval(s.x, 0, 0.1, 0.9, 0.78), s.oval(s.ear, 0.6, -0.2, 0.5, 0.32, 0.3))
    s.fur(coat, shape, fuzz=0.06)
    s.mark(WHITE, s.oval(s.ax, 0.48, 0.28, 0.46, 0.3, -0.35))
    s.mark(WHITE, s.oval(s.nx, 0, -0.5, 0.5, 0.35))
    s.mark(BLACK, s.oval(s.ax, 0.5, 0.0, 0.5, 0.26, -0.45))
    s.mark(BLACK, s.oval(s.nx, 0, 0.25, 0.11, 0.5))
    s.fur(WHITE, s.oval(s.nx, 0, -0.48, 0.3, 0.3), shadow=0.2)
    s.eyes("#3a2a1c", x=0.38, y=0.08, r=0.1, rim="#4a4542")
    s.nose(BLACK, y=-0.36, w=0.17, h=0.13, mouth=0.15)


def fox(s: Scene) -> None:
    coat = s.pick("#e0762a", "#d96a22", "#cf6426")
    s.body(coat, WHITE)
    s.fur(coat, polygon(s.ear, s.y, (0.15, 0.4), (0.98, 0.2), (0.84, 1.42), rounding=0.08))
    s.mark(BLACK, 0.98 - s.y, soft=0.15)
    s.mark("#f0dcc4", polygon(s.ear, s.y, (0.42, 0.5), (0.82, 0.4), (0.74, 1.05)), fuzz=0.02)
    outline = ((-1, -0.95), (0.12, -0.95), (1.1, -0.1), (0.75, 0.6), (0.2, 0.78), (-1, 0.8))
    s.fur(coat, polygon(s.ear, s.y, *outline, rounding=0.25), fuzz=0.06)
    s.mark(WHITE, polygon(s.nax, s.y, (0.16, -0.95), (1.3, -0.4), (1.3, 0.0), (0.2, -0.22)))
    s.mark(WHITE, s.oval(s.nx, 0, -0.85, 0.3, 0.3))
    shape = polygon(s.nx, s.y, (-0.12, -0.7), (0.12, -0.7), (0.26, 0.2), (-0.26, 0.2))
    s.fur(coat, shape, rim=0.2, shadow=0.2)
    s.eyes("#c98a2a", x=0.42, y=0.08, r=0.13)
    s.nose(BLACK, y=-0.68, w=0.15, h=0.12, mouth=0.12)


def badger(s: Scene) -> None:
    s.body(s.pick("#6f6b68", "#5c5856"), BLACK, width=1.2)
    s.fur(BLACK, s.oval(s.ear, 0.7, 0.62, 0.22, 0.24))
    s.mark(WHITE, s.oval(s.ear, 0.74, 0.72, 0.15, 0.14))
    shape = blend(s.oval(s.x, 0, 0.2, 0.78, 0.75), s.oval(s.nx, 0, -0.45, 0.4, 0.6))
    s.fur(WHITE, shape)
    band = ((0.1, -0.6), (0.28, -0.5), (0.68, 0.3), (0.62, 1.1), (0.22, 1.1))
    s.mark(BLACK, polygon(s.ax, s.y, *band))
    s.eyes("#2a1c12", x=0.4, y=0.1, r=0.09, rim="#55504c")
    s.nose(BLACK, y=-0.62, w=0.24, h=0.16, mouth=0.16)


ANIMALS: dict[str, Callable[[Scene], None]] = {
    f.__name__: f for f in (cat, bear, dog, lion, squirrel, tiger, raccoon, fox, badger)
}


@torch.no_grad()
def draw_bytes(count: int, seed: int, size: int) -> tuple[Tensor, Tensor]:
    """Drawings of all classes in turn, of the seeds `seed` and up.

    Returns:
        uint8 (count, 3, size, size), and their class ids, int64 (count,).
    """
    labels = torch.arange(count) % len(CLASSES)
    seeds = torch.arange(count) + seed
    parts = zip(labels.split(256), seeds.split(256), strict=True)
    pictures = [((draw(*part, size) + 1) * 127.5).round().to(torch.uint8) for part in parts]
    return torch.cat(pictures), labels


def draw(class_ids: Tensor, seeds: Tensor, size: int) -> Tensor:
    """Draw animals: class_ids and seeds (B,) int64 -> (B, 3, size, size) float32 in [-1, 1].

    Picture i depends only on class_ids[i], seeds[i] and size; other sizes show the same picture.
    """
    pictures = torch.empty(len(seeds), 3, size, size)
    table, grains = uniforms(seeds, N_UNIFORMS), textures(seeds, size)
    for class_id in class_ids.unique().tolist():
        chosen = class_ids == class_id
        scene = Scene(table[chosen], [grain[chosen] for grain in grains])
        ANIMALS[CLASSES[class_id]](scene)
        pictures[chosen] = scene.picture()
    return pictures


def main() -> None:
    """Write a contact sheet: a row per animal, ten columns."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("out")
    parser.add_argument("--size", type=int, default=64)
    args = parser.parse_args()
    from torchvision.utils import save_image  # only needed here

    classes = torch.arange(len(CLASSES)).repeat_interleave(10)
    pictures = draw(classes, torch.arange(len(classes)), args.size)
    save_image(pictures / 2 + 0.5, args.out, nrow=10, padding=2)


if __name__ == "__main__":
    main()
