"""Held-out images through translators, measured: the runners. The metrics are in `metrics`.

`evaluate` gives a result, the dict that `lmc evaluate --out` writes; docs/evaluation.md has every
key of it.
"""

import importlib.util
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed

from lmc.measure.metrics import (
    NO_FIDELITY,
    SMALLEST_LPIPS,
    Classifier,
    Clip,
    Distance,
    MissingWeights,
    clip_score,
    clip_score_100,
    cosines,
    derivative_counts,
    load_inception,
    load_lpips,
    one_minus_ssim,
    power_spectrum,
    rmse,
    saturation,
    winners,
)
from lmc.measure.results import (
    NETWORKS,
    Measured,
    Real,
    check_keys,
    digest_of,
    merge,
    pixel_digest,
    result,
)
from lmc.shards.encoded import opened
from lmc.shards.images import (
    SUFFIXES,
    ImageBatch,
    ImageStream,
    decode_image,
    from_uint8,
    to_uint8,
)
from lmc.translator import Translator

# (keys, sources (B, 3, S, S), class) to outputs (B, 3, S, S)
Outputs = Callable[[Sequence[str], Tensor, str], Tensor]

CHANNELS = ("red", "green", "blue")

T = TypeVar("T")


# ---------------------------------------------------------------------------------------------
# What is measured, and with what


@dataclass(frozen=True)
class Prompts:
    """The prompts of an evaluation.

    Attributes:
        targets: the prompt of each target class, in the classes' order.
        candidates: the prompts that compete in R-Precision.

    Raises:
        ValueError: a candidate twice, or a target's prompt that is none.
    """

    targets: Mapping[str, str]
    candidates: Sequence[str]

    def __post_init__(self) -> None:
        twice = [x for x in self.candidates if self.candidates.count(x) > 1]
        if twice:
            raise ValueError(f"the candidate {twice[0]!r} is given twice")
        for name, prompt in self.targets.items():
            if prompt not in self.candidates:
                raise ValueError(
                    f"{prompt!r}, the prompt of {name}, is not among the candidates "
                    f"({', '.join(map(repr, self.candidates))}): R-Precision would be 0"
                )

    @property
    def classes(self) -> list[str]:
        """The target classes."""
        return list(self.targets)


@dataclass(frozen=True)
class Tools:
    """What measures: networks, and pictures to measure against.

    Attributes:
        distances: to the source, and to the true counterpart, by name, the main one first.
        clip: None leaves CLIP's measures out.
        inception: see `load_inception`; None leaves KID and FID out.
        classifier: None leaves its measures out.
        left_out: a line for each measure that is left out: why, and what would change that.
        truth: the sources' true counterparts, of 8 bits; None leaves the measures against them out.
    """

    distances: Mapping[str, Distance]
    clip: Clip | None = None
    inception: Callable[[Tensor], Tensor] | None = None
    left_out: Sequence[str] = ()
    truth: Outputs | None = None
    classifier: Classifier | None = None

    @classmethod
    def load(
        cls,
        clip: str,
        image_size: int,
        sets: bool,
        device: str = "cpu",
        offline: bool = False,
        truth: Outputs | None = None,
        classifier: Classifier | None = None,
    ) -> "Tools":
        """All that can be had here.

        Args:
            clip: folder or hub id.
            image_size: of the images that will be measured.
            sets: whether KID, FID and CMMD are wanted.
            device: where the networks run.
            offline: take weights from the disk only.
            truth, classifier: as the attributes.

        Raises:
            OSError, ValueError: weights that are there and cannot be read.
        """
        left_out = []

        def tried(what: str, load: Callable[[], T]) -> T | None:
            try:
                return load()
            except MissingWeights as error:
                left_out.append(f"{what} left out: {error}")
                return None

        found: dict[str, Distance] = {"rmse": rmse, "one_minus_ssim": one_minus_ssim}
        if image_size < SMALLEST_LPIPS:
            least = f"AlexNet takes {SMALLEST_LPIPS} pixels and more"
            left_out.append(f"lpips left out: the images have {image_size} pixels, {least}")
        elif lpips := tried("lpips", lambda: load_lpips(offline)):
            found = {"lpips": lpips, **found}
        of_clip = "clip_score, r_precision, cmmd" if sets else "clip_score, r_precision"
        model = tried(of_clip, lambda: Clip(clip, device, offline))
        inception = tried("kid, fid", lambda: load_inception(device, offline)) if sets else None
        if sets and classifier and importlib.util.find_spec("torch_fidelity") is None:
            left_out.append(f"classifier_kid left out: {NO_FIDELITY}")
        return cls(found, model, inception, left_out, truth, classifier)


