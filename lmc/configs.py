"""Configurations: what is built of them, and stage one's, as what needs no training reads it."""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jsonargparse
import yaml

from lmc.schedule import TIME_RANGE, check_time_range


def build(kind: Any, config: Any) -> Any:
    """The object that `class_path` and `init_args` describe, a `kind`.

    Raises:
        ValueError: they describe none.
    """
    parser: Any = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--it", type=kind, required=True)
    try:
        parsed = parser.parse_object({"it": config})
    except argparse.ArgumentError as error:
        raise ValueError(" ".join(str(error).split())) from error
    return instantiate(parser, parsed).it


def instantiate(parser: Any, parsed: Any) -> Any:
    """What `parser` has parsed, its classes built."""
    # Renamed in jsonargparse 4.49.
    return (getattr(parser, "instantiate", None) or parser.instantiate_classes)(parsed)


@dataclass(frozen=True)
class StageOne:
    """What is taken of a configuration of train_bias.py.

    Attributes:
        prior: its class_path and init_args.
        train, heldout: shards.
        image_size: of the images in them; None is the prior's.
        time_range: of t.
        seed: seed_everything.
    """

    prior: Mapping[str, Any]
    train: str
    heldout: str
    image_size: int | None
    time_range: tuple[float, float]
    seed: int


def read_stage_one(files: Sequence[Path]) -> StageOne:
    """The configuration in one file, or in several, each over the one before.

    Raises:
        OSError: there is no such file.
        ValueError: one is no YAML, or no configuration of train_bias.py.
    """
    config: dict[str, Any] = {}
    for file in files:
        try:
            found = yaml.safe_load(file.read_text())
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ValueError(f"{file} is no YAML: {error}") from error
        if not isinstance(found, dict):
            raise ValueError(f"{file} is no configuration of train_bias.py: it has no keys")
        config = _over(config, found)
    names = ", ".join(map(str, files))
    for section, keys in {"model": ["prior"], "data": ["train", "heldout"]}.items():
        for key in keys:
            try:
                config[section][key]
            except (KeyError, TypeError):
                raise ValueError(
                    f"{names} has no {section}.{key}: not a configuration of train_bias.py"
                ) from None
    model, data, seed = config["model"], config["data"], config.get("seed_everything")
    return StageOne(
        model["prior"],
        data["train"],
        data["heldout"],
        data.get("image_size"),
        check_time_range(tuple(model.get("time_range", TIME_RANGE))),
        seed if type(seed) is int else 0,
    )


def _over(under: Any, over: Any) -> Any:
    """Nested dicts merged, as the trainings' parser does with several files."""
    if not isinstance(under, dict) or not isinstance(over, dict):
        return over
    return {**under, **{key: _over(under.get(key), value) for key, value in over.items()}}
