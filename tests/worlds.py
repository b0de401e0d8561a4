"""Tiny worlds for the tests: shards of small pictures, run folders, command lines."""

import io
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import torch
from PIL import Image

import lmc.release
from lmc.shards.images import to_uint8, write_shard

# What a release has to state, and the same as options.
TERMS = {
    "license": "cc0-1.0",
    "data": "random pictures, CC0-1.0",
    "prior_license": "random weights, CC0-1.0",
}
STATED = [f"--{name}={value}" for name, value in TERMS.items()]

# A module with classifiers of the user's own: `load` gives one, `nameless` gives what is none.
JUDGE = """
class Judge:
    name = "brightness"

    def __call__(self, pixels):
        bright = pixels.float().mean((1, 2, 3))
        names = ["dog" if x > 127 else "no animal" for x in bright.tolist()]
        return names, pixels.flatten(1) / 255


def load(device):
    return Judge()


def nameless(device):
    return lambda pixels: None
"""


def release(run: Path, out: Path, **more: Any) -> None:
    """lmc.release.release, with what has to be stated, and without a word."""
    with redirect_stdout(io.StringIO()):
        more = {"unmeasured": "results" not in more, **TERMS, **more}
        lmc.release.release(run, out=out, **more)


def png(image: torch.Tensor, mode: str = "RGB", suffix: str = "png") -> bytes:
    """(3, H, W) in [-1, 1] as an image file."""
    file = io.BytesIO()
    picture = Image.fromarray(to_uint8(image).permute(1, 2, 0).numpy()).convert(mode)
    picture.save(file, {"png": "png", "jpg": "jpeg"}[suffix])
    return file.getvalue()


def write_world(folder: Path, size: int = 16, count: int = 24, label: str = "cat") -> str:
    """Shards train-*.tar and heldout-*.tar of smooth random pictures; the folder as a string."""
    generator = torch.Generator().manual_seed(0)
    for split, first in (("train", 0), ("heldout", 1000)):
        for shard in range(2):
            coarse = torch.randn(count // 2, 3, 4, 4, generator=generator)
            pictures = torch.nn.functional.interpolate(coarse, (size, size), mode="bicubic") / 2
            write_shard(
                folder / f"{split}-{shard:05d}.tar",
                [
                    (f"{first + shard * 100 + i:05d}", png(p.clamp(-1, 1)), "png", {"label": label})
                    for i, p in enumerate(pictures)
                ],
            )
    return str(folder)


def bias_args(prior: Path, data: str, run: Path, *more: str) -> list[str]:
    """A tiny training of stage one."""
    return [
        "fit",
        f"--run={run}",
        "--model.prior=lmc.priors.DiffusersPrior",
        f"--model.prior.init_args.pretrained={prior}",
        "--model.widths=[8,8]",
        "--model.stability=0",
        *common(data),
        *more,
    ]


def translator_args(prior: Path, data: str, run: Path, loss: str, *more: str) -> list[str]:
    """A tiny training of stage two."""
    return [
        "fit",
        f"--run={run}",
        "--model.prior=lmc.priors.DiffusersPrior",
        f"--model.prior.init_args.pretrained={prior}",
        f"--model.loss={loss}",
        "--model.classes=[dog,bear]",
        "--model.image_size=16",
        "--model.widths=[8,8]",
        *common(data),
        *more,
    ]


def common(data: str) -> list[str]:
    """What both stages' tiny trainings share."""
    return [
        f"--data.train={data}/train-*.tar",
        f"--data.heldout={data}/heldout-*.tar",
        "--data.image_size=16",
        "--data.batch_size=4",
        "--data.shuffle=10",
        "--trainer.accelerator=cpu",
        "--trainer.max_steps=4",
        "--trainer.val_check_interval=2",
        "--trainer.log_every_n_steps=1",
        "--save_every=2",
    ]
