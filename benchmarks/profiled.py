"""Where a step of either stage spends its time, on the demo, by torch's profiler.

    make demo
    python benchmarks/profiled.py

Each operation's own time counts for the innermost of these that it belongs to: the denoiser, the
network forward, the corrector, the VAE's encoder, backward, Adam; the rest of the training step
(noise, resizing, the loss's few lines, L2) and of the loop (data, averages, checks, logging) is no
part of the floor, and of it the largest operations are named. The profiler itself takes some of it.
Times are the host's: on a GPU they say what the host is busy with, and `gpu.py` what the device is.
Prints a table a stage, then JSON (or writes it to --json).
"""

import argparse
import json
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from step import BIAS, PLAIN_BIAS, TRANSLATOR, trained
from torch.profiler import ProfilerActivity, profile, record_function

from lmc.training.bias import CorrectorTraining
from lmc.training.cli import TrainingCLI
from lmc.training.translator import TranslatorTraining

FLOOR = ("denoiser", "network", "corrector", "VAE", "backward", "Adam")
REST = ("rest of the step", "rest of the loop")
WARM_UP = 4  # steps that are not profiled
NAMED = 8  # operations of the rest


class Profiled(Callback):
    """Profiles the steps after the first few, with the parts of a step named."""

    def __init__(self) -> None:
        self.steps = 0
        self.profile = profile(activities=[ProfilerActivity.CPU], acc_events=True)

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        prior, loss = module.prior, getattr(module, "loss", None)
        name(prior, "predict", "denoiser")
        name(prior, "encode", "VAE")
        name(module.network, "forward", "network")
        name(module, "backward", "backward")
        name(module, "training_step", "rest of the step")
        if hasattr(loss, "corrector"):
            name(loss.corrector, "correct", "corrector")
        for optimizer in trainer.optimizers:
            name(optimizer, "step", "Adam")  # with what Lightning runs in it, which has its own

    def on_train_batch_end(self, trainer: Trainer, *rest: Any) -> None:
        if trainer.global_step == WARM_UP:
            self.profile.start()
            self.began = time.perf_counter()
        elif trainer.global_step > WARM_UP:
            self.steps += 1
            self.seconds = time.perf_counter() - self.began

    def on_train_end(self, *rest: Any) -> None:
        self.profile.stop()


def name(thing: Any, method: str, part: str) -> None:
    """Have the profiler see every call of a method as `part`."""
    original = getattr(thing, method)

    def named(*args: Any, **options: Any) -> Any:
        with record_function(part):
            return original(*args, **options)

    setattr(thing, method, named)


def parts_of(events: Sequence[Any], steps: int) -> tuple[Counter[str], Counter[str]]:
    """Milliseconds a step of each part, and of the operations in those that are not the floor."""
    times: Counter[str] = Counter()
    operations: Counter[str] = Counter()
    for event in events:
        inner = event
        while inner is not None and inner.name not in (*FLOOR, *REST):
            inner = inner.cpu_parent
        part = REST[1] if inner is None else inner.name
        own = event.self_cpu_time_total / 1e3 / steps
        times[part] += own
        if part in REST:
            operations["Python" if event is inner else event.name] += own
    return times, operations


class ProfiledTraining(TrainingCLI):
    """A training with `Profiled` beside its own callbacks."""

    def before_fit(self) -> None:
        super().before_fit()
        self.profiled = Profiled()
        self.trainer.callbacks.append(self.profiled)


def measure(
    kind: type, config: str, steps: int, options: Sequence[str]
) -> dict[str, Mapping[str, float]]:
    """Milliseconds a step: 'parts', and of the rest its largest 'operations'."""
    found = trained(kind, config, steps, options, ProfiledTraining).profiled
    times, operations = parts_of(found.profile.events(), found.steps)
    # What Python does between two operations, and in none of the methods that have names.
    between = 1e3 * found.seconds / found.steps - sum(times.values())
    times[REST[1]] += between
    operations["Python"] += between
    return {"parts": times, "operations": dict(operations.most_common(NAMED))}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=24, help="of each training (%(default)s)")
    parser.add_argument("--json", type=Path, help="write the figures there as well")
    args = parser.parse_args(argv)
    rows = {
        "stage two, lmc": measure(TranslatorTraining, TRANSLATOR, args.steps, []),
        "stage one, a plain U-Net": measure(CorrectorTraining, BIAS, args.steps, PLAIN_BIAS),
    }
    for title, row in rows.items():
        total = sum(row["parts"].values())
        print(f"\n{title}, {total:.1f} ms a step, profiled\n| | ms | share |\n|---|---|---|")
        for part in (*FLOOR, *REST):
            if part in row["parts"]:
                milliseconds = row["parts"][part]
                print(f"| {part} | {milliseconds:.2f} | {milliseconds / total:.3f} |")
        largest = (f"{name} {value:.2f}" for name, value in row["operations"].items())
        print(f"\nof the two rests, in ms: {', '.join(largest)}")
    print(json.dumps(rows))
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
