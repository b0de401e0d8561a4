"""What is measured of a comparison's trainings, and their picture."""

import hashlib
import traceback
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
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
from lmc.measure.metrics import Classifier, Clip, distances
from lmc.measure.results import VERSION, Real, numbers
from lmc.shards.images import ImageStream
from lmc.shards.stream import expand_shards
from lmc.translator import Translator

BATCH, PICTURES = 50, 10  # held-out images at a time, and in the picture


@dataclass(frozen=True)
class Measures:
    """What the outputs of all trainings are measured by.

    Attributes:
        tools: networks, and the true counterparts of the held-out images, if there are any.
        real: real images of the targets, by the networks' features, if there are any.
        about: what tells all of them from others.
    """

    tools: Tools
    real: Real | None
    about: Mapping[str, Any]

    @property
    def truth(self) -> Truth | None:
        """The true counterparts."""
        assert self.tools.truth is None or isinstance(self.tools.truth, Truth)
        return self.tools.truth


def measures(
    clip: Clip,
    truth: Path | None,
    real: str | None,
    classifier: Classifier | None,
    config: Mapping[str, Any],
    device: str,
) -> Measures:
    """What is named with `--clip`, `--truth`, `--real` and `--classifier`, checked and read.

    Raises:
        OSError, ValueError: see `Truth`, `Folder.check_has`, `real_images`, `real_features`.
    """
    classes, data = config["model"]["classes"], config["data"]
    size = data["image_size"]
    by_source = distances(size)
    about: dict[str, Any] = {"version": VERSION, "clip": clip.name, "distances": list(by_source)}
    true = None
    if truth is not None:
        true = Truth(truth, classes, size)
        stream = ImageStream(data["heldout"], size, BATCH, training=False)
        true.check_has(classes, heldout_keys(stream)[0], "true counterpart")
        about["truth"] = _stamp(_files(true))
    if classifier is not None:
        about["classifier"] = classifier.name
    tools = Tools(by_source, clip, truth=true, classifier=classifier)
    pictures = None
    if real is not None:
        batches = real_images(real, classes, size, BATCH)
        pictures = real_features(batches, tools, classes, device)
        about["real"] = _stamp(
            _files(Folder(Path(real))) if Path(real).is_dir() else expand_shards(real)
        )
    return Measures(tools, pictures, about)


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
    by: Measures,
    config: Mapping[str, Any],
    device: str,
) -> dict[str, Any]:
    """The numbers of a run's averaged weights, or of none; the whole result is kept in `folder`."""
    file = folder / "evaluation.json"
    model, data = config["model"], config["data"]
    row = "source" if run is None else name
    about = dict(by.about)
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
        by.tools,
        Prompts(targets, [*targets.values(), model["prompt"].format(model["source"])]),
        device,
        real=by.real,
    )
    if by.truth is not None:
        measured["truth"]["path"] = str(by.truth.path)
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
