"""What was measured as one self-contained HTML page: tables, pictures, plots, the runs behind them.

The page is report.html, a Jinja template with its style and its script; nothing in it is
fetched from anywhere.
"""

import base64
import io
import itertools
import json
import math
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib
import torch
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.figure import Figure
from torch import Tensor

from lmc.files import write_text
from lmc.load import load_translator
from lmc.measure.evaluate import Folder, Outputs, Tools, observe, translated
from lmc.measure.metrics import rmse
from lmc.measure.results import DISTANCES, digest_of, pixel_digest
from lmc.measure.tables import MEASURES, candidates_text, class_table, measures_table
from lmc.shards.images import ImageBatch, from_uint8, to_uint8

# How far what is measured of an output may be from what it was: another device rounds otherwise.
SAME = 5e-3
SESSION_KEYS = {"seconds", "to_step", "processes", "hardware", "commit", "dirty", "versions"}
POINTS = 150  # of a training curve; more steps are averaged
LARGEST_PNG = 128  # pixels; larger pictures are embedded as JPEG
# What of a run's scalars is shown, and what it is; of stage two and of stage one.
TRANSLATOR_CURVES = {
    "train/loss": "size of the loss's gradient (RMS)",
    "train/l2": "L2 to the source, training",
    "heldout/r_precision": "R-Precision, held out",
    "heldout/clip_score": "CLIP score, held out",
    "heldout/lpips": "LPIPS to the source, held out",
    "heldout/rmse": "RMSE to the source, held out",
    "heldout/spectrum_error": "spectrum error, held out",
}
CORRECTOR_CURVES = {
    "train/loss": "corrector, training",
    "heldout/loss": "corrector",
    "heldout/identity_loss": "identity (b = z)",
    "heldout/closed_form_loss": "closed form",
}


# ---------------------------------------------------------------------------------------------
# What the page is made from


@dataclass(frozen=True)
class Run:
    """A training, from its run folder.

    Attributes:
        config: its configuration, YAML.
        sessions: 'sessions' of its about.json; empty for a run that has none.
        curves: steps and values of its scalars, by tag.
    """

    config: str
    sessions: Sequence[Mapping[str, Any]]
    curves: Mapping[str, tuple[Sequence[float], Sequence[float]]]

    @property
    def translator(self) -> bool:
        """Whether it is of stage two."""
        return any(tag in self.curves for tag in TRANSLATOR_CURVES if tag != "train/loss")


def is_run(path: str) -> bool:
    """Whether a path is a run folder, rather than a release, pictures or a hub id.

    One that a training has written to: a result may name any folder, and a configuration is shown.
    """
    folder = Path(path)
    trained = any(folder.glob("events.out.tfevents*")) or (folder / "checkpoints").is_dir()
    return trained and (folder / "config.yaml").exists()


def read_run(folder: Path) -> Run:
    """A run from its folder.

    Raises:
        FileNotFoundError: it is no run folder.
        ValueError: its about.json is broken.
    """
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    if not is_run(str(folder)):
        raise FileNotFoundError(f"{folder} has no config.yaml of a training: not a run folder")
    about = folder / "about.json"
    try:
        sessions = json.loads(about.read_text())["sessions"] if about.exists() else []
        if not all(each.keys() >= SESSION_KEYS for each in sessions):
            raise KeyError("a session lacks a key")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{about} is not what a training writes: move it away") from error
    events = EventAccumulator(str(folder), {"scalars": 0, "images": 1, "tensors": 1}).Reload()
    curves = {}
    for tag in events.Tags()["scalars"]:
        points: dict[int, float] = {}
        for point in events.Scalars(tag):
            # A run that went on from a checkpoint did the steps after it again.
            while points and next(reversed(points)) >= point.step:
                points.popitem()
            points[point.step] = point.value
        curves[tag] = (list(points), list(points.values()))
    return Run((folder / "config.yaml").read_text(), sessions, curves)


@dataclass(frozen=True)
class Pictures:
    """Held-out images and what was made of them.

    Attributes:
        keys: of N images.
        sources: uint8 (N, 3, S, S).
        outputs: by row, by class: as `sources`.
    """

    keys: Sequence[str]
    sources: Tensor
    outputs: Mapping[str, Mapping[str, Tensor]]


