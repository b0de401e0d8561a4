"""What tells one prior from another, and the refusal of another than something was made for."""

import math
from collections.abc import Mapping
from typing import Any

import torch

from lmc.errors import warn
from lmc.schedule import FlowSchedule, Schedule

# Every version has recorded these: where one side lacks them, it is another prior.
FIRST = ("digest", "prediction_type")
LATER = ("schedule", "image_size", "channels")
OF_LATENTS = ("latent_scale", "latent_shift", "vae")


def schedule_identity(schedule: Schedule | FlowSchedule) -> dict[str, Any]:
    """A noise schedule in plain values: its kind, its steps, and ᾱ at t = 0, 0.1, …, 1.

    Values and not their digest, because another machine or version of a library may compute ᾱ
    otherwise in its last digit.
    """
    if isinstance(schedule, FlowSchedule):
        return {"kind": "flow", "steps": schedule.steps}
    index = schedule.timestep(torch.linspace(0, 1, 11, dtype=torch.float64))
    values = schedule.alphas_cumprod.detach().cpu().double()[index]
    return {
        "kind": "ddpm",
        "steps": len(schedule.alphas_cumprod),
        "alphas_cumprod": [float(f"{value:.6g}") for value in values.tolist()],
    }


def check_identity(made_for: Mapping[str, Any], used_with: Mapping[str, Any]) -> list[str]:
    """Refuse another prior than something was made for, by all that changes what it predicts.

    Where it lies (pretrained, revision) does not matter.

    Args:
        made_for: `Prior.identity` as it was recorded.
        used_with: `Prior.identity` of the prior at hand.

    Returns:
        What could not be compared because one of them, of an earlier version or of a class of
        your own, does not say it; for `say_unchecked`.

    Raises:
        ValueError: it is another prior; names both, and each difference with both values.
    """
    both = made_for.keys() & used_with.keys()
    differing = [
        name
        for name in (*FIRST, *LATER, *OF_LATENTS)
        if (name in FIRST or name in both) and not _same(made_for.get(name), used_with.get(name))
    ]
    if differing:
        lines = [
            f"  made for:  {_name(made_for)}",
            f"  used with: {_name(used_with)}",
            *(
                f"  {name}: {made_for.get(name, 'not recorded')} there, "
                f"{used_with.get(name, 'not recorded')} here"
                for name in differing
            ),
        ]
        raise ValueError("\n".join(lines))
    either = made_for.keys() | used_with.keys()
    expected = (*FIRST, *LATER, *(name for name in OF_LATENTS if name in either))
    return [name for name in expected if name not in both]


def say_unchecked(what: str, unchecked: list[str]) -> None:
    """Warn, in one line, of what `check_identity` could not compare of `what`, if anything."""
    if unchecked:
        warn(
            f"{what}: the prior's {', '.join(unchecked)} could not be checked, because an earlier "
            "version, or a prior class of your own, did not record them"
        )


def _name(identity: Mapping[str, Any]) -> str:
    revision = identity.get("revision")
    name = identity.get("pretrained", "a prior of no name") if identity else "none recorded"
    return f"{name} (revision {revision})" if revision else str(name)


def _same(one: Any, other: Any) -> bool:
    """Equal; but ᾱ, the only list there is, up to rounding."""
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    if isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        return all(map(_close, one, other))
    return one == other


def _close(one: Any, other: Any) -> bool:
    numbers = isinstance(one, int | float) and isinstance(other, int | float)
    return math.isclose(one, other, rel_tol=1e-4) if numbers else one == other
