"""What the trainings on labelled pictures have in common, which come before the two stages."""

import math
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lmc.device import to_device
from lmc.errors import require
from lmc.shards.stream import is_remote
from lmc.training.base import TrainingModule, leads

ASKED = 20  # steps between two looks at the clock, for which all processes wait for one another
FEW = 50  # images of a class, of fewer of which it is said that they are learnt by heart


@dataclass(frozen=True)
class WarmCosine:
    """A learning rate that rises to `lr` in `warm_up` steps and falls along a cosine to 0.

    Raises:
        ValueError: one of them is out of its range.
    """

    lr: float = 1e-3
    warm_up: int = 200

    def __post_init__(self) -> None:
        require(0 < self.lr < math.inf, "model.optimizer.lr", "above 0", self.lr)
        require(self.warm_up >= 1, "model.optimizer.warm_up", "at least 1", self.warm_up)


class LabelledTraining(TrainingModule):
    """A training on labelled pictures within a budget of steps or hours, by AdamW.

    Args:
        network: what is trained.
        classes: the labels.
        image_size: the side of what the network sees in pixels.
        prompt: the caption of a class, '{}' in it.
        optimizer: AdamW's learning rate.
        ema_decay: of the running average of the weights; 0 keeps none.
        hours: end after these, of all sessions together, if trainer.max_steps do not end it
            before; None is no limit. The learning rate falls by whichever is sooner.
        heldout_images: how many held-out images are looked at, the first in the shards' order;
            None is all.
        seed: of all randomness.

    Raises:
        ValueError: hours that make no sense.
    """

    paper_batch = 0
    folder: str  # in the run folder, that the averaged weights are written to

    def __init__(
        self,
        network: nn.Module,
        classes: Sequence[str],
        image_size: int,
        optimizer: WarmCosine,
        ema_decay: float,
        hours: float | None,
        heldout_images: int | None,
        seed: int,
    ) -> None:
        require(hours is None or hours > 0, "model.hours", "above 0, or null", hours)
        super().__init__(network, optimizer, ema_decay, seed)
        self.classes, self._image_size = list(classes), image_size
        self.hours, self._heldout_images = hours, heldout_images
        self.spent = 0.0  # seconds, in the sessions before

    @property
    def image_size(self) -> int:
        """See the class."""
        return self._image_size

    @property
    def heldout_images(self) -> int | None:
        """See the class."""
        return self._heldout_images

    @property
    def target(self) -> Path:
        """Where the averaged weights are written."""
        return Path(self.trainer.default_root_dir) / self.folder

    def check_data(self, data: Any) -> None:
        """Compare the labels with the classes; see `check_labels`.

        Raises:
            ValueError: labels that are no class, or a class without images.
        """
        stream = data.stream(data.train, False, self)
        if leads() and not any(map(is_remote, stream.urls)):
            for line in check_labels(stream.labels(), self.classes):
                print(line, flush=True)

    def identities(self) -> dict[str, dict[str, Any]]:
        """There is nothing behind any name."""
        return {}

    def configure_optimizers(self) -> Any:
        """AdamW without decay of the weights, its rate as `WarmCosine` says."""
        adam = torch.optim.AdamW(
            self.network.parameters(), lr=self.adam.lr, betas=(0.9, 0.99), weight_decay=0
        )
        schedule = torch.optim.lr_scheduler.LambdaLR(adam, self._decay)
        return {"optimizer": adam, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _decay(self, step: int) -> float:
        warm = min(1.0, (step + 1) / self.adam.warm_up)
        return warm * 0.5 * (1 + math.cos(math.pi * min(1.0, self.share or 0.0)))

    # -----------------------------------------------------------------------------------------
    # The budget

    def on_fit_start(self) -> None:
        """The clock starts; what is done already counts."""
        self.began = time.monotonic()
        self._look_at_clock()

    def seconds(self) -> float:
        """Of training, in all sessions together."""
        return self.spent + time.monotonic() - self.began

    def _look_at_clock(self) -> None:
        """How much of the training is done: the same on all processes."""
        share = self.trainer.global_step / self.trainer.max_steps
        if self.hours is not None:
            share = max(share, self.seconds() / 3600 / self.hours)
            share = self.trainer.strategy.broadcast(share)
        self.share = share

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Look at the clock, where it is time to."""
        if self.hours is None or self.global_step % ASKED == 0:
            self._look_at_clock()

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """End where the hours are over."""
        if (self.share or 0.0) >= 1:
            self.trainer.should_stop = True

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """See `TrainingModule`; the seconds go with it."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["seconds"] = self.seconds()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """See `TrainingModule`."""
        super().on_load_checkpoint(checkpoint)
        self.spent = checkpoint["seconds"]

    def numbers_of(self, labels: Iterable[str]) -> Tensor:
        """The numbers of labels among the classes, int64 (B,).

        Raises:
            ValueError: a label that is no class.
        """
        try:
            numbers = [self.classes.index(label) for label in labels]
        except ValueError as error:
            raise ValueError(f"data: a label that model.classes has not: {error}") from error
        return to_device(torch.tensor(numbers), self.device)


def check_labels(labels: Counter[str], classes: Sequence[str]) -> list[str]:
    """Compare the labels of the training images with the classes.

    Args:
        labels: how many images have each.
        classes: that will be trained.

    Returns:
        What there is to say: of classes of few images.

    Raises:
        ValueError: a label that is no class, or a class without images.
    """
    found = ", ".join(f"{name} {count:,}" for name, count in sorted(labels.items()))
    if unknown := sorted(labels.keys() - set(classes)):
        raise ValueError(
            f"data.train has images of {', '.join(unknown)}, which model.classes does not name: "
            f"name them, or prepare shards without them. There are: {found}"
        )
    if missing := sorted(set(classes) - labels.keys()):
        raise ValueError(f"data.train has no images of {', '.join(missing)}. There are: {found}")
    return [
        f"{name}: {labels[name]} images are few: the prior will know them by heart, and its "
        "pictures of the class be copies of them"
        for name in classes
        if labels[name] < FEW
    ]


def captions_of(classes: Sequence[str], prompt: str) -> list[str]:
    """The captions of classes.

    Args:
        classes: two or more, of distinct names.
        prompt: '{}' in it stands for the name.

    Raises:
        ValueError: they are others.
    """
    require(len(set(classes)) == len(classes) >= 2, "model.classes", "two or more", classes)
    require("{}" in prompt, "model.prompt", "a text with {} in it", repr(prompt))
    return [prompt.replace("{}", name) for name in classes]
