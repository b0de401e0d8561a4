"""Images a second that the training loader delivers by workers, over decoding and nothing else.

    python benchmarks/loader.py 'data/afhq/cats/train-*.tar' --size 256 --batch 32

All loaders are open at once and take turns of --seconds, --rounds times, so that whatever else the
machine does meets all of them; the median of the rounds counts. While one is timed the others hold
their full queues and wait. 'Bare' decodes the same pictures from memory in a loop on one core; a
loader's share is of that times the cores it has, one for each worker. Prints a table, then JSON (or
writes it to --json).
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Iterator, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from lmc.shards.images import SUFFIXES, ImageBatch, ImageStream, decode_pixels

BARE = 256  # pictures that 'bare' decodes again and again
WARM_UP = 3  # batches a turn that a worker had ready while it waited: not timed


def turn(batches: Iterator[ImageBatch], workers: int, seconds: float) -> float:
    """Images a second over at least `seconds`."""
    for _ in range(WARM_UP * max(workers, 1)):
        next(batches)
    images, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        images += len(next(batches).key)
    return images / (time.perf_counter() - start)


def bare(encoded: Iterator[bytes], seconds: float) -> float:
    """Images a second that are decoded, and no more, over at least `seconds`."""
    images, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        decode_pixels(next(encoded))
        images += 1
    return images / (time.perf_counter() - start)


def encoded_pictures(stream: ImageStream) -> Iterator[bytes]:
    """The first `BARE` pictures as they are in the shards, over and over."""
    samples = stream.samples(stream.urls, BARE)
    return cycle([next(s[suffix] for suffix in SUFFIXES if suffix in s) for s in samples])


def measure(
    shards: str, size: int, batch: int, workers: Sequence[int], seconds: float, rounds: int
) -> list[dict[str, Any]]:
    """A row for bare decoding and each number of workers: the rounds' images a second.

    And their median, and the median over rounds of what it is of bare decoding on as many cores.
    """
    pictures = encoded_pictures(ImageStream(shards, size, batch, training=False))
    loaders = {}
    for count in workers:
        stream = ImageStream(shards, size, batch, training=True)
        loaders[count] = iter(DataLoader(stream, batch_size=None, num_workers=count))
    rates: dict[int | str, list[float]] = {"bare": [], **{count: [] for count in workers}}
    for _ in range(rounds):
        rates["bare"].append(bare(pictures, seconds))
        for count, batches in loaders.items():
            rates[count].append(turn(batches, count, seconds))

    def share(count: int | str, some: Sequence[float]) -> float:
        cores = min(max(int(count), 1), os.cpu_count() or 1) if count != "bare" else 1
        pairs = zip(some, rates["bare"], strict=True)
        return statistics.median(rate / (alone * cores) for rate, alone in pairs)

    return [
        {
            "workers": count,
            "images_per_second": statistics.median(some),
            "over_bare": share(count, some),
            "rounds": some,
        }
        for count, some in rates.items()
    ]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("shards", help="a path with wildcards or braces, or a pipe: command")
    parser.add_argument("--size", type=int, required=True, help="side of the images in pixels")
    parser.add_argument("--batch", type=int, default=32, help="images a batch (%(default)s)")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2], help="(0 1 2)")
    parser.add_argument("--seconds", type=float, default=3, help="a turn (%(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="turns each (%(default)s)")
    parser.add_argument("--json", type=Path, help="write the figures there as well")
    args = parser.parse_args(argv)
    rows = measure(args.shards, args.size, args.batch, args.workers, args.seconds, args.rounds)
    print(f"{args.size} x {args.size}, batch {args.batch}, {os.cpu_count()} CPUs")
    print("| workers | images/s (median) | lowest | highest | over bare x cores |")
    print("|---|---|---|---|---|")
    for row in rows:
        low, high = min(row["rounds"]), max(row["rounds"])
        print(
            f"| {row['workers']} | {row['images_per_second']:.0f} | {low:.0f} | {high:.0f} "
            f"| {row['over_bare']:.2f} |"
        )
    figures = {
        "shards": args.shards,
        "size": args.size,
        "batch": args.batch,
        "cpus": os.cpu_count(),
        "torch": torch.__version__,
        "rows": rows,
    }
    print(json.dumps(figures))
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
