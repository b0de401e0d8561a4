"""Losses before they are built: as the command line names them, and what they say of themselves.

`lmc,sds,sds:guidance_scale=100` are three.
"""

import csv
import hashlib
import importlib
import inspect
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jsonargparse

from lmc import losses
from lmc.configs import build
from lmc.losses import ScoreDistillation
from lmc.schedule import TimeSchedule

# Every loss of lmc.losses by its name.
LOSSES: dict[str, type[ScoreDistillation]] = {
    value.name: value
    for value in vars(losses).values()
    if inspect.isclass(value) and issubclass(value, ScoreDistillation) and hasattr(value, "name")
}


@dataclass(frozen=True)
class Spec:
    """A loss as the user wrote it, `name[:key=value]*`.

    Attributes:
        label: the text itself.
        class_path: of the loss.
        options: of its constructor, by name, in place of the configuration's.
        time: how t is drawn, in place of the configuration's way: a class of lmc.schedule as
            'time', its options as 'time.KEY'. Empty where nothing is said of it.
    """

    label: str
    class_path: str
    options: dict[str, str] = field(default_factory=dict)
    time: dict[str, str] = field(default_factory=dict)

    def arguments(self) -> list[str]:
        """The same as arguments of the training."""
        return [
            f"--model.loss={self.class_path}",
            *(f"--model.loss.{key}={value}" for key, value in self.options.items()),
            *(f"--model.{key}={value}" for key, value in self.time.items()),
        ]

    def schedule(self) -> TimeSchedule | None:
        """How t is drawn, where the spec says so.

        Raises:
            ValueError: there is no such schedule, or it refuses its options.
        """
        if not self.time:
            return None
        options = {k.removeprefix("time."): v for k, v in self.time.items() if k != "time"}
        try:
            return build(TimeSchedule, {"class_path": self.time["time"], "init_args": options})
        except ValueError as error:
            raise ValueError(f"the loss {self.label!r}: time: {error}") from error

    def folder(self) -> str:
        """The label as the name of a folder, another for every label."""
        name = self.label.replace(":", "+")
        safe = re.sub(r"[^\w.=+-]", "_", name, flags=re.ASCII)[:100]
        if safe.replace("+", ":") == self.label:
            return safe
        return f"{safe}-{hashlib.sha256(self.label.encode()).hexdigest()[:8]}"

    def build(self, **more: Any) -> ScoreDistillation:
        """The loss itself, its options read and checked as a configuration's are.

        Args:
            more: further options, in place of the spec's.

        Raises:
            ValueError: an option of another type, or one the loss itself refuses.
            FileNotFoundError: see `lmc.losses.LMC`.
        """
        options = {**self.options, **more}
        try:
            return build(ScoreDistillation, {"class_path": self.class_path, "init_args": options})
        except ValueError as error:
            raise ValueError(f"the loss {self.label!r}: {error}") from error


def defaults(loss: type[Any]) -> dict[str, Any]:
    """The options of a class of a loss with their defaults, None where one must be given.

    As a command line has them: those its bases have too, where it hands **kwargs on.
    """
    parser = jsonargparse.ArgumentParser()
    parser.add_class_arguments(loss, "it", fail_untyped=False)
    return dict(parser.get_defaults().get("it") or {})


def denoiser_evaluations(
    loss: type[ScoreDistillation], options: Mapping[str, Any]
) -> tuple[int | None, str]:
    """How many evaluations of the denoiser an image and step take.

    Args:
        loss: the class; it need not be built, which may load a corrector.
        options: of its constructor, by name, in place of the defaults; `vars` of a loss that is
            built will do.

    Returns:
        The number, None where it is not known, and of what: the loss's name, with a remark such as
        'at most'. A loss that writes `terms` anew must say its `evaluations` anew.
    """
    says = (kind for kind in loss.__mro__ if {"terms", "evaluations"} & vars(kind).keys())
    if "evaluations" not in vars(next(says, object)):
        return None, loss.name
    each = loss.evaluations(**_with_defaults(loss, options))
    note = f", {loss.evaluations_note}" if each is not None and loss.evaluations_note else ""
    return each, loss.name + note


def source_evaluations(loss: type[ScoreDistillation], options: Mapping[str, Any]) -> int:
    """How many of the `denoiser_evaluations` are of the source; the arguments are the same."""
    return loss.source_evaluations(**_with_defaults(loss, options))


