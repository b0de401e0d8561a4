"""`lmc synthesize` and `lmc edit`: one image under any loss. A list of edits: `edits`."""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from lmc.configs import parse_seeds
from lmc.device import choose_device
from lmc.errors import about, require
from lmc.files import write_json, write_text
from lmc.losses import ScoreDistillation
from lmc.one_image.job import (
    RECORD,
    RESULTS,
    STATE,
    Job,
    check_out,
    read_image,
    save_image,
    save_whole,
)
from lmc.one_image.kept import Kept
from lmc.optimize import Editing, Optimization, Synthesis
from lmc.priors import Prior
from lmc.progress import Progress
from lmc.renderers.named import Optimised, Start, check_renderer, pixels
from lmc.renderers.pixels import Latents
from lmc.renderers.protocol import Renderer, SavedRenderer
from lmc.renderers.svg import SVG
from lmc.schedule import TimeSchedule

THUMBNAIL = 192  # longest side in pixels of a snapshot on the contact sheet
PREVIEW = "preview.png"
Make = Callable[[Start], Optimised]


def synthesize(
    *,
    record: str,
    prior: Prior,
    loss: ScoreDistillation,
    prompt: str,
    out: Path,
    seeds: list[int] | int | str = 0,
    size: int = 512,
    settings: Synthesis = Synthesis(),  # noqa: B008
    time: TimeSchedule | None = None,
    renderer: Callable[[Start], Optimised] = pixels,
    snapshot_every: int = 50,
    save_every: int = 100,
    device: str = "auto",
) -> None:
    """Optimise images from 50 % grey, or whatever renders images, towards a prompt.

    Writes a PNG a seed, what the renderer has besides (an SVG, a scene), the progression as a
    contact sheet and a GIF, results.json and the settings into OUT. With several seeds, says how
    far the others' images are from the first's.

    Args:
        record: the options as YAML, kept beside the result.
        prior: the diffusion model, by class_path and init_args.
        loss: a class of lmc.losses, or another by its import path; any option of it by its name.
        prompt: what to make.
        out: folder to write; the same command again goes on where it was stopped, or does it again;
            another result is refused.
        seeds: an image each, with commas; pixels and latents in one batch.
        size: side of the images in pixels.
        settings: the defaults are the paper's.
        time: how t is drawn; the default is the loss's own way.
        renderer: what is optimised: pixels, latents, svg, scene, or another by its import path (an
            `lmc.renderers.named.Optimised`); any option of it by its name.
        snapshot_every: steps from one picture of the progression, and preview.png, to the next.
        save_every: steps from one state that a stopped run goes on from to the next.
        device: cpu, cuda, …; default the GPU where there is one.

    Raises:
        OSError, ValueError: a file or option is not what it must be; nothing is loaded then.
    """
    numbers = parse_seeds(seeds)
    if size < 8:
        raise ValueError(f"size must be at least 8 pixels, got {size}")
    job = Job(prior, loss, [prompt] * len(numbers), numbers, settings, None, None)
    start = Start(prior, numbers, (size, size))
    _Command(record, out, start, job, time, renderer, snapshot_every, save_every, device).run()


def edit(
    *,
    record: str,
    prior: Prior,
    loss: ScoreDistillation,
    image: Path,
    prompt: str,
    out: Path,
    source_prompt: str | None = None,
    seeds: list[int] | int | str = 0,
    size: int | None = None,
    settings: Editing = Editing(),  # noqa: B008
    time: TimeSchedule | None = None,
    renderer: Callable[[Start], Optimised] = pixels,
    snapshot_every: int = 50,
    save_every: int = 100,
    device: str = "auto",
) -> None:
    """Optimise an image, beginning with a photo or an SVG, towards a prompt. Many: lmc edits.

    Writes what lmc synthesize writes.

    Args:
        record: the options as YAML, kept beside the result.
        prior: the diffusion model, by class_path and init_args.
        loss: a class of lmc.losses, or another by its import path; any option of it by its name.
        image: the photo's file; or an SVG, also as --renderer svg.
        prompt: of the result.
        out: folder to write; the same command again goes on where it was stopped, or does it again;
            another result is refused.
        source_prompt: of the photo, for losses that compare with it (dds, pds).
        seeds: a result each, with commas; pixels and latents in one batch.
        size: shorter side in pixels to which the photo is resized; the default leaves it, and is
            the prior's size for an SVG.
        settings: the defaults are the paper's.
        time: how t is drawn; the default is the loss's own way.
        renderer: what is optimised: pixels, latents, svg, scene, or another by its import path (an
            `lmc.renderers.named.Optimised`); any option of it by its name.
        snapshot_every: steps from one picture of the progression, and preview.png, to the next.
        save_every: steps from one state that a stopped run goes on from to the next.
        device: cpu, cuda, …; default the GPU where there is one.

    Raises:
        OSError, ValueError: a file or option is not what it must be; nothing is loaded then.
    """
    numbers = parse_seeds(seeds)
    source = _read(image, size, prior.image_size)
    source = source.expand(len(numbers), -1, -1, -1).contiguous()
    prompts = None if source_prompt is None else [source_prompt] * len(numbers)
    job = Job(prior, loss, [prompt] * len(numbers), numbers, settings, source, prompts)
    start = Start(prior, numbers, (source.shape[-2], source.shape[-1]), source, image)
    _Command(record, out, start, job, time, renderer, snapshot_every, save_every, device).run()


