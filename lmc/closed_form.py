"""`lmc closed_form`: a corrector estimated from a stage-one configuration, in place of training."""

import itertools
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch

from lmc.configs import build, read_stage_one
from lmc.corrector import Statistics
from lmc.device import choose_device
from lmc.filter import estimate_filter
from lmc.measure.correctors import HELDOUT, evaluate_corrector
from lmc.priors import Prior
from lmc.progress import Progress
from lmc.release import check_out, stated, write_release
from lmc.shards.images import ImageStream
from lmc.shards.triplets import Triplets, TripletStream, check_origin, triplet_origin, triplets_of


def closed_form(
    training: list[str],
    *,
    out: Path,
    triplets: int = 4000,
    bins: int = 16,
    batch_size: int = 50,
    seed: int = 0,
    each_channel: bool = False,
    statistics: Statistics = "image",
    license: str | None = None,
    data: str | None = None,
    prior_license: str | None = None,
    device: str = "auto",
) -> None:
    """Estimate a closed-form corrector, in seconds, in place of stage one.

    Args:
        training: configuration of train_bias.py, or several, each over the one before: prior, data
            and time_range are taken.
        out: release to write.
        triplets: to estimate from.
        bins: of t.
        batch_size: images at a time.
        seed: of images, t and eps.
        each_channel: filter each channel by itself: a smaller and coarser corrector.
        statistics: of Eq. 10.
        license, data, prior_license: see lmc release; default the section 'release' of the
            configuration.
        device: cpu, cuda, …; default the GPU where there is one.

    Raises:
        OSError, ValueError: the configuration or its data are not what they must be, or too few
            triplets for the bins; or the licences are not stated.
    """
    device = choose_device(device)
    for name, number in (("triplets", triplets), ("bins", bins), ("batch_size", batch_size)):
        if number < 1:
            raise ValueError(f"{name} must be at least 1, got {number}")
    config = read_stage_one(training)
    check_out(out)
    terms = stated(config.release, license=license, data=data, prior_license=prior_license)
    origin = triplet_origin(config.train)
    images_heldout = triplet_origin(config.heldout) is None
    prior = build(Prior, config.prior)
    size = config.image_size or prior.image_size
    identity = prior.identity
    began = time.monotonic()
    if origin is not None:
        check_origin(origin, identity, config.time_range)
    else:
        prior.to(device)
    batches = training_triplets(
        config.train, prior, triplets, size, batch_size, config.time_range, seed, device
    )
    corrector = estimate_filter(
        batches, identity, bins, config.time_range, not each_channel, statistics
    )
    seconds = time.monotonic() - began
    results = {}
    if images_heldout:
        prior.to(device)
        # As many as train_bias.py looks at.
        heldout = ImageStream(config.heldout, size, batch_size, training=False, limit=HELDOUT)
        results = evaluate_corrector(
            corrector.to(device), prior, heldout, time_range=config.time_range, device=device
        )
    how = f"estimated from {-(-triplets // batch_size) * batch_size} triplets in {seconds:.0f} s"
    write_release(corrector.cpu(), out, how, terms, results)
    print(f"{how}; released to {out}")
    for name, value in results.items():
        print(f"  held-out {name}: {value:.4f}")


def training_triplets(
    train: str,
    prior: Prior,
    count: int,
    image_size: int,
    batch_size: int,
    time_range: tuple[float, float],
    seed: int,
    device: torch.device | str,
) -> Iterator[Triplets]:
    """Triplets of training data, read if they are stored and else sampled, with progress.

    Args:
        train: shards of triplets or of images.
        prior: loaded, on `device`, if they are of images.
        count: how many, up to the next whole batch.
        image_size: of the images in the shards.
        batch_size: of triplets.
        time_range: t is uniform in it; stored triplets have their own.
        seed: of their order, t and eps.
        device: where to compute.
    """
    batches: Iterable[Triplets]
    if triplet_origin(train) is not None:
        batches = TripletStream(train, batch_size, training=True, seed=seed)
    else:
        images = ImageStream(train, image_size, batch_size, training=True, seed=seed)
        batches = triplets_of(images, prior, seed, time_range, device)
    wanted = -(-count // batch_size)
    with Progress("estimating", wanted * batch_size, "triplets") as progress:
        for number, batch in enumerate(itertools.islice(batches, wanted), 1):
            yield batch
            progress.update(number * batch_size)
