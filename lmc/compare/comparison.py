"""The translator trained with one loss after another at equal steps and seeds, and measured."""

import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch.utils.data import DataLoader

from lmc.compare.side_by_side import TrainingFailed, Trainings
from lmc.corrector import BiasCorrector
from lmc.files import whole, write_json, write_text
from lmc.load import load_averaged
from lmc.losses import ScoreDistillation
from lmc.measure.evaluate import Prompts, Tools, evaluate, translated
from lmc.measure.figures import labelled_grid
from lmc.measure.metrics import Clip, distances
from lmc.measure.results import VERSION, combine, numbers
from lmc.measure.tables import markdown, seeds_table
from lmc.priors import Prior
from lmc.schedule import TimeSchedule
from lmc.shards.images import ImageStream
from lmc.specs import Spec, build
from lmc.training.cli import ConfigReader
from lmc.training.dry_run import build_model, per_image
from lmc.training.resume import differences
from lmc.training.translator import TranslatorTraining
from lmc.translator import Translator

BATCH, PICTURES = 50, 10  # held-out images at a time, and in the picture
COLUMNS = {
    "evaluations_per_image": ("evaluations per image and step", ".0f"),
    "seconds": ("seconds of training", ".0f"),
}
# Of a configuration's model: what every loss of a comparison has of its own.
OF_EACH = ("loss", "time")
Say = Callable[[str], None]


@dataclass(frozen=True)
class Checked:
    """What the configurations of a comparison, one a loss, were found to hold.

    Attributes:
        prior: theirs.
        prompts: of every loss.
        negative: the negative prompts, by label of the losses that have one.
        correctors: `BiasCorrector.digest`, by the name the losses give, such as a folder.
    """

    prior: Prior
    prompts: Sequence[str]
    negative: Mapping[str, str]
    correctors: Mapping[str, str]


@dataclass(frozen=True)
class Run:
    """A training: a loss and a seed.

    Attributes:
        spec, seed: which.
        folder: its run folder.
        steps: how many it shall have.
        evaluations: of the denoiser, per image and step; None is not known.
    """

    spec: Spec
    seed: int
    folder: Path
    steps: int
    evaluations: int | None

    @property
    def name(self) -> str:
        """As messages say it."""
        return f"{self.spec.label} seed {self.seed}"


def compare(
    config: Path,
    out: Path,
    clip: str,
    specs: Sequence[Spec],
    seeds: Sequence[int] | None = None,
    overrides: Sequence[str] = (),
    jobs: int = 1,
    device: str = "cpu",
    say: Say = print,
) -> list[str]:
    """Train with every loss and seed, measure on the held-out images, write the comparison.

    `out` gets results.json, table.md and grid.png, and a run folder LOSS/seedK each, with log.txt.
    What is done there already is not done again, and stays in all three.

    Args:
        config: of train_translator.py.
        out: folder to write.
        clip: folder or hub id of the CLIP model that measures.
        specs: the losses.
        seeds: None is the configuration's own.
        overrides: further arguments of every training, such as --trainer.max_steps=100.
        jobs: trainings side by side.
        device: where the measuring runs.
        say: where lines of progress go.

    Returns:
        What failed, a line each: the name of the training, or of its measurement, and its log.

    Raises:
        OSError, ValueError: the configuration, a loss or a folder is not what it must be. Nothing
            was trained.
    """
    base = [f"--config={config}", *overrides]
    reader = ConfigReader(TranslatorTraining)
    configs = {spec.label: _configure(reader, spec, [*base, f"--run={out}"]) for spec in specs}
    common = next(iter(configs.values()))
    if seeds is None:
        own = common["seed_everything"]
        seeds = [own if type(own) is int else 0]
    checked = _check(configs)
    model = Clip(clip, device)
    say("embedding the prompts that are not in the cache yet")
    _embed(checked)
    losses = _claim(out, configs, checked)
    named = [_run(out, spec, seed, configs[spec.label]) for spec in specs for seed in seeds]
    failed = _train(named, base, jobs, say)
    runs = _recorded(out, losses, common, named)
    measure = partial(_measure, clip=model, config=common, device=device, say=say)
    source = measure(None, out / "source", "the source images")
    by_loss: dict[str, dict[str, Any]] = {run.spec.label: {} for run in runs}
    for run in runs:
        try:
            row = failed.get(run.name) or _row(run, measure)
        except Exception as error:  # whatever it is, the others have their rows
            row = failed[run.name] = _not_measured(run, error, say)
        by_loss[run.spec.label][str(run.seed)] = row
    lines = [f"{name} failed, see {row['log']}" for name, row in failed.items()]
    text = "\n\n".join([_table(source, by_loss), *lines])
    write_json(out / "results.json", {"source": source, "losses": by_loss})
    write_text(out / "table.md", text + "\n")
    # Of each loss the first seed that did not fail.
    shown = {run.spec.label: run.folder for run in reversed(runs) if run.name not in failed}
    say(text)
    lines += _picture(dict(reversed(shown.items())), common, out, say)
    return lines


