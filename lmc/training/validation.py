"""Held-out images through the translator while it trains: what is measured of them, and shown."""

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lmc.errors import about
from lmc.measure.evaluate import (
    Prompts,
    Tools,
    Truth,
    from_all_processes,
    measure_batch,
    translated,
)
from lmc.measure.metrics import Clip, MissingWeights, distances
from lmc.measure.results import Measured, merge, overall
from lmc.shards.images import ImageBatch, from_uint8, to_uint8
from lmc.translator import Translator

# Of all that `lmc evaluate` measures, what is logged where it can be had.
LOGGED = (
    *("r_precision", "clip_score", "lpips", "rmse"),
    *("spectrum_error", "spectrum_lost", "spectrum_gained", "saturation"),
    *("truth_lpips", "truth_rmse", "truth_one_minus_ssim"),
    *("truth_lost", "truth_gained", "truth_cast"),
)


@dataclass(frozen=True)
class Validation:
    """What is measured and shown of the held-out images while a translator trains.

    Attributes:
        clip: folder or hub id of the CLIP that measures; None leaves its measures out, and with
            them the best checkpoint.
        images: how many held-out images, the first in the shards' order; all, where they are fewer.
        pictures: how many of these are shown.
        truth: folder of their true counterparts, DIR/CLASS/KEY.png; None leaves the measures
            against them out.

    Raises:
        ValueError: no images, or no pictures.
    """

    clip: str | None = None
    images: int = 64
    pictures: int = 8
    truth: str | None = None

    def __post_init__(self) -> None:
        for name, value in (("images", self.images), ("pictures", self.pictures)):
            if value < 1:
                raise ValueError(f"model.validation.{name} must be at least 1, got {value}")


def load_truth(
    validation: Validation, classes: Sequence[str], image_size: int, keys: Iterable[str] = ()
) -> Truth | None:
    """The true counterparts that a validation names, if it does.

    Args:
        validation: whose `truth` it is.
        classes: the target classes.
        image_size: of the images that will be measured.
        keys: of held-out images, each of which must have one for each class.

    Raises:
        OSError, ValueError: see `Truth` and `Folder.check_has`.
    """
    if validation.truth is None:
        return None
    with about("model.validation.truth"):
        truth = Truth(Path(validation.truth), classes, image_size)
        truth.check_has(classes, keys, "true counterpart")
    return truth


def load_tools(
    validation: Validation, image_size: int, device: torch.device, classes: Sequence[str] = ()
) -> Tools:
    """What measures while training: RMSE, LPIPS where AlexNet is on disk, CLIP where it is named.

    All processes have the same: what one of them cannot load, none uses.

    Args:
        validation: whose `clip` is loaded, and fetched if it is a hub id.
        image_size: of the images that will be measured.
        device: where the networks run.
        classes: the target classes, for their truth.

    Raises:
        OSError: `validation.clip` is a folder without a CLIP.
        ValueError: AlexNet's file cannot be read.
        OSError, ValueError: see `load_truth`.
    """
    truth = load_truth(validation, classes, image_size)
    clip: Clip | None = None
    why = "model.validation.clip names none"
    if validation.clip is not None:
        try:
            clip = Clip(validation.clip, device)
        except MissingWeights as error:
            why = str(error)
        except (OSError, ValueError) as error:
            raise OSError(f"model.validation.clip {validation.clip}: {error}") from error
    found = {
        name: each
        for name, each in distances(image_size).items()
        if name in LOGGED or (truth is not None and f"truth_{name}" in LOGGED)
    }
    mine = {*found, *(["clip"] if clip else [])}
    everywhere = set.intersection(*from_all_processes(mine))
    found = {name: each for name, each in found.items() if name in everywhere}
    if "clip" in everywhere:
        return Tools(found, clip, truth=truth)
    if clip is not None:
        why = "another process has none"
    left_out = "heldout/r_precision and heldout/clip_score are left out, and no best.ckpt is kept"
    return Tools(found, left_out=[f"{left_out}: no CLIP: {why}"], truth=truth)


class Heldout:
    """The held-out images of one validation, translated to every class and measured.

    Args:
        tools: what measures, on the images' device.
        prompts: of the classes, and those that compete in R-Precision.
        pictures: how many images, with their outputs, are kept to be shown: those with the first
            keys, whatever the batches and processes are.
    """

    def __init__(self, tools: Tools, prompts: Prompts, pictures: int) -> None:
        self.tools, self.prompts, self.pictures = tools, prompts, pictures
        self.texts = tools.clip.texts(list(prompts.candidates)) if tools.clip else None
        self.measured: list[Measured] = []
        self.shown: list[tuple[str, Tensor]] = []  # key, uint8 (rows, 3, S, S)

    def add(self, translator: Translator, batch: ImageBatch) -> None:
        """Translate and measure a batch.

        Raises:
            ValueError: an output is not finite.
        """
        if not batch.key:  # only broken samples were left for the last batch
            return
        made = [batch.image]
        translate = translated(translator)

        def outputs(keys: Sequence[str], source: Tensor, name: str) -> Tensor:
            if self.tools.truth is not None:
                made.append(self.tools.truth(keys, source, name))
            made.append(translate(keys, source, name).float())
            return made[-1]

        self.measured.append(
            measure_batch(
                "the translator",
                outputs,
                batch,
                self.tools,
                self.prompts,
                self.texts,
                batch.image.device,
            )
        )
        columns = to_uint8(torch.stack(made, 1)).cpu()
        self.shown = _first([*self.shown, *zip(batch.key, columns, strict=True)], self.pictures)

    def measures(self) -> dict[str, float]:
        """What was measured, over all images of all processes.

        Raises:
            ValueError: there are no images, or a key is there twice.
        """
        every = overall(merge(list(itertools.chain(*from_all_processes(self.measured)))))
        return {name: every[name] for name in LOGGED if name in every}

    def rows(self, source: str) -> dict[str, Tensor]:
        """The pictures of all processes: the sources, named `source`, and the outputs by class.

        Where there is truth, it is the row before each class's, 'true dog'.

        Returns:
            float (N, 3, S, S) in [-1, 1] each.
        """
        every = _first(list(itertools.chain(*from_all_processes(self.shown))), self.pictures)
        pictures = from_uint8(torch.stack([each for _, each in every], 1))
        names = [source]
        for name in self.prompts.classes:
            names += [name] if self.tools.truth is None else [f"true {name}", name]
        return dict(zip(names, pictures, strict=True))


def _first(shown: list[tuple[str, Tensor]], count: int) -> list[tuple[str, Tensor]]:
    """Those with the first keys."""
    return sorted(shown, key=lambda each: each[0])[:count]
