"""The command line of both training scripts: one YAML, one run folder, resumed by itself."""

import argparse
import json
import os
import socket
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from jsonargparse import Namespace
from lightning.pytorch import Trainer
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only

from lmc.errors import about, is_users, require
from lmc.losses import ScoreDistillation
from lmc.schedule import TimeSchedule
from lmc.training import dry_run, processes
from lmc.training.about import About
from lmc.training.base import TrainingModule
from lmc.training.callbacks import (
    AtomicCheckpointIO,
    CheckFinite,
    Progress,
    SaveBest,
    SaveLast,
    ValidateAtEnd,
)
from lmc.training.data import ImageData

# What counts steps or processes, where it is given.
COUNTS = (
    "save_every",
    *("trainer.max_steps", "trainer.accumulate_grad_batches", "trainer.log_every_n_steps"),
    "trainer.num_nodes",
)


class TrainingCLI(LightningCLI):
    """LightningCLI with a run folder.

    config.yaml, TensorBoard events, checkpoints/, validation/, about.json.
    """

    def __init__(self, model_class: type[TrainingModule], args: ArgsType = None) -> None:
        processes.watch_launcher()
        super().__init__(
            model_class,
            ImageData,
            trainer_defaults={
                "max_epochs": -1,
                "enable_progress_bar": False,
                "enable_model_summary": False,
                "enable_checkpointing": False,
                "num_sanity_val_steps": 0,
                "check_val_every_n_epoch": None,
                "use_distributed_sampler": False,
            },
            seed_everything_default=0,
            save_config_kwargs={"overwrite": True},
            auto_configure_optimizers=False,
            # Errors are raised, for `lmc.training.start` to print as one line.
            parser_kwargs={"exit_on_error": False, "fit": {"exit_on_error": False}},
            args=args,
        )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Training only: lmc evaluate, translate and release do the rest."""
        return {"fit": {"model", "train_dataloaders", "val_dataloaders", "datamodule"}}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """The run folder, and one seed for everything."""
        parser.add_argument(
            "--run", type=str, required=True, help="run folder; a run in it is gone on with"
        )
        parser.add_argument(
            "--save_every", type=int, default=1000, help="steps between checkpoints"
        )
        parser.add_argument(
            "--dry_run",
            "--dry-run",
            type=bool,
            nargs="?",
            const=True,
            default=False,
            help="say what the training would do and need, and leave before it",
        )
        parser.link_arguments("seed_everything", "model.seed")
        parser.link_arguments("seed_everything", "data.seed")

    def before_instantiate_classes(self) -> None:
        """Check the numbers; report and leave, where that is all that is asked for.

        Raises:
            ValueError: a number out of its range.
            SystemExit: with status 0, after the report.
        """
        for option, kind in (("model.loss", ScoreDistillation), ("model.time", TimeSchedule)):
            self.parser.add_instantiator(named(option), kind)
        for option in COUNTS:
            value = self._get(self.config, option)
            require(value is None or value >= 1, option, "at least 1", value)
        if not self._get(self.config, "dry_run"):
            return
        config = {key: plain(self._get(self.config, key)) for key in ("model", "data", "trainer")}
        run = Path(self._get(self.config, "run"))
        every = self._get(self.config, "save_every")
        model_class: Any = self.model_class
        text = dry_run.report(model_class, config, run, every)
        if getattr(rank_zero_only, "rank", 0) == 0:  # under torchrun, say
            print(text, flush=True)
        raise SystemExit(0)

    def instantiate_classes(self) -> None:
        """As Lightning does, but the error of a class is not one of the types it was tried as."""
        try:
            super().instantiate_classes()
        except ValueError as error:
            cause = error.__cause__
            if isinstance(cause, ValueError) and is_users(cause) and not is_users(error):
                raise cause from None
            raise

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """A trainer that logs and saves into the run folder."""
        run = Path(self._get(self.config, "run"))
        self.checkpoint = run / "checkpoints" / "last.ckpt"
        kwargs["default_root_dir"] = run
        kwargs["logger"] = TensorBoardLogger(run, name="", version="")
        given = self._get(self.config_init, "trainer")["plugins"] or []
        given = given if isinstance(given, list) else [given]
        kwargs["plugins"] = [*given, AtomicCheckpointIO()]
        trainer = super().instantiate_trainer(**kwargs)
        every = self._get(self.config, "save_every")
        about = About(run / "about.json")
        last = SaveLast(self.checkpoint, every, about)
        callbacks: Any = trainer
        callbacks.callbacks += [
            processes.EndTogether(),
            CheckFinite(),
            Progress(),
            ValidateAtEnd(),
            last,
            SaveBest(self.checkpoint.with_name("best.ckpt")),
            about,
            processes.LeaveOnSignal(last.save),
        ]
        return trainer

    def before_fit(self) -> None:
        """Check all that can be, what is quick first; then make the run folder.

        Raises:
            OSError, ValueError: see the `check` of data and model; or the run folder cannot be
                written.
        """
        run = Path(self._get(self.config, "run"))
        there = next(each for each in (run, *run.absolute().parents) if each.exists())
        if not there.is_dir() or not os.access(there, os.W_OK):
            why = "not writable" if there.is_dir() else "a file"
            raise OSError(f"cannot write into the run folder {run}: {there} is {why}")
        self.datamodule.check(self.model)
        self.model.check(self.datamodule)
        try:
            (run / "checkpoints").mkdir(parents=True, exist_ok=True)
            # Named by process: several ranks look at once.
            probe = run / "checkpoints" / f".writable-{socket.gethostname()}-{os.getpid()}"
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise OSError(f"cannot write into the run folder {run}: {error}") from error

    def fit(self, **kwargs: Any) -> None:
        """Train, in all processes."""
        processes.announce_launcher(self.trainer)
        try:
            self.trainer.fit(**kwargs)
        finally:
            processes.wait_for_children(self.trainer)

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        kwargs = super()._prepare_subcommand_kwargs(subcommand)
        kwargs["weights_only"] = True
        if self.checkpoint.exists():
            step = torch.load(self.checkpoint, weights_only=True, mmap=True)["global_step"]
            kwargs["ckpt_path"] = str(self.checkpoint)
            done = step >= self.trainer.max_steps
            if self.trainer.is_global_zero:
                print(
                    f"{self.checkpoint.parent.parent}: "
                    + (f"all {step} steps are done" if done else f"going on after step {step}"),
                    flush=True,
                )
        return kwargs


class ConfigReader(TrainingCLI):
    """Reads a training's command line, and builds and runs nothing of it."""

    def __init__(self, model_class: type[TrainingModule]) -> None:
        super().__init__(model_class)

    def read(self, args: Sequence[str]) -> dict[str, Any]:
        """The whole configuration that `fit` with these arguments would have, as plain values.

        Raises:
            ValueError: what is wrong with them, with the option's name.
        """
        try:
            config = self.parser.parse_args(["fit", *args])
        except argparse.ArgumentError as error:
            raise ValueError(str(error)) from error
        return json.loads(self.parser.dump(config, format="json", skip_none=False))["fit"]

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Not before `read`."""
        self.config = Namespace(subcommand=None)

    def _set_seed(self) -> None:
        pass

    def before_instantiate_classes(self) -> None:
        """No dry run either."""

    def instantiate_classes(self) -> None:
        """Nothing."""


def named(option: str) -> Callable[..., Any]:
    """What builds the class given for an option: its errors name the option."""

    def build(kind: type, *args: Any, **kwargs: Any) -> Any:
        with about(option):
            return kind(*args, **kwargs)

    return build


def plain(value: Any) -> Any:
    """Nested namespaces as dicts."""
    return value.as_dict() if isinstance(value, Namespace) else value
