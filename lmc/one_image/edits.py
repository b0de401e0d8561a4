"""`lmc edits`: every edit of a list with every loss at every guidance scale, measured."""

import hashlib
import inspect
import json
import pkgutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lmc.configs import parse_numbers
from lmc.device import choose_device
from lmc.errors import message
from lmc.files import write_json, write_text
from lmc.losses import ScoreDistillation, embed_prompts
from lmc.one_image.edits_results import Measure, go_on, means, picture, write_results
from lmc.one_image.job import (
    RECORD,
    RESULTS,
    Job,
    corrector_digest,
    read_image,
    save_image,
)
from lmc.optimize import Comparison, Pixels, Synthesis, check_task, optimize
from lmc.priors import Prior
from lmc.progress import Progress
from lmc.shards.images import middle_square
from lmc.specs import Spec, denoiser_evaluations, parse_specs

Watch = Callable[[int], None]
EDIT_KEYS = {"image", "source_prompt", "prompt"}


@dataclass(frozen=True)
class Edit:
    """A line of a list of edits."""

    image: str
    source_prompt: str
    prompt: str


def edits(
    *,
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
    device: str = "auto",
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
            default is every loss of lmc.losses but `csd` and `dvrf`.
        corrector: of the losses that take one and name none, such as lmc.
        guidance_scales: with commas.
        statistics_scale: the one of them that fig6.png and the spectrum error are of.
        size: side of the images in pixels; the middle square of each is resized to it.
        settings: the defaults are the paper's.
        seed: of the first edit; the second has the next, and so on.
        batch_size: edits at once.
        device: cpu, cuda, …; default the GPU where there is one.

    Raises:
        OSError, ValueError: a file or option is not what it must be; nothing is loaded then.
    """
    from lmc.measure.metrics import distances

    device = choose_device(device)
    numbers = parse_numbers(guidance_scales, "guidance_scales", float)
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    if statistics_scale not in numbers:
        raise ValueError(f"statistics_scale {statistics_scale:g} is not among guidance_scales")
    every = read_list(list)
    sources = torch.cat([middle_square(read_image(Path(e.image))[None], size) for e in every])
    task = Task(prior, every, sources, parse_specs(losses), numbers, corrector, settings, seed)
    task.check()
    task.embed()
    named = distances(size)  # by name
    made_with = task.made_with() | {"clip": _resolved(clip), "distances": [*named], "size": size}
    results = go_on(out, made_with)
    write_text(out / RECORD, record)
    measure = Measure(clip, device, [e.prompt for e in every], sources, named)
    results["distance_name"] = measure.name
    source_scores = measure.source_scores()
    results["source"] = sum(source_scores) / len(source_scores)
    failed = _run_all(task, results, out, measure, batch_size, device)
    results["means"] = means(results["results"], len(every))
    write_json(out / RESULTS, results)
    table = write_results(out, results, sources, source_scores, f"{statistics_scale:g}", batch_size)
    print(table)
    print(f"{out}/{RESULTS}, table.md, fig5.png and fig6.png: {len(every)} edits of each loss")
    if failed:
        sys.exit(
            f"lmc: failed: {', '.join(failed)} (why is in {out}/{RESULTS}); "
            "the same command tries them again"
        )


class Task:
    """Edits under losses and guidance scales.

    Args:
        prior: the diffusion model.
        edits: N of them.
        sources: (N, 3, S, S) in [-1, 1].
        specs, scales: the losses and ω, each with each.
        corrector: of the losses that take one and name none.
        settings: of the optimisation.
        seed: of the first edit; the second has the next, and so on.

    Raises:
        OSError, ValueError: a loss cannot be built.
    """

    def __init__(
        self,
        prior: Prior,
        edits: Sequence[Edit],
        sources: Tensor,
        specs: Sequence[Spec],
        scales: Sequence[float],
        corrector: str | None,
        settings: Synthesis,
        seed: int,
    ) -> None:
        self.prior, self.edits, self.sources, self.specs = prior, edits, sources, specs
        self.scales, self.corrector, self.settings, self.seed = scales, corrector, settings, seed
        self.losses = {
            (spec.label, scale): _build(spec, corrector, scale)
            for spec in specs
            for scale in scales
        }
        self.times = {spec.label: spec.schedule() for spec in specs}

    def check(self) -> None:
        """Refuse what cannot work, before any weights are loaded.

        Raises:
            ValueError: see `check_task` and `ScoreDistillation.choose_time`.
        """
        for (label, _), loss in self.losses.items():
            loss.choose_time(self.times[label])
            check_task(Pixels(self.sources[[0]]), **self.job(loss, [0]).arguments())

    def embed(self) -> None:
        """All prompts, into the cache."""
        prompts = [p for each in self.edits for p in (each.source_prompt, each.prompt)]
        embed_prompts(
            self.prior, prompts, self.losses.values(), [each.prompt for each in self.edits]
        )

    def made_with(self) -> dict[str, Any]:
        """What the results follow from."""
        identity = {
            name: _resolved(value) if name == "pretrained" else value
            for name, value in self.prior.identity.items()
        }
        return {
            "settings": asdict(self.settings),
            "prior": identity,
            "seed": self.seed,
            "edits": [asdict(each) | {"image": _file_digest(each.image)} for each in self.edits],
            "correctors": {
                spec.label: corrector_digest(self.losses[spec.label, self.scales[0]])
                for spec in self.specs
            },
        }

    def job(self, loss: ScoreDistillation, rows: Sequence[int]) -> Job:
        """Some of the edits, by number."""
        return Job(
            self.prior,
            loss,
            [self.edits[i].prompt for i in rows],
            [self.seed + i for i in rows],
            self.settings,
            self.sources[rows],
            [self.edits[i].source_prompt for i in rows],
        )

    def work(self, spec: Spec, scale: float, steps: int, images: int) -> int:
        """The denoiser's evaluations in the first `steps`; of a user's loss, as if of SDS."""
        loss = self.losses[spec.label, scale]
        each, _ = denoiser_evaluations(type(loss), vars(loss))
        return (each or 2) * self.settings.parts(steps) * images

    def run(
        self, spec: Spec, scale: float, rows: Sequence[int], device: str, watch: Watch
    ) -> Tensor:
        """The results of some of the edits, (len(rows), 3, S, S) in [-1, 1] on the CPU."""
        loss = self.losses[spec.label, scale]
        if loss.learns:  # what it learned of other edits is not for these
            loss = _build(spec, self.corrector, scale)
        images = optimize(
            Pixels(self.sources[rows]),
            **self.job(loss, rows).arguments(),
            time=self.times[spec.label],
            device=device,
            watch=watch,
        )
        return images.float().cpu().clamp(-1, 1)


def _run_all(
    task: Task,
    results: dict[str, Any],
    out: Path,
    measure: Measure,
    batch_size: int,
    device: str,
) -> dict[str, str]:
    """Run and measure what `results` has not yet; what failed, by name, with the reason."""
    runs = []
    for spec in task.specs:
        for scale in task.scales:
            done = results["results"].get(spec.label, {}).get(f"{scale:g}", {})
            runs.append((spec, scale, [i for i in range(len(task.edits)) if str(i) not in done]))
    steps = task.settings.steps
    total = sum(task.work(spec, scale, steps, len(rows)) for spec, scale, rows in runs)
    failed: dict[str, str] = {}
    with Progress("editing", total, "evaluations") as progress:

        def run(spec: Spec, scale: float, rows: Sequence[int]) -> None:
            before, name = progress.done, f"{spec.label} at {scale:g}"

            def watch(done: int) -> None:
                progress.update(before + task.work(spec, scale, done, len(rows)), name)

            images = task.run(spec, scale, rows, device, watch)
            measured = results["results"].setdefault(spec.label, {}).setdefault(f"{scale:g}", {})
            for row, image, each in zip(rows, images, measure(images, rows), strict=True):
                save_image(image, picture(out, spec.label, f"{scale:g}", row))
                measured[str(row)] = each
            write_json(out / RESULTS, results)
            progress.say(f"{name}: {len(rows)} edits done")

        for spec, scale, rows in runs:
            name = f"{spec.label} at {scale:g}"
            end = progress.done + task.work(spec, scale, steps, len(rows))
            try:
                for at in range(0, len(rows), batch_size):
                    run(spec, scale, rows[at : at + batch_size])
            except (ValueError, FloatingPointError, RuntimeError, TypeError) as error:
                failed[name] = f"{type(error).__name__}: {message(error)}"
                progress.say(f"{name} failed: {failed[name]}")
                progress.update(
                    progress.done, name, total=(progress.total or 0) - end + progress.done
                )
    tried = {f"{spec.label} at {scale:g}" for spec, scale, _ in runs}
    others = {n: why for n, why in results.get("failed", {}).items() if n not in tried}
    results["failed"] = others | failed
    return failed


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
