"""What `lmc synthesize`, `edit` and `dreamsampler` share: pictures, progress, numbers, folders."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from PIL import Image
from torch import Tensor

from lmc.corrector import BiasCorrector
from lmc.files import whole
from lmc.losses import ScoreDistillation
from lmc.optimize import Synthesis
from lmc.priors import Prior
from lmc.shards.images import decode_image, to_uint8

RECORD, RESULTS = "settings.yaml", "results.json"
STATE = "state.pt"  # of a run that is not at its end


@dataclass(frozen=True)
class Job:
    """What `lmc.optimize.optimize` and `check_task` take after the renderer; B images.

    Attributes:
        prior, loss, settings: see `optimize`.
        prompts, seeds: B each.
        source: float (B, 3, H, W) in [-1, 1], or None.
        source_prompts: B, or None.
    """

    prior: Prior
    loss: ScoreDistillation
    prompts: Sequence[str]
    seeds: Sequence[int]
    settings: Synthesis
    source: Tensor | None
    source_prompts: Sequence[str] | None

    def arguments(self) -> dict[str, Any]:
        """All of it, by the names of those functions' arguments."""
        return dict(vars(self))


def corrector_digest(loss: ScoreDistillation) -> str | None:
    """`BiasCorrector.digest` of the loss's corrector, if it has one."""
    corrector = getattr(loss, "corrector", None)
    return corrector.digest() if isinstance(corrector, BiasCorrector) else None


def read_image(file: Path) -> Tensor:
    """An image file as float32 (3, H, W) in [-1, 1].

    Raises:
        FileNotFoundError: there is none.
        ValueError: it cannot be read.
    """
    if not file.is_file():
        raise FileNotFoundError(f"no such image: {file}")
    return decode_image(file.read_bytes(), str(file))


def save_image(image: Tensor, file: Path) -> None:
    """Write (3, H, W), about [-1, 1], as a PNG, whole or not at all; makes its folder."""
    picture = Image.fromarray(to_uint8(image).cpu().permute(1, 2, 0).numpy())
    save_whole(file, picture.save, "png")


def save_whole(file: Path, save: Callable[..., Any], format: str, **options: Any) -> None:
    """Let a library write a file, whole or not at all; makes its folder.

    Args:
        file: what is to be there in the end.
        save: writes a file of a name, as PIL's `save` and matplotlib's `savefig` do.
        format: of the file, since the name it is written under first does not say.
        options: further ones of `save`.
    """
    with whole(file) as partial:
        save(partial, format=format, **options)


def check_out(out: Path, record: str) -> None:
    """Refuse a folder that is not free for the result of some settings.

    Settings without a result are those of a command that failed, and are no obstacle.

    Args:
        out: the folder.
        record: the settings, as they are kept there.

    Raises:
        ValueError: it holds something that was not made with these settings.
    """
    there = out / RECORD
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        if not there.is_file():
            raise ValueError(f"{out} holds something else: name another folder")
        begun = (out / STATE).exists()
        has_result = begun or (out / RESULTS).exists() or any(out.rglob("*.png"))
        if has_result and there.read_text() != record:
            what = "an unfinished run with other settings" if begun else "another result"
            raise ValueError(
                f"{out} holds {what} (see {there}{_differing(there, record)}): name another "
                "folder, or delete it"
            )


def _differing(there: Path, record: str) -> str:
    """The first option that differs, with both values, as far as they can be read."""

    def flat(tree: Any, name: str = "") -> dict[str, Any]:
        if not isinstance(tree, dict):
            return {name: tree}
        inner = [flat(value, f"{name}.{key}") for key, value in tree.items()]
        return {key: value for each in inner for key, value in each.items()}

    try:
        old, new = flat(yaml.safe_load(there.read_text())), flat(yaml.safe_load(record))
    except yaml.YAMLError:
        return ""
    for key in [*new, *old]:
        if old.get(key) != new.get(key):
            name = key.removeprefix(".").replace(".init_args", "")
            return f"; {name} was {old.get(key)!r} and is {new.get(key)!r}"
    return ""