def _with_defaults(loss: type[ScoreDistillation], options: Mapping[str, Any]) -> dict[str, Any]:
    return {key: options.get(key, default) for key, default in defaults(loss).items()}


def table_row(loss: type[ScoreDistillation]) -> list[str]:
    """What a loss says of itself, as cells of the table in docs/losses.md.

    Returns:
        Name and class; what it needs; the options that are its own or have a default of its own;
        the evaluations, in brackets at guidance scale 1.
    """
    ours, its = defaults(ScoreDistillation), defaults(loss)
    said = inspect.signature(loss).parameters
    required = [key for key in its if key in said and said[key].default is inspect.Parameter.empty]
    needs = [
        *(f"`{key}`" for key in required),
        *(["source image and prompt"] if loss.needs_source else []),
        *(["one t for the whole batch"] if loss.needs_shared_time else []),
        *([loss.needs_prior] if loss.needs_prior else []),
    ]
    own = {k: v for k, v in its.items() if k not in required and (k not in ours or ours[k] != v)}
    texts = [f"`{k}: {v if isinstance(v, str) else json.dumps(v)}`" for k, v in own.items()]

    def count(**options: Any) -> str:
        return str(denoiser_evaluations(loss, options)[0] or "not said")

    counts = count() + (f" ({one})" if (one := count(guidance_scale=1)) != count() else "")
    for key in (key for key, value in own.items() if isinstance(value, bool)):
        if (other := count(**{key: not own[key]})) != count():
            counts += f"; `{key}`: {other}"
    counts += f", {loss.evaluations_note}" if loss.evaluations_note else ""
    name = f"`{loss.name}`, `{loss.__name__}`"
    return [name, ", ".join(needs) or "–", ", ".join(texts) or "–", counts]


def parse_specs(text: str | Sequence[str] | None) -> list[Spec]:
    """Losses separated by commas, each `name[:key=value]*`; one with a comma in quotes.

    A key is an option of the loss, or `time` and `time.KEY`: a schedule for t and its options.

    Args:
        text: or the losses one by one; None is every loss of lmc.losses that is compared
            by default.

    Raises:
        ValueError: a loss or a key that is not known (says which are), or one loss twice.
    """
    if text is None:
        labels = [name for name, loss in LOSSES.items() if loss.by_default]
    else:
        # One by one they need no quotes.
        parts = (
            next(csv.reader([text], skipinitialspace=True), []) if isinstance(text, str) else text
        )
        labels = [label.strip() for label in parts]
    specs = [parse_spec(label) for label in labels]
    if not specs:
        raise ValueError(f"no loss is named; known are {', '.join(LOSSES)}")
    for label in labels:
        if labels.count(label) > 1:
            raise ValueError(f"the loss {label!r} is named twice")
    return specs


def parse_spec(label: str) -> Spec:
    """One of them.

    Raises:
        ValueError: see `parse_specs`.
    """
    name, *parts = re.split(r":(?=[\w.]+=)", label)  # a value may have colons
    loss = LOSSES.get(name) or _import(name)
    known = list(defaults(loss))
    options: dict[str, str] = {}
    time: dict[str, str] = {}
    for part in parts:
        key, _, value = part.partition("=")
        its = time if key.partition(".")[0] == "time" else options
        if its is options and key not in known:
            raise ValueError(f"the loss {name!r} has no {key!r}; it has {', '.join(known)}, time")
        if key in its:
            raise ValueError(f"the loss {label!r} has {key!r} twice")
        its[key] = _unquoted(value)
    if time and "time" not in time:
        raise ValueError(f"the loss {label!r}: name the schedule first: time=UniformTime")
    return Spec(label, f"{loss.__module__}.{loss.__qualname__}", options, time)


def _unquoted(value: str) -> str:
    """Without quotes around the whole, such as '' for an empty text."""
    quoted = len(value) > 1 and value[0] == value[-1] and value[0] in "'\""
    return value[1:-1] if quoted else value


def _import(name: str) -> type[ScoreDistillation]:
    """A loss by its class path."""
    module, _, attribute = name.rpartition(".")
    try:
        loss = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"unknown loss {name!r} ({error}); known are {', '.join(LOSSES)}, or give a class path"
        ) from error
    if not (inspect.isclass(loss) and issubclass(loss, ScoreDistillation)):
        raise ValueError(f"{name} is no class of a loss (ScoreDistillation)")
    return loss
