"""`lmc synthesize`, `edit` and `gradients`: one image, or a list of them, under any loss.

Each command is a function whose arguments are the options; jsonargparse makes the command line and
the configuration file of them.
"""

import argparse
import hashlib
import inspect
import json
import pkgutil
import sys
import time as clock
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import jsonargparse
import torch
import yaml
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from lmc.cli import OUT_OF_MEMORY
from lmc.corrector import BiasCorrector
from lmc.files import whole, write_text
from lmc.images import decode_image, middle_square, to_uint8
from lmc.losses import LMC, ScoreDistillation
from lmc.optimize import (
    Comparison,
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
from lmc.results import write_json
from lmc.schedule import TimeSchedule, add_noise
from lmc.specs import Spec, instantiate, parse_specs

SECONDS = 5.0  # between two lines of progress
THUMBNAIL = 192  # longest side in pixels of a snapshot on the contact sheet
RECORD, RESULTS = "settings.yaml", "results.json"
EDIT_KEYS = {"image", "source_prompt", "prompt"}
Parametrisation = Literal["pixels", "latents"]


def synthesize(
    record: str,
    prior: Prior,
    loss: ScoreDistillation,
    prompt: str,
    out: Path,
    seeds: str = "0",
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
    numbers = _numbers(seeds, "seeds", int)
    if size < 8:
        raise ValueError(f"size must be at least 8 pixels, got {size}")
    start = grey(len(numbers), size)
    _optimise_one(
        record,
        out,
        start,
        _Job(prior, loss, [prompt] * len(numbers), numbers, settings, None, None),
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
    seeds: str = "0",
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
    numbers = _numbers(seeds, "seeds", int)
    source = read_image(image)[None]
    if size is not None:
        source = _resize_shorter(source, size)
    source = source.expand(len(numbers), -1, -1, -1).contiguous()
    prompts = None if source_prompt is None else [source_prompt] * len(numbers)
    _optimise_one(
        record,
        out,
        source,
        _Job(prior, loss, [prompt] * len(numbers), numbers, settings, source, prompts),
        time,
        parametrisation,
        snapshot_every,
        device,
    )


@dataclass(frozen=True)
class _Job:
    """What `optimize` and `check_task` take after the renderer."""

    prior: Prior
    loss: ScoreDistillation
    prompts: Sequence[str]
    seeds: Sequence[int]
    settings: Synthesis
    source: Tensor | None
    source_prompts: Sequence[str] | None

    def arguments(self) -> dict[str, Any]:
        return dict(vars(self))


def _optimise_one(
    record: str,
    out: Path,
    start: Tensor,
    job: _Job,
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
    from lmc.evaluate import distances

    name, measure = next(iter(distances().items()))
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
    from lmc.figures import grid, labelled_grid

    columns = torch.stack(list(snapshots.values()), 1)
    steps = ", ".join(map(str, snapshots))
    rows = {f"seed {seed}": row for seed, row in zip(seeds, columns, strict=True)}
    _replace(out / "progression.png", labelled_grid({f"after steps {steps}": rows}).save, "png")
    frames = [
        Image.fromarray((grid(each) * 255).round().byte().permute(1, 2, 0).numpy())
        for each in snapshots.values()
    ]
    _replace(
        out / "progression.gif",
        frames[0].save,
        "gif",
        save_all=True,
        append_images=frames[1:],
        duration=[250] * (len(frames) - 1) + [2000],
        loop=0,
    )


# ---------------------------------------------------------------------------------------------
# Many edits


@dataclass(frozen=True)
class Edit:
    """A line of a list of edits."""

    image: str
    source_prompt: str
    prompt: str


def edit_list(
    record: str,
    prior: Prior,
    list: Path,
    clip: str,
    out: Path,
    losses: str = "lmc,sds,dds,nfsd",
    corrector: str | None = None,
    guidance_scales: str = "1,5,15,30,100",
    statistics_scale: float = 5.0,
    size: int = 256,
    settings: Comparison = Comparison(),  # noqa: B008
    seed: int = 0,
    batch_size: int = 8,
    device: str = "cpu",
) -> None:
    """Every edit of a list with every loss at every guidance scale, measured [LMC, Fig. 5, 6].

    Writes the results as PNGs, results.json with each one's distance to its source and CLIP score,
    fig5.png (distance over CLIP score, a curve a loss) and fig6.png (image statistics). The same
    command again goes on where it stopped, also with more losses or guidance scales. The guidance
    is not rescaled by 1/ω. Where a loss fails the others go on; it is named at the end, with a
    non-zero exit status, and under `failed` in results.json.

    Args:
        record: the options as YAML, kept beside the result.
        prior: the diffusion model, by class_path and init_args.
        list: a JSON object a line with image (a file, beside the list unless absolute),
            source_prompt and prompt.
        clip: a CLIP model, folder or hub id.
        out: folder to write.
        losses: with commas, each NAME[:OPTION=VALUE]*, such as lmc,sds:weighting=fantasia3d.
        corrector: of the losses that take one and name none, such as lmc.
        guidance_scales: with commas.
        statistics_scale: the one of them that fig6.png is about.
        size: side of the images in pixels; the middle square of each is resized to it.
        settings: the defaults are the paper's.
        seed: of the first edit; the second has the next, and so on.
        batch_size: edits at once.
        device: cpu, cuda, …
    """
    from lmc.evaluate import distances

    edits = read_list(list)
    sources = torch.cat([middle_square(read_image(Path(e.image))[None], size) for e in edits])
    specs = parse_specs(losses)
    scales = _numbers(guidance_scales, "guidance_scales", float)
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    if statistics_scale not in scales:
        raise ValueError(f"statistics_scale {statistics_scale:g} is not among guidance_scales")
    first = [0]
    built = {
        (spec.label, scale): _build(spec, corrector, scale) for spec in specs for scale in scales
    }
    correctors = {spec.label: _corrector_digest(built[spec.label, scales[0]]) for spec in specs}
    for loss in built.values():
        job = _edits_job(prior, loss, edits, sources, first, seed, settings)
        check_task(Pixels(sources[first]), **job.arguments())
    prompts = [p for each in edits for p in (each.source_prompt, each.prompt)]
    negative = {loss.negative_prompt for loss in built.values()}
    embed(prior, prompts, [prompt for prompt in negative if prompt is not None])
    named = distances()  # by name
    made_with = {
        "settings": asdict(settings),
        "prior": {
            name: _resolved(value) if name == "pretrained" else value
            for name, value in prior.identity.items()
        },
        "clip": _resolved(clip),
        "distances": [*named],
        "size": size,
        "seed": seed,
        "edits": [asdict(each) | {"image": _file_digest(each.image)} for each in edits],
        "correctors": correctors,
    }
    results = _go_on(out, made_with)
    write_text(out / RECORD, record)
    measure = _Measure(clip, device, edits, sources, named)
    results["distance_name"] = measure.name
    results["source"] = measure.source_score()

    def todo(label: str, scale: float) -> Sequence[int]:
        done = results["results"].setdefault(label, {}).setdefault(f"{scale:g}", {})
        return [i for i in range(len(edits)) if str(i) not in done]

    runs = [(spec, scale, todo(spec.label, scale)) for spec in specs for scale in scales]
    progress = Progress(settings.steps * sum(len(left) for *_, left in runs))

    def run(spec: Spec, scale: float, rows: Sequence[int]) -> None:
        loss = built[spec.label, scale]
        if loss.learns:  # what it learned of other edits is not for these
            loss = _build(spec, corrector, scale)
        job = _edits_job(prior, loss, edits, sources, rows, seed, settings)
        before = progress.done
        images = optimize(
            Pixels(sources[rows]),
            **job.arguments(),
            device=device,
            watch=lambda done: progress.steps_done(before + done * len(rows)),
        )
        images = images.float().cpu().clamp(-1, 1)
        for row, picture, figures in zip(rows, images, measure(images, rows), strict=True):
            save_image(picture, _picture(out, spec, scale, row))
            results["results"][spec.label][f"{scale:g}"][str(row)] = figures
        write_json(out / RESULTS, results)
        print(f"{spec.label} at {scale:g}: {len(rows)} edits done", flush=True)

    failed: dict[str, str] = {}
    for spec, scale, left in runs:
        name, end = f"{spec.label} at {scale:g}", progress.done + settings.steps * len(left)
        try:
            for at in range(0, len(left), batch_size):
                run(spec, scale, left[at : at + batch_size])
        except (ValueError, FloatingPointError, RuntimeError, TypeError) as error:
            memory = isinstance(error, torch.OutOfMemoryError)
            failed[name] = OUT_OF_MEMORY if memory else f"{type(error).__name__}: {error}"
            print(f"{name} failed: {failed[name]}", flush=True)
            progress.total -= end - progress.done
    done_here = {f"{spec.label} at {scale:g}" for spec, scale, _ in runs}
    others = {n: why for n, why in results.get("failed", {}).items() if n not in done_here}
    results["failed"] = others | failed
    results["means"] = _means(results["results"], len(edits))
    write_json(out / RESULTS, results)
    _write_figures(out, specs, scales, statistics_scale, results, sources)
    print(f"{out}/{RESULTS}, fig5.png and fig6.png: {len(edits)} edits of each loss")
    if failed:
        sys.exit(
            f"lmc: failed: {', '.join(failed)} (why is in {out}/{RESULTS}); "
            "the same command tries them again"
        )


def read_list(file: Path) -> list[Edit]:
    """The edits in a JSON-lines file; an image's path is taken from the file's own folder.

    Raises:
        FileNotFoundError: the file, or an image it names, is missing.
        ValueError: a line is no edit, or there is none.
    """
    if not file.is_file():
        raise FileNotFoundError(f"no such file: {file}")
    edits = []
    for number, line in enumerate(file.read_text().splitlines(), 1):
        if not line.strip():
            continue
        try:
            found = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{file}, line {number} is no JSON: {error}") from error
        texts = isinstance(found, dict) and all(isinstance(value, str) for value in found.values())
        if not texts or set(found) != EDIT_KEYS:
            raise ValueError(
                f"{file}, line {number}: an edit has image, source_prompt and prompt, all texts"
            )
        image = file.parent / found["image"]
        if not image.is_file():
            raise FileNotFoundError(f"{file}, line {number}: no such image: {image}")
        edits.append(Edit(str(image), found["source_prompt"], found["prompt"]))
    if not edits:
        raise ValueError(f"{file} holds no edits")
    return edits


def _build(spec: Spec, corrector: str | None, scale: float) -> ScoreDistillation:
    """The loss of a spec at a guidance scale, not rescaled."""
    for option in ("guidance_scale", "rescale"):
        if option in spec.options:
            raise ValueError(f"{spec.label!r}: {option} is not a loss's own here")
    more: dict[str, Any] = {"guidance_scale": scale, "rescale": False}
    takes = inspect.signature(pkgutil.resolve_name(spec.class_path)).parameters.get("corrector")
    if takes is not None and "corrector" not in spec.options:
        if corrector is not None:
            more["corrector"] = corrector
        elif takes.default is inspect.Parameter.empty:
            raise ValueError(f"the loss {spec.label!r} needs a corrector: --corrector FOLDER")
    try:
        return spec.build(**more)
    except TypeError as error:
        raise ValueError(f"the loss {spec.label!r}: {error}") from error


def _resolved(pretrained: str) -> str:
    """A folder by its absolute path; a hub id as it is."""
    return str(Path(pretrained).resolve()) if Path(pretrained).exists() else pretrained


def _file_digest(file: str) -> str:
    """SHA-256 of a file's content."""
    return hashlib.sha256(Path(file).read_bytes()).hexdigest()


def _corrector_digest(loss: ScoreDistillation) -> str | None:
    """SHA-256 of the kind, statistics and weights of the loss's corrector, if it has one."""
    corrector = getattr(loss, "corrector", None)
    if not isinstance(corrector, BiasCorrector):
        return None
    digest = hashlib.sha256(f"{type(corrector).__name__} {corrector.statistics}".encode())
    for name, value in sorted(corrector.state_dict().items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _edits_job(
    prior: Prior,
    loss: ScoreDistillation,
    edits: Sequence[Edit],
    sources: Tensor,
    rows: Sequence[int],
    seed: int,
    settings: Synthesis,
) -> _Job:
    return _Job(
        prior,
        loss,
        [edits[i].prompt for i in rows],
        [seed + i for i in rows],
        settings,
        sources[rows],
        [edits[i].source_prompt for i in rows],
    )


def _go_on(out: Path, made_with: Mapping[str, Any]) -> dict[str, Any]:
    """The results so far in `out`; or a ValueError where they were made with something else.

    Where nothing was measured yet, as by a command that failed, anything may begin.
    """
    made_with = json.loads(json.dumps(made_with))
    fresh = {"made_with": made_with, "results": {}}
    file = out / RESULTS
    if not file.exists():
        own = {RECORD, "images"} if (out / RECORD).is_file() else set()
        if out.exists() and (not out.is_dir() or {each.name for each in out.iterdir()} - own):
            raise ValueError(f"{out} holds something else: name another folder")
        return fresh
    there = json.loads(file.read_text())
    before = there.get("made_with")
    if before is None:
        raise ValueError(f"{out} holds something else: name another folder")
    measured = {label for label, scales in there["results"].items() if any(scales.values())}
    if not measured:
        return fresh
    other = [name for name in made_with if before.get(name) != made_with[name]]
    if "correctors" in other:
        # One for each loss; that of a loss without a result is of no matter.
        known, now = before.get("correctors", {}), made_with["correctors"]
        other.remove("correctors")
        other += [
            f"the corrector of {label}"
            for label in now
            if label in measured and known.get(label) != now[label]
        ]
        before["correctors"] = known | now
    if other:
        raise ValueError(
            f"{out} holds edits made with something else ({', '.join(other)}): name another folder"
        )
    return there


class _Measure:
    """Distance to the source and CLIP score of results, by number."""

    def __init__(
        self,
        clip: str,
        device: str,
        edits: Sequence[Edit],
        sources: Tensor,
        distances: Mapping[str, Callable[[Tensor, Tensor], Tensor]],
    ) -> None:
        from lmc.evaluate import Clip

        self.clip, self.device, self.sources = Clip(clip, device), device, sources
        self.texts = self.clip.texts([each.prompt for each in edits])
        self.distances = distances
        self.name = next(iter(self.distances))

    @torch.no_grad()
    def __call__(self, images: Tensor, rows: Sequence[int]) -> list[dict[str, float]]:
        from lmc.evaluate import clip_score

        images, sources = images.to(self.device), self.sources[rows].to(self.device)
        columns = {"clip_score": clip_score(self.clip.images(images), self.texts[rows])}
        columns |= {name: measure(images, sources) for name, measure in self.distances.items()}
        lists = {name: values.tolist() for name, values in columns.items()}
        return [
            {"distance": lists[self.name][i], **{name: lists[name][i] for name in lists}}
            for i in range(len(rows))
        ]

    def source_score(self) -> float:
        """Mean CLIP score of the untouched sources with the target prompts."""
        each = [self(image[None], [i]) for i, image in enumerate(self.sources)]
        return sum(row["clip_score"] for (row,) in each) / len(each)


def _means(results: Mapping[str, Any], edits: int) -> dict[str, Any]:
    """Means over all edits, by loss and guidance scale."""
    return {
        label: {
            scale: {
                name: sum(row[name] for row in rows.values()) / len(rows)
                for name in next(iter(rows.values()))
            }
            for scale, rows in scales.items()
            if len(rows) == edits  # fewer where it failed or was stopped
        }
        for label, scales in results.items()
    }


def _write_figures(
    out: Path,
    specs: Sequence[Spec],
    scales: Sequence[float],
    statistics_scale: float,
    results: Mapping[str, Any],
    sources: Tensor,
) -> None:
    """fig5.png and fig6.png of what `results` and the PNGs say, without what failed."""
    from lmc.evaluate import derivative_histogram, power_spectrum
    from lmc.figures import curves_figure, statistics_figure

    means = results["means"]
    curves = {
        spec.label: [
            (mean["clip_score"], mean["distance"], f"{scale:g}")
            for scale in scales
            if (mean := means[spec.label].get(f"{scale:g}"))
        ]
        for spec in specs
    }
    curves["source"] = [(results["source"], 0.0, "")]
    name = f"{results['distance_name']} to source"
    figure = curves_figure(curves, "CLIP score", name)
    _replace(out / "fig5.png", figure.savefig, "png")
    pictures = {"source": sources}
    for spec in specs:
        if f"{statistics_scale:g}" not in means[spec.label]:
            continue
        files = [_picture(out, spec, statistics_scale, i) for i in range(len(sources))]
        pictures[spec.label] = torch.stack([read_image(file) for file in files])
    figure = statistics_figure(
        {label: power_spectrum(images).mean(0) for label, images in pictures.items()},
        {label: derivative_histogram(images) for label, images in pictures.items()},
    )
    _replace(out / "fig6.png", figure.savefig, "png")


def _picture(out: Path, spec: Spec, scale: float, row: int) -> Path:
    return out / "images" / spec.folder() / f"{scale:g}" / f"{row:04d}.png"


# ---------------------------------------------------------------------------------------------
# The gradients of one image


def gradients(
    prior: Prior,
    image: Path,
    prompt: str,
    corrector: str,
    out: Path,
    t: str = "0.2,0.5,0.8",
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
    from lmc.figures import gradients_figure

    times = _numbers(t, "t", float)
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
    out.parent.mkdir(parents=True, exist_ok=True)
    _replace(out, gradients_figure(rows, names[:4]).savefig, "png", dpi=150)
    print(f"{out}: a row for each t; under each gradient the scale it is shown at")


# ---------------------------------------------------------------------------------------------
# What the commands share


class Progress:
    """A line every few seconds: steps, steps a second, time left.

    Args:
        total: steps to be done.
    """

    def __init__(self, total: int) -> None:
        self.total, self.done = total, 0
        self.began = self.last = clock.monotonic()

    def seconds(self) -> float:
        """Since the beginning."""
        return clock.monotonic() - self.began

    def steps_done(self, done: int) -> None:
        """Say how far it is, if there was no line for a while.

        Args:
            done: steps so far, in all.
        """
        self.done = done
        now = clock.monotonic()
        if now - self.last < SECONDS and done < self.total:
            return
        self.last = now
        speed = done / max(self.seconds(), 1e-9)
        left = timedelta(seconds=round((self.total - done) / speed))
        print(f"step {done}/{self.total}  {speed:.1f} steps/s  {left} left", flush=True)


def read_image(file: Path) -> Tensor:
    """An image file as float32 (3, H, W) in [-1, 1].

    Raises:
        FileNotFoundError: there is none.
        ValueError: it cannot be read.
    """
    if not file.is_file():
        raise FileNotFoundError(f"no such image: {file}")
    return decode_image(file.read_bytes(), str(file))


def save_image(image: Tensor, file: Path) -> None:
    """Write (3, H, W) in [-1, 1] as a PNG, atomically; makes its folder."""
    file.parent.mkdir(parents=True, exist_ok=True)
    picture = Image.fromarray(to_uint8(image).cpu().permute(1, 2, 0).numpy())
    _replace(file, picture.save, "png")


def check_out(out: Path, record: str) -> None:
    """Refuse a folder that is not free for the result of some settings.

    Settings without a result are those of a command that failed, and are no obstacle.

    Args:
        out: the folder.
        record: the settings, as they are kept there.

    Raises:
        ValueError: it holds something that was not made with these settings.
    """
    there = out / RECORD
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        if not there.is_file():
            raise ValueError(f"{out} holds something else: name another folder")
        has_result = (out / RESULTS).exists() or any(out.rglob("*.png"))
        if has_result and there.read_text() != record:
            raise ValueError(
                f"{out} holds another result (see {there}): name another folder, or delete it"
            )


def _replace(file: Path, save: Callable[..., Any], format: str, **options: Any) -> None:
    """Let `save` write a file under another name first."""
    with whole(file) as partial:
        save(partial, format=format, **options)


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


def _numbers(text: str, option: str, kind: Callable[[str], Any]) -> list[Any]:
    """Comma-separated numbers, each once.

    Args:
        text: such as '0,1,2'.
        option: that they are of, for messages.
        kind: int or float.

    Raises:
        ValueError: not numbers, or one that comes twice.
    """
    try:
        numbers = [kind(part) for part in str(text).split(",")]
    except ValueError:
        raise ValueError(f"{option} must be numbers with commas, got {text!r}") from None
    for number in numbers:
        if numbers.count(number) > 1:
            raise ValueError(f"{option}: {number} comes twice")
    return numbers
