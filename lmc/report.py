"""What was measured and made, for people who look: picture grids, plots of spectra, tables."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torchvision.utils import make_grid


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
    """
    from PIL import Image, ImageDraw, ImageFont

    first = next(iter(next(iter(blocks.values())).values()))
    count, _, side, width = first.shape
    margin, title = 76, 18
    rows = sum(len(block) for block in blocks.values())
    size = (margin + count * (width + 2), rows * (side + 2) + title * len(blocks))
    sheet = Image.new("RGB", size, "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(12)
    y = 0
    for name, block in blocks.items():
        draw.text((margin, y + 1), name, "black", font)
        y += title
        for label, images in block.items():
            draw.text((4, y + side // 2 - 7), label, "black", font)
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


def curves_figure(
    curves: Mapping[str, Sequence[tuple[float, float, str]]], xlabel: str, ylabel: str
) -> Any:
    """Curves through labelled points as a matplotlib figure.

    Args:
        curves: by name: (x, y, label) of each point, in the curve's order.
        xlabel, ylabel: of the axes.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 5), layout="constrained")
    axes = figure.subplots()
    for name, points in curves.items():
        axes.plot([x for x, _, _ in points], [y for _, y, _ in points], "o-", label=name)
        for x, y, label in points:
            axes.annotate(label, (x, y), (3, 3), textcoords="offset points", fontsize=7)
    axes.set(xlabel=xlabel, ylabel=ylabel)
    axes.legend()
    return figure


def statistics_figure(spectra: Mapping[str, Tensor], histograms: Mapping[str, Tensor]) -> Any:
    """Image statistics [LMC, Fig. 6] as a matplotlib figure, a curve each.

    Args:
        spectra: average power spectra, (F,) by name.
        histograms: of vertical derivatives in [-1, 1], (bins,) by name.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name, spectrum in spectra.items():
        left.loglog(range(1, len(spectrum) + 1), spectrum.float().cpu(), label=name)
    for name, histogram in histograms.items():
        centres = (torch.arange(len(histogram)) + 0.5) / len(histogram) * 2 - 1
        right.semilogy(centres, histogram.float().cpu().clamp_min(1e-7), label=name)
    left.set(xlabel="cycles per image", ylabel="power")
    right.set(xlabel="vertical derivative", ylabel="share")
    left.legend()
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


# The table's columns: what is measured, its heading and format.
COLUMNS = {
    "distance": ("{distance_name} to source", ".3f"),
    "clip_score": ("CLIP score", ".3f"),
    "r_precision": ("R-Precision", ".3f"),
    "spectrum_error": ("spectrum error", ".3f"),
}


def table(
    rows: Mapping[str, Mapping[str, Any] | Sequence[Mapping[str, Any]]],
    more: Mapping[str, tuple[str, str]] | None = None,
) -> str:
    """The translators' measurements as a Markdown table, one row a loss.

    Args:
        rows: `lmc.results.numbers` by name; or several of them, of one seed each: their
            mean ± sample standard deviation is shown, and 'failed' where there are none.
        more: further columns, as `COLUMNS`; a row that lacks one has a dash there.
    """
    seeds = {n: [row] if isinstance(row, Mapping) else list(row) for n, row in rows.items()}
    columns = COLUMNS | dict(more or {})
    about = next((row for several in seeds.values() for row in several), {"distance_name": "rmse"})
    heads = [head.format_map(about) for head, _ in columns.values()]
    lines = [f"| {' | '.join(['loss', *heads])} |", "|---" * (1 + len(columns)) + "|"]
    for name, several in seeds.items():
        cells = [
            spread([row[key] for row in several if row.get(key) is not None], form)
            for key, (_, form) in columns.items()
        ]
        cells = cells if several else ["failed", *[""] * (len(columns) - 1)]
        lines.append(f"| {' | '.join([name, *cells])} |")
    return "\n".join(lines)


def spread(values: Sequence[float], form: str) -> str:
    """Mean ± sample standard deviation; of one value or one count, that; a dash of none."""
    if not values:
        return "–"
    if len(values) == 1 or (isinstance(values[0], int) and len(set(values)) == 1):
        return format(values[0], form)
    return f"{statistics.mean(values):{form}} ± {statistics.stdev(values):{form}}"


# The columns of an evaluation: what is measured, its heading and format.
MEASURES = {
    "lpips": ("LPIPS to source", ".3f"),
    "rmse": ("RMSE to source", ".3f"),
    "one_minus_ssim": ("1 − SSIM to source", ".3f"),
    "clip_score": ("CLIP score ({clip})", ".3f"),
    "clip_score_100": ("100 max(cos, 0)", ".1f"),
    "r_precision": ("R-Precision ({clip})", ".3f"),
    "kid": ("KID", ".4f"),
    "fid": ("FID", ".2f"),
    "spectrum_error": ("spectrum error", ".3f"),
    "saturation": ("saturation", ".4f"),
}


def evaluation_text(result: Mapping[str, Any]) -> str:
    """A result of `lmc.evaluate.evaluate` as Markdown.

    The table of all rows; R-Precision by class; what R-Precision ranks among; the differences to
    one row; what was left out and excluded, a line each.
    """
    settings, heldout, rows = result["settings"], result["heldout"], result["rows"]
    summaries = {name: row["summary"] for name, row in rows.items()}
    parts = [
        measures_table("", summaries, settings["clip"]),
        f"[95 % bootstrap intervals] over {heldout['count']} held-out images, "
        f"each to {', '.join(settings['classes'])}; their digest is {heldout['digest'][:16]}.",
    ]
    if settings["clip"] is not None:
        lines = [["R-Precision", *settings["classes"]]]
        for name, each in summaries.items():
            cells = each["r_precision"]["by_class"].values()
            lines.append([name, *(_cell(cell, ".3f") for cell in cells)])
        candidates = ", ".join(map(repr, settings["candidates"]))
        parts += [markdown(lines), f"R-Precision ranks among {candidates}."]
    differences = {name: each["summary"] for name, each in result["differences"].items()}
    for other in {each["against"] for each in result["differences"].values()}:
        parts.append(measures_table(f"minus {other}", differences, settings["clip"], "+"))
    parts += result["left_out"]
    if heldout["excluded"]:
        number = len(heldout["excluded"])
        parts.append(f"{number} held-out images cannot be read and are in no figure:")
        parts.append("\n".join(heldout["excluded"]))
    return "\n\n".join(parts)


def measures_table(
    corner: str, summaries: Mapping[str, Mapping[str, Any]], clip: str | None, sign: str = ""
) -> str:
    """Measures with their intervals as a Markdown table, a row each.

    Args:
        corner: what stands above the names.
        summaries: by name, as 'summary' in a result.
        clip: the name of the CLIP model, for the headings.
        sign: '+' writes it before positive values.
    """
    columns = {
        name: (head.format(clip=clip), sign + form)
        for name, (head, form) in MEASURES.items()
        if any(name in each for each in summaries.values())
    }
    lines = [[corner, *(head for head, _ in columns.values())]]
    for name, each in summaries.items():
        cells = (_cell(each.get(key), form) for key, (_, form) in columns.items())
        lines.append([name, *cells])
    return markdown(lines)


def _cell(about: Mapping[str, Any] | None, form: str) -> str:
    if about is None:
        return "–"
    value = format(about["value"], form)
    if about.get("low") is not None:
        return f"{value} [{about['low']:{form}}, {about['high']:{form}}]"
    return f"{value} ± {about['deviation']:{form}}" if "deviation" in about else value


def markdown(lines: Sequence[Sequence[str]]) -> str:
    """Rows of cells, the first the headings, as a Markdown table."""
    head, *body = (f"| {' | '.join(line)} |" for line in lines)
    return "\n".join([head, "|---" * len(lines[0]) + "|", *body])
