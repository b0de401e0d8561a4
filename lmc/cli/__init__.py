"""The `lmc` command: what is done with trained networks, and what needs no training."""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lmc.cli import compare, evaluate, report
from lmc.device import check_device
from lmc.errors import OUT_OF_MEMORY

# Commands with typed options and a configuration file, handed on before argparse reads them.
IMAGE_COMMANDS = {
    "synthesize": "optimise an image from grey towards a prompt",
    "edit": "optimise a photo towards a prompt, or a list of them under many losses (--list)",
    "gradients": "picture the gradients of one image at some t",
}


def translate(args: argparse.Namespace) -> None:
    """Translate image files; non-square ones are cropped at the centre."""
    import torch
    from PIL import Image

    from lmc.load import load_translator
    from lmc.shards.images import decode_image, middle_square, to_uint8

    translator = load_translator(args.translator).to(args.device)
    targets = args.to or translator.classes
    ids = translator.class_ids(targets).to(args.device)
    files = [Path(name) for name in args.input]
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(f"no such file: {file}")
    stems = [file.stem for file in files]
    if len(set(stems)) < len(stems):
        twice = next(stem for stem in stems if stems.count(stem) > 1)
        raise ValueError(f"several inputs are named {twice!r} and would overwrite each other")
    args.out.mkdir(parents=True, exist_ok=True)
    for number, file in enumerate(files, 1):
        image = decode_image(file.read_bytes(), str(file))
        image = middle_square(image[None], translator.image_size)
        with torch.no_grad():
            outputs = translator(image.expand(len(ids), -1, -1, -1).to(args.device), ids)
        for target, output in zip(targets, to_uint8(outputs).cpu(), strict=True):
            to = args.out / f"{file.stem}-{target}.png"
            Image.fromarray(output.permute(1, 2, 0).numpy()).save(to)
        print(f"{number}/{len(files)}  {file} -> {args.out}/{file.stem}-*.png", flush=True)


def release(args: argparse.Namespace) -> None:
    """Turn a run folder into a release."""
    from lmc.measure.results import numbers
    from lmc.release import release as write

    results = json.loads(args.results.read_text()) if args.results else None
    if results is not None and args.row:
        rows = results.get("rows", results)  # of lmc evaluate, or numbers by name
        if args.row not in rows:
            raise ValueError(f"{args.results} has no row {args.row!r}; it has {', '.join(rows)}")
        results = numbers(rows[args.row]) if "rows" in results else rows[args.row]
    write(args.run, args.out, results, args.picture, args.best)
    print(f"released to {args.out}")


def triplets(args: argparse.Namespace) -> None:
    """Sample the triplets of a stage-one configuration into shards."""
    from lmc.priors import Prior
    from lmc.schedule import TIME_RANGE
    from lmc.shards.store import TripletSet, write_triplets
    from lmc.specs import build

    config = _stage_one(args.config)
    model, data = config["model"], config["data"]
    seed = config.get("seed_everything")
    what = TripletSet(
        (data["train"], data["heldout"]),
        data["image_size"],
        args.times_per_image,
        tuple(model.get("time_range", TIME_RANGE)),
        seed if type(seed) is int else 0,
    )
    device = args.device
    if device == "cuda" and "LOCAL_RANK" in os.environ:  # torchrun: a GPU a process
        device = f"cuda:{os.environ['LOCAL_RANK']}"
    who = f"[{args.rank}] " if args.world_size > 1 else ""
    done = write_triplets(
        build(Prior, model["prior"]),
        what,
        args.out,
        args.batch_size,
        device,
        args.rank,
        args.world_size,
        lambda line: print(who + line, flush=True),
    )
    print(
        f"{who}{done['shards_done']} of {done['shards']} shards done in {args.out}: "
        f"{done['images']} images, {done['triplets']} triplets, {done['bytes'] / 1e9:.3f} GB "
        f"({done['bytes'] / max(1, done['triplets']) * 1e-3:.1f} GB a million triplets), "
        f"{len(done['skipped'])} broken samples skipped"
    )
    for sample in done["skipped"][:10]:
        print(f"  skipped: {sample}")
    if len(done["skipped"]) > 10:
        print(f"  … all of them in {args.out}/*.json")


