"""`lmc evaluate`, `lmc translate`, `lmc release`: what is done with trained networks."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

PROMPT = "a photo of a {}"


def evaluate(args: argparse.Namespace) -> None:
    """Measure translators on held-out images; print a table, write JSON."""
    from torch.utils.data import DataLoader

    from lmc.evaluate import Clip, evaluate_translator
    from lmc.images import ImageStream
    from lmc.report import table

    names = [Path(path).name for path in args.translator]
    if len(set(names)) < len(names) or "source" in names:
        names = args.translator
    translators = {n: _translator(p) for n, p in zip(names, args.translator, strict=True)}
    first = next(iter(translators.values()))
    prompts = {name: args.prompt.format(name) for name in first.classes}
    clip = Clip(args.clip, args.device)
    rows: dict[str, Any] = {}
    for name, translator in [("source", None), *translators.items()]:
        if translator is not None and translator.classes != first.classes:
            raise ValueError(f"{name} has other classes than {names[0]}")
        stream = ImageStream(args.shards, first.image_size, args.batch_size, training=False)
        batches = DataLoader(stream, batch_size=None, num_workers=args.num_workers)
        if translator is not None:
            translator = translator.to(args.device)
        rows[name] = evaluate_translator(
            translator, batches, clip, prompts, args.prompt.format(args.source), args.device
        )
        print(f"measured {name}: {rows[name]['images']} images", file=sys.stderr, flush=True)
    print(table(rows))
    if args.out:
        Path(args.out).write_text(json.dumps(rows, indent=1) + "\n")


def translate(args: argparse.Namespace) -> None:
    """Translate image files; non-square ones are cropped at the centre."""
    import torch
    from PIL import Image

    from lmc.images import decode_image, resize, to_uint8

    translator = _translator(args.translator).to(args.device)
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
        side = min(image.shape[1:])
        top, left = ((length - side) // 2 for length in image.shape[1:])
        image = resize(image[None, :, top : top + side, left : left + side], translator.image_size)
        with torch.no_grad():
            outputs = translator(image.expand(len(ids), -1, -1, -1).to(args.device), ids)
        for target, output in zip(targets, to_uint8(outputs).cpu(), strict=True):
            to = args.out / f"{file.stem}-{target}.png"
            Image.fromarray(output.permute(1, 2, 0).numpy()).save(to)
        print(f"{number}/{len(files)}  {file} -> {args.out}/{file.stem}-*.png", flush=True)


def release(args: argparse.Namespace) -> None:
    """Turn a run folder into a release."""
    from lmc.release import release as write

    results = json.loads(args.results.read_text()) if args.results else None
    if results is not None and args.row:
        if args.row not in results:
            raise ValueError(f"{args.results} has no row {args.row!r}; it has {', '.join(results)}")
        results = results[args.row]
    write(args.run, args.out, results, args.picture)
    print(f"released to {args.out}")


def _translator(path: str) -> Any:
    from lmc.release import load_averaged, load_network
    from lmc.translator import Translator

    run = Path(path) / "checkpoints"
    network = load_averaged(Path(path))[0] if run.is_dir() else load_network(path)
    if not isinstance(network, Translator):
        raise ValueError(f"{path} is a {type(network).__name__}, not a Translator")
    return network.eval()


def parser() -> argparse.ArgumentParser:
    """The command line."""
    main = argparse.ArgumentParser(prog="lmc", description=__doc__)
    commands = main.add_subparsers(required=True, metavar="COMMAND")

    one = commands.add_parser("evaluate", help="measure translators on held-out images")
    one.set_defaults(run_command=evaluate)
    one.add_argument(
        "--translator",
        nargs="+",
        required=True,
        metavar="RUN",
        help="run folders, releases or hub ids; a row of the table each, by the folder's name",
    )
    one.add_argument("--shards", required=True, help="held-out shards, e.g. 'cats/heldout-*.tar'")
    one.add_argument("--clip", default="openai/clip-vit-base-patch16", help="folder or hub id")
    one.add_argument("--source", default="cat", help="class of the held-out images (%(default)s)")
    one.add_argument("--prompt", default=PROMPT, help="of a class; {} is its name (%(default)r)")
    one.add_argument("--batch-size", type=int, default=50, metavar="N", help="default %(default)s")
    one.add_argument("--num-workers", type=int, default=0, metavar="N", help="default %(default)s")
    one.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, … (%(default)s)")
    one.add_argument("--out", metavar="FILE", help="JSON to write")

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
        "--results", type=Path, metavar="FILE", help="lmc evaluate's JSON, for the card"
    )
    three.add_argument("--row", metavar="NAME", help="which row of it is this network's")
    three.add_argument("--picture", type=Path, metavar="PNG", help="a picture for the card")
    return main


def main(args: Sequence[str] | None = None) -> None:
    """Run a command; bad input ends it with one line that says what is wrong."""
    given = parser().parse_args(args)
    try:
        given.run_command(given)
    except (OSError, ValueError) as error:
        sys.exit(f"lmc: {error}")


if __name__ == "__main__":
    main()
