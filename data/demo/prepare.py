"""Draw the demo world into webdataset shards: all nine animals for stage one, cats for stage two.

Three in four of stage one's pictures are seen under coloured light of any exposure. The corrector
must be right wherever a translator may go, off the prior's manifold as well: OpenImages is that
much wider than photographs of cats. Without it, b reacts too little to a cast of colour, b - z_hat
then strengthens that cast, and translators drift towards violet.

    python data/demo/prepare.py --out runs/demo/data

writes animals/ and cats/, each with train-*.tar, heldout-*.tar (the 5 % whose names have the
smallest SHA-256) and index.json.
"""

import argparse
import io
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from lmc.shards.images import heldout_names, to_uint8, write_shard

from animals import CLASSES, caption, draw

SHARD = 500  # samples a shard
Sample = tuple[str, bytes, str, dict[str, Any]]


def encode(image: torch.Tensor) -> bytes:
    """(3, H, W) in [-1, 1] to PNG."""
    file = io.BytesIO()
    Image.fromarray(to_uint8(image).permute(1, 2, 0).numpy()).save(file, "png", compress_level=1)
    return file.getvalue()


def coloured_light(images: torch.Tensor, seeds: torch.Tensor) -> torch.Tensor:
    """Three in four pictures with contrast times 0.6 ... 1.4 and each channel moved by up to 0.6.

    Args:
        images: (B, 3, H, W) in [-1, 1].
        seeds: int64 (B,); the light follows from them alone.
    """
    u = torch.stack([torch.rand(5, generator=torch.Generator().manual_seed(int(s))) for s in seeds])
    shift, gain = 1.2 * (u[:, :3] - 0.5), 0.6 + 0.8 * u[:, 3:4]
    lit = (images * gain[:, :, None, None] + shift[:, :, None, None]).clamp(-1, 1)
    return torch.where((u[:, 4] < 0.75)[:, None, None, None], lit, images)


def samples(
    names: list[str],
    class_ids: torch.Tensor,
    seeds: torch.Tensor,
    size: int,
    split: str,
    light: bool,
) -> Iterator[Sample]:
    """The shard samples of some pictures, drawn as they are asked for."""
    for start in range(0, len(names), 250):
        part = slice(start, start + 250)
        images = draw(class_ids[part], seeds[part], size)
        if light:
            images = coloured_light(images, seeds[part])
        for name, class_id, image in zip(
            names[part], class_ids[part].tolist(), images, strict=True
        ):
            about = {"label": CLASSES[class_id], "caption": caption(class_id), "split": split}
            yield name, encode(image), "png", about


def prepare(
    out: Path, classes: list[str], count: int, size: int, first_seed: int, light: bool = False
) -> None:
    """Write `count` pictures of `classes`, evenly, as the shards of one folder.

    Args:
        light: under coloured light, see `coloured_light`.
    """
    start = time.time()
    for old in out.glob("*.tar"):  # of a larger set: a reader would take them for this one's
        old.unlink()
    class_ids = torch.tensor([CLASSES.index(classes[i % len(classes)]) for i in range(count)])
    seeds = first_seed + torch.arange(count)
    names = [f"{CLASSES[c]}-{s}" for c, s in zip(class_ids.tolist(), seeds.tolist(), strict=True)]
    heldout = heldout_names(names)
    index: dict[str, Any] = {"classes": classes, "size": size, "licence": "Apache-2.0"}
    done = 0
    for split, chosen in (
        ("train", [i for i, name in enumerate(names) if name not in heldout]),
        ("heldout", [i for i, name in enumerate(names) if name in heldout]),
    ):
        index[split] = len(chosen)
        for shard in range(-(-len(chosen) // SHARD)):
            pick = torch.tensor(chosen[shard * SHARD : (shard + 1) * SHARD])
            drawn = samples(
                [names[i] for i in pick], class_ids[pick], seeds[pick], size, split, light
            )
            done += write_shard(out / f"{split}-{shard:05d}.tar", drawn)
            seconds = time.time() - start
            left = seconds / done * (count - done)
            print(f"{out.name}: {done}/{count} pictures  {left:.0f} s left", flush=True)
    (out / "index.json").write_text(json.dumps(index, indent=1))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--size", type=int, default=64, help="side in pixels")
    parser.add_argument("--count", type=int, default=3000, help="pictures in each of the two sets")
    args = parser.parse_args()
    animals = args.out / "animals"
    prepare(animals, list(CLASSES), args.count, args.size, first_seed=10_000_000, light=True)
    prepare(args.out / "cats", ["cat"], args.count, args.size, first_seed=20_000_000)


if __name__ == "__main__":
    main()
