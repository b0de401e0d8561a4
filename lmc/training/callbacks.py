"""Progress on the terminal, the checkpoints of a run, and what it was made with."""

import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from lmc.files import whole, write_json
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

        assert isinstance(pl_module, TrainingModule)
        share = pl_module.share
        if share is not None:
            self.first_share = getattr(self, "first_share", share)
            share = (share - self.first_share) / max(1 - self.first_share, 1e-9)
        self.progress.update(trainer.global_step, note, share)

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
        keep: of how many saves step-000500.ckpt is kept beside it, the newest ones. A copy of one
            in place of `path` is gone on from.
        about: told of every save.

    Raises:
        ValueError: `every` or `keep` is out of range.
    """

    def __init__(self, path: Path, every: int, keep: int, about: About) -> None:
        if every < 1:
            raise ValueError(f"save_every must be at least 1, got {every}")
        if keep < 0:
            raise ValueError(f"keep must not be negative, got {keep}")
        self.path, self.every, self.keep, self.about, self.saved = path, every, keep, about, -1

    def save(self, trainer: Trainer) -> None:
        """Save now."""
        trainer.save_checkpoint(self.path)
        self.saved = trainer.global_step
        if self.keep and trainer.is_global_zero:
            keep_snapshot(self.path, self.saved, self.keep)
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


class KeepMeasured(Callback):
    """Keeps heldout.json: what the last look at the held-out images found, for the release's card.

    Args:
        file: the JSON.
    """

    def __init__(self, file: Path) -> None:
        self.file = file

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write it, on one process."""
        fitting = trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking
        if not fitting or not trainer.is_global_zero:
            return
        found = {
            name.removeprefix("heldout/"): float(value)
            for name, value in trainer.callback_metrics.items()
            if name.startswith("heldout/")
        }
        try:
            write_json(self.file, {"step": trainer.global_step, "measured": found})
        except OSError as error:  # no reason to stop
            print(f"{self.file} cannot be written: {error}", flush=True)


class CheckFinite(Callback):
    """Looks at the gradients that were not looked at yet, when training ends."""

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """See `TrainingModule.check_finite`."""
        assert isinstance(pl_module, TrainingModule)
        pl_module.check_finite()


def keep_snapshot(path: Path, step: int, count: int) -> None:
    """Keep a checkpoint as step-000500.ckpt beside it, and of all of these the newest `count`.

    Newest by when they were written: a run that was set back to an earlier step has later ones.
    """
    with whole(path.with_name(f"step-{step:06d}.ckpt")) as partial:
        try:
            os.link(path, partial)  # the next save replaces `path`, and leaves what it was
        except OSError:  # not every file system links
            shutil.copyfile(path, partial)
    every = path.parent.glob("step-*.ckpt")
    for old in sorted(every, key=lambda file: (file.stat().st_mtime_ns, file.name))[:-count]:
        old.unlink()


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint beside its place and moves it there: an old one survives any failure."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None
    ) -> None:
        """Write `checkpoint` to `path`.

        Raises:
            FloatingPointError: a weight, an average or a state of an optimizer is not finite.
            OSError: it could not be written; says where, and that the last one is untouched.
        """
        if broken := not_finite(checkpoint):
            more = f" and {len(broken) - 1} more" if broken[1:] else ""
            raise FloatingPointError(
                f"step {checkpoint.get('global_step')}: {broken[0]}{more} of the checkpoint are "
                f"not finite, so {path} is not written: what is there is untouched. Go on from it "
                "with a lower --model.optimizer.lr (named to --allow_changes too), or in more "
                "precision"
            )
        path = Path(path)
        try:
            with whole(path) as partial, open(partial, "wb") as file:
                torch.save(checkpoint, file)
        except (OSError, RuntimeError) as error:
            # torch.save turns a full disk into a RuntimeError of its zip writer.
            free = shutil.disk_usage(path.parent).free if path.parent.exists() else 0
            kept = "the last one there is untouched" if path.exists() else "there was none before"
            raise OSError(
                f"cannot write the checkpoint {path} ({error}); {free / 1e6:.0f} MB are free; "
                f"{kept}"
            ) from error


def not_finite(checkpoint: Mapping[str, Any]) -> list[str]:
    """Names of the weights, averages and states of optimizers and losses with inf or NaN in them.

    Waits for the device once.
    """
    by_device: dict[torch.device, dict[str, Tensor]] = {}
    for part in ("state_dict", "optimizer_states", "loss"):
        for name, value in _tensors(checkpoint.get(part), part):
            if value.is_floating_point():
                by_device.setdefault(value.device, {})[name] = torch.isfinite(value).all()
    found = []
    for flags in by_device.values():
        finite = torch.stack(list(flags.values())).tolist()
        found += [name for name, good in zip(flags, finite, strict=True) if not good]
    return found


def _tensors(value: Any, name: str) -> Iterator[tuple[str, Tensor]]:
    """The tensors in nested dicts and lists, by dotted name."""
    if isinstance(value, Tensor):
        yield name, value
    items = value.items() if isinstance(value, Mapping) else ()
    for key, item in enumerate(value) if isinstance(value, list | tuple) else items:
        yield from _tensors(item, f"{name}.{key}")


def batch_note(batch: int, paper: int, lr: float) -> str:
    """What there is to say of an effective `batch` that is not the paper's; '' where it is."""
    if batch == paper or not paper:
        return ""
    return (
        f"the paper's effective batch is {paper}, not {batch}; the learning rate stays the "
        f"configured {lr:g}, nothing rescales it"
    )
