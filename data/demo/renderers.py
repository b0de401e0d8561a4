"""Drawings and 3D scenes on the demo, made, judged and shown in one command.

    python data/demo/renderers.py

A lion of 32 paths from text by LMC-SDS, SDS and SDI; the SVG of a drawn cat made a dog's; a lion in
3D by LMC-SDS and SDS. The demo's CLIP ranks them among the captions of all nine animals, a scene by
50 views from cameras that no step has seen, whose power spectrum is beside that of 50 lions that
the prior samples. Writes results.json, sheet.png and the turntables into runs/demo/renderers. What
is there is not made again, and what was stopped goes on.
"""

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lmc.cli import main as run
from lmc.files import write_json
from lmc.measure.metrics import Clip, power_spectrum, spectrum_gained, spectrum_lost
from lmc.one_image.job import read_image
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


def lmc(out: Path, *command: str) -> float:
    """Run an `lmc` command that writes `out`, unless it has; the seconds that it took.

    Of one that was stopped and went on, those since then.
    """
    seconds = out / "seconds.json"
    if not seconds.exists():
        start = time.monotonic()
        run([*command, f"--out={out}"])
        write_json(seconds, round(time.monotonic() - start))
    return float(json.loads(seconds.read_text()))


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
        similar = torch.nn.functional.cosine_similarity(
            self.clip.images(images)[:, None], self.texts[None], dim=-1
        )
        return [CLASSES[number] for number in similar.argmax(1)]


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
    views = min(args.steps or VIEWS, VIEWS)
    os.chdir(ROOT)
    steps = [f"--settings.steps={args.steps}"] if args.steps else []
    judge = Judge()
    results: dict[str, Any] = {"svg": {}, "scene": {}}
    shown: dict[str, Tensor] = {}

    text = [f"--prompt={LION}", *steps]
    for name, options in LOSSES.items():
        out = OUT / f"svg-{name}"
        config = "--config=configs/image/demo-svg.yaml"
        whole = [f"--settings.whole_steps={args.steps}"] if args.steps else []
        seconds = lmc(out, "synthesize", config, *text, *whole, *options)
        image = read_image(out / "seed-0.png")
        (said,) = judge(image[None])
        results["svg"][name] = {"seconds": seconds, "said": said}
        shown[f"{name}: 32 paths"] = image
        print(f"{name}, 32 paths: called a {said}, {seconds:.0f} s", flush=True)

    cat_svg(OUT / "cat.svg", args.steps or 300)
    out = OUT / "dog"
    edit = ["--renderer=svg", f"--image={OUT}/cat.svg", f"--size={SIZE}", "--loss=PDS"]
    edit += ["--prior=lmc.priors.DiffusersPrior", f"--prior.pretrained={PRIOR}", *steps]
    seconds = lmc(out, "edit", *edit, f"--source_prompt={CAT}", f"--prompt={DOG}")
    with torch.no_grad():
        pictures = [SVG.read(OUT / "cat.svg", SIZE)()[0], read_image(out / "seed-0.png")]
    said = judge(torch.stack(pictures))
    results["edit"] = {"seconds": seconds, "before": said[0], "after": said[1]}
    shown |= {"a cat's SVG": pictures[0], "its dog": pictures[1]}
    print(f"edit: called a {said[0]}, then a {said[1]}, {seconds:.0f} s", flush=True)

    lions = torch.full((views,), CLASSES.index("lion"))
    samples, _ = sample(Path(PRIOR), lions, args.steps or 50, guidance=2.0)
    truth = power_spectrum(samples).mean(0)
    for name in ("lmc", "sds"):
        out = OUT / f"scene-{name}"
        config = "--config=configs/image/demo-scene.yaml"
        seconds = lmc(out, "synthesize", config, *text, *LOSSES[name])
        seen = unseen(out / "seed-0", views)
        share = judge(seen).count("lion") / views
        spectrum = power_spectrum(seen).mean(0)
        lost, gained = (by(spectrum, truth).item() for by in (spectrum_lost, spectrum_gained))
        results["scene"][name] = {
            "seconds": seconds,
            "lions": share,
            "power_lost": lost,
            "power_gained": gained,
        }
        words = f"{name}, 3D: {share:.0%} of {views} views called lions, power lost {lost:.2f}, "
        print(f"{words}gained {gained:.2f}, {seconds:.0f} s", flush=True)
    write_json(OUT / "results.json", results)
    tiles = [picture_of(to_uint8(image)) for image in shown.values()]
    sheet = OUT / "sheet.png"
    contact_sheet([*shown], [tiles]).save(sheet)
    print(f"look at {sheet}, {OUT}/scene-lmc/seed-0.gif and {OUT}/scene-sds/seed-0.gif")


if __name__ == "__main__":
    main()
