"""Stage one's real cost, the evaluations of the prior: held-out L_k against them, by recipe.

    python data/demo/prepare.py --out runs/demo/data --count 2000
    python benchmarks/evaluations.py --out runs/evaluations

Trains the demo's corrector, without what L_k does not ask for (restoring, calibration), as many
steps each: with a fresh triplet for each use, as the paper does, with its learning rate, a larger
one that falls, and from the closed form; and from triplets that are sampled once and used many
times, of more or fewer pictures, at one or more times each, and with noise in pairs eps, -eps.
What is plotted is the excess of L_k over its floor E Var(z_hat | z, t), which no function of z and
t gets rid of. OUT/evaluations.png is the picture, OUT/evaluations.json has all figures. Two cores:
about half an hour; it goes on where it was stopped.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from lmc.files import read_json, whole, write_json
from lmc.measure.runs import read_run
from lmc.priors import DiffusersPrior
from lmc.shards import store
from lmc.shards.store import TripletSet, write_triplets

BIAS = "configs/bias/demo.yaml"
PICTURES = "runs/demo/data/animals/train-"
BATCH, CLOSED_FORM = 16, 4000  # images a step; triplets that the closed form is estimated from
UNET = {"model.kind": "unet"}
PAPER_RATE = {"model.optimizer.lr": "1e-4", "model.optimizer.factor": "1"}
FRESH: dict[str, dict[str, str]] = {
    "fresh, a U-Net, the paper's rate": {**UNET, **PAPER_RATE},
    "fresh, a U-Net": UNET,
    "fresh, hybrid": {},
}
# Shards of pictures (of four), times each, in pairs of eps and -eps.
STORED: dict[str, tuple[str, int, bool]] = {
    "a quarter of the pictures, once": ("00000", 1, False),
    "a quarter of the pictures, four times": ("00000", 4, False),
    "all pictures, once": ("*", 1, False),
    "all pictures, twice": ("*", 2, False),
    "all pictures, twice, eps and -eps": ("*", 2, True),
    "all pictures, four times": ("*", 4, False),
}


def pairs(key: str, shape: Sequence[int], what: TripletSet) -> tuple[Tensor, Tensor]:
    """`draw_for`, of which every other draw is the one before with -eps."""
    t, eps = store.draw_for_key(key, shape, what.time_range, what.seed, 0)
    return torch.cat([t, t]), torch.cat([eps, -eps])


def sampled(name: str, out: Path) -> tuple[str, int]:
    """Triplets of STORED: their shards, and how many there are."""
    shards, times, in_pairs = STORED[name]
    folder = out / "triplets" / name.replace(" ", "_").replace(",", "")
    what = TripletSet((f"{PICTURES}{shards}.tar",), 32, times)
    with mock.patch.object(store, "draw_for", pairs if in_pairs else store.draw_for):
        made = write_triplets(DiffusersPrior("data/demo/prior"), what, folder)
    return f"{folder}/*.tar", made["triplets"]


def train(name: str, options: Mapping[str, str], out: Path, steps: int) -> dict[str, Any]:
    """A training's held-out errors by step."""
    run = out / name.replace(" ", "_").replace(",", "").replace("'", "")
    given = {
        "model.restoring": "null",
        "model.statistics": "image",
        "model.stability": "0",
        "trainer.max_steps": str(steps),
        "trainer.val_check_interval": str(max(1, steps // 8)),
        **options,
    }
    command = ["train_bias.py", "fit", "--config", BIAS, f"--run={run}"]
    command += [f"--{key}={value}" for key, value in given.items()]
    subprocess.run([sys.executable, *command], check=True)
    curves = read_run(run).curves
    told = {tag: curves[f"heldout/{tag}"] for tag in ("loss", "excess", "floor", "identity_loss")}
    found = {tag: values for tag, (_, values) in told.items()}
    return {"steps": [step + 1 for step in told["loss"][0]], **found}


def picture(rows: Mapping[str, Any], file: Path) -> None:
    """Excess over evaluations: curves of what samples afresh, points of what does not."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for name, row in rows.items():
        if name in FRESH:
            axes.plot(row["evaluations"], row["excess"], marker=".", label=name)
        else:
            last = row["evaluations"][-1:], row["excess"][-1:]
            axes.plot(*last, marker="s", linestyle="none", label=f"stored: {name}")
    axes.set(xscale="log", yscale="log", xlabel="evaluations of the prior", ylabel="excess of L_k")
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    with whole(file, precious=False) as partial:
        figure.savefig(partial, dpi=110, format="png")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("runs/evaluations"), help="(%(default)s)")
    parser.add_argument("--steps", type=int, default=1200, help="of each training (%(default)s)")
    args = parser.parse_args(argv)
    file = args.out / "evaluations.json"
    args.out.mkdir(parents=True, exist_ok=True)
    rows: dict[str, Any] = read_json(file) if file.exists() else {}
    for name in (*FRESH, *STORED):
        if name in rows:
            continue
        if name in FRESH:
            row = train(name, FRESH[name], args.out, args.steps)
            before = 0 if "model.kind" in FRESH[name] else CLOSED_FORM
            row["evaluations"] = [before + BATCH * step for step in row["steps"]]
        else:
            shards, count = sampled(name, args.out)
            row = train(name, {"data.train": shards}, args.out, args.steps)
            row["evaluations"] = [count] * len(row["steps"])
        rows[name] = row
        write_json(file, rows)
    print("| | evaluations | L_k | excess over the floor |\n|---|---|---|---|")
    for name, row in rows.items():
        told = f"{row['loss'][-1]:.4f} | {row['excess'][-1]:.4f}"
        print(f"| {name} | {row['evaluations'][-1]:,} | {told} |")
    print(json.dumps(rows))
    picture(rows, args.out / "evaluations.png")


if __name__ == "__main__":
    main()
