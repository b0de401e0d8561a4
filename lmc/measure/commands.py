"""`lmc evaluate` and `lmc report`."""

import os
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

# What imports torch is imported in the functions: a file that is not there is named before.
PROMPT = "a photo of a {}"
TITLE = "Score distillation, measured"


def evaluate(
    *,
    shards: str | None = None,
    translator: list[str] | None = None,
    images: list[str] | None = None,
    real: str | None = None,
    truth: Path | None = None,
    clip: str = "openai/clip-vit-base-patch16",
    classifier: str | None = None,
    classes: list[str] | None = None,
    source: str = "cat",
    prompt: str = PROMPT,
    candidates: list[str] | None = None,
    against: str | None = None,
    beside: list[Path] | None = None,
    batch_size: int = 50,
    num_workers: int = 0,
    device: str = "auto",
    offline: bool = False,
    out: Path | None = None,
    named_by_prompt: Path | None = None,
    eval_json: Path | None = None,
) -> None:
    """Measure translators and folders of images on held-out images: a table, and JSON.

    Every measure is defined in docs/evaluation.md, with the JSON.

    Args:
        shards: of the held-out images, e.g. 'cats/heldout-*.tar'.
        translator: run folders, releases or hub ids; a row of the table each, by the folder's name.
        images: folders of images made already, DIR/CLASS/KEY.png of the held-out image KEY; a row
            each.
        real: real images of the target classes for KID, FID and CMMD: DIR/CLASS/*.png, or shards
            with the class as label.
        truth: true counterparts of the held-out images, which the outputs are measured against:
            DIR/CLASS/KEY.png.
        clip: folder or hub id.
        classifier: MODULE:FUNCTION of your own, a judge that is independent of prior and CLIP: see
            docs/evaluation.md. Its code is run.
        classes: targets to measure; default the first row's.
        source: class of the held-out images.
        prompt: of a class; {} is its name.
        candidates: prompts that compete in R-Precision; default the targets' and the source's.
        against: row that the others are compared with, image by image; default the first.
        beside: earlier results (--out) over the same held-out images, into the same table.
        batch_size: images at a time.
        num_workers: processes that read images.
        device: cpu, cuda (under torchrun each its own), …; default the GPU where there is one.
        offline: never try the network: measures whose weights are not on disk are left out.
        out: JSON to write.
        named_by_prompt: instead of all that: the CLIP scores of a folder's THE_PROMPT.png, as the
            CS492(D) course's eval.py has them.
        eval_json: its eval.json, to write.

    Raises:
        OSError, ValueError: what is named is not there, or does not fit the rest.
    """
    from lmc.device import choose_device

    device = choose_device(device)
    if named_by_prompt is not None:
        if translator or images or shards:
            raise ValueError(
                "--named_by_prompt measures a folder by itself: no --shards, no others"
            )
        _named_by_prompt(named_by_prompt, eval_json, clip, device, offline)
        return
    if not shards or not (translator or images):
        raise ValueError("name held-out images (--shards) and what to measure (--translator RUN …)")
    if num_workers < 0:
        raise ValueError(f"num_workers must not be negative, got {num_workers}")
    translator, images = translator or [], images or []
    import torch

    from lmc.files import write_json
    from lmc.load import load_translator
    from lmc.measure.evaluate import (
        Folder,
        Tools,
        Truth,
        heldout_keys,
        real_features,
        real_images,
        translated,
    )
    from lmc.measure.evaluate import evaluate as measure
    from lmc.measure.metrics import load_classifier
    from lmc.measure.results import combine, read_result
    from lmc.measure.tables import evaluation_text
    from lmc.progress import Progress

    began = time.monotonic()
    earlier = {str(file): read_result(file) for file in beside or []}
    paths = _named([*translator, *images])
    names = list(paths)
    if "source" in names:
        raise ValueError("no row can be named 'source': it is the untouched images'")
    known = ["source", *names, *(row for each in earlier.values() for row in each["rows"])]
    against = against or names[0]
    if against not in known:
        raise ValueError(f"no row {against!r} to compare against; there are {', '.join(known)}")
    translators = {n: load_translator(paths[n]) for n in names[: len(translator)]}
    folders = {n: Folder(Path(paths[n])) for n in names[len(translator) :]}
    size = _image_size(translators, folders)
    classes = classes or _classes(translators, folders)
    _check_classes(translators, classes)
    true = Truth(truth, classes, size) if truth else None
    judge = load_classifier(classifier, device) if classifier else None
    prompts = _prompts(prompt, source, candidates, classes)
    rank, world_size = _join_processes()

    def read(rank: int, world_size: int) -> Iterable[Any]:
        from torch.utils.data import DataLoader

        from lmc.shards.images import ImageStream

        stream = ImageStream(
            shards, size, batch_size, training=False, rank=rank, world_size=world_size
        )
        return DataLoader(stream, batch_size=None, num_workers=num_workers)

    keys, skipped = heldout_keys(read(0, 1))
    if true is not None:
        true.check_has(classes, keys, "true counterpart")
    notes = []
    for name, folder in folders.items():
        folder.check(classes, keys, skipped)
        more = sorted(folder.files.keys() - set(classes))
        notes += [f"{name}: its folder {each} is of no class that is measured" for each in more]
    real_batches = real_images(real, classes, size, batch_size, rank, world_size) if real else None
    tools = Tools.load(clip, size, real_batches is not None, device, offline, true, judge)
    pictures = None
    if real_batches is not None and (tools.inception or tools.clip or judge):
        pictures = real_features(real_batches, tools, classes, device)
    mine, rows = len(range(rank, len(keys), world_size)), 1 + len(names)
    with Progress("evaluating", mine * rows, "images", quiet=rank > 0) as progress:
        before: dict[str, int] = {}

        def watch(row: str, images: int) -> None:
            before[row] = images
            progress.update(sum(before.values()), row)

        result = measure(
            {
                "source": None,
                **{name: translated(each.to(device)) for name, each in translators.items()},
                **folders,
            },
            lambda: read(rank, world_size),
            tools,
            prompts,
            device,
            against if against in ("source", *names) else None,
            pictures,
            watch,
        )
    if world_size > 1:
        torch.distributed.destroy_process_group()
    if rank:
        return
    for name, path in paths.items():
        result["rows"][name]["path"] = path
    if truth is not None:
        result["truth"]["path"] = str(truth)
    result["left_out"] += notes
    result["heldout"] = {"shards": shards, "image_size": size, **result["heldout"]}
    result["seconds"] = round(time.monotonic() - began, 1)
    if earlier:
        result = combine({"this evaluation": result, **earlier}, against)
    print(evaluation_text(result))
    if out:
        write_json(out, result)