def translated(translator: Translator) -> Outputs:
    """The outputs of a translator."""

    def outputs(keys: Sequence[str], source: Tensor, name: str) -> Tensor:
        ids = translator.class_ids([name] * len(source))
        return translator(source, ids.to(source.device))

    return outputs


class Folder:
    """Outputs that are files already: FOLDER/CLASS/KEY.png, or .jpg, .jpeg, .webp.

    Args:
        path: the folder.

    Raises:
        ValueError: it holds no images in folders, or two of a class and a key.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.files: dict[str, dict[str, Path]] = {}
        for file in sorted(path.glob("*/**/*")):
            if file.suffix[1:].lower() not in SUFFIXES or file.name.startswith("."):
                continue
            name, *rest = file.relative_to(path).with_suffix("").parts
            key = "/".join(rest)
            first = self.files.setdefault(name, {}).setdefault(key, file)
            if first != file:
                raise ValueError(f"{first} and {file} are of the same key: which one is meant?")
        if not self.files:
            raise ValueError(f"{path} holds no images: they are read from {path}/CLASS/KEY.png")

    def size(self) -> int:
        """The side of all its images in pixels.

        Raises:
            ValueError: two are not of one size, or one is not square, or cannot be read.
        """
        first: tuple[Path, tuple[int, int]] | None = None
        for file in itertools.chain.from_iterable(x.values() for x in self.files.values()):
            try:
                with opened(file.read_bytes()) as image:
                    size = image.size
            except (OSError, ValueError) as error:
                raise ValueError(f"{file} cannot be read: {error}") from error
            first = first or (file, size)
            if size != first[1] or size[0] != size[1]:
                raise ValueError(
                    f"{file} has {size[0]} x {size[1]} pixels and {first[0]} {first[1][0]} x "
                    f"{first[1][1]}: all must be squares of one size"
                )
        assert first is not None
        return first[1][0]

    def check(self, classes: Sequence[str], keys: Iterable[str], skipped: Iterable[str]) -> None:
        """Whether there is one image for each source and class.

        Args:
            classes: the target classes.
            keys: of the sources.
            skipped: sources that cannot be read, as `ImageBatch.skipped`: their images may be here.

        Raises:
            ValueError: an image without source, or a source without image; how many, and one.
        """
        keys = set(keys)
        self.check_has(classes, keys, "output")
        broken = {line.split(" in ", 1)[0] for line in skipped}
        for name in classes:
            if more := self.files[name].keys() - keys - broken:
                where = f"{self.path}/{name}"
                raise ValueError(
                    f"{len(more)} images in {where} have no held-out source, such as {min(more)}"
                )

    def check_has(self, classes: Sequence[str], keys: Iterable[str], what: str) -> None:
        """Whether there is an image for each source and class; there may be others.

        Args:
            classes: the target classes.
            keys: of the sources.
            what: the images are, for the error.

        Raises:
            ValueError: a source without image; how many, and one.
        """
        for name in classes:
            if missing := set(keys) - self.files.get(name, {}).keys():
                raise ValueError(
                    f"{len(missing)} held-out images have no {what} in {self.path}/{name}, such as "
                    f"{min(missing)}"
                )

    def batches(self, batch_size: int, rank: int = 0, world_size: int = 1) -> Iterator[ImageBatch]:
        """This process's share of the images, each once, with the class as label."""
        every = [(name, key) for name, keys in self.files.items() for key in keys]
        mine = every[rank::world_size]
        for start in range(0, len(mine), batch_size):
            labels, keys = zip(*mine[start : start + batch_size], strict=True)
            files = [self.files[name][key] for name, key in zip(labels, keys, strict=True)]
            images = torch.stack([decode_image(x.read_bytes(), str(x)) for x in files])
            yield ImageBatch(images, list(keys), list(labels))

    def __call__(self, keys: Sequence[str], source: Tensor, name: str) -> Tensor:
        """The outputs for some sources, as `Outputs`."""
        files = [self.files[name][key] for key in keys]
        return torch.stack([decode_image(x.read_bytes(), str(x)) for x in files]).to(source.device)


