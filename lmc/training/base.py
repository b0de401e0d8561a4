"""What both stages' training shares: EMA, optimizer, randomness by step, the guard against NaN."""

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from lmc.errors import require
from lmc.files import whole
from lmc.schedule import time_bin
from lmc.training.resume import covers

TIME_BINS = 5  # what is logged by t is logged for t in [0, 0.2), [0.2, 0.4), …
PRIOR = "model.prior.init_args.pretrained"  # the key of the configuration that names it


@dataclass(frozen=True)
class StepDecay:
    """A learning rate of `lr` times `factor` once every `every` steps.

    Raises:
        ValueError: one of them is out of its range.
    """

    lr: float
    factor: float = 0.9
    every: int = 100_000

    def __post_init__(self) -> None:
        require(0 < self.lr < math.inf, "model.optimizer.lr", "above 0", self.lr)
        require(0 < self.factor <= 1, "model.optimizer.factor", "in (0, 1]", self.factor)
        require(self.every >= 1, "model.optimizer.every", "at least 1", self.every)


class LearningRate(Protocol):
    """What every schedule of a learning rate says: the greatest."""

    @property
    def lr(self) -> float:
        """See the class."""


class Identified:
    """A prior whose identity another process has taken from its weights."""

    def __init__(self, prior: Any, identity: Mapping[str, Any]) -> None:
        self._prior, self.identity = prior, identity

    def __getattr__(self, name: str) -> Any:
        if name == "_prior":  # while it is copied
            raise AttributeError(name)
        return getattr(self._prior, name)


class NonFiniteGradient(FloatingPointError):
    """A gradient was infinite or NaN; training stops rather than go on with it."""