def read_comparison(out: Path) -> tuple[dict[str, Any], list[list[str]]]:
    """A comparison for its report.

    Returns:
        One result (docs/evaluation.md) with a row a loss, of its first seed that was measured; and
        the table over seeds as rows of cells, empty where no loss has two.

    Raises:
        FileNotFoundError: `out` holds no finished comparison.
        ValueError: see `lmc.measure.results.combine`.
    """
    if not (out / "results.json").exists():
        raise FileNotFoundError(f"{out} holds no finished comparison: lmc compare --out {out}")
    compared = json.loads((out / "results.json").read_text())
    config = json.loads((out / "comparison.json").read_text())["config"]
    found = {"source": json.loads((out / "source/evaluation.json").read_text())["measured"]}
    failed = []
    for label, seeds in compared["losses"].items():
        failed += [f"{label} seed {seed} failed" for seed, row in seeds.items() if "failed" in row]
        seed = next((seed for seed, row in seeds.items() if "failed" not in row), None)
        if seed is None:
            continue
        folder = out / Spec(label, "").folder() / f"seed{seed}"
        measured = json.loads((folder / "evaluation.json").read_text())["measured"]
        row = measured["rows"][f"{label} seed {seed}"]
        found[label] = {**measured, "rows": {label: {**row, "path": str(folder)}}}
    result = combine(found, next((name for name in found if name != "source"), None))
    data = config["data"]
    where = {"shards": data["heldout"], "image_size": data["image_size"]}
    result["heldout"] = {**where, **result["heldout"]}
    result["left_out"] = [*result["left_out"], *failed]
    several = any(len(seeds) > 1 for seeds in compared["losses"].values())
    return result, _rows_over_seeds(compared["source"], compared["losses"]) if several else []


def _run(out: Path, spec: Spec, seed: int, config: Mapping[str, Any]) -> Run:
    """A run of the comparison in `out`; `config` has the loss."""
    try:
        evaluations = per_image(config["model"])[0]
    except (ImportError, AttributeError):  # a class of the user's that is no longer there
        evaluations = None
    steps = config["trainer"]["max_steps"]
    return Run(spec, seed, out / spec.folder() / f"seed{seed}", steps, evaluations)


def _recorded(
    out: Path, losses: Mapping[str, Any], common: Mapping[str, Any], named: Sequence[Run]
) -> list[Run]:
    """The runs named this time and those finished before, in the order of comparison.json."""
    runs: list[Run] = []
    for label, own in losses.items():
        here = {run.seed: run for run in named if run.spec.label == label}
        config = {**common, "model": {**common["model"], **own}}
        spec = Spec(label, own["loss"]["class_path"])
        for folder in (out / spec.folder()).glob("seed*"):
            seed = folder.name.removeprefix("seed")
            if seed.isdecimal() and _steps_done(folder) >= common["trainer"]["max_steps"]:
                here.setdefault(int(seed), _run(out, spec, int(seed), config))
        runs += [here[seed] for seed in sorted(here)]
    return runs


def _table(source: Mapping[str, Any], by_loss: Mapping[str, Mapping[str, Any]]) -> str:
    """The rows of results.json as Markdown, the seeds of a loss as one."""
    return markdown(_rows_over_seeds(source, by_loss))


