"""One image as the parameters: score distillation moves it straight [LMC, Sec. 5.1].

Synthesis starts from grey, editing from a photo; first the whole image at the prior's size, then
random patches of any size. What is moved is anything that renders images (`Renderer`).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lmc.device import to_device
from lmc.losses import LossInputs, ScoreDistillation, embed_prompts, surrogate
from lmc.patches import Window, crop, draw_window, sides
from lmc.priors import Prior
from lmc.renderers.adam import ScheduledAdam
from lmc.renderers.pixels import Latents as Latents
from lmc.renderers.pixels import Pixels as Pixels
from lmc.renderers.pixels import grey as grey
from lmc.renderers.protocol import GroupedRenderer, Renderer, ViewRenderer
from lmc.schedule import TimeSchedule

CHECKED = 20  # steps between two looks whether gradients were finite: each waits for the device


@dataclass(frozen=True)
class Synthesis:
    """How an image is optimised; the defaults are the paper's for synthesis [LMC, App. A].

    Attributes:
        steps: of Adam.
        whole_steps: the first of them, in which the loss sees the whole image, resized to the
            prior's size; of an image that is not square, its centred square. More than `steps`
            are all of them.
        patches: random patches a step after that.
        patch_range: smallest and largest side of a patch, which is resized to the prior's size;
            None: from the prior's image_size, or the image's shorter side if that is less, to the
            image's shorter side.
        lr: Adam's learning rate.
        lr_end: the share of it that is left at the end.
        decay_steps: the last steps, over which the rate falls, along half a cosine. More than
            `steps` are all of them.
        l2_weight: of ‖image − source‖².

    Raises:
        ValueError: a setting out of its range.
    """

    steps: int = 500
    whole_steps: int = 150
    patches: int = 2
    patch_range: tuple[int, int] | None = None
    lr: float = 0.1
    lr_end: float = 0.03
    decay_steps: int = 300
    l2_weight: float = 0.0

    def __post_init__(self) -> None:
        for name, least in (("steps", 1), ("whole_steps", 0), ("decay_steps", 0), ("patches", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        for name in ("whole_steps", "decay_steps"):
            object.__setattr__(self, name, min(getattr(self, name), self.steps))  # frozen
        if self.lr <= 0 or self.lr_end < 0 or self.l2_weight < 0:
            raise ValueError(
                f"lr must be above 0, lr_end and l2_weight not negative, got {self.lr}, "
                f"{self.lr_end}, {self.l2_weight}"
            )
        if self.patch_range is not None and not 1 <= self.patch_range[0] <= self.patch_range[1]:
            raise ValueError(f"patch_range must be [least, most], got {list(self.patch_range)}")

    def learning_rate(self, step: int) -> float:
        """Adam's at `step`, counted from 0."""
        if not self.decay_steps:
            return self.lr
        done = max(0.0, (step - (self.steps - self.decay_steps)) / self.decay_steps)
        return self.lr * (self.lr_end + (1 - self.lr_end) * (1 + math.cos(math.pi * done)) / 2)

    def parts(self, steps: int) -> int:
        """How many parts of an image, the whole or patches, the loss sees in the first `steps`."""
        return steps + (self.patches - 1) * max(0, steps - self.whole_steps)

    def sides(self, height: int, width: int, image_size: int) -> tuple[int, int]:
        """Smallest and largest side of a patch of a height x width image.

        Args:
            image_size: the prior's.

        Raises:
            ValueError: patch_range asks for patches larger than the image.
        """
        return sides(self.patch_range, height, width, image_size, "patch_range")


@dataclass(frozen=True)
class Editing(Synthesis):
    """The paper's settings for editing a photo; the attributes are those of `Synthesis`."""

    whole_steps: int = 200
    lr: float = 0.02
    lr_end: float = 0.8
    decay_steps: int = 500
    l2_weight: float = 0.1


@dataclass(frozen=True)
class Comparison(Editing):
    """Of editing, in the paper's numerical comparison; the attributes are those of `Synthesis`.

    The guidance is not rescaled by 1/ω there (`ScoreDistillation.rescale`).
    """

    lr: float = 5e-3
    l2_weight: float = 0.0


