"""What was measured, image by image, to a result: means, intervals, differences, JSON.

A result is the dict that `lmc evaluate --out` writes; docs/evaluation.md has every key of it.
"""

import hashlib
import importlib.metadata
import importlib.util
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lmc import __version__
from lmc.measure.metrics import (
    Array,
    fid,
    interval,
    kid,
    kid_subset_size,
    resampling,
    spectrum_error,
    spectrum_gained,
    spectrum_lost,
    weighted_cmmd,
)

FORMAT, VERSION = "lmc evaluation", 1
DISTANCES = ("lpips", "rmse", "one_minus_ssim")
LIBRARIES = ("torch", "torchvision", "transformers", "lpips", "torchmetrics", "torch-fidelity")
# Functions of the average spectra of outputs and sources: without a value per image.
SPECTRAL: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "spectrum_error": spectrum_error,
    "spectrum_lost": spectrum_lost,
    "spectrum_gained": spectrum_gained,
}
Features = Mapping[str, Mapping[str, Tensor]]  # by network and class, (M, D)
NETWORKS = ("inception", "clip", "classifier")  # whose features are kept
COMPARABLE = ("classes", "prompts", "candidates", "clip", "distance")  # settings that must agree


@dataclass(frozen=True)
class Real:
    """Real images of the target classes, to which outputs are near or not.

    Attributes:
        features: by network, of `NETWORKS`, and by class, (M, D) each.
        digest: `digest_of` the images.
    """

    features: Features
    digest: str


@dataclass
class Measured:
    """What was measured of N images, translated to C classes each.

    Attributes:
        keys, digests: of the sources: their keys, the SHA-256 of their pixels.
        values: by measure, (N, C).
        spectra, counts: power spectra (N, C, F), counts of derivatives (N, C, bins).
        source_spectra, source_counts: the same of the sources, (N, F), (N, bins).
        winners: (N, C) index of the first-ranked candidate, −1 a tie; or None.
        features: by network, 'inception' and 'clip', (N, C, D); of those there are.
        truth_digests: of the true counterparts: the SHA-256 of the pixels of all of a source's; or
            None, with the two below.
        truth_spectra: their power spectra, (N, C, F).
        truth_shifts: the means of the outputs' channels minus those of theirs, (N, C, 3).
    """

    keys: list[str]
    digests: list[str]
    values: dict[str, Array]
    spectra: Array
    counts: Array
    source_spectra: Array
    source_counts: Array
    winners: Array | None = None
    features: Mapping[str, Array] = field(default_factory=dict)
    truth_digests: list[str] | None = None
    truth_spectra: Array | None = None
    truth_shifts: Array | None = None

    def digest(self) -> str:
        """See `digest_of`, of the sources."""
        return digest_of(dict(zip(self.keys, self.digests, strict=True)))


def digest_of(images: Mapping[str, str]) -> str:
    """What tells sets of images apart: SHA-256 of the lines 'KEY SHA-256-OF-PIXELS' by key.

    Args:
        images: `pixel_digest` by key.
    """
    lines = "".join(f"{key} {images[key]}\n" for key in sorted(images))
    return hashlib.sha256(lines.encode()).hexdigest()


def pixel_digest(image: Array) -> str:
    """SHA-256 of the pixels of a uint8 (3, S, S)."""
    return hashlib.sha256(image.tobytes()).hexdigest()


def merge(parts: Sequence[Measured]) -> Measured:
    """As one, sorted by key: the same whatever the batches and processes were.

    Raises:
        ValueError: no images, or a key twice.
    """
    keys = [key for part in parts for key in part.keys]
    check_keys(keys)
    order = sorted(range(len(keys)), key=keys.__getitem__)

    def join(each: Sequence[Any]) -> Any:
        return None if each[0] is None else np.concatenate(each)[order]

    def lists(each: Sequence[list[str]]) -> list[str]:
        every = [one for part in each for one in part]
        return [every[i] for i in order]

    first = parts[0]
    return Measured(
        keys=[keys[i] for i in order],
        digests=lists([part.digests for part in parts]),
        values={name: join([part.values[name] for part in parts]) for name in first.values},
        spectra=join([part.spectra for part in parts]),
        counts=join([part.counts for part in parts]),
        source_spectra=join([part.source_spectra for part in parts]),
        source_counts=join([part.source_counts for part in parts]),
        winners=join([part.winners for part in parts]),
        features={name: join([part.features[name] for part in parts]) for name in first.features},
        truth_digests=None
        if first.truth_digests is None
        else lists([part.truth_digests or [] for part in parts]),
        truth_spectra=join([part.truth_spectra for part in parts]),
        truth_shifts=join([part.truth_shifts for part in parts]),
    )