def _rows_over_seeds(
    source: Mapping[str, Any], by_loss: Mapping[str, Mapping[str, Any]]
) -> list[list[str]]:
    """The rows of results.json as cells, the seeds of a loss as one."""
    rows: dict[str, Any] = {"source": source}
    for label, seeds in by_loss.items():
        good = [row for row in seeds.values() if "failed" not in row]
        some = f" ({len(good)} of {len(seeds)} seeds)" if 0 < len(good) < len(seeds) else ""
        rows[label + some] = good
    return seeds_table(rows, COLUMNS)


def _configure(reader: ConfigReader, spec: Spec, args: Sequence[str]) -> dict[str, Any]:
    """The whole configuration of a training with this loss."""
    try:
        return reader.read([*args, *spec.arguments()])
    except ValueError as error:
        raise ValueError(f"the loss {spec.label!r}: {' '.join(str(error).split())}") from error


def _check(configs: Mapping[str, dict[str, Any]]) -> Checked:
    """Find out what is wrong with the configurations, by label, as far as it needs no weights."""
    seen: dict[str, str] = {}
    negative: dict[str, str] = {}
    correctors: dict[str, BiasCorrector] = {}
    for label, config in configs.items():
        same = seen.setdefault(json.dumps([config["model"][name] for name in OF_EACH]), label)
        if same != label:
            raise ValueError(
                f"the losses {same!r} and {label!r} are one and the same with this configuration"
            )
        try:
            loss = build(ScoreDistillation, config["model"]["loss"])
            loss.choose_time(_time(config["model"]["time"]))
        except (OSError, ValueError) as error:
            raise ValueError(f"the loss {label!r}: {error}") from error
        if loss.negative_prompt is not None:
            negative[label] = loss.negative_prompt
        if isinstance(corrector := getattr(loss, "corrector", None), BiasCorrector):
            correctors[label] = corrector
    config = next(iter(configs.values()))
    if config["trainer"]["max_steps"] < 1:
        raise ValueError("trainer.max_steps must say how many steps to train")
    prior = build(Prior, config["model"]["prior"])
    model: Any = build_model(TranslatorTraining, config["model"], prior)
    for split in ("train", "heldout"):
        data = config["data"]
        ImageStream(data[split], data["image_size"], 1, training=False).check()
    digests = {}
    for label, corrector in correctors.items():
        try:
            corrector.check_prior(prior.identity)
        except ValueError as error:
            raise ValueError(f"the loss {label!r}: {error}") from error
        digests[_corrector_name(configs[label]["model"]["loss"])] = corrector.digest()
    return Checked(prior, model.prompts, negative, digests)


def _embed(checked: Checked) -> None:
    """Embed all prompts into the cache, so that no training loads a text encoder of its own.

    Raises:
        ValueError: the prior, a class-conditional one, does not know a prompt; says whose it is.
    """
    prior, negative = checked.prior, checked.negative
    try:
        prior.embed([*checked.prompts, *negative.values()])
        return
    except ValueError as error:
        # Whose it was is asked then only: all in one call load the text encoder once.
        for label, prompt in negative.items():
            try:
                prior.embed([prompt])
            except ValueError as its_own:
                raise ValueError(
                    f"the loss {label!r}: {its_own}: set negative_prompt to ''"
                ) from its_own
        raise ValueError(f"model.prompt, for every loss: {error}") from error


def _time(config: dict[str, Any] | None) -> TimeSchedule | None:
    try:
        return None if config is None else build(TimeSchedule, config)
    except ValueError as error:
        raise ValueError(f"model.time: {error}") from error


