"""`lmc translate`: image files through a translator."""

import os
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from glob import glob, has_magic
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from lmc.device import choose_device
from lmc.errors import require
from lmc.files import whole
from lmc.load import load_translator
from lmc.progress import Progress
from lmc.shards.images import SUFFIXES, decode_image, middle_square, to_uint8


@torch.no_grad()
def translate(
    images: list[str],
    *,
    translator: str,
    out: Path,
    to: list[str] | None = None,
    batch_size: int = 16,
    device: str = "auto",
) -> None:
    """Translate image files; non-square ones are cropped at the centre.

    Writes OUT/NAME-CLASS.png each. A file that cannot be read is named, and the others go on; the
    exit status is 1 then.

    Args:
        images: files, folders of them, or patterns ('photos/*.jpg').
        translator: run folder, release or hub id.
        out: folder to write.
        to: target classes; default all the translator knows.
        batch_size: images at a time; each goes to all targets at once.
        device: cpu, cuda, …; default the GPU where there is one.

    Raises:
        FileNotFoundError, OSError, ValueError: no such file or translator, an unknown class, two
            files of one name, or no images at a time.
    """
    require(batch_size >= 1, "--batch_size", "at least 1", batch_size)
    device = choose_device(device)
    files = [file for each in images for file in _files(each)]
    stems = [file.stem for file in files]
    if len(set(stems)) < len(stems):
        twice = next(stem for stem in stems if stems.count(stem) > 1)
        raise ValueError(f"several inputs are named {twice!r} and would overwrite each other")
    network = load_translator(translator).to(device)
    targets = to or network.classes
    ids = network.class_ids(targets).to(device)
    out.mkdir(parents=True, exist_ok=True)
    broken: list[str] = []
    read = partial(_read, size=network.image_size)

    def write(stem: str, outputs: Tensor) -> None:
        for target, output in zip(targets, outputs, strict=True):
            picture = Image.fromarray(output.permute(1, 2, 0).numpy())
            with whole(out / f"{stem}-{target}.png", precious=False) as file:
                picture.save(file, "png")

    # Files are read and written by threads, which Pillow lets run, while the network computes.
    with (
        Progress("translating", len(files), "images") as progress,
        ThreadPoolExecutor(os.cpu_count()) as pool,
    ):
        several = [files[i : i + batch_size] for i in range(0, len(files), batch_size)]
        ahead = [pool.submit(read, file) for file in several[0]]
        writing: list[Future[None]] = []
        for number, batch in enumerate(several):
            following = several[number + 1] if number + 1 < len(several) else []
            now, ahead = ahead, [pool.submit(read, file) for file in following]
            read_here: list[tuple[str, Tensor]] = []
            for file, future in zip(batch, now, strict=True):
                try:
                    read_here.append((file.stem, future.result()))
                except (OSError, ValueError) as error:
                    broken.append(str(error))
                    progress.say(f"left out: {error}")
            for earlier in writing:
                earlier.result()
            if read_here:
                stems_here, pictures = zip(*read_here, strict=True)
                made = network(
                    torch.cat(pictures).to(device).repeat_interleave(len(ids), 0),
                    ids.repeat(len(pictures)),
                )
                each = to_uint8(made).cpu().split(len(ids))
                writing = [pool.submit(write, *x) for x in zip(stems_here, each, strict=True)]
            progress.advance(len(batch))
        for earlier in writing:
            earlier.result()
    print(f"{len(files) - len(broken)} images to {', '.join(targets)}, in {out}")
    if broken:
        sys.exit(f"lmc: {len(broken)} of {len(files)} files cannot be read: {broken[0]}")


def _read(file: Path, size: int) -> Tensor:
    """The middle square of an image file, (1, 3, size, size)."""
    return middle_square(decode_image(file.read_bytes(), str(file))[None], size)


def _files(given: str) -> Iterator[Path]:
    """The image files that an argument names.

    Raises:
        FileNotFoundError: none.
    """
    path = Path(given)
    if path.is_file():
        yield path
        return
    found = path.glob("*") if path.is_dir() else map(Path, glob(given) if has_magic(given) else [])
    images = sorted(file for file in found if file.suffix[1:].lower() in SUFFIXES)
    if not images:
        what = f"no images ({', '.join(SUFFIXES)}) in" if path.is_dir() else "no such file:"
        raise FileNotFoundError(f"{what} {given}")
    yield from images