class Truth(Folder):
    """True counterparts of held-out images: FOLDER/CLASS/KEY.png; what else is there is not read.

    Args:
        path: the folder.
        classes: the target classes.
        image_size: of the held-out images in pixels.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: a class is not there, or see `Folder` and `Folder.size`.
    """

    def __init__(self, path: Path, classes: Sequence[str], image_size: int) -> None:
        if not path.is_dir():
            raise FileNotFoundError(f"no such folder of true counterparts: {path}")
        super().__init__(path)
        for name in classes:
            if name not in self.files:
                raise ValueError(
                    f"{path} has no true counterparts of class {name!r} ({name}/*.png)"
                )
        self.files = {name: self.files[name] for name in classes}
        if (size := self.size()) != image_size:
            raise ValueError(
                f"the true counterparts in {path} have {size} pixels, not {image_size}"
            )


def heldout_keys(batches: Iterable[ImageBatch]) -> tuple[list[str], list[str]]:
    """The keys of held-out images, and those that cannot be read, with the reason.

    Raises:
        ValueError: there are none, or a key is there twice.
    """
    keys: list[str] = []
    skipped: list[str] = []
    for batch in batches:
        keys += batch.key
        skipped += batch.skipped
    check_keys(keys)
    return keys, skipped


# ---------------------------------------------------------------------------------------------
# Measuring


@torch.no_grad()
def measure_batch(
    name: str,
    outputs: Outputs | None,
    batch: ImageBatch,
    tools: Tools,
    prompts: Prompts,
    texts: Tensor | None,
    device: torch.device | str,
) -> Measured:
    """A batch through a translator, measured.

    Args:
        name: of the row, for errors.
        outputs: None is the sources themselves.
        batch: of at least one image, on any device.
        tools: what measures, on `device`.
        prompts: of the classes, and those that compete.
        texts: CLIP's embeddings of the candidates, (P, D); None leaves CLIP's measures out.
        device: where to compute.

    Raises:
        ValueError: an output is not finite, or not of its source's size.
    """
    image = source = batch.image.to(device)
    columns = []
    truths: list[Tensor] = []
    seen, names = observe(source, source, tools, texts) if outputs is None else (None, None)
    for target, prompt in prompts.targets.items():
        if outputs is not None:
            made = outputs(batch.key, source, target)
            _check_output(name, made, source, batch.key, target)
            # As a PNG would keep it, so that a folder of PNGs measures the same.
            image = from_uint8(to_uint8(made))
            seen, names = observe(image, source, tools, texts)
        assert seen is not None
        columns.append(dict(seen))
        if names is not None:
            columns[-1]["classified"] = torch.tensor([name == target for name in names])
        if tools.truth is not None:
            truth = tools.truth(batch.key, source, target)
            _check_output("the truth", truth, source, batch.key, target)
            columns[-1] |= against_truth(image, truth, tools)
            truths.append(to_uint8(truth).cpu())
        if texts is not None:
            table = columns[-1].pop("cosines")
            score = table[:, prompts.candidates.index(prompt)]
            first = winners(table)
            columns[-1] |= {
                "clip_score": score,
                "clip_score_100": clip_score_100(score),
                "r_precision": first == prompts.candidates.index(prompt),
                "winners": first,
            }
    arrays = {
        key: torch.stack([x[key].cpu().double() for x in columns], 1).numpy() for key in columns[0]
    }
    pixels = torch.stack(truths, 1).numpy() if truths else None
    return Measured(
        list(batch.key),
        [pixel_digest(x) for x in to_uint8(batch.image).cpu().numpy()],
        spectra=arrays.pop("spectra"),
        counts=arrays.pop("counts"),
        winners=arrays.pop("winners", None),
        features={net: arrays.pop(net) for net in NETWORKS if net in arrays},
        truth_digests=None if pixels is None else [pixel_digest(x) for x in pixels],
        truth_spectra=arrays.pop("truth_spectra", None),
        truth_shifts=arrays.pop("truth_shifts", None),
        values=arrays,
        source_spectra=power_spectrum(source).cpu().double().numpy(),
        source_counts=derivative_counts(source).cpu().double().numpy(),
    )


