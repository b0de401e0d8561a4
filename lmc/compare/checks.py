"""What a comparison is of: its configurations, prior and correctors, checked and noted."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lmc.compare.runs import steps_done
from lmc.corrector import BiasCorrector
from lmc.files import read_json, write_json
from lmc.losses import ScoreDistillation
from lmc.priors import Prior, check_identity, say_unchecked
from lmc.schedule import TimeSchedule
from lmc.shards.images import ImageStream
from lmc.specs import Spec, build
from lmc.training.cli import ConfigReader
from lmc.training.dry_run import build_model
from lmc.training.resume import ABSENT, differences
from lmc.training.translator import TranslatorTraining

# Of a configuration's model: what every loss of a comparison has of its own.
OF_EACH = ("loss", "time")


@dataclass(frozen=True)
class Checked:
    """What the configurations of a comparison, one a loss, were found to hold.

    Attributes:
        prior: theirs.
        prompts: of every loss.
        further: what losses ask the prior besides, by label, and what to do where it does not
            know that: `ScoreDistillation.further_prompts` and `prompts_note`.
        correctors: `BiasCorrector.digest`, by the name the losses give, such as a folder.
    """

    prior: Prior
    prompts: Sequence[str]
    further: Mapping[str, tuple[Sequence[str], str]]
    correctors: Mapping[str, str]


def configure(reader: ConfigReader, spec: Spec, args: Sequence[str]) -> dict[str, Any]:
    """The whole configuration of a training with this loss."""
    try:
        return reader.read([*args, *spec.arguments()])
    except ValueError as error:
        raise ValueError(f"the loss {spec.label!r}: {' '.join(str(error).split())}") from error


def check(configs: Mapping[str, dict[str, Any]]) -> Checked:
    """Find out what is wrong with the configurations, by label, as far as it needs no weights."""
    seen: dict[str, str] = {}
    losses: dict[str, ScoreDistillation] = {}
    correctors: dict[str, BiasCorrector] = {}
    for label, config in configs.items():
        same = seen.setdefault(json.dumps([config["model"][name] for name in OF_EACH]), label)
        if same != label:
            raise ValueError(
                f"the losses {same!r} and {label!r} are one and the same with this configuration"
            )
        try:
            loss = build(ScoreDistillation, config["model"]["loss"])
            loss.choose_time(_time(config["model"]["time"]))
        except (OSError, ValueError) as error:
            raise ValueError(f"the loss {label!r}: {error}") from error
        losses[label] = loss
        if isinstance(corrector := getattr(loss, "corrector", None), BiasCorrector):
            correctors[label] = corrector
    config = next(iter(configs.values()))
    if config["trainer"]["max_steps"] < 1:
        raise ValueError("trainer.max_steps must say how many steps to train")
    prior = build(Prior, config["model"]["prior"])
    model: Any = build_model(TranslatorTraining, config["model"], prior)
    for split in ("train", "heldout"):
        data = config["data"]
        ImageStream(data[split], data["image_size"], 1, training=False).check()
    digests = {}
    for label, corrector in correctors.items():
        try:
            corrector.check_prior(prior.identity)
        except ValueError as error:
            raise ValueError(f"the loss {label!r}: {error}") from error
        digests[_corrector_name(configs[label]["model"]["loss"])] = corrector.digest()
    further = {
        label: (prompts, loss.prompts_note)
        for label, loss in losses.items()
        if (prompts := loss.further_prompts(model.prompts[2:]))
    }
    return Checked(prior, model.prompts, further, digests)


def embed(checked: Checked) -> None:
    """Embed all prompts into the cache, so that no training loads a text encoder of its own.

    Raises:
        ValueError: the prior, a class-conditional one, does not know a prompt; says whose it is.
    """
    prior, further = checked.prior, checked.further
    try:
        prior.embed(
            [*checked.prompts, *(each for prompts, _ in further.values() for each in prompts)]
        )
        return
    except ValueError as error:
        # Whose it was is asked then only: all in one call load the text encoder once.
        for label, (prompts, note) in further.items():
            try:
                prior.embed(prompts)
            except ValueError as its_own:
                raise ValueError(f"the loss {label!r}: {its_own}: {note}") from its_own
        raise ValueError(f"model.prompt, for every loss: {error}") from error


def _time(config: dict[str, Any] | None) -> TimeSchedule | None:
    try:
        return None if config is None else build(TimeSchedule, config)
    except ValueError as error:
        raise ValueError(f"model.time: {error}") from error


def claim(out: Path, configs: Mapping[str, dict[str, Any]], checked: Checked) -> dict[str, Any]:
    """Note in the folder what is compared there, and refuse the comparison of something else.

    What never made a step, as where a training fails at once, stands in nothing's way.

    Returns:
        All losses that are compared there, of earlier times too: OF_EACH by label.
    """
    file = out / "comparison.json"
    first = next(iter(configs.values()))
    apart = ("run", "seed_everything")
    config: dict[str, Any] = {key: value for key, value in first.items() if key not in apart}
    # What is looked at while training changes nothing of what is trained.
    not_shared = (*OF_EACH, "validation")
    config["model"] = {k: value for k, value in first["model"].items() if k not in not_shared}
    here: dict[str, Any] = {
        "config": config,
        "prior": checked.prior.identity,
        "losses": {k: {name: c["model"][name] for name in OF_EACH} for k, c in configs.items()},
        "correctors": checked.correctors,
    }
    if file.exists():
        there = read_json(file, ("losses", "config"))
        if "prior" not in there:
            raise ValueError(
                f"{out} holds a comparison of an earlier version: name another (--out)"
            )
        begun = [label for label in there["losses"] if _begun(out, label)]
        if begun:
            _check_same(out, there, here, begun)
        else:
            (out / "source" / "evaluation.json").unlink(missing_ok=True)  # of other images, maybe
        losses = {label: there["losses"][label] for label in begun}
        names = {_corrector_name(own["loss"]) for own in losses.values()}
        correctors = {name: x for name, x in there["correctors"].items() if name in names}
        here["losses"] = losses | here["losses"]
        here["correctors"] = correctors | here["correctors"]
    elif out.exists() and any(out.iterdir()):
        raise ValueError(f"{out} is there and is no comparison: name another folder (--out)")
    out.mkdir(parents=True, exist_ok=True)
    write_json(file, here)
    return here["losses"]


def _corrector_name(loss: Mapping[str, Any]) -> str:
    """What the configuration of a loss calls its corrector."""
    return str((loss.get("init_args") or {}).get("corrector"))


def _begun(out: Path, label: str) -> bool:
    """Whether a training with this loss has made a step."""
    return any(steps_done(folder) > 0 for folder in (out / Spec(label, "").folder()).glob("seed*"))


def _check_same(
    out: Path, there: Mapping[str, Any], here: Mapping[str, Any], begun: Sequence[str]
) -> None:
    """Refuse to go on in `out` with something else than is there.

    Args:
        there, here: contents of comparison.json.
        begun: labels of the losses there that have made a step.

    Raises:
        ValueError: another configuration, prior, or loss or corrector of the same name.
    """
    both = [label for label in begun if label in here["losses"]]
    old, new = (
        {**x["config"], **{label: x["losses"][label] for label in both}} for x in (there, here)
    )
    different = [
        f"{key} is {before!r} there and {after!r} here"
        for key, before, after in differences(old, new)
        # An option that one version of the library has and another has not says nothing.
        if ABSENT not in (before, after)
    ]
    if different:
        raise ValueError(
            f"{out} holds the comparison of another configuration: {'; '.join(different[:5])}. "
            "Name another folder (--out)"
        )
    used = {_corrector_name(there["losses"][label]["loss"]) for label in begun}
    changed = [
        f"the corrector {name}"
        for name, digest in here["correctors"].items()
        if name in used and there["correctors"][name] != digest
    ]
    try:
        say_unchecked(f"the comparison in {out}", check_identity(there["prior"], here["prior"]))
    except ValueError as error:
        changed.append(f"the prior ({' '.join(str(error).split())})")
    if changed:
        raise ValueError(
            f"{out} holds the comparison of something else of the same name: {', '.join(changed)} "
            "changed since. Name another folder (--out)"
        )
