"""The command line of both training scripts: one YAML, one run folder, resumed by itself."""

import argparse
import json
import os
import socket
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import lightning
import torch
import yaml
from jsonargparse import Namespace
from lightning.fabric.plugins.environments import ClusterEnvironment
from lightning.pytorch import Trainer
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only

from lmc.errors import about, is_users, require
from lmc.losses import ScoreDistillation
from lmc.release import Terms
from lmc.schedule import TimeSchedule
from lmc.training import dry_run, processes
from lmc.training.about import About
from lmc.training.base import TrainingModule
from lmc.training.callbacks import (
    AtomicCheckpointIO,
    CheckFinite,
    KeepMeasured,
    SaveBest,
    SaveLast,
    ShowProgress,
    ValidateAtEnd,
)
from lmc.training.data import ImageData
from lmc.training.resume import KeepConfig, check_changes
from lmc.training.watch import Watch

# What counts steps or processes, where it is given.
COUNTS = (
    "save_every",
    *("trainer.max_steps", "trainer.accumulate_grad_batches", "trainer.log_every_n_steps"),
    "trainer.num_nodes",
)


class TrainingCLI(LightningCLI):
    """LightningCLI with a run folder.

    config.yaml, those before it, TensorBoard events, checkpoints/, validation/, about.json,
    heldout.json.
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
            save_config_callback=None,  # KeepConfig does
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
            "--keep",
            type=int,
            default=0,
            help="checkpoints kept besides last.ckpt, as step-000500.ckpt: the newest ones",
        )
        parser.add_argument(
            "--allow_changes",
            type=str,
            nargs="*",
            default=[],
            metavar="KEY",
            help="settings of a run in the folder that may be others from here on, by their keys",
        )
        parser.add_argument(
            "--dry_run",
            type=bool,
            nargs="?",
            const=True,
            default=False,
            help="say what the training would do and need, and leave before it",
        )
        # Read by lmc release from the run's config.yaml.
        parser.add_class_arguments(Terms, "release", instantiate=False)
        parser.link_arguments("seed_everything", "model.seed")
        parser.link_arguments("seed_everything", "data.seed")

    @property
    def checkpoint(self) -> Path:
        """What the run goes on from, if it is there."""
        return Path(self.config["fit"]["run"]) / "checkpoints" / "last.ckpt"

    def before_instantiate_classes(self) -> None:
        """Check the numbers, compare with the run that is there; report and leave, if asked.

        Raises:
            ValueError: a number out of its range, or see `check_changes`.
            SystemExit: with status 0, after the report.
        """
        for option, kind in (("model.loss", ScoreDistillation), ("model.time", TimeSchedule)):
            self.parser.add_instantiator(named(option), kind)
        # As nested by the subcommand; and without what is said for this once.
        whole = yaml.safe_load(self.parser.dump(self.config, format="yaml", skip_none=False))
        self.settings = {**whole["fit"], "allow_changes": [], "dry_run": False}
        config = self.config["fit"]
        for option in COUNTS:
            value = config[option]
            require(value is None or value >= 1, option, "at least 1", value)
        run, changes = Path(config["run"]), []
        if self.checkpoint.exists():
            changes = check_changes(run / "config.yaml", self.settings, config["allow_changes"])
        first = getattr(rank_zero_only, "rank", 0) == 0  # under torchrun, say
        if config["dry_run"]:
            parts = {key: plain(config[key]) for key in ("model", "data", "trainer")}
            model_class: Any = self.model_class
            text = dry_run.report(model_class, parts, run, config["save_every"])
            if first:
                print(text, flush=True)
            raise SystemExit(0)
        if first:
            print(*changes, sep="\n", end="\n" if changes else "", flush=True)

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
        config = self.config["fit"]
        run = Path(config["run"])
        given = self.config_init["fit"]["trainer"]
        plugins = as_list(given["plugins"])
        kwargs["default_root_dir"] = run
        kwargs["logger"] = loggers(run, given["logger"])
        kwargs["plugins"] = [*plugins, AtomicCheckpointIO()]
        trainer = super().instantiate_trainer(**kwargs)
        made_with = About(run / "about.json")
        last = SaveLast(self.checkpoint, config["save_every"], config["keep"], made_with)
        progress, best = ShowProgress(), SaveBest(self.checkpoint.with_name("best.ckpt"))
        environment = next((x for x in plugins if isinstance(x, ClusterEnvironment)), None)
        header = f"# lightning.pytorch=={lightning.__version__}\n"
        text = header + yaml.safe_dump(self.settings, sort_keys=False, allow_unicode=True)
        callbacks: Any = trainer
        callbacks.callbacks += [
            processes.EndTogether(),
            CheckFinite(),
            progress,
            ValidateAtEnd(),
            last,
            best,
            Watch(progress, best),
            made_with,
            KeepMeasured(run / "heldout.json"),
            KeepConfig(run / "config.yaml", text),
            processes.LeaveOnSignal(last.save, environment),
        ]
        return trainer

    def before_fit(self) -> None:
        """Check all that can be, what is quick first; then make the run folder.

        Raises:
            OSError, ValueError: see the `check` of data and model; or the run folder cannot be
                written.
        """
        run = Path(self.config["fit"]["run"])
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
        """Train, in all processes, going on where the run is.

        Raises:
            ValueError: the run was begun with something else; see `TrainingModule`. Or its last
                checkpoint cannot be read.
        """
        kwargs["weights_only"] = True
        if self.checkpoint.exists():
            kwargs["ckpt_path"] = str(self.checkpoint)
            self._look_at_checkpoint()
        processes.announce_launcher(self.trainer)
        try:
            self.trainer.fit(**kwargs)
        finally:
            processes.wait_for_children(self.trainer)

    def _look_at_checkpoint(self) -> None:
        """Before anything long, and before anything is written into the run folder."""
        try:
            there = torch.load(self.checkpoint, map_location="cpu", weights_only=True, mmap=True)
        except (UnpicklingError, RuntimeError, EOFError) as error:
            raise ValueError(
                f"{self.checkpoint} cannot be read ({' '.join(str(error).split())[:200]}): move it "
                "away to begin anew, or copy a step-*.ckpt in its place, where there are any"
            ) from error
        self.model.allowed = self.config["fit"]["allow_changes"]
        self.model.check_checkpoint(there)
        if self.trainer.is_global_zero:
            self.model.check_identities(there)
            step = there["global_step"]
            done = step >= self.trainer.max_steps
            said = f"all {step} steps are done" if done else f"going on after step {step}"
            print(f"{self.checkpoint.parent.parent}: {said}", flush=True)


class ConfigReader(TrainingCLI):
    """Reads a training's command line, and builds and runs nothing of it."""

    def __init__(self, model_class: type[TrainingModule]) -> None:
        super().__init__(model_class)

    def read(self, args: Sequence[str]) -> dict[str, Any]:
        """The whole configuration that `fit` with these arguments would have, as plain values.

        A translator's data.image_size is said in any case.

        Raises:
            ValueError: what is wrong with them, with the option's name.
        """
        try:
            config = self.parser.parse_args(["fit", *args])
        except argparse.ArgumentError as error:
            raise ValueError(str(error)) from error
        read = json.loads(self.parser.dump(config, format="json", skip_none=False))["fit"]
        if read["data"]["image_size"] is None:  # stage one's is the prior's
            read["data"]["image_size"] = read["model"].get("image_size")
        return read

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Not before `read`."""
        self.config = Namespace(subcommand=None, seed_everything=False)

    def before_instantiate_classes(self) -> None:
        """No dry run either."""

    def instantiate_classes(self) -> None:
        """Nothing."""


def loggers(run: Path, given: Logger | Iterable[Logger] | bool | None) -> list[Logger]:
    """TensorBoard in the run folder, and beside it what trainer.logger names; of false, none."""
    if given is False:
        return []
    others = [] if given is None or given is True else as_list(given)
    return [TensorBoardLogger(run, name="", version=""), *others]


def as_list(value: Any) -> list[Any]:
    """What may be one, several or None."""
    if value is None:
        return []
    return list(value) if isinstance(value, list | tuple) else [value]


def named(option: str) -> Callable[..., Any]:
    """What builds the class given for an option: its errors name the option."""

    def build(kind: type, *args: Any, **kwargs: Any) -> Any:
        with about(option):
            return kind(*args, **kwargs)

    return build


def plain(value: Any) -> Any:
    """Nested namespaces as dicts."""
    return value.as_dict() if isinstance(value, Namespace) else value
