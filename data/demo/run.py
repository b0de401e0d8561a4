"""The whole way on the demo world, in one command: `make demo`.

Draws the shards, trains the corrector, trains a translator with each of three losses, evaluates
them on the held-out cats, and writes into runs/demo/ the releases, grid.png and results.json.
Stopped, it goes on with the same command; --fresh starts over.

The trainings are the two scripts with configs/*/demo.yaml, each on one thread, side by side: on two
cores three single-threaded processes do more than one with two threads.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

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


class Trainings:
    """Runs the training scripts, logs them to files, and says how far they are together."""

    def __init__(self) -> None:
        self.start = time.monotonic()
        self.steps: dict[str, tuple[int, int]] = {}
        self.first: dict[str, int] = {}
        self.running: set[subprocess.Popen[str]] = set()
        self.lock = threading.Lock()

    def train(self, name: str, script: str, options: list[str], extra: list[str]) -> None:
        """Run one training to its end.

        Raises:
            RuntimeError: it failed; shows the end of its log.
        """
        kind = "bias" if name == "bias" else "translator"
        command = [sys.executable, script, "fit", "--config", f"configs/{kind}/demo.yaml", *options]
        log = OUT / f"{name}.log"
        with open(log, "w") as file:
            process = subprocess.Popen(
                [*command, *extra],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"},
            )
            self.running.add(process)
            assert process.stdout is not None
            for line in process.stdout:
                file.write(line)
                file.flush()
                if match := re.search(r"steps? (\d+)(?:/| to )(\d+)", line):
                    done, total = int(match[1]), int(match[2])
                    with self.lock:
                        self.first.setdefault(name, done)
                        self.steps[name] = (done, total)
            if process.wait() != 0:
                for other in self.running - {process}:
                    other.terminate()
                tail = "".join(log.read_text().splitlines(keepends=True)[-15:])
                raise RuntimeError(f"training {name!r} failed, see {log}:\n{tail}")

    def show(self) -> None:
        """One line: the steps of each training and the time left for all."""
        with self.lock:
            steps, first = dict(self.steps), dict(self.first)
        known = next((total for name, (_, total) in steps.items() if name != "bias"), 0)
        work = done = 0.0
        for name, cost in COST.items():
            at, total = steps.get(name, (0, known))
            work += cost * (total - first.get(name, 0))
            done += cost * (at - first.get(name, 0))
        if not done or not known:
            return
        left = (time.monotonic() - self.start) * (work - done) / done
        parts = "  ".join(f"{name} {at}/{total}" for name, (at, total) in steps.items())
        print(
            f"{parts}  about {left / 60:.1f} min of training left, then the evaluation", flush=True
        )


def call(*command: str) -> None:
    """Run a Python command of this repository, showing what it prints."""
    subprocess.run([sys.executable, *command], check=True)


def train_all(extra: list[str]) -> None:
    """The corrector and then LMC-SDS; SDS and DDS beside them."""
    trainings = Trainings()

    def translator(name: str) -> None:
        trainings.train(name, "train_translator.py", LOSSES[name], extra)

    def corrector_then_lmc() -> None:
        trainings.train("bias", "train_bias.py", [], extra)
        call("-m", "lmc.cli", "release", f"{OUT}/bias", "--out", f"{OUT}/release/corrector")
        translator("lmc")

    with ThreadPoolExecutor(3) as pool:
        jobs = [pool.submit(corrector_then_lmc)]
        jobs += [pool.submit(translator, name) for name in ("dds", "sds")]
        try:
            while not all(job.done() for job in jobs):
                if any(job.done() and job.exception() for job in jobs):
                    break
                time.sleep(10)
                trainings.show()
        finally:
            for process in trainings.running:
                process.terminate()  # where one failed or the user stops; a no-op when all are done
    for job in jobs:
        job.result()


def evaluate() -> dict[str, Any]:
    """Measure everything on the held-out pictures, from the releases."""
    from torch.utils.data import DataLoader

    from lmc.corrector import Corrector
    from lmc.evaluate import evaluate_corrector
    from lmc.images import ImageStream
    from lmc.priors import DiffusersPrior

    prior = DiffusersPrior("data/demo/prior")
    prior.to("cpu")
    stream = ImageStream(f"{OUT}/data/animals/heldout-*.tar", 64, 50, training=False)
    corrector = Corrector.from_pretrained(f"{OUT}/release/corrector").eval()
    errors = evaluate_corrector(corrector, prior, DataLoader(stream, batch_size=None))
    translators = [f"{OUT}/release/{name}" for name in LOSSES]
    rows = OUT / "evaluation.json"
    call(
        *("-m", "lmc.cli", "evaluate", "--shards", HELDOUT, "--clip", CLIP, "--out", str(rows)),
        *("--translator", *translators),
    )
    return {"corrector": errors, "translators": json.loads(rows.read_text())}


def picture() -> None:
    """grid.png: the source row, then a block a loss and a row a target, of held-out cats."""
    import torch

    from lmc.images import ImageStream
    from lmc.report import labelled_grid
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
    train_all([f"--trainer.max_steps={args.steps}"] if args.steps else [])
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
    results["seconds"] = round(time.monotonic() - start, 1)
    (OUT / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    errors = results["corrector"]
    print(f"corrector: L_k {errors['loss']:.4f}, of the identity {errors['identity_loss']:.4f}")
    print(f"{results['seconds']:.0f} s; look at {OUT}/grid.png, releases in {OUT}/release/")


if __name__ == "__main__":
    main()