def optimize(
    renderer: Renderer,
    prior: Prior,
    loss: ScoreDistillation,
    prompts: Sequence[str],
    seeds: Sequence[int],
    settings: Synthesis = Synthesis(),
    source: Tensor | None = None,
    source_prompts: Sequence[str] | None = None,
    time: TimeSchedule | None = None,
    device: torch.device | str = "cpu",
    watch: Callable[[int], None] | None = None,
) -> Tensor:
    """Optimise B images at once, each towards its prompt with the randomness of its seed.

    A step minimises, summed over images and times the values of one image (so that the size of an
    image's gradient depends on no size or count),

        mean over z of the surrogate of `loss`'s gradient, over the patches too
        + l2_weight · mean over pixels of (image − source)²

    An image's patches, t and eps follow from its seed alone: it comes out as it would by itself, up
    to rounding. Not so where images share something: a `shared` time schedule has one t for all,
    drawn by the first seed, and a loss that `learns` learns from all. A `ViewRenderer` has one
    prompt and seed, its mean is over views, and its penalty is added; its embeddings, of the
    prompt with each suffix, are made once. Noise is drawn on the device,
    so that a seed is another picture on a GPU than on a CPU.

    Args:
        renderer: renders B images. It is moved to `device`, and its parameters are optimised.
        prior: is loaded here.
        loss: any; is prepared here.
        prompts: B targets.
        seeds: B numbers.
        settings: how long, how fast, how large.
        source: images to compare with, float (B, 3, H, W) in [-1, 1], for the L2 term and losses
            with `needs_source`, which get the same part of it.
        source_prompts: B, for losses with `needs_source`.
        time: how t is drawn; None is the loss's own way.
        device: where to compute.
        watch: called after every step with the number of steps done.

    Returns:
        The images, (B, 3, H, W), about [-1, 1].

    Raises:
        ValueError: the numbers of prompts, seeds and images differ; a source is missing, of
            another size or of a `ViewRenderer`; patches larger than the image; an unknown prompt of
            a class-conditional prior: all before any weights are loaded. Or see `loss.prepare`.
        FloatingPointError: a gradient was not finite, in one of the last `CHECKED` steps; names the
            step, the loss, t and the seed.
    """
    run = Optimization(
        renderer, prior, loss, prompts, seeds, settings, source, source_prompts, time, device
    )
    return run.run(watch)