def _claim(out: Path, configs: Mapping[str, dict[str, Any]], checked: Checked) -> dict[str, Any]:
    """Note in the folder what is compared there, and refuse the comparison of something else.

    What never made a step, as where a training fails at once, stands in nothing's way.

    Returns:
        All losses that are compared there, of earlier times too: OF_EACH by label.
    """
    file = out / "comparison.json"
    first = next(iter(configs.values()))
    apart = ("run", "seed_everything")
    config: dict[str, Any] = {key: value for key, value in first.items() if key not in apart}
    # What is looked at while training changes nothing of what is trained.
    not_shared = (*OF_EACH, "validation")
    config["model"] = {k: value for k, value in first["model"].items() if k not in not_shared}
    here: dict[str, Any] = {
        "config": config,
        "prior": checked.prior.identity,
        "losses": {k: {name: c["model"][name] for name in OF_EACH} for k, c in configs.items()},
        "correctors": checked.correctors,
    }
    if file.exists():
        there = json.loads(file.read_text())
        if "prior" not in there:
            raise ValueError(
                f"{out} holds a comparison of an earlier version: name another (--out)"
            )
        begun = [label for label in there["losses"] if _begun(out, label)]
        if begun:
            _check_same(out, there, here, begun)
        else:
            (out / "source" / "evaluation.json").unlink(missing_ok=True)  # of other images, maybe
        losses = {label: there["losses"][label] for label in begun}
        names = {_corrector_name(own["loss"]) for own in losses.values()}
        correctors = {name: x for name, x in there["correctors"].items() if name in names}
        here["losses"] = losses | here["losses"]
        here["correctors"] = correctors | here["correctors"]
    elif out.exists() and any(out.iterdir()):
        raise ValueError(f"{out} is there and is no comparison: name another folder (--out)")
    out.mkdir(parents=True, exist_ok=True)
    write_json(file, here)
    return here["losses"]


def _corrector_name(loss: Mapping[str, Any]) -> str:
    """What the configuration of a loss calls its corrector."""
    return str((loss.get("init_args") or {}).get("corrector"))


def _begun(out: Path, label: str) -> bool:
    """Whether a training with this loss has made a step."""
    return any(_steps_done(folder) > 0 for folder in (out / Spec(label, "").folder()).glob("seed*"))


def _check_same(
    out: Path, there: Mapping[str, Any], here: Mapping[str, Any], begun: Sequence[str]
) -> None:
    """Refuse to go on in `out` with something else than is there.

    Args:
        there, here: contents of comparison.json.
        begun: labels of the losses there that have made a step.

    Raises:
        ValueError: another configuration, prior, or loss or corrector of the same name.
    """
    both = [label for label in begun if label in here["losses"]]
    old, new = (
        {**x["config"], **{label: x["losses"][label] for label in both}} for x in (there, here)
    )
    different = [
        f"{key} is {before!r} there and {after!r} here"
        for key, before, after in differences(old, new)
    ]
    if different:
        raise ValueError(
            f"{out} holds the comparison of another configuration: {'; '.join(different[:5])}. "
            "Name another folder (--out)"
        )
    used = {_corrector_name(there["losses"][label]["loss"]) for label in begun}
    changed = [
        f"the corrector {name}"
        for name, digest in here["correctors"].items()
        if name in used and there["correctors"][name] != digest
    ]
    if there["prior"] != json.loads(json.dumps(here["prior"])):
        changed.append("the prior's weights")
    if changed:
        raise ValueError(
            f"{out} holds the comparison of something else of the same name: {', '.join(changed)} "
            "changed since. Name another folder (--out)"
        )


