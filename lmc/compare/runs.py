"""The trainings of a comparison."""

import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch

from lmc.compare.side_by_side import TrainingFailed, Trainings, visible_gpus
from lmc.files import read_json, write_json
from lmc.specs import Spec
from lmc.training.dry_run import per_image


@dataclass(frozen=True)
class Run:
    """A training: a loss and a seed.

    Attributes:
        spec, seed: which.
        folder: its run folder.
        steps: how many it shall have.
        evaluations: of the denoiser, per image and step; None is not known.
    """

    spec: Spec
    seed: int
    folder: Path
    steps: int
    evaluations: int | None

    @property
    def name(self) -> str:
        """As messages say it."""
        return f"{self.spec.label} seed {self.seed}"


def run_of(out: Path, spec: Spec, seed: int, config: Mapping[str, Any], own: bool = True) -> Run:
    """A run of the comparison in `out`; `config` has the loss.

    A loss that this command line does not name is known of a file alone: not `own`, a class of the
    user's is not imported for it.
    """
    ours = own or config["model"]["loss"]["class_path"].rpartition(".")[0] in ("lmc", "lmc.losses")
    evaluations = per_image(config["model"])[0] if ours else None
    steps = config["trainer"]["max_steps"]
    return Run(spec, seed, out / spec.folder() / f"seed{seed}", steps, evaluations)


def recorded(
    out: Path, losses: Mapping[str, Any], common: Mapping[str, Any], named: Sequence[Run]
) -> list[Run]:
    """The runs named this time and those finished before, in the order of comparison.json."""
    runs: list[Run] = []
    for label, own in losses.items():
        here = {run.seed: run for run in named if run.spec.label == label}
        config = {**common, "model": {**common["model"], **own}}
        spec = Spec(label, own["loss"]["class_path"])
        for folder in (out / spec.folder()).glob("seed*"):
            seed = folder.name.removeprefix("seed")
            if seed.isdecimal() and steps_done(folder) >= common["trainer"]["max_steps"]:
                here.setdefault(int(seed), run_of(out, spec, int(seed), config, own=False))
        runs += [here[seed] for seed in sorted(here)]
    return runs


def train_all(runs: Sequence[Run], base: Sequence[str], jobs: int) -> dict[str, Any]:
    """Train what is not done yet; what failed by name: 'failed' (the log's end) and 'log'."""
    left = [run for run in runs if steps_done(run.folder) < run.steps]
    print(f"{len(runs)} trainings, {len(runs) - len(left)} of them done already")
    failed: dict[str, Any] = {}
    threads = os.environ.get("OMP_NUM_THREADS") or max(1, (os.cpu_count() or 1) // jobs)
    # One that is not known counts like DDS.
    cost = {run.name: run.evaluations or 4 for run in left}
    if jobs > 1:  # the longest first, so that none is left alone at the end
        left.sort(key=lambda run: -cost[run.name] * run.steps)
    trainings = Trainings(
        {run.name: run.steps for run in left},
        cost,
        int(threads),
        visible_gpus() if jobs > 1 else (),
    )

    def train(run: Run) -> None:
        log, times = run.folder / "log.txt", run.folder / "training.json"
        run.folder.mkdir(parents=True, exist_ok=True)
        seconds = read_json(times, ("seconds",))["seconds"] if times.exists() else 0.0
        command = [sys.executable, "-m", "lmc.training", "translator", "fit", *base]
        command += [*run.spec.arguments(), f"--run={run.folder}", f"--seed_everything={run.seed}"]
        start = time.monotonic()
        why = ""
        try:
            trainings.train(run.name, command, log)
        except TrainingFailed as error:
            why = error.tail
        finally:
            done = steps_done(run.folder)
            seconds += time.monotonic() - start
            write_json(times, {"seconds": round(seconds, 1), "steps": done})
        if not why and done < run.steps:
            why = f"it ended after {done} of {run.steps} steps"
        if why:
            failed[run.name] = {"failed": why, "log": str(log)}
            print(f"{run.name} failed, see {log}:\n{why}")

    trainings.run([partial(train, run) for run in left], jobs)
    return {run.name: failed[run.name] for run in runs if run.name in failed}


def steps_done(folder: Path) -> int:
    """The step of a run's checkpoint; 0 where there is none, or none that can be read."""
    file = folder / "checkpoints" / "last.ckpt"
    try:
        return torch.load(file, map_location="cpu", weights_only=True, mmap=True)["global_step"]
    except (FileNotFoundError, UnpicklingError, RuntimeError, EOFError):
        return 0  # the training itself says what is wrong with it
