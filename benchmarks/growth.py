"""Time and memory of a step of stage two by batch, resolution, classes and steps of multi-step SDS,
and of reading by the number of shards: nothing should grow faster than what it is of.

    python benchmarks/growth.py --out runs/growth

Each point is a training of a few steps on the demo's prior, on pictures of noise, in a process of
its own (on a CPU; its peak is of the whole process, less that of one that trains nothing), with all
but one thing as in configs/translator/demo.yaml. Of reading it is the first batch and then batches
of 8 of 1,000 pictures, in as many shards as named. Prints a table with the exponent between the
last two points (1 is proportional), then JSON; OUT/growth.png is the plot.
"""

import argparse
import json
import multiprocessing
import resource
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from gpu import write_pictures
from step import TRANSLATOR, Timed, measure

from lmc.shards.images import ImageStream
from lmc.training.translator import TranslatorTraining

SIZE, PICTURES = 32, 1000
CLASSES = ("bear", "dog", "lion", "squirrel", "tiger", "fox", "raccoon", "badger")
AXES: dict[str, tuple[int, ...]] = {
    "images a batch": (4, 8, 16, 32),
    "pixels a side": (32, 64, 128, 256),
    "classes at once": (1, 2, 4, 8),
    "steps of ms_sds": (1, 2, 4, 8),
}
SHARDS = (1, 10, 100, 1000)


class Alone(Timed):
    """Steps, and not their parts."""

    alone = True


def step(axis: str, value: int, steps: int, folder: Path) -> tuple[float, float]:
    """Milliseconds of a step, and MB at the peak."""
    size = value if axis == "pixels a side" else SIZE
    pictures = write_pictures(folder / str(size), size, 64)
    options = [f"--data.{x}={pictures}/{x}-*.tar" for x in ("train", "heldout")]
    options += [f"--model.image_size={size}", "--trainer.logger=false", "--model.loss=SDS"]
    if axis == "images a batch":
        options.append(f"--data.batch_size={value}")
    elif axis == "classes at once":
        options += [f"--model.classes={json.dumps(CLASSES[:value])}", "--model.every_class=true"]
        options.append("--data.batch_size=2")
    elif axis == "steps of ms_sds":
        options[-1:] = ["--model.loss=MSSDS", f"--model.loss.steps={value}"]
    options += ["--model.validation={clip: null, truth: null}"]
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    found = measure(TranslatorTraining, TRANSLATOR, steps, options, Alone)["step"]
    return found, peak()


def reading(shards: int, folder: Path) -> tuple[float, float]:
    """Milliseconds until the first batch, and those of a batch after that."""
    urls = write_pictures(folder / f"shards{shards}", SIZE, PICTURES // shards, shards)
    began = time.perf_counter()
    batches = iter(ImageStream(f"{urls}/train-*.tar", SIZE, 8, training=True))
    next(batches)
    first, times = time.perf_counter() - began, []
    for _ in range(100):
        began = time.perf_counter()
        next(batches)
        times.append(time.perf_counter() - began)
    return 1e3 * first, 1e3 * statistics.fmean(times)


def peak() -> float:
    """MB at the peak: of the GPU, or of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


def _tell(pipe: Any, task: Callable[..., Any], given: Sequence[Any]) -> None:
    pipe.send(task(*given))


def apart(task: Callable[..., Any], *given: Any) -> Any:
    """What a task returns, run in a process of its own where that is possible: not with CUDA."""
    if torch.cuda.is_available():
        return task(*given)
    ours, theirs = multiprocessing.Pipe()
    child = multiprocessing.get_context("fork").Process(target=_tell, args=(theirs, task, given))
    child.start()
    theirs.close()
    found = ours.recv()
    child.join()
    return found


def exponent(values: Sequence[int], found: Sequence[float]) -> float:
    """b of found ~ values^b between the last two."""
    return float(np.log(found[-1] / found[-2]) / np.log(values[-1] / values[-2]))


def picture(rows: Any, file: Path) -> None:
    """A panel an axis: time, and memory or the first batch, over what is lengthened."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.2 * len(rows), 3.2), layout="constrained")
    for axes, (axis, row) in zip(figure.subplots(1, len(rows)), rows.items(), strict=True):
        for name in list(row)[1:]:
            axes.plot(row["values"], row[name], marker="o", label=name)
        axes.set(xscale="log", yscale="log", xlabel=axis)
        axes.legend(fontsize=8)
    figure.savefig(file, dpi=110)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=9, help="of each training (%(default)s)")
    parser.add_argument("--axes", nargs="+", choices=[*AXES, "shards"], help="default all")
    parser.add_argument("--points", type=int, default=4, help="of each, at most 4")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    rows: dict[str, dict[str, Any]] = {}
    with TemporaryDirectory() as temporary:
        folder, nothing = Path(temporary), 0.0
        if not torch.cuda.is_available():
            nothing = apart(peak)
        for axis in args.axes or [*AXES, "shards"]:
            print(f"{axis} …", flush=True)
            if axis == "shards":
                values = SHARDS[: args.points]
                found = [reading(value, folder) for value in values]
                names = ("first batch, ms", "a batch, ms")
            else:
                values = AXES[axis][: args.points]
                found = [apart(step, axis, value, args.steps, folder) for value in values]
                found = [(time, memory - nothing) for time, memory in found]
                names = ("a step, ms", "memory, MB")
            columns = dict(zip(names, zip(*found, strict=True), strict=True))
            rows[axis] = {"values": values, **columns}
    print("| | | at each | exponent |\n|---|---|---|---|")
    for axis, row in rows.items():
        for name in list(row)[1:]:
            told = ", ".join(f"{value:,.0f}" for value in row[name])
            grows = exponent(row["values"], row[name])
            print(
                f"| {axis}: {', '.join(map(str, row['values']))} | {name} | {told} | {grows:.2f} |"
            )
    print(json.dumps(rows))
    (args.out / "growth.json").write_text(json.dumps(rows, indent=1) + "\n")
    picture(rows, args.out / "growth.png")


if __name__ == "__main__":
    main()
