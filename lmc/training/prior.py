"""Before stage one, where there is no prior: train a small one on labelled pictures."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torchmetrics import MeanMetric

from lmc.device import Compile, compile_in_place
from lmc.errors import about, require
from lmc.measure.evaluate import classified, from_all_processes
from lmc.measure.figures import labelled_grid
from lmc.measure.metrics import Classifier, Clip, cmmd, cosines, load_classifier
from lmc.priors.small import STEPS, TextDenoiser, sample
from lmc.schedule import time_bin
from lmc.shards.images import ImageBatch, to_uint8
from lmc.shards.triplets import draw_for_key
from lmc.training.base import TIME_BINS, show
from lmc.training.labelled import LabelledTraining, WarmCosine, captions_of

# What is said of samples by judge: the share that it calls their class (the small CLIP by the
# nearest caption), and the distance of its features to those of the held-out images.
JUDGES = {"recognised": "cmmd", "classified": "classifier_cmmd"}


@dataclass(frozen=True)
class Samples:
    """What is drawn of the prior at each look at the held-out images.

    Attributes:
        each: pictures of each class; 0 draws none.
        steps: of DDIM.
        guidance_scale: of their prompts.
        clip: folder or hub id of a CLIP that judges them: the share that it finds nearest to their
            own prompt, and CMMD to the held-out images; None leaves both out.
        classifier: MODULE:FUNCTION, see `lmc.measure.metrics.load_classifier`: the share that it
            calls their class, and CMMD of its features; None leaves both out.

    Raises:
        ValueError: one of them is out of its range.
    """

    each: int = 8
    steps: int = 25
    guidance_scale: float = 3.0
    clip: str | None = None
    classifier: str | None = None

    def __post_init__(self) -> None:
        require(self.each >= 0, "model.samples.each", "at least 0", self.each)
        require(1 <= self.steps <= STEPS, "model.samples.steps", f"in [1, {STEPS}]", self.steps)
        scale = self.guidance_scale
        require(0 < scale < math.inf, "model.samples.guidance_scale", "above 0", scale)


class PriorTraining(LabelledTraining):
    """Trains a small text-to-image model by v-prediction: ‖v − v̂(z_t, t, text)‖².

    The averaged weights become a pipeline folder in DeepFloyd IF's format, RUN/prior, at each look
    at the held-out images and at the end: what `DiffusersPrior` loads.

    Data are labelled images. Where data.image_size is above image_size, each image is cropped to
    that at random, without resampling; the held-out ones in the middle.

    Args:
        classes: the labels.
        image_size: the side of the prior's pictures in pixels.
        prompt: the caption of a class, '{}' in it.
        widths, attention, layers: of the denoiser, see `TextDenoiser`.
        optimizer: AdamW's learning rate.
        ema_decay: of the running average of the weights; 0 keeps none.
        prompt_dropout: share of pictures that are shown with no caption, for guidance.
        flip: mirror half of the pictures.
        min_snr: weigh the loss by min(SNR, this) / (SNR + 1), SNR = α_t² / σ_t² (Hang et al., 2023,
            for v); None weighs all t alike.
        hours: end after these, of all sessions together, if trainer.max_steps do not end it
            before; None is no limit. The learning rate falls by whichever is sooner.
        compile: torch.compile the U-Net, true ('default') or 'reduce-overhead': slow first steps,
            then faster ones.
        samples: what is drawn to look at.
        heldout_images: how many held-out images are looked at, the first in the shards' order;
            None is all.
        seed: of all noise; follows seed_everything.

    Raises:
        ValueError: a number or a text that makes no sense.
    """

    folder = "prior"

    def __init__(
        self,
        classes: Sequence[str],
        image_size: int = 32,
        prompt: str = "a photo of a {}",
        widths: Sequence[int] = (24, 48, 96, 120),
        attention: int = 2,
        layers: int = 1,
        optimizer: WarmCosine = WarmCosine(),  # noqa: B008
        ema_decay: float = 0.999,
        prompt_dropout: float = 0.1,
        flip: bool = True,
        min_snr: float | None = None,
        hours: float | None = None,
        compile: Compile = False,
        samples: Samples = Samples(),
        heldout_images: int | None = 500,
        seed: int = 0,
    ) -> None:
        require(0 <= prompt_dropout < 1, "model.prompt_dropout", "in [0, 1)", prompt_dropout)
        require(min_snr is None or min_snr > 0, "model.min_snr", "above 0, or null", min_snr)
        self.captions = captions_of(classes, prompt)
        with about("model"):
            network = TextDenoiser(self.captions, image_size, widths, attention, layers)
        super().__init__(
            network, classes, image_size, optimizer, ema_decay, hours, heldout_images, seed
        )
        self.prompt_dropout, self.flip, self.min_snr = prompt_dropout, flip, min_snr
        self.compile_unet, self.samples = compile, samples
        self.register_buffer("alphas_cumprod", network.alphas_cumprod(), persistent=False)
        self.alphas_cumprod: Tensor
        self.clip: Clip | None = None
        self.classifier: Classifier | None = None

    @property
    def denoiser(self) -> TextDenoiser:
        """The network being trained."""
        assert isinstance(self.network, TextDenoiser)
        return self.network

    def check(self, data: Any) -> None:
        """See `TrainingModule`.

        Raises:
            ValueError: images smaller than image_size; labels that are no class, or a class without
                images.
            OSError, ValueError: of samples.clip or samples.classifier.
        """
        size = data.image_size
        if size is not None and size < self.image_size:
            raise ValueError(
                f"data.image_size {size} is below model.image_size {self.image_size}: prepare the "
                "shards larger, or train a smaller prior"
            )
        self.check_data(data)
        self.load_judges("cpu")

    def load_judges(self, device: torch.device | str) -> None:
        """What judges samples, on a device; see `check`."""
        if self.samples.clip is not None:
            self.clip = _clip(self.samples.clip, device)
        if self.samples.classifier is not None:
            with about("model.samples"):
                self.classifier = load_classifier(self.samples.classifier, device)

    def setup(self, stage: str) -> None:
        """Load what judges, and compile."""
        self.load_judges(self.trainer.strategy.root_device)
        compile_in_place(self.denoiser.unet, self.compile_unet)

    # -----------------------------------------------------------------------------------------
    # A step

    def losses(
        self, network: TextDenoiser, z: Tensor, step: Tensor, eps: Tensor, caption: Tensor
    ) -> Tensor:
        """‖v − v̂‖² of each picture, mean over its values, weighed by `min_snr`: (B,)."""
        bar = self.alphas_cumprod[step]
        alpha, sigma = (x.sqrt()[:, None, None, None] for x in (bar, 1 - bar))
        v = alpha * eps - sigma * z
        z_t = (alpha * z + sigma * eps).to(memory_format=torch.channels_last)
        losses = (network(z_t, step, caption).float() - v).square().mean((1, 2, 3))
        if self.min_snr is None:
            return losses
        snr = bar / (1 - bar)
        return losses * snr.clamp(max=self.min_snr) / (snr + 1)

    def training_step(self, batch: ImageBatch, batch_idx: int) -> Tensor:
        """The loss, mean over the batch."""
        generator = self.generator()
        z = self.cropped(batch.image, generator)
        count = len(z)
        how: Any = {"generator": generator, "device": self.device}
        if self.flip:
            z = torch.where(torch.rand(count, 1, 1, 1, **how) < 0.5, z.flip(3), z)
        caption = self.numbers_of(batch.label)
        dropped = torch.rand(count, **how) < self.prompt_dropout
        caption = torch.where(dropped, len(self.classes), caption)
        step = torch.randint(STEPS, (count,), **how)
        eps = torch.randn(z.shape, **how)
        losses = self.losses(self.denoiser, z, step, eps, caption)
        self.batches_done += 1
        t = (step + 0.5) / STEPS
        self.watch(losses[:, None], t, batch.key, "the loss of the prior")
        self.log("train/loss", losses.mean())
        self.log_by_time("train/loss_by_t", losses.detach(), t)
        return losses.mean()

    def cropped(self, image: Tensor, generator: torch.Generator | None) -> Tensor:
        """A square of image_size of each image, anywhere; of no generator the middle one."""
        size, room = self.image_size, image.shape[-1] - self.image_size
        if room == 0:
            return image
        if generator is None:
            return image[..., room // 2 : room // 2 + size, room // 2 : room // 2 + size]
        places = torch.randint(room + 1, (2, len(image)), generator=generator, device=image.device)
        along = torch.arange(size, device=image.device)
        rows, columns = (place[:, None] + along for place in places)
        which = torch.arange(len(image), device=image.device)[:, None, None]
        # (B, S, S, 3), as advanced indices go first.
        picked = image.permute(0, 2, 3, 1)[which, rows[:, :, None], columns[:, None, :]]
        return picked.permute(0, 3, 1, 2)

    # -----------------------------------------------------------------------------------------
    # A look

    def on_validation_epoch_start(self) -> None:
        """Start afresh."""
        self.errors = [MeanMetric().to(self.device) for _ in range(TIME_BINS)]
        # By judge, labels and features.
        self.seen: dict[str, list[tuple[str, Tensor]]] = {name: [] for name in JUDGES}

    def validation_step(self, batch: ImageBatch, batch_idx: int) -> None:
        """The held-out loss of the averaged weights, with the noise of each image's key."""
        if not batch.key:
            return
        z = self.cropped(batch.image, None)
        drawn = [draw_for_key(key, z.shape[1:]) for key in batch.key]
        step = (torch.cat([t for t, _ in drawn]) * STEPS).long().to(self.device)
        eps = torch.cat([noise for _, noise in drawn]).to(z)
        averaged: Any = self.averaged
        losses = self.losses(averaged, z, step, eps, self.numbers_of(batch.label))
        for number, loss in zip(time_bin(step / STEPS, TIME_BINS).tolist(), losses, strict=True):
            self.errors[number].update(loss)
        for name, (_, features) in self.judged(z).items():
            self.seen[name] += zip(batch.label, features.cpu(), strict=True)

    def on_validation_epoch_end(self) -> None:
        """Log the held-out loss, draw pictures, and write the pipeline."""
        means = [each.compute() for each in self.errors if each.weight > 0]
        self.log("heldout/loss", torch.stack(means).mean(), sync_dist=True)
        for number, each in enumerate(self.errors):
            if each.weight > 0:
                self.log(f"heldout/loss/t{number / TIME_BINS:.1f}", each.compute(), sync_dist=True)
        parts = from_all_processes(self.seen)
        seen = {name: [each for part in parts for each in part[name]] for name in JUDGES}
        judged: dict[str, float] = {}
        if self.trainer.is_global_zero and self.samples.each:
            pictures = self.draw()
            rows = dict(zip(self.classes, pictures.split(self.samples.each), strict=True))
            title = f"guidance {self.samples.guidance_scale:g}, {self.samples.steps} steps"
            show(self, "samples", "samples", labelled_grid({title: rows}))
            judged = judge(self.judged, rows, seen)
        for name, value in self.trainer.strategy.broadcast(judged).items():
            self.log(f"heldout/{name}", value, sync_dist=True)
        self.write()

    @torch.no_grad()
    def judged(self, image: Tensor) -> dict[str, tuple[Sequence[str], Tensor]]:
        """What each judge calls images in [-1, 1], (B, 3, S, S), and its features (B, D)."""
        found: dict[str, tuple[Sequence[str], Tensor]] = {}
        if self.clip is not None:
            features = self.clip.images(image)
            nearest = cosines(features, self.clip.texts(self.captions)).argmax(1)
            found["recognised"] = [self.classes[number] for number in nearest.tolist()], features
        if self.classifier is not None:
            found["classified"] = classified(self.classifier, to_uint8(image))
        return found

    @torch.no_grad()
    def draw(self) -> Tensor:
        """Pictures of the averaged weights, `samples.each` of each class, in [-1, 1]."""
        averaged: Any = self.averaged
        numbers = torch.arange(len(self.classes), device=self.device)
        return sample(
            averaged,
            numbers.repeat_interleave(self.samples.each),
            self.samples.steps,
            self.samples.guidance_scale,
            torch.Generator(self.device).manual_seed(self.seed),
        )

    def write(self) -> None:
        """The averaged weights as RUN/prior, by one process."""
        if self.trainer.is_global_zero and not self.trainer.sanity_checking:
            averaged: Any = self.averaged
            averaged.save_pipeline(self.target)


