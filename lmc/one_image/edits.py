"""`lmc edit --list`: every edit of a list with every loss at every guidance scale, measured."""

import hashlib
import inspect
import json
import pkgutil
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lmc.corrector import BiasCorrector
from lmc.errors import OUT_OF_MEMORY
from lmc.files import write_json, write_text
from lmc.losses import ScoreDistillation
from lmc.measure.tables import edits_table, markdown
from lmc.one_image.job import (
    RECORD,
    RESULTS,
    Job,
    Progress,
    parse_numbers,
    read_image,
    save_image,
    save_whole,
)
from lmc.optimize import Comparison, Pixels, Synthesis, check_task, embed, optimize
from lmc.priors import Prior
from lmc.shards.images import middle_square
from lmc.specs import Spec, denoiser_evaluations, parse_specs

EDIT_KEYS = {"image", "source_prompt", "prompt"}


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
    losses: list[str] | str | None = None,
    corrector: str | None = None,
    guidance_scales: list[float] | float | str = "1,5,15,30,100",
    statistics_scale: float = 5.0,
    size: int = 256,
    settings: Comparison = Comparison(),  # noqa: B008
    seed: int = 0,
    batch_size: int = 8,
    device: str = "cpu",
) -> None:
    """Every edit of a list with every loss at every guidance scale, measured [LMC, Fig. 5, 6].

    Writes the results as PNGs, results.json with each one's distance to its source and CLIP score,
    table.md (their means, with 95 % bootstrap intervals over the edits, and the spectrum error at
    STATISTICS_SCALE), fig5.png (distance over CLIP score, a curve a loss) and fig6.png (image
    statistics at that scale). The same command again goes on where it stopped, also with more
    losses or guidance scales; the table and the figures have all that are complete. The guidance is
    not rescaled by 1/ω. Where a loss fails the others go on; it is named at the end, with a
    non-zero exit status, and under `failed` in results.json.

    Args:
        record: the options as YAML, kept beside the result.
        prior: the diffusion model, by class_path and init_args.
        list: a JSON object a line with image (a file, beside the list unless absolute),
            source_prompt and prompt.
        clip: a CLIP model, folder or hub id.
        out: folder to write.
        losses: with commas, each NAME[:OPTION=VALUE]*, such as lmc,sds:weighting=fantasia3d; the
            option time is how t is drawn, such as sdi:time=UniformTime:time.shared=true. The
            default is every loss of lmc.losses.
        corrector: of the losses that take one and name none, such as lmc.
        guidance_scales: with commas.
        statistics_scale: the one of them that fig6.png and the spectrum error are of.
        size: side of the images in pixels; the middle square of each is resized to it.
        settings: the defaults are the paper's.
        seed: of the first edit; the second has the next, and so on.
        batch_size: edits at once.
        device: cpu, cuda, …
    """
    from lmc.measure.metrics import distances

    edits = read_list(list)
    sources = torch.cat([middle_square(read_image(Path(e.image))[None], size) for e in edits])
    specs = parse_specs(losses)
    scales = parse_numbers(guidance_scales, "guidance_scales", float)
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    if statistics_scale not in scales:
        raise ValueError(f"statistics_scale {statistics_scale:g} is not among guidance_scales")
    first = [0]
    built = {
        (spec.label, scale): _build(spec, corrector, scale) for spec in specs for scale in scales
    }
    correctors = {spec.label: _corrector_digest(built[spec.label, scales[0]]) for spec in specs}
    schedules = {spec.label: spec.schedule() for spec in specs}
    for (label, _), loss in built.items():
        loss.choose_time(schedules[label])
        job = _edits_job(prior, loss, edits, sources, first, seed, settings)
        check_task(Pixels(sources[first]), **job.arguments())
    prompts = [p for each in edits for p in (each.source_prompt, each.prompt)]
    negative = {loss.negative_prompt for loss in built.values()}
    embed(prior, prompts, [prompt for prompt in negative if prompt is not None])
    named = distances(size)  # by name
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
    source_scores = measure.source_scores()
    results["source"] = sum(source_scores) / len(source_scores)

    def todo(label: str, scale: float) -> Sequence[int]:
        done = results["results"].get(label, {}).get(f"{scale:g}", {})
        return [i for i in range(len(edits)) if str(i) not in done]

    runs = [(spec, scale, todo(spec.label, scale)) for spec in specs for scale in scales]

    def work(spec: Spec, scale: float, steps: int, images: int) -> int:
        """The denoiser's evaluations in the first `steps`; of a user's loss, as if of SDS."""
        loss = built[spec.label, scale]
        each, _ = denoiser_evaluations(type(loss), vars(loss))
        return (each or 2) * settings.parts(steps) * images

    progress = Progress(
        settings.steps * sum(len(left) for *_, left in runs),
        sum(work(spec, scale, settings.steps, len(left)) for spec, scale, left in runs),
    )

    def run(spec: Spec, scale: float, rows: Sequence[int]) -> None:
        loss = built[spec.label, scale]
        if loss.learns:  # what it learned of other edits is not for these
            loss = _build(spec, corrector, scale)
        job = _edits_job(prior, loss, edits, sources, rows, seed, settings)
        before, worked = progress.done, progress.worked
        images = optimize(
            Pixels(sources[rows]),
            **job.arguments(),
            time=schedules[spec.label],
            device=device,
            watch=lambda done: progress.steps_done(
                before + done * len(rows), worked + work(spec, scale, done, len(rows))
            ),
        )
        images = images.float().cpu().clamp(-1, 1)
        measured = results["results"].setdefault(spec.label, {}).setdefault(f"{scale:g}", {})
        for row, picture, figures in zip(rows, images, measure(images, rows), strict=True):
            save_image(picture, _picture(out, spec.label, f"{scale:g}", row))
            measured[str(row)] = figures
        write_json(out / RESULTS, results)
        print(f"{spec.label} at {scale:g}: {len(rows)} edits done", flush=True)

    failed: dict[str, str] = {}
    for spec, scale, left in runs:
        name, end = f"{spec.label} at {scale:g}", progress.done + settings.steps * len(left)
        all_worked = progress.worked + work(spec, scale, settings.steps, len(left))
        try:
            for at in range(0, len(left), batch_size):
                run(spec, scale, left[at : at + batch_size])
        except (ValueError, FloatingPointError, RuntimeError, TypeError) as error:
            memory = isinstance(error, torch.OutOfMemoryError)
            failed[name] = OUT_OF_MEMORY if memory else f"{type(error).__name__}: {error}"
            print(f"{name} failed: {failed[name]}", flush=True)
            progress.total -= end - progress.done
            progress.work -= all_worked - progress.worked
    done_here = {f"{spec.label} at {scale:g}" for spec, scale, _ in runs}
    others = {n: why for n, why in results.get("failed", {}).items() if n not in done_here}
    results["failed"] = others | failed
    results["means"] = _means(results["results"], len(edits))
    write_json(out / RESULTS, results)
    of_scale = f"{statistics_scale:g}"
    statistics = _all_statistics(out, of_scale, results["means"], sources, batch_size)
    results["spectrum_error"] = {of_scale: _spectrum_errors(statistics)}
    write_json(out / RESULTS, results)
    table = _table(results, source_scores, of_scale)
    write_text(out / "table.md", table + "\n")
    _write_figures(out, results, statistics)
    print(table)
    print(f"{out}/{RESULTS}, table.md, fig5.png and fig6.png: {len(edits)} edits of each loss")
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
    """`BiasCorrector.digest` of the loss's corrector, if it has one."""
    corrector = getattr(loss, "corrector", None)
    return corrector.digest() if isinstance(corrector, BiasCorrector) else None


