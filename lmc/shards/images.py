"""Shards of images to batches, and back. No noise, no Lightning.

A shard is a webdataset tar: for each sample KEY an image file (KEY.png, .jpg, .jpeg or .webp) and
KEY.json with at least {"label": the class}.
"""

import hashlib
import json
import random
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import default_collate

from lmc.errors import require
from lmc.shards.encoded import opened
from lmc.shards.stream import (
    BrokenSample,
    ShardStream,
    about_of,
    at_least_one,
    is_remote,
    where_of,
    write_members,
)

SUFFIXES = ("png", "jpg", "jpeg", "webp")


@dataclass  # not frozen: Lightning moves its tensors in place of it
class ImageBatch:
    """A batch of images.

    Attributes:
        pixels: uint8 (B, 3, H, W), a quarter of what floats would take on their way to the device,
            in channels-last order; or, of images of more than 8 bits, float32 in [-1, 1].
        key: the samples' keys.
        label: their classes.
        position: of the stream that made it, after this batch: (worker, round, samples read).
        skipped: keys of broken samples passed over to make this batch, with what broke.
    """

    pixels: Tensor
    key: list[str]
    label: list[str]
    position: tuple[int, int, int] = (0, 0, 0)
    skipped: tuple[str, ...] = ()

    @property
    def image(self) -> Tensor:
        """float32 (B, 3, H, W) in [-1, 1], on the device of the pixels."""
        return as_floats(self.pixels).contiguous()

    def pin_memory(self) -> "ImageBatch":
        """The same in memory that a GPU can read by itself; for `DataLoader`."""
        return replace(self, pixels=self.pixels.pin_memory())


def decode_image(data: bytes, where: str = "image") -> Tensor:
    """An encoded image as float32 (3, H, W) in [-1, 1], upright; any mode becomes RGB.

    Raises:
        ValueError: the data is no whole image; `where` is named.
    """
    return as_floats(decode_pixels(data, where))


def decode_pixels(data: bytes, where: str = "image") -> Tensor:
    """`decode_image` as it is stored: uint8 (3, H, W); of 16 bits, float32 in [-1, 1]."""
    try:
        with opened(data) as image:
            ImageOps.exif_transpose(image, in_place=True)
            return pixels_of(image)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def pixels_of(image: Image.Image) -> Tensor:
    """A picture's pixels, any mode as RGB: uint8 (3, H, W); of 16 bits, float32 in [-1, 1]."""
    sixteen = image.mode.startswith("I")  # grey, which Pillow would clip to 8 bits
    pixels = np.asarray(image if sixteen or image.mode == "RGB" else image.convert("RGB"))
    if sixteen:
        grey = pixels.astype(np.float32).clip(0, 65535) / 65535 * 2 - 1
        return torch.from_numpy(grey).expand(3, -1, -1).clone()
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1)


def as_floats(pixels: Tensor) -> Tensor:
    """uint8 as `from_uint8`; floats as they are."""
    return from_uint8(pixels) if pixels.dtype == torch.uint8 else pixels