@torch.no_grad()
def _read(image: Path, size: int | None, default: int) -> Tensor:
    """A picture, or the raster of an SVG, (1, 3, H, W) in [-1, 1].

    Args:
        image: the file.
        size: of the shorter side.
        default: of that of an SVG.
    """
    if size is not None and size < 8:
        raise ValueError(f"size must be at least 8 pixels, got {size}")
    if image.suffix.lower() == ".svg":
        if not image.is_file():
            raise FileNotFoundError(f"no such image: {image}")
        *_, width, height = SVG.read(image, 1).viewbox
        factor = (size or default) / min(width, height)
        return SVG.read(image, (round(height * factor), round(width * factor)))()
    source = read_image(image)[None]
    return source if size is None else _scale(source, size / min(source.shape[-2:]))


class _Command:
    """One command: its runs, one after the other, and what it writes.

    A run is of one seed, or of all where the renderer is `batched`.
    """

    def __init__(
        self,
        record: str,
        out: Path,
        start: Start,
        job: Job,
        time: TimeSchedule | None,
        make: Make,
        snapshot_every: int,
        save_every: int,
        device: str,
    ) -> None:
        require(snapshot_every >= 1, "snapshot_every", "at least 1", snapshot_every)
        require(save_every >= 1, "save_every", "at least 1", save_every)
        self.record, self.out, self.start, self.job, self.time = record, out, start, job, time
        self.make, self.snapshot_every, self.save_every = make, snapshot_every, save_every
        self.device = choose_device(device)
        self.runs = [range(i, i + 1) for i in range(len(job.seeds))]
        if self._renderer(self.runs[0]).batched:
            self.runs = [range(len(job.seeds))]
        run = self._run(0)  # what can be known before anything is loaded
        check_out(out, record)
        self.kept = Kept(out / STATE, job, start.image, self.device)
        run.embed()

    def run(self) -> None:
        """Do what is left of it, and write the result."""
        kept, out, steps = self.kept, self.out, self.job.settings.steps
        write_text(out / RECORD, self.record)
        done = len(kept.images) * steps + (kept.optimization or {"done": 0})["done"]
        with Progress("optimising", len(self.runs) * steps, done=done) as progress:
            first = self._share(done)
            for number in range(len(kept.images), len(self.runs)):
                self._one(number, progress, first)
            kept.seconds += progress.seconds()
        images = torch.cat(kept.images)
        together = [torch.cat(each) for each in zip(*map(dict.values, kept.snapshots), strict=True)]
        _write_progression(out, self.job.seeds, dict(zip(kept.snapshots[0], together, strict=True)))
        results: dict[str, Any] = {"seconds": round(kept.seconds, 1)}
        if len(images) > 1:
            results["diversity"] = diversity(images)
            print("mean distance ({name}) of {runs} runs to the first: {mean:.3f} ± {deviation:.3f}"
                  .format(**results["diversity"]))  # fmt: skip
        write_json(out / RESULTS, results)
        (out / PREVIEW).unlink(missing_ok=True)
        kept.remove()
        print(f"{len(images)} images in {out}, {timedelta(seconds=round(kept.seconds))}")

    def _one(self, number: int, progress: Progress, first: float) -> None:
        """A run, from where it was stopped, and its own files; `first` is `_share` of the start."""
        kept, steps = self.kept, self.job.settings.steps
        run = self._run(number)
        if kept.optimization is None:
            kept.snapshots.append({0: _thumbnail(_begins_with(run.renderer))})
        else:
            run.load_state_dict(kept.optimization)
            kept.optimization = None

        def watch(done: int) -> None:
            if done % self.snapshot_every == 0 and done < steps:
                with torch.no_grad():
                    kept.snapshots[-1][done] = _thumbnail(run.renderer())
                _write_preview(self.out, kept.snapshots[-1][done])
            if done % self.save_every == 0 and done < steps:
                kept.write(run.state_dict(), kept.seconds + progress.seconds())
            share = (self._share(number * steps + done) - first) / (1 - first)
            progress.update(number * steps + done, share=share)

        images = run.run(watch).float().cpu().clamp(-1, 1)
        stems = [f"seed-{self.job.seeds[row]}" for row in self.runs[number]]
        for stem, picture in zip(stems, images, strict=True):
            save_image(picture, self.out / f"{stem}.png")
        if isinstance(run.renderer, SavedRenderer):
            run.renderer.save(self.out, stems)
        kept.images.append(images)
        kept.snapshots[-1][steps] = _thumbnail(images)
        if number + 1 < len(self.runs):
            kept.write(None, kept.seconds + progress.seconds())

    def _share(self, done: int) -> float:
        """The share of all work that is done after so many steps, of all runs."""
        settings = self.job.settings
        number, step = divmod(done, settings.steps)
        # Patches of an image take more of the loss than the whole.
        return (number + settings.parts(step) / settings.parts(settings.steps)) / len(self.runs)

    def _run(self, number: int) -> Optimization:
        rows, job = self.runs[number], self.job
        loss = job.loss
        if loss.learns and len(self.runs) > 1:  # what it learned of other seeds is not for these
            loss = copy.deepcopy(loss)
        part = Job(
            job.prior,
            loss,
            [job.prompts[row] for row in rows],
            [job.seeds[row] for row in rows],
            job.settings,
            None if job.source is None else job.source[rows],
            job.source_prompts and [job.source_prompts[row] for row in rows],
        )
        return Optimization(
            self._renderer(rows), **part.arguments(), time=self.time, device=self.device
        )

    def _renderer(self, rows: range) -> Optimised:
        """A new one of some of the seeds, by number."""
        image = None if self.start.image is None else self.start.image[rows]
        seeds = [self.job.seeds[row] for row in rows]
        with about("renderer"):
            try:
                renderer = self.make(replace(self.start, seeds=seeds, image=image))
            except TypeError as error:
                if "positional argument" not in str(error):
                    raise
                raise ValueError(f"{error}: it must take a Start first") from error
            check_renderer(renderer, len(rows))
        return renderer


