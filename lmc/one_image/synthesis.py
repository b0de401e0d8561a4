"""`lmc synthesize` and `lmc edit`: one image under any loss. A list of edits: `edits`."""

from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from lmc.configs import parse_seeds
from lmc.device import choose_device
from lmc.files import write_json, write_text
from lmc.losses import ScoreDistillation
from lmc.one_image.job import (
    RECORD,
    RESULTS,
    Job,
    check_out,
    read_image,
    save_image,
    save_whole,
)
from lmc.optimize import (
    Editing,
    Latents,
    Pixels,
    Renderer,
    Synthesis,
    check_task,
    embed,
    grey,
    optimize,
)
from lmc.priors import Prior
from lmc.progress import Progress
from lmc.schedule import TimeSchedule

THUMBNAIL = 192  # longest side in pixels of a snapshot on the contact sheet
Parametrisation = Literal["pixels", "latents"]


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
    parametrisation: Parametrisation = "pixels",
    snapshot_every: int = 50,
    device: str = "auto",
) -> None:
    """Optimise images from 50 % grey towards a prompt.

    Writes a PNG a seed, the progression as a contact sheet and a GIF, results.json and the settings
    into OUT. With several seeds, says how far the others' images are from the first's.

    Args:
        record: the options as YAML, kept beside the result.
        prior: the diffusion model, by class_path and init_args.
        loss: a class of lmc.losses, or another by its import path; any option of it by its name.
        prompt: what to make.
        out: folder to write; the same command again does it again, another result is refused.
        seeds: an image each, with commas; all in one batch.
        size: side of the images in pixels.
        settings: the defaults are the paper's.
        time: how t is drawn; the default is the loss's own way.
        parametrisation: what is optimised; latents are of the prior's VAE, whole images only.
        snapshot_every: steps from one picture of the progression to the next.
        device: cpu, cuda, …; default the GPU where there is one.

    Raises:
        OSError, ValueError: a file or option is not what it must be; nothing is loaded then.
    """
    numbers = parse_seeds(seeds)
    if size < 8:
        raise ValueError(f"size must be at least 8 pixels, got {size}")
    start = grey(len(numbers), size)
    _optimise_one(
        record,
        out,
        start,
        Job(prior, loss, [prompt] * len(numbers), numbers, settings, None, None),
        time,
        parametrisation,
        snapshot_every,
        device,
    )


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
    parametrisation: Parametrisation = "pixels",
    snapshot_every: int = 50,
    device: str = "auto",
) -> None:
    """Optimise an image, beginning with a photo, towards a prompt. Many of them: lmc edits.

    Writes what lmc synthesize writes.

    Args:
        record: the options as YAML, kept beside the result.
        prior: the diffusion model, by class_path and init_args.
        loss: a class of lmc.losses, or another by its import path; any option of it by its name.
        image: the photo's file.
        prompt: of the result.
        out: folder to write; the same command again does it again, another result is refused.
        source_prompt: of the photo, for losses that compare with it (dds, pds).
        seeds: a result each, with commas; all in one batch.
        size: shorter side in pixels to which the photo is resized; the default leaves it.
        settings: the defaults are the paper's.
        time: how t is drawn; the default is the loss's own way.
        parametrisation: what is optimised; latents are of the prior's VAE, whole images only.
        snapshot_every: steps from one picture of the progression to the next.
        device: cpu, cuda, …; default the GPU where there is one.

    Raises:
        OSError, ValueError: a file or option is not what it must be; nothing is loaded then.
    """
    numbers = parse_seeds(seeds)
    source = read_image(image)[None]
    if size is not None:
        source = _resize_shorter(source, size)
    source = source.expand(len(numbers), -1, -1, -1).contiguous()
    prompts = None if source_prompt is None else [source_prompt] * len(numbers)
    _optimise_one(
        record,
        out,
        source,
        Job(prior, loss, [prompt] * len(numbers), numbers, settings, source, prompts),
        time,
        parametrisation,
        snapshot_every,
        device,
    )


def _optimise_one(
    record: str,
    out: Path,
    start: Tensor,
    job: Job,
    time: TimeSchedule | None,
    parametrisation: Parametrisation,
    snapshot_every: int,
    device: str,
) -> None:
    if snapshot_every < 1:
        raise ValueError(f"snapshot_every must be at least 1, got {snapshot_every}")
    device = choose_device(device)
    steps = job.settings.steps
    latent = parametrisation == "latents"
    if latent and not job.prior.latent:
        raise ValueError("parametrisation latents: the prior has none, its z are pixels")
    renderer: Renderer = Latents(job.prior, start) if latent else Pixels(start)
    check_task(renderer, **job.arguments())
    job.loss.choose_time(time)
    check_out(out, record)
    sources = job.source_prompts if job.loss.needs_source else None
    embed(job.prior, [*job.prompts, *(sources or [])], [job.loss], job.prompts)
    write_text(out / RECORD, record)
    snapshots = {0: _thumbnail(start)}
    with Progress("optimising", steps) as progress:

        def watch(done: int) -> None:
            if done % snapshot_every == 0 and done < steps:
                with torch.no_grad():
                    snapshots[done] = _thumbnail(renderer())
            # Patches of an image take more of the loss than the whole.
            share = job.settings.parts(done) / job.settings.parts(steps)
            progress.update(done, share=share)

        images = optimize(renderer, **job.arguments(), time=time, device=device, watch=watch)
    images = images.float().cpu().clamp(-1, 1)
    snapshots[steps] = _thumbnail(images)
    for seed, picture in zip(job.seeds, images, strict=True):
        save_image(picture, out / f"seed-{seed}.png")
    _write_progression(out, job.seeds, snapshots)
    results: dict[str, Any] = {"seconds": round(progress.seconds(), 1)}
    if len(images) > 1:
        results["diversity"] = diversity(images)
        print("mean distance ({name}) of {runs} runs to the first: {mean:.3f} ± {deviation:.3f}"
              .format(**results["diversity"]))  # fmt: skip
    write_json(out / RESULTS, results)
    print(f"{len(images)} images in {out}, {timedelta(seconds=round(progress.seconds()))}")


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


def _thumbnail(images: Tensor) -> Tensor:
    """(B, 3, H, W) on the CPU, clipped to [-1, 1], no side longer than THUMBNAIL."""
    images = images.detach().float().cpu().clamp(-1, 1)
    longest = max(images.shape[-2:])
    return images.clone() if longest <= THUMBNAIL else _scale(images, THUMBNAIL / longest)


def _resize_shorter(image: Tensor, size: int) -> Tensor:
    """(B, 3, H, W) with its shorter side `size` pixels long."""
    if size < 8:
        raise ValueError(f"size must be at least 8 pixels, got {size}")
    return _scale(image, size / min(image.shape[-2:]))


def _scale(image: Tensor, factor: float) -> Tensor:
    size = [round(side * factor) for side in image.shape[-2:]]
    return F.interpolate(image, size, mode="bilinear", antialias=True)
