"""What can be optimised: anything with parameters that renders images."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

Begun = Mapping[nn.Parameter, Sequence[int]]  # rows, along the first dimension


class Renderer(Protocol):
    """What is optimised: a torch module that renders images from its parameters."""

    def __call__(self) -> Tensor:
        """(B, 3, H, W) float32 or float64, about [-1, 1]; the same B, H and W every time."""
        ...

    def parameters(self) -> Iterator[nn.Parameter]:
        """What Adam moves."""
        ...

    def to(self, device: torch.device | str) -> nn.Module:
        """Move to `device`."""
        ...

    def state_dict(self) -> Mapping[str, Any]:
        """All that changes in the steps, to go on from."""
        ...

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> Any:
        """Go on from a `state_dict`; where parameters change their shape, so must it here."""
        ...


@dataclass(frozen=True, eq=False)
class Seen:
    """What one step sees of a `ViewRenderer`.

    Attributes:
        image: N views, (N, 3, H, W), about [-1, 1].
        suffix: which of the renderer's `suffixes` belongs to each, N numbers.
        penalty: the regularisers, weighed, a scalar that is added to the objective.
    """

    image: Tensor
    suffix: Sequence[int]
    penalty: Tensor | float = 0.0


@runtime_checkable
class ViewRenderer(Protocol):
    """A `Renderer` of one thing that looks different from elsewhere, such as a 3D scene.

    Attributes:
        suffixes: what is added to the prompt, by view, such as ', back view'.
    """

    suffixes: Sequence[str]

    def see(self, step: int, steps: int, generator: torch.Generator) -> Seen:
        """Views at random for a step of several; their number may differ from step to step.

        Args:
            step, steps: counted from 0; how many there are in all.
            generator: on the CPU, of the seed: what is drawn from it follows from that alone.
        """
        ...


@runtime_checkable
class GroupedRenderer(Protocol):
    """A `Renderer` whose parameters have learning rates of their own, not those of `Synthesis`.

    And that may change between two steps, as where a scene's voxels become finer.
    """

    def groups(self, step: int, steps: int) -> list[dict[str, Any]]:
        """Adam's parameter groups ('params', 'lr' and, say, 'betas') at a step of several.

        Where the parameters are others than at the step before, Adam begins anew.
        """
        ...

    def after(self, step: int, steps: int, generator: torch.Generator) -> Begun | None:
        """Change after a step of several; `generator` is the first seed's, on the CPU.

        Returns:
            Which rows of parameters are something else now, whose past Adam forgets.
        """
        ...


@runtime_checkable
class SavedRenderer(Protocol):
    """A `Renderer` that is more than its images, such as an SVG, and writes files of its own."""

    def save(self, folder: Path, stems: Sequence[str]) -> None:
        """Write the result beside the images.

        Args:
            folder: where; it is there.
            stems: what files of each image begin with, B names such as 'seed-3'.
        """
        ...