def check_keys(keys: Sequence[str]) -> None:
    """Refuse a list of held-out images that cannot be one.

    Raises:
        ValueError: no images, or a key twice.
    """
    if not keys:
        raise ValueError("no held-out images to evaluate on")
    if len(set(keys)) < len(keys):
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the held-out images have the key {twice} twice")


# ---------------------------------------------------------------------------------------------
# Statistics


def statistics(
    measured: Measured, weights: Array, real: Features | None = None
) -> dict[str, Array]:
    """Every measure that is a function of weighted images, under several weightings.

    Args:
        measured: of N images and C classes.
        weights: (R, N), rows of sum 1.
        real: see `result`; CMMD is measured with it.

    Returns:
        By measure (R, 1 + C): over all classes, and of each.
    """
    found = {name: averages(values, weights) for name, values in measured.values.items()}
    spectra = torch.from_numpy(averages(measured.spectra, weights))
    source = torch.from_numpy(weights @ measured.source_spectra)[:, None]
    found |= {name: of(spectra, source).numpy() for name, of in SPECTRAL.items()}
    by_class = {}
    if measured.truth_spectra is not None and measured.truth_shifts is not None:
        mine, theirs = spectra[:, 1:], _by_class(measured.truth_spectra, weights)
        by_class["truth_lost"] = spectrum_lost(mine, torch.from_numpy(theirs)).numpy()
        by_class["truth_gained"] = spectrum_gained(mine, torch.from_numpy(theirs)).numpy()
        by_class["truth_cast"] = np.abs(_by_class(measured.truth_shifts, weights)).mean(-1)
    for network, name in (("clip", "cmmd"), ("classifier", "classifier_cmmd")):
        if real is not None and {network} <= real.keys() & measured.features.keys():
            made = measured.features[network].swapaxes(0, 1)
            pairs = zip(made, real[network].values(), strict=True)
            many = torch.from_numpy(weights)
            columns = [weighted_cmmd(torch.from_numpy(mine), there, many) for mine, there in pairs]
            by_class[name] = torch.stack(columns, 1).numpy()
    # Of each class against its own: two classes' faults do not make up for each other.
    return found | {name: _with_mean(each) for name, each in by_class.items()}


def overall(measured: Measured) -> dict[str, float]:
    """Every measure over all images and classes, as a result's summary has it."""
    count = len(measured.keys)
    once = statistics(measured, np.full((1, count), 1 / count))
    return {name: float(each[0, 0]) for name, each in once.items()}


def averages(values: Array, weights: Array) -> Array:
    """(N, C, …) under weights (R, N): (R, 1 + C, …), over all classes and of each."""
    return _with_mean(_by_class(values, weights))


def _by_class(values: Array, weights: Array) -> Array:
    """(N, C, …) under weights (R, N): (R, C, …)."""
    return (weights @ values.reshape(len(values), -1)).reshape(-1, *values.shape[1:])


def _with_mean(each: Array) -> Array:
    """(R, C, …) with the mean over classes before them: (R, 1 + C, …)."""
    return np.concatenate([each.mean(1, keepdims=True), each], 1)


def summary(
    once: Mapping[str, Array], resampled: Mapping[str, Array], classes: Sequence[str], images: int
) -> dict[str, Any]:
    """Values with their intervals, as JSON.

    Args:
        once: by measure (1, 1 + C), of the images as they are.
        resampled: the same (R, 1 + C), of the resamples.
        classes: their names.
        images: how many there are; of a single one there is no interval.
    """
    found = {}
    for name, values in once.items():
        low, high = interval(resampled[name])
        cells = [
            {"value": value, "low": low, "high": high}
            if images > 1
            else {"value": value, "low": None, "high": None}
            for value, low, high in np.stack([values[0], low, high], 1).tolist()
        ]
        by_class = dict(zip(classes, cells[1:], strict=True))
        found[name] = {**cells[0], "n": images, "by_class": by_class}
    return found


