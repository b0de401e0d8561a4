"""Ten drawn cats become the other eight animals, without a training: `make try`.

They are drawn here, from seeds that no training has seen, and translated by `lmc translate` with
the release beside this file. runs/try/sheet.png shows all of it.
"""

import os
from pathlib import Path

import torch

from lmc.cli import main
from lmc.shards.images import to_uint8
from lmc.translator import picture_of

from animals import CLASSES, draw

ROOT = Path(__file__).parents[2]
RELEASE = "data/demo/release/translator"
OUT = Path("runs/try")
FIRST_SEED = 40_000_000  # prepare.py's begin at 10, 20 and 30 millions


def draw_cats(folder: Path) -> None:
    """Write ten drawn cats of 32 x 32 pixels, cat-0.png to cat-9.png."""
    folder.mkdir(parents=True, exist_ok=True)
    seeds = FIRST_SEED + torch.arange(10)
    cats = draw(torch.full_like(seeds, CLASSES.index("cat")), seeds, 32)
    for number, cat in enumerate(to_uint8(cats)):
        picture_of(cat).save(folder / f"cat-{number}.png")


if __name__ == "__main__":
    os.chdir(ROOT)
    draw_cats(OUT / "cats")
    sheet = str(OUT / "sheet.png")
    places = [f"--out={OUT}/animals", f"--sheet={sheet}", "--overwrite"]
    main(["translate", f"{OUT}/cats", f"--translator={RELEASE}", *places])
    print(f"look at {sheet}")
