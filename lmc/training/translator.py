"""Stage two: train the translator with a score-distillation loss [LMC, Sec. 5.2]."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

from lmc.corrector import BiasCorrector
from lmc.device import Compile, compile_in_place, to_device
from lmc.errors import about, require
from lmc.losses import LossInputs, ScoreDistillation, embed_prompts, surrogate
from lmc.measure.evaluate import Prompts
from lmc.measure.figures import labelled_grid
from lmc.patches import Window, crop, draw_window, sides
from lmc.priors import Embedding, Prior
from lmc.schedule import TimeSchedule
from lmc.shards.images import ImageBatch, resize
from lmc.training.base import StepDecay, TrainingModule, leads, show
from lmc.training.resume import covers
from lmc.training.validation import Heldout, Validation, load_tools, load_truth
from lmc.translator import Translator
from lmc.unet import Norm

CORRECTOR = "model.loss.init_args.corrector"  # the key of the configuration that names it
WINDOWS = 0x9E3779B9  # sets their random stream apart from the step's own
TIMES = 0x7F4A7C15  # likewise


@dataclass(frozen=True)
class Ramp:
    """A weight that goes from `start` to `end` along half a cosine over the first `steps` steps."""

    start: float
    end: float
    steps: int = 20_000

    def __call__(self, step: int) -> float:
        """The weight at `step`; `end` ever after `steps`."""
        done = min(1.0, step / self.steps) if self.steps else 1.0
        return self.end + (self.start - self.end) * (1 + math.cos(math.pi * done)) / 2


@dataclass(frozen=True)
class Patches:
    """Random parts of some images for the loss to see, in place of the whole.

    Of a whole image that is resized to a smaller prior's size, no gradient reaches what lies above
    that size's frequencies: a 256² translator's finest detail stays what it was in the source. A
    part of the image has it. A prior that knows whole things alone wears them down in small parts.

    Attributes:
        share: of the images that are seen in part, each drawn by itself, in [0, 1].
        range: smallest and largest side of a patch in pixels of the translator's image, uniform
            between; it is resized to the prior's size. None: from the prior's size, or the image's
            if that is less, to the image's.
        from_step: the first step with patches; before it all images are seen whole.

    Raises:
        ValueError: a setting out of its range.
    """

    share: float = 0.5
    range: tuple[int, int] | None = None
    from_step: int = 0

    def __post_init__(self) -> None:
        require(0 <= self.share <= 1, "model.patches.share", "in [0, 1]", self.share)
        require(self.from_step >= 0, "model.patches.from_step", "at least 0", self.from_step)
        if self.range is not None:
            ordered = 1 <= self.range[0] <= self.range[1]
            require(ordered, "model.patches.range", "[least, most] in pixels", list(self.range))

    def sides(self, size: int, image_size: int) -> tuple[int, int]:
        """Smallest and largest side, for images of `size` and a prior of `image_size`.

        Raises:
            ValueError: they are larger than the images.
        """
        return sides(self.range, size, size, image_size, "model.patches.range")

    def draw(
        self, count: int, size: int, image_size: int, generator: torch.Generator
    ) -> list[Window]:
        """What the loss sees of each of `count` images, patch or whole; see also `sides`."""
        low, high = self.sides(size, image_size)

        def one() -> Window:
            if torch.rand((), generator=generator) < self.share:
                return draw_window(generator, size, size, low, high)
            return 0, 0, size

        return [one() for _ in range(count)]


def l2_to(source: Tensor, output: Tensor, size: int | None = None) -> Tensor:
    """The mean square of their difference.

    Args:
        source, output: (B, C, S, S).
        size: the side that both are averaged to first, a divisor of S; None is S.
    """
    difference = output - source
    if size is not None:
        difference = avg_pool2d(difference, difference.shape[-1] // size)
    return difference.square().mean()


class TranslatorTraining(TrainingModule):
    """Trains the translator with `loss` plus L2 to the source. Defaults are the paper's.

    total = score_weight · score + l2_weight · L2, both means over pixels and batch. L2 is of the
    whole images in any case; the score is of what `patches` lets the loss see.

    Args:
        prior: the frozen diffusion model.
        loss: a score-distillation loss, by class: one of lmc.losses, or another
            by its import path.
        classes: the targets.
        source: the class of the source images; its prompt is what DDS compares with.
        prompt: of a class; {} stands for its name.
        image_size: of the translator's images; they are resized to the prior's for the loss.
        widths: filters per level of the U-Net; the last is the middle level.
        norm: 'none' as in the paper, or 'group'.
        residual: learn the difference to the source, see `Translator`; false in the paper.
        gated: and where to drop the source, see `Translator`.
        score_weight: ramp of the loss's weight.
        l2_weight: ramp of the L2 weight.
        optimizer: learning rate and decay.
        ema_decay: of the running average of the weights; 0 keeps none.
        every_class: translate each image to all classes at once, with the same t and eps, in place
            of one drawn uniformly: what tells the classes apart is then free of that noise. The
            paper leaves the choice open. Multiplies the batch by the number of classes.
        patches: parts of the images for the loss to see; None, as we read the paper: all images are
            resized whole. The same part of output and source, and for all classes of an image.
        l2_rescale: divide L2 by the guidance scale too, as the loss's `rescale` does the score: the
            paper rescales 'the total loss'. By default the score alone.
        l2_size: the side in pixels that output and source are averaged to before L2 compares them,
            a divisor of image_size; None, as in the paper, is their own. What is finer is then held
            by nothing but the loss: L2 at full size keeps ghosts of the source's ears, say.
        time: how t is drawn; None is the loss's own way: uniform in (0.02, 0.98), but for SDI.
        validation: what is measured and shown of the held-out images.
        compile: torch.compile the translator and the loss's corrector, true ('default') or
            'reduce-overhead': slow first steps, then faster ones. The prior has an option of its
            own.
        seed: of classes, t and eps; follows seed_everything.

    Raises:
        ValueError: a prompt without {}, a source that is a target too, or see `Translator` and
            `ScoreDistillation.choose_time`.
    """

    paper_batch = 32
    best_by = ("heldout/r_precision", "heldout/clip_score")

    def __init__(
        self,
        prior: Prior,
        loss: ScoreDistillation,
        classes: Sequence[str] = ("bear", "dog", "lion", "squirrel"),
        source: str = "cat",
        prompt: str = "a photo of a {}",
        image_size: int = 256,
        widths: Sequence[int] = (32, 64, 128, 256, 256, 256),
        norm: Norm = "none",
        residual: bool = False,
        gated: bool = False,
        score_weight: Ramp = Ramp(0.1, 1.0),
        l2_weight: Ramp = Ramp(1.0, 0.1),
        optimizer: StepDecay = StepDecay(lr=5e-5, factor=0.9, every=50_000),  # noqa: B008
        ema_decay: float = 0.999,
        every_class: bool = False,
        patches: Patches | None = None,
        l2_rescale: bool = False,
        l2_size: int | None = None,
        time: TimeSchedule | None = None,
        validation: Validation = Validation(),  # noqa: B008
        compile: Compile = False,
        seed: int = 0,
    ) -> None:
        if "{}" not in prompt:
            raise ValueError(f"model.prompt {prompt!r} has no {{}} for the class's name")
        if source in classes:
            raise ValueError(
                f"model.source {source!r} is among the targets, model.classes {list(classes)}"
            )
        with about("model"):
            shape = (list(classes), image_size, list(widths), norm)
            translator = Translator(*shape, residual=residual, gated=gated)
            chosen = loss.choose_time(time)
        super().__init__(translator, optimizer, ema_decay, seed)
        self.prior, self.loss, self.time = prior, loss, chosen
        targets = {name: prompt.format(name) for name in classes}
        self.prompts = ["", prompt.format(source), *targets.values()]
        # Those that compete in R-Precision are the targets' and the source's, as in lmc evaluate.
        self.heldout_prompts = Prompts(targets, [*targets.values(), prompt.format(source)])
        self.source, self.validation = source, validation
        self.every_class, self.patches = every_class, patches
        self.l2_rescale, self.l2_size = l2_rescale, l2_size
        self.score_weight, self.l2_weight = score_weight, l2_weight
        self.compile_network = compile

    @property
    def translator(self) -> Translator:
        """The network being trained."""
        assert isinstance(self.network, Translator)
        return self.network

    @property
    def image_size(self) -> int:
        """The translator's."""
        return self.translator.image_size

    @property
    def best_of(self) -> str:
        """See `TrainingModule`."""
        return f"{self.validation.clip}, {self.validation.images} images"

    @property
    def heldout_images(self) -> int:
        """See `TrainingModule`."""
        return self.validation.images

    def check(self, data: Any) -> None:
        """See `TrainingModule`.

        Raises:
            ValueError: a negative weight; patches larger than the images; l2_rescale where the
                loss is not rescaled; an l2_size that the images cannot be averaged to;
                model.image_size is not data.image_size; or the loss refuses
                the prior.
            OSError: model.validation.clip is the path of no folder, or of one without a CLIP.
            OSError, ValueError: model.validation.truth lacks a true counterpart.
        """
        for name in ("score_weight", "l2_weight"):
            for part, value in vars(getattr(self, name)).items():
                require(0 <= value < math.inf, f"model.{name}.{part}", "at least 0", value)
        if self.patches is not None:
            self.patches.sides(self.image_size, self.prior.image_size)
        if self.l2_rescale and not self.loss.rescale:
            raise ValueError(
                "model.l2_rescale divides L2 by the guidance scale as well: set the loss's own "
                "option rescale to true, or leave out model.l2_rescale"
            )
        if self.l2_size is not None and not (
            1 <= self.l2_size <= self.image_size and self.image_size % self.l2_size == 0
        ):
            raise ValueError(
                f"model.l2_size must divide model.image_size {self.image_size}, got {self.l2_size}"
            )
        if data.image_size not in (None, self.image_size):
            raise ValueError(
                f"model.image_size {self.image_size} and data.image_size {data.image_size} differ: "
                "set the first to the side of the shards' images, and leave out the other"
            )
        clip = self.validation.clip
        folder = Path(clip) if clip is not None else None
        if folder is not None and not (folder / "config.json").exists():
            if folder.is_dir():
                raise FileNotFoundError(f"model.validation.clip {clip}: it has no config.json")
            if len(folder.parts) > 2 or folder.is_absolute():  # or it may be a hub id
                raise FileNotFoundError(f"model.validation.clip {clip}: no such folder")
        classes = self.heldout_prompts.classes
        load_truth(self.validation, classes, self.image_size, data.looked_at)
        if leads():
            with about("model.loss"):
                self.loss.check(self.prior)

    def prepare_data(self) -> None:
        """Embed the prompts into the cache, on one process a node."""
        self.embed()

    def embed(self) -> Embedding:
        """Of the empty prompt, the source's, each target's, then of what the loss asks besides.

        Raises:
            ValueError: the prior, a class-conditional one, does not know a prompt.
        """
        return embed_prompts(self.prior, self.prompts, [self.loss], self.prompts[2:])

    def setup(self, stage: str) -> None:
        """Load what measures, the prior and the loss, and the prompts' embeddings.

        Raises:
            ValueError: see the loss's `check`.
            OSError, ValueError: see `load_tools`.
        """
        if hasattr(self.loss, "corrector"):  # which asks for it
            self.share_identity()
        device = self.trainer.strategy.root_device
        classes = self.heldout_prompts.classes
        self.tools = load_tools(self.validation, self.image_size, device, classes)
        if self.trainer.is_global_zero:
            for line in self.tools.left_out:
                print(line, flush=True)
        self.embedding = self.embed().to(device)
        self.loss.prepare(self.prior, device)
        compile_in_place(self.network, self.compile_network)
        if isinstance(corrector := getattr(self.loss, "corrector", None), BiasCorrector):
            compile_in_place(corrector, self.compile_network)
        self.prior.to(device)

    def training_step(self, batch: ImageBatch, batch_idx: int) -> Tensor:
        """The weighted sum of the surrogate and L2."""
        generator, image, keys = self.generator(), batch.image, batch.key
        classes = len(self.translator.classes)
        repeats = classes if self.every_class else 1
        image = image.repeat_interleave(repeats, 0)
        keys = [key for key in keys for _ in range(repeats)]
        if self.every_class:
            class_id = torch.arange(classes, device=self.device).repeat(len(batch.image))
        else:
            class_id = torch.randint(
                classes, (len(image),), generator=generator, device=self.device
            )
        output = self.network(image, class_id).float()
        windows = self.windows(len(batch.image), repeats, generator)
        z = self.view(output, windows)
        # t is drawn on the host, which then knows it: nothing waits for the device. On a CPU it is
        # one stream with the rest.
        host = generator
        if generator.device.type != "cpu":
            host = torch.Generator().manual_seed(generator.initial_seed() ^ TIMES)
        t, eps, t_host = self.draw(z.detach()[::repeats], generator, host, repeats)
        z_source = None
        if self.loss.needs_source:
            with torch.no_grad():
                z_source = self.view(image, windows)
        self.batches_done += 1
        zeros = torch.zeros_like(class_id)
        described = range(len(self.loss.suffixes))
        inputs = LossInputs(
            z.detach(),
            t,
            eps,
            null=self.embedding[zeros],
            target=self.embedding[2 + class_id],
            z_source=z_source,
            source=self.embedding[1 + zeros],
            negative=self.embedding[-1 + zeros],  # of no meaning to a loss without one
            eps_fixed=self.fixed_noise(z) if self.loss.fixed_noise else None,
            t_host=t_host,
            repeats=repeats,
            described=[self.embedding[2 + (1 + i) * classes + class_id] for i in described],
            progress=self.progress,
        )
        # In float32, the corrector too: b(z, t) - z_hat is a small difference.
        with torch.autocast(z.device.type, enabled=False):
            gradient = self.loss(self.prior, inputs)
            for _ in range(self.loss.updates if self.loss.learns else 0):
                again = self.draw(z.detach()[::repeats], generator, host, repeats)
                t_again, eps_again, on_host = again
                drawn = replace(inputs, t=t_again, eps=eps_again, t_host=on_host)
                self.loss.learn(self.prior, drawn)
        self.watch(gradient.total, t, keys, self.loss.name)
        score = surrogate(z, gradient.total).sum() / z.numel()
        l2 = l2_to(image, output, self.l2_size)
        step = self.global_step
        score_weight, l2_weight = self.score_weight(step), self.l2_weight(step)
        if self.l2_rescale:
            l2_weight /= self.loss.guidance_scale
        self.log("train/l2", l2)
        if self.logs_now():
            weights = {"train/score_weight": score_weight, "train/l2_weight": l2_weight}
            self.log_now(weights)
        rms = gradient.total.square().mean((1, 2, 3)).sqrt()
        # The surrogate's value means nothing: what falls, or does not, is the gradient's size.
        self.log("train/loss", rms.mean())
        for name, term in gradient.terms.items():
            self.log_by_time(f"gradient_{name}", term.square().mean((1, 2, 3)).sqrt(), t)
        return score_weight * score + l2_weight * l2

    @property
    def progress(self) -> float:
        """The share of the run that is done."""
        return self.global_step / max(1, self.trainer.max_steps)

    def windows(self, count: int, repeats: int, generator: torch.Generator) -> list[Window] | None:
        """What the loss sees of `count` images, each `repeats` times; None: all of them, whole."""
        if self.patches is None or self.global_step < self.patches.from_step:
            return None
        # Of the step's seed, but on the CPU, where the numbers are needed: nothing waits for them,
        # and they are the same on every device. There only a seed's lower 32 bits matter.
        own = torch.Generator().manual_seed(generator.initial_seed() ^ WINDOWS)
        drawn = self.patches.draw(count, self.image_size, self.prior.image_size, own)
        return [window for window in drawn for _ in range(repeats)]

    def view(self, image: Tensor, windows: list[Window] | None) -> Tensor:
        """z of images (B, 3, S, S), or of a part of each: float32 (B, C, H, W) of the prior."""
        size = self.prior.image_size
        if windows is None:
            return self.prior.encode(resize(image, size)).float()
        return self.prior.encode(crop(image, range(len(image)), windows, size)).float()

    def draw(
        self, z: Tensor, generator: torch.Generator, host: torch.Generator, repeats: int
    ) -> tuple[Tensor, Tensor, list[float]]:
        """t, eps and t on the host for each of z (B, C, H, W), each `repeats` times.

        Args:
            generator: of eps, on the device of z.
            host: of t, on the CPU.
        """
        t = self.time.draw(len(z), self.progress, host, z.dtype).repeat_interleave(repeats, 0)
        eps = torch.randn(z.shape, generator=generator, device=z.device, dtype=z.dtype)
        return to_device(t, z.device), eps.repeat_interleave(repeats, 0), t.tolist()

    def fixed_noise(self, z: Tensor) -> Tensor:
        """One noise for all images, steps and processes, as z; follows from the seed alone."""
        generator = torch.Generator(self.device).manual_seed(self.seed)
        eps = torch.randn(z.shape[1:], generator=generator, device=z.device, dtype=z.dtype)
        return eps.expand_as(z)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """What the loss has learned goes with the run."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["loss"] = {"name": self.loss.name, "state": self.loss.state_dict()}

    def identities(self) -> dict[str, dict[str, Any]]:
        """See `TrainingModule`; with the digest of the loss's corrector, where it has one."""
        corrector = getattr(self.loss, "corrector", None)
        if not isinstance(corrector, BiasCorrector):
            return super().identities()
        return {**super().identities(), CORRECTOR: {"digest": corrector.digest()}}

    def check_checkpoint(self, checkpoint: Mapping[str, Any]) -> None:
        """See `TrainingModule`.

        Raises:
            ValueError: the run was begun with another loss; see also `TrainingModule`.
        """
        super().check_checkpoint(checkpoint)
        there = checkpoint.get("loss", {"name": self.loss.name})["name"]
        if there != self.loss.name and not covers(self.allowed, "model.loss.class_path"):
            raise ValueError(
                f"the run was begun with the loss {there!r} and would go on with "
                f"{self.loss.name!r}: use another run folder"
            )

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Give the loss back what it had learned."""
        super().on_load_checkpoint(checkpoint)
        there = checkpoint.get("loss", {"name": self.loss.name, "state": {}})
        if there["name"] == self.loss.name:
            self.loss.load_state_dict(there["state"])

    def on_validation_epoch_start(self) -> None:
        """Start the held-out figures afresh."""
        self.check_finite()  # its error says more than that of an output which is not finite
        self.heldout = Heldout(self.tools, self.heldout_prompts, self.validation.pictures)

    def validation_step(self, batch: ImageBatch, batch_idx: int) -> None:
        """Held-out images to every class, by the averaged weights; measured as by lmc evaluate."""
        averaged: Any = self.averaged
        with torch.autocast(self.device.type, enabled=False):
            self.heldout.add(averaged, batch)

    def on_validation_epoch_end(self) -> None:
        """Log what was measured over all processes, and show some of the outputs."""
        for name, value in self.heldout.measures().items():
            self.log(f"heldout/{name}", value, sync_dist=True)  # equal on all already
        rows = self.heldout.rows(self.source)
        if self.trainer.is_global_zero:
            sheet = labelled_grid({f"step {self.global_step}": rows})
            show(self, "source, then a row a class", "step", sheet)
