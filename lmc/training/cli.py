"""The command line of both training scripts: one YAML, one run folder, resumed by itself."""

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import TensorBoardLogger

from lmc.training.callbacks import AtomicCheckpointIO, CheckFinite, Progress, SaveLast
from lmc.training.data import ImageData


class TrainingCLI(LightningCLI):
    """LightningCLI with a run folder: config.yaml, TensorBoard events, checkpoints/last.ckpt."""

    def __init__(self, model_class: type[LightningModule], args: ArgsType = None) -> None:
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
        parser.link_arguments("seed_everything", "model.seed")
        parser.link_arguments("seed_everything", "data.seed")

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """A trainer that logs and saves into the run folder."""
        run = Path(self._get(self.config, "run"))
        try:
            (run / "checkpoints").mkdir(parents=True, exist_ok=True)
            probe = run / "checkpoints" / ".writable"
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise OSError(f"cannot write into the run folder {run}: {error}") from error
        self.checkpoint = run / "checkpoints" / "last.ckpt"
        kwargs["default_root_dir"] = run
        kwargs["logger"] = TensorBoardLogger(run, name="", version="")
        kwargs["plugins"] = [AtomicCheckpointIO()]
        trainer = super().instantiate_trainer(**kwargs)
        if trainer.max_steps < 1:
            raise ValueError("trainer.max_steps must say how many steps to train")
        every = self._get(self.config, "save_every")
        callbacks: Any = trainer
        callbacks.callbacks += [CheckFinite(), Progress(), SaveLast(self.checkpoint, every)]
        return trainer

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        kwargs = super()._prepare_subcommand_kwargs(subcommand)
        kwargs["weights_only"] = True
        if self.checkpoint.exists():
            step = torch.load(self.checkpoint, weights_only=True, mmap=True)["global_step"]
            kwargs["ckpt_path"] = str(self.checkpoint)
            done = step >= self.trainer.max_steps
            print(
                f"{self.checkpoint.parent.parent}: "
                + (f"all {step} steps are done" if done else f"going on after step {step}"),
                flush=True,
            )
        return kwargs
