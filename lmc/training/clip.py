"""A small CLIP for R-Precision and CLIP score, trained on labelled pictures."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torchmetrics import MeanMetric
from torchvision.transforms.v2 import functional as transforms

from lmc.errors import about
from lmc.measure.small_clip import SmallClip, augment, halved
from lmc.shards.images import ImageBatch
from lmc.training.labelled import LabelledTraining, WarmCosine, captions_of

HELDOUT = {"accuracy": lambda x: x, "accuracy_halved": halved}


class ClipTraining(LabelledTraining):
    """Trains a `SmallClip` to tell the captions of classes apart: cross-entropy among them.

    On pictures as a generator might make them, see `augment`. The averaged weights become RUN/clip
    at each look at the held-out images and at the end: what `--clip` and model.validation.clip
    take.

    Data are labelled images of any size; they are resized to image_size.

    Args:
        classes: the labels; R-Precision and CLIP score are of their captions, and of no others.
        image_size: the side of the pictures that it sees in pixels.
        prompt: the caption of a class, '{}' in it.
        patch, width, layers, embedding: see `SmallClip`.
        optimizer: AdamW's learning rate.
        ema_decay: of the running average of the weights; 0 keeps none.
        hours: end after these, of all sessions together, if trainer.max_steps do not end it
            before; None is no limit. The learning rate falls by whichever is sooner.
        heldout_images: how many held-out images are looked at, the first in the shards' order;
            None is all.
        seed: of all randomness; follows seed_everything.

    Raises:
        ValueError: a number or a text that makes no sense.
    """

    folder = "clip"

    def __init__(
        self,
        classes: Sequence[str],
        image_size: int = 64,
        prompt: str = "a photo of a {}",
        patch: int = 8,
        width: int = 144,
        layers: int = 4,
        embedding: int = 64,
        optimizer: WarmCosine = WarmCosine(warm_up=100),  # noqa: B008
        ema_decay: float = 0.99,
        hours: float | None = None,
        heldout_images: int | None = None,
        seed: int = 0,
    ) -> None:
        captions = captions_of(classes, prompt)
        with about("model"):
            network = SmallClip(captions, image_size, patch, width, layers, embedding)
        super().__init__(
            network, classes, image_size, optimizer, ema_decay, hours, heldout_images, seed
        )

    def check(self, data: Any) -> None:
        """See `TrainingModule`.

        Raises:
            ValueError: labels that are no class, or a class without images.
        """
        self.check_data(data)

    def resized(self, image: Tensor) -> Tensor:
        """Images at image_size, as CLIP's own preparation makes them so."""
        size = [self.image_size, self.image_size]
        if list(image.shape[-2:]) == size:
            return image
        how: Any = {"interpolation": transforms.InterpolationMode.BICUBIC, "antialias": True}
        return transforms.resize(image, size, **how).clamp(-1, 1)

    def training_step(self, batch: ImageBatch, batch_idx: int) -> Tensor:
        """The cross-entropy, mean over the batch."""
        x = augment(self.resized(batch.image), self.generator())
        losses = F.cross_entropy(
            self.network(x).float(), self.numbers_of(batch.label), reduction="none"
        )
        self.batches_done += 1
        self.watch(losses[:, None], torch.zeros(len(losses)), batch.key, "the loss of CLIP")
        self.log("train/loss", losses.mean())
        return losses.mean()

    def on_before_zero_grad(self, optimizer: torch.optim.Optimizer) -> None:
        """Bound the cosines' scale, after each step."""
        network: Any = self.network
        network.bound_scale()

    def on_validation_epoch_start(self) -> None:
        """Start afresh."""
        names = [*HELDOUT, *(f"accuracy/{name}" for name in self.classes)]
        self.hits = {name: MeanMetric().to(self.device) for name in names}

    def validation_step(self, batch: ImageBatch, batch_idx: int) -> None:
        """The share that is nearest to its own caption, as it is and after half the size."""
        if not batch.key:
            return
        x, numbers = self.resized(batch.image), self.numbers_of(batch.label)
        for name, changed in HELDOUT.items():
            right = (self.averaged(changed(x)).argmax(1) == numbers).float()
            self.hits[name].update(right)
            if name == "accuracy":
                for label, hit in zip(batch.label, right, strict=True):
                    self.hits[f"accuracy/{label}"].update(hit)

    def on_validation_epoch_end(self) -> None:
        """Log the shares, over all and by class, and write the folder."""
        for name, each in self.hits.items():
            value = each.compute()  # over all processes
            if value.isfinite():
                self.log(f"heldout/{name}", value, sync_dist=True)
        if self.trainer.is_global_zero and not self.trainer.sanity_checking:
            averaged: Any = self.averaged
            averaged.save(self.target)
