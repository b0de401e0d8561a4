"""The triplets of a prior sampled once and for all, into shards."""

import fcntl
import io
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lmc.configs import build, read_stage_one
from lmc.device import choose_device
from lmc.files import read_json, write_json
from lmc.priors import Embedding, Prior
from lmc.progress import Progress
from lmc.schedule import TIME_RANGE, check_time_range
from lmc.shards.images import ImageBatch, ImageStream, from_uint8, resize, to_uint8
from lmc.shards.stream import (
    ahead,
    at_least_one,
    check_rank,
    check_shard,
    expand_shards,
    write_members,
)
from lmc.shards.triplets import RECORD, draw_for_key, sample_triplets, triplet_origin

# ---------------------------------------------------------------------------------------------
# Writing


@dataclass(frozen=True)
class TripletSet:
    """What a folder of triplet shards is made of; its triplets.json records it.

    Args:
        shards: of the images, see `expand_shards`. Each becomes one of the same name.
        image_size: the side in pixels of their images; resized to the prior's.
        times_per_image: triplets an image.
        time_range: t is uniform in it.
        seed: of t and eps.

    Raises:
        ValueError: a number or range that makes no sense.
    """

    shards: Sequence[str]
    image_size: int
    times_per_image: int = 4
    time_range: tuple[float, float] = TIME_RANGE
    seed: int = 0

    def __post_init__(self) -> None:
        check_time_range(self.time_range)
        at_least_one(image_size=self.image_size, times_per_image=self.times_per_image)


def write_triplets(
    prior: Prior,
    what: TripletSet,
    out: Path,
    batch_size: int = 16,
    device: torch.device | str = "cpu",
    rank: int = 0,
    world_size: int = 1,
) -> dict[str, Any]:
    """Write the triplet shards of `what` that are not there yet; several processes share them.

    The triplets follow from `what` and the prior alone: not from the number of processes, and from
    `batch_size` and `device` only as far as these change the last bits of floating point.

    Args:
        out: folder to write: NAME.tar and NAME.json (its counts) for each shard, triplets.json.
        batch_size: images at a time; the prior sees each at all its times at once.
        device: of the prior.
        rank, world_size: of this process: it writes every world_size-th shard.

    Returns:
        Of the shards that are done, over all processes: shards, shards_done, images, triplets,
        bytes and skipped (the broken samples, with what broke).

    Raises:
        FileNotFoundError: see `expand_shards`.
        ValueError: a number is out of its range; `out` holds triplets made with something else;
            the shards hold triplets already, or nothing that can be read; a z_hat has no place in
            float16.
    """
    at_least_one(batch_size=batch_size)
    check_rank(rank, world_size)
    urls = expand_shards(what.shards)
    shards = dict(zip(_names(urls), urls, strict=True))
    if triplet_origin(urls) is not None:
        raise ValueError(f"{urls[0]} holds triplets already: name the shards of the images")
    out.mkdir(parents=True, exist_ok=True)
    with open(out / ".lock", "w") as lock:
        # One process at a time: the others find the record and the embedding made.
        fcntl.flock(lock, fcntl.LOCK_EX)
        _record(out, what, shards, prior)
        null = prior.embed([""]).to(device)
    mine = list(shards)[rank::world_size]
    todo = [name for name in mine if not _done(out, name)]
    who = f"[{rank}] " if world_size > 1 else ""
    print(f"{who}{len(mine)} shards to make here, {len(mine) - len(todo)} of them done before")
    if todo:
        prior.to(device)
    with Progress(f"{who}sampling triplets", None, "images") as progress:
        for number, name in enumerate(todo, 1):
            stream = ImageStream(shards[name], what.image_size, batch_size, training=False)
            skipped: list[str] = []
            samples = _triplet_samples(prior, null, stream, what, device, skipped, progress)
            images = write_members(out / f"{name}.tar", samples)
            if not images:
                (out / f"{name}.tar").unlink()
                raise ValueError(
                    f"{shards[name]} has no sample that can be read, last: {skipped[-1:]}"
                )
            write_json(out / f"{name}.json", {"images": images, "skipped": skipped})
            # As if the other shards were as large as the finished ones.
            expected = round(progress.done / number * len(todo))
            progress.update(progress.done, f"{number} of {len(todo)} shards", total=expected)
    return summary(out)


