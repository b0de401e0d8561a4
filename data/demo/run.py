"""The whole way on the demo world, in one command: `make demo`.

Draws the shards, trains the corrector and releases it, trains a translator with each of three
losses and measures them on the held-out cats (`lmc compare`), and releases these.
runs/demo/report.html is the page to look at.
Stopped, it goes on with the same command; --fresh starts over.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
OUT = Path("runs/demo")
LOSSES = ("lmc", "sds", "dds")
COMPARISON = OUT / "compare"


def call(*command: str | Path) -> None:
    """Run a Python script of this repository, showing what it prints."""
    subprocess.run([sys.executable, *map(str, command)], check=True)


def lmc(*command: str | Path) -> None:
    """Run an `lmc` command, in this process."""
    from lmc.cli import main

    main([str(word) for word in command])


def corrector_errors() -> dict[str, float]:
    """The released corrector's errors on the held-out pictures."""
    from lmc.load import load_corrector
    from lmc.measure.correctors import evaluate_corrector
    from lmc.priors import DiffusersPrior
    from lmc.shards.images import ImageStream

    prior = DiffusersPrior("data/demo/prior")
    prior.to("cpu")
    heldout = ImageStream(f"{OUT}/data/animals/heldout-*.tar", 32, 50, training=False)
    return evaluate_corrector(load_corrector(f"{OUT}/release/corrector"), prior, heldout)


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
    if not ((OUT / "data/truth").exists() and (OUT / "data/cats/index.json").exists()):
        call("data/demo/prepare.py", "--out", OUT / "data", "--count", str(args.count))
    steps = [f"--trainer.max_steps={args.steps}"] if args.steps else []
    call("train_bias.py", "fit", "--config", "configs/bias/demo.yaml", *steps)
    # Before torch is imported: on two cores two such trainings do more than one with two threads.
    os.environ["OMP_NUM_THREADS"] = "1"
    lmc("release", OUT / "bias", "--out", OUT / "release/corrector")
    lmc(
        *("compare", "configs/translator/demo.yaml", "--losses", ",".join(LOSSES), "--jobs", "2"),
        *("--clip", "data/demo/clip", "--truth", OUT / "data/truth"),
        *("--real", f"{OUT}/data/real/*.tar", "--out", COMPARISON, "--", *steps),
    )
    for name in LOSSES:
        lmc(
            *("release", COMPARISON / name / "seed0", "--out", OUT / "release" / name),
            *("--results", COMPARISON, "--row", name),
            *("--picture", COMPARISON / "grid.png"),
        )
    lmc(
        *("report", COMPARISON, "--out", OUT / "report.html", "--runs", OUT / "bias"),
        *("--title", "Cats to others, on the demo world"),
    )
    shutil.copy(COMPARISON / "grid.png", OUT)
    errors, seconds = corrector_errors(), round(time.monotonic() - start, 1)
    compared = json.loads((COMPARISON / "results.json").read_text())
    rows = {name: compared["losses"][name]["0"] for name in LOSSES}
    results = {
        "seconds": seconds,
        "corrector": errors,
        "translators": {"source": compared["source"], **rows},
    }
    (OUT / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    print(f"corrector: L_k {errors['loss']:.4f}, of the identity {errors['identity_loss']:.4f}")
    print(f"{seconds:.0f} s; the releases are in {OUT}/release/")
    print(f"look at {OUT}/report.html (or {OUT}/grid.png)")


if __name__ == "__main__":
    main()
