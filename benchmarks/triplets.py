"""Stage one from stored triplets beside sampling on the fly, and what they cost on disk.

    python data/demo/prepare.py --out runs/demo/data --count 1000
    python benchmarks/triplets.py --config configs/bias/demo.yaml --out runs/triplets.json

Speed: both ways, and the same steps of one batch that is there already (the corrector alone), take
turns, a block of steps each, in one process, from loading the batch to the moved average; medians
over the blocks, so that other work on the machine slows both. Disk: real
shards of the config's pictures (or of --photos), written by the ordinary code for a prior of each
size that does nothing.
"""

import argparse
import io
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jsonargparse
import torch
import yaml
from PIL import Image, ImageOps
from torch import Tensor

from lmc.corrector import corrector_loss
from lmc.priors import Embedding
from lmc.schedule import Schedule
from lmc.shards.images import ImageStream, write_shard
from lmc.shards.store import TripletSet, write_triplets
from lmc.shards.triplets import TripletStream
from lmc.training.bias import CorrectorTraining


def training(config: dict[str, Any]) -> CorrectorTraining:
    """The module of a configuration of train_bias.py, its prior loaded."""
    parser: Any = jsonargparse.ArgumentParser()
    parser.add_class_arguments(CorrectorTraining, "model")
    parsed = parser.parse_object({"model": config["model"]})
    instantiate = getattr(parser, "instantiate", None) or parser.instantiate_classes
    module = instantiate(parsed).model
    module.null = module.prior.embed([""])
    module.prior.to("cpu")
    return module


class Steps:
    """Training steps as train_bias.py makes them, without its logging.

    Args:
        module: see `training`.
        stream: of images or triplets.
    """

    def __init__(self, module: CorrectorTraining, stream: Any) -> None:
        self.module, self.batches = module, iter(stream)
        self.adam = module.configure_optimizers()["optimizer"]
        self.generator = torch.Generator().manual_seed(0)

    def block(self, steps: int) -> float:
        """Seconds a step, over `steps` of them."""
        began = time.perf_counter()
        for _ in range(steps):
            x = self.module.triplets(next(self.batches), self.generator)
            b = self.module.corrector.correct(x.z, x.t, x.z_hat)
            corrector_loss(b, x.z_hat).mean().backward()
            self.adam.step()
            self.adam.zero_grad()
            self.module.ema.update_parameters(self.module.network)
        return (time.perf_counter() - began) / steps


def speed(config: dict[str, Any], times: int, steps: int, blocks: int) -> dict[str, float]:
    """Sample the config's training shards once, then train both ways in turns."""
    data, module = config["data"], training(config)
    what = TripletSet((data["train"],), data["image_size"], times)
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        made = write_triplets(module.prior, what, Path(folder))
        sampling = time.perf_counter() - began
        images = ImageStream(data["train"], data["image_size"], data["batch_size"], training=True)
        cached = TripletStream(f"{folder}/*.tar", data["batch_size"], training=True)
        ways = {"on_the_fly": Steps(module, images), "stored": Steps(training(config), cached)}
        one = itertools.repeat(next(iter(cached)))
        ways["corrector_alone"] = Steps(training(config), one)
        for way in ways.values():
            way.block(2)  # fills the shuffle buffer
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(blocks):
            for name, way in ways.items():
                seconds[name].append(way.block(steps))
    fly, stored, alone = (statistics.median(seconds[name]) for name in ways)
    saved = (fly - stored) / data["batch_size"]  # a triplet and use
    per_triplet = sampling / made["triplets"]
    return {
        "images": made["images"],
        "triplets": made["triplets"],
        "batch_size": data["batch_size"],
        "steps_per_second_on_the_fly": 1 / fly,
        "steps_per_second_stored": 1 / stored,
        "steps_per_second_corrector_alone": 1 / alone,
        "speed_up": fly / stored,
        "speed_up_lowest_block": min(map(_ratio, seconds["on_the_fly"], seconds["stored"])),
        "speed_up_highest_block": max(map(_ratio, seconds["on_the_fly"], seconds["stored"])),
        "stored_over_corrector_alone": alone / stored,
        "sampling_seconds": sampling,
        "sampling_triplets_per_second": 1 / per_triplet,
        "break_even_epochs": per_triplet / saved if saved > 0 else float("inf"),
    }


def _ratio(one: float, other: float) -> float:
    return one / other


