"""Trained networks, from checkpoints, run folders, releases and the hub. No Lightning."""

from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch

from lmc.corrector import BiasCorrector, Corrector
from lmc.filter import FilterCorrector, HybridCorrector
from lmc.hub import load_released
from lmc.translator import Translator

ReleasedCorrector = Corrector | FilterCorrector | HybridCorrector
Network = ReleasedCorrector | Translator
KINDS: dict[str, type[Network]] = {
    kind.__name__: kind for kind in (Corrector, HybridCorrector, Translator)
}  # that are trained
CORRECTORS: dict[str, type[ReleasedCorrector]] = {
    "bounded": Corrector,
    "closed_form": HybridCorrector,
    "size": FilterCorrector,
}  # by a key that only a release of this kind has; older ones lack some others


def load_averaged(checkpoint: Path, best: bool = False) -> tuple[Network, int]:
    """The network in a training checkpoint, with its averaged weights, and the step it is from.

    Args:
        checkpoint, best: see `read_checkpoint`.

    Raises:
        FileNotFoundError, ValueError: see `read_checkpoint`.
    """
    state = read_checkpoint(checkpoint, best)
    return averaged_of(state), state["global_step"]


def read_checkpoint(checkpoint: Path, best: bool = False) -> dict[str, Any]:
    """What a training checkpoint of a network holds.

    Args:
        checkpoint: last.ckpt, or the run folder that holds checkpoints/last.ckpt.
        best: of a run folder, checkpoints/best.ckpt in its place.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is no checkpoint of this library, or a file where the best of a run folder is
            asked for.
    """
    if best and checkpoint.is_file():
        raise ValueError(f"{checkpoint} is a checkpoint: name the run folder to have its best one")
    name = "best.ckpt" if best else "last.ckpt"
    file = checkpoint / "checkpoints" / name if best or checkpoint.is_dir() else checkpoint
    if best and not file.exists():
        raise FileNotFoundError(
            f"no checkpoint at {file}: train_translator.py keeps one where model.validation.clip "
            "names a CLIP, from its first look at the held-out images on"
        )
    if not file.exists():
        raise FileNotFoundError(f"no checkpoint at {file}: train first")
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except (UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(f"{file} is no checkpoint that can be read: {error}") from error
    about = state.get("network") if isinstance(state, dict) else None
    if about is None or about["class"] not in KINDS:
        raise ValueError(f"{file} is no checkpoint of train_bias.py or train_translator.py")
    found: dict[str, Any] = state
    return found


def averaged_of(state: Mapping[str, Any]) -> Network:
    """The network of a checkpoint, with its averaged weights, in evaluation mode."""
    about = state["network"]
    network = KINDS[about["class"]](**about["config"])
    prefix = "ema.module."
    weights = {
        name.removeprefix(prefix): value
        for name, value in state["state_dict"].items()
        if name.startswith(prefix)
    }
    network.load_state_dict(weights)
    return network.eval()


def load_network(folder: str) -> Network:
    """A released network, from a release folder or hub id[@revision], whichever kind it is.

    Raises:
        FileNotFoundError, ValueError: see `load_released`.
    """
    return load_released(folder, {"classes": Translator, **CORRECTORS})


def load_translator(path: str) -> Translator:
    """A translator from a run folder, a release or a hub id[@revision].

    Raises:
        OSError, ValueError: there is none.
    """
    run = Path(path) / "checkpoints"
    network = load_averaged(Path(path))[0] if run.is_dir() else load_network(path)
    if not isinstance(network, Translator):
        raise ValueError(f"{path} is a {type(network).__name__}, not a Translator")
    return network.eval()


def load_corrector(pretrained: str) -> BiasCorrector:
    """A released corrector of any kind, from its folder or hub id[@revision].

    Raises:
        FileNotFoundError: it is no release folder and cannot be fetched.
        ValueError: it is the release of something else.
    """
    try:
        corrector: ReleasedCorrector = load_released(pretrained, CORRECTORS)
    except OSError as error:
        raise FileNotFoundError(
            f"no released corrector at {pretrained}: train one (train_bias.py) and release it "
            f"(lmc release RUN --out {pretrained})"
        ) from error
    if not corrector.prior:
        raise ValueError(f"{pretrained} names no prior: it is no corrector of train_bias.py")
    return corrector
