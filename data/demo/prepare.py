"""Draw the demo world: animals for stage one, cats for stage two, and what these should become.

    python data/demo/prepare.py --out runs/demo/data

writes animals/ and cats/, each with train-*.tar, heldout-*.tar (the 5 % whose names have the
smallest SHA-256) and index.json; and to measure with:

- truth/CLASS/KEY.png for each held-out cat KEY and each of the other animals: the same pose, light
  and background, drawn as that animal. It is the translation that is wanted (`--truth`);
- real/*.tar, shards of the other animals, none of them a cat's counterpart (`--real`).
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
TARGETS = [name for name in CLASSES if name != "cat"]
# First seeds of the sets, far from each other's and those of the prior and CLIP.
ANIMALS, CATS, REAL = 10_000_000, 20_000_000, 30_000_000
Sample = tuple[str, bytes, str, dict[str, Any]]


def encode(image: torch.Tensor) -> bytes:
    """(3, H, W) in [-1, 1] to PNG."""
    file = io.BytesIO()
    Image.fromarray(to_uint8(image).permute(1, 2, 0).numpy()).save(file, "png", compress_level=1)
    return file.getvalue()


def samples(
    names: list[str],
    class_ids: torch.Tensor,
    seeds: torch.Tensor,
    size: int,
    split: str,
) -> Iterator[Sample]:
    """The shard samples of some pictures, drawn as they are asked for."""
    for start in range(0, len(names), 250):
        part = slice(start, start + 250)
        images = draw(class_ids[part], seeds[part], size)
        for name, class_id, image in zip(
            names[part], class_ids[part].tolist(), images, strict=True
        ):
            about = {"label": CLASSES[class_id], "caption": caption(class_id), "split": split}
            yield name, encode(image), "png", about


def named(
    classes: list[str], count: int, first_seed: int
) -> tuple[list[str], torch.Tensor, torch.Tensor]:
    """The names, class ids and seeds of `count` pictures of `classes`, evenly."""
    class_ids = torch.tensor([CLASSES.index(classes[i % len(classes)]) for i in range(count)])
    seeds = first_seed + torch.arange(count)
    names = [f"{CLASSES[c]}-{s}" for c, s in zip(class_ids.tolist(), seeds.tolist(), strict=True)]
    return names, class_ids, seeds


def prepare(out: Path, classes: list[str], count: int, size: int, first_seed: int) -> None:
    """Write `count` pictures of `classes`, evenly, as the shards of one folder."""
    start = time.time()
    for old in out.glob("*.tar"):  # of a larger set: a reader would take them for this one's
        old.unlink()
    names, class_ids, seeds = named(classes, count, first_seed)
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
            drawn = samples([names[i] for i in pick], class_ids[pick], seeds[pick], size, split)
            done += write_shard(out / f"{split}-{shard:05d}.tar", drawn)
            seconds = time.time() - start
            left = seconds / done * (count - done)
            print(f"{out.name}: {done}/{count} pictures  {left:.0f} s left", flush=True)
    (out / "index.json").write_text(json.dumps(index, indent=1))


def write_truth(out: Path, count: int, size: int, first_seed: int) -> None:
    """Write the true counterparts of the cats held out of `count` as out/CLASS/KEY.png."""
    for old in out.glob("*/*.png"):
        old.unlink()
    names, _, seeds = named(["cat"], count, first_seed)
    heldout = heldout_names(names)
    chosen = [i for i, name in enumerate(names) if name in heldout]
    for target in TARGETS:
        (out / target).mkdir(parents=True, exist_ok=True)
        ids = torch.full((len(chosen),), CLASSES.index(target))
        for i, image in zip(chosen, draw(ids, seeds[chosen], size), strict=True):
            (out / target / f"{names[i]}.png").write_bytes(encode(image))
    print(f"{out.name}: {len(chosen)} cats as each of {', '.join(TARGETS)}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--size", type=int, default=32, help="side in pixels")
    parser.add_argument("--count", type=int, default=3000, help="of the animals, and of the cats")
    parser.add_argument("--real", type=int, default=100, help="pictures of each other animal")
    args = parser.parse_args()
    out, size = args.out, args.size
    # Written last: where it is, all is there.
    (out / "cats" / "index.json").unlink(missing_ok=True)
    prepare(out / "animals", list(CLASSES), args.count, size, ANIMALS)
    write_truth(out / "truth", args.count, size, CATS)
    prepare(out / "real", TARGETS, args.real * len(TARGETS), size, REAL)
    prepare(out / "cats", ["cat"], args.count, size, CATS)


if __name__ == "__main__":
    main()
