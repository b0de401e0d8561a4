"""Check the demo's models: does the judge know the animals, and does the prior draw what is asked?

    python data/demo/check.py --clip data/demo/clip --prior data/demo/prior
    python data/demo/check.py --translators runs/demo/release/{lmc,sds,dds}

The judge is asked for the captions of fresh drawings. The prior is sampled by diffusers' own
pipeline and scheduler, and a classifier that has seen only drawings, never the judge nor the prior,
says what the samples show; and what the held-out cats have become by translators, which animal of
all nine. Prints what was measured, as one line of JSON at the end.
"""

import argparse
import json
import os
import time
from itertools import pairwise
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.utils import save_image

from lmc.load import load_translator
from lmc.measure.metrics import Clip, cosines
from lmc.measure.small_clip import augment
from lmc.shards.images import ImageStream, from_uint8

from animals import CLASSES, caption, draw_bytes

SIZE, CLIP_SIZE = 32, 64
# The committed models have seen none of these pictures, nor do what prepare.py draws.
CLIP_SEED, TRAIN_SEED, TEST_SEED = 4_000_000, 5_000_000, 6_000_000
SHEET_COLUMNS = 10


# ---------------------------------------------------------------------------------------------
# The classifier


def build_classifier() -> nn.Sequential:
    """A small convolutional network: (B, 3, 32, 32) in [-1, 1] -> (B, 9) logits."""
    widths = (3, 24, 48, 96, 128)
    layers: list[nn.Module] = []
    for i, (a, b) in enumerate(pairwise(widths)):
        stride = 1 if i == 0 else 2
        layers += [nn.Conv2d(a, b, 3, stride, padding=1), nn.GroupNorm(8, b), nn.SiLU()]
    return nn.Sequential(
        *layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * widths[-1], len(CLASSES))
    )


def vary(x: Tensor, random: torch.Generator) -> Tensor:
    """Mildly change drawings in [-1, 1]: mirrored, shifted, other light, noise; same shape."""
    if torch.rand((), generator=random) < 0.5:
        x = x.flip(-1)
    dx, dy = torch.randint(-2, 3, (2,), generator=random).tolist()
    x = F.pad(x, (2, 2, 2, 2), mode="replicate").roll((dy, dx), (2, 3))[:, :, 2:-2, 2:-2]
    gain, offset = torch.rand(2, len(x), 1, 1, 1, generator=random)
    noise = 0.15 * torch.rand(len(x), 1, 1, 1, generator=random)
    x = x * (0.75 + 0.5 * gain) + 0.2 * (offset - 0.5)
    return (x + noise * torch.randn(x.shape, generator=random)).clamp(-1, 1)


def train_classifier(steps: int, count: int = 12_600, batch: int = 64) -> nn.Sequential:
    """Train on `count` drawings; returns the classifier in evaluation mode."""
    torch.manual_seed(0)
    model = build_classifier()
    optimizer = torch.optim.AdamW(model.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=steps)
    pictures, labels = draw_bytes(count, TRAIN_SEED, SIZE)
    start = time.time()
    for step in range(1, steps + 1):
        random = torch.Generator().manual_seed(step)
        pick = torch.randint(count, (batch,), generator=random)
        x = vary(pictures[pick].float() / 127.5 - 1, random)
        loss = F.cross_entropy(model(x), labels[pick])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 100 == 0 or step == steps:
            left = (time.time() - start) / step * (steps - step)
            print(f"classifier {step}/{steps}  loss {loss:.4f}  {left:.0f} s left", flush=True)
    return model.eval()


def get_classifier(file: Path, steps: int) -> nn.Sequential:
    """The classifier of `file`, trained and written there if there is none."""
    if file.exists():
        model = build_classifier()
        model.load_state_dict(load_file(file))
        return model.eval()
    model = train_classifier(steps)
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(".partial")
    save_file(model.state_dict(), partial)
    os.replace(partial, file)
    return model


