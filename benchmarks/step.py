"""A step of either stage over the sum of its parts, timed side by side on the demo.

    make demo
    python benchmarks/step.py

The parts are what a step cannot do without: the denoiser at the same batch, the trained network
forward and backward with Adam, the corrector forward, of a latent prior the VAE's encoder. After
each step of a training, by its own loop with data, logging, average and checks, each part is run by
itself with a network of its own; and in stage two the step that public scripts have: a float32
denoiser with its graph, source and target one after the other, a look at the loss at every step.
The medians over all steps count, so that whatever else the machine does meets all of them.
Prints a table, then JSON (or writes it to --json).
"""

import argparse
import copy
import json
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from lmc.priors import DiffusersPrior
from lmc.shards.images import resize
from lmc.training.bias import CorrectorTraining
from lmc.training.cli import TrainingCLI
from lmc.training.translator import TranslatorTraining

BIAS, TRANSLATOR = "configs/bias/demo.yaml", "configs/translator/demo.yaml"
PLAIN_BIAS = ["--model.kind=unet", "--model.restoring=null", "--model.statistics=image"]
PLAIN_BIAS += ["--model.stability=0"]
PARTS = ("step", "denoiser", "network, Adam", "corrector", "VAE")
PLAIN = "plain loop"
WARM_UP = 4  # steps that are not counted


class Parts(Callback):
    """Times steps, and between them their parts; or steps `alone`."""

    def __init__(self, alone: bool = False) -> None:
        self.alone = alone
        self.times: dict[str, list[float]] = {"step": []}

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        self.parts = {} if self.alone else parts_of(module, trainer)
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
    pixels = resize(image, prior.image_size).requires_grad_()
    with torch.no_grad():
        z = prior.encode(pixels)
    t = torch.linspace(0.1, 0.9, batch, device=device)
    translates = isinstance(module, TranslatorTraining)
    given = (z, t)
    if translates:
        given = (image, torch.arange(batch, device=device) % len(module.translator.classes))

    def trained() -> None:
        with trainer.precision_plugin.forward_context():
            output = network(*given)
        output.float().square().mean().backward()
        adam.step()
        adam.zero_grad()

    def encoded() -> None:
        with torch.set_grad_enabled(translates):
            made = prior.encode(pixels)
        if translates:
            made.sum().backward()
        if translates and module.loss.needs_source:
            with torch.no_grad():
                prior.encode(pixels)

    name = module.loss.name if translates else "triplets"
    times = {"lmc": 2, "sds": 2, "dds": 4, "triplets": 1}[name]
    prompts = prior.embed(["", *["a photo of a dog"] * (times > 1)]).to(device)
    rows = torch.arange(times, device=device).repeat_interleave(batch) % min(times, 2)
    z_t, many = z.repeat(times, 1, 1, 1), t.repeat(times)
    found: dict[str, Callable[[], Any]] = {
        "denoiser": lambda: prior.predict(z_t, many, prompts[rows]),
        "network, Adam": trained,
    }
    if prior.latent:
        found["VAE"] = encoded
    if name == "lmc":
        corrector = module.loss.corrector
        found["corrector"] = torch.no_grad()(lambda: corrector.correct(z, t, z))
    if translates:
        found[PLAIN] = plain_loop(module, image, given[1], t)
    return found


def plain_loop(module: Any, image: Tensor, classes: Tensor, t: Tensor) -> Callable[[], None]:
    """A step of LMC-SDS, SDS or DDS as public scripts have it, with networks of its own."""
    prior = DiffusersPrior(module.prior.pretrained, dtype="float32")
    prior.to(module.device)
    texts = prior.embed(["", "a photo of a cat", "a photo of a dog"]).to(module.device)
    network, loss = copy.deepcopy(module.network), module.loss
    adam = torch.optim.Adam(network.parameters(), lr=1e-9)
    alpha, sigma = prior.schedule.coefficients(t, torch.float32)
    omega = loss.guidance_scale

    def guided(z: Tensor, eps: Tensor, prompt: int) -> tuple[Tensor, Tensor]:
        """eps_u and ω (eps_c − eps_u)."""
        z_t = (alpha * z + sigma * eps).repeat(2, 1, 1, 1)
        rows = torch.tensor([0, prompt], device=z.device).repeat_interleave(len(z))
        # Its graph is kept, which no loss here asks for.
        null, conditional = prior._predict(z_t, t.repeat(2), texts[rows])[0].chunk(2)
        return null, omega * (conditional - null)

    def step() -> None:
        output = network(image, classes)
        z = prior.encode(resize(output, prior.image_size))
        eps = torch.randn_like(z)
        null, guide = guided(z, eps, 2)
        gradient = null + guide - eps
        if loss.needs_source:
            z_source = prior.encode(resize(image, prior.image_size))
            gradient = gradient + eps - sum(guided(z_source, eps, 1))
        elif loss.name == "lmc":
            z_hat = (alpha * z + sigma * eps - sigma * null) / alpha
            with torch.no_grad():
                gradient = guide + alpha / sigma * (loss.corrector.correct(z, t, z_hat) - z_hat)
        value = (gradient.detach() * z).mean() + (output - image).square().mean()
        adam.zero_grad()
        value.backward()
        adam.step()
        value.item()

    return step


class Timed(TrainingCLI):
    """A training with `Parts` beside its own callbacks."""

    alone = False

    def before_fit(self) -> None:
        super().before_fit()
        self.parts = Parts(self.alone)
        self.trainer.callbacks.append(self.parts)


def trained(
    kind: type, config: str, steps: int, options: Sequence[str], training: type[TrainingCLI]
) -> Any:
    """A training of a few steps, which leaves nothing behind."""
    with TemporaryDirectory() as folder:
        limits = [f"--trainer.max_steps={steps}", "--trainer.limit_val_batches=0"]
        limits += [f"--save_every={10 * steps}", f"--run={folder}/run"]
        return training(kind, ["fit", "--config", config, *limits, *options])


def measure(
    kind: type, config: str, steps: int, options: Sequence[str], training: type = Timed
) -> dict[str, float]:
    """Medians in milliseconds, of a step and of its parts."""
    cli = trained(kind, config, steps, options, training)
    timed = {name: values[WARM_UP:] for name, values in cli.parts.times.items()}
    return {name: 1e3 * statistics.median(values) for name, values in timed.items() if values}


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
    rows["stage one, a plain U-Net"] = measure(CorrectorTraining, BIAS, args.steps, PLAIN_BIAS)
    report(rows, args.json)


def report(rows: Mapping[str, Mapping[str, float]], file: Path | None) -> None:
    """The table, and the same as JSON, also into a file."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    threads = torch.get_num_threads()
    where = f"{gpu or f'{os.cpu_count()} CPUs, {threads} threads'}, torch {torch.__version__}"
    names = [*PARTS, "step over the sum", PLAIN, "that over the step"]
    print(f"{where}\n| | {' | '.join(names)} |\n|---|{'---|' * len(names)}")
    for name, times in rows.items():
        cells = [f"{times[key]:.1f} ms" if key in times else "" for key in PARTS]
        cells.append(f"{times['step'] / sum(times[key] for key in PARTS[1:] if key in times):.3f}")
        if PLAIN in times:
            cells += [f"{times[PLAIN]:.1f} ms", f"{times[PLAIN] / times['step']:.2f}"]
        print(f"| {name} | {' | '.join(cells)} |")
    figures = {"where": where, "rows": rows}
    print(json.dumps(figures))
    if file:
        file.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
