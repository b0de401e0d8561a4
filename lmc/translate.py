"""`lmc translate`: image files through a translator."""

import sys
from collections.abc import Iterator
from glob import glob, has_magic
from pathlib import Path

import torch
from PIL import Image

from lmc.device import choose_device
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
        device: cpu, cuda, …; default the GPU where there is one.

    Raises:
        FileNotFoundError, OSError, ValueError: no such file or translator, an unknown class, or two
            files of one name.
    """
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
    broken = []
    with Progress("translating", len(files), "images") as progress:
        for number, file in enumerate(files, 1):
            try:
                image = decode_image(file.read_bytes(), str(file))
            except (OSError, ValueError) as error:
                broken.append(str(error))
                progress.say(f"left out: {error}")
                progress.update(number)
                continue
            image = middle_square(image[None], network.image_size)
            outputs = network(image.expand(len(ids), -1, -1, -1).to(device), ids)
            for target, output in zip(targets, to_uint8(outputs).cpu(), strict=True):
                picture = Image.fromarray(output.permute(1, 2, 0).numpy())
                with whole(out / f"{file.stem}-{target}.png") as partial:
                    picture.save(partial, "png")
            progress.update(number)
    print(f"{len(files) - len(broken)} images to {', '.join(targets)}, in {out}")
    if broken:
        sys.exit(f"lmc: {len(broken)} of {len(files)} files cannot be read: {broken[0]}")


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
