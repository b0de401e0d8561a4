"""Images a second that the training loader delivers by workers, over decoding and nothing else.

    python benchmarks/loader.py 'data/afhq/cats/train-*.tar' --size 256 --batch 32

All loaders are open at once and take turns of --seconds, --rounds times, so that whatever else the
machine does meets all of them; the median of the rounds counts. While one is timed the others hold
their full queues and wait. 'Bare' decodes the same pictures from memory in a loop, in so many
processes at once, one a core; a loader's share is of that in as many processes as it has workers.
(Not of one process times the cores: two cores may be two threads of one.) Prints a table, then JSON
(or writes it to --json).
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Iterator, Sequence
from itertools import cycle
from multiprocessing import get_context
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


class Bare:
    """Decodes pictures and does no more, in some processes at once."""

    def __init__(self, pictures: Sequence[bytes], processes: int) -> None:
        self.processes = processes
        # Not forked: the loaders have threads by then.
        self.pool = get_context("spawn").Pool(processes, self._begin, (pictures,))
        self.turn(0.1)

    @staticmethod
    def _begin(pictures: Sequence[bytes]) -> None:
        global encoded
        encoded = cycle(pictures)

    @staticmethod
    def _alone(seconds: float) -> float:
        images, start = 0, time.perf_counter()
        while time.perf_counter() - start < seconds:
            decode_pixels(next(encoded))
            images += 1
        return images / (time.perf_counter() - start)

    def turn(self, seconds: float) -> float:
        """Images a second of all processes together, over at least `seconds`."""
        return sum(self.pool.map(self._alone, [seconds] * self.processes, chunksize=1))


def encoded_pictures(stream: ImageStream) -> list[bytes]:
    """The first `BARE` pictures as they are in the shards."""
    samples = stream.samples(stream.urls, BARE)
    return [next(s[suffix] for suffix in SUFFIXES if suffix in s) for s in samples]


def measure(
    shards: str, size: int, batch: int, workers: Sequence[int], seconds: float, rounds: int
) -> list[dict[str, Any]]:
    """A row for bare decoding in so many processes and for each number of workers.

    The rounds' images a second, their median, and the median over rounds of the share of `Bare`.
    """
    pictures = encoded_pictures(ImageStream(shards, size, batch, training=False))
    cores = {count: min(max(count, 1), os.cpu_count() or 1) for count in workers}
    bare = {count: Bare(pictures, count) for count in sorted(set(cores.values()))}
    loaders = {}
    for count in workers:
        stream = ImageStream(shards, size, batch, training=True)
        loaders[count] = iter(DataLoader(stream, batch_size=None, num_workers=count))
    alone: dict[int, list[float]] = {count: [] for count in bare}
    rates: dict[int, list[float]] = {count: [] for count in workers}
    for _ in range(rounds):
        for count, each in bare.items():
            alone[count].append(each.turn(seconds))
        for count, batches in loaders.items():
            rates[count].append(turn(batches, count, seconds))

    def row(name: str, some: Sequence[float], of: Sequence[float]) -> dict[str, Any]:
        return {
            "name": name,
            "images_per_second": statistics.median(some),
            "over_bare": statistics.median(x / y for x, y in zip(some, of, strict=True)),
            "rounds": some,
        }

    return [
        *(row(f"bare, processes: {count}", some, some) for count, some in alone.items()),
        *(row(f"workers: {count}", some, alone[cores[count]]) for count, some in rates.items()),
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
    print("| | images/s (median) | lowest | highest | over bare |")
    print("|---|---|---|---|---|")
    for row in rows:
        low, high = min(row["rounds"]), max(row["rounds"])
        print(
            f"| {row['name']} | {row['images_per_second']:.0f} | {low:.0f} | {high:.0f} "
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
