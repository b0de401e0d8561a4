"""Pictures for people who look: grids of images, plots of spectra, curves and gradients."""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision.utils import make_grid

# Under the axes: names of losses may be long, and there may be a dozen.
LEGEND: Any = {"loc": "outside lower center", "ncols": 3, "fontsize": 8}


def grid(*rows: Tensor, gap: int = 2) -> Tensor:
    """Rows of equally sized pictures as one.

    Args:
        rows: float (N, 3, H, W) in [-1, 1], N the same in all.
        gap: black pixels between them.

    Returns:
        (3, H', W') in [0, 1].
    """
    pictures = torch.cat([row.float().cpu() for row in rows]).clamp(-1, 1) / 2 + 0.5
    return make_grid(pictures, nrow=len(rows[0]), padding=gap)


def labelled_grid(blocks: Mapping[str, Mapping[str, Tensor]]) -> Any:
    """Blocks of labelled rows of pictures, as a PIL image.

    Args:
        blocks: by block title, by row label: float (N, 3, H, W) in [-1, 1], the same in all.
            Pictures of less than 64 pixels are enlarged, pixel by pixel, to about as many.
    """
    from PIL import Image, ImageDraw, ImageFont

    first = next(iter(next(iter(blocks.values())).values()))
    zoom = max(1, 64 // first.shape[2])
    count, side, width = first.shape[0], first.shape[2] * zoom, first.shape[3] * zoom
    margin, title = 76, 18
    rows = sum(len(block) for block in blocks.values())
    size = (margin + count * (width + 2), rows * (side + 2) + title * len(blocks))
    sheet = Image.new("RGB", size, "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(12)
    y = 0
    for name, block in blocks.items():
        # Of what is too long the end stays: two runs of one loss differ there.
        while len(name) > 3 and draw.textlength(name, font) > size[0] - margin:
            name = "..." + name.removeprefix("...")[1:]
        draw.text((margin, y + 1), name, "black", font)
        y += title
        for label, images in block.items():
            draw.text((4, y + side // 2 - 7), label, "black", font)
            images = images.repeat_interleave(zoom, 2).repeat_interleave(zoom, 3)
            pixels = (grid(images, gap=1) * 255).round().byte().permute(1, 2, 0).numpy()
            sheet.paste(Image.fromarray(pixels), (margin, y))
            y += side + 2
    return sheet


def spectra_figure(spectra: Mapping[str, Sequence[Tensor]], names: Sequence[str]) -> Any:
    """Power spectra as a matplotlib figure, a panel an entry of `spectra`.

    Args:
        spectra: by panel title, one (F,) for each of `names`.
        names: of the curves.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4 * len(spectra), 3), layout="constrained")
    for axes, (title, curves) in zip(
        figure.subplots(1, len(spectra), squeeze=False)[0], spectra.items(), strict=True
    ):
        for name, curve in zip(names, curves, strict=True):
            axes.loglog(range(1, len(curve) + 1), curve.float().cpu(), label=name)
        axes.set(title=title, xlabel="cycles per image", ylabel="power")
        axes.legend()
    return figure


def drawn(figure: Any) -> Any:
    """A matplotlib figure as a PIL image, of as many pixels as `savefig` would give it."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from PIL import Image

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")


def curves_figure(
    curves: Mapping[str, Sequence[tuple[float, float, str]]], xlabel: str, ylabel: str
) -> Any:
    """Curves through labelled points as a matplotlib figure.

    Args:
        curves: by name: (x, y, label) of each point, in the curve's order.
        xlabel, ylabel: of the axes.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 6), layout="constrained")
    axes = figure.subplots()
    looks = _looks(curves)
    for name, points in curves.items():
        places = [x for x, _, _ in points], [y for _, y, _ in points]
        axes.plot(*places, marker="o", label=name, **looks[name])
        for x, y, label in points:
            axes.annotate(label, (x, y), (3, 3), textcoords="offset points", fontsize=7)
    axes.set(xlabel=xlabel, ylabel=ylabel)
    figure.legend(**LEGEND)
    return figure


def _looks(names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Colour and dashes of each curve, no two alike among thirty; 'source' is black."""
    pairs = itertools.cycle(itertools.product(("-", "--", ":"), range(10)))
    others = ({"color": f"C{color}", "linestyle": dashes} for dashes, color in pairs)
    return {
        name: {"color": "black", "linestyle": "-"} if name == "source" else next(others)
        for name in names
    }


def statistics_figure(spectra: Mapping[str, Tensor], histograms: Mapping[str, Tensor]) -> Any:
    """Image statistics [LMC, Fig. 6] as a matplotlib figure, a curve each.

    Args:
        spectra: average power spectra, (F,) by name.
        histograms: of vertical derivatives in [-1, 1], (bins,) by name.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 5), layout="constrained")
    left, right = figure.subplots(1, 2)
    looks = _looks(spectra)
    for name, spectrum in spectra.items():
        cycles = range(1, len(spectrum) + 1)
        left.loglog(cycles, spectrum.float().cpu(), label=name, **looks[name])
    for name, histogram in histograms.items():
        centres = (torch.arange(len(histogram)) + 0.5) / len(histogram) * 2 - 1
        right.semilogy(centres, histogram.float().cpu().clamp_min(1e-7), **looks[name])
    left.set(xlabel="cycles per image", ylabel="power")
    right.set(xlabel="vertical derivative", ylabel="share")
    figure.legend(*left.get_legend_handles_labels(), **LEGEND)
    return figure


def gradients_figure(rows: Mapping[str, Mapping[str, Tensor]], pictures: Sequence[str]) -> Any:
    """Pictures and gradients as a matplotlib figure.

    A gradient is shown around grey, black and white at plus and minus its 99th percentile, which
    stands under it.

    Args:
        rows: by row label, by name: (3, H, W); a picture in [-1, 1], or a gradient of any size.
        pictures: which names are pictures.
    """
    from matplotlib.figure import Figure

    columns = list(next(iter(rows.values())))
    figure = Figure(figsize=(1.7 * len(columns), 2 * len(rows)), layout="constrained")
    for line, (label, images) in zip(
        figure.subplots(len(rows), len(columns), squeeze=False), rows.items(), strict=True
    ):
        for axes, (name, image) in zip(line, images.items(), strict=True):
            image = image.detach().float().cpu()
            scale = 1.0
            if name not in pictures:
                scale = max(image.abs().flatten().quantile(0.99).item(), 1e-12)
                axes.set_xlabel(f"± {scale:.2g}", fontsize=8)
            shown = (image / scale).clamp(-1, 1) / 2 + 0.5
            axes.imshow(shown.permute(1, 2, 0), interpolation="nearest")
            axes.set(title=name, xticks=[], yticks=[])
        line[0].set_ylabel(label)
    return figure
