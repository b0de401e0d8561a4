"""Triplets (z, ẑ_t, t): what the prior's one-step denoising makes of clean images [LMC, Sec. 4].

They are sampled while training, or once and for all into shards (`write_triplets`), which
`TripletStream` reads. A sample KEY of such a shard is one image with several times:

    KEY.png        z of a pixel prior, 8 bits a channel; or
    KEY.z.npy      z of a latent prior, float16 (C, H, W)
    KEY.z_hat.npy  z_hat at each time, float16 (times, C, H, W)
    KEY.json       the image's label, "t": the times, "origin": the prior's identity, time_range

z is rounded to what is stored before the prior sees it: z_hat belongs to the stored z.
"""

import hashlib
import io
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lmc.priors import Embedding, Prior, check_identity, say_unchecked
from lmc.schedule import TIME_RANGE, UniformTime, add_noise
from lmc.shards.images import ImageBatch, as_floats, decode_pixels, resize
from lmc.shards.stream import BrokenSample, ShardStream, about_of, ahead, where_of

RECORD = "triplets.json"  # beside the shards: what they were made with


@dataclass
class Triplets:
    """A batch of triplets.

    Attributes:
        z: clean images in the prior's space, float32 (B, C, H, W).
        z_hat: the prior's unconditional one-step estimates of them, the same shape, unclipped.
        t: times in (0, 1), float32 (B,).
    """

    z: Tensor
    z_hat: Tensor
    t: Tensor


@dataclass  # not frozen: Lightning moves its tensors in place of it
class TripletBatch:
    """Triplets read from shards.

    Attributes:
        stored_z: z as it is stored, uint8 pixels or float16 latents, a half or less of what floats
            would take on their way to the device.
        stored_z_hat: float16.
        t: as of `Triplets`.
        key: the keys of their images; a batch may hold an image at several times.
        position, skipped: as of `lmc.shards.images.ImageBatch`.
    """

    stored_z: Tensor
    stored_z_hat: Tensor
    t: Tensor
    key: list[str]
    position: tuple[int, int, int] = (0, 0, 0)
    skipped: tuple[str, ...] = ()

    @property
    def z(self) -> Tensor:
        """See `Triplets`."""
        return as_floats(self.stored_z).float()

    @property
    def z_hat(self) -> Tensor:
        """See `Triplets`."""
        return self.stored_z_hat.float()

    def pin_memory(self) -> "TripletBatch":
        """The same in memory that a GPU can read by itself; for `DataLoader`."""
        names = ("stored_z", "stored_z_hat", "t")
        return replace(self, **{name: getattr(self, name).pin_memory() for name in names})


def draw_t_and_eps(
    z: Tensor, generator: torch.Generator, time_range: tuple[float, float] = TIME_RANGE
) -> tuple[Tensor, Tensor]:
    """t ~ U(time_range), (B,), and eps ~ N(0, I), as z; drawn on the generator's device."""
    t = UniformTime(time_range).draw(len(z), 0.0, generator, z.dtype)
    eps = torch.randn(z.shape, generator=generator, device=generator.device, dtype=z.dtype)
    return t.to(z.device), eps.to(z.device)


def draw_for_key(
    key: str,
    shape: Sequence[int],
    time_range: tuple[float, float] = TIME_RANGE,
    seed: int = 0,
    repetition: int = 0,
) -> tuple[Tensor, Tensor]:
    """t (1,) and eps (1, *shape) of the image `key`, as `draw_t_and_eps`, float32.

    They follow from (seed, repetition, key) alone, and from t's range; always drawn on the CPU.
    """
    digest = hashlib.sha256(f"{seed}/{repetition}/{key}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big"))
    return draw_t_and_eps(torch.empty(1, *shape), generator, time_range)


def encoded(prior: Prior, image: Tensor) -> Tensor:
    """Images (B, 3, H, W) of any size in the prior's space, float32 (B, C, H', W')."""
    return prior.encode(resize(image, prior.image_size)).float()


@torch.no_grad()
def sample_triplets(prior: Prior, z: Tensor, t: Tensor, eps: Tensor, null: Embedding) -> Triplets:
    """One triplet an image: a single denoiser evaluation each, without a prompt.

    Args:
        prior: loaded.
        z: clean images in its space, (B, C, H, W).
        t: times in (0, 1), (B,).
        eps: noise, as z.
        null: the unconditional embedding, B rows.
    """
    z_t = add_noise(z, eps, *prior.schedule.coefficients(t, z.dtype))
    _, z_hat = prior.predict(z_t, t, null)
    return Triplets(z, z_hat, t)


