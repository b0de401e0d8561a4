"""A step of either stage over the sum of its parts, timed side by side on the demo.

    make demo
    python benchmarks/step.py

The parts are what a step cannot do without: the denoiser at the same batch, the trained network
forward and backward with Adam, the corrector forward. After each step of a training, by its own
loop with data, logging, average and checks, each part is run by itself with a network of its own.
The medians over all steps count, so that whatever else the machine does meets all of them.
Prints a table, then JSON (or writes it to --json).
"""

import argparse
import copy
import json
import os
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from lmc.training.bias import CorrectorTraining
from lmc.training.cli import TrainingCLI
from lmc.training.translator import TranslatorTraining

BIAS, TRANSLATOR = "configs/bias/demo.yaml", "configs/translator/demo.yaml"
PARTS = ("step", "denoiser", "network, Adam", "corrector")
WARM_UP = 4  # steps that are not counted


class Parts(Callback):
    """Times steps, and between them their parts."""

    def __init__(self) -> None:
        self.times: dict[str, list[float]] = {"step": []}

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        self.parts = parts_of(module, trainer)
        self.times |= {name: [] for name in self.parts}
        self.began = self.now(module)

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, *rest: Any) -> None:
        self.times["step"].append(self.now(module) - self.began)
        for name, part in self.parts.items():
            start = self.now(module)
            part()
            self.times[name].append(self.now(module) - start)
        self.began = self.now(module)

    @staticmethod
    def now(module: LightningModule) -> float:
        if module.device.type == "cuda":
            torch.cuda.synchronize(module.device)
        return time.perf_counter()


def parts_of(module: Any, trainer: Trainer) -> dict[str, Callable[[], Any]]:
    """What a step is made of, each to be called by itself."""
    batch = trainer.datamodule.batch_size  # type: ignore[attr-defined]
    device, prior = module.device, module.prior
    network = copy.deepcopy(module.network)
    adam = torch.optim.Adam(network.parameters(), lr=1e-9)
    image = torch.rand(batch, 3, module.image_size, module.image_size, device=device) * 2 - 1
    t = torch.linspace(0.1, 0.9, batch, device=device)
    translates = isinstance(module, TranslatorTraining)
    of_class = (
        torch.arange(batch, device=device) % len(module.translator.classes) if translates else t
    )

    def trained() -> None:
        network(image, of_class).square().mean().backward()
        adam.step()
        adam.zero_grad()

    name = module.loss.name if translates else "triplets"
    times = {"lmc": 2, "sds": 2, "dds": 4, "triplets": 1}[name]
    prompts = prior.embed(["", *["a photo of a dog"] * (times > 1)]).to(device)
    rows = torch.arange(times, device=device).repeat_interleave(batch) % min(times, 2)
    z_t, many = image.repeat(times, 1, 1, 1), t.repeat(times)
    found: dict[str, Callable[[], Any]] = {
        "denoiser": lambda: prior.predict(z_t, many, prompts[rows]),
        "network, Adam": trained,
    }
    if name == "lmc":
        corrector = module.loss.corrector
        found["corrector"] = torch.no_grad()(lambda: corrector.correct(image, t, image))
    return found


class Timed(TrainingCLI):
    """A training with `Parts` beside its own callbacks."""

    def before_fit(self) -> None:
        super().before_fit()
        self.parts = Parts()
        self.trainer.callbacks.append(self.parts)


def measure(kind: type, config: str, steps: int, options: Sequence[str]) -> dict[str, float]:
    """Medians in milliseconds, of a step and of its parts."""
    with TemporaryDirectory() as folder:
        limits = [f"--trainer.max_steps={steps}", "--trainer.limit_val_batches=0"]
        limits += [f"--save_every={10 * steps}", f"--run={folder}/run"]
        cli = Timed(kind, ["fit", "--config", config, *limits, *options])
    return {
        name: 1e3 * statistics.median(values[WARM_UP:]) for name, values in cli.parts.times.items()
    }


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=24, help="of each training (%(default)s)")
    parser.add_argument("--json", type=Path, help="write the figures there as well")
    args = parser.parse_args(argv)
    rows: dict[str, dict[str, float]] = {}
    for name in ("LMC", "SDS", "DDS"):
        own = [] if name == "LMC" else [f"--model.loss={name}"]
        print(f"stage two, {name} …", flush=True)
        rows[f"stage two, {name.lower()}"] = measure(
            TranslatorTraining, TRANSLATOR, args.steps, own
        )
    plain = ["--model.kind=unet", "--model.restoring=null", "--model.statistics=image"]
    rows["stage one, a plain U-Net"] = measure(
        CorrectorTraining, BIAS, args.steps, [*plain, "--model.stability=0"]
    )
    print(f"{os.cpu_count()} CPUs, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print("| | step | denoiser | network, Adam | corrector | step over the sum |")
    print("|---|---|---|---|---|---|")
    for name, times in rows.items():
        step, *parts = (times[key] for key in times)
        cells = [f"{times[key]:.1f} ms" if key in times else "" for key in PARTS]
        print(f"| {name} | {' | '.join(cells)} | {step / sum(parts):.3f} |")
    figures = {"cpus": os.cpu_count(), "threads": torch.get_num_threads(), "rows": rows}
    print(json.dumps(figures))
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
