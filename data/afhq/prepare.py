"""AFHQ as webdataset shards, 5 % of each class held out.

    python data/afhq/prepare.py afhq --out data/afhq/cats

reads the official archive's folders (v1: train/ and val/, v2: train/ and test/, a folder a class),
a folder of images alone, or the *.parquet / *.arrow files of a mirror on a hub. All splits are
merged. Held out are, of each class, the round(5 %) of the images with the smallest SHA-256 of the
file's name, or of its bytes where there are no names: the same in every mirror that kept the names.

It writes train-*.tar, heldout-*.tar, heldout.txt, skipped.txt and index.json; data/README.md says
what they hold. A run that was stopped goes on with the same command.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import shards
from sources import (
    SUFFIXES,
    TABLES,
    Refused,
    Skip,
    Source,
    files_below,
    list_files,
    list_tables,
)

LICENCE = "CC BY-NC 4.0 (AFHQ, Clova AI Research, NAVER Corp.)"
SPLIT_FOLDERS = ("train", "val", "test")


def list_afhq(path: Path, classes: list[str]) -> tuple[list[Source], list[Skip]]:
    """The images of some classes in a file or folder of any of the layouts.

    Raises:
        Refused: there is none, or a class is not among them.
    """
    if not path.exists():
        raise Refused(f"{path} does not exist: name AFHQ's folder (that holds train/) or tables")
    tables = [path] if path.is_file() else [f for f in files_below(path) if f.suffix in TABLES]
    if path.is_file() and path.suffix not in TABLES:
        raise Refused(f"{path} is no folder and none of *{' *'.join(TABLES)}: unpack an archive")
    if tables:
        return list_tables(tables, classes)
    tops = [path / "afhq", path / "afhq_v2", path]  # the archives unpacked there, or it itself
    splits = [top / name for top in tops for name in SPLIT_FOLDERS if (top / name).is_dir()]
    splits = splits or [path]
    folders = {name: [s / name for s in splits if (s / name).is_dir()] for name in classes}
    missing = [name for name in classes if not folders[name]]
    if not missing:
        sources: list[Source] = []
        skipped: list[Skip] = []
        for name in classes:
            for folder in folders[name]:
                found, left_out = list_files(files_below(folder), name)
                sources, skipped = sources + found, skipped + left_out
        return sources, skipped
    if any(file.suffix.lower() in SUFFIXES for file in path.iterdir()):
        if len(classes) > 1:
            raise Refused(
                f"{path} holds images without a folder a class: name the one that they all are "
                "with --classes"
            )
        return list_files([file for file in path.iterdir() if file.is_file()], classes[0])
    there = sorted(
        {folder.name for split in splits for folder in split.iterdir() if folder.is_dir()}
    )
    raise Refused(
        f"no folder {', '.join(missing)} in {', '.join(map(str, splits))}: found "
        f"{', '.join(there) or 'no folders'}; expected AFHQ's folder (train/cat/... in it), "
        "or one of images"
    )


def prepare(args: argparse.Namespace) -> None:
    """List the images and write their shards."""
    options = shards.options_of(args, by_class=True, label=" ".join(sorted(args.classes)))
    sources: list[Source] = []
    skipped: list[Skip] = []
    for path in dict.fromkeys(path.resolve() for path in args.source):
        found, left_out = list_afhq(path, sorted(set(args.classes)))
        sources, skipped = sources + found, skipped + left_out
    about = {"dataset": "AFHQ", "licence": LICENCE, "source": " ".join(map(str, args.source))}
    shards.run(sources, skipped, args.out, options, about, args.workers, args.dry_run)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=Path, nargs="+", help="AFHQ's folder, or tables")
    parser.add_argument(
        "--classes", nargs="+", default=["cat"], help="cat, dog or wild, several if wanted (cat)"
    )
    shards.add_arguments(parser, size=256)
    shards.main(prepare, parser, argv)


if __name__ == "__main__":
    main()
