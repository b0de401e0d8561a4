"""What is measured of a comparison's trainings, and their picture."""

import hashlib
import traceback
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from lmc.compare.runs import Run, steps_done
from lmc.files import read_json, whole, write_json
from lmc.load import load_averaged
from lmc.measure.evaluate import (
    Folder,
    Prompts,
    Tools,
    Truth,
    evaluate,
    heldout_keys,
    real_features,
    real_images,
    translated,
)
from lmc.measure.figures import labelled_grid
from lmc.measure.metrics import Clip, distances
from lmc.measure.results import VERSION, Real, numbers
from lmc.shards.images import ImageStream
from lmc.shards.stream import expand_shards
from lmc.translator import Translator

BATCH, PICTURES = 50, 10  # held-out images at a time, and in the picture


@dataclass(frozen=True)
class References:
    """What the outputs are measured against beside their sources.

    Attributes:
        truth: the true counterparts of the held-out images, if there are any.
        real: real images of the targets, by CLIP's features, if there are any.
        about: what tells them from others, 'truth' and 'real', of those there are.
    """

    truth: Truth | None = None
    real: Real | None = None
    about: Mapping[str, str] = field(default_factory=dict)


def references(
    truth: Path | None, real: str | None, clip: Clip, config: Mapping[str, Any], device: str
) -> References:
    """What is named with `--truth` and `--real`, checked and read.

    Raises:
        OSError, ValueError: see `Truth`, `Folder.check_has`, `real_images`, `real_features`.
    """
    classes, data = config["model"]["classes"], config["data"]
    size = data["image_size"]
    about: dict[str, str] = {}
    true = None
    if truth is not None:
        true = Truth(truth, classes, size)
        stream = ImageStream(data["heldout"], size, BATCH, training=False)
        true.check_has(classes, heldout_keys(stream)[0], "true counterpart")
        about["truth"] = _stamp(_files(true))
    pictures = None
    if real is not None:
        batches = real_images(real, classes, size, BATCH)
        pictures = real_features(batches, Tools({}, clip), classes, device)
        about["real"] = _stamp(
            _files(Folder(Path(real))) if Path(real).is_dir() else expand_shards(real)
        )
    return References(true, pictures, about)


def _files(folder: Folder) -> list[str]:
    return [str(file) for each in folder.files.values() for file in each.values()]


def _stamp(files: Iterable[str]) -> str:
    """What tells files from others, and from what they were, without reading them."""
    lines = []
    for file in files:
        there = Path(file).stat() if Path(file).exists() else None  # or it is a URL
        lines.append(f"{file} {there and (there.st_size, there.st_mtime_ns)}\n")
    return hashlib.sha256("".join(sorted(lines)).encode()).hexdigest()


def measure_run(
    run: Path | None,
    folder: Path,
    name: str,
    clip: Clip,
    config: Mapping[str, Any],
    device: str,
    beside: References = References(),
) -> dict[str, Any]:
    """The numbers of a run's averaged weights, or of none; the whole result is kept in `folder`."""
    file = folder / "evaluation.json"
    model, data = config["model"], config["data"]
    tools = Tools(distances(data["image_size"]), clip, truth=beside.truth)
    row = "source" if run is None else name
    about: dict[str, Any] = {
        "version": VERSION,
        "clip": clip.name,
        "distances": list(tools.distances),
        **beside.about,
    }
    if run is not None:
        checkpoint = (run / "checkpoints" / "last.ckpt").stat()
        about["checkpoint"] = [checkpoint.st_size, checkpoint.st_mtime_ns]
    if file.exists():
        there = read_json(file, ("of", "measured"))
        if there["of"] == about:
            return numbers(there["measured"]["rows"][row])
    stream = ImageStream(data["heldout"], data["image_size"], BATCH, training=False)
    targets = {target: model["prompt"].format(target) for target in model["classes"]}
    measured = evaluate(
        {row: None if run is None else translated(_translator(run).to(device))},
        lambda: DataLoader(stream, batch_size=None),
        tools,
        Prompts(targets, [*targets.values(), model["prompt"].format(model["source"])]),
        device,
        real=beside.real,
    )
    if beside.truth is not None:
        measured["truth"]["path"] = str(beside.truth.path)
    write_json(file, {"of": about, "measured": measured})
    print(f"measured {name}: {measured['heldout']['count']} images")
    return numbers(measured["rows"][row])


def row_of(run: Run, measure: Callable[..., dict[str, Any]]) -> dict[str, Any]:
    """What results.json says of a finished run."""
    file = run.folder / "training.json"
    # Absent where this process was killed after the training's last checkpoint: how long it took
    # is then not known.
    seconds = read_json(file, ("seconds",))["seconds"] if file.exists() else None
    return {
        **measure(run.folder, run.folder, run.name),
        "seconds": seconds,
        "steps": steps_done(run.folder),
        "evaluations_per_image": run.evaluations,
    }


def not_measured(run: Run, error: Exception) -> dict[str, Any]:
    """The row of a run that was trained and cannot be measured; the whole error is in its log."""
    log = run.folder / "log.txt"
    with open(log, "a") as file:
        traceback.print_exception(error, file=file)
    why = f"it cannot be measured: {error}"
    print(f"{run.name} failed, see {log}:\n{why}")
    return {"failed": why, "log": str(log)}


def draw(
    runs: Mapping[str, Path], config: Mapping[str, Any], out: Path, truth: Truth | None = None
) -> list[str]:
    """grid.png: held-out images, their true counterparts, and of each loss what it makes of them.

    Returns:
        A line for each loss that could not be drawn.
    """
    data, model = config["data"], config["model"]
    stream = ImageStream(data["heldout"], data["image_size"], PICTURES, training=False)
    batch = next(iter(stream))
    source = batch.image
    blocks = {"held-out images": {model["source"]: source}}
    if truth is not None:
        blocks["true counterparts"] = {
            target: truth(batch.key, source, target) for target in model["classes"]
        }
    lines: list[str] = []
    for label, run in runs.items():
        try:
            translator = _translator(run)
            with torch.no_grad():
                blocks[label] = {
                    target: translator(source, translator.class_ids([target] * len(source)))
                    for target in model["classes"]
                }
        except Exception as error:  # as with the table
            lines.append(f"{label} is not in grid.png: {error}")
            print(lines[-1])
    with whole(out / "grid.png") as partial_file:
        labelled_grid(blocks).save(partial_file, "png")
    return lines


def _translator(run: Path) -> Translator:
    network, _ = load_averaged(run)
    assert isinstance(network, Translator)
    return network
