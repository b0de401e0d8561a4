"""What a run was made with, for reports and papers: about.json in its folder."""

import json
import os
import platform
import subprocess
import time
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from lmc.device import processor
from lmc.files import write_json
from lmc.measure.results import versions

LIBRARIES = ("torch", "lightning", "diffusers", "transformers")
PACKAGE = Path(__file__).parents[1]


class About(Callback):
    """Keeps about.json: an entry a start of the training, with what it ran on and for how long.

    Args:
        file: the JSON. One that cannot be read is replaced.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self.sessions: list[dict[str, Any]] = []
        self.start = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin an entry, the first one where the training begins anew."""
        if not trainer.is_global_zero:
            return
        step = trainer.global_step
        self.start = time.monotonic()
        earlier = self._read(step)
        session = {
            "began": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "seconds": 0.0,
            "from_step": step,
            "to_step": step,
            "processes": trainer.world_size,
            "hardware": hardware(trainer.strategy.root_device, trainer.world_size),
            **source_commit(),
            "versions": {**versions(LIBRARIES), "python": platform.python_version()},
        }
        self.sessions = [*earlier, session]
        self._write()

    def update(self, trainer: Trainer) -> None:
        """Note how far the training is, of which a checkpoint was just written."""
        if not self.sessions:  # another process, or before the start
            return
        seconds = round(time.monotonic() - self.start, 1)
        self.sessions[-1] |= {"seconds": seconds, "to_step": trainer.global_step}
        self._write()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note the end; the last checkpoint is written."""
        self.update(trainer)

    def _read(self, step: int) -> list[dict[str, Any]]:
        """The entries so far of which something is in the weights at `step`."""
        try:
            sessions = json.loads(self.file.read_text())["sessions"]
            # Nothing is of a start that left no checkpoint, or only later ones.
            return [x for x in sessions if x["from_step"] < min(x["to_step"], step)]
        except FileNotFoundError:  # of a run begun before there was such a file
            return []
        except (OSError, ValueError, KeyError, TypeError) as error:
            print(f"{self.file} cannot be read ({error!r}) and is begun anew", flush=True)
            return []

    def _write(self) -> None:
        try:
            write_json(self.file, {"sessions": self.sessions})
        except OSError as error:  # no reason to stop
            print(f"{self.file} cannot be written: {error}", flush=True)


def hardware(device: torch.device, processes: int) -> str:
    """The GPU's name x how many there are, or the CPU's model and its number of cores."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)} x {processes}"
    cpu = f"{processor()}, {os.cpu_count()} cores"
    return cpu if device.type == "cpu" else f"{cpu}, {device.type}"


def source_commit(folder: Path = PACKAGE) -> Mapping[str, Any]:
    """The commit of the git checkout that `folder` is a part of.

    Returns:
        'commit', and 'dirty': whether its files were changed since; both None where `folder` is in
        no checkout (an installed package may lie in somebody else's), or git does not say.
    """

    def git(*command: str) -> str:
        # Optional locks would be in the way of whoever works in that checkout meanwhile.
        arguments = ["git", "--no-optional-locks", "-C", str(folder), *command]
        done = subprocess.run(arguments, capture_output=True, text=True, timeout=5, check=True)
        return done.stdout.strip()

    try:
        git("ls-files", "--error-unmatch", "__init__.py")
        commit = git("rev-parse", "HEAD")
        dirty = bool(git("status", "--porcelain", "--untracked-files=no"))
    except (OSError, subprocess.SubprocessError):
        return {"commit": None, "dirty": None}
    return {"commit": commit, "dirty": dirty}
