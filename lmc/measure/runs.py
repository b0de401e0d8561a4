"""A training, read from its run folder: configuration, sessions, curves. No Lightning."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SESSION_KEYS = {"seconds", "to_step", "processes", "hardware", "commit", "dirty", "versions"}
# What of a run's scalars is shown, and what it is; of stage two and of stage one.
TRANSLATOR_CURVES = {
    "train/loss": "size of the loss's gradient (RMS)",
    "train/l2": "L2 to the source, training",
    "heldout/r_precision": "R-Precision, held out",
    "heldout/clip_score": "CLIP score, held out",
    "heldout/lpips": "LPIPS to the source, held out",
    "heldout/rmse": "RMSE to the source, held out",
    "heldout/spectrum_error": "spectrum error, held out",
    "heldout/spectrum_lost": "spectrum lost, held out",
    "heldout/spectrum_gained": "spectrum gained, held out",
    "heldout/truth_rmse": "RMSE to the truth, held out",
    "heldout/truth_one_minus_ssim": "1 − SSIM to the truth, held out",
    "heldout/truth_lost": "power lost against the truth, held out",
    "heldout/truth_gained": "power gained against the truth, held out",
    "heldout/truth_cast": "colour cast against the truth, held out",
}
CORRECTOR_CURVES = {
    "train/loss": "corrector, training",
    "heldout/loss": "corrector",
    "heldout/identity_loss": "identity (b = z)",
    "heldout/closed_form_loss": "closed form",
    "heldout/floor": "the floor",
}


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