def closed_form(args: argparse.Namespace) -> None:
    """Estimate a closed-form corrector from a stage-one configuration's prior and data."""
    import itertools
    import time

    from lmc.filter import estimate_filter
    from lmc.measure.correctors import evaluate_corrector
    from lmc.priors import Prior
    from lmc.release import check_out, write_release
    from lmc.schedule import TIME_RANGE
    from lmc.shards.images import ImageStream
    from lmc.shards.triplets import TripletStream, check_origin, triplet_origin, triplets_of
    from lmc.specs import build

    config = _stage_one(args.config)
    model, data = config["model"], config["data"]
    time_range = tuple(model.get("time_range", TIME_RANGE))
    check_out(args.out)
    origin = triplet_origin(data["train"])
    images_heldout = triplet_origin(data["heldout"]) is None
    prior = build(Prior, model["prior"])
    identity = prior.identity
    began = time.monotonic()
    batches: Any
    if origin is not None:
        check_origin(origin, identity, time_range)
        batches = TripletStream(data["train"], args.batch_size, training=True, seed=args.seed)
    else:
        prior.to(args.device)
        images = ImageStream(
            data["train"], data["image_size"], args.batch_size, training=True, seed=args.seed
        )
        batches = triplets_of(images, prior, args.seed, time_range, args.device)
    wanted = -(-args.triplets // args.batch_size)

    def counted() -> Any:
        said = time.monotonic()
        for number, batch in enumerate(itertools.islice(batches, wanted), 1):
            yield batch
            if time.monotonic() - said > 5:
                said = time.monotonic()
                left = (said - began) / number * (wanted - number)
                done = number * args.batch_size
                print(f"{done} triplets, {left:.0f} s left", file=sys.stderr, flush=True)

    corrector = estimate_filter(
        counted(), identity, args.bins, time_range, not args.each_channel, args.statistics
    )
    seconds = time.monotonic() - began
    results = {}
    if images_heldout:
        prior.to(args.device)
        heldout = ImageStream(data["heldout"], data["image_size"], args.batch_size, training=False)
        results = evaluate_corrector(
            corrector.to(args.device), prior, heldout, time_range=time_range, device=args.device
        )
    how = f"estimated from {wanted * args.batch_size} triplets in {seconds:.0f} s"
    write_release(corrector.cpu(), args.out, how, results)
    print(f"{how}; released to {args.out}")
    for name, value in results.items():
        print(f"  held-out {name}: {value:.4f}")


def _stage_one(file: Path) -> dict[str, Any]:
    """What `lmc triplets` needs of a configuration of train_bias.py is in it, or a ValueError."""
    import yaml

    try:
        config = yaml.safe_load(file.read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"{file} is no YAML: {error}") from error
    for section, names in {"model": ["prior"], "data": ["train", "heldout", "image_size"]}.items():
        for name in names:
            try:
                config[section][name]
            except (KeyError, TypeError):
                raise ValueError(
                    f"{file} has no {section}.{name}: not a configuration of train_bias.py"
                ) from None
    return config


def at_least_one(text: str) -> int:
    """A number of something, from the command line."""
    if int(text) < 1:
        raise ValueError
    return int(text)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    main = argparse.ArgumentParser(prog="lmc", description=__doc__)
    commands = main.add_subparsers(required=True, metavar="COMMAND")

    evaluate.add_parser(commands)
    report.add_parser(commands)
    two = commands.add_parser("translate", help="translate image files")
    two.set_defaults(run_command=translate)
    two.add_argument("input", nargs="+", metavar="INPUT", help="image files")
    two.add_argument(
        "--translator", required=True, metavar="RUN", help="run folder, release, hub id"
    )
    two.add_argument("--to", nargs="+", metavar="CLASS", help="target classes; default all")
    two.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write into")
    two.add_argument("--device", default="cpu", help="cpu, cuda, … (%(default)s)")

    three = commands.add_parser("release", help="turn a run folder into a release")
    three.set_defaults(run_command=release)
    three.add_argument("run", type=Path, metavar="RUN", help="run folder, or a last.ckpt")
    three.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write")
    three.add_argument(
        "--best",
        action="store_true",
        help="its checkpoints/best.ckpt, by held-out R-Precision, in place of last.ckpt",
    )
    three.add_argument(
        "--results", type=Path, metavar="FILE", help="lmc evaluate's JSON, for the card"
    )
    three.add_argument("--row", metavar="NAME", help="which row of it is this network's")
    three.add_argument("--picture", type=Path, metavar="PNG", help="a picture for the card")

    four = commands.add_parser("triplets", help="sample the triplets of stage one into shards")
    four.set_defaults(run_command=triplets)
    four.add_argument(
        "--config",
        type=Path,
        required=True,
        metavar="YAML",
        help="of train_bias.py: its prior, its train and held-out shards of images, image_size, "
        "time_range and seed_everything are taken",
    )
    four.add_argument(
        "--out",
        type=Path,
        required=True,
        metavar="DIR",
        help="folder to write; what is done there is kept",
    )
    four.add_argument(
        "--times-per-image",
        type=int,
        default=4,
        metavar="N",
        help="triplets an image (%(default)s)",
    )
    four.add_argument(
        "--batch-size",
        type=int,
        default=16,
        metavar="N",
        help="images at a time; the prior sees times-per-image as many (%(default)s)",
    )
    four.add_argument(
        "--device", default="cpu", help="cpu, cuda (under torchrun each its own), … (%(default)s)"
    )
    five = commands.add_parser(
        "closed-form", help="estimate a closed-form corrector, in seconds, in place of stage one"
    )
    five.set_defaults(run_command=closed_form)
    five.add_argument(
        "--config",
        type=Path,
        required=True,
        metavar="YAML",
        help="of train_bias.py: its prior, data and time_range are taken",
    )
    five.add_argument("--out", type=Path, required=True, metavar="DIR", help="release to write")
    for option, default, about in (
        ("--triplets", 4000, "to estimate from"),
        ("--bins", 16, "of t"),
        ("--batch-size", 50, "images at a time"),
        ("--seed", 0, "of images, t and eps"),
    ):
        kind = int if option == "--seed" else at_least_one
        five.add_argument(
            option, type=kind, default=default, metavar="N", help=f"{about} (%(default)s)"
        )
    five.add_argument(
        "--each-channel",
        action="store_true",
        help="filter each channel by itself: a smaller and coarser corrector",
    )
    five.add_argument(
        "--statistics",
        default="image",
        choices=("image", "channel", "none"),
        help="of Eq. 10 (%(default)s)",
    )
    five.add_argument("--device", default="cpu", help="cpu, cuda, … (%(default)s)")

    for option, variable, alone in (("--rank", "RANK", "0"), ("--world-size", "WORLD_SIZE", "1")):
        four.add_argument(
            option,
            type=int,
            default=os.environ.get(variable, alone),
            metavar="N",
            help=f"of this process; default ${variable}, which torchrun sets, else {alone}",
        )

    compare.add_parser(commands)
    for name, about in IMAGE_COMMANDS.items():
        commands.add_parser(name, help=about)  # for --help alone
    # Named here for --help; `main` hands it to a parser of typed keys before this one.
    commands.add_parser("dreamsampler", help="edit or restore one image by DreamSampler")
    return main


def main(args: Sequence[str] | None = None) -> None:
    """Run a command; bad input ends it with one line that says what is wrong, Ctrl-C with 130."""
    args = sys.argv[1:] if args is None else list(args)
    try:
        if args and args[0] in IMAGE_COMMANDS:
            from lmc.one_image.synthesis import main as image

            image(args[0], args[1:])
            return
        if args[:1] == ["dreamsampler"]:
            from lmc.one_image.dreamsampling import main as dreamsampler

            dreamsampler(args[1:])
            return
        given = parser().parse_args(args)
        if "device" in given:
            check_device(given.device)
        given.run_command(given)
    except (OSError, ValueError, FloatingPointError, ImportError) as error:
        sys.exit(f"lmc: {error}")
    except RuntimeError as error:
        from torch import OutOfMemoryError

        if not isinstance(error, OutOfMemoryError):
            raise
        sys.exit(f"lmc: {OUT_OF_MEMORY}")
    except KeyboardInterrupt:
        sys.exit(130)
