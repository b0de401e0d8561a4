"""The report's plots, as SVG whose colours are the page's."""

import io
import math
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import matplotlib
from markupsafe import Markup
from matplotlib.figure import Figure

from lmc.measure.runs import CORRECTOR_CURVES, TRANSLATOR_CURVES, Run
from lmc.measure.tables import MEASURES

POINTS = 150  # of a training curve; more steps are averaged
# Stand-ins for the page's colours, which matplotlib cannot name.
INK, LINE = "#fd0000", "#fd0001"
STYLE: Any = {
    "svg.fonttype": "none",
    "font.size": 10,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": LINE,
    "xtick.color": INK,
    "ytick.color": INK,
    "grid.color": LINE,
    "grid.linewidth": 0.5,
    "axes.grid": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
}
Curves = Mapping[str, tuple[Sequence[float], Sequence[float]]]


@dataclass
class Series:
    """Which of the page's colours, --s0 to --s7, and dashes a name has."""

    names: Sequence[str]
    places: dict[str, int] = field(init=False)

    def __post_init__(self) -> None:
        self.places = {name: i for i, name in enumerate(self.names)}

    def style(self, name: str) -> dict[str, Any]:
        """Of a matplotlib line; the page's text colour for what is no series."""
        i = self.places.get(name)
        if i is None:
            return {"color": INK, "linestyle": (0, (1, 1.5)), "linewidth": 1.4}
        dashes = ("-", (0, (5, 2)), (0, (1.5, 1.5)), (0, (6, 2, 1.5, 2)))[i // 8 % 4]
        return {
            "color": f"#fe00{i % 8:02x}",
            "linestyle": dashes,
            "linewidth": 1.6,
            "gid": f"series-{i}",
        }


def _plot(
    curves: Curves,
    series: Series,
    labels: tuple[str, str],
    scales: tuple[str, str] = ("linear", "linear"),
    legend: bool = False,
) -> Markup:
    """Curves, x and y by name, as SVG."""
    with matplotlib.rc_context(STYLE):
        figure, axes = _figure(labels)
        for name, (x, y) in curves.items():
            style = series.style(name)
            if legend:  # its own: no row of the page
                style.pop("gid")
            axes.plot(x, y, label=name, marker="." if len(x) < 12 else "", **style)
        axes.set(xscale=scales[0], yscale=scales[1])
        if legend:
            axes.legend(frameon=False, fontsize=9)
        return _svg(figure)


def _scatter(
    points: Mapping[str, tuple[Mapping[str, Any], Mapping[str, Any]]],
    series: Series,
    labels: tuple[str, str],
) -> Markup:
    """A point a name, x and y as cells of a result, with their intervals, as SVG."""
    with matplotlib.rc_context(STYLE):
        figure, axes = _figure(labels)
        middle = statistics.mean(x["value"] for x, _ in points.values())
        for name, cells in points.items():
            style = series.style(name)
            (x, *x_bar), (y, *y_bar) = ([c["value"], *_bar(c)] for c in cells)
            marker, caps, bars = axes.errorbar(
                x,
                y,
                [[v] for v in y_bar],
                [[v] for v in x_bar],
                "o",
                color=style["color"],
                elinewidth=1,
                markersize=5,
            )
            left = x > middle  # of its point, so that it stays inside the axes
            text = axes.annotate(
                name if len(name) <= 24 else f"{name[:23]}…",
                (x, y),
                (-4 if left else 4, 4),
                textcoords="offset points",
                ha="right" if left else "left",
                fontsize=8,
                parse_math=False,
                in_layout=False,
            )
            for artist in (marker, *caps, *bars, text):
                artist.set_gid(style["gid"])
        axes.margins(0.12)
        return _svg(figure)


def _bar(cell: Mapping[str, Any]) -> tuple[float, float]:
    """How far a cell's interval goes to either side; a bootstrap's may leave its value out."""
    if cell["low"] is None:
        return 0.0, 0.0
    return max(0.0, cell["value"] - cell["low"]), max(0.0, cell["high"] - cell["value"])


def _figure(labels: tuple[str, str]) -> Any:
    figure = Figure(figsize=(4.8, 3.2), layout="constrained")
    axes = figure.subplots()
    axes.set(xlabel=labels[0], ylabel=labels[1])
    return figure, axes


def _svg(figure: Any) -> Markup:
    """A figure as an <svg> that takes the page's colours and width."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.S)
    text = re.sub(r'<svg [^>]*?(viewBox="[^"]*")[^>]*>', r"<svg \1>", text, count=1)
    text = re.sub(r'id="series-(\d+)"', r'class="series" data-series="\1"', text)
    # What is left of ids repeats from figure to figure; only those of clips and markers are used.
    text = re.sub(r' id="[a-z]+[a-z0-9.]*_\d+"', "", text)
    text = text.replace(INK, "var(--ink)").replace(LINE, "var(--line)")
    return Markup(re.sub(r"#fe00(0\d)", lambda x: f"var(--s{int(x[1])})", text))


def result_plots(
    result: Mapping[str, Any], names: Sequence[str], series: Series
) -> dict[str, Markup]:
    """What the page shows of all rows together, an <svg> by caption.

    Args:
        result: see docs/evaluation.md.
        names: of the rows that are shown; the source is beside them.
        series: their colours.
    """
    settings, rows, source = result["settings"], result["rows"], result["source"]
    plots = {}
    distance = settings["distance"]
    if settings["clip"] and names:
        points = {
            name: (rows[name]["summary"]["clip_score"], rows[name]["summary"][distance])
            for name in names
        }
        head = MEASURES[distance][0]
        caption = f"{head} over CLIP score, with 95 % intervals: right and low is better"
        plots[caption] = _scatter(points, series, (f"CLIP score ({settings['clip']})", head))
    spectra = {"source": source["spectrum"]} | {n: rows[n]["spectra"]["all"] for n in names}
    plots["Average power spectrum"] = _plot(
        {name: (range(1, len(y) + 1), y) for name, y in spectra.items()},
        series,
        ("cycles per image", "power"),
        ("log", "log"),
    )
    if truth := result.get("truth"):
        theirs = truth["spectra"]["all"]
        plots["Average power over the true counterparts': below 1 is lost, above gained"] = _plot(
            {
                name: (
                    range(1, len(y) + 1),
                    [a / b if b else math.nan for a, b in zip(y, theirs, strict=True)],
                )
                for name, y in spectra.items()
            },
            series,
            ("cycles per image", "power over the truth's"),
            ("log", "log"),
        )
    shares = {"source": source["histogram"]} | {n: rows[n]["histograms"]["all"] for n in names}
    plots["Histogram of vertical derivatives"] = _plot(
        {
            # A bin that no derivative fell into has no place on a logarithmic axis.
            name: (_centres(len(y)), [value or math.nan for value in y])
            for name, y in shares.items()
        },
        series,
        ("vertical derivative", "share"),
        ("linear", "log"),
    )
    return plots


def _centres(bins: int) -> list[float]:
    """The middles of bins of equal width over [-1, 1]."""
    return [(i + 0.5) / bins * 2 - 1 for i in range(bins)]


def training_plots(runs: Mapping[str, Run], series: Series) -> dict[str, Markup]:
    """The curves of all stage-two runs together, and of each stage-one run, an <svg> by caption.

    Args:
        runs: the trainings, by name.
        series: the colours of those of stage two.
    """
    plots = {}
    for tag, caption in TRANSLATOR_CURVES.items():
        curves = {
            name: thinned(*run.curves[tag])
            for name, run in runs.items()
            if run.translator and tag in run.curves
        }
        if curves:
            plots[caption] = _plot(curves, series, ("step", ""))
    for name, run in runs.items():
        if run.translator:
            continue
        own = Series(list(CORRECTOR_CURVES.values()))
        curves = {
            label: thinned(*run.curves[tag])
            for tag, label in CORRECTOR_CURVES.items()
            if tag in run.curves
        }
        if curves:
            caption = f"{name}: L_k of the corrector, held out unless said"
            plots[caption] = _plot(curves, own, ("step", ""), ("linear", "log"), legend=True)
        by_time = _by_time(run)
        if by_time:
            caption = f"{name}: held-out L_k by noise level, at the last validation"
            plots[caption] = _plot(by_time, own, ("t", ""), ("linear", "log"), legend=True)
    return plots


def _by_time(run: Run) -> Curves:
    """The last values of a stage-one run's curves by bins of t, by label, at the bins' starts."""
    found = {}
    for tag, label in CORRECTOR_CURVES.items():
        bins = sorted(x for x in run.curves if x.startswith(f"{tag}/t") and "heldout" in x)
        if bins:
            starts = [float(each.rpartition("/t")[2]) for each in bins]
            found[label] = (starts, [run.curves[each][1][-1] for each in bins])
    return found


def thinned(
    steps: Sequence[float], values: Sequence[float]
) -> tuple[Sequence[float], Sequence[float]]:
    """A curve of at most `POINTS` points: means of as many neighbours each."""
    each = math.ceil(len(steps) / POINTS)
    parts = [slice(i, i + each) for i in range(0, len(steps), each)]
    return tuple([statistics.mean(x[part]) for part in parts] for x in (steps, values))  # type: ignore[return-value]
