"""`lmc compare`: the translator of a configuration with one loss after another."""

import argparse
import json
import sys
from pathlib import Path

from lmc.cli import report


def compare(args: argparse.Namespace) -> None:
    """Train and measure; ends with an error where a training failed."""
    from lmc.compare.comparison import compare
    from lmc.specs import parse_specs

    out = args.out or Path("runs/compare") / args.config.stem
    try:
        failed = compare(
            args.config,
            out,
            args.clip,
            parse_specs(args.losses),
            args.seeds,
            args.overrides,
            args.jobs,
            args.device,
            lambda line: print(line, flush=True),
        )
    except KeyboardInterrupt:
        sys.exit("lmc: stopped; the same command goes on")
    print(f"written: {out}/table.md, results.json, grid.png")
    problem = ""
    try:
        # As the configuration has just said, where they may be a URL or command.
        data = json.loads((out / "comparison.json").read_text())["config"]["data"]
        report.write([str(out)], out / "report.html", shards=data["heldout"])
    except (OSError, ValueError) as error:  # what failed before it is to be said all the same
        problem = f"report.html is not written: {error}"
        print(problem, flush=True)
    if failed:
        sys.exit(
            f"lmc: {len(failed)} trainings failed, or could not be measured; the same command "
            "tries them again"
        )
    if problem:
        sys.exit(f"lmc: {problem}")


def seeds(text: str) -> list[int]:
    """'0,1,2' as numbers, for argparse."""
    numbers = [int(part) for part in text.split(",")]
    if min(numbers) < 0 or len(set(numbers)) < len(numbers):
        raise ValueError(text)
    return numbers


def jobs(text: str) -> int:
    """A number of processes, for argparse."""
    if int(text) < 1:
        raise ValueError(text)
    return int(text)


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Add the command to those of `lmc`."""
    command = commands.add_parser(
        "compare", help="train the translator with several losses and measure each"
    )
    command.set_defaults(run_command=compare)
    command.add_argument(
        "--config", type=Path, required=True, metavar="YAML", help="of train_translator.py"
    )
    command.add_argument(
        "--losses",
        metavar="LOSS[:KEY=VALUE …],…",
        help="such as lmc,sds,sds:guidance_scale=100; a loss is a name or a class path, a key an "
        "option of it, or time, how t is drawn, in place of the configuration's; quotes around a "
        "loss with a comma in it; default every loss there is",
    )
    command.add_argument(
        "--seeds",
        type=seeds,
        metavar="N,…",
        help="each loss once with each; default the configuration's seed_everything",
    )
    command.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="folder to write; what is done there is kept; default runs/compare/ and the "
        "configuration's name",
    )
    command.add_argument(
        "--clip", default="openai/clip-vit-base-patch16", help="folder or hub id (%(default)s)"
    )
    command.add_argument(
        "--jobs", type=jobs, default=1, metavar="N", help="trainings side by side (%(default)s)"
    )
    command.add_argument(
        "--device", default="cpu", help="to measure on: cpu, cuda, … (%(default)s)"
    )
    command.add_argument(
        "overrides",
        nargs="*",
        metavar="-- --KEY=VALUE",
        help="options of every training in place of the configuration's, after --: such as "
        "-- --trainer.max_steps=100",
    )
