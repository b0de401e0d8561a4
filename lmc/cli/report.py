"""`lmc report`: what was measured, as one HTML page."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

TITLE = "Score distillation, measured"
PICTURES = 6


def report(args: argparse.Namespace) -> None:
    """Read results and runs, write the page."""
    write(args.results, args.out, args.runs, args.pictures, args.against, args.title, args.shards)


def write(
    results: Sequence[str],
    out: Path,
    runs: Sequence[str] = (),
    pictures: int = PICTURES,
    against: str | None = None,
    title: str = TITLE,
    shards: str | None = None,
) -> None:
    """Write the page and say so; the arguments are the command's."""
    result, seeds = _result(results, against)
    # After it: these take seconds, and a misspelt file is named before.
    from lmc.measure.report import draw, is_run, read_run, write_report

    rows = [name for name in result["rows"] if name != "source"]
    paths = {name: result["rows"][name].get("path") for name in rows}
    folders = {name: path for name, path in paths.items() if path and is_run(path)}
    for folder in runs:
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
    for name in names:
        if not Path(name).exists():
            raise FileNotFoundError(f"no such file or folder: {name}")
    from lmc.measure.results import combine, read_result

    results: dict[str, dict[str, Any]] = {}
    seeds: list[list[str]] = []
    for name in names:
        if Path(name).is_dir():
            from lmc.compare.comparison import read_comparison

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


def count(text: str) -> int:
    """A number of pictures, for argparse."""
    if int(text) < 0:
        raise ValueError(text)
    return int(text)


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Add the command to those of `lmc`."""
    command = commands.add_parser(
        "report",
        help="one HTML page of what was measured: tables, pictures, plots, runs",
        description="Writes one HTML file that needs neither network nor server.",
    )
    command.set_defaults(run_command=report)
    command.add_argument(
        "results",
        nargs="+",
        metavar="RESULT",
        help="JSON files of lmc evaluate --out, over the same held-out images, or a folder of lmc "
        "compare",
    )
    command.add_argument(
        "--out", type=Path, default=Path("report.html"), metavar="FILE", help="(%(default)s)"
    )
    command.add_argument(
        "--runs",
        nargs="+",
        default=[],
        metavar="DIR",
        help="run folders whose training curves and configurations are shown, beside those that "
        "the results name; one called like a row is that row's",
    )
    command.add_argument(
        "--pictures",
        type=count,
        default=PICTURES,
        metavar="N",
        help="held-out images to translate and show; 0 leaves them out (%(default)s)",
    )
    command.add_argument(
        "--shards",
        metavar="PATTERN",
        help="where the held-out images lie, if not where the result says; from a result only "
        "files are taken, no URL or pipe: command",
    )
    command.add_argument(
        "--against",
        metavar="NAME",
        help="row that the others are compared with; default that of the result",
    )
    command.add_argument("--title", default=TITLE, help="(%(default)r)")
