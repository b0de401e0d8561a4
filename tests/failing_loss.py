"""Losses that fail, for the training processes of test_compare.py to import."""

import json
import os
from pathlib import Path

import torch

from lmc.losses import SDS


class Crash(SDS):
    """Ends the process as a crash does, with no word from Python."""

    name = "crash"

    def terms(self, prior, x):
        print("about to crash", flush=True)
        os._exit(7)


class While(SDS):
    """Fails at a step as long as there is a file, which names the seeds of which it does.

    Args:
        file: its path; JSON.
        at: the step, from 1.
    """

    name = "while"

    def __init__(self, file: str, guidance_scale: float = 15.0, at: int = 3) -> None:
        super().__init__(guidance_scale)
        self.file, self.at, self.calls = Path(file), at, 0

    def terms(self, prior, x):
        self.calls += 1
        seeds = json.loads(self.file.read_text()) if self.file.exists() else []
        if self.calls == self.at and torch.initial_seed() in seeds:
            raise RuntimeError("the file is there")
        return super().terms(prior, x)