def means(values: Mapping[str, Array], classes: Sequence[str]) -> dict[str, Any]:
    """Means with their intervals, as `summary`.

    Args:
        values: of N images, by measure (N, C).
        classes: the C classes.
    """
    images = len(next(iter(values.values())))
    once, many = np.full((1, images), 1 / images), resampling(images)
    return summary(
        {name: averages(each, once) for name, each in values.items()},
        {name: averages(each, many) for name, each in values.items()},
        classes,
        images,
    )


def of_sets(
    features: Array, real: Mapping[str, Tensor], classes: Sequence[str]
) -> dict[str, dict[str, Any]]:
    """KID and FID, as `summary`; without intervals, but KID with its subsets' deviation.

    Args:
        features: a network's of the outputs, (N, C, D).
        real: of real images by class, (M, D) each.
        classes: the C classes.
    """
    made = torch.from_numpy(features)
    pairs = {name: (real[name], made[:, i]) for i, name in enumerate(classes)}
    pairs = {"": (torch.cat([real[name] for name in classes]), made.flatten(0, 1)), **pairs}
    cells: dict[str, dict[str, Any]] = {"kid": {}, "fid": {}}
    for name, (there, here) in pairs.items():
        mean, deviation = kid(there, here)
        about = {"outputs": len(here), "real": len(there)}
        size = kid_subset_size(len(there), len(here))
        cells["kid"][name] = {"value": mean, "deviation": deviation, "subset": size, **about}
        cells["fid"][name] = {"value": fid(there, here), **about}
    return {
        measure: {**each.pop(""), "low": None, "high": None, "n": len(features), "by_class": each}
        for measure, each in cells.items()
    }


# ---------------------------------------------------------------------------------------------
# Results


def result(
    measured: Mapping[str, Measured],
    settings: Mapping[str, Any],
    against: str | None,
    excluded: Sequence[str],
    left_out: Sequence[str],
    real: Real | None,
) -> dict[str, Any]:
    """A result, see docs/evaluation.md.

    Args:
        measured: by row.
        settings: of the result, with 'classes' and 'candidates'.
        against: the row that the others but 'source' are compared with, if any.
        excluded, left_out: its lists.
        real: see `real_images`; KID, FID and CMMD are measured with them.

    Raises:
        ValueError: two rows are of different images, or there is a single one and `real`.
    """
    first = next(iter(measured.values()))
    check_same({name: each.digest() for name, each in measured.items()})
    features = None
    if real is not None:
        features = {net: {c: x[c] for c in settings["classes"]} for net, x in real.features.items()}
    if features and len(first.keys) < 2:
        raise ValueError("KID, FID and CMMD need two held-out images or more")
    weights = resampling(len(first.keys))
    classes, places = settings["classes"], len(settings["candidates"])
    once = np.full((1, len(first.keys)), 1 / len(first.keys))
    values = {name: statistics(each, once, features) for name, each in measured.items()}
    resampled = {name: statistics(each, weights, features) for name, each in measured.items()}
    found: dict[str, Any] = {
        "format": FORMAT,
        "version": VERSION,
        "settings": {**settings, "resamples": len(weights), "versions": versions(LIBRARIES)},
        "heldout": {
            "digest": first.digest(),
            "count": len(first.keys),
            "keys": first.keys,
            "excluded": list(excluded),
        },
        "left_out": list(left_out),
        "source": {
            "spectrum": short(first.source_spectra.mean(0)),
            "histogram": short(_share(first.source_counts.sum(0))),
        },
        "truth": _truth(first, classes, once),
        "real": None if real is None else {"digest": real.digest},
        "rows": {},
        "differences": {},
    }
    for name, each in measured.items():
        row = summary(values[name], resampled[name], classes, len(each.keys))
        if features is not None and {"inception"} <= features.keys() & each.features.keys():
            row |= of_sets(each.features["inception"], features["inception"], classes)
        # Without torch-fidelity there is no KID, as `Tools.load` says.
        fidelity = importlib.util.find_spec("torch_fidelity") is not None
        if fidelity and features and {"classifier"} <= features.keys() & each.features.keys():
            sets = of_sets(each.features["classifier"], features["classifier"], classes)
            row["classifier_kid"] = sets["kid"]
        found["rows"][name] = {"images": len(each.keys), "summary": row}
        found["rows"][name] |= _arrays(each, classes, places, once)
        if against is not None and name not in (against, "source"):
            found["differences"][name] = {
                "against": against,
                "summary": summary(
                    _minus(values[name], values[against]),
                    _minus(resampled[name], resampled[against]),
                    classes,
                    len(each.keys),
                ),
            }
    return found


