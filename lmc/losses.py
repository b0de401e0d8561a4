"""Score distillation: one gradient per loss, from the prior's predictions.

Each loss is a small class whose `terms` is the equation. They are called as
`loss(prior, inputs) -> Gradient`; `surrogate` turns the gradient into something autograd follows.
No gradient flows through the prior or the corrector.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from lmc.corrector import Corrector, load_corrector
from lmc.priors import Embedding, Prior
from lmc.schedule import add_noise, guide

Weighting = Literal["one", "dreamfusion", "sjc"]


@dataclass(frozen=True)
class LossInputs:
    """What a loss is computed from; everything random is drawn already.

    Attributes:
        z: the images to be judged, in the prior's space, float32 or float64 (B, C, H, W).
        t: times in (0, 1), (B,).
        eps: the noise to add, as z.
        null: the unconditional embedding, B rows.
        target: embeddings of the target prompts, B rows.
        z_source, source: the source images and their prompts' embeddings, for losses that compare.
    """

    z: Tensor
    t: Tensor
    eps: Tensor
    null: Embedding
    target: Embedding
    z_source: Tensor | None = None
    source: Embedding | None = None


@dataclass(frozen=True)
class Gradient:
    """A loss's gradient with respect to z, per sample and unreduced.

    Attributes:
        total: (B, C, H, W); the sum of the terms.
        terms: the same by name.
    """

    total: Tensor
    terms: dict[str, Tensor]


class ScoreDistillation(ABC):
    """What all losses share: the guidance scale and how the terms are weighted.

    total = w(t) · alpha_t · Σ terms / ω   (alpha_t = ∂z_t/∂z; 1/ω: [LMC, Sec. 5])

    Args:
        guidance_scale: ω; 1 is the plain conditional prediction.
        weighting: w(t): 'one' (the paper's), 'dreamfusion' 1 − ᾱ_t, 'sjc' √ᾱ_t (1 − ᾱ_t).
        chain_alpha: multiply by alpha_t, as the chain rule has it; many implementations do not.
        rescale: divide by ω, so that ω can vary without changing the gradient's size.

    Raises:
        ValueError: an unknown weighting, or rescaling at ω = 0.
    """

    name: ClassVar[str]
    needs_source: ClassVar[bool] = False

    def __init__(
        self,
        guidance_scale: float = 15.0,
        weighting: Weighting = "one",
        chain_alpha: bool = True,
        rescale: bool = True,
    ) -> None:
        if weighting not in get_args(Weighting):
            known = ", ".join(get_args(Weighting))
            raise ValueError(f"unknown weighting {weighting!r}; known are {known}")
        if rescale and guidance_scale == 0:
            raise ValueError("guidance_scale 0 cannot be rescaled by 1/ω: set rescale to false")
        self.guidance_scale, self.weighting = guidance_scale, weighting
        self.chain_alpha, self.rescale = chain_alpha, rescale

    def prepare(self, prior: Prior, device: torch.device | str) -> None:  # noqa: B027
        """Load and move what the loss has of its own, if any, and check that it fits `prior`."""

    @abstractmethod
    def terms(self, prior: Prior, x: LossInputs) -> dict[str, Tensor]:
        """The loss's gradient before any weighting, by named terms, each (B, C, H, W)."""

    @torch.no_grad()
    def __call__(self, prior: Prior, x: LossInputs) -> Gradient:
        """The weighted gradient with respect to `x.z`.

        Raises:
            ValueError: the loss compares with a source and `x` has none.
        """
        if self.needs_source and (x.z_source is None or x.source is None):
            raise ValueError(f"the loss {self.name!r} needs z_source and source")
        alpha_t, sigma_t = prior.schedule.coefficients(x.t, x.z.dtype)
        weight = {
            "one": torch.ones_like(alpha_t),
            "dreamfusion": sigma_t.square(),
            "sjc": alpha_t * sigma_t.square(),
        }[self.weighting]
        if self.chain_alpha:
            weight = weight * alpha_t
        if self.rescale:
            weight = weight / self.guidance_scale
        terms = {name: weight * term for name, term in self.terms(prior, x).items()}
        return Gradient(torch.stack(list(terms.values())).sum(0), terms)


class SDS(ScoreDistillation):
    """Score Distillation Sampling [DreamFusion, Eq. 3; LMC, Eq. 6].

    g = ω (eps_cond − eps_uncond) + (eps_uncond − eps); at ω = 1, eps_cond − eps.
    """

    name = "sds"

    def terms(self, prior: Prior, x: LossInputs) -> dict[str, Tensor]:
        z_t = _noisy(prior, x.z, x)
        if self.guidance_scale == 1:
            ((eps_cond, _),) = _predict(prior, x.t, (z_t, x.target))
            return {"guided": eps_cond - x.eps}
        (eps_uncond, _), (eps_cond, _) = _predict(prior, x.t, (z_t, x.null), (z_t, x.target))
        return {
            "cond": self.guidance_scale * (eps_cond - eps_uncond),
            "proj": eps_uncond - x.eps,
        }


class Cond(ScoreDistillation):
    """The guidance half of SDS alone: g = ω (eps_cond − eps_uncond) [LMC, Eq. 6b, Fig. 2]."""

    name = "cond"

    def terms(self, prior: Prior, x: LossInputs) -> dict[str, Tensor]:
        z_t = _noisy(prior, x.z, x)
        (eps_uncond, _), (eps_cond, _) = _predict(prior, x.t, (z_t, x.null), (z_t, x.target))
        return {"cond": self.guidance_scale * (eps_cond - eps_uncond)}


class LMC(ScoreDistillation):
    """LMC-SDS: g = (b(z, t) − z_hat) + ω (eps_cond − eps_uncond) [LMC, Eq. 9].

    z_hat is the unconditional estimate of the z_t that the guidance uses; b is in its normalised
    space (Eq. 10).

    Args:
        corrector: a `Corrector`, or the folder or hub id of a released one.
        guidance_scale, weighting, chain_alpha, rescale: see `ScoreDistillation`.

    Raises:
        FileNotFoundError: there is no such corrector.
    """

    name = "lmc"

    def __init__(
        self,
        corrector: str | Corrector,
        guidance_scale: float = 15.0,
        weighting: Weighting = "one",
        chain_alpha: bool = True,
        rescale: bool = True,
    ) -> None:
        super().__init__(guidance_scale, weighting, chain_alpha, rescale)
        # At once, small as it is: a wrong name must not be found out after the prior is loaded.
        if isinstance(corrector, str):
            corrector = load_corrector(corrector)
        self.corrector = corrector.eval().requires_grad_(False)

    def prepare(self, prior: Prior, device: torch.device | str) -> None:
        """Check that `prior` is the corrector's own, and move the corrector.

        Raises:
            ValueError: it was trained on another prior.
        """
        self.corrector.check_prior(prior.identity)
        self.corrector.to(device).to(memory_format=torch.channels_last)

    def terms(self, prior: Prior, x: LossInputs) -> dict[str, Tensor]:
        z_t = _noisy(prior, x.z, x)
        (eps_uncond, z_hat), (eps_cond, _) = _predict(prior, x.t, (z_t, x.null), (z_t, x.target))
        return {
            "cond": self.guidance_scale * (eps_cond - eps_uncond),
            "lmc": self.corrector.correct(x.z, x.t, z_hat) - z_hat,
        }


class DDS(ScoreDistillation):
    """Delta Denoising Score [Hertz et al., Eq. 3]: the same t and eps for target and source.

    g = eps_guided(z_t, y_target) − eps_guided(z_src_t, y_source)
    """

    name = "dds"
    needs_source = True

    def terms(self, prior: Prior, x: LossInputs) -> dict[str, Tensor]:
        assert x.z_source is not None and x.source is not None
        z_t, z_src_t = _noisy(prior, x.z, x), _noisy(prior, x.z_source, x)
        if self.guidance_scale == 1:
            (eps, _), (eps_src, _) = _predict(prior, x.t, (z_t, x.target), (z_src_t, x.source))
            return {"delta": eps - eps_src}
        (eps_u, _), (eps_c, _), (src_u, _), (src_c, _) = _predict(
            prior,
            x.t,
            (z_t, x.null),
            (z_t, x.target),
            (z_src_t, x.null),
            (z_src_t, x.source),
        )
        scale = self.guidance_scale
        return {"delta": guide(eps_u, eps_c, scale) - guide(src_u, src_c, scale)}


def surrogate(z: Tensor, gradient: Tensor) -> Tensor:
    """A scalar per image, (B,), whose autograd gradient with respect to `z` is `gradient`.

    Its value means nothing; the step that uses it chooses the reduction.
    """
    return (gradient.detach() * z).sum(dim=tuple(range(1, z.ndim)))


def _noisy(prior: Prior, z: Tensor, x: LossInputs) -> Tensor:
    return add_noise(z, x.eps, *prior.schedule.coefficients(x.t, z.dtype))


def _predict(
    prior: Prior, t: Tensor, *queries: tuple[Tensor, Embedding]
) -> Sequence[tuple[Tensor, Tensor]]:
    """(eps, z_hat) for each of several (z_t, embedding) at the same t: one batched call."""
    eps, z_hat = prior.predict(
        torch.cat([z_t for z_t, _ in queries]),
        t.repeat(len(queries)),
        Embedding.cat([embedding for _, embedding in queries]),
    )
    return list(zip(eps.chunk(len(queries)), z_hat.chunk(len(queries)), strict=True))
