"""One image of any kind to one of a shard: the part of the work that is shared among processes.

This module and `sources` import nothing of torch's, which would take each process seconds.
"""

import hashlib
import io
import multiprocessing
import os
import signal
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps

from lmc.shards.encoded import opened

from sources import Skip, Source, read


@dataclass(frozen=True)
class Options:
    """What the shards' bytes depend on, beside the images.

    Attributes:
        size: the side in pixels.
        suffix: 'jpg' (quality 95, no chroma subsampling) or 'png'.
        min_side: images whose shorter side has fewer pixels are skipped.
        shard_size: images a shard, before any are skipped.
        crop: 'centre' or 'random', the largest square in the middle or anywhere.
        by_class: hold out a share of every class, not of all images.
        label: how labels were given, for the record.
    """

    size: int
    suffix: str
    min_side: int
    shard_size: int
    crop: str = "centre"
    by_class: bool = False
    label: str = ""


class Item(NamedTuple):
    """An image that has its place: `key` names it in the shards, `name` in the lists."""

    source: Source
    key: str
    name: str


def to_rgb(image: Image.Image) -> Image.Image:
    """The first frame of an opened image, upright, 8-bit RGB; what is transparent becomes white.

    Raises:
        ValueError: floating-point pixels, whose range nothing tells.
        Exception: whatever else Pillow raises for damaged data; `opened` makes it a ValueError.
    """
    image = ImageOps.exif_transpose(image)
    if image.mode == "F":
        raise ValueError("floating-point pixels")
    if image.mode.startswith("I"):  # 16-bit grey, which Pillow would clip at 255
        grey = np.asarray(image).astype(np.float64).clip(0, 65535) / 257
        image = Image.fromarray(grey.round().astype(np.uint8))
    if "A" in image.mode or "transparency" in image.info:
        colours = image.convert("RGBA")
        white = Image.new("RGBA", colours.size, "white")
        return Image.alpha_composite(white, colours).convert("RGB")
    return image.convert("RGB")


def process(item: Item, options: Options) -> tuple[bytes, str] | Skip:
    """An image as the shard has it: (encoded, suffix), or why it is skipped.

    A file that already is what it would become is copied: to encode a JPEG again costs quality.
    """
    target = (options.size, options.size)
    try:
        data = read(item.source)
        with opened(data) as image:
            shorter = min(image.size)
            if shorter < options.min_side:
                return Skip("too small", item.source.where, f"{image.width} x {image.height}")
            wanted = {"jpg": "JPEG", "png": "PNG"}[options.suffix]
            plain = (
                image.format == wanted and image.mode == "RGB" and "transparency" not in image.info
            )
            if plain and image.size == target and image.getexif().get(0x0112, 1) == 1:
                image.load()  # raises if it is damaged
                return data, options.suffix
            # A JPEG decoder can halve for nothing; twice the target is left for the good filter.
            image.draft(None, (2 * options.size, 2 * options.size))
            picture = to_rgb(image)
    except (OSError, ValueError) as error:
        return Skip("cannot be read", item.source.where, " ".join(str(error).split()))
    side = min(picture.size)
    place = 0.5
    if options.crop == "random":  # seeded by content: the same crop in every run
        place = int.from_bytes(hashlib.sha256(data).digest()[:8], "big") / 2**64
    left, top = (round(place * (length - side)) for length in picture.size)
    box = (left, top, left + side, top + side)
    picture = picture.resize(target, Image.Resampling.LANCZOS, box=box)
    file = io.BytesIO()
    if options.suffix == "jpg":
        picture.save(file, "jpeg", quality=95, subsampling=0)
    else:
        picture.save(file, "png")
    return file.getvalue(), options.suffix


def process_all(items: Sequence[Item], options: Options) -> list[tuple[bytes, str] | Skip]:
    """`process` for a chunk."""
    return [process(item, options) for item in items]


def digest_all(sources: Sequence[Source]) -> list[str]:
    """SHA-256 of each one's bytes, in hexadecimal; '' if it cannot be read."""

    def digest(source: Source) -> str:
        try:
            return hashlib.sha256(read(source)).hexdigest()
        except (OSError, ValueError):  # `process` will say so
            return ""

    return [digest(source) for source in sources]


def start_worker() -> None:
    """Leave Ctrl-C to the main process, and end when that one is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()

    def leave() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=leave, daemon=True).start()