def to_uint8(image: Tensor) -> Tensor:
    """[-1, 1] to uint8 [0, 255], clipped and rounded; any shape."""
    return ((image.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def from_uint8(pixels: Tensor) -> Tensor:
    """uint8 [0, 255] to float32 [-1, 1]; any shape."""
    return pixels.float() / 127.5 - 1


def resize(image: Tensor, size: int | tuple[int, int]) -> Tensor:
    """(B, C, H, W) to (B, C, size, size), or to a height and width; antialiased, differentiable."""
    sides = (size, size) if isinstance(size, int) else size
    if image.shape[-2:] == sides:
        return image
    return F.interpolate(image, sides, mode="bilinear", antialias=True)


def middle_square(image: Tensor, size: int) -> Tensor:
    """The centred square of (B, C, H, W), as wide as the shorter side, `resize`d to `size`."""
    side = min(image.shape[-2:])
    top, left = ((length - side) // 2 for length in image.shape[-2:])
    return resize(image[..., top : top + side, left : left + side], size)


class ImageStream(ShardStream):
    """Batches of images, see `ShardStream`.

    Args:
        shards, batch_size, training, seed, shuffle, rank, world_size, limit: see `ShardStream`.
        image_size: the side in pixels that every image must have.
        balance: in training, how much less the images of a frequent class are read, in [0, 1]: in
            proportion to n^-balance of the n images a class has, so that at 1 all classes are as
            frequent. Above 0 all labels are read first, of local shards.

    Raises:
        FileNotFoundError, ValueError: see `ShardStream`; image_size is less than 1; balance is out
            of its range, or of shards that are not local; or, while reading, an image of another
            size (naming the shard and the key).
    """

    members = "KEY.png and KEY.json"

    def __init__(
        self,
        shards: str | Sequence[str],
        image_size: int,
        batch_size: int,
        training: bool,
        seed: int = 0,
        shuffle: int = 1000,
        rank: int = 0,
        world_size: int = 1,
        limit: int | None = None,
        balance: float = 0.0,
    ) -> None:
        at_least_one(image_size=image_size)
        super().__init__(shards, batch_size, training, seed, shuffle, rank, world_size, limit)
        self.image_size = image_size
        self.shares: dict[str, float] = {}
        require(0 <= balance <= 1, "balance", "in [0, 1]", balance)
        if training and balance:
            if remote := [url for url in self.urls if is_remote(url)]:
                raise ValueError(f"balance needs local shards, whose labels it counts: {remote[0]}")
            counts = self.labels()
            rarest = min(counts.values(), default=1)
            self.shares = {name: (rarest / count) ** balance for name, count in counts.items()}

    def labels(self) -> Counter[str]:
        """How many samples have each label; what has none, or is broken, is not counted.

        Reads all shards once.
        """
        counts: Counter[str] = Counter()
        for sample in self.samples(self.urls):
            with suppress(BrokenSample):
                counts[_label(sample)] += 1
        return counts

    def _wanted(self, sample: dict[str, Any], rng: random.Random) -> bool:
        """See `ShardStream`: a share of each class."""
        if not self.shares:
            return True
        drawn = rng.random()
        try:
            return drawn < self.shares.get(_label(sample), 1.0)
        except BrokenSample:
            return True  # `_decode` names it

    def _collate(
        self,
        decoded: list[tuple[Tensor, str, str]],
        position: tuple[int, int, int],
        skipped: tuple[str, ...],
    ) -> ImageBatch:
        images, keys, labels = zip(*decoded, strict=True) if decoded else ((), (), ())
        if len({image.dtype for image in images}) > 1:
            images = tuple(map(as_floats, images))
        if not images:
            return ImageBatch(torch.empty(0, 3, 1, 1), [], [], position, skipped)
        # As they lie in memory, and in a worker right where the batch is handed over.
        stacked = default_collate([image.permute(1, 2, 0) for image in images]).permute(0, 3, 1, 2)
        return ImageBatch(stacked, list(keys), list(labels), position, skipped)

    def _decode(self, sample: dict[str, Any]) -> tuple[Tensor, str, str]:
        key, where, label = sample["__key__"], where_of(sample), _label(sample)
        data = next((sample[suffix] for suffix in SUFFIXES if suffix in sample), None)
        if data is None:
            raise BrokenSample(f"{where}: no image ({', '.join(SUFFIXES)})")
        try:
            image = decode_pixels(data, where)
        except ValueError as error:
            raise BrokenSample(str(error)) from error
        if image.shape[1:] != (self.image_size, self.image_size):
            raise ValueError(
                f"{where} is {image.shape[2]} x {image.shape[1]} pixels, image_size says "
                f"{self.image_size}: prepare the shards at that size, or set image_size"
            )
        return image, key, label


def _label(sample: dict[str, Any]) -> str:
    label = about_of(sample).get("label")
    if not isinstance(label, str):
        raise BrokenSample(f"{where_of(sample)}: no KEY.json with a label, a word")
    return label


def heldout_names(names: Iterable[str], fraction: float = 0.05) -> set[str]:
    """The held-out ones: the round(fraction · n) names with the smallest SHA-256.

    Independent of order, so that every mirror and every run of a dataset holds out the same.
    """
    digests = {name: name_digest(name) for name in names}
    held_out = heldout_digests(digests.values(), fraction)
    return {name for name, digest in digests.items() if digest in held_out}


def heldout_digests(digests: Iterable[str], fraction: float = 0.05) -> set[str]:
    """The round(fraction · n) smallest of n hexadecimal digests."""
    ranked = sorted(digests)
    return set(ranked[: round(fraction * len(ranked))])


def name_digest(name: str) -> str:
    """SHA-256 of a file's name, in hexadecimal; a name that is no UTF-8 counts by its bytes."""
    return hashlib.sha256(name.encode("utf-8", "surrogateescape")).hexdigest()


def write_shard(path: Path, samples: Iterable[tuple[str, bytes, str, dict[str, Any]]]) -> int:
    """Write one shard of images, atomically; the same samples always make the same bytes.

    Args:
        path: the tar to write.
        samples: (key, encoded image, its suffix, the json's content) each.

    Returns:
        The number of samples.
    """
    return write_members(
        path,
        (
            {"__key__": key, suffix: image, "json": json.dumps(about).encode()}
            for key, image, suffix, about in samples
        ),
    )