@torch.no_grad()
def heldout_triplets(
    prior: Prior,
    image: Tensor,
    keys: Sequence[str],
    null: Embedding,
    time_range: tuple[float, float] = TIME_RANGE,
) -> Triplets:
    """The triplets that held-out L_k is measured on, one an image, see `draw_for_key`.

    They are the same whatever the batches, processes and devices, and the first of those that
    `lmc triplets` stores of these images with its default seed.

    Args:
        prior: loaded.
        image: (B, 3, H, W) in [-1, 1], on the prior's device; resized to its resolution.
        keys: of the images.
        null: the unconditional embedding, one row.
        time_range: t is uniform in it.
    """
    z = encoded(prior, image)
    drawn = (draw_for_key(key, z.shape[1:], time_range) for key in keys)
    t, eps = (torch.cat(each).to(z.device) for each in zip(*drawn, strict=True))
    return sample_triplets(prior, z, t, eps, null.expand(len(z)))


def triplets_of(
    images: Iterable[ImageBatch],
    prior: Prior,
    seed: int,
    time_range: tuple[float, float] = TIME_RANGE,
    device: torch.device | str = "cpu",
) -> Iterator[Triplets]:
    """One triplet an image, batch by batch, as long as there are images.

    Args:
        images: of any size; they are resized to the prior's.
        prior: loaded, on `device`.
        seed: of t and eps.
        time_range: t is uniform in it.
        device: where to compute.
    """
    null = prior.embed([""]).to(device)
    generator = torch.Generator(device).manual_seed(seed)
    for batch in ahead(images):
        if not len(batch.image):  # only broken samples were left for the last batch of a pass
            continue
        with torch.no_grad():
            z = encoded(prior, batch.image.to(device))
        t, eps = draw_t_and_eps(z, generator, time_range)
        yield sample_triplets(prior, z, t, eps, null.expand(len(z)))


# ---------------------------------------------------------------------------------------------
# Reading


def triplet_origin(shards: str | Sequence[str]) -> dict[str, Any] | None:
    """'prior' (its identity) and 'time_range' of triplet shards; None of shards of images.

    Reads the first sample, and those after it as long as they are broken.

    Raises:
        FileNotFoundError, ValueError: see `expand_shards`; or no triplet can be read.
    """
    stream = ShardStream(shards, 1, training=False)
    broken = None
    for sample in stream.samples(stream.urls[:1]):
        if "z_hat.npy" not in sample:
            break
        try:
            return _about(sample)["origin"]
        except BrokenSample as error:
            broken = error
    if broken:
        raise ValueError(f"no triplet of {stream.urls[0]} can be read, last: {broken}")
    return None


def check_origin(
    origin: Mapping[str, Any], identity: Mapping[str, Any], time_range: tuple[float, float]
) -> None:
    """Refuse triplets of another prior or time range than a training is for.

    Args:
        origin: see `triplet_origin`.
        identity: `Prior.identity` of the training's prior.
        time_range: the training's.

    Warns:
        Of what could not be compared; see `lmc.priors.check_identity`.

    Raises:
        ValueError: names both.
    """
    try:
        unchecked = check_identity(origin["prior"], identity)
    except ValueError as error:
        raise ValueError(
            f"the triplets were sampled from another prior.\n{error}\n"
            "Sample them from this one: lmc triplets …"
        ) from error
    say_unchecked("the triplets", unchecked)
    if tuple(origin["time_range"]) != tuple(time_range):
        raise ValueError(
            f"the triplets were sampled with time_range {list(origin['time_range'])}, "
            f"the training has {list(time_range)}"
        )