def _begins_with(renderer: Renderer) -> Tensor:
    """The images that it renders before it is loaded."""
    with torch.no_grad():
        return renderer.image if isinstance(renderer, Latents) else renderer()


@torch.no_grad()
def diversity(images: Tensor) -> dict[str, Any]:
    """How far images (B, 3, H, W) are from the first, with the main one of the distances.

    Returns:
        name of the distance, runs (B − 1), mean, and deviation (of the runs, not of the mean).
    """
    from lmc.measure.metrics import distances

    name, measure = next(iter(distances(min(images.shape[-2:])).items()))
    values = measure(images[1:], images[:1].expand_as(images[1:]).contiguous())
    deviation = values.std(correction=0).item()
    return {
        "name": name,
        "runs": len(values),
        "mean": values.mean().item(),
        "deviation": deviation,
    }


def _write_progression(out: Path, seeds: Sequence[int], snapshots: Mapping[int, Tensor]) -> None:
    """progression.png, a row a seed and a column a snapshot; progression.gif."""
    from lmc.measure.figures import grid, labelled_grid

    columns = torch.stack(list(snapshots.values()), 1)
    steps = ", ".join(map(str, snapshots))
    rows = {f"seed {seed}": row for seed, row in zip(seeds, columns, strict=True)}
    save_whole(out / "progression.png", labelled_grid({f"after steps {steps}": rows}).save, "png")
    frames = [
        Image.fromarray((grid(each) * 255).round().byte().permute(1, 2, 0).numpy())
        for each in snapshots.values()
    ]
    save_whole(
        out / "progression.gif",
        frames[0].save,
        "gif",
        save_all=True,
        append_images=frames[1:],
        duration=[250] * (len(frames) - 1) + [2000],
        loop=0,
    )


def _write_preview(out: Path, thumbnails: Tensor) -> None:
    """preview.png, of how far it is."""
    from lmc.measure.figures import grid

    picture = Image.fromarray((grid(thumbnails) * 255).round().byte().permute(1, 2, 0).numpy())
    save_whole(out / PREVIEW, picture.save, "png")


def _thumbnail(images: Tensor) -> Tensor:
    """(B, 3, H, W) on the CPU, clipped to [-1, 1], no side longer than THUMBNAIL."""
    images = images.detach().float().cpu().clamp(-1, 1)
    longest = max(images.shape[-2:])
    return images.clone() if longest <= THUMBNAIL else _scale(images, THUMBNAIL / longest)


def _scale(image: Tensor, factor: float) -> Tensor:
    size = [round(side * factor) for side in image.shape[-2:]]
    return F.interpolate(image, size, mode="bilinear", antialias=True)
