"""Seconds a step by loss, beside the evaluations of the denoiser that it takes.

    make demo
    python benchmarks/losses.py

Trains the demo's translator a few steps with each loss that `lmc compare` takes by default, one
after the other, in rounds; a loss's share is of the step of SDS in the same round, and the median
of the rounds counts. Prints a table, then JSON (or writes it to --json).
"""

import argparse
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from growth import Alone
from step import TRANSLATOR, measure

from lmc.files import write_json
from lmc.specs import LOSSES
from lmc.training.cli import ConfigReader
from lmc.training.dry_run import per_image
from lmc.training.translator import TranslatorTraining


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    by_default = [name for name, loss in LOSSES.items() if loss.by_default]
    parser.add_argument("--losses", nargs="+", choices=[*LOSSES], default=by_default)
    parser.add_argument("--steps", type=int, default=16, help="of each training (%(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="(%(default)s)")
    parser.add_argument("--json", type=Path, help="write the figures there as well")
    args = parser.parse_args(argv)
    names = ["sds", *(name for name in args.losses if name != "sds")]
    options = {name: [f"--model.loss={LOSSES[name].__name__}"] for name in names}
    options["lmc"] = []  # the configuration's own, with its corrector
    reader = ConfigReader(TranslatorTraining)
    rows: dict[str, dict[str, Any]] = {name: {"ms": [], "over_sds": []} for name in names}
    for each in range(args.rounds):
        for name, row in rows.items():
            print(f"round {each + 1} of {args.rounds}, {name} …", flush=True)
            took = measure(TranslatorTraining, TRANSLATOR, args.steps, options[name], Alone)
            row["ms"].append(took["step"])
            row["over_sds"].append(took["step"] / rows["sds"]["ms"][-1])
    print("| loss | evaluations an image | a step, ms | over SDS |\n|---|---|---|---|")
    for name, row in rows.items():
        config = reader.read([f"--config={TRANSLATOR}", *options[name]])
        row["evaluations"] = per_image(config["model"])[0]
        for key in ("ms", "over_sds"):
            row[key] = statistics.median(row[key])
        print(f"| {name} | {row['evaluations']} | {row['ms']:.0f} | {row['over_sds']:.2f} |")
    print(json.dumps(rows))
    if args.json:
        write_json(args.json, rows)


if __name__ == "__main__":
    main()