class TrainingModule(LightningModule):
    """A network, its running average, and a step that draws its randomness from (seed, rank, step).

    The prior, being frozen, is no part of the module: not in its state, nor its average, nor DDP.

    Attributes:
        paper_batch: the effective batch of the paper, over all processes; 0 where there is none.
        best_by: the held-out figures of which the greatest make best.ckpt, ties of the first broken
            by the next; none keeps no best.ckpt.
        best_of: what they are measured with and on, of which only equals are compared.
        heldout_images: how many held-out images are looked at, the first in the shards' order;
            None is all.
        image_size: the side in pixels of its data's images, unless data.image_size says another.
        allowed: keys of the configuration that may be others than those of a checkpoint.
        share: how much of the training is done, in [0, 1], where the steps alone do not tell.

    Args:
        network: what is trained.
        optimizer: Adam's learning rate and its decay.
        ema_decay: of the running average of the weights, reached gradually; 0 keeps no average.
        seed: of all noise.
        check_every: steps between looks at whether all gradients were finite (a look waits for
            the device).
    """

    prior: Any
    paper_batch: ClassVar[int]
    best_by: ClassVar[tuple[str, ...]] = ()
    allowed: Sequence[str] = ()
    share: float | None = None

    @property
    def best_of(self) -> str:
        """See the class."""
        return ""

    @property
    def heldout_images(self) -> int | None:
        """See the class."""
        return None

    @property
    def image_size(self) -> int:
        """See the class."""
        raise NotImplementedError

    def __init__(
        self,
        network: nn.Module,
        optimizer: LearningRate,
        ema_decay: float,
        seed: int,
        check_every: int = 50,
    ) -> None:
        super().__init__()
        require(0 <= ema_decay < 1, "model.ema_decay", "in [0, 1)", ema_decay)
        self.network = network
        for weight in network.parameters():
            if weight.ndim == 4:
                weight.data = weight.data.to(memory_format=torch.channels_last)
        self.ema = AveragedModel(self.network)
        self.ema.requires_grad_(False)
        self.adam: Any = optimizer
        self.ema_decay, self.seed = ema_decay, seed
        self.check_every = check_every
        self.batches_done = 0
        self._unchecked: list[tuple[int, Tensor, Tensor, list[str], str]] = []
        self._gradients: list[tuple[int, Tensor]] = []  # of the weights: step, whether finite

    def check(self, data: Any) -> None:
        """Refuse what does not fit together, before anything is written and weights are loaded.

        What is quickly looked at comes first, what reads whole files last.

        Args:
            data: the `ImageData`, itself checked.

        Raises:
            ValueError, OSError: see the stages.
        """

    def share_identity(self) -> Mapping[str, Any]:
        """The prior's identity, for which its weights are read: by rank zero, for all ranks."""
        first = self.trainer.is_global_zero
        mine: Mapping[str, Any] = self.prior.identity if first else {}
        identity = self.trainer.strategy.broadcast(mine)
        if not first:
            self.prior = Identified(self.prior, identity)
        return identity

    @property
    def averaged(self) -> nn.Module:
        """The network with its averaged weights: what is evaluated and released."""
        return self.ema.module

    def configure_optimizers(self) -> Any:
        """Adam, stepwise decaying [LMC, App. A]."""
        adam = torch.optim.Adam(self.network.parameters(), lr=self.adam.lr)
        schedule = torch.optim.lr_scheduler.LambdaLR(adam, self._decay)
        return {"optimizer": adam, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _decay(self, step: int) -> float:
        return self.adam.factor ** (step // self.adam.every)

    def on_train_start(self) -> None:
        """Have the configuration's learning rate, where the checkpoint has another."""
        schedule: Any = self.lr_schedulers()
        if schedule.base_lrs == [self.adam.lr]:
            return
        schedule.base_lrs = [self.adam.lr]
        (group,) = schedule.optimizer.param_groups
        group["initial_lr"] = self.adam.lr
        group["lr"] = self.adam.lr * self._decay(schedule.last_epoch)

    def generator(self) -> torch.Generator:
        """The randomness of this step: follows from (seed, rank, batches done) alone."""
        generator = torch.Generator(self.device)
        step = (self.seed * 65_537 + self.global_rank) * 100_000_007 + self.batches_done
        return generator.manual_seed(step % 2**63)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Step, then move the running average."""
        super().optimizer_step(*args, **kwargs)
        # Starts as a short average, so that a short run does not remember its first weights.
        steps = self.trainer.global_step  # before this one, by Lightning's count
        decay = min(self.ema_decay, (1 + steps) / (10 + steps))
        self.move_average(decay if self.ema_decay and steps else 0.0)

    @torch.no_grad()
    def move_average(self, decay: float) -> None:
        """average ← decay · average + (1 − decay) · network; buffers are the network's.

        As `AveragedModel.update_parameters`, which asks the device for how many it has averaged.
        """
        averaged = self.averaged
        torch._foreach_lerp_(
            list(averaged.parameters()), list(self.network.parameters()), 1 - decay
        )
        for mean, value in zip(averaged.buffers(), self.network.buffers(), strict=True):
            mean.copy_(value)
        self.ema.n_averaged += 1

    def watch(self, gradient: Tensor, t: Tensor, keys: list[str], what: str) -> None:
        """Note whether `gradient` (B, …) is finite; looked at every `check_every` steps.

        Raises:
            NonFiniteGradient: one was not; names step, loss, t and the sample's key.
        """
        finite = torch.isfinite(gradient.detach()).flatten(1).all(1)
        self._unchecked.append((self.global_step, finite, t, keys, what))
        if len(self._unchecked) >= self.check_every:
            self.check_finite()

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Note whether the gradient of the weights is finite; looked at with what `watch` noted.

        That of the loss may be finite and still overflow on its way back through the network.
        """
        precision: Any = self.trainer.precision_plugin
        if getattr(precision, "scaler", None) is not None:
            return  # of float16, it meets such gradients by the way and leaves these steps out
        gradients = [p.grad for p in self.network.parameters() if p.grad is not None]
        # The greatest, in place of a sum of squares, which may overflow by itself.
        greatest = torch.nn.utils.get_total_norm(gradients, math.inf)
        self._gradients.append((self.global_step, torch.isfinite(greatest)))

    def check_finite(self) -> None:
        """Look at what was noted since the last look.

        Raises:
            NonFiniteGradient: see `watch`; or the gradient of the weights was not finite, where
                that of the loss was: names the step.
        """
        noted, self._unchecked = self._unchecked, []
        gradients, self._gradients = self._gradients, []
        flags = [*(finite for _, finite, *_ in noted), *(finite[None] for _, finite in gradients)]
        if not flags or torch.cat(flags).all():
            return
        overflown = min((step for step, finite in gradients if not finite), default=math.inf)
        for step, finite, t, keys, what in noted:
            for i in (~finite).nonzero().flatten().tolist() if step <= overflown else ():
                raise NonFiniteGradient(
                    f"step {step}: the gradient of {what!r} is not finite at "
                    f"t = {t[i].item():.4f}, sample {keys[i]}. The last checkpoint is from "
                    "before it. Usual causes: too high a learning rate, or a "
                    "prior in float16 (try bfloat16)"
                )
        raise NonFiniteGradient(
            f"step {overflown}: the gradient of the weights is not finite, though the loss's own "
            "is: it overflowed on its way back through the network. The last checkpoint is from "
            "before it: go on from there with a lower --model.optimizer.lr or with "
            "--trainer.gradient_clip_val (each named to --allow_changes too), or in more precision"
        )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Never save weights that a non-finite gradient may have touched."""
        self.check_finite()
        checkpoint["batches_done"] = self.batches_done
        checkpoint["batch"] = effective_batch(self.trainer)
        # What lmc.release needs to build the network again.
        network: Any = self.network
        config = {name: plain(value) for name, value in network.arguments.items()}
        checkpoint["network"] = {"class": type(self.network).__name__, "config": config}
        if self.trainer.is_global_zero:  # which writes the file
            checkpoint["identities"] = plain(self.identities())

    def identities(self) -> dict[str, dict[str, Any]]:
        """What is behind the names in the configuration, by its key: `Prior.identity` and others.

        Taking the digest of a prior's weights may read all of them, once.
        """
        prior: Any = self.prior
        return {PRIOR: dict(prior.identity)}

    def check_checkpoint(self, checkpoint: Mapping[str, Any]) -> None:
        """Refuse the checkpoint of another network, by name and shape; only looks at it.

        Raises:
            ValueError: some weights are missing, left over or of another shape.
        """
        own, other = self.state_dict(), checkpoint["state_dict"]
        for name in sorted(own.keys() | other.keys()):
            here, there = (tuple(s[name].shape) if name in s else "none" for s in (own, other))
            if here != there:
                raise ValueError(
                    f"the checkpoint is of another network: {name} has shape {there} there, {here} "
                    "here. Use the configuration it was trained with, or another run folder"
                )

    def check_identities(self, checkpoint: Mapping[str, Any]) -> None:
        """Refuse to go on with something else of the same name; see `identities`.

        What only one of checkpoint and module knows, as different versions may, is not compared.

        Raises:
            ValueError: a prior or corrector is another; says what of it.
        """
        # A corrector's configuration has its prior's, in older checkpoints too.
        prior = checkpoint.get("network", {}).get("config", {}).get("prior")
        there = checkpoint.get("identities", {PRIOR: prior} if prior else {})
        here = plain(self.identities()) if there else {}
        for key in sorted(there.keys() & here.keys()):
            old, new = there[key], here[key]
            for name in sorted((old.keys() & new.keys()) - {"pretrained", "revision"}):
                if old[name] != new[name] and not covers(self.allowed, key):
                    raise ValueError(
                        f"what {key} names is not what the run was begun with: its {name} was "
                        f"{old[name]} and is {new[name]}. Name another folder (--run), or go on "
                        f"all the same with --allow_changes {key}"
                    )

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse the checkpoint of another network; say where the effective batch was another.

        Raises:
            ValueError: see `check_checkpoint`.
        """
        self.check_checkpoint(checkpoint)
        self.batches_done = checkpoint["batches_done"]
        batch = effective_batch(self.trainer)
        if self.trainer.is_global_zero and checkpoint.get("batch", batch) != batch:
            print(
                f"the effective batch was {checkpoint['batch']} up to step "
                f"{checkpoint['global_step']} and is {batch} from there on; nothing rescales the "
                "learning rate",
                flush=True,
            )

    def log_by_time(self, name: str, values: Tensor, t: Tensor) -> None:
        """Log per-sample `values` (B,) as means over bins of t (B,), where a bin has any.

        Of the last batch of each `trainer.log_every_n_steps`-th step: a look waits for the device.
        """
        if self.logs_now():
            bins = time_bin(t, TIME_BINS)
            means = {i: values[bins == i].mean().item() for i in bins.unique().tolist()}
            self.log_now({f"{name}/t{i / TIME_BINS:.1f}": mean for i, mean in means.items()})

    def logs_now(self) -> bool:
        """Whether this is the last batch of a step that is logged, and this process logs."""
        trainer: Any = self.trainer
        every, batches = trainer.log_every_n_steps, trainer.accumulate_grad_batches
        if not trainer.is_global_zero or every == 0 or self.batches_done % batches:
            return False
        return (self.global_step + 1) % every == 0

    def log_now(self, numbers: Mapping[str, float]) -> None:
        """Log what the host knows, where `logs_now`.

        Not by way of `log`: it copies a number to the device at every step; and Lightning counts
        the steps to write by itself, and one too many after it went on with a run that was at its
        end. What it does not write would be lost.
        """
        for logger in self.loggers:
            logger.log_metrics(dict(numbers), self.global_step)


def leads() -> bool:
    """Whether this process does for the others of its machine what one has to do.

    It does where no launcher says that it is a later one; a launcher ends all when one fails.
    """
    return os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0")) == "0"


def plain(value: Any) -> Any:
    """Nested containers as lists and dicts, which a checkpoint may hold without pickle."""
    if isinstance(value, dict):
        return {name: plain(item) for name, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, list | tuple) else value


def effective_batch(trainer: Trainer) -> int:
    """Images a step, over all processes and accumulated batches; 0 where there are no data."""
    data: Any = getattr(trainer, "datamodule", None)
    each = data.batch_size if data else 0
    return each * trainer.world_size * trainer.accumulate_grad_batches


def tensorboard(module: LightningModule) -> Any:
    """The run's TensorBoard writer, or None where there is none (another rank, no logger)."""
    if not module.trainer.is_global_zero:
        return None
    found = (each for each in module.loggers if isinstance(each, TensorBoardLogger))
    return next((each.experiment for each in found), None)


def show(module: LightningModule, tag: str, name: str, picture: Any) -> None:
    """A picture into TensorBoard and the run folder, as validation/NAME_000550.png; by one process.

    Args:
        module: what is trained; its step is in the file's name.
        tag: in TensorBoard.
        name: of the file.
        picture: a PIL image.
    """
    if not module.trainer.is_global_zero:
        return
    writer, step = tensorboard(module), module.global_step
    file = Path(module.trainer.default_root_dir) / "validation" / f"{name}_{step:06d}.png"
    with whole(file) as partial:
        picture.save(partial, "png")
    if writer is not None:
        writer.add_image(tag, np.asarray(picture), step, dataformats="HWC")
