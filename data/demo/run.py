"""The whole way on the demo world, in one command: `make demo`.

Draws the shards, trains the corrector, trains a translator with each of three losses, evaluates
them on the held-out cats, and writes into runs/demo/ the releases, results.json, grid.png and
report.html, the page to look at.
Stopped, it goes on with the same command; --fresh starts over.

The trainings are the two scripts with configs/*/demo.yaml, each on one thread, side by side: on two
cores three single-threaded processes do more than one with two threads.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from lmc.compare.side_by_side import Trainings

ROOT = Path(__file__).parents[2]
OUT = Path("runs/demo")
CLASSES = ("bear", "dog", "lion", "squirrel")
CLIP = "data/demo/clip"
HELDOUT = f"{OUT}/data/cats/heldout-*.tar"
# One-line overrides of configs/translator/demo.yaml.
LOSSES = {
    "lmc": [],
    "sds": [f"--run={OUT}/sds", "--model.loss=SDS"],
    "dds": [f"--run={OUT}/dds", "--model.loss=DDS"],
}
# Seconds a step, relative to each other, for the estimate of what remains.
COST = {"bias": 0.3, "lmc": 1.0, "sds": 0.9, "dds": 1.3}


def call(*command: str) -> None:
    """Run a Python command of this repository, showing what it prints."""
    subprocess.run([sys.executable, *command], check=True)


def train_all(steps: int | None) -> None:
    """The corrector and then LMC-SDS; SDS and DDS beside them. `steps` in place of the configs'."""
    totals = {name: steps or configured_steps(kind(name)) for name in COST}
    trainings = Trainings(totals, COST)

    def train(name: str, options: list[str]) -> None:
        script, config = f"train_{kind(name)}.py", f"configs/{kind(name)}/demo.yaml"
        command = [sys.executable, script, "fit", "--config", config, *options]
        more = [f"--trainer.max_steps={steps}"] if steps else []
        trainings.train(name, [*command, *more], OUT / f"{name}.log")

    def corrector_then_lmc() -> None:
        train("bias", [])
        call("-m", "lmc.cli", "release", f"{OUT}/bias", "--out", f"{OUT}/release/corrector")
        train("lmc", LOSSES["lmc"])

    others = [partial(train, name, LOSSES[name]) for name in ("dds", "sds")]
    trainings.run([corrector_then_lmc, *others], side_by_side=3)


def kind(name: str) -> str:
    """Which of the two trainings one is."""
    return "bias" if name == "bias" else "translator"


def configured_steps(kind: str) -> int:
    """How many steps the demo's configuration of a training has."""
    return yaml.safe_load(Path(f"configs/{kind}/demo.yaml").read_text())["trainer"]["max_steps"]


def evaluate() -> dict[str, Any]:
    """Measure everything on the held-out pictures, from the releases."""
    from torch.utils.data import DataLoader

    from lmc.corrector import Corrector
    from lmc.measure.correctors import evaluate_corrector
    from lmc.measure.results import numbers
    from lmc.priors import DiffusersPrior
    from lmc.shards.images import ImageStream

    prior = DiffusersPrior("data/demo/prior")
    prior.to("cpu")
    stream = ImageStream(f"{OUT}/data/animals/heldout-*.tar", 64, 50, training=False)
    corrector = Corrector.from_pretrained(f"{OUT}/release/corrector").eval()
    errors = evaluate_corrector(corrector, prior, DataLoader(stream, batch_size=None))
    translators = [f"{OUT}/release/{name}" for name in LOSSES]
    rows = OUT / "evaluation.json"
    call(
        *("-m", "lmc.cli", "evaluate", "--shards", HELDOUT, "--clip", CLIP, "--out", str(rows)),
        "--offline",
        *("--translator", *translators),
    )
    measured = json.loads(rows.read_text())["rows"]
    return {"corrector": errors, "translators": {n: numbers(row) for n, row in measured.items()}}


def picture() -> None:
    """grid.png: the source row, then a block a loss and a row a target, of held-out cats."""
    import torch

    from lmc.measure.figures import labelled_grid
    from lmc.shards.images import ImageStream
    from lmc.translator import Translator

    source = next(iter(ImageStream(HELDOUT, 64, 10, training=False))).image
    blocks = {"held-out cats": {"cat": source}}
    for name in LOSSES:
        translator = Translator.from_pretrained(f"{OUT}/release/{name}").eval()
        with torch.no_grad():
            blocks[name.upper()] = {
                target: translator(source, translator.class_ids([target] * len(source)))
                for target in CLASSES
            }
    labelled_grid(blocks).save(OUT / "grid.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--fresh", action="store_true", help="delete runs/demo first")
    parser.add_argument("--steps", type=int, help="of every training, for a quick look")
    parser.add_argument("--count", type=int, default=2000, help="pictures in each set")
    args = parser.parse_args()
    os.chdir(ROOT)
    start = time.monotonic()
    if args.fresh:
        shutil.rmtree(OUT, ignore_errors=True)
    if not (OUT / "data/cats/index.json").exists():
        call("data/demo/prepare.py", "--out", f"{OUT}/data", "--count", str(args.count))
    train_all(args.steps)
    for name in LOSSES:
        call("-m", "lmc.cli", "release", f"{OUT}/{name}", "--out", f"{OUT}/release/{name}")
    print("evaluating on the held-out pictures", flush=True)
    results = {"seconds": 0.0, **evaluate()}
    picture()
    for name in LOSSES:  # once more, now that there is something to put on the cards
        call(
            *("-m", "lmc.cli", "release", f"{OUT}/{name}", "--out", f"{OUT}/release/{name}"),
            *("--results", f"{OUT}/evaluation.json", "--row", name, "--picture", f"{OUT}/grid.png"),
        )
    call(
        *("-m", "lmc.cli", "report", f"{OUT}/evaluation.json", "--out", f"{OUT}/report.html"),
        *("--runs", f"{OUT}/bias", *(f"{OUT}/{name}" for name in LOSSES)),
        *("--title", "Cats to others, on the demo world"),
    )
    results["seconds"] = round(time.monotonic() - start, 1)
    (OUT / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    errors = results["corrector"]
    print(f"corrector: L_k {errors['loss']:.4f}, of the identity {errors['identity_loss']:.4f}")
    print(f"{results['seconds']:.0f} s; the releases are in {OUT}/release/")
    print(f"look at {OUT}/report.html (or {OUT}/grid.png)")


if __name__ == "__main__":
    main()