@torch.no_grad()
def draw(
    result: Mapping[str, Any], batches: Iterable[ImageBatch], count: int, rows: Sequence[str]
) -> Pictures:
    """The first held-out images, translated again by the rows of a result.

    Args:
        result: see docs/evaluation.md.
        batches: the held-out images it was measured on, each once.
        count: how many to show.
        rows: which rows to show; each has a 'path'.

    Raises:
        ValueError: the images are others than those measured, or a row's outputs are.
        OSError: a row's path is no folder here; nothing is fetched.
    """
    keys = result["heldout"]["keys"][:count]
    found: dict[str, Tensor] = {}
    digests: dict[str, str] = {}
    for batch in batches:
        for key, image in zip(batch.key, to_uint8(batch.image), strict=True):
            digests[key] = pixel_digest(image.numpy())
            if key in keys:
                found[key] = image
    if digest_of(digests) != result["heldout"]["digest"]:
        raise ValueError(
            f"the held-out images in {result['heldout'].get('shards')} are not those that were "
            "measured: evaluate again, or leave the pictures out (--pictures 0)"
        )
    sources = torch.stack([found[key] for key in keys])
    outputs = {row: _translate(row, result, keys, from_uint8(sources)) for row in rows}
    return Pictures(keys, sources, outputs)


def _translate(
    row: str, result: Mapping[str, Any], keys: Sequence[str], sources: Tensor
) -> dict[str, Tensor]:
    """A row's outputs by class, checked against what was measured of them."""
    about = result["rows"][row]
    path = about.get("path")
    if path is None:
        raise ValueError(f"the result does not say what its row {row!r} was made with")
    if not Path(path).is_dir():
        raise FileNotFoundError(
            f"{path}, which the row {row!r} was made with, is no folder here, and what a result "
            "names is not fetched: evaluate a folder, or leave the pictures out (--pictures 0)"
        )
    outputs: Outputs
    if any(Path(path, name).is_dir() for name in result["settings"]["classes"]):
        outputs = Folder(Path(path))
    else:
        outputs = translated(load_translator(path))
    made = {}
    for name in result["settings"]["classes"]:
        made[name] = to_uint8(outputs(keys, sources, name))
        now = observe(from_uint8(made[name]), sources, Tools({"rmse": rmse}), None)
        for measure, values in about["per_image"].items():
            then = torch.tensor(values[name][: len(keys)])
            if measure in now and not ((now[measure] - then).abs() <= SAME).all():
                raise ValueError(
                    f"the outputs of {path} to {name} are no longer those measured as {row!r} "
                    f"({measure}): evaluate again, or leave the pictures out (--pictures 0)"
                )
    return made


# ---------------------------------------------------------------------------------------------
# The page