def _arrays(
    measured: Measured, classes: Sequence[str], candidates: int, once: Array
) -> dict[str, Any]:
    """What a row of a result has beside its summary."""
    spectra = averages(measured.spectra, once)[0]
    shares = _share(averages(measured.counts, once)[0])
    names = ["all", *classes]
    row: dict[str, Any] = {
        "spectra": {name: short(x) for name, x in zip(names, spectra, strict=True)},
        "histograms": {name: short(x) for name, x in zip(names, shares, strict=True)},
        "per_image": {
            measure: {name: short(values[:, i]) for i, name in enumerate(classes)}
            for measure, values in measured.values.items()
        },
    }
    if measured.winners is not None:
        places = [*range(candidates), -1]  # ties last
        counts = (measured.winners[..., None] == places).sum(0)
        row["confusion"] = {n: x.tolist() for n, x in zip(classes, counts, strict=True)}
    return row


def _truth(measured: Measured, classes: Sequence[str], once: Array) -> dict[str, Any] | None:
    """What a result says of the true counterparts, if there were any."""
    if measured.truth_digests is None or measured.truth_spectra is None:
        return None
    digests = dict(zip(measured.keys, measured.truth_digests, strict=True))
    spectra = averages(measured.truth_spectra, once)[0]
    names = ["all", *classes]
    return {
        "digest": digest_of(digests),
        "spectra": {name: short(x) for name, x in zip(names, spectra, strict=True)},
    }


def _share(counts: Array) -> Array:
    return counts / counts.sum(-1, keepdims=True)


def _minus(one: Mapping[str, Array], other: Mapping[str, Array]) -> dict[str, Array]:
    return {name: values - other[name] for name, values in one.items() if name in other}


def short(values: Array) -> list[float]:
    """Six digits of each, for JSON."""
    return [float(f"{x:.6g}") for x in values.tolist()]


def versions(names: Sequence[str]) -> dict[str, str]:
    """The version of this library and of those of `names` that are installed."""
    found = {"lmc": __version__}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:  # torch-fidelity is an extra
            continue
    return found


def check_same(digests: Mapping[str, str]) -> None:
    """Refuse to compare what was measured on different held-out images.

    Args:
        digests: `Measured.digest` by name.

    Raises:
        ValueError: two differ; both are named.
    """
    (first, digest), *others = digests.items()
    for name, each in others:
        if each != digest:
            raise ValueError(
                f"{first} and {name} are of different held-out images (digests {digest[:16]} and "
                f"{each[:16]}): they cannot be compared"
            )


def check_result(name: str, content: Any) -> None:
    """Refuse what is no result of this version.

    Raises:
        ValueError: it is none; `name` is named.
    """
    about = content if isinstance(content, Mapping) else {}
    if about.get("format") != FORMAT or about.get("version") != VERSION:
        raise ValueError(f"{name} is no result of lmc evaluate (version {VERSION} of its JSON)")


def read_result(file: Path) -> dict[str, Any]:
    """A result from the JSON of `lmc evaluate --out`.

    Raises:
        OSError, ValueError: there is none.
    """
    try:
        found = json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(f"{file} is no JSON: {error}") from error
    check_result(str(file), found)
    return found


