"""Whether a translator goes astray, said while it trains: runs away, forgets, or does nothing."""

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from lmc.measure.evaluate import from_all_processes
from lmc.measure.metrics import rmse, saturation
from lmc.progress import NOTE
from lmc.shards.images import ImageBatch
from lmc.training.base import tensorboard
from lmc.training.callbacks import SaveBest, ShowProgress
from lmc.training.translator import TranslatorTraining

# At which something is said of the outputs; besides where they are further from their sources than
# these from one another. Of the translators in docs/losses.md the closed form of each channel by
# itself, a runaway, is beyond (saturation 0.197, the source's 0.020); the next is at 0.052.
SATURATED = 0.1  # share of values at the ends of the range, above the sources'
GAINED = 0.3  # spectrum_gained: over the frequencies twice the sources' power
FALLEN = 0.3  # R-Precision, below its best
ALIKE = 0.02  # RMSE to the source, 1 % of the range, and spectrum_error, 5 % of power: both below

RUNS_AWAY = {
    # By whether the loss has a corrector.
    True: "A corrector that does not pull back does that at small ω: see lmc stability, train it "
    "with model.restoring, or raise model.loss.guidance_scale",
    False: "Lower model.loss.guidance_scale or model.optimizer.lr",
}


@dataclass(frozen=True)
class Sources:
    """What is known of the held-out images themselves.

    Attributes:
        saturation: see `metrics.saturation`.
        apart: mean RMSE from one of them to another; infinite where there is one alone.
    """

    saturation: float
    apart: float


def astray(
    measured: Mapping[str, float],
    sources: Sources,
    best: float | None,
    progress: float,
    corrected: bool,
) -> list[str]:
    """What is to be said of a look at the held-out images, a line each; often nothing.

    Args:
        measured: `Heldout.measures`, by name; what is not among them is not looked at.
        sources: of the same look.
        best: the greatest R-Precision of all looks; None is not known.
        progress: how much of the training is done, in [0, 1]. A translator may begin as the
            identity: that its outputs equal their inputs is said from the half on.
        corrected: whether the loss has a corrector.
    """
    lines, runs_away = [], []
    if measured.get("saturation", 0.0) > sources.saturation + SATURATED:
        there = f"the sources' {sources.saturation:.2f}"
        runs_away.append(f"saturation {measured['saturation']:.2f}, {there}")
    if measured.get("rmse", 0.0) > sources.apart:
        there = f"which are {sources.apart:.2f} from one another"
        runs_away.append(f"RMSE {measured['rmse']:.2f} to their sources, {there}")
    if measured.get("spectrum_gained", 0.0) > GAINED:
        more = 10 ** measured["spectrum_gained"]
        runs_away.append(f"{more:.1f} times the sources' power, over the frequencies")
    if runs_away:
        lines.append(f"the outputs run away: {'; '.join(runs_away)}. {RUNS_AWAY[corrected]}")
    precision = measured.get("r_precision")
    if precision is not None and best is not None and precision < best - FALLEN:
        lines.append(
            f"R-Precision fell to {precision:.2f} from {best:.2f}, its best. best.ckpt has that: "
            "lmc release --best takes it"
        )
    alike = max(measured.get(name, 2.0) for name in ("rmse", "spectrum_error")) < ALIKE
    if alike and progress >= 0.5:
        lines.append(
            f"nothing is translated: the outputs equal their inputs (RMSE {measured['rmse']:.3f}). "
            "Lower model.l2_weight, or raise model.score_weight or model.loss.guidance_scale"
        )
    return lines


def mean_of_all(mine: list[float]) -> float:
    """The mean over all processes; infinite where there is nothing."""
    every = list(itertools.chain(*from_all_processes(mine)))
    return sum(every) / len(every) if every else math.inf


class Watch(Callback):
    """Says what `astray` finds, at every look: beside the progress, and in TensorBoard.

    It stops nothing.

    Args:
        progress: which prints it.
        best: which knows the best R-Precision.
    """

    def __init__(self, progress: ShowProgress, best: SaveBest) -> None:
        self.progress, self.best = progress, best
        self.saturated: list[float] = []  # of this process's sources, at the first look
        self.apart: list[float] = []  # each from the one before
        self.previous: Tensor | None = None
        self.sources: Sources | None = None  # of all processes

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Measure the sources, once."""
        translates = isinstance(pl_module, TranslatorTraining)
        if translates and self.sources is None and isinstance(batch, ImageBatch) and batch.key:
            image = batch.image
            before = [] if self.previous is None else [self.previous]
            chain = torch.cat([*before, image])
            self.saturated += saturation(image).tolist()
            self.apart += rmse(chain[1:], chain[:-1]).tolist()
            self.previous = image[-1:]

    def measured_sources(self) -> Sources:
        """Over all processes."""
        return Sources(mean_of_all(self.saturated), mean_of_all(self.apart))

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say it."""
        fitting = trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking
        if not fitting or not isinstance(pl_module, TranslatorTraining):
            return
        if self.sources is None:
            self.sources = self.measured_sources()
        if not trainer.is_global_zero:
            return
        measured = {
            name.removeprefix("heldout/"): float(value)
            for name, value in trainer.callback_metrics.items()
            if name.startswith("heldout/")
        }
        lines = astray(
            measured,
            self.sources,
            self.best.best[0] if self.best.best else None,
            trainer.global_step / max(1, trainer.max_steps),
            hasattr(pl_module.loss, "corrector"),
        )
        writer = tensorboard(pl_module)
        for line in lines:
            self.progress.progress.say(f"{NOTE}{trainer.global_step}: {line}")
            if writer is not None:
                writer.add_text("note", line, trainer.global_step)
