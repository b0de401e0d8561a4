"""The whole way on photographs of animals' heads, in one command, from folders to a report.

    python data/faces/run.py --photographs faces --cats afhq

Makes the shards, trains a prior, a CLIP and the corrector, then a translator with each loss and
seed, and measures them on the held-out cats, by a classifier of ImageNet's too, beside real
pictures, the prior's own samples and DreamSampler's edits. runs/faces/report.html is the page to
look at. Every step goes on where it was stopped, and what is done is not done again.
--size 64 is for a GPU, in runs/faces-64 (configs/*/faces-64.yaml over the others).

FACES holds a folder of photographs each for bear, dog, lion, squirrel, tiger, fox and wolf; CATS is
AFHQ's folder. Both may be photographs of your own: the heads in the middle, of one size, and no two
files of one name.
"""

import argparse
import importlib.util
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

from marks import CLASSES

from lmc.errors import EXTRAS

ROOT = Path(__file__).parents[2]
LOSSES = "lmc,sds,sds:guidance_scale=100,dds,nfsd:negative_prompt='',vsd"
NEEDED = ("train", "vsd", "fid", "judge")  # extras, of which some are imported after hours
LICENCE = "AFHQ: CC BY-NC 4.0; others as where they are from says, for research only"
MARGIN = {32: 2, 64: 4}  # what the prior's pictures are cropped by at random, by their size


def call(*command: str | Path) -> None:
    """Run a Python script of this repository, showing what it prints."""
    subprocess.run([sys.executable, *map(str, command)], check=True)


def lmc(*command: str | Path) -> None:
    """Run an `lmc` command."""
    call("-m", "lmc.cli", *command)


def shards(photographs: Path, cats: Path, size: int, out: Path) -> None:
    """All classes at the prior's size and a little above it, and the cats alone."""
    folders = [photographs / name for name in CLASSES]
    of_cats = sorted(path for path in (cats, *cats.rglob("cat")) if path.name == "cat")
    if not of_cats:
        sys.exit(f"{cats} has no folder named cat: --cats is AFHQ's, as its archive has it")
    # Then cats are held out by their names in both sets of shards, and are the same.
    names = Counter(
        file.name for folder in (*folders, *of_cats) for file in folder.rglob("*") if file.is_file()
    )
    if twice := [name for name, count in names.items() if count > 1 and not name.startswith(".")]:
        sys.exit(f"{len(twice)} photographs have another's name, such as {twice[0]}: rename them")
    for side in (size, size + MARGIN[size]):
        call(
            *("data/openimages/prepare.py", *folders, *of_cats, "--folder_labels"),
            *("--size", str(side), "--out", out / str(side), "--licence", LICENCE),
        )
    call("data/afhq/prepare.py", cats, "--size", str(size), "--out", out / "cats")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--photographs", type=Path, required=True, help="a folder for each class")
    parser.add_argument("--cats", type=Path, required=True, help="AFHQ's folder")
    parser.add_argument("--losses", default=LOSSES, help="of the translators (%(default)s)")
    parser.add_argument("--seeds", default="0,1,2", help="of each (%(default)s)")
    parser.add_argument("--jobs", type=int, default=2, help="translators at once (%(default)s)")
    parser.add_argument("--size", type=int, choices=MARGIN, default=32, help="(%(default)s)")
    parser.add_argument("--steps", type=int, help="of every training, for a quick look")
    args = parser.parse_args()
    packages = [package for extra in NEEDED for package in EXTRAS[extra]]
    if absent := [each for each in packages if importlib.util.find_spec(each) is None]:
        sys.exit(
            f"not installed: {', '.join(absent)}: pip install --editable '.[{','.join(NEEDED)}]'"
        )
    photographs, cats = args.photographs.absolute(), args.cats.absolute()
    os.chdir(ROOT)
    names = ["faces"] if args.size == 32 else ["faces", f"faces-{args.size}"]
    root = Path("runs", names[-1])
    shards(photographs, cats, args.size, root / "data")
    steps = [f"--trainer.max_steps={args.steps}"] if args.steps else []

    def configs(stage: str) -> list[str]:
        return [f"configs/{stage}/{name}.yaml" for name in names]

    for stage, script in (
        ("prior", "data/prior/train.py"),
        ("clip", "data/clip/train.py"),
        ("bias", "train_bias.py"),
    ):
        given = [word for file in configs(stage) for word in ("--config", file)]
        call(script, "fit", *given, *steps)
    os.environ["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // args.jobs))
    lmc("release", root / "bias", "--out", root / "release/corrector")
    measured = ("--clip", root / "clip/clip", "--classifier", "data.faces.judge:load")
    measured += ("--real", f"{root}/data/{args.size}/heldout-*.tar")
    compared = root / "compare"
    lmc(
        *("compare", *configs("translator"), "--losses", args.losses),
        *("--seeds", args.seeds, "--jobs", str(args.jobs), "--out", compared, *measured),
        *("--", *steps),
    )
    call("data/faces/marks.py", "--root", root)
    lmc(
        *("evaluate", "--images", *sorted((root / "marks").iterdir()), "--offline"),
        *("--classes", *CLASSES, "--shards", f"{root}/data/cats/heldout-*.tar"),
        *(*measured, "--out", root / "marks.json"),
    )
    lmc("report", compared, root / "marks.json", "--out", root / "report.html")


if __name__ == "__main__":
    main()
