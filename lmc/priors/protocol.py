"""What every loss sees of a diffusion model: embeddings of prompts, and the Prior protocol."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from lmc.schedule import FlowSchedule, Schedule


@dataclass(frozen=True)
class Embedding:
    """What a prior needs to know of some prompts: named tensors, the first axis counting prompts.

    The names are the prior's own business (for a U-Net, the keyword arguments of its forward).
    """

    tensors: Mapping[str, Tensor]

    def __getitem__(self, index: Tensor) -> "Embedding":
        """The rows `index` (int64 (B,)), for a batch that names its prompts by number."""
        return Embedding({name: value[index] for name, value in self.tensors.items()})

    def rows(self, which: slice) -> "Embedding":
        """Some of the rows, by no index on the device."""
        return Embedding({name: value[which] for name, value in self.tensors.items()})

    def to(self, device: torch.device | str) -> "Embedding":
        """The same on `device`."""
        return Embedding({name: value.to(device) for name, value in self.tensors.items()})

    def expand(self, count: int) -> "Embedding":
        """A single prompt `count` times over."""
        return Embedding({n: v.expand(count, *v.shape[1:]) for n, v in self.tensors.items()})

    @staticmethod
    def cat(parts: Sequence["Embedding"]) -> "Embedding":
        """Several batches of prompts as one."""
        return Embedding(
            {name: torch.cat([part.tensors[name] for part in parts]) for name in parts[0].tensors}
        )


class Prior(Protocol):
    """A frozen diffusion model, as every loss sees it.

    Attributes:
        image_size: side in pixels of the images it takes.
        channels: of z.
        latent: z is no picture but a latent, which has no bound.
        schedule: alpha_t and sigma_t.
        identity: plain values that tell one prior from another: where it is from (pretrained,
            revision), and as much as it can say of what `lmc.priors.check_identity` compares.
    """

    image_size: int
    channels: int
    latent: bool
    schedule: Schedule | FlowSchedule
    identity: Mapping[str, Any]

    def to(self, device: torch.device | str) -> None:
        """Load what is not loaded yet, move to `device`."""
        ...

    def encode(self, image: Tensor) -> Tensor:
        """Images (B, 3, image_size, image_size) in [-1, 1] to z; differentiable."""
        ...

    def decode(self, z: Tensor) -> Tensor:
        """z to images (B, 3, image_size, image_size), about [-1, 1]."""
        ...

    def embed(self, prompts: Sequence[str]) -> Embedding:
        """Text to embeddings, one row a prompt; '' is the unconditional one."""
        ...

    def predict(self, z_t: Tensor, t: Tensor, embedding: Embedding) -> tuple[Tensor, Tensor]:
        """(eps, z_hat) for noisy z_t (B, C, H, W) at times t (B,): fp32 or wider, no gradient.

        t is in (0, 1); SDI, which inverts from a clean image on, asks at 0 too.
        """
        ...


@runtime_checkable
class LoraPrior(Prior, Protocol):
    """A prior whose denoiser can have a LoRA beside its frozen weights, as VSD needs."""

    def add_lora(self, rank: int | None) -> dict[str, torch.nn.Parameter]:
        """Add a LoRA that changes nothing yet; its weights by name. `predict` never uses it.

        Of rank None it is a copy of the whole denoiser.
        """
        ...

    def predict_lora(self, z_t: Tensor, t: Tensor, embedding: Embedding) -> tuple[Tensor, Tensor]:
        """`predict` with the LoRA; differentiable in its weights."""
        ...
