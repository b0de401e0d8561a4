"""`lmc evaluate`: translators and folders of images, measured on held-out images."""

import argparse
import os
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

PROMPT = "a photo of a {}"


def evaluate(args: argparse.Namespace) -> None:
    """Print a table, write JSON."""
    if args.named_by_prompt:
        _named_by_prompt(args)
        return
    import torch

    from lmc.files import write_json
    from lmc.load import load_translator
    from lmc.measure.evaluate import Folder, Tools, heldout_keys, real_features, translated
    from lmc.measure.evaluate import evaluate as measure
    from lmc.measure.results import combine, read_result
    from lmc.measure.tables import evaluation_text

    began = time.monotonic()
    if not args.shards or not (args.translator or args.images):
        raise ValueError("name held-out images (--shards) and what to measure (--translator RUN …)")
    earlier = {name: read_result(Path(name)) for name in args.beside}
    paths = _named([*args.translator, *args.images])
    names = list(paths)
    if "source" in names:
        raise ValueError("no row can be named 'source': it is the untouched images'")
    known = ["source", *names, *(row for each in earlier.values() for row in each["rows"])]
    against = args.against or names[0]
    if against not in known:
        raise ValueError(f"no row {against!r} to compare against; there are {', '.join(known)}")
    translators = {n: load_translator(paths[n]) for n in names[: len(args.translator)]}
    folders = {n: Folder(Path(paths[n])) for n in names[len(args.translator) :]}
    size = _image_size(translators, folders)
    classes = args.classes or _classes(translators, folders)
    _check_classes(translators, classes)
    prompts = _prompts(args, classes)
    rank, world_size, device = _join_processes(args.device)

    def read(rank: int, world_size: int) -> Iterable[Any]:
        from torch.utils.data import DataLoader

        from lmc.shards.images import ImageStream

        stream = ImageStream(
            args.shards, size, args.batch_size, training=False, rank=rank, world_size=world_size
        )
        return DataLoader(stream, batch_size=None, num_workers=args.num_workers)

    keys, skipped = heldout_keys(read(0, 1))
    notes = []
    for name, folder in folders.items():
        folder.check(classes, keys, skipped)
        more = sorted(folder.files.keys() - set(classes))
        notes += [f"{name}: its folder {each} is of no class that is measured" for each in more]
    real = _real(args, classes, size, rank, world_size)
    tools = Tools.load(args.clip, size, real is not None, device, args.offline)
    features = None
    if real is not None and tools.inception is not None:
        features = real_features(real, tools, classes, device)
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
        features,
        _Progress(len(keys), rank, world_size, 1 + len(names)),
    )
    if world_size > 1:
        torch.distributed.destroy_process_group()
    if rank:
        return
    for name, path in paths.items():
        result["rows"][name]["path"] = path
    result["left_out"] += notes
    result["heldout"] = {"shards": args.shards, "image_size": size, **result["heldout"]}
    result["seconds"] = round(time.monotonic() - began, 1)
    if earlier:
        result = combine({"this evaluation": result, **earlier}, against)
    print(evaluation_text(result))
    if args.out:
        write_json(Path(args.out), result)


def _named_by_prompt(args: argparse.Namespace) -> None:
    """CLIP scores of images named by their prompts."""
    from lmc.files import write_json
    from lmc.measure.evaluate import score_named_by_prompt
    from lmc.measure.metrics import Clip

    if args.translator or args.images or args.shards:
        raise ValueError("--named-by-prompt measures a folder by itself: no --shards, no others")
    if not args.eval_json:
        raise ValueError("--named-by-prompt needs the file to write (--eval-json)")
    clip = Clip(args.clip, args.device, args.offline)
    scores = score_named_by_prompt(Path(args.named_by_prompt), clip)
    write_json(args.eval_json, scores)
    print(f"CLIP score ({clip.name}) of {len(scores) - 2} prompts: {scores['score']:.4f}")


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


def _prompts(args: argparse.Namespace, classes: Sequence[str]) -> Any:
    from lmc.measure.evaluate import Prompts

    targets = {name: args.prompt.format(name) for name in classes}
    default = [*targets.values(), args.prompt.format(args.source)]
    return Prompts(targets, args.candidates or list(dict.fromkeys(default)))