def write_report(
    file: Path,
    result: Mapping[str, Any],
    runs: Mapping[str, Run],
    title: str,
    pictures: Pictures | None = None,
    seeds: Sequence[Sequence[str]] = (),
) -> None:
    """Write the page.

    Args:
        file: to write.
        result: see docs/evaluation.md.
        runs: the trainings; one with a row's name has that row's colour.
        title: of the page.
        pictures: see `draw`.
        seeds: a table over several seeds, rows of cells, the first the headings.
    """
    settings, rows = result["settings"], result["rows"]
    names = [name for name in rows if name != "source"]
    translators = [name for name, run in runs.items() if run.translator]
    series = _Series([*names, *(name for name in translators if name not in names)])
    summaries = {name: row["summary"] for name, row in rows.items()}
    differences = {name: each["summary"] for name, each in result["differences"].items()}
    against = next((each["against"] for each in result["differences"].values()), None)
    environment = Environment(
        loader=PackageLoader("lmc.measure", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["split_interval"] = _split_interval
    page = environment.get_template("report.html").render(
        title=title,
        result=result,
        series=series.places,
        measures=measures_table("", summaries, settings["clip"]),
        by_class=class_table(summaries, settings["classes"]) if settings["clip"] else [],
        candidates=candidates_text(result) if settings["clip"] else "",
        against=against,
        differences=measures_table("", differences, settings["clip"], "+") if differences else [],
        seeds=seeds,
        blocks=_blocks(result, pictures) if pictures else {},
        pictures=pictures,
        confusions={name: rows[name]["confusion"] for name in names if "confusion" in rows[name]},
        places=dict(zip(settings["candidates"], _endings(settings["candidates"]), strict=True)),
        plots=_result_plots(result, names, series),
        training=_training_plots(runs, series),
        runs={name: _facts(run) | {"config": run.config} for name, run in runs.items()},
    )
    write_text(file, page)


def _split_interval(cell: str) -> tuple[str, str]:
    """'0.1 [0.0, 0.2]' as what is shown large and small."""
    value, bracket, rest = cell.partition(" [")
    return value, bracket.strip() + rest


def _endings(prompts: Sequence[str]) -> list[str]:
    """Prompts without the words that all begin with: 'a photo of a bear' as 'bear'."""
    words = [prompt.split() for prompt in prompts]
    same = itertools.takewhile(lambda several: len(set(several)) == 1, zip(*words, strict=False))
    common = len(list(same)) if len(prompts) > 1 else 0
    return [" ".join(each[common:]) or prompt for each, prompt in zip(words, prompts, strict=True)]


def _blocks(result: Mapping[str, Any], pictures: Pictures) -> dict[str, Any]:
    """'sources', their addresses; 'classes', by class and row each output's address and caption."""
    sources = [_embedded(image) for image in pictures.sources]
    blocks: dict[str, Any] = {}
    for name in result["settings"]["classes"]:
        block = blocks[name] = {}
        for row, outputs in pictures.outputs.items():
            values = result["rows"][row]["per_image"]
            block[row] = [
                {
                    "image": _embedded(image),
                    "caption": f"{row}, {key} to {name}: {_caption(values, name, i)}",
                }
                for i, (key, image) in enumerate(zip(pictures.keys, outputs[name], strict=True))
            ]
    return {"sources": sources, "classes": blocks}


def _caption(values: Mapping[str, Any], name: str, i: int) -> str:
    """What was measured of the i-th output to a class."""
    parts = []
    for measure in (*DISTANCES, "clip_score"):
        if measure in values:
            head, form = MEASURES[measure]
            parts.append(f"{head.partition(' (')[0]} {values[measure][name][i]:{form}}")
    if "r_precision" in values:
        parts.append("recognised" if values["r_precision"][name][i] else "not recognised")
    return ", ".join(parts)


def _embedded(image: Tensor) -> str:
    """A uint8 (3, H, W) as a data: address."""
    from PIL import Image

    kind = "png" if image.shape[-1] <= LARGEST_PNG else "jpeg"
    buffer = io.BytesIO()
    picture = Image.fromarray(image.permute(1, 2, 0).cpu().numpy())
    picture.save(buffer, kind, quality=90)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _facts(run: Run) -> dict[str, str]:
    """What a run was made with, for reading."""
    if not run.sessions:
        return {"made with": "not recorded (a run of an earlier version)"}
    last = run.sessions[-1]
    seconds = sum(each["seconds"] for each in run.sessions)
    several = f", in {len(run.sessions)} sessions" if len(run.sessions) > 1 else ""

    def all_of(key: str) -> str:
        return ", then ".join(dict.fromkeys(str(each[key]) for each in run.sessions))

    commits = [
        f"{(each['commit'] or 'not known')[:12]}{' with changes' if each['dirty'] else ''}"
        for each in run.sessions
    ]
    return {
        "steps": str(last["to_step"]),
        "wall time": (f"{seconds / 3600:.2f} h" if seconds > 3600 else f"{seconds:.0f} s")
        + several,
        "processes": all_of("processes"),
        "hardware": all_of("hardware"),
        "commit": ", then ".join(dict.fromkeys(commits)),
        "versions": ", ".join(f"{name} {value}" for name, value in last["versions"].items()),
    }


# ---------------------------------------------------------------------------------------------
# Plots, as SVG whose colours are the page's


@dataclass
class _Series:
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


def _plot(
    curves: Curves,
    series: _Series,
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
    series: _Series,
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


def _result_plots(
    result: Mapping[str, Any], names: Sequence[str], series: _Series
) -> dict[str, Markup]:
    """By caption: what the page shows of all rows together."""
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


def _training_plots(runs: Mapping[str, Run], series: _Series) -> dict[str, Markup]:
    """By caption: the curves of all stage-two runs together, and of each stage-one run."""
    plots = {}
    for tag, caption in TRANSLATOR_CURVES.items():
        curves = {
            name: _thinned(*run.curves[tag])
            for name, run in runs.items()
            if run.translator and tag in run.curves
        }
        if curves:
            plots[caption] = _plot(curves, series, ("step", ""))
    for name, run in runs.items():
        if run.translator:
            continue
        own = _Series(list(CORRECTOR_CURVES.values()))
        curves = {
            label: _thinned(*run.curves[tag])
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


def _thinned(
    steps: Sequence[float], values: Sequence[float]
) -> tuple[Sequence[float], Sequence[float]]:
    """A curve of at most `POINTS` points: means of as many neighbours each."""
    each = math.ceil(len(steps) / POINTS)
    parts = [slice(i, i + each) for i in range(0, len(steps), each)]
    return tuple([statistics.mean(x[part]) for part in parts] for x in (steps, values))  # type: ignore[return-value]