class TripletStream(ShardStream):
    """Batches of triplets from shards of `write_triplets`, see `lmc.shards.stream.ShardStream`.

    A sample, for batch_size and shuffle, is one triplet: an image comes as often as it has times.
    `limit` is of images, each at all its times.

    Args:
        shards, batch_size, training, seed, shuffle, rank, world_size, limit: see `ShardStream`.

    Raises:
        FileNotFoundError, ValueError: see `expand_shards`; the shards' folder is not finished;
            or, while reading, triplets of another origin than the first.
    """

    members = "KEY.png or KEY.z.npy, KEY.z_hat.npy and KEY.json"

    def __init__(
        self,
        shards: str | Sequence[str],
        batch_size: int,
        training: bool,
        seed: int = 0,
        shuffle: int = 1000,
        rank: int = 0,
        world_size: int = 1,
        limit: int | None = None,
    ) -> None:
        super().__init__(shards, batch_size, training, seed, shuffle, rank, world_size, limit)
        self.origin = triplet_origin(self.urls[:1])
        for folder in sorted({Path(url).parent for url in self.urls if Path(url).exists()}):
            if (folder / RECORD).exists():
                names = json.loads((folder / RECORD).read_text())["shards"]
                missing = sum(not (folder / f"{name}.tar").exists() for name in names)
                if missing:
                    raise ValueError(
                        f"{folder}: {missing} of {len(names)} shards of triplets are not there; "
                        "the same lmc triplets again goes on with them"
                    )

    def samples(self, urls: Sequence[str], limit: int | None = None) -> Iterator[dict[str, Any]]:
        """Each raw sample once for every time, with its number as 'repetition'.

        They share 'decoded', where `_decode` leaves what it read for the next of them.
        """
        for sample in super().samples(urls, limit):
            try:
                times = len(_about(sample)["t"])
            except BrokenSample:
                times = 1  # once, for _decode to refuse it
            decoded: list[tuple[Tensor, Tensor, list[float]]] = []
            for repetition in range(times):
                yield {**sample, "repetition": repetition, "decoded": decoded}

    def _decode(self, sample: dict[str, Any]) -> tuple[Tensor, Tensor, float, str]:
        decoded, repetition = sample["decoded"], sample["repetition"]
        if not decoded:
            decoded.append(self._read(sample))
        z, z_hat, t = decoded[0]
        return z, z_hat[repetition], t[repetition], sample["__key__"]

    def _read(self, sample: dict[str, Any]) -> tuple[Tensor, Tensor, list[float]]:
        """z (C, H, W), and z_hat (N, C, H, W) and t at all of an image's times."""
        about, where = _about(sample), where_of(sample)
        if about["origin"] != self.origin:
            raise ValueError(
                f"{where} is of another origin than the first triplet: {about['origin']}, "
                f"there {self.origin}"
            )
        try:
            z_hat = _tensor(read_npy(sample["z_hat.npy"]))
            stored = "png" in sample
            z = decode_pixels(sample["png"]) if stored else _tensor(read_npy(sample["z.npy"]))
        except (KeyError, ValueError) as error:
            raise BrokenSample(f"{where}: {error!r}") from error
        times = len(about["t"])
        if z_hat.shape != (times, *z.shape):
            found = f"z is {tuple(z.shape)}, z_hat {tuple(z_hat.shape)}"
            raise BrokenSample(f"{where}: {found}, of {times} times")
        if not (z.isfinite().all() and z_hat.isfinite().all()):
            raise BrokenSample(f"{where}: not finite")
        return z, z_hat, about["t"]

    def _collate(
        self,
        decoded: list[tuple[Tensor, Tensor, float, str]],
        position: tuple[int, int, int],
        skipped: tuple[str, ...],
    ) -> TripletBatch:
        if not decoded:
            none = torch.empty(0, 3, 1, 1)
            return TripletBatch(none, none, torch.empty(0), [], position, skipped)
        z, z_hat, t, key = zip(*decoded, strict=True)
        times = torch.tensor(t, dtype=torch.float32)
        return TripletBatch(torch.stack(z), torch.stack(z_hat), times, list(key), position, skipped)


def read_npy(data: bytes) -> NDArray[np.float16]:
    """A .npy file of float16; nothing but numbers is read, and no more of them than there are.

    `numpy.load` would make room for whatever shape the header tells.

    Raises:
        ValueError: it is none, or has not as many numbers as its shape says.
    """
    file = io.BytesIO(data)
    try:
        if np.lib.format.read_magic(file) != (1, 0):
            raise ValueError("not of version 1.0")
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
    except Exception as error:  # the header is Python's syntax, of which anything can go wrong
        raise ValueError(f"no .npy file: {error!r}") from error
    if dtype != np.float16:
        raise ValueError(f"of {dtype}, not of float16")
    numbers = np.frombuffer(data, dtype, offset=file.tell())
    if min(shape, default=0) < 0 or math.prod(shape) != len(numbers):
        raise ValueError(f"of shape {shape}, with {len(numbers)} numbers")
    return numbers.reshape(shape, order="F" if fortran else "C")


def _tensor(numbers: NDArray[np.float16]) -> Tensor:
    return torch.tensor(numbers)


def _about(sample: dict[str, Any]) -> dict[str, Any]:
    """KEY.json of a triplet sample."""
    about = about_of(sample)
    t, origin = about.get("t"), about.get("origin")
    numbers = isinstance(t, list) and all(isinstance(x, float) and 0 < x < 1 for x in t)
    if not t or not numbers or not isinstance(origin, dict):
        raise BrokenSample(f"{where_of(sample)}: no KEY.json with t and origin")
    prior, time_range = origin.get("prior"), origin.get("time_range")
    if not isinstance(prior, dict) or not isinstance(time_range, list):
        raise BrokenSample(f"{where_of(sample)}: the origin lacks a prior or time_range")
    return about