@torch.no_grad()
def classify(model: nn.Module, pictures: Tensor) -> Tensor:
    """Pictures (N, 3, 32, 32) float in [-1, 1] -> class ids, int64 (N,)."""
    return torch.cat([model(batch).argmax(1) for batch in pictures.split(250)])


def shares(hits: Tensor, labels: Tensor) -> dict[str, float]:
    """Share of True in `hits` (N,), overall and by class of `labels` (N,)."""
    by_class = {name: hits[labels == i].float().mean().item() for i, name in enumerate(CLASSES)}
    return {"all": hits.float().mean().item(), **by_class}


# ---------------------------------------------------------------------------------------------
# The checks


@torch.no_grad()
def check_clip(folder: Path, count: int) -> dict[str, dict[str, float]]:
    """The judge on `count` fresh drawings: as drawn, augmented, and drawn at half the size.

    Accuracy over the nine captions, and the mean cosines of the right and of the other captions.
    """
    clip = Clip(str(folder))
    texts = clip.texts([caption(i) for i in range(len(CLASSES))])
    drawn, labels = draw_bytes(count, CLIP_SEED, CLIP_SIZE)
    random = torch.Generator().manual_seed(CLIP_SEED)
    batches = [from_uint8(batch) for batch in drawn.split(250)]
    small = from_uint8(draw_bytes(count, CLIP_SEED, CLIP_SIZE // 2)[0])
    sets = {
        "drawn": batches,
        "augmented": [augment(batch, random) for batch in batches],
        "half_size": small.split(250),
    }
    right = F.one_hot(labels, len(CLASSES)).bool()
    found = {}
    for name, pictures in sets.items():
        table = torch.cat([cosines(clip.images(batch), texts) for batch in pictures])
        found[name] = {
            "accuracy": (table.argmax(1) == labels).float().mean().item(),
            "matching": table[right].mean().item(),
            "other": table[~right].mean().item(),
        }
    return found


def sample(
    folder: Path, labels: Tensor, steps: int, guidance: float, batch: int = 50
) -> tuple[Tensor, float]:
    """Sample a picture for every class id of `labels`, int64 (N,), by the pipeline in `folder`.

    Returns float32 (N, 3, 32, 32) in [-1, 1], and the largest magnitude before clipping to that.
    """
    pipeline = DiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    pictures, start = [], time.time()
    for i, part in enumerate(labels.split(batch)):
        out = pipeline(
            [caption(label) for label in part.tolist()],
            num_inference_steps=steps,
            guidance_scale=guidance,
            generator=torch.Generator().manual_seed(i),
            clean_caption=False,
            output_type="pt",  # [-1, 1], unlike the pipeline's other output types
        )
        pictures.append(out.images)
        done = sum(map(len, pictures))
        left = (time.time() - start) / done * (len(labels) - done)
        print(f"sampled {done}/{len(labels)}  {left:.0f} s left", flush=True)
    images = torch.cat(pictures).float()
    return images.clamp(-1, 1), images.abs().amax().item()


def write_sheet(pictures: Tensor, labels: Tensor, file: Path) -> None:
    """Write a PNG with a row per class; pictures (N, 3, H, W) in [-1, 1], labels (N,)."""
    columns = min(SHEET_COLUMNS, int(labels.bincount(minlength=len(CLASSES)).min()))
    rows = torch.cat([pictures[labels == i][:columns] for i in range(len(CLASSES))])
    rows = F.interpolate(rows, scale_factor=2, mode="nearest")
    file.parent.mkdir(parents=True, exist_ok=True)
    save_image(rows / 2 + 0.5, file, nrow=columns)


def check_classifier(model: nn.Module, count: int) -> dict[str, float]:
    """Share of fresh drawings that it recognises, overall and by class."""
    drawn, labels = draw_bytes(count, TEST_SEED, SIZE)
    known = shares(classify(model, drawn.float() / 127.5 - 1) == labels, labels)
    print("classifier on fresh drawings", rounded(known))
    return known


def check_translators(args: argparse.Namespace) -> dict:
    """By translator, and for the untouched cats: share that the classifier calls the target."""
    model = get_classifier(args.classifier, args.classifier_steps)
    found: dict = {"classifier": check_classifier(model, args.count)}
    batches = list(ImageStream(args.cats, SIZE, 100, training=False))
    cats = torch.cat([batch.image for batch in batches if batch.key])
    for folder in args.translators:
        translator = load_translator(str(folder)).eval()
        named: dict[str, float] = {"cats": len(cats)}
        for name in translator.classes:
            with torch.no_grad():
                made = translator(cats, translator.class_ids([name]).expand(len(cats)))
            seen = classify(model, made.clamp(-1, 1)).bincount(minlength=len(CLASSES))
            named[name] = (seen[CLASSES.index(name)] / len(cats)).item()
            named[f"{name}, still a cat"] = (seen[CLASSES.index("cat")] / len(cats)).item()
        named["all"] = sum(named[name] for name in translator.classes) / len(translator.classes)
        print("translator", folder, rounded(named))
        found[str(folder)] = named
    return found


def check_prior(args: argparse.Namespace) -> dict:
    """Share of the prior's samples that the classifier recognises as their prompt's class."""
    model = get_classifier(args.classifier, args.classifier_steps)
    known = check_classifier(model, args.count)
    labels = torch.arange(args.samples) % len(CLASSES)
    start = time.time()
    pictures, largest = sample(args.prior, labels, args.steps, args.guidance)
    seconds = time.time() - start
    write_sheet(pictures, labels, args.sheet)
    recognised = shares(classify(model, pictures) == labels, labels)
    print("samples recognised", rounded(recognised))
    return {
        "classifier": known,
        "recognised": recognised,
        "samples": args.samples,
        "steps": args.steps,
        "guidance": args.guidance,
        "largest_pixel": largest,
        "seconds": seconds,
    }


def rounded(results: dict) -> dict:
    """The same dictionary, nested as it is, with its numbers rounded to four digits."""
    return {
        k: rounded(v) if isinstance(v, dict) else round(v, 4) if isinstance(v, float) else v
        for k, v in results.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clip", type=Path, help="CLIP folder to check")
    parser.add_argument("--prior", type=Path, help="pipeline folder to check")
    parser.add_argument("--translators", type=Path, nargs="+", default=[], help="releases to check")
    parser.add_argument(
        "--cats", default="runs/demo/data/cats/heldout-*.tar", help="that they translate"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/check"), help="for what is written")
    parser.add_argument("--count", type=int, default=2000, help="fresh drawings for each accuracy")
    parser.add_argument("--samples", type=int, default=500, help="pictures drawn from the prior")
    parser.add_argument("--steps", type=int, default=40, help="sampling steps")
    parser.add_argument("--guidance", type=float, default=2.0)
    parser.add_argument("--classifier", type=Path, help="safetensors file to reuse or to write")
    parser.add_argument("--classifier_steps", type=int, default=1000)
    parser.add_argument("--sheet", type=Path, help="PNG of samples, a row a class")
    parser.add_argument("--json", type=Path, help="file for the results")
    args = parser.parse_args()
    if args.samples < len(CLASSES):
        parser.error(f"--samples must be at least {len(CLASSES)}, one per class")
    args.classifier = args.classifier or args.out / "classifier.safetensors"
    args.sheet = args.sheet or args.out / "prior.png"

    results = {}
    if args.clip:
        results["clip"] = check_clip(args.clip, args.count)
        for name, result in results["clip"].items():
            print("clip,", name, rounded(result), flush=True)
    if args.prior:
        results["prior"] = check_prior(args)
    if args.translators:
        results["translators"] = check_translators(args)
    line = json.dumps(rounded(results))
    print(line)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(line + "\n")


if __name__ == "__main__":
    main()