def observe(
    image: Tensor, source: Tensor, tools: Tools, texts: Tensor | None
) -> tuple[dict[str, Tensor], Sequence[str] | None]:
    """Everything about outputs that does not depend on their class.

    Args:
        image, source: (B, 3, S, S) in [-1, 1].
        tools: what measures, on their device.
        texts: embeddings of the candidates, for their cosines; None leaves out what is of CLIP.

    Returns:
        By measure, (B, …) each; and what the classifier calls them, if there is one.

    Raises:
        ValueError: the classifier gives something else than a name and features for each.
    """
    seen = {name: distance(image, source) for name, distance in tools.distances.items()}
    seen["saturation"] = saturation(image)
    for i, channel in enumerate(CHANNELS):
        seen[f"mean_{channel}"] = image[:, i].mean((1, 2))
        seen[f"deviation_{channel}"] = image[:, i].std((1, 2), correction=0)
    seen |= {"spectra": power_spectrum(image), "counts": derivative_counts(image)}
    if tools.clip is not None and texts is not None:
        seen["clip"] = tools.clip.images(image)
        seen["cosines"] = cosines(seen["clip"], texts)
    if tools.inception is not None:
        seen["inception"] = tools.inception(to_uint8(image))
    names = None
    if tools.classifier is not None:
        names, seen["classifier"] = classified(tools.classifier, to_uint8(image))
    return seen, names


def classified(classifier: Classifier, pixels: Tensor) -> tuple[Sequence[str], Tensor]:
    """What a classifier gives for uint8 images (B, 3, S, S): see there.

    Raises:
        ValueError: something else.
    """
    names, features = classifier(pixels)
    if len(names) != len(pixels) or features.shape[:1] != pixels.shape[:1] or features.ndim != 2:
        raise ValueError(
            f"the classifier {classifier.name} gives {len(names)} names and features of the shape "
            f"{tuple(features.shape)} for {len(pixels)} images: one of each was expected"
        )
    return names, features.detach().float()


def against_truth(image: Tensor, truth: Tensor, tools: Tools) -> dict[str, Tensor]:
    """Outputs beside the true counterparts of their sources, by measure, (B, …) each.

    Args:
        image, truth: (B, 3, S, S) in [-1, 1].
        tools: whose distances are measured, on their device.
    """
    seen = {f"truth_{name}": distance(image, truth) for name, distance in tools.distances.items()}
    seen["truth_spectra"] = power_spectrum(truth)
    seen["truth_shifts"] = image.mean((2, 3)) - truth.mean((2, 3))
    return seen