class Optimization:
    """What `optimize` does, for who wants to stop it, keep it and go on with it.

        run = Optimization(renderer, prior, loss, ["a cat"], [0])
        run.run(watch=lambda done: torch.save(run.state_dict(), "state.pt"))

    Of the same arguments, one that goes on from a `state_dict` ends as one that was never stopped:
    on a CPU bit by bit.

    Args:
        renderer, prior, loss, prompts, seeds, settings, source, source_prompts, time, device: see
            `optimize`.

    Attributes:
        done: steps so far.

    Raises:
        ValueError: see `optimize`; nothing is loaded for it.
    """

    def __init__(
        self,
        renderer: Renderer,
        prior: Prior,
        loss: ScoreDistillation,
        prompts: Sequence[str],
        seeds: Sequence[int],
        settings: Synthesis = Synthesis(),
        source: Tensor | None = None,
        source_prompts: Sequence[str] | None = None,
        time: TimeSchedule | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self.renderer, self.prior, self.loss = renderer, prior, loss
        self.seeds, self.settings, self.device = seeds, settings, device
        self._task = _Task(renderer, prior, loss, prompts, seeds, settings, source, source_prompts)
        self._time = loss.choose_time(time)
        self._adam = ScheduledAdam(partial(_groups, renderer, settings))
        self._finite = _Finite(loss.name)
        self.done, self._loaded = 0, False

    def embed(self) -> None:
        """Embed the prompts, which `load` would, before anything else is loaded.

        Raises:
            ValueError: an unknown prompt of a class-conditional prior.
        """
        self._task.embed()

    def load(self) -> None:
        """Load the prior and the loss, once; `run` and `load_state_dict` do."""
        if self._loaded:
            return
        self._task.load(self.device)
        self._hosts, self._devices = self._task.generators(self.seeds)
        self._eps_fixed = self._task.noise(self._devices) if self.loss.fixed_noise else None
        self._loaded = True

    def run(self, watch: Callable[[int], None] | None = None) -> Tensor:
        """All steps that are left.

        Args:
            watch: called after each with the number of steps done.

        Returns:
            The images, (B, 3, H, W), about [-1, 1].

        Raises:
            FloatingPointError: see `optimize`.
        """
        self.load()
        while self.done < self.settings.steps:
            self._step(self.done)
            self.done += 1
            if watch is not None:
                watch(self.done)
        with torch.no_grad():
            return self.renderer().detach().clone()

    def state_dict(self) -> dict[str, Any]:
        """All that `load_state_dict` needs to go on: plain types and tensors.

        The tensors are those in use: save or copy them before the next step.

        Raises:
            FloatingPointError: see `optimize`: what is not finite is no state to go on from.
        """
        self.load()
        self._finite.check()
        return {
            "done": self.done,
            "renderer": self.renderer.state_dict(),
            "adam": self._adam.state_dict(self.done),
            "loss": self.loss.state_dict(),
            "hosts": [generator.get_state() for generator in self._hosts],
            "devices": [generator.get_state() for generator in self._devices],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from another's `state_dict`, of the same arguments.

        Raises:
            ValueError: it is of another renderer or loss.
        """
        self.load()
        try:
            self.renderer.load_state_dict(state["renderer"])
            self._adam.load_state_dict(state["adam"], state["done"])
        except (LookupError, RuntimeError) as error:
            raise ValueError(f"the state is of another renderer: {error}") from error
        self.loss.load_state_dict(state["loss"])
        for name, generators in (("hosts", self._hosts), ("devices", self._devices)):
            for generator, kept in zip(generators, state[name], strict=True):
                generator.set_state(kept)
        self.done = state["done"]

    def _step(self, step: int) -> None:
        renderer, task, settings, loss = self.renderer, self._task, self.settings, self.loss
        hosts, devices, eps_fixed = self._hosts, self._devices, self._eps_fixed
        seen = None
        if isinstance(renderer, ViewRenderer):
            seen = renderer.see(step, settings.steps, hosts[0])
            image: Tensor | None = seen.image
            numbers, windows = [0] * len(seen.image), [task.centre(seen.image)] * len(seen.image)
        else:
            image = None if isinstance(renderer, Latents) else renderer()
            numbers, windows = task.windows(step, hosts)
        z, z_source = task.view(image, range(len(numbers)) if seen else numbers, windows)
        rows = to_device(torch.tensor(numbers), z.device)
        prompt = to_device(torch.tensor(seen.suffix), z.device) if seen else rows

        def draw() -> Any:
            t = _draw_t(self._time, [hosts[row] for row in numbers], step / settings.steps, z.dtype)
            eps = task.noise([devices[row] for row in numbers])
            return {"t": to_device(t, z.device), "eps": eps, "t_host": t.tolist()}

        inputs = LossInputs(
            z.detach(),
            **draw(),
            null=task.embedding[torch.zeros_like(rows)],
            target=task.embedding[1 + prompt],
            z_source=z_source,
            source=task.embedding[1 + len(self.seeds) + rows] if loss.needs_source else None,
            negative=task.embedding[torch.full_like(rows, -1)],  # only some losses have one
            eps_fixed=eps_fixed[rows] if eps_fixed is not None else None,
            described=[
                task.embedding[len(task.prompts) + i * len(task.targets) + prompt]
                for i in range(len(loss.suffixes))
            ],
            progress=step / settings.steps,
        )
        gradient = loss(self.prior, inputs).total
        self._finite.note(gradient, step, inputs.times(), [self.seeds[row] for row in numbers])
        if (step + 1) % CHECKED == 0 or step + 1 == settings.steps:
            self._finite.check()
        for _ in range(loss.updates if loss.learns else 0):
            loss.learn(self.prior, replace(inputs, **draw()))
        whole = z if image is None else image
        score = surrogate(z, gradient).sum() / (len(rows) / len(self.seeds)) / z[0].numel()
        objective = whole[0].numel() * score
        if settings.l2_weight:
            objective = objective + settings.l2_weight * task.l2(whole)
        if seen is not None:
            objective = objective + seen.penalty
        self._adam.down(objective, step)
        if isinstance(renderer, GroupedRenderer):
            self._adam.forget(renderer.after(step, settings.steps, hosts[0]))


def check_task(
    renderer: Renderer,
    prior: Prior,
    loss: ScoreDistillation,
    prompts: Sequence[str],
    seeds: Sequence[int],
    settings: Synthesis,
    source: Tensor | None = None,
    source_prompts: Sequence[str] | None = None,
) -> None:
    """Raise what `optimize` would before it loads anything; the arguments are its."""
    _Task(renderer, prior, loss, prompts, seeds, settings, source, source_prompts)


def _groups(renderer: Renderer, settings: Synthesis, step: int) -> list[dict[str, Any]]:
    """Adam's parameter groups at `step`: the renderer's own where it has some."""
    if isinstance(renderer, GroupedRenderer):
        return renderer.groups(step, settings.steps)
    return [{"params": renderer.parameters(), "lr": settings.learning_rate(step)}]


class _Task:
    """What `optimize` is given, checked, and what follows from it."""

    def __init__(
        self,
        renderer: Renderer,
        prior: Prior,
        loss: ScoreDistillation,
        prompts: Sequence[str],
        seeds: Sequence[int],
        settings: Synthesis,
        source: Tensor | None,
        source_prompts: Sequence[str] | None,
    ) -> None:
        self.renderer, self.prior, self.loss, self.settings = renderer, prior, loss, settings
        self.prompts, self.source = ["", *prompts], source
        self.z_source: Tensor | None = None  # for latents
        self.embedded = False
        if isinstance(renderer, Latents):
            shape: Sequence[int] = renderer.image.shape
            settings = self.settings = replace(settings, whole_steps=settings.steps)
        elif isinstance(renderer, ViewRenderer):
            shape = (1, 3, prior.image_size, prior.image_size)
            settings = self.settings = replace(settings, whole_steps=settings.steps)
            if source is not None or loss.needs_source or settings.l2_weight:
                what = f"the loss {loss.name!r}" if loss.needs_source else "a source or l2_weight"
                raise ValueError(f"{what} is of pictures: there is none of every view")
        else:
            with torch.no_grad():
                shape = renderer().shape
        self.count, _, self.height, self.width = shape
        if not len(prompts) == len(seeds) == self.count:
            raise ValueError(
                f"{len(prompts)} prompts and {len(seeds)} seeds for {self.count} images"
            )
        if (loss.needs_source or settings.l2_weight) and source is None:
            what = f"the loss {loss.name!r}" if loss.needs_source else "l2_weight"
            raise ValueError(f"{what} needs a source image")
        if source is not None and source.shape != torch.Size(shape):
            raise ValueError(
                f"source is {tuple(source.shape)}, the rendered images are {tuple(shape)}"
            )
        if loss.needs_source:
            if source_prompts is None or len(source_prompts) != self.count:
                raise ValueError(f"the loss {loss.name!r} needs a source prompt for each image")
            self.prompts += source_prompts
        self.given = self.targets = list(prompts)
        if isinstance(renderer, ViewRenderer):
            self.targets = [prompts[0] + suffix for suffix in renderer.suffixes]
            self.prompts[1:] = self.targets
        if settings.whole_steps < settings.steps:
            self.sides = settings.sides(self.height, self.width, prior.image_size)

    def embed(self) -> None:
        """Embed all prompts, once."""
        if self.embedded:
            return
        try:
            self.embedding = embed_prompts(self.prior, self.prompts, [self.loss], self.targets)
        except ValueError as error:
            if {*self.targets} == {*self.given}:
                raise
            self.prior.embed(self.given)  # where this is unknown, that is the error
            said = f"{error}; the renderer adds words to the prompt by view: set suffixes to false"
            raise ValueError(said) from error
        self.embedded = True

    def load(self, device: torch.device | str) -> None:
        """Load the prior and the loss; everything to `device`."""
        self.device = device
        self.embed()
        self.embedding = self.embedding.to(device)
        self.loss.prepare(self.prior, device)
        self.prior.to(device)
        self.renderer.to(device)
        if isinstance(self.renderer, Latents):
            self.renderer.encode()
        if self.source is not None:
            self.source = self.source.to(device)
        rows, windows = self.windows(0, [])
        with torch.no_grad():
            image = None if isinstance(self.renderer, Latents) else self.renderer()
            if isinstance(self.renderer, ViewRenderer) and image is not None:
                rows, windows = [0], [self.centre(image)]
            self.like = self.view(image, rows[:1], windows[:1])[0]
            if image is None and self.source is not None:
                self.z_source = self.prior.encode(self.source)

    def generators(
        self, seeds: Sequence[int]
    ) -> tuple[list[torch.Generator], list[torch.Generator]]:
        """One a seed for windows and t, which the host draws, and one for noise.

        On a CPU they are the same.
        """
        hosts = [torch.Generator().manual_seed(seed) for seed in seeds]
        if self.like.device.type == "cpu":
            return hosts, hosts
        return hosts, [torch.Generator(self.like.device).manual_seed(seed) for seed in seeds]

    def windows(
        self, step: int, generators: Sequence[torch.Generator]
    ) -> tuple[list[int], list[Window]]:
        """What the loss sees at `step`: N images by number, and the part of each."""
        if step < self.settings.whole_steps or not generators:
            centre = self.centre(torch.empty(self.height, self.width, device="meta"))
            return list(range(self.count)), [centre] * self.count
        patches = self.settings.patches
        return [row for row in range(self.count) for _ in range(patches)], [
            draw_window(generator, self.height, self.width, *self.sides)
            for generator in generators
            for _ in range(patches)
        ]

    @staticmethod
    def centre(image: Tensor) -> Window:
        """The centred square of images (…, H, W)."""
        height, width = image.shape[-2:]
        side = min(height, width)
        return (height - side) // 2, (width - side) // 2, side

    def view(
        self, image: Tensor | None, rows: Sequence[int], windows: Sequence[Window]
    ) -> tuple[Tensor, Tensor | None]:
        """z of parts of the images, and of the same parts of the sources, if there are any."""
        if image is None:
            assert isinstance(self.renderer, Latents)
            return self.renderer.z, self.z_source
        z = self._encode(image, rows, windows)
        if not self.loss.needs_source:
            return z, None
        assert self.source is not None
        with torch.no_grad():
            return z, self._encode(self.source, rows, windows)

    def _encode(self, image: Tensor, rows: Sequence[int], windows: Sequence[Window]) -> Tensor:
        return self.prior.encode(crop(image, rows, windows, self.prior.image_size))

    def l2(self, whole: Tensor) -> Tensor:
        """‖image − source‖² of whole images, or of their z where those are optimised."""
        there = self.z_source if isinstance(self.renderer, Latents) else self.source
        assert there is not None
        return (whole - there).square().sum()

    def noise(self, generators: Sequence[torch.Generator]) -> Tensor:
        """A z of noise from each generator."""
        like: Any = {"dtype": self.like.dtype, "device": self.like.device}
        shape = self.like.shape[1:]
        return torch.stack([torch.randn(shape, generator=each, **like) for each in generators])


def _draw_t(
    time: TimeSchedule,
    generators: Sequence[torch.Generator],
    progress: float,
    dtype: torch.dtype,
) -> Tensor:
    """A time for each generator, from it; one for all where the schedule says so."""
    if time.shared:
        return time.draw(len(generators), progress, generators[0], dtype)
    return torch.cat([time.draw(1, progress, generator, dtype) for generator in generators])


class _Finite:
    """Whether gradients were finite, without waiting for the device at every step."""

    def __init__(self, loss: str) -> None:
        self.loss = loss
        self.noted: list[Tensor] = []
        self.about: list[str] = []

    def note(self, gradient: Tensor, step: int, t: Sequence[float], seeds: Sequence[int]) -> None:
        """Remember of a step's gradients (N, …) which of them are finite."""
        self.noted.append(torch.isfinite(gradient).flatten(1).all(1))
        self.about += [
            f"step {step}: the gradient of the loss {self.loss!r} is not finite "
            f"(t = {at:.4f}, seed {seed})"
            for at, seed in zip(t, seeds, strict=True)
        ]

    def check(self) -> None:
        """Raise FloatingPointError for the first noted gradient that is not finite."""
        if not self.noted:
            return
        finite = torch.cat(self.noted).tolist()
        if not all(finite):
            raise FloatingPointError(self.about[finite.index(False)])
        self.noted, self.about = [], []