def judge(
    judged: Callable[[Tensor], Mapping[str, tuple[Sequence[str], Tensor]]],
    rows: Mapping[str, Tensor],
    seen: Mapping[str, Sequence[tuple[str, Tensor]]],
) -> dict[str, float]:
    """What judges say of samples.

    Args:
        judged: what each judge calls pictures, and their features, by the names of `JUDGES`.
        rows: pictures by class, in [-1, 1].
        seen: the held-out images' labels and features by judge.

    Returns:
        By judge, the share that it calls their class; and CMMD of its features to the held-out
        images, mean over the classes with two of each at least, where there is one.
    """
    found: dict[str, float] = {}
    verdicts = {name: judged(pictures) for name, pictures in rows.items()}
    for share, distance in JUDGES.items():
        right: list[bool] = []
        distances = []
        for name, verdict in verdicts.items():
            if share not in verdict:
                continue
            called, made = verdict[share]
            right += [each == name for each in called]
            real = [features for label, features in seen[share] if label == name]
            if min(len(real), len(made)) >= 2:
                distances.append(cmmd(made.cpu(), torch.stack(real)))
        if right:
            found[share] = sum(right) / len(right)
        if distances:
            found[distance] = sum(distances) / len(distances)
    return found


def _clip(pretrained: str, device: torch.device | str = "cpu") -> Clip:
    try:
        return Clip(pretrained, device)
    except (OSError, ValueError) as error:
        raise OSError(f"model.samples.clip {pretrained}: {error}") from error
