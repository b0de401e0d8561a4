"""A released corrector of lmc-sds in plain torch: config.json and model.safetensors, nothing else.

As `lmc.corrector` and `lmc.filter`, with which it is tested; docs/releases.md has the format.
"""

import json
import math
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F

FORMAT = 1  # of releases, up to which this reads
ENCODING = 10


class UNet(nn.Module):
    def __init__(self, inputs, outputs, widths, norm, bounded):
        super().__init__()
        *sides, middle = widths
        self.down = nn.ModuleList(level(i, o, norm) for i, o in zip([inputs, *sides[:-1]], sides))
        self.middle = level(sides[-1], middle, norm)
        below = [*sides[1:], middle]
        self.up = nn.ModuleList(level(b + s, s, norm) for b, s in zip(below, sides))
        self.last = nn.Conv2d(sides[0], outputs, 1)
        self.bounded = bounded

    def forward(self, z, t):
        angles = t[:, None] * math.pi * 2.0 ** torch.arange(ENCODING // 2).to(t)
        encoding = torch.cat([angles.sin(), angles.cos()], 1)[:, :, None, None]
        x = torch.cat([z, encoding.expand(-1, -1, *z.shape[2:])], 1)
        skips = []
        for down in self.down:
            x = down(x)
            skips.append(x)
            x = F.max_pool2d(x, 2)
        x = self.middle(x)
        for up, skip in zip(reversed(self.up), reversed(skips)):
            x = up(torch.cat([F.interpolate(x, scale_factor=2.0), skip], 1))
        x = self.last(x)
        return x.tanh() if self.bounded else x


def level(inputs, outputs, norm):
    layers = []
    for channels in (inputs, outputs):
        layers.append(nn.Conv2d(channels, outputs, 3, padding=1))
        layers += [nn.GroupNorm(outputs // 8, outputs)] if norm == "group" else []
        layers.append(nn.ReLU())
    return nn.Sequential(*layers)


class ClosedForm(nn.Module):
    """A linear filter of z by frequency, and an offset, between bins of t."""

    def __init__(self, gain, offset, time_range):
        super().__init__()
        self.register_buffer("gain", gain)
        self.register_buffer("offset", offset)
        self.time_range = time_range

    def forward(self, z, t):
        low, high = self.time_range
        at = (t - low) / (high - low) * len(self.gain)
        gain = torch.view_as_complex(between(self.gain, at))
        how = "bijhw,bjhw->bihw" if gain.ndim == 5 else "bihw,bihw->bihw"
        filtered = torch.einsum(how, gain, torch.fft.rfft2(z))
        return torch.fft.irfft2(filtered, s=z.shape[2:]) + between(self.offset, at)


def between(values, at):
    """Values (bins, …) at real bins `at` (B,), k + 0.5 being the centre of k: (B, …)."""
    last = len(values) - 1
    at = (at - 0.5).clamp(0, last)
    below = at.floor().long()
    share = (at - below).view(-1, *[1] * (values.ndim - 1))
    return torch.lerp(values[below], values[(below + 1).clamp(max=last)], share)


class Corrector(nn.Module):
    """b(z, t) of any kind of released corrector; `prior` is what it says of its own."""

    def __init__(self, folder):
        super().__init__()
        config = json.loads((Path(folder) / "config.json").read_text())
        if config.get("format", 0) > FORMAT:
            raise ValueError(f"{folder} is of a later format of releases than {FORMAT}")
        weights = load_file(str(Path(folder) / "model.safetensors"))
        closed = config.get("closed_form", config if "size" in config else None)
        if "classes" in config or (closed is None and "bounded" not in config):
            raise ValueError(f"{folder} is no released corrector")
        self.statistics, self.prior = config.get("statistics", "image"), config["prior"]
        self.unet = self.closed_form = None
        if "widths" in config:
            channels, widths = config["channels"], config["widths"]
            bounded = config.get("bounded", False)
            self.unet = UNet(channels + ENCODING, channels, widths, config["norm"], bounded)
            parts = {k[5:]: v for k, v in weights.items() if k.startswith("unet.")}
            self.unet.load_state_dict(parts)
        if closed is not None:
            gain, offset = (
                next(v for k, v in weights.items() if k.split(".")[-1] == x)
                for x in ("gain", "offset")
            )
            self.closed_form = ClosedForm(gain, offset, closed.get("time_range", (0.02, 0.98)))
        self.register_buffer("ratio", weights.get("ratio", torch.ones(1)))
        self.eval().requires_grad_(False)

    @torch.no_grad()
    def forward(self, z, t, z_hat):
        """b(z, t) in the normalised space of z_hat [LMC, Eq. 10]; z, z_hat (B, C, H, W), t (B,)."""
        b_hat = sum(part(z, t) for part in (self.closed_form, self.unet) if part is not None)
        if self.statistics == "none":
            return b_hat
        dims = (2, 3) if self.statistics == "channel" else (1, 2, 3)
        mean = b_hat.mean(dims, keepdim=True)
        centred = b_hat - mean
        deviation = centred.square().mean(dims, keepdim=True).clamp_min(1e-8).sqrt()
        wanted = z_hat.std(dims, unbiased=False, keepdim=True)
        if self.statistics == "calibrated":
            wanted = wanted / between(self.ratio, t * len(self.ratio)).view(-1, 1, 1, 1)
        return wanted / deviation * centred + mean
