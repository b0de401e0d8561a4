"""Where LMC-SDS holds and where it runs away: correctors x guidance scales x steps, on the demo.

    make demo
    python benchmarks/runaway.py --out runs/runaway

Trains five correctors with the demo's configuration (the paper's U-Net, the closed form, the
hybrid, the hybrid trained to restore, and that one calibrated, each with about as many evaluations
of the prior; the stability test of each), a translator with each at each guidance scale, and those
of --long further with the last, which is the recommended one. Nothing but that differs from
configs/translator/demo.yaml, except that the learning rate is not halved before step 1,583 and that
the prior runs in bfloat16. OUT/runaway.json has all figures, OUT/runaway.png the picture. Two
cores: about two hours; it goes on where it was stopped.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lmc.cli import main as lmc
from lmc.files import read_json, whole, write_json
from lmc.measure.figures import drawn
from lmc.measure.runs import read_run
from lmc.progress import NOTE
from lmc.specs import Spec

DEMO = Path("runs/demo")
BIAS, TRANSLATOR = "configs/bias/demo.yaml", "configs/translator/demo.yaml"
# As the paper trains it: the steps whose evaluations the hybrid spends on its closed form besides.
CORRECTORS: dict[str, dict[str, str]] = {
    "paper": {
        "model.kind": "unet",
        "model.restoring": "null",
        "model.statistics": "image",
        "trainer.max_steps": "1450",
        "trainer.val_check_interval": "1450",
    },
    "closed form": {},
    "hybrid": {"model.restoring": "null", "model.statistics": "image"},
    "restoring": {"model.statistics": "image"},
    "calibrated": {},
}
RECOMMENDED = "calibrated"
TOLD = ("loss", "excess", "floor", "identity_loss", "closed_form_loss")


def corrector(name: str, out: Path) -> dict[str, Any]:
    """Train one, release it into out/correctors/NAME/release; its errors and stability test."""
    folder = out / "correctors" / name.replace(" ", "_")
    release, run = folder / "release", folder / "run"
    if name == "closed form":
        if not release.exists():
            lmc(["closed_form", BIAS, "--out", str(release)])
    else:
        options = [f"--{key}={value}" for key, value in CORRECTORS[name].items()]
        command = ["train_bias.py", "fit", "--config", BIAS, f"--run={run}", *options]
        subprocess.run([sys.executable, *command], check=True)
        if not release.exists():
            lmc(["release", str(run), "--out", str(release)])
    tested = folder / "stability.json"
    if not tested.exists():
        lmc(["stability", BIAS, "--corrector", str(release), "--out", str(folder)])
    found = {key: read_json(tested)[key] for key in ("holds", "verdict", "mean")}
    if name != "closed form":
        curves = read_run(run).curves
        told = {tag: curves.get(f"heldout/{tag}") for tag in TOLD}
        found["heldout"] = {tag: curve[1][-1] for tag, curve in told.items() if curve}
    return found


def spec(name: str, guidance: float, out: Path) -> Spec:
    """LMC-SDS with a corrector, as `lmc compare` names it."""
    release = out / "correctors" / name.replace(" ", "_") / "release"
    return Spec(f"lmc:corrector={release}:guidance_scale={guidance:g}", "lmc.losses.LMC")


def compare(specs: Sequence[Spec], out: Path, steps: int, looks: int, options: Any) -> None:
    """Train and measure them, as many steps each."""
    lmc(
        [
            *("compare", TRANSLATOR, "--losses", ",".join(each.label for each in specs)),
            *("--seeds", str(options.seed), "--jobs", str(options.jobs), "--out", str(out)),
            *("--clip", "data/demo/clip", "--truth", str(DEMO / "data/truth")),
            *("--", f"--trainer.max_steps={steps}", f"--trainer.val_check_interval={looks}"),
            *("--model.optimizer.every=1583", f"--model.prior.init_args.dtype={options.dtype}"),
        ]
    )


def looks(folder: Path) -> dict[str, Any]:
    """What was measured at each look of a training, and at which it was said to run away."""
    curves = read_run(folder).curves
    told = {tag.removeprefix("heldout/"): values for tag, values in curves.items()}
    steps = [int(step) + 1 for step in told["truth_rmse"][0]]  # TensorBoard's begin at 0
    names = ("truth_rmse", "truth_lost", "truth_gained", "r_precision", "rmse", "saturation")
    lines = (folder / "log.txt").read_text().splitlines()
    notes = [line.split(NOTE, 1)[1] for line in lines if NOTE in line]
    ran = {int(note.split(":")[0]) for note in notes if "run away" in note}
    return {
        "steps": steps,
        **{name: told[name][1] for name in names if name in told},
        "runs_away": [step in ran for step in steps],
    }


def picture(found: Mapping[str, Any], file: Path) -> None:
    """A panel a corrector: RMSE to the truth by guidance scale and steps, runaways crossed."""
    from matplotlib.figure import Figure

    source, looked = found["source_rmse"], found["looks"]
    figure = Figure(figsize=(11, 2.2 * len(CORRECTORS)), layout="constrained")
    panels = figure.subplots(len(CORRECTORS), 1, squeeze=False)[:, 0]
    image = None
    for axes, name in zip(panels, CORRECTORS, strict=True):
        guidance = sorted(map(float, looked[name]))
        steps = sorted({step for row in looked[name].values() for step in row["steps"]})
        values = [[float("nan")] * len(steps) for _ in guidance]
        for scale, row in looked[name].items():
            y = guidance.index(float(scale))
            told = zip(row["steps"], row["truth_rmse"], row["runs_away"], strict=True)
            for step, value, ran in told:
                x = steps.index(step)
                values[y][x] = value / source
                said = f"{value / source:.2f}" + (" ✗" if ran else "")
                axes.text(x, y, said, ha="center", va="center", fontsize=7)
        image = axes.imshow(
            values, origin="lower", aspect="auto", cmap="RdYlGn_r", vmin=0.5, vmax=1.5
        )
        axes.set_yticks(range(len(guidance)), [f"{scale:g}" for scale in guidance])
        axes.set_xticks(range(len(steps)), [f"{step:,}" for step in steps], fontsize=7)
        verdict = "holds" if found["correctors"][name]["holds"] else "runs away"
        axes.set(ylabel="ω", title=f"{name}: its stability test says that it {verdict}")
    panels[-1].set_xlabel("steps")
    label = "RMSE to the true counterpart, over the untouched cat's"
    figure.colorbar(image, ax=list(panels), label=label)
    with whole(file) as partial:
        drawn(figure).save(partial, "png")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/runaway"))
    parser.add_argument("--guidance", type=float, nargs="+", default=[1, 2, 5, 15, 30])
    parser.add_argument("--long", type=float, nargs="+", default=[1, 2, 5, 15])
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--long_steps", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--dtype", default="bfloat16", help="the prior's, in stage two")
    options = parser.parse_args()
    out = options.out
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    found: dict[str, Any] = {
        "settings": {key: value for key, value in vars(options).items() if key != "out"},
        "correctors": {name: corrector(name, out) for name in CORRECTORS},
    }
    long = [spec(RECOMMENDED, scale, out) for scale in options.long]
    short = {
        (name, scale): spec(name, scale, out)
        for name in CORRECTORS
        for scale in options.guidance
        if not (name == RECOMMENDED and scale in options.long)
    }
    compare(list(short.values()), out / "short", options.steps, options.steps // 4, options)
    compare(long, out / "long", options.long_steps, options.steps // 2, options)
    seed = f"seed{options.seed}"
    rows: dict[str, dict[str, Any]] = {name: {} for name in CORRECTORS}
    for (name, scale), each in short.items():
        rows[name][f"{scale:g}"] = looks(out / "short" / each.folder() / seed)
    for scale, each in zip(options.long, long, strict=True):
        rows[RECOMMENDED][f"{scale:g}"] = looks(out / "long" / each.folder() / seed)
    found["looks"] = rows
    results = json.loads((out / "long" / "results.json").read_text())
    found["source_rmse"] = results["source"]["truth_rmse"]
    write_json(out / "runaway.json", found)
    picture(found, out / "runaway.png")
    print(f"look at {out / 'runaway.png'}")


if __name__ == "__main__":
    main()
