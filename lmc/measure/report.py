"""What was measured as one self-contained HTML page: tables, pictures, plots, the runs behind them.

The page is report.html, a Jinja template with its style and its script; nothing in it is
fetched from anywhere.
"""

import base64
import io
import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jinja2 import Environment, PackageLoader, StrictUndefined
from torch import Tensor

from lmc.files import write_text
from lmc.load import load_translator
from lmc.measure.evaluate import (
    Folder,
    Outputs,
    Tools,
    Truth,
    against_truth,
    observe,
    translated,
)
from lmc.measure.metrics import rmse
from lmc.measure.plots import Series, result_plots, training_plots
from lmc.measure.results import DISTANCES, digest_of, pixel_digest
from lmc.measure.runs import Run
from lmc.measure.tables import MEASURES, candidates_text, class_table, measures_table
from lmc.shards.images import ImageBatch, from_uint8, to_uint8

# How far what is measured of an output may be from what it was: another device rounds otherwise.
SAME = 5e-3
LARGEST_PNG = 128  # pixels; larger pictures are embedded as JPEG


# ---------------------------------------------------------------------------------------------
# What the page is made from


@dataclass(frozen=True)
class Pictures:
    """Held-out images and what was made of them.

    Attributes:
        keys: of N images.
        sources: uint8 (N, 3, S, S).
        outputs: by row, by class: as `sources`.
        truth: their true counterparts, by class: as `sources`; None where there are none.
    """

    keys: Sequence[str]
    sources: Tensor
    outputs: Mapping[str, Mapping[str, Tensor]]
    truth: Mapping[str, Tensor] | None = None


@torch.no_grad()
def draw(
    result: Mapping[str, Any], batches: Iterable[ImageBatch], count: int, rows: Sequence[str]
) -> Pictures:
    """The first held-out images, translated again by the rows of a result.

    With their true counterparts, where they were measured against some whose folder is still here.

    Args:
        result: see docs/evaluation.md.
        batches: the held-out images it was measured on, each once.
        count: how many to show.
        rows: which rows to show; each has a 'path'.

    Raises:
        ValueError: the images are others than those measured, or a row's outputs or true
            counterparts are.
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
    images, truth = from_uint8(sources), _truth(result, sources.shape[-1])
    outputs = {row: _translate(row, result, keys, images, truth) for row in rows}
    classes = result["settings"]["classes"]
    true = {name: to_uint8(truth(keys, images, name)) for name in classes} if truth else None
    return Pictures(keys, sources, outputs, true)


def _truth(result: Mapping[str, Any], size: int) -> Truth | None:
    """The true counterparts a result was measured against, if they are here."""
    path = (result.get("truth") or {}).get("path")
    if path is None or not Path(path).is_dir():
        return None
    return Truth(Path(path), result["settings"]["classes"], size)


def _translate(
    row: str,
    result: Mapping[str, Any],
    keys: Sequence[str],
    sources: Tensor,
    truth: Truth | None,
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
        image, tools = from_uint8(made[name]), Tools({"rmse": rmse})
        now, _ = observe(image, sources, tools, None)
        if truth is not None:
            now |= against_truth(image, truth(keys, sources, name), tools)
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
    series = Series([*names, *(name for name in translators if name not in names)])
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
        plots=result_plots(result, names, series),
        training=training_plots(runs, series),
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
    """'sources': addresses; 'classes': by class and row each picture's address and caption."""
    sources = [_embedded(image) for image in pictures.sources]
    blocks: dict[str, Any] = {}
    for name in result["settings"]["classes"]:
        block = blocks[name] = {}
        if pictures.truth is not None:
            block["true counterpart"] = [
                {"image": _embedded(image), "caption": f"{key} as a {name}, its true counterpart"}
                for key, image in zip(pictures.keys, pictures.truth[name], strict=True)
            ]
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
    for measure in (*DISTANCES, *(f"truth_{name}" for name in DISTANCES), "clip_score"):
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