def summary(out: Path) -> dict[str, Any]:
    """What `write_triplets` returns, of the folder as it is."""
    record = read_json(out / RECORD, ("shards", "times_per_image"))
    done = [name for name in record["shards"] if _done(out, name)]
    counts = [json.loads((out / f"{name}.json").read_text()) for name in done]
    images = sum(count["images"] for count in counts)
    return {
        "shards": len(record["shards"]),
        "shards_done": len(done),
        "images": images,
        "triplets": images * record["times_per_image"],
        "bytes": sum((out / f"{name}.tar").stat().st_size for name in done),
        "skipped": [sample for count in counts for sample in count["skipped"]],
    }


def draw_for(key: str, shape: Sequence[int], what: TripletSet) -> tuple[Tensor, Tensor]:
    """The times (times_per_image,) and noises (times_per_image, *shape) of the image `key`.

    See `lmc.shards.triplets.draw_for_key`.
    """
    repetitions = range(what.times_per_image)
    drawn = (draw_for_key(key, shape, what.time_range, what.seed, i) for i in repetitions)
    t, eps = zip(*drawn, strict=True)
    return torch.cat(t), torch.cat(eps)


@torch.no_grad()
def _triplet_samples(
    prior: Prior,
    null: Embedding,
    stream: ImageStream,
    what: TripletSet,
    device: torch.device | str,
    skipped: list[str],
    progress: Progress,
) -> Iterator[dict[str, Any]]:
    """The samples of one triplet shard, from the images of another; fills `skipped`."""
    times = what.times_per_image
    origin = _origin(prior.identity, what.time_range)
    for batch in ahead(stream):
        skipped += batch.skipped
        if not batch.key:
            continue
        z, encode = _to_stored(prior, batch, device)
        t, eps = zip(*(draw_for(key, z.shape[1:], what) for key in batch.key), strict=True)
        x = sample_triplets(
            prior,
            z.repeat_interleave(times, 0).to(device),
            torch.cat(t).to(device),
            torch.cat(eps).to(device),
            null.expand(len(z) * times),
        )
        files = encode()  # while a GPU computes
        z_hat = x.z_hat.to("cpu", torch.float16).unflatten(0, (len(z), times))
        for i, key in enumerate(batch.key):
            if not z_hat[i].isfinite().all():
                raise ValueError(
                    f"z_hat of {key} is not finite in float16 (t = {t[i].tolist()}): a prior in "
                    "float16 that overflows (try bfloat16), or times too near 1"
                )
            about = {"label": batch.label[i], "t": t[i].tolist(), "origin": origin}
            yield {
                "__key__": key,
                **files[i],
                "z_hat.npy": _npy(z_hat[i]),
                "json": json.dumps(about).encode(),
            }
        progress.advance(len(z))


def _to_stored(
    prior: Prior, batch: ImageBatch, device: torch.device | str
) -> tuple[Tensor, Callable[[], list[dict[str, bytes]]]]:
    """z as it will be read back, float32 (B, C, H, W) on the CPU; what makes the files of it."""
    image = resize(batch.image.to(device), prior.image_size)
    z = prior.encode(image)
    if not prior.latent:
        pixels = to_uint8(z).cpu()
        return from_uint8(pixels), lambda: [{"png": _png(one)} for one in pixels]
    half = z.to("cpu", torch.float16)
    return half.float(), lambda: [{"z.npy": _npy(one)} for one in half]


def _png(pixels: Tensor) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(file, "png")
    return file.getvalue()