def _real(
    args: argparse.Namespace, classes: Sequence[str], size: int, rank: int, world_size: int
) -> Iterable[Any] | None:
    """Batches of the real images, if any were named, checked as far as that needs no network."""
    if not args.real:
        return None
    if not Path(args.real).is_dir():
        from lmc.shards.images import ImageStream

        return ImageStream(
            args.real, size, args.batch_size, training=False, rank=rank, world_size=world_size
        )
    from lmc.measure.evaluate import Folder

    folder = Folder(Path(args.real))
    missing = [name for name in classes if name not in folder.files]
    if missing:
        raise ValueError(f"{args.real} has no real images of {missing[0]!r} ({missing[0]}/*.png)")
    if folder.size() != size:
        raise ValueError(f"the real images in {args.real} have {folder.size()} pixels, not {size}")
    return folder.batches(args.batch_size, rank, world_size)


def _join_processes(device: str) -> tuple[int, int, str]:
    """Rank, number of processes and device; under torchrun they find each other."""
    import torch

    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if world_size > 1:
        torch.distributed.init_process_group("gloo", rank=rank, world_size=world_size)
        if device == "cuda":
            device = f"cuda:{os.environ['LOCAL_RANK']}"
    return rank, world_size, device


class _Progress:
    """A line every few seconds, and one a row, on standard error."""

    def __init__(self, images: int, rank: int, world_size: int, rows: int) -> None:
        self.images = len(range(rank, images, world_size))
        self.quiet, self.rows, self.done = rank > 0, rows, 0
        self.began = self.said = time.monotonic()

    def __call__(self, row: str, images: int) -> None:
        now = time.monotonic()
        complete = images >= self.images
        if not self.quiet and (complete or now - self.said > 5):
            share = (self.done + images / max(1, self.images)) / self.rows
            left = (now - self.began) * (1 / share - 1) if share else 0.0
            about = f"{row}: {images}/{self.images} images, {left:.0f} s left"
            print(about, file=sys.stderr, flush=True)
            self.said = now
        self.done += complete


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Add the command to those of `lmc`."""
    command = commands.add_parser(
        "evaluate",
        help="measure translators and folders of images on held-out images",
        description="Every measure is defined in docs/evaluation.md, with the JSON.",
    )
    command.set_defaults(run_command=evaluate)
    command.add_argument(
        "--translator",
        nargs="+",
        default=[],
        metavar="RUN",
        help="run folders, releases or hub ids; a row of the table each, by the folder's name",
    )
    command.add_argument(
        "--images",
        nargs="+",
        default=[],
        metavar="DIR",
        help="folders of images made already, DIR/CLASS/KEY.png of the held-out image KEY; a row "
        "each",
    )
    command.add_argument("--shards", help="held-out shards, e.g. 'cats/heldout-*.tar'")
    command.add_argument(
        "--real",
        metavar="DIR",
        help="real images of the target classes for KID and FID: DIR/CLASS/*.png, or shards with "
        "the class as label",
    )
    command.add_argument("--clip", default="openai/clip-vit-base-patch16", help="folder or hub id")
    command.add_argument(
        "--classes", nargs="+", metavar="CLASS", help="targets to measure; default the first row's"
    )
    command.add_argument(
        "--source", default="cat", help="class of the held-out images (%(default)s)"
    )
    command.add_argument(
        "--prompt", default=PROMPT, help="of a class; {} is its name (%(default)r)"
    )
    command.add_argument(
        "--candidates",
        nargs="+",
        metavar="PROMPT",
        help="prompts that compete in R-Precision; default the targets' and the source's",
    )
    command.add_argument(
        "--against",
        metavar="NAME",
        help="row that the others are compared with, image by image; default the first",
    )
    command.add_argument(
        "--beside",
        nargs="+",
        default=[],
        metavar="FILE",
        help="earlier results (--out) over the same held-out images, into the same table",
    )
    command.add_argument(
        "--batch-size", type=int, default=50, metavar="N", help="default %(default)s"
    )
    command.add_argument(
        "--num-workers", type=int, default=0, metavar="N", help="default %(default)s"
    )
    command.add_argument(
        "--device", default="cpu", help="cpu, cuda (under torchrun each its own), … (%(default)s)"
    )
    command.add_argument(
        "--offline",
        action="store_true",
        help="never try the network: measures whose weights are not on disk are left out",
    )
    command.add_argument("--out", metavar="FILE", help="JSON to write")
    command.add_argument(
        "--named-by-prompt",
        metavar="DIR",
        help="instead of all that: the CLIP scores of DIR/THE_PROMPT.png, as the CS492(D) "
        "course's eval.py",
    )
    command.add_argument("--eval-json", type=Path, metavar="FILE", help="its eval.json, to write")
