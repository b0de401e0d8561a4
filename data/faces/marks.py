"""What a translator is read beside: real pictures of each class, the prior's own, and edits by it.

    python data/faces/marks.py --root runs/faces

writes marks/real/, samples/ and dreamsampler/ there, each CLASS/KEY.png for every held-out cat,
which `lmc evaluate --images` measures like any translator's: real training pictures of the class,
in the order of their shards, again from the first where they do not suffice; pictures sampled by
the prior (DDIM); and the cats edited by DreamSampler. What is there is not made again.
"""

import argparse
import zlib
from collections.abc import Callable, Sequence
from itertools import cycle, islice
from pathlib import Path

import torch
from torch import Tensor
from torchvision.utils import save_image

from lmc.device import choose_device
from lmc.dreamsampler import Canvas, DreamSampler
from lmc.files import whole_folder
from lmc.priors import DiffusersPrior, Prior
from lmc.progress import Progress
from lmc.shards.images import ImageBatch, ImageStream

CLASSES = ("bear", "dog", "lion", "squirrel", "tiger", "fox", "wolf")
BATCH = 64


def real_pictures(shards: str, size: int, count: int) -> dict[str, list[Tensor]]:
    """Of each class the first `count` pictures in the shards, (3, S, S) in [-1, 1]."""
    found: dict[str, list[Tensor]] = {name: [] for name in CLASSES}
    for batch in ImageStream(shards, size, BATCH, training=False):
        for image, label in zip(batch.image, batch.label, strict=True):
            if label in found and len(found[label]) < count:
                found[label].append(image)
    return found


def drawn(
    prior: Prior, sampler: DreamSampler, name: str, cats: Tensor, keys: list[str], invert: bool
) -> Tensor:
    """Pictures of a class by the prior, (B, 3, S, S) on the CPU.

    Args:
        sampler: how; from noise this is DDIM.
        cats: to begin from where `invert`, at the noise that DDIM's inversion finds.
        keys: the cats'; the noise follows from them.
    """
    prompts = ("", f"a photo of a {name}")
    base, target = (prior.embed([text]).to(cats.device).expand(len(cats)) for text in prompts)
    canvas = Canvas(prior, cats if invert else torch.zeros_like(cats))
    generators = [torch.Generator().manual_seed(zlib.crc32(key.encode())) for key in keys]
    eps = sampler.invert(prior, cats, base) if invert else None
    sampler(prior, canvas, base, target, generators, eps)
    return canvas().detach().cpu()


def write(
    folder: Path, batches: Sequence[ImageBatch], make: Callable[[str, ImageBatch], Tensor]
) -> None:
    """CLASS/KEY.png of what `make` gives for a class and a batch of cats; none if it is there."""
    if folder.exists():
        return
    total = len(CLASSES) * sum(len(batch.key) for batch in batches)
    with whole_folder(folder) as partial, Progress(folder.name, total, "images") as progress:
        for name in CLASSES:
            (partial / name).mkdir()
            for batch in batches:
                images = make(name, batch)
                for key, image in zip(batch.key, images, strict=True):
                    save_image(image.clamp(-1, 1) / 2 + 0.5, partial / name / f"{key}.png")
                progress.advance(len(images))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--root", type=Path, default=Path("runs/faces"), help="(%(default)s)")
    parser.add_argument("--steps", type=int, default=25, help="of sampling (%(default)s)")
    parser.add_argument("--guidance_scale", type=float, default=2.0, help="(%(default)s)")
    parser.add_argument("--start", type=float, default=0.8, help="t of the edits (%(default)s)")
    args = parser.parse_args()
    marks = args.root / "marks"
    device = choose_device("auto")
    # As the trainings have it that this is read beside.
    prior = DiffusersPrior(str(args.root / "prior/prior"), dtype="bfloat16")
    prior.to(device)
    size = prior.image_size
    heldout = ImageStream(f"{args.root}/data/cats/heldout-*.tar", size, BATCH, training=False)
    cats = list(heldout)
    count = sum(len(batch.key) for batch in cats)
    shards = f"{args.root}/data/{size}/train-*.tar"
    real = {name: cycle(images) for name, images in real_pictures(shards, size, count).items()}

    def by_prior(start: float, invert: bool) -> Callable[[str, ImageBatch], Tensor]:
        sampler = DreamSampler(args.steps, start, args.guidance_scale)
        return lambda name, batch: drawn(
            prior, sampler, name, batch.image.to(device), batch.key, invert
        )

    write(
        marks / "real",
        cats,
        lambda name, batch: torch.stack(list(islice(real[name], len(batch.key)))),
    )
    write(marks / "samples", cats, by_prior(0.98, False))
    write(marks / "dreamsampler", cats, by_prior(args.start, True))


if __name__ == "__main__":
    main()