def _edits_job(
    prior: Prior,
    loss: ScoreDistillation,
    edits: Sequence[Edit],
    sources: Tensor,
    rows: Sequence[int],
    seed: int,
    settings: Synthesis,
) -> Job:
    return Job(
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
        from lmc.measure.metrics import Clip

        self.clip, self.device, self.sources = Clip(clip, device), device, sources
        self.texts = self.clip.texts([each.prompt for each in edits])
        self.distances = distances
        self.name = next(iter(self.distances))

    @torch.no_grad()
    def __call__(self, images: Tensor, rows: Sequence[int]) -> list[dict[str, float]]:
        from lmc.measure.metrics import clip_score

        images, sources = images.to(self.device), self.sources[rows].to(self.device)
        columns = {"clip_score": clip_score(self.clip.images(images), self.texts[rows])}
        columns |= {name: measure(images, sources) for name, measure in self.distances.items()}
        lists = {name: values.tolist() for name, values in columns.items()}
        return [
            {"distance": lists[self.name][i], **{name: lists[name][i] for name in lists}}
            for i in range(len(rows))
        ]

    def source_scores(self) -> list[float]:
        """CLIP score of each untouched source with its target prompt."""
        each = [self(image[None], [i]) for i, image in enumerate(self.sources)]
        return [row["clip_score"] for (row,) in each]


def _means(results: Mapping[str, Any], edits: int) -> dict[str, Any]:
    """Means over all edits, by loss as first measured and guidance scale from low to high."""
    return {
        label: {
            scale: {
                name: sum(row[name] for row in rows.values()) / len(rows)
                for name in next(iter(rows.values()))
            }
            for scale, rows in sorted(scales.items(), key=lambda each: float(each[0]))
            if len(rows) == edits  # fewer where it failed or was stopped
        }
        for label, scales in results.items()
    }


def _table(
    results: Mapping[str, Any], source_scores: Sequence[float], statistics_scale: str
) -> str:
    """Every loss and scale in `results` of which all edits are done, as Markdown."""
    from lmc.measure.results import means

    def summary(**values: Sequence[float]) -> dict[str, Any]:
        return means({name: np.array(each)[:, None] for name, each in values.items()}, ["edits"])

    count = len(source_scores)
    rows = {}
    for label, scales in results["means"].items():
        for scale in scales:
            done = results["results"][label][scale]
            each = [done[str(i)] for i in range(count)]  # in the same order, whenever it was done
            rows[label, scale] = summary(
                distance=[row["distance"] for row in each],
                clip_score=[row["clip_score"] for row in each],
            )
    # A function of all edits' spectra, without a value for each that an interval could be over.
    for label, error in results["spectrum_error"][statistics_scale].items():
        rows[label, statistics_scale]["spectrum_error"] = {"value": error, "low": None}
    lines = edits_table(results["distance_name"], summary(clip_score=source_scores), rows)
    return f"{markdown(lines)}\n\n[95 % bootstrap intervals] over {count} edits."


def _all_statistics(
    out: Path, scale: str, complete: Mapping[str, Any], sources: Tensor, batch_size: int
) -> dict[str, tuple[Tensor, Tensor]]:
    """`_statistics` of the sources, as 'source', and of each loss that is complete at a scale."""
    found = {"source": _statistics(sources.split(batch_size))}
    for label in (label for label, scales in complete.items() if scale in scales):
        files = [_picture(out, label, scale, i) for i in range(len(sources))]
        found[label] = _statistics(
            torch.stack([read_image(file) for file in files[at : at + batch_size]])
            for at in range(0, len(files), batch_size)
        )
    return found


def _spectrum_errors(statistics: Mapping[str, tuple[Tensor, Tensor]]) -> dict[str, float]:
    """`lmc.measure.metrics.spectrum_error` of each loss to the sources."""
    from lmc.measure.metrics import spectrum_error

    source, _ = statistics["source"]
    return {
        label: spectrum_error(spectrum, source).item()
        for label, (spectrum, _) in statistics.items()
        if label != "source"
    }


def _write_figures(
    out: Path, results: Mapping[str, Any], statistics: Mapping[str, tuple[Tensor, Tensor]]
) -> None:
    """fig5.png of every loss and scale in `results` that is complete, fig6.png of `statistics`."""
    from lmc.measure.figures import curves_figure, statistics_figure

    curves = {
        label: [(mean["clip_score"], mean["distance"], scale) for scale, mean in scales.items()]
        for label, scales in results["means"].items()
        if scales
    }
    curves["source"] = [(results["source"], 0.0, "")]
    name = f"{results['distance_name']} to source"
    figure = curves_figure(curves, "CLIP score", name)
    save_whole(out / "fig5.png", figure.savefig, "png")
    figure = statistics_figure(
        {label: spectrum for label, (spectrum, _) in statistics.items()},
        {label: histogram for label, (_, histogram) in statistics.items()},
    )
    save_whole(out / "fig6.png", figure.savefig, "png")


def _statistics(batches: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    """The mean power spectrum (F,) and the histogram of vertical derivatives (bins,) of images.

    Args:
        batches: (B, 3, S, S) in [-1, 1] each; one at a time is held.
    """
    from lmc.measure.metrics import derivative_counts, power_spectrum

    spectra = counts = torch.zeros(())
    seen = 0
    # Sums, since a small tensor kept from each batch lies in the way of the next one's memory.
    for images in batches:
        spectra = spectra + power_spectrum(images).double().sum(0)
        counts = counts + derivative_counts(images).double().sum(0)
        seen += len(images)
    return (spectra / seen).float(), (counts / counts.sum()).float()


def _picture(out: Path, label: str, scale: str, row: int) -> Path:
    """The file of a result; of the loss the label alone is asked for, its class may be gone."""
    return out / "images" / Spec(label, "").folder() / scale / f"{row:04d}.png"
