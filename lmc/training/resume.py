"""What may change when a run goes on, and what would make another training of it."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from lmc.files import write_text

# Of a configuration's model: what is only looked at, and how the same is computed.
OF_MODEL = (
    "model.validation",
    "model.closed_form",
    "model.heldout_images",
    "model.heldout_draws",
    "model.stability",
    "model.samples",
    "model.compile",
    "model.prior.cache_dir",
    "model.prior.compile",
    "model.prior.channels_last",
)
# Of Lightning's trainer: what changes the steps. All else says where, how long and what to log.
OF_TRAINER = (
    "trainer.accumulate_grad_batches",
    "trainer.gradient_clip_val",
    "trainer.gradient_clip_algorithm",
    "trainer.limit_train_batches",
    "trainer.overfit_batches",
)
OF_THE_RUN = ("model", "data", "trainer", "seed_everything")  # the rest says where and how often


class Absent:
    """In place of the value of a key that one of two configurations does not have."""

    def __repr__(self) -> str:
        return "absent"


ABSENT = Absent()


def differences(there: Any, here: Any, name: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Where nested dicts differ: the dotted key, and the value on either side or `ABSENT`."""
    if isinstance(there, Mapping) and isinstance(here, Mapping):
        for key in sorted(there.keys() | here.keys()):
            inner = f"{name}.{key}" if name else key
            yield from differences(there.get(key, ABSENT), here.get(key, ABSENT), inner)
    elif there != here:
        yield name, there, here


def covers(keys: Sequence[str], key: str) -> bool:
    """Whether `keys` name `key` or what it is a part of; 'init_args' may be left out of any."""
    short = [each.replace(".init_args", "") for each in (key, *keys)]
    return any(short[0] == each or short[0].startswith(f"{each}.") for each in short[1:])


def is_meaning(key: str) -> bool:
    """Whether another value of a configuration's key makes another training."""
    if key.startswith("trainer."):
        return covers(OF_TRAINER, key)
    return covers(OF_THE_RUN, key) and not covers((*OF_MODEL, "data.num_workers"), key)


def check_changes(file: Path, here: Mapping[str, Any], allowed: Sequence[str] = ()) -> list[str]:
    """Compare the configuration of a run with the one it is about to go on with.

    Args:
        file: the run's config.yaml.
        here: the new configuration, as plain values.
        allowed: dotted keys that may differ, with all below them.

    Returns:
        What there is to say of what differs and may: a line, or none.

    Raises:
        ValueError: the file cannot be read; or what is not `allowed` differs and changes what is
            trained: names the keys, with their values there and here.
    """
    try:
        there = yaml.safe_load(file.read_text())
    except FileNotFoundError:
        return [f"{file} is not there: whether the settings are those of the start is not known"]
    except (OSError, ValueError, yaml.YAMLError) as error:
        why = " ".join(str(error).split())
        raise ValueError(f"{file} cannot be read: {why}. Move it away to go on") from error
    if not isinstance(there, Mapping):
        raise ValueError(f"{file} holds no configuration. Move it away to go on")
    passed: dict[str, str] = {}
    refused: dict[str, str] = {}
    for key, old, new in differences(there, here):
        if key.endswith("class_path") and _is_one_of_ours(old, new):
            continue
        # An option that one version of the library has and another has not says nothing.
        other = is_meaning(key) and ABSENT not in (old, new) and not covers(allowed, key)
        if other or covers(OF_THE_RUN, key):
            (refused if other else passed)[key] = f"{key} was {old!r} and is {new!r}"
    if refused:
        raise ValueError(
            f"{file.parent} holds a run with another configuration: {'; '.join(refused.values())}. "
            "Name another folder (--run), or go on all the same with --allow_changes "
            + " ".join(refused)
        )
    changed = "; ".join(passed.values())
    return [f"{file.parent} goes on with another configuration: {changed}"] if passed else []


def _is_one_of_ours(one: Any, other: Any) -> bool:
    """Whether two paths name one class of this package, such as lmc.SDS and lmc.losses.SDS.

    By the name alone: nothing is imported for what a file says.
    """
    paths = [each.rpartition(".") for each in (str(one), str(other))]
    return paths[0][2] == paths[1][2] and all(f"{path}.".startswith("lmc.") for path, *_ in paths)


class KeepConfig(Callback):
    """Keeps config.yaml of a run folder, and those before it as config-000500.yaml.

    That one is of the configuration that step 500 was the last of. Nothing is written before the
    training goes on for sure.

    Args:
        file: the YAML.
        text: what it is to hold.
    """

    def __init__(self, file: Path, text: str) -> None:
        self.file, self.text = file, text

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write it, on one process."""
        if not trainer.is_global_zero:
            return
        before = self.file.read_text() if self.file.exists() else self.text
        # Of a run that begins anew, nothing of the one before is left.
        if before != self.text and trainer.global_step > 0:
            kept = self.file.with_name(f"config-{trainer.global_step:06d}.yaml")
            number = 1
            while kept.exists():
                number += 1
                kept = self.file.with_name(f"config-{trainer.global_step:06d}-{number}.yaml")
            write_text(kept, before)
        write_text(self.file, self.text)
