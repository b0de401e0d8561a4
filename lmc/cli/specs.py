"""Lists on the command line: numbers, and losses with their options."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

Number = TypeVar("Number", int, float)


@dataclass(frozen=True)
class LossSpec:
    """A loss as the command line names it: name[:key=value]*.

    Attributes:
        label: the spec as given.
        class_path: of the class in lmc.losses.
        init_args: its options.
    """

    label: str
    class_path: str
    init_args: dict[str, Any]


def parse_losses(specs: str) -> list[LossSpec]:
    """Several losses, such as 'lmc:corrector=FOLDER,sds,sds:guidance_scale=100,dds'.

    Args:
        specs: losses by name, comma-separated, each with any number of :key=value; a value is read
            as YAML.

    Raises:
        ValueError: an unknown loss or option, one without a value, or a loss that comes twice.
    """
    import yaml

    known = loss_classes()
    found = []
    for label in specs.split(","):
        name, *options = label.strip().split(":")
        if name not in known:
            raise ValueError(f"unknown loss {name!r}; known are {', '.join(known)}")
        allowed = list(inspect.signature(known[name]).parameters)
        init_args = {}
        for option in options:
            key, equals, value = option.partition("=")
            if not equals:
                raise ValueError(f"{label.strip()!r}: {option!r} is no key=value")
            if key not in allowed:
                raise ValueError(
                    f"{label.strip()!r}: the loss {name!r} has no {key!r}; it has "
                    f"{', '.join(allowed)}"
                )
            init_args[key] = yaml.safe_load(value)
        class_path = f"lmc.losses.{known[name].__name__}"
        found.append(LossSpec(label.strip(), class_path, init_args))
    _once([spec.label for spec in found], "loss")
    return found


def loss_classes() -> dict[str, Any]:
    """The classes of lmc.losses by the names of their losses."""
    from lmc import losses

    return {
        value.name: value
        for value in vars(losses).values()
        if isinstance(value, type)
        and issubclass(value, losses.ScoreDistillation)
        and value is not losses.ScoreDistillation
    }


def parse_numbers(text: str, option: str, kind: Callable[[str], Number]) -> list[Number]:
    """Comma-separated numbers, each once.

    Args:
        text: such as '0,1,2'.
        option: that they are of, for messages.
        kind: int or float.

    Raises:
        ValueError: not numbers, or one that comes twice.
    """
    try:
        numbers = [kind(part) for part in str(text).split(",")]
    except ValueError:
        raise ValueError(f"{option} must be numbers with commas, got {text!r}") from None
    _once(numbers, option)
    return numbers


def _once(values: list[Any], what: str) -> None:
    for value in values:
        if values.count(value) > 1:
            raise ValueError(f"{what}: {value} comes twice")
