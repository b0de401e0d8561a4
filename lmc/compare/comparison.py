"""`lmc compare`: the translator with one loss after another at equal steps and seeds, measured."""

import sys
from functools import partial
from pathlib import Path
from typing import Any

from lmc.compare.checks import check, claim, configure, embed
from lmc.compare.measured import draw, measure_run, measures, not_measured, row_of
from lmc.compare.runs import recorded, run_of, train_all
from lmc.configs import parse_seeds
from lmc.device import choose_device
from lmc.files import write_json, write_text
from lmc.measure.commands import report
from lmc.measure.comparison import rows_over_seeds
from lmc.measure.metrics import Clip, load_classifier
from lmc.measure.tables import markdown
from lmc.specs import parse_specs
from lmc.training.cli import ConfigReader
from lmc.training.translator import TranslatorTraining


def compare(
    training: list[str],
    *,
    losses: list[str] | str | None = None,
    seeds: list[int] | int | str | None = None,
    out: Path | None = None,
    clip: str = "openai/clip-vit-base-patch16",
    truth: Path | None = None,
    real: str | None = None,
    classifier: str | None = None,
    jobs: int = 1,
    overrides: list[str] | None = None,
    device: str = "auto",
) -> None:
    """Train the translator with several losses and measure each; one table, picture and report.

    OUT gets results.json, table.md, grid.png and report.html, and a run folder LOSS/seedK each,
    with log.txt. What is done there already is not done again, and stays in all of them. A training
    that fails does not end the others; the exit status is 1 then.

    Args:
        training: configuration of train_translator.py, or several, each over the one before.
        losses: such as lmc,sds,sds:guidance_scale=100; a loss is a name or a class path, a key an
            option of it, or time, how t is drawn, in place of the configuration's; quotes around a
            loss with a comma in it; default all but `csd` and `dvrf`.
        seeds: each loss once with each; default the configuration's seed_everything.
        out: folder to write; default runs/compare/ and the name of the first configuration.
        clip: that measures, folder or hub id.
        truth: true counterparts of the held-out images, to measure against: DIR/CLASS/KEY.png.
        real: real images of the target classes, for CMMD: DIR/CLASS/*.png, or shards with the class
            as label.
        classifier: MODULE:FUNCTION of your own, a judge that is independent of prior and CLIP: see
            lmc evaluate.
        jobs: trainings side by side; each has GPUs of its own, where there are as many.
        overrides: options of every training in place of the configuration's; they may also stand
            at the end, after --: such as -- --trainer.max_steps=100.
        device: to measure on: cpu, cuda, …; default the GPU where there is one.

    Raises:
        OSError, ValueError: the configuration, a loss or a folder is not what it must be. Nothing
            was trained.
    """
    device = choose_device(device)
    if jobs < 1:
        raise ValueError(f"jobs must be at least 1, got {jobs}")
    specs = parse_specs(losses)
    out = out or Path("runs/compare") / Path(training[0]).stem
    base = [*(f"--config={file}" for file in training), *(overrides or [])]
    reader = ConfigReader(TranslatorTraining)
    configs = {spec.label: configure(reader, spec, [*base, f"--run={out}"]) for spec in specs}
    common = next(iter(configs.values()))
    own = common["seed_everything"]
    numbers = parse_seeds((own if type(own) is int else 0) if seeds is None else seeds)
    checked = check(configs)
    judge = load_classifier(classifier, device) if classifier else None
    by = measures(Clip(clip, device), truth, real, judge, common, device)
    embed(checked)
    noted = claim(out, configs, checked)
    named = [run_of(out, spec, seed, configs[spec.label]) for spec in specs for seed in numbers]
    try:
        failed = train_all(named, base, jobs)
    except KeyboardInterrupt:
        sys.exit("lmc: stopped; the same command goes on")
    runs = recorded(out, noted, common, named)
    measure = partial(measure_run, by=by, config=common, device=device)
    source = measure(None, out / "source", "the source images")
    by_loss: dict[str, dict[str, Any]] = {run.spec.label: {} for run in runs}
    for run in runs:
        try:
            row = failed.get(run.name) or row_of(run, measure)
        except Exception as error:  # whatever it is, the others have their rows
            row = failed[run.name] = not_measured(run, error)
        by_loss[run.spec.label][str(run.seed)] = row
    lines = [f"{name} failed, see {row['log']}" for name, row in failed.items()]
    text = "\n\n".join([markdown(rows_over_seeds(source, by_loss)), *lines])
    write_json(out / "results.json", {"source": source, "losses": by_loss})
    write_text(out / "table.md", text + "\n")
    print(text)
    # Of each loss the first seed that did not fail.
    shown = {run.spec.label: run.folder for run in reversed(runs) if run.name not in failed}
    lines += draw(dict(reversed(shown.items())), common, out, by.truth)
    print(f"written: {out}/table.md, results.json, grid.png")
    problem = ""
    try:
        report([str(out)], out=out / "report.html", shards=common["data"]["heldout"])
    except (OSError, ValueError) as error:  # what failed before it is to be said all the same
        problem = f"report.html is not written: {error}"
        print(problem, flush=True)
    if lines:
        sys.exit(
            f"lmc: {len(lines)} trainings failed, or could not be measured; the same command tries "
            "them again"
        )
    if problem:
        sys.exit(f"lmc: {problem}")