def _check_output(row: str, made: Tensor, source: Tensor, keys: Sequence[str], target: str) -> None:
    if made.shape != source.shape:
        sizes = (f"{x.shape[-1]} x {x.shape[-2]} pixels" for x in (made, source))
        raise ValueError(f"{row}: the outputs to {target!r} have {', the sources '.join(sizes)}")
    bad = ~made.isfinite().flatten(1).all(1)
    if bad.any():
        key = next(key for key, no in zip(keys, bad.tolist(), strict=True) if no)
        raise ValueError(f"{row}: the output for {key} to {target!r} is not finite")


def from_all_processes(mine: T) -> list[T]:
    """What every process has, in the order of their ranks."""
    if not distributed.is_available() or not distributed.is_initialized():
        return [mine]
    every: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(every, mine)
    return every


def real_images(
    real: str,
    classes: Sequence[str],
    size: int,
    batch_size: int,
    rank: int = 0,
    world_size: int = 1,
) -> Iterable[ImageBatch]:
    """This process's share of real images, with their class as label.

    Args:
        real: a folder DIR/CLASS/*.png, or shards.
        classes: the target classes.
        size: of the images that are measured, in pixels.
        batch_size: images at a time.
        rank, world_size: which share of how many.

    Raises:
        ValueError: a folder without one of the classes, or of images of another size.
    """
    if not Path(real).is_dir():
        return ImageStream(real, size, batch_size, training=False, rank=rank, world_size=world_size)
    folder = Folder(Path(real))
    missing = [name for name in classes if name not in folder.files]
    if missing:
        raise ValueError(f"{real} has no real images of {missing[0]!r} ({missing[0]}/*.png)")
    if folder.size() != size:
        raise ValueError(f"the real images in {real} have {folder.size()} pixels, not {size}")
    return folder.batches(batch_size, rank, world_size)


@torch.no_grad()
def real_features(
    batches: Iterable[ImageBatch], tools: Tools, classes: Sequence[str], device: str = "cpu"
) -> Real:
    """Real images of the target classes, by Inception's, CLIP's and the classifier's features.

    Args:
        batches: images, with their class as label; other classes' are passed over.
        tools: with `inception`, `clip` or a classifier.
        classes: the target classes.
        device: where to compute.

    Raises:
        ValueError: fewer than two images of a class, or one that cannot be read.
    """
    networks: dict[str, Callable[[Tensor], Tensor]] = {}
    if tools.inception is not None:
        networks["inception"] = tools.inception
    if (clip := tools.clip) is not None:
        networks["clip"] = lambda pixels: clip.images(from_uint8(pixels)).cpu()
    if (classifier := tools.classifier) is not None:
        networks["classifier"] = lambda pixels: classified(classifier, pixels)[1].cpu()
    mine: list[tuple[str, str, str, dict[str, Tensor]]] = []
    for batch in batches:
        if batch.skipped:
            raise ValueError(f"a real image cannot be read: {batch.skipped[0]}")
        if not set(batch.label) & set(classes):
            continue
        pixels = to_uint8(batch.image).to(device)
        seen = {name: network(pixels) for name, network in networks.items()}
        digests = [pixel_digest(x) for x in pixels.cpu().numpy()]
        mine += [
            (label, key, digest, {name: each[i] for name, each in seen.items()})
            for i, (label, key, digest) in enumerate(
                zip(batch.label, batch.key, digests, strict=True)
            )
            if label in classes
        ]
    every = sorted(itertools.chain.from_iterable(from_all_processes(mine)), key=lambda x: x[:3])
    found = {name: [x for label, *_, x in every if label == name] for name in classes}
    for name, several in found.items():
        if len(several) < 2:
            raise ValueError(f"{len(several)} real images of the class {name!r}; two are needed")
    features = {
        network: {
            name: torch.stack([x[network] for x in several]) for name, several in found.items()
        }
        for network in networks
    }
    return Real(features, digest_of({f"{x[0]}/{x[1]}": x[2] for x in every}))