def _npy(value: Tensor) -> bytes:
    file = io.BytesIO()
    np.save(file, value.numpy())
    return file.getvalue()


def _origin(identity: Mapping[str, Any], time_range: tuple[float, float]) -> dict[str, Any]:
    """What every triplet says of its making, as JSON gives it back."""
    return json.loads(json.dumps({"prior": dict(identity), "time_range": time_range}))


def _names(urls: Sequence[str]) -> list[str]:
    """Names for the triplet shards of `urls`: 'train-00000' of '…/train-00000.tar'."""
    names = []
    for url in urls:
        found = re.findall(r"([^/\s]+)\.tar\b", url)
        if not found:
            raise ValueError(f"{url} names no NAME.tar to call its triplets by")
        names.append(found[-1])
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"several shards are named {twice}.tar and would overwrite each other")
    return names


def _record(out: Path, what: TripletSet, shards: Mapping[str, str], prior: Prior) -> None:
    """Write triplets.json, or refuse to go on with one that says otherwise."""
    now = {**asdict(what), "shards": dict(shards), "prior": dict(prior.identity)}
    now = json.loads(json.dumps(now))
    file = out / RECORD
    if not file.exists():
        write_json(file, now)
        return
    there = read_json(file)
    other = [name for name in now if there.get(name) != now[name]]
    if other:
        said = "; ".join(f"{name} {there.get(name)} there, {now[name]} now" for name in other)
        raise ValueError(
            f"{out} holds triplets made with something else ({said}): name another folder, or "
            "delete that one"
        )


def _done(out: Path, name: str) -> bool:
    """Whether a triplet shard is there; its counts are written last."""
    if not (out / f"{name}.json").exists() or not (out / f"{name}.tar").exists():
        return False
    check_shard(str(out / f"{name}.tar"))
    return True


def triplets(
    training: list[str],
    *,
    out: Path,
    times_per_image: int = 4,
    batch_size: int = 16,
    rank: int | None = None,
    world_size: int | None = None,
    device: str = "auto",
) -> None:
    """Sample the triplets of a stage-one configuration into shards, once for many trainings.

    What is done in OUT is kept. Several processes share the shards (docs/triplets.md).

    Args:
        training: configuration of train_bias.py, or several, each over the one before: its prior,
            its train and held-out shards of images, image_size, time_range and seed_everything are
            taken.
        out: folder to write.
        times_per_image: triplets an image.
        batch_size: images at a time; the prior sees times_per_image as many.
        rank, world_size: of this process; default $RANK and $WORLD_SIZE, which torchrun sets, else
            it is the only one.
        device: cpu, cuda (under torchrun each its own), …; default the GPU where there is one.

    Raises:
        OSError, ValueError: see `write_triplets`, or no configuration of stage one.
    """
    device = choose_device(device)
    rank = int(os.environ.get("RANK", 0)) if rank is None else rank
    world_size = int(os.environ.get("WORLD_SIZE", 1)) if world_size is None else world_size
    config = read_stage_one(training)
    prior = build(Prior, config.prior)
    what = TripletSet(
        (config.train, config.heldout),
        config.image_size or prior.image_size,
        times_per_image,
        config.time_range,
        config.seed,
    )
    done = write_triplets(prior, what, out, batch_size, device, rank, world_size)
    who = f"[{rank}] " if world_size > 1 else ""
    print(
        f"{who}{done['shards_done']} of {done['shards']} shards done in {out}: "
        f"{done['images']} images, {done['triplets']} triplets, {done['bytes'] / 1e9:.3f} GB "
        f"({done['bytes'] / max(1, done['triplets']) * 1e-3:.1f} GB a million triplets), "
        f"{len(done['skipped'])} broken samples skipped"
    )
    for sample in done["skipped"][:10]:
        print(f"  skipped: {sample}")
    if len(done["skipped"]) > 10:
        print(f"  … all of them in {out}/*.json")
