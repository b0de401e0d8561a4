"""Adam on what is rendered: its learning rates are told anew each step."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from lmc.renderers.protocol import Begun

Groups = Callable[[int], list[dict[str, Any]]]


class ScheduledAdam:
    """Adam with the parameters and the learning rates that a schedule says for each step.

    Where the parameters are others than before, as those of a scene whose voxels become finer, it
    begins anew.

    Args:
        groups: Adam's parameter groups by step, such as of a `GroupedRenderer`.
    """

    def __init__(self, groups: Groups) -> None:
        self._groups = groups
        self._adam: torch.optim.Adam | None = None

    def down(self, objective: Tensor, step: int) -> None:
        """One step down the objective, a scalar, as the schedule says for `step`."""
        groups = self._of(step)
        if self._adam is None or _parameters(groups) != _parameters(self._adam.param_groups):
            self._adam = torch.optim.Adam(groups)
        for group, now in zip(self._adam.param_groups, groups, strict=True):
            group.update({key: value for key, value in now.items() if key != "params"})
        self._adam.zero_grad()
        objective.backward()
        self._adam.step()

    def forget(self, begun: Begun | None) -> None:
        """Have no past of rows of parameters that are something else now."""
        for parameter, rows in (begun or {}).items():
            state = self._adam.state.get(parameter, {}) if self._adam else {}
            for name in ("exp_avg", "exp_avg_sq"):
                if name in state:
                    state[name][rows] = 0

    def state_dict(self, step: int) -> dict[str, Any] | None:
        """Adam's own before `step`; None where it begins anew there."""
        if self._adam is None:
            return None
        goes_on = _parameters(self._of(step)) == _parameters(self._adam.param_groups)
        return self._adam.state_dict() if goes_on else None

    def load_state_dict(self, state: Mapping[str, Any] | None, step: int) -> None:
        """Go on from a `state_dict`; the parameters are those of then already."""
        self._adam = None
        if state is not None:
            self._adam = torch.optim.Adam(self._of(step))
            self._adam.load_state_dict(dict(state))

    def _of(self, step: int) -> list[dict[str, Any]]:
        """The groups of `step`, whose parameters may be gone through more than once."""
        return [{**group, "params": list(group["params"])} for group in self._groups(step)]


def _parameters(groups: Iterable[Mapping[str, Any]]) -> list[int]:
    """Which they are."""
    return [id(each) for group in groups for each in group["params"]]