def _named_by_prompt(folder: Path, out: Path | None, clip: str, device: str, offline: bool) -> None:
    """CLIP scores of images named by their prompts."""
    if out is None:
        raise ValueError("--named_by_prompt needs the file to write (--eval_json)")
    from lmc.files import write_json
    from lmc.measure.evaluate import score_named_by_prompt
    from lmc.measure.metrics import Clip

    model = Clip(clip, device, offline)
    scores = score_named_by_prompt(folder, model)
    write_json(out, scores)
    print(f"CLIP score ({model.name}) of {len(scores) - 2} prompts: {scores['score']:.4f}")


def _named(paths: Sequence[str]) -> dict[str, str]:
    """The paths by as many of their last folders as tell them apart."""
    found: dict[str, str] = {}
    for path in paths:
        parts = Path(path).parts
        tails = ["/".join(parts[-n:]).replace("//", "/") for n in range(1, len(parts) + 1)]
        others = [Path(other).parts for other in paths if other != path]
        apart = [x for n, x in enumerate(tails, 1) if parts[-n:] not in [y[-n:] for y in others]]
        found[next((name for name in apart if name != "source"), path)] = path
    if len(found) < len(paths):
        raise ValueError(f"the same is named twice: {', '.join(paths)}")
    return found


def _image_size(translators: Mapping[str, Any], folders: Mapping[str, Any]) -> int:
    """The side of all that is measured, in pixels."""
    sizes = {name: each.image_size for name, each in translators.items()}
    sizes |= {name: each.size() for name, each in folders.items()}
    (first, size), *others = sizes.items()
    for name, other in others:
        if other != size:
            raise ValueError(f"{name} is of {other} pixels, {first} of {size}: measure them apart")
    return size


def _classes(translators: Mapping[str, Any], folders: Mapping[str, Any]) -> list[str]:
    """The first translator's classes, or the first folder's."""
    for translator in translators.values():
        return list(translator.classes)
    return sorted(next(iter(folders.values())).files)


