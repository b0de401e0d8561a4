"""`lmc synthesize`, `edit` and `gradients`: one image under any loss. A list: `edits`.

Each command is a function whose arguments are the options; jsonargparse makes the command line and
the configuration file of them.
"""

import argparse
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import jsonargparse
import torch
import yaml
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from lmc.device import check_device
from lmc.files import write_json, write_text
from lmc.losses import LMC, ScoreDistillation
from lmc.one_image.edits import edit_list
from lmc.one_image.job import (
    RECORD,
    RESULTS,
    Job,
    Progress,
    check_out,
    parse_numbers,
    parse_seeds,
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
from lmc.schedule import TimeSchedule, add_noise
from lmc.shards.images import middle_square
from lmc.specs import instantiate

THUMBNAIL = 192  # longest side in pixels of a snapshot on the contact sheet
Parametrisation = Literal["pixels", "latents"]


def synthesize(
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
    device: str = "cpu",
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
        device: cpu, cuda, …
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
    device: str = "cpu",
) -> None:
    """Optimise an image, beginning with a photo, towards a prompt. Many of them: --list FILE.

    Writes what lmc synthesize writes. `lmc edit --list FILE --help` has the options of a list.

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
        device: cpu, cuda, …
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
    steps = job.settings.steps
    latent = parametrisation == "latents"
    if latent and not job.prior.latent:
        raise ValueError("parametrisation latents: the prior has none, its z are pixels")
    renderer: Renderer = Latents(job.prior, start) if latent else Pixels(start)
    check_task(renderer, **job.arguments())
    job.loss.choose_time(time)
    check_out(out, record)
    negative = [] if job.loss.negative_prompt is None else [job.loss.negative_prompt]
    sources = job.source_prompts if job.loss.needs_source else None
    embed(job.prior, [*job.prompts, *(sources or [])], negative)
    write_text(out / RECORD, record)
    snapshots = {0: _thumbnail(start)}
    progress = Progress(steps)

    def watch(done: int) -> None:
        if done % snapshot_every == 0 and done < steps:
            with torch.no_grad():
                snapshots[done] = _thumbnail(renderer())
        progress.steps_done(done)

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


def gradients(
    prior: Prior,
    image: Path,
    prompt: str,
    corrector: str,
    out: Path,
    t: list[float] | float | str = "0.2,0.5,0.8",
    guidance_scale: float = 15.0,
    seed: int = 0,
    device: str = "cpu",
) -> None:
    """Picture z, z_t, ẑ_t, b(z, t) and the gradients g_cond, g_proj, g_lmc [LMC, Fig. 1].

    A row for each t, all with the same noise. g_cond is ω (eps_cond − eps_uncond), g_proj is
    eps_uncond − eps, g_lmc is b(z, t) − ẑ_t, without any weight. A gradient is shown around grey
    (zero), scaled by the number that stands under it. Of a latent prior the first four are decoded,
    and a gradient's first three channels shown.

    Args:
        prior: the diffusion model, by class_path and init_args.
        image: a file; its middle square is taken.
        prompt: y of g_cond.
        corrector: folder or hub id of a released one, or identity.
        out: PNG to write.
        t: times in (0, 1), with commas.
        guidance_scale: ω.
        seed: of the noise.
        device: cpu, cuda, …
    """
    from lmc.measure.figures import gradients_figure

    times = parse_numbers(t, "t", float)
    for time in times:
        if not 0 < time < 1:
            raise ValueError(f"t must be in (0, 1), got {time:g}")
    if out.suffix != ".png":
        raise ValueError(f"out must be a .png to write, got {out}")
    loss = LMC(corrector, guidance_scale, rescale=False)
    picture = middle_square(read_image(image)[None], prior.image_size)
    embedding = prior.embed(["", prompt]).to(device)
    loss.prepare(prior, device)
    prior.to(device)
    with torch.no_grad():
        z = prior.encode(picture.to(device))
        drawn = torch.randn(z.shape, generator=torch.Generator().manual_seed(seed), dtype=z.dtype)
        eps = drawn.to(device).repeat(2, 1, 1, 1)
        rows = {}
        for time in times:
            both = torch.full((2,), time, device=device)
            alpha_t, sigma_t = prior.schedule.coefficients(both, z.dtype)
            z_t = add_noise(z.repeat(2, 1, 1, 1), eps, alpha_t, sigma_t)
            (uncond, cond), (z_hat, _) = prior.predict(z_t, both, embedding)
            b = loss.corrector.correct(z, both[:1], z_hat[None])
            shown = [prior.decode(x)[0] for x in (z, z_t[:1], z_hat[None], b)]
            moved = [guidance_scale * (cond - uncond), uncond - eps[0], b[0] - z_hat]
            names = ("z", "z_t", "ẑ_t", "b(z, t)", "g_cond", "g_proj", "g_lmc")
            images = [*shown, *(gradient[:3] for gradient in moved)]
            rows[f"t = {time:g}"] = dict(zip(names, images, strict=True))
    save_whole(out, gradients_figure(rows, names[:4]).savefig, "png", dpi=150)
    print(f"{out}: a row for each t; under each gradient the scale it is shown at")


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


COMMANDS: dict[str, Callable[..., None]] = {
    "synthesize": synthesize,
    "edit": edit,
    "gradients": gradients,
}


def main(command: str, args: Sequence[str]) -> None:
    """Run one of COMMANDS.

    Args:
        command: its name.
        args: what stands behind it on the command line.

    Raises:
        ValueError: an argument is missing, unknown or of a wrong type; or see the commands.
    """
    function, parser = command_line(command, args)
    try:
        given = parser.parse_args(list(args))
    except argparse.ArgumentError as error:
        raise ValueError(" ".join(str(error).split())) from error
    given.pop("config", None)
    check_device(given.device)
    kept = {} if function is gradients else {"record": parser.dump(given, skip_none=False)}
    function(**kept, **vars(instantiate(parser, given)))


def command_line(command: str, args: Sequence[str]) -> tuple[Callable[..., None], Any]:
    """The function that `main` runs, and the parser of its options."""
    function = COMMANDS[command]
    if command == "edit" and _has_list(args):
        function = edit_list
    parser: Any = jsonargparse.ArgumentParser(
        prog=f"lmc {command}",
        usage="%(prog)s [--config FILE] [--KEY VALUE ...]",
        description=(function.__doc__ or "").split("\n\n    Args:")[0],
        exit_on_error=False,
    )
    parser.add_argument("--config", action="config", help="YAML with any of the options below")
    parser.add_function_arguments(function, skip=set() if function is gradients else {"record"})
    return function, parser


def _has_list(args: Sequence[str]) -> bool:
    """Whether --list is among the options, or in a file of --config."""
    known = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    known.add_argument("--list")
    known.add_argument("--config", action="append", default=[])
    try:
        given, _ = known.parse_known_args(args)
    except argparse.ArgumentError:  # a value is missing: the full parser says it
        return "--list" in args
    if given.list is not None:
        return True
    for file in given.config:
        try:
            if "list" in (yaml.safe_load(Path(file).read_text()) or {}):
                return True
        except (OSError, TypeError, UnicodeDecodeError, yaml.YAMLError):
            pass  # no such file, or no configuration: the full parser says it
    return False
