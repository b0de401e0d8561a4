"""Photographs as webdataset shards: Open Images, or any others.

    python data/openimages/prepare.py photographs --size 64 --out data/openimages/photos

reads a folder (with all folders in it), a .txt file that lists an image's path a line (relative to
the file), or an uncompressed .tar; several if wanted. Any kind of image is turned upright and into
8-bit RGB: grey, CMYK, 16-bit, palette; what is transparent becomes white, of an animation the
first frame is taken, colour profiles are not applied. Of images with the same bytes one is kept.
Held out are the round(5 %) with the smallest SHA-256 of the file's name (without folders), or of
the bytes if two files have the same name; with --folder_labels those of each label.

It writes train-*.tar, heldout-*.tar, heldout.txt, skipped.txt and index.json; data/README.md says
what they hold. A run that was stopped goes on with the same command.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import shards
from sources import Refused, Skip, Source, files_below, list_files, list_tar


def list_photos(path: Path, label: str | None) -> tuple[list[Source], list[Skip]]:
    """The images that a folder, a list or a tar names; `label` as for `list_files`.

    Raises:
        Refused: it is none of these.
    """
    expected = "expected a folder, a .txt list of images, or a .tar"
    if path.is_dir():
        return list_files(files_below(path), label)
    if not path.is_file():
        raise Refused(f"{path} does not exist: {expected}")
    if path.suffix == ".tar":
        return list_tar(path, label)
    if path.suffix != ".txt":
        raise Refused(f"{path} is not what can be read: {expected} (gunzip a .tar.gz first)")
    lines = path.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    return list_files([path.parent / line.strip() for line in lines if line.strip()], label)


def prepare(args: argparse.Namespace) -> None:
    """List the images and write their shards."""
    label = None if args.folder_labels else args.label
    options = shards.options_of(
        args,
        crop=args.crop,
        by_class=args.folder_labels,
        label=label or "the folder's name",
    )
    sources: list[Source] = []
    skipped: list[Skip] = []
    for path in dict.fromkeys(path.resolve() for path in args.source):
        found, left_out = list_photos(path, label)
        sources, skipped = sources + found, skipped + left_out
    sources = list(dict.fromkeys(sources))  # a folder, and a list of some in it
    about = {
        "dataset": "photographs",
        "licence": args.licence,
        "source": " ".join(map(str, args.source)),
    }
    shards.run(sources, skipped, args.out, options, about, args.workers, args.dry_run)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=Path, nargs="+", help="a folder, a .txt list or a .tar")
    parser.add_argument(
        "--crop",
        choices=("centre", "random"),
        default="centre",
        help="the largest square in the middle, or anywhere, as the content says (%(default)s)",
    )
    parser.add_argument("--label", default="photo", help="of all images (%(default)s)")
    parser.add_argument(
        "--folder_labels", action="store_true", help="label each by the folder it is in instead"
    )
    parser.add_argument(
        "--licence",
        default="not stated: see where the photographs are from",
        help="for index.json (Open Images: 'CC BY 2.0')",
    )
    shards.add_arguments(parser, size=64)
    shards.main(prepare, parser, argv)


if __name__ == "__main__":
    main()