def _check_classes(translators: Mapping[str, Any], classes: Sequence[str]) -> None:
    for name, translator in translators.items():
        unknown = [each for each in classes if each not in translator.classes]
        if unknown:
            raise ValueError(
                f"{name} does not know the class {unknown[0]!r}, it knows "
                f"{', '.join(translator.classes)}: --classes says which to measure"
            )


def _prompts(
    prompt: str, source: str, candidates: Sequence[str] | None, classes: Sequence[str]
) -> Any:
    from lmc.measure.evaluate import Prompts

    targets = {name: prompt.format(name) for name in classes}
    default = [*targets.values(), prompt.format(source)]
    return Prompts(targets, candidates or list(dict.fromkeys(default)))


def _join_processes() -> tuple[int, int]:
    """Rank and number of processes; under torchrun they find each other."""
    import torch

    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if world_size > 1:
        torch.distributed.init_process_group("gloo", rank=rank, world_size=world_size)
    return rank, world_size


def report(
    results: list[str],
    *,
    out: Path = Path("report.html"),
    runs: list[str] | None = None,
    shards: str | None = None,
    pictures: int = 6,
    against: str | None = None,
    title: str = TITLE,
) -> None:
    """Write one HTML page of what was measured, that needs neither network nor server.

    Tables, pictures, plots, training curves and configurations.

    Args:
        results: JSON files of lmc evaluate --out, over the same held-out images, or a folder of lmc
            compare.
        out: the page.
        runs: run folders whose training curves and configurations are shown, beside those that the
            results name; one called like a row is that row's.
        shards: of the held-out images, in place of those that the results name.
        pictures: held-out images to translate and show; 0 leaves them out.
        against: row that the others are compared with; default that of the result.
        title: of the page.

    Raises:
        OSError, ValueError: no results, or pictures that are not what was measured.
    """
    if pictures < 0:
        raise ValueError(f"pictures must not be negative, got {pictures}")
    for each in results:
        if not Path(each).exists():
            raise FileNotFoundError(f"no such file or folder: {each}")
    result, seeds = _result(results, against)
    # After it: these take seconds, and a misspelt file is named before.
    from lmc.measure.report import draw, write_report
    from lmc.measure.runs import is_run, read_run

    rows = [name for name in result["rows"] if name != "source"]
    paths = {name: result["rows"][name].get("path") for name in rows}
    folders = {name: path for name, path in paths.items() if path and is_run(path)}
    for folder in runs or []:
        there = {Path(each).resolve() for each in folders.values()}
        name = Path(folder).resolve().name
        if Path(folder).resolve() in there:
            continue
        if name in folders:
            raise ValueError(f"two runs are named {name!r}: {folders[name]} and {folder}")
        folders[name] = folder
    trainings = {name: read_run(Path(folder)) for name, folder in folders.items()}
    drawn = draw(result, _heldout(result, shards), pictures, rows) if pictures else None
    write_report(out, result, trainings, title, drawn, seeds)
    size = out.stat().st_size / 1e6
    print(f"written: {out} ({size:.1f} MB; one file, to be opened in a browser)")


def _result(names: Sequence[str], against: str | None) -> tuple[dict[str, Any], list[list[str]]]:
    """All results as one, and the table over seeds where there is one."""
    from lmc.measure.comparison import read_comparison
    from lmc.measure.results import combine, read_result

    results: dict[str, dict[str, Any]] = {}
    seeds: list[list[str]] = []
    for name in names:
        if Path(name).is_dir():
            results[name], seeds = read_comparison(Path(name))
        else:
            results[name] = read_result(Path(name))
    if len(results) < len(names):
        raise ValueError(f"the same is named twice: {', '.join(names)}")
    if len(results) == 1 and not against:
        return results[names[0]], seeds
    rows = [row for each in results.values() for row in each["rows"] if row != "source"]
    # A table over seeds is of one comparison's rows.
    return combine(results, against or rows[0]), seeds if len(results) == 1 else []


def _heldout(result: dict[str, Any], shards: str | None) -> Any:
    """The held-out images of a result, in batches; from `shards`, if the user names them."""
    from torch.utils.data import DataLoader

    from lmc.shards.images import ImageStream
    from lmc.shards.stream import local_shards

    about = result["heldout"]
    if "image_size" not in about:
        raise ValueError(
            "the result does not say where its held-out images lie: leave the pictures out "
            "(--pictures 0)"
        )
    found = shards or local_shards(about.get("shards"), "heldout.shards of the result")
    return DataLoader(ImageStream(found, about["image_size"], 50, training=False), batch_size=None)