@torch.no_grad()
def evaluate(
    rows: Mapping[str, Outputs | None],
    read: Callable[[], Iterable[ImageBatch]],
    tools: Tools,
    prompts: Prompts,
    device: torch.device | str = "cpu",
    against: str | None = None,
    real: Real | None = None,
    watch: Callable[[str, int], None] = lambda row, images: None,
) -> dict[str, Any]:
    """Every held-out image to every target class by every row, measured.

    Under torch.distributed each process reads its share of the images; all have the result.

    Args:
        rows: what is measured, by name; None is the untouched sources.
        read: a pass over the held-out images, begun anew for each row.
        tools: what measures, on `device`.
        prompts: of the classes, and those that compete.
        device: where to compute.
        against: the row that the others are compared with; default the first that is not None.
        real: see `real_features`; KID, FID and CMMD are measured with it.
        watch: told the row and the images done, after each batch.

    Returns:
        A result, see docs/evaluation.md.

    Raises:
        ValueError: no images, a key twice, two rows over different images, an output that is not
            finite or not of its source's size, or no row named `against`.
    """
    texts = tools.clip.texts(list(prompts.candidates)) if tools.clip else None
    against = against or next((name for name, x in rows.items() if x is not None), None)
    if against is not None and against not in rows:
        raise ValueError(f"no row {against!r} to compare against; there are {', '.join(rows)}")
    measured: dict[str, Measured] = {}
    excluded: list[str] = []
    for name, outputs in rows.items():
        parts: list[Measured] = []
        skipped: list[str] = []
        done = 0
        for batch in read():
            skipped += batch.skipped
            if len(batch.image):  # not so where only broken samples were left for the last batch
                parts.append(measure_batch(name, outputs, batch, tools, prompts, texts, device))
                done += len(batch.image)
            watch(name, done)
        every = itertools.chain.from_iterable(from_all_processes(parts))
        measured[name] = merge(list(every))
        excluded = sorted(itertools.chain.from_iterable(from_all_processes(skipped)))
    settings = {
        "classes": prompts.classes,
        "prompts": dict(prompts.targets),
        "candidates": list(prompts.candidates),
        "clip": tools.clip.name if tools.clip else None,
        "distance": next(iter(tools.distances)),
        "classifier": tools.classifier.name if tools.classifier else None,
        "real": _counts(real) if real else None,
    }
    return result(measured, settings, against, excluded, tools.left_out, real)


def _counts(real: Real) -> dict[str, int]:
    return {name: len(x) for name, x in next(iter(real.features.values())).items()}


# ---------------------------------------------------------------------------------------------
# Images named by their prompt


def score_named_by_prompt(folder: Path, clip: Clip) -> dict[str, Any]:
    """CLIP scores of images that are named by their prompts, in the form of the CS492(D) course.

    FOLDER/*.png; the prompt is the name up to its first dot, with spaces for underscores. Images of
    one prompt count once, with their mean.

    Returns:
        'source_dir', the plain cosine by file, and 'score', the mean over prompts.

    Raises:
        ValueError: there are no images, or one cannot be read.
    """
    files: dict[str, list[Path]] = {}
    for file in sorted(folder.glob("*.png")):
        files.setdefault(file.name.split(".")[0].replace("_", " "), []).append(file)
    if not files:
        raise ValueError(f"{folder} holds no PNG files: they are read from {folder}/THE_PROMPT.png")
    scores = {}
    for prompt, several in files.items():
        text = clip.texts([prompt])
        each = [
            clip_score(clip.images(image[None].to(text.device)), text).item()
            for image in (decode_image(x.read_bytes(), str(x)) for x in several)
        ]
        scores[str(several[0])] = sum(each) / len(each)
    return {"source_dir": str(folder), **scores, "score": sum(scores.values()) / len(scores)}