class Nothing:
    """A prior of any size that answers z_t: only what is stored matters here."""

    def __init__(self, image_size: int, channels: int) -> None:
        self.image_size, self.channels, self.latent = image_size, channels, channels > 3
        self.schedule = Schedule(torch.linspace(0.999, 0.01, 100, dtype=torch.float64))
        self.identity = {
            "pretrained": f"benchmark-{image_size}x{image_size}x{channels}",
            "revision": None,
            "prediction_type": "epsilon",
            "image_size": image_size,
            "channels": channels,
            "digest": "0" * 64,
        }

    def to(self, device: Any) -> None:
        """Nothing to load."""

    def encode(self, image: Tensor) -> Tensor:
        """The image, with its mean as the fourth channel of a latent."""
        return torch.cat([image, image.mean(1, keepdim=True)], 1)[:, : self.channels]

    def embed(self, prompts: Sequence[str]) -> Embedding:
        """One number a prompt."""
        return Embedding({"text": torch.zeros(len(prompts), 1)})

    def predict(self, z_t: Tensor, t: Tensor, embedding: Embedding) -> tuple[Tensor, Tensor]:
        """z_t itself."""
        return z_t, z_t


def photo_samples(folder: Path, count: int, size: int) -> Iterator[Any]:
    """Centre crops of image files, spread over the folder."""
    files = sorted(f for f in folder.rglob("*") if f.suffix.lower() in (".jpg", ".jpeg", ".png"))
    for i, file in enumerate(files[:: max(1, len(files) // count)][:count]):
        picture = ImageOps.fit(Image.open(file).convert("RGB"), (size, size), Image.Resampling.BOX)
        data = io.BytesIO()
        picture.save(data, "png")
        yield f"{i:05d}", data.getvalue(), "png", {"label": "photo"}


def disk(
    shards: str, image_size: int, photos: Path | None, count: int, times: Sequence[int]
) -> list[dict[str, Any]]:
    """Bytes a triplet of real shards, by the size of z and times an image."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for size, channels in ((32, 3), (64, 3), (128, 3), (64, 4)):
            source, side = shards, image_size
            if photos is not None:
                side = size
                file = Path(folder, f"photos-{size}-{channels}", "train-00000.tar")
                write_shard(file, photo_samples(photos, count, size))
                source = str(file)
            for n in times:
                out = Path(folder, f"{size}-{channels}-{n}")
                what = TripletSet((source,), side, n)
                made = write_triplets(Nothing(size, channels), what, out)
                each = made["bytes"] / made["triplets"]
                z_hat = 2 * channels * size**2
                rows.append(
                    {
                        "z": f"{size} x {size} x {channels}",
                        "times_per_image": n,
                        "images": made["images"],
                        "bytes_per_triplet": each,
                        "of_it_z_hat": z_hat,
                        "gb_per_million": each / 1e3,
                    }
                )
    return rows


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--config", type=Path, required=True, help="of train_bias.py")
    parser.add_argument("--photos", type=Path, help="folder of image files, for the disk cost")
    parser.add_argument("--photo_count", type=int, default=300, help="of them (%(default)s)")
    parser.add_argument("--times_per_image", type=int, default=4, help="(%(default)s)")
    parser.add_argument("--steps", type=int, default=15, help="a block (%(default)s)")
    parser.add_argument("--blocks", type=int, default=9, help="each way (%(default)s)")
    parser.add_argument("--out", type=Path, help="JSON to write")
    args = parser.parse_args()
    config = yaml.safe_load(args.config.read_text())
    data = config["data"]
    data["image_size"] = data.get("image_size") or training(config).image_size
    timed = speed(config, args.times_per_image, args.steps, args.blocks)
    print("\n| | |\n|---|---|")
    for name, value in timed.items():
        print(f"| {name.replace('_', ' ')} | {value:.4g} |")
    rows = disk(
        data["heldout"],
        data["image_size"],
        args.photos,
        args.photo_count,
        (1, args.times_per_image),
    )
    print("\n| z | times an image | bytes a triplet | of it z_hat | GB a million triplets |")
    print("|---|---|---|---|---|")
    for row in rows:
        print(
            f"| {row['z']} | {row['times_per_image']} | {row['bytes_per_triplet']:.0f} "
            f"| {row['of_it_z_hat']} | {row['gb_per_million']:.1f} |"
        )
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps({"speed": timed, "disk": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
