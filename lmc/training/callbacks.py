"""Progress on the terminal, the checkpoints of a run, and what it was made with."""

import os
import shutil
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.trainer.states import TrainerFn

from lmc.progress import Progress
from lmc.training.about import About
from lmc.training.base import TrainingModule

SHOWN = ("train/loss", "train/l2", "heldout/loss", "heldout/spectrum_error", "heldout/r_precision")


class ShowProgress(Callback):
    """Steps, losses, images a second, time left; by one process."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say how much is to be done, and with which effective batch."""
        data: Any = getattr(trainer, "datamodule", None)
        each = data.batch_size if data else 0
        self.batch = each * trainer.world_size * trainer.accumulate_grad_batches
        parameters = sum(p.numel() for p in pl_module.parameters() if p.requires_grad)
        self.progress = Progress(
            "step",
            trainer.max_steps,
            done=trainer.global_step,
            quiet=not trainer.is_global_zero,
            recorded=trainer.is_global_zero,
        )
        self.progress.say(
            f"{parameters:,} parameters; effective batch {self.batch} = {trainer.world_size} "
            f"processes x {each} images x {trainer.accumulate_grad_batches} accumulated; "
            f"steps {trainer.global_step} to {trainer.max_steps}"
        )
        assert isinstance(pl_module, TrainingModule)
        if note := batch_note(self.batch, pl_module.paper_batch, pl_module.adam.lr):
            self.progress.say(note)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Say it, where it is time to."""

        def note() -> str:
            shown = [(n, x) for n, x in trainer.callback_metrics.items() if n in SHOWN]
            losses = [f"{name.removeprefix('train/')} {value:.4f}" for name, value in shown]
            done = trainer.global_step - self.progress.first
            speed = done * self.batch / max(self.progress.seconds(), 1e-9)
            return "  ".join([*losses, f"{speed:.1f} images/s"])

        self.progress.update(trainer.global_step, note)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the bar as it is."""
        self.progress.close()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """As at the end; there may have been no beginning."""
        if hasattr(self, "progress"):
            self.progress.close()


class ValidateAtEnd(Callback):
    """Has the held-out images looked at after the last step, wherever the interval would end."""

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Before it stops early, Lightning validates; once only, where it would do so anyway."""
        if trainer.global_step == trainer.max_steps:
            trainer.should_stop = True


class SaveLast(Callback):
    """Keeps `last.ckpt` in the run folder: every `every` steps and at the end.

    Args:
        path: of the checkpoint.
        every: steps between saves.
        about: told of every save.
    """

    def __init__(self, path: Path, every: int, about: About) -> None:
        self.path, self.every, self.about, self.saved = path, every, about, -1

    def save(self, trainer: Trainer) -> None:
        """Save now."""
        trainer.save_checkpoint(self.path)
        self.saved = trainer.global_step
        self.about.update(trainer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save, where it is time to."""
        step = trainer.global_step
        # The last step before its look at the held-out images, which may fail.
        due = step % self.every == 0 or step == trainer.max_steps
        if step != self.saved and due and step > 0:
            self.save(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the end, with its look, unless a non-finite gradient is in it."""
        if trainer.global_step > 0:
            self.save(trainer)


class SaveBest(Callback):
    """Keeps `best.ckpt`: of the validation with the greatest `TrainingModule.best_by`.

    Where these figures are not measured there is none. A run that begins anew begins without one.

    Args:
        path: of the checkpoint.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.best: list[float] | None = None  # the figures of best.ckpt
        self.of = ""  # what they were measured with and on

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget the best of an earlier run in this folder, or of another measure."""
        assert isinstance(pl_module, TrainingModule)
        if trainer.global_step == 0 and trainer.is_global_zero:
            self.path.unlink(missing_ok=True)
        if self.of != pl_module.best_of:
            self.best, self.of = None, pl_module.best_of

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save, if this one was the best so far."""
        assert isinstance(pl_module, TrainingModule)
        fitting = trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking
        found = [trainer.callback_metrics.get(name) for name in pl_module.best_by]
        figures = [float(each) for each in found if each is not None]
        if not fitting or not figures or len(figures) < len(found):
            return
        # One process's word: another may not see the file, and would take any for the best.
        if trainer.strategy.broadcast(self.best is None or figures > self.best):
            self.best = figures
            trainer.save_checkpoint(self.path)

    def state_dict(self) -> dict[str, Any]:
        """The figures of the best so far."""
        return {"best": self.best, "of": self.of}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with the best so far: that of best.ckpt itself.

        It may be newer than `state_dict`, which is of the checkpoint the run goes on from; where it
        is gone or broken, the next one takes its place.
        """
        try:
            there = torch.load(self.path, map_location="cpu", weights_only=True, mmap=True)
            state = there["callbacks"][self.state_key]
            self.best, self.of = state["best"], state["of"]
        except (FileNotFoundError, UnpicklingError, RuntimeError, EOFError, KeyError):
            self.best = None


class CheckFinite(Callback):
    """Looks at the gradients that were not looked at yet, when training ends."""

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """See `TrainingModule.check_finite`."""
        assert isinstance(pl_module, TrainingModule)
        pl_module.check_finite()


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint beside its place and moves it there: an old one survives any failure."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None
    ) -> None:
        """Write `checkpoint` to `path`.

        Raises:
            OSError: it could not be written; says where, and that the last one is untouched.
        """
        path = Path(path)
        partial = path.with_suffix(".partial")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(partial, "wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
        except (OSError, RuntimeError) as error:
            # torch.save turns a full disk into a RuntimeError of its zip writer.
            partial.unlink(missing_ok=True)
            free = shutil.disk_usage(path.parent).free if path.parent.exists() else 0
            kept = "the last one there is untouched" if path.exists() else "there was none before"
            raise OSError(
                f"cannot write the checkpoint {path} ({error}); {free / 1e6:.0f} MB are free; "
                f"{kept}"
            ) from error


def batch_note(batch: int, paper: int, lr: float) -> str:
    """What there is to say of an effective `batch` that is not the paper's; '' where it is."""
    if batch == paper:
        return ""
    return (
        f"the paper's effective batch is {paper}, not {batch}; the learning rate stays the "
        f"configured {lr:g}, nothing rescales it"
    )
