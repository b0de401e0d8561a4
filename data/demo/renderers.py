"""Drawings and 3D scenes on the demo, made, judged and shown in one command.

    python data/demo/renderers.py

A lion of 32 paths from text by LMC-SDS, SDS and SDI; the SVG of a drawn cat made a dog's by
LMC-SDS and PDS; a lion in 3D by LMC-SDS and SDS. The demo's CLIP ranks them among the captions of
all nine animals, a scene by 50 views from cameras that no step has seen, whose power spectrum is
beside that of 50 lions that the prior samples. Writes results.json, sheet.png and, in the scenes'
folders, turntables into runs/demo/renderers. What is there is not made again, and what was stopped
goes on.
"""

import argparse
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lmc.cli import main as run
from lmc.files import write_json
from lmc.measure.metrics import Clip, cosines, power_spectrum, spectrum_gained, spectrum_lost
from lmc.one_image.job import read_image, save_whole
from lmc.renderers.cameras import Orbits
from lmc.renderers.drawing import Drawing, vectorise
from lmc.renderers.scene import Scene
from lmc.renderers.svg import SVG
from lmc.shards.images import to_uint8
from lmc.translate import contact_sheet
from lmc.translator import picture_of

from animals import CLASSES, caption, draw
from check import sample

ROOT = Path(__file__).parents[2]
OUT = Path("runs/demo/renderers")
PRIOR = "data/demo/prior"
LOSSES = {
    "lmc": ["--loss=LMC", "--loss.corrector=data/demo/release/corrector"],
    "sds": [],  # the configs' own
    "sdi": ["--loss=SDI"],
}
LION = caption(CLASSES.index("lion"))
CAT, DOG = (caption(CLASSES.index(name)) for name in ("cat", "dog"))
SIZE, VIEWS = 64, 50
ORBITS = Orbits(azimuth=(-30, 30), elevation=(-10, 20))  # as configs/image/demo-scene.yaml


def cat_svg(file: Path, steps: int) -> None:
    """Fit 64 paths to a drawn cat by so many steps, and write them."""
    if file.exists():
        return
    cat = draw(torch.tensor([CLASSES.index("cat")]), torch.tensor([40_000_003]), SIZE)
    generator = torch.Generator().manual_seed(0)
    drawing = Drawing(SVG.random(64, SIZE, generator))
    vectorise(drawing, cat, steps, generator)
    file.parent.mkdir(parents=True, exist_ok=True)
    drawing.svg.save(file)


class Judge:
    """The demo's CLIP among the captions of all animals."""

    def __init__(self) -> None:
        self.clip = Clip("data/demo/clip")
        self.texts = self.clip.texts([caption(number) for number in range(len(CLASSES))])

    def __call__(self, images: Tensor) -> list[str]:
        """Which animal each of (B, 3, H, W) is nearest to."""
        return [
            CLASSES[number] for number in cosines(self.clip.images(images), self.texts).argmax(1)
        ]


@dataclass(frozen=True)
class Show:
    """Makes, judges and shows.

    Attributes:
        judge: says what a picture is of.
        steps: of everything, and views, for a quick look; None is as the configurations have it.
        pictures: by heading, so far, (3, H, W).
    """

    judge: Judge
    steps: int | None
    pictures: dict[str, Tensor] = field(default_factory=dict)

    def drawing(self, out: Path, heading: str, *command: str) -> dict[str, Any]:
        """An SVG by `lmc`: the seconds, and what it is called."""
        whole = [f"--settings.whole_steps={self.steps}"] if self.steps else []
        seconds = self.lmc(out, *command, *whole)
        image = self.pictures[heading] = read_image(out / "seed-0.png")
        (said,) = self.judge(image[None])
        print(f"{heading}: called a {said}, {seconds:.0f} s", flush=True)
        return {"seconds": seconds, "said": said}

    def scene(self, out: Path, heading: str, truth: Tensor, *command: str) -> dict[str, Any]:
        """A scene by `lmc`: the seconds, how many of its views are lions, and their spectrum.

        Args:
            truth: the power spectrum of the prior's samples.
        """
        seconds = self.lmc(out, *command)
        views = unseen(out / "seed-0", self.views)
        self.pictures[heading] = views[0]
        share = self.judge(views).count("lion") / self.views
        spectrum = power_spectrum(views).mean(0)
        lost, gained = (by(spectrum, truth).item() for by in (spectrum_lost, spectrum_gained))
        words = f"power lost {lost:.2f}, gained {gained:.2f}, {seconds:.0f} s"
        print(f"{heading}: {share:.0%} of {self.views} views called lions, {words}", flush=True)
        return {"seconds": seconds, "lions": share, "power_lost": lost, "power_gained": gained}

    @property
    def views(self) -> int:
        """How many of a scene are looked at."""
        return min(self.steps or VIEWS, VIEWS)

    def lmc(self, out: Path, *command: str) -> float:
        """Run an `lmc` command that writes `out`, unless it has; the seconds that it took."""
        results = out / "results.json"
        if not results.exists():
            steps = [f"--settings.steps={self.steps}"] if self.steps else []
            run([*command, f"--out={out}", *steps])
        return float(json.loads(results.read_text())["seconds"])


@torch.no_grad()
def unseen(folder: Path, count: int) -> Tensor:
    """Views of a scene from cameras by another seed than any step's, (count, 3, 32, 32)."""
    scene = Scene.load(folder)
    cameras = ORBITS.draw(count, torch.Generator().manual_seed(1_000_003))
    return torch.cat([scene(cameras[i : i + 1], 32) for i in range(count)]).clamp(-1, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, help="of everything, and views, for a quick look")
    args = parser.parse_args()
    os.chdir(ROOT)
    out = OUT if args.steps is None else OUT.with_name("renderers-quick")
    show = Show(Judge(), args.steps)
    text = ["synthesize", f"--prompt={LION}", "--config"]
    drawings = {
        name: show.drawing(
            out / f"svg-{name}", f"{name}: lion", *text, "configs/image/demo-svg.yaml", *options
        )
        for name, options in LOSSES.items()
    }

    file = out / "cat.svg"
    cat_svg(file, args.steps or 300)
    with torch.no_grad():
        show.pictures["a cat"] = SVG.read(file, SIZE)()[0]
    edit = ["edit", "--config=configs/image/demo-edit-svg.yaml"]
    edit += [f"--image={file}", f"--prompt={DOG}"]
    pds = ["--loss=PDS", f"--source_prompt={CAT}"]
    edits = {
        name: show.drawing(out / f"dog-{name}", f"{name}: its dog", *edit, *options)
        for name, options in {"lmc": [], "pds": pds}.items()
    }

    lions = torch.full((show.views,), CLASSES.index("lion"))
    samples, _ = sample(Path(PRIOR), lions, args.steps or 50, guidance=2.0)
    truth = power_spectrum(samples).mean(0)
    text.append("configs/image/demo-scene.yaml")
    scenes = {
        name: show.scene(out / f"scene-{name}", f"{name}: 3D", truth, *text, *LOSSES[name])
        for name in ("lmc", "sds")
    }

    write_json(out / "results.json", {"drawings": drawings, "edits": edits, "scenes": scenes})
    tiles = [picture_of(to_uint8(image)) for image in show.pictures.values()]
    sheet = out / "sheet.png"
    save_whole(sheet, contact_sheet([*show.pictures], [tiles]).save, "png")
    print(f"look at {sheet} and {out}/scene-{{lmc,sds}}/seed-0.gif")


if __name__ == "__main__":
    main()
