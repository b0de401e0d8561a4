"""A trained network as a folder others can load: averaged weights, config, card. No Lightning.

translator = Translator.from_pretrained("runs/mine/release")  # a folder or a hub id
translator.push_to_hub("me/cats-to-others")  # huggingface_hub's own
"""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lmc import __version__
from lmc.filter import FilterCorrector
from lmc.load import Network, load_averaged
from lmc.translator import Translator


def release(
    checkpoint: Path,
    out: Path,
    results: Mapping[str, Any] | None = None,
    picture: Path | None = None,
    best: bool = False,
) -> None:
    """Write model.safetensors, config.json and README.md (the card) into `out`.

    Args:
        checkpoint: a run folder or its last.ckpt.
        out: folder to write; a release that is there is replaced.
        results: what was measured of it, for the card: names and numbers.
        picture: a PNG to show on the card.
        best: see `load_averaged`.

    Raises:
        FileNotFoundError, ValueError: see `load_averaged`.
        ValueError: `out` is there and is something else than a release.
    """
    check_out(out)
    network, step = load_averaged(checkpoint, best)
    which = ", the best of the run by held-out R-Precision" if best else ""
    write_release(network, out, f"{step} steps{which}; averaged weights", results, picture)


def write_release(
    network: Network,
    out: Path,
    how: str,
    results: Mapping[str, Any] | None = None,
    picture: Path | None = None,
) -> None:
    """Write a network and its card; see `release`.

    Args:
        network: what is released.
        out, results, picture: see `release`.
        how: how it came about, for the card.

    Raises:
        ValueError: see `check_out`.
    """
    check_out(out)
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    network.save_pretrained(partial)
    if picture is not None:
        shutil.copy(picture, partial / "samples.png")
    (partial / "README.md").write_text(card(network, how, results, picture is not None))
    shutil.rmtree(out, ignore_errors=True)
    out.parent.mkdir(parents=True, exist_ok=True)
    os.replace(partial, out)


def check_out(out: Path) -> None:
    """Refuse to replace what is no release.

    Raises:
        ValueError: `out` is there and is something else.
    """
    if out.exists() and not is_release(out):
        raise ValueError(f"{out} is there and is no release: name another folder, or empty it")


def is_release(folder: Path) -> bool:
    """Whether a folder may be replaced by a release: it is one, or it is empty."""
    names = {file.name for file in folder.iterdir()} if folder.is_dir() else {"a file"}
    return names <= {"config.json", "model.safetensors", "README.md", "samples.png"}


def card(network: Network, how: str, results: Mapping[str, Any] | None, picture: bool) -> str:
    """The model card, Markdown with the hub's YAML header."""
    kind = type(network).__name__
    tags = ["score-distillation", "lmc-sds"]
    if isinstance(network, Translator):
        tags.append("image-to-image")
        about = (
            f"A feed-forward translator of {network.image_size} x {network.image_size} images "
            f"to {', '.join(network.classes)}."
        )
    else:
        prior = "\n".join(f"- {key}: `{value}`" for key, value in network.prior.items())
        of = "closed-form corrector" if isinstance(network, FilterCorrector) else "corrector b̂_ψ"
        about = f"The {of} of one prior, and valid for no other:\n\n{prior}"
    numbers = {k: v for k, v in (results or {}).items() if isinstance(v, int | float)}
    measured = "\n".join(f"| {name} | {value:.4g} |" for name, value in numbers.items())
    header = json.dumps({"library_name": "lmc", "license": "apache-2.0", "tags": tags})
    parts = [
        f"---\n{header}\n---",
        f"# {kind}",
        about,
        f"Made with LMC-SDS's code, version {__version__}: {how}.",
        f'```python\nfrom lmc import {kind}\n\nnetwork = {kind}.from_pretrained("…").eval()\n```',
    ]
    if measured:
        parts.append(f"Measured on held-out images:\n\n| | |\n|---|---|\n{measured}")
    if picture:
        parts.append("![samples](samples.png)")
    return "\n\n".join(parts) + "\n"
