"""`lmc translate` over what it cannot do without: reading, the network, writing.

    make demo
    python benchmarks/translate.py runs/demo/release/lmc

Both translate the same pictures, several times in turns. The floor reads each file, puts them all
through the network in the same batches, and writes each result, one after the other in one thread.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from PIL import Image

from lmc.load import load_translator
from lmc.shards.images import decode_image, to_uint8
from lmc.translate import translate


@torch.no_grad()
def floor(files: Sequence[Path], translator: str, out: Path, batch: int) -> None:
    """The same pictures, by the plainest loop."""
    network = load_translator(translator)
    ids = torch.arange(len(network.classes))
    for i in range(0, len(files), batch):
        some = files[i : i + batch]
        images = torch.stack([decode_image(file.read_bytes()) for file in some])
        made = network(images.repeat_interleave(len(ids), 0), ids.repeat(len(images)))
        names = [f"{file.stem}-{name}.png" for file in some for name in network.classes]
        for name, picture in zip(names, to_uint8(made), strict=True):
            Image.fromarray(picture.permute(1, 2, 0).numpy()).save(out / name, "png")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("translator", help="release or run folder")
    parser.add_argument("--images", type=int, default=128, help="(%(default)s)")
    parser.add_argument("--batch", type=int, default=16, help="(%(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="of both (%(default)s)")
    args = parser.parse_args(argv)
    size = load_translator(args.translator).image_size
    times: dict[str, list[float]] = {"lmc translate": [], "floor": []}
    with TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        out.mkdir()
        files = [Path(folder) / f"{i:04d}.png" for i in range(args.images)]
        generator = torch.Generator().manual_seed(0)
        for file in files:
            noise = torch.randint(256, (size, size, 3), generator=generator, dtype=torch.uint8)
            Image.fromarray(noise.numpy()).save(file, "png")
        for _ in range(args.rounds):
            start = time.perf_counter()
            names = list(map(str, files))
            translate(
                names,
                translator=args.translator,
                out=out,
                batch_size=args.batch,
                overwrite=True,
            )
            middle = time.perf_counter()
            floor(files, args.translator, out, args.batch)
            times["lmc translate"].append(middle - start)
            times["floor"].append(time.perf_counter() - middle)
    rates = {name: args.images / statistics.median(some) for name, some in times.items()}
    for name, rate in rates.items():
        print(f"{name}: {rate:.0f} images/s")
    ratio = rates["lmc translate"] / rates["floor"]
    print(f"{ratio:.2f} of the floor, {size} x {size}, {os.cpu_count()} CPUs")
    print(json.dumps({"rates": rates, "ratio": ratio, "cpus": os.cpu_count()}))


if __name__ == "__main__":
    main()