def _train(runs: Sequence[Run], base: Sequence[str], jobs: int, say: Say) -> dict[str, Any]:
    """Train what is not done yet; what failed by name: 'failed' (the log's end) and 'log'."""
    left = [run for run in runs if _steps_done(run.folder) < run.steps]
    say(f"{len(runs)} trainings, {len(runs) - len(left)} of them done already")
    failed: dict[str, Any] = {}
    threads = os.environ.get("OMP_NUM_THREADS") or max(1, (os.cpu_count() or 1) // jobs)
    trainings = Trainings(
        {run.name: run.steps for run in left},
        # One that is not known counts like DDS.
        {run.name: run.evaluations or 4 for run in left},
        int(threads),
        say,
    )

    def train(run: Run) -> None:
        log, times = run.folder / "log.txt", run.folder / "training.json"
        run.folder.mkdir(parents=True, exist_ok=True)
        seconds = json.loads(times.read_text())["seconds"] if times.exists() else 0.0
        command = [sys.executable, "-m", "lmc.training", "translator", "fit", *base]
        command += [*run.spec.arguments(), f"--run={run.folder}", f"--seed_everything={run.seed}"]
        start = time.monotonic()
        why = ""
        try:
            trainings.train(run.name, command, log)
        except TrainingFailed as error:
            why = error.tail
        finally:
            done = _steps_done(run.folder)
            seconds += time.monotonic() - start
            write_json(times, {"seconds": round(seconds, 1), "steps": done})
        if not why and done < run.steps:
            why = f"it ended after {done} of {run.steps} steps"
        if why:
            failed[run.name] = {"failed": why, "log": str(log)}
            say(f"{run.name} failed, see {log}:\n{why}")

    trainings.run([partial(train, run) for run in left], jobs)
    return {run.name: failed[run.name] for run in runs if run.name in failed}


def _steps_done(folder: Path) -> int:
    """The step of a run's checkpoint; 0 where there is none, or none that can be read."""
    file = folder / "checkpoints" / "last.ckpt"
    try:
        return torch.load(file, map_location="cpu", weights_only=True, mmap=True)["global_step"]
    except (FileNotFoundError, UnpicklingError, RuntimeError, EOFError):
        return 0  # the training itself says what is wrong with it


def _measure(
    run: Path | None,
    folder: Path,
    name: str,
    clip: Clip,
    config: Mapping[str, Any],
    device: str,
    say: Say,
) -> dict[str, Any]:
    """The numbers of a run's averaged weights, or of none; the whole result is kept in `folder`."""
    file = folder / "evaluation.json"
    model, data = config["model"], config["data"]
    tools = Tools(distances(data["image_size"]), clip)
    row = "source" if run is None else name
    about: dict[str, Any] = {
        "version": VERSION,
        "clip": clip.name,
        "distances": list(tools.distances),
    }
    if run is not None:
        checkpoint = (run / "checkpoints" / "last.ckpt").stat()
        about["checkpoint"] = [checkpoint.st_size, checkpoint.st_mtime_ns]
    if file.exists():
        there = json.loads(file.read_text())
        if there["of"] == about:
            return numbers(there["measured"]["rows"][row])
    stream = ImageStream(data["heldout"], data["image_size"], BATCH, training=False)
    targets = {target: model["prompt"].format(target) for target in model["classes"]}
    measured = evaluate(
        {row: None if run is None else translated(_translator(run).to(device))},
        lambda: DataLoader(stream, batch_size=None),
        tools,
        Prompts(targets, [*targets.values(), model["prompt"].format(model["source"])]),
        device,
    )
    write_json(file, {"of": about, "measured": measured})
    say(f"measured {name}: {measured['heldout']['count']} images")
    return numbers(measured["rows"][row])


def _row(run: Run, measure: Callable[..., dict[str, Any]]) -> dict[str, Any]:
    """What results.json says of a finished run."""
    file = run.folder / "training.json"
    # Absent where this process was killed after the training's last checkpoint: how long it took
    # is then not known.
    seconds = json.loads(file.read_text())["seconds"] if file.exists() else None
    return {
        **measure(run.folder, run.folder, run.name),
        "seconds": seconds,
        "steps": _steps_done(run.folder),
        "evaluations_per_image": run.evaluations,
    }


def _not_measured(run: Run, error: Exception, say: Say) -> dict[str, Any]:
    """The row of a run that was trained and cannot be measured; the whole error is in its log."""
    log = run.folder / "log.txt"
    with open(log, "a") as file:
        traceback.print_exception(error, file=file)
    why = f"it cannot be measured: {error}"
    say(f"{run.name} failed, see {log}:\n{why}")
    return {"failed": why, "log": str(log)}


def _picture(runs: Mapping[str, Path], config: Mapping[str, Any], out: Path, say: Say) -> list[str]:
    """grid.png: held-out images, then a block a loss with a row a class, of the same images.

    Returns:
        A line for each loss that could not be drawn.
    """
    data, model = config["data"], config["model"]
    stream = ImageStream(data["heldout"], data["image_size"], PICTURES, training=False)
    source = next(iter(stream)).image
    blocks = {"held-out images": {model["source"]: source}}
    lines: list[str] = []
    for label, run in runs.items():
        try:
            translator = _translator(run)
            with torch.no_grad():
                blocks[label] = {
                    target: translator(source, translator.class_ids([target] * len(source)))
                    for target in model["classes"]
                }
        except Exception as error:  # as with the table
            lines.append(f"{label} is not in grid.png: {error}")
            say(lines[-1])
    with whole(out / "grid.png") as partial_file:
        labelled_grid(blocks).save(partial_file, "png")
    return lines


def _translator(run: Path) -> Translator:
    network, _ = load_averaged(run)
    assert isinstance(network, Translator)
    return network