def combine(results: Mapping[str, Mapping[str, Any]], against: str | None) -> dict[str, Any]:
    """Several results over the same images as one, with differences between all their rows.

    The differences between rows of different results are of the measures with a value per image:
    those of averages (spectrum, cast, CMMD) are not among them.

    Args:
        results: by name, for messages; what is not of the rows is taken from the first.
        against: the row that the others but 'source' are compared with, if any.

    Raises:
        ValueError: one is no result, is over other images, or was measured otherwise; a row is in
            two of them; no row `against`.
    """
    for name, each in results.items():
        check_result(name, each)
    check_same({name: each["heldout"]["digest"] for name, each in results.items()})
    (first, found), *others = ((name, dict(each)) for name, each in results.items())
    rows = dict(found["rows"])
    truths = {name: each["truth"] for name, each in results.items() if each.get("truth")}
    reals = {name: each["real"] for name, each in results.items() if each.get("real")}
    _check_others("true counterparts (--truth)", truths)
    _check_others("real images (--real)", reals)
    for name, each in others:
        for key in COMPARABLE:
            mine, theirs = found["settings"][key], each["settings"][key]
            if mine != theirs:
                raise ValueError(f"{key} is {mine!r} in {first} and {theirs!r} in {name}")
        known = {x for x in (y["settings"].get("classifier") for y in (found, each)) if x}
        if len(known) > 1:
            raise ValueError(
                f"{first} and {name} were classified by {' and '.join(sorted(known))}: name one "
                "--classifier for all"
            )
        both = [row for row in each["rows"] if row in rows and row != "source"]
        if both:
            raise ValueError(f"{first} and {name} both have a row {both[0]!r}")
        for row, x in each["rows"].items():  # the source is in both, and may be measured by more
            if row not in rows or len(x["summary"]) > len(rows[row]["summary"]):
                rows[row] = x
    if against is not None and against not in rows:
        raise ValueError(f"no row {against!r} to compare against; there are {', '.join(rows)}")
    known = found["differences"]
    lines = [line for each in results.values() for line in each["left_out"]]
    return {
        **found,
        "truth": next(iter(truths.values()), None),
        "real": next(iter(reals.values()), None),
        "left_out": list(dict.fromkeys(lines)),
        "rows": rows,
        "differences": {
            name: known[name]
            if name in known and known[name]["against"] == against
            else _difference(rows[name], rows[against], against, found["settings"]["classes"])
            for name in rows
            if against is not None and name not in (against, "source")
        },
    }


def _check_others(what: str, found: Mapping[str, Mapping[str, Any]]) -> None:
    """Refuse what is measured against other pictures, told by their digest."""
    for name, each in found.items():
        if each["digest"] != next(iter(found.values()))["digest"]:
            raise ValueError(
                f"the {what} in {next(iter(found))} and {name} are different pictures: their rows "
                "cannot be compared"
            )


def _difference(
    row: Mapping[str, Any], other: Mapping[str, Any], against: str, classes: Sequence[str]
) -> dict[str, Any]:
    """An entry of a result's differences, from the rows' values per image."""
    one, two = (
        {
            measure: np.array([values[name] for name in classes]).T
            for measure, values in each["per_image"].items()
        }
        for each in (row, other)
    )
    delta = {name: values - two[name] for name, values in one.items() if name in two}
    return {"against": against, "summary": means(delta, classes)}


def numbers(row: Mapping[str, Any]) -> dict[str, Any]:
    """The plain numbers of a row of a result, for tables over seeds and for cards.

    Returns:
        Every measure but the channels', 'distance' (the first of the distances, which
        'distance_name' names), 'distances' by name, 'r_precision_by_class', with a classifier
        'classified_by_class', 'images'.
    """
    values = {
        name: each["value"]
        for name, each in row["summary"].items()
        if not name.startswith(("mean_", "deviation_"))
    }
    found = {name: values[name] for name in DISTANCES if name in values}
    main = next(iter(found))
    shares = {"r_precision_by_class": {}} | {
        f"{name}_by_class": {
            target: each["value"] for target, each in row["summary"][name]["by_class"].items()
        }
        for name in ("r_precision", "classified")
        if name in row["summary"]
    }
    return {
        "distance": values[main],
        **{name: value for name, value in values.items() if name not in found},
        "distance_name": main,
        "distances": found,
        **shares,
        "images": row["images"],
    }
