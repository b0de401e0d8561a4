"""Configurations: what is built of them, and stage one's, as what needs no training reads it."""

import argparse
from collections.abc import Callable, Mapping, Sequence
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


def parse_numbers(
    given: Sequence[float] | float | str, option: str, kind: Callable[[Any], Any]
) -> list[Any]:
    """One or several numbers, each once.

    Args:
        given: such as '0,1,2', or a number or a list of them, as a YAML may have.
        option: that they are of, for messages.
        kind: int or float.

    Raises:
        ValueError: not numbers, none, or one that comes twice.
    """
    parts = str(given).split(",") if isinstance(given, str | int | float) else given
    try:
        numbers = [kind(part) for part in parts]
    except ValueError:
        raise ValueError(f"{option} must be numbers with commas, got {given!r}") from None
    if not numbers:
        raise ValueError(f"{option}: there are none")
    for number in numbers:
        if numbers.count(number) > 1:
            raise ValueError(f"{option}: {number} comes twice")
    return numbers


def parse_seeds(given: Sequence[int] | int | str) -> list[int]:
    """Seeds, see `parse_numbers`.

    Raises:
        ValueError: see there; or one that no generator takes.
    """
    seeds = parse_numbers(given, "seeds", int)
    for seed in seeds:
        if not 0 <= seed < 2**63:
            raise ValueError(f"seeds must be in [0, 2^63), got {seed}")
    return seeds


@dataclass(frozen=True)
class StageOne:
    """What is taken of a configuration of train_bias.py.

    Attributes:
        prior: its class_path and init_args.
        train, heldout: shards.
        image_size: of the images in them; None is the prior's.
        time_range: of t.
        seed: seed_everything.
        release: the section of that name, under this key.
    """

    prior: Mapping[str, Any]
    train: str
    heldout: str
    image_size: int | None
    time_range: tuple[float, float]
    seed: int
    release: Mapping[str, Any]


def read_stage_one(files: Sequence[str]) -> StageOne:
    """The configuration in one file, or in several, each over the one before.

    Raises:
        OSError: there is no such file.
        ValueError: one is no YAML, or no configuration of train_bias.py.
    """
    config: dict[str, Any] = {}
    for file in files:
        try:
            found = yaml.safe_load(Path(file).read_text())
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ValueError(f"{file} is no YAML: {error}") from error
        if not isinstance(found, dict):
            raise ValueError(f"{file} is no configuration of train_bias.py: it has no keys")
        config = _over(config, found)
    names = ", ".join(files)
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
        _time_range(model.get("time_range", TIME_RANGE), names),
        seed if type(seed) is int else 0,
        {"release": config.get("release")},
    )


def _time_range(given: Any, where: str) -> tuple[float, float]:
    try:
        low, high = (float(each) for each in given)
        return check_time_range((low, high))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: model.time_range {given!r}: two numbers in [0, 1]") from error


def _over(under: Any, over: Any) -> Any:
    """Nested dicts merged, as the trainings' parser does with several files.

    A class keeps its init_args where the other file names the same one.
    """
    if not isinstance(under, dict) or not isinstance(over, dict):
        return over
    if under.get("class_path") != over.get("class_path", under.get("class_path")):
        return over
    return {**under, **{key: _over(under.get(key), value) for key, value in over.items()}}
