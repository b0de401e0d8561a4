"""What a stopped `lmc synthesize` or `edit` goes on from."""

import hashlib
import json
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lmc.files import whole
from lmc.one_image.job import Job, corrector_digest


class Kept:
    """The state of a command, in a file that is there until it is done.

    Args:
        file: it is read from, where there is one, and written to.
        job: what is done; one with another prior or corrector does not go on.
        image: what is begun with, or None.
        device: it runs on that; the state of a GPU's generators is none of a CPU's.

    Attributes:
        images: of the runs that are done, float32 (B, 3, H, W) each.
        snapshots: of each run that has begun, small images (B, 3, h, w) by the steps done.
        optimization: `Optimization.state_dict` of a run that has begun and is not done.
        seconds: that were spent on all of it before.

    Raises:
        ValueError: the file cannot be read, or is of another prior, corrector, image or kind of
            device.
    """

    def __init__(self, file: Path, job: Job, image: Tensor | None, device: str) -> None:
        self.file = file
        self.made_with = {
            "prior": json.dumps(dict(job.prior.identity), sort_keys=True, default=str),
            "corrector": corrector_digest(job.loss),
            "image": None if image is None else _digest(image),
            "kind of device": torch.device(device).type,
        }
        self.images: list[Tensor] = []
        self.snapshots: list[dict[int, Tensor]] = []
        self.optimization: Mapping[str, Any] | None = None
        self.seconds = 0.0
        if not file.exists():
            return
        try:
            state = torch.load(file, map_location="cpu", weights_only=True)
            there = state["made_with"]
            self.images, self.snapshots = state["images"], state["snapshots"]
            self.optimization, self.seconds = state["optimization"], state["seconds"]
        except (RuntimeError, EOFError, LookupError, TypeError, pickle.UnpicklingError) as error:
            why = str(error).splitlines()[0] if str(error) else type(error).__name__
            said = f"{file} cannot be gone on from ({why}): delete it to begin anew"
            raise ValueError(said) from error
        other = [name for name in self.made_with if there.get(name) != self.made_with[name]]
        if other:
            raise ValueError(
                f"{file} was begun with another {other[0]}, by the same name: delete it to begin "
                "anew"
            )

    def write(self, optimization: Mapping[str, Any] | None, seconds: float) -> None:
        """Write it, whole or not at all.

        Args:
            optimization: of the run that has begun, or None where none has.
            seconds: spent so far.
        """
        state = {
            "made_with": self.made_with,
            "images": self.images,
            "snapshots": self.snapshots,
            "optimization": optimization,
            "seconds": seconds,
        }
        with whole(self.file) as partial:
            torch.save(state, partial)

    def remove(self) -> None:
        """All is done."""
        self.file.unlink(missing_ok=True)


def _digest(image: Tensor) -> str:
    return hashlib.sha256(image.contiguous().numpy().tobytes()).hexdigest()
