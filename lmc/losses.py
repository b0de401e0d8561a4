"""Score distillation: one gradient per loss, from the prior's predictions.

Each loss is a small class that says all there is to say of it: its name, needs, `evaluations`, the
options of its own (`*args` and `**kwargs` are those of `ScoreDistillation`, which all have), and in
`terms` the equation. They are called as `loss(prior, inputs) -> Gradient`; `surrogate` turns the
gradient into something autograd follows. No gradient flows through the prior or the corrector.
"""

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, ClassVar, Literal, cast, get_args

import torch
from torch import Tensor

from lmc.corrector import BiasCorrector, IdentityCorrector, Statistics
from lmc.load import load_corrector
from lmc.priors import Embedding, LoraPrior, Prior
from lmc.schedule import (
    TIME_RANGE,
    FallingTime,
    FlowSchedule,
    Schedule,
    TimeSchedule,
    UniformTime,
    add_noise,
    ddim_step,
    guide,
)
from lmc.unet import UNet

Weighting = Literal["one", "dreamfusion", "fantasia3d"]
LATEST = 0.999  # t, the end of a grid of 1,000


@dataclass(frozen=True)
class LossInputs:
    """What a loss is computed from; everything random is drawn already.

    Attributes:
        z: the images to be judged, in the prior's space, float32 or float64 (B, C, H, W).
        t: times in (0, 1), (B,).
        eps: the noise to add, as z.
        null: the unconditional embedding, B rows.
        target: embeddings of the target prompts, B rows.
        z_source, source: the source images and their prompts' embeddings, for losses that compare
            (`ScoreDistillation.needs_source`).
        negative: of `ScoreDistillation.negative_prompt`, B rows, for losses that have one.
        described: of the target prompts with each of `ScoreDistillation.suffixes`, B rows each.
        eps_fixed: as eps, but the same over the whole optimisation, for losses with `fixed_noise`.
        t_host: t as the host knows it, B numbers, where it does; see `times`.
        progress: the share of the run that is done, in [0, 1] (`ScoreDistillation.needs_progress`).
        repeats: of how many rows each is of one image, to several targets: t, eps, z_source and
            source are the same in every group of so many, and the source is predicted once.
    """

    z: Tensor
    t: Tensor
    eps: Tensor
    null: Embedding
    target: Embedding
    z_source: Tensor | None = None
    source: Embedding | None = None
    negative: Embedding | None = None
    eps_fixed: Tensor | None = None
    t_host: Sequence[float] | None = None
    repeats: int = 1
    described: Sequence[Embedding] = ()
    progress: float | None = None

    def times(self) -> Sequence[float]:
        """t for what depends on its value; without `t_host` the host waits for the device."""
        return self.t.tolist() if self.t_host is None else self.t_host


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
        weighting: w(t): 'one' (the paper's), 'dreamfusion' 1 − ᾱ_t, 'fantasia3d' √ᾱ_t (1 − ᾱ_t).
        chain_alpha: multiply by alpha_t, as the chain rule has it; many implementations do not.
        rescale: divide by ω, so that ω can vary without changing the gradient's size.

    Attributes:
        name: of the loss, as tables and messages say it.
        needs_source: `LossInputs` must have z_source and source.
        needs_prior: what `prepare` asks of the prior, in words; empty: nothing.
        evaluations_note: of what `evaluations` says, such as 'at most'; empty: it is exact.
        by_default: it is among those that are compared where none are named.
        time: how t is drawn unless the user says otherwise.
        needs_shared_time: one t for the whole batch (`TimeSchedule.shared`).
        learns: it has weights of its own, which `learn` trains.
        updates: how often a step calls `learn`.
        negative_prompt: None, or the prompt whose embedding is `LossInputs.negative`.
        suffixes: what is added to the target prompts for `LossInputs.described`.
        prompts_note: what to do where a prior of classes does not know `further_prompts`.
        fixed_noise: `LossInputs` must have eps_fixed.
        needs_progress: `LossInputs` must have progress.

    Raises:
        ValueError: an unknown weighting, a negative ω, or rescaling at ω = 0.
    """

    name: ClassVar[str]
    needs_source: ClassVar[bool] = False
    needs_prior: ClassVar[str] = ""
    evaluations_note: ClassVar[str] = ""
    by_default: ClassVar[bool] = True
    time: ClassVar[TimeSchedule] = UniformTime()
    needs_shared_time: ClassVar[bool] = False
    learns: ClassVar[bool] = False
    updates: int = 1
    negative_prompt: str | None = None
    suffixes: Sequence[str] = ()
    prompts_note: ClassVar[str] = ""
    fixed_noise: bool = False
    needs_progress: bool = False

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
        if guidance_scale < 0:
            raise ValueError(f"guidance_scale must not be negative, got {guidance_scale}")
        if rescale and guidance_scale == 0:
            raise ValueError("guidance_scale 0 cannot be rescaled by 1/ω: set rescale to false")
        self.guidance_scale, self.weighting = guidance_scale, weighting
        self.chain_alpha, self.rescale = chain_alpha, rescale

    def check(self, prior: Prior) -> None:  # noqa: B027
        """Refuse a prior that the loss does not fit; nothing is loaded for it.

        Raises:
            ValueError: it does not; see the losses.
        """

    def prepare(self, prior: Prior, device: torch.device | str) -> None:
        """Load and move what the loss has of its own, if any, after a `check`.

        Raises:
            ValueError: see there.
        """
        self.check(prior)

    def choose_time(self, time: TimeSchedule | None) -> TimeSchedule:
        """How t is drawn: the user's way, or the loss's own where that is None.

        Raises:
            ValueError: the loss needs one t for the whole batch, and `time` draws one a sample.
        """
        time = time or self.time
        if self.needs_shared_time and not time.shared:
            raise ValueError(
                f"the loss {self.name!r} needs one t for the whole batch: FallingTime, or "
                f"UniformTime with shared: true, not {type(time).__name__} as given"
            )
        return time

    def further_prompts(self, targets: Sequence[str]) -> list[str]:
        """What it asks of the prior besides: targets with each of `suffixes`, a negative prompt."""
        negative = [] if self.negative_prompt is None else [self.negative_prompt]
        return [target + suffix for suffix in self.suffixes for target in targets] + negative

    @staticmethod
    def evaluations(*_: Any, **options: Any) -> int | None:
        """Evaluations of the denoiser that an image and step take; None: the loss does not say.

        A function of all the constructor's options by name (`specs.denoiser_evaluations` fills in
        the defaults) and not of a loss that is built, since building may load a corrector.
        """
        return None

    @staticmethod
    def source_evaluations(*_: Any, **options: Any) -> int:
        """Of `evaluations`, those of the source alone, which an image needs once for all targets.

        See `LossInputs.repeats`.
        """
        return 0

    @abstractmethod
    def terms(self, prior: Prior, x: LossInputs) -> dict[str, Tensor]:
        """The loss's gradient before any weighting, by named terms, each (B, C, H, W)."""

    @torch.no_grad()
    def __call__(self, prior: Prior, x: LossInputs) -> Gradient:
        """The weighted gradient with respect to `x.z`.

        Raises:
            ValueError: `x` lacks what the loss needs: a source, a negative prompt, descriptions, a
                fixed noise, the progress.
        """
        needed = {
            "z_source and source": self.needs_source and (x.z_source is None or x.source is None),
            "negative": self.negative_prompt is not None and x.negative is None,
            "described": len(x.described) < len(self.suffixes),
            "eps_fixed": self.fixed_noise and x.eps_fixed is None,
            "progress": self.needs_progress and x.progress is None,
        }
        for missing, is_missing in needed.items():
            if is_missing:
                raise ValueError(f"the loss {self.name!r} needs {missing}")
        alpha_t, sigma_t = prior.schedule.coefficients(x.t, x.z.dtype)
        weight = {
            "one": torch.ones_like(alpha_t),
            "dreamfusion": sigma_t.square(),
            "fantasia3d": alpha_t * sigma_t.square(),
        }[self.weighting]
        if self.chain_alpha:
            weight = weight * alpha_t
        if self.rescale:
            weight = weight / self.guidance_scale
        terms = {name: weight * term for name, term in self.terms(prior, x).items()}
        return Gradient(torch.stack(list(terms.values())).sum(0), terms)

    def learn(self, prior: Prior, x: LossInputs) -> None:  # noqa: B027
        """One step of the loss's own weights, if it `learns`; `x` with t and eps drawn anew."""

    def state_dict(self) -> dict[str, Any]:
        """What `learn` has learned, to go on from: plain types and tensors."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:  # noqa: B027
        """Go on from another's `state_dict`; after `prepare`."""


class SDS(ScoreDistillation):
    """Score Distillation Sampling [DreamFusion, Eq. 3; LMC, Eq. 6].

    g = ω (eps_cond − eps_uncond) + (eps_uncond − eps); at ω = 1, eps_cond − eps.
    """

    name = "sds"
    evaluations = staticmethod(lambda guidance_scale, **_: _branches(guidance_scale))

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
    evaluations = staticmethod(lambda **_: 2)

    def terms(self, prior: Prior, x: LossInputs) -> dict[str, Tensor]:
        z_t = _noisy(prior, x.z, x)
        (eps_uncond, _), (eps_cond, _) = _predict(prior, x.t, (z_t, x.null), (z_t, x.target))
        return {"cond": self.guidance_scale * (eps_cond - eps_uncond)}


class CSD(Cond):
    """Classifier Score Distillation [Yu et al.]: `cond` under the name it was published by."""

    name = "csd"
    by_default = False  # twice the same


class LMC(ScoreDistillation):
    """LMC-SDS: g = (b(z, t) − z_hat) + ω (eps_cond − eps_uncond) [LMC, Eq. 9].

    z_hat is the unconditional estimate of the z_t that the guidance uses, or with `fixed_noise` of
    its own; b is in its normalised space (Eq. 10).

    Args:
        corrector: a corrector, the folder or hub id of a released one, or 'identity' (b̂ = z).
        fixed_noise: the same eps over the whole optimisation in the guidance, a fresh one in
            b − z_hat: diverse results [LMC, Sec. 4]. Three evaluations in place of two.
        statistics: of Eq. 10, in place of the corrector's own.
        keep_ratio: multiply b − z_hat by alpha_t / sigma_t, which Eq. 9 drops from Eq. 7.
        first_stage: the share of the run that is plain SDS, whose blur rids a translator of its
            source's detail, which LMC-SDS keeps like any other. Not in the paper.

    Raises:
        FileNotFoundError: there is no such corrector.
        ValueError: unknown statistics, or some that the corrector was not trained for; first_stage
            is no share.
    """

    name = "lmc"
    evaluations = staticmethod(lambda fixed_noise, **_: 3 if fixed_noise else 2)

    def __init__(
        self,
        corrector: str | BiasCorrector,
        *args: Any,
        fixed_noise: bool = False,
        statistics: Statistics | None = None,
        keep_ratio: bool = False,
        first_stage: float = 0.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.first_stage = _share(first_stage)
        self.needs_progress = first_stage > 0
        if statistics not in (None, *get_args(Statistics)):
            known = ", ".join(get_args(Statistics))
            raise ValueError(f"unknown statistics {statistics!r}; known are {known}")
        # At once, small as it is: a wrong name must not be found out after the prior is loaded.
        if isinstance(corrector, str):
            corrector = (
                IdentityCorrector() if corrector == "identity" else load_corrector(corrector)
            )
        corrector.check_statistics(statistics)
        self.corrector = corrector.eval().requires_grad_(False)
        self.fixed_noise, self.statistics, self.keep_ratio = fixed_noise, statistics, keep_ratio

    def check(self, prior: Prior) -> None:
        """Refuse another prior than the corrector's own.

        Raises:
            ValueError: it was trained on another prior.
        """
        self.corrector.check_prior(prior.identity)

    def prepare(self, prior: Prior, device: torch.device | str) -> None:
        """Move the corrector."""
        super().prepare(prior, device)
        self.corrector.to(device)
        for part in self.corrector.modules():
            if isinstance(part, UNet):
                part.to(memory_format=torch.channels_last)

    def terms(self, prior: Prior, x: LossInputs) -> dict[str, Tensor]:
        z_t, eps = _noisy(prior, x.z, x), x.eps
        if self.fixed_noise:
            assert x.eps_fixed is not None
            eps = x.eps_fixed
            z_t_fixed = _noisy(prior, x.z, replace(x, eps=eps))
            (_, z_hat), (eps_uncond, _), (eps_cond, _) = _predict(
                prior, x.t, (z_t, x.null), (z_t_fixed, x.null), (z_t_fixed, x.target)
            )
        else:
            (eps_uncond, z_hat), (eps_cond, _) = _predict(
                prior, x.t, (z_t, x.null), (z_t, x.target)
            )
        cond = self.guidance_scale * (eps_cond - eps_uncond)
        if _progress(x) < self.first_stage:
            return {"cond": cond, "proj": eps_uncond - eps}
        g_lmc = self.corrector.correct(x.z, x.t, z_hat, self.statistics) - z_hat
        if self.keep_ratio:
            alpha_t, sigma_t = prior.schedule.coefficients(x.t, x.z.dtype)
            g_lmc = alpha_t / sigma_t * g_lmc
        return {"cond": cond, "lmc": g_lmc}


class DDS(ScoreDistillation):
    """Delta Denoising Score [Hertz et al.]: the same t and eps for target and source.

    g = eps_guided(z_t, y_target) − eps_guided(z_src_t, y_source)
    """

    name = "dds"
    needs_source = True
    evaluations = staticmethod(lambda guidance_scale, **_: 2 * _branches(guidance_scale))
    source_evaluations = staticmethod(lambda guidance_scale, **_: _branches(guidance_scale))

    def terms(self, prior: Prior, x: LossInputs) -> dict[str, Tensor]:
        target, source = _guided_pair(prior, x, self.guidance_scale)
        return {"delta": target - source}


NEGATIVE_PROMPT = (
    "unrealistic, blurry, low quality, out of focus, ugly, low contrast, dull, dark, "
    "low-resolution, gloomy"
)


class NFSD(ScoreDistillation):
    """Noise-Free Score Distillation [Katzir et al.].

    g = δ_D + ω (eps_cond − eps_uncond);  δ_D = eps_uncond where t < 0.2, else
    eps_uncond − eps(z_t, y_negative)

    Args:
        negative_prompt: y_negative; '' is the unconditional prompt, with which δ_D is 0.

    Raises:
        ValueError: negative_prompt is None.
    """

    name = "nfsd"
    prompts_note = "set negative_prompt to ''"
    evaluations_note = "at most"
    evaluations = staticmethod(
        lambda guidance_scale, negative_prompt, **_: (
            _branches(guidance_scale) + 1 if negative_prompt else 2
        )
    )

    def __init__(
        self, *args: Any, negative_prompt: str | None = NEGATIVE_PROMPT, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        if negative_prompt is None:
            raise ValueError("nfsd needs a negative_prompt; an empty one ('') is one too")
        self.negative_prompt = negative_prompt

    def terms(self, prior: Prior, x: LossInputs) -> dict[str, Tensor]:
        assert x.negative is not None
        z_t, scale = _noisy(prior, x.z, x), self.guidance_scale
        late = [i for i, time in enumerate(x.times()) if time >= 0.2]
        # One call: the target's and, unless ω = 1 cancels it, the null prompt's of all samples,
        # the negative prompt's of the late ones; the empty one's is the null prompt's.
        prompts = [x.target] if scale == 1 else [x.target, x.null]
        count, branches = len(z_t), len(prompts)
        asked = late if self.negative_prompt or scale == 1 else []
        # Row by row: to index by a list would copy it to the device, and wait.
        eps, _ = prior.predict(
            torch.cat([*[z_t] * branches, *(z_t[i : i + 1] for i in asked)]),
            torch.cat([*[x.t] * branches, *(x.t[i : i + 1] for i in asked)]),
            Embedding.cat([*prompts, *(x.negative.rows(slice(i, i + 1)) for i in asked)]),
        )
        negative = torch.zeros_like(z_t)
        for number, i in enumerate(late):
            negative[i] = eps[branches * count + number if asked else count + i]
        eps_cond = eps[:count]
        if scale == 1:
            return {"guided": eps_cond - negative}
        eps_uncond = eps[count : 2 * count]
        return {"cond": scale * (eps_cond - eps_uncond), "domain": eps_uncond - negative}


class MSSDS(ScoreDistillation):
    """Multi-step SDS: `z` against a guided DDIM sample from z_t [Zhou & Tulsiani, SparseFusion].

    g = alpha_t / sigma_t (z − ẑ), ẑ in `steps` even, deterministic steps from z_t to t = 0, where
    the image is clean (ᾱ = 1). The weight alpha_t / sigma_t is that of Eq. 7, so that one step is
    SDS; SparseFusion's is another.

    Args:
        steps: K; costs 2 K evaluations, one after the other.

    Raises:
        ValueError: fewer than one step.
    """

    name = "ms_sds"
    evaluations = staticmethod(lambda guidance_scale, steps, **_: steps * _branches(guidance_scale))

    def __init__(self, *args: Any, steps: int = 5, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if steps < 1:
            raise ValueError(f"steps must be at least 1, got {steps}")
        self.steps = steps

    def terms(self, prior: Prior, x: LossInputs) -> dict[str, Tensor]:
        shares = [i / self.steps for i in range(self.steps, -1, -1)]
        sample = _ddim(prior, _noisy(prior, x.z, x), shares, x, self.guidance_scale)
        alpha_t, sigma_t = prior.schedule.coefficients(x.t, x.z.dtype)
        return {"multi_step": alpha_t / sigma_t * (x.z - sample)}


class PDS(ScoreDistillation):
    """Posterior Distillation Sampling [Koo et al.]: stochastic latents compared.

    g = ẑ_target − ẑ_source,  ẑ = (z_s − μ(z_t, z_hat)) / σ_post

    z_t and z_s of either image have the same eps and eps'; z_hat is of the guided prediction; μ and
    σ_post are of DDPM's posterior q(z_s | z_t, z_hat). This is the paper's form, with the
    coefficients of one consistent pair: s is the index below t on the prior's own grid. The term
    in z − z_source then vanishes and what is left is DDS with the weight μ's z_hat has. (The
    authors' code has s two steps below with the coefficients of one, which leaves such a term.)
    That weight is of the order of √beta: on a grid of 1,000 steps g is about a tenth of DDS's, so
    an L2 term beside it has ten times the say. alpha_t of the common weights is applied on top.
    """

    name = "pds"
    needs_source = True
    needs_prior = "a variance-preserving (DDPM) prior"
    evaluations = staticmethod(lambda guidance_scale, **_: 2 * _branches(guidance_scale))
    source_evaluations = staticmethod(lambda guidance_scale, **_: _branches(guidance_scale))

    def check(self, prior: Prior) -> None:
        """Refuse a flow prior.

        Raises:
            ValueError: the posterior is not defined for `prior`'s schedule.
        """
        if isinstance(prior.schedule, FlowSchedule):
            raise ValueError(
                f"the loss 'pds' needs {self.needs_prior}: q(z_s | z_t, z_hat) is not defined for "
                "a flow prior"
            )

    def terms(self, prior: Prior, x: LossInputs) -> dict[str, Tensor]:
        self.check(prior)
        assert x.z_source is not None and x.source is not None
        assert isinstance(prior.schedule, Schedule)
        grid = prior.schedule.alphas_cumprod.to(x.z.device).double()
        index = prior.schedule.timestep(x.t)
        bar_t = grid[index].view(-1, 1, 1, 1)
        # Below the grid's first index the image is clean.
        bar_s = torch.where(index > 0, grid[index - 1], 1.0).view(-1, 1, 1, 1)
        beta = 1 - bar_t / bar_s
        of_z_hat = bar_s.sqrt() * beta / (1 - bar_t)
        of_z_t = (1 - beta).sqrt() * (1 - bar_s) / (1 - bar_t)
        post = ((1 - bar_s) / (1 - bar_t) * beta).sqrt()
        # There the image below is clean, and the posterior has no width.
        if min(x.times()) * len(grid) < 0.5001:
            raise ValueError(
                "the loss 'pds' is not defined at the first index of the grid: raise t"
            )
        alpha_t, sigma_t = prior.schedule.coefficients(x.t, torch.float64)
        latents = []
        for z, eps in zip(
            (x.z, x.z_source), _guided_pair(prior, x, self.guidance_scale), strict=True
        ):
            z_t = alpha_t * z + sigma_t * x.eps
            z_hat = (z_t - sigma_t * eps) / alpha_t
            # eps' is the same for both images and cancels: z_s without it.
            latents.append((bar_s.sqrt() * z - of_z_hat * z_hat - of_z_t * z_t) / post)
        return {"delta": (latents[0] - latents[1]).to(x.z.dtype)}


class VSD(ScoreDistillation):
    """Variational Score Distillation [Wang et al., ProlificDreamer].

    g = eps_guided(z_t, y) − eps_LoRA(z_t, y, t)

    The LoRA on the frozen denoiser is trained beside on the images of the moment with the plain
    diffusion loss ‖eps_LoRA(z_t, y, t) − eps‖² (`learn`).

    Args:
        lora_rank: see `LoraPrior.add_lora`; null trains a whole copy of the denoiser in its place.
        lora_lr: AdamW's learning rate of the LoRA.
    """

    name = "vsd"
    needs_prior = "a prior with add_lora and predict_lora (`LoraPrior`)"
    learns = True
    evaluations_note = "one of them trains the LoRA"
    evaluations = staticmethod(lambda guidance_scale, **_: _branches(guidance_scale) + 2)

    def __init__(
        self, *args: Any, lora_rank: int | None = 4, lora_lr: float = 1e-4, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        if lora_rank is not None and lora_rank < 1:
            raise ValueError(f"lora_rank must be at least 1, or null, got {lora_rank}")
        if not lora_lr > 0:
            raise ValueError(f"lora_lr must be above 0, got {lora_lr}")
        self.lora_rank, self.lora_lr = lora_rank, lora_lr

    def check(self, prior: Prior) -> None:
        """Refuse a prior that cannot take a LoRA.

        Raises:
            ValueError: it cannot.
        """
        if not isinstance(prior, LoraPrior):
            kind = type(prior).__name__
            raise ValueError(f"the loss {self.name!r} needs {self.needs_prior}; {kind} has not")

    def prepare(self, prior: Prior, device: torch.device | str) -> None:
        """Give the prior's denoiser its LoRA, the same in all processes."""
        super().prepare(prior, device)
        assert isinstance(prior, LoraPrior)
        prior.to(device)
        self.lora = prior.add_lora(self.lora_rank)
        self.optimizer = torch.optim.AdamW(self.lora.values(), lr=self.lora_lr)

    def terms(self, prior: Prior, x: LossInputs) -> dict[str, Tensor]:
        z_t, scale = _noisy(prior, x.z, x), self.guidance_scale
        eps_lora, _ = self.predict_lora(prior, z_t, x)
        if scale == 1:
            ((eps_cond, _),) = _predict(prior, x.t, (z_t, x.target))
            return {"guided": eps_cond - eps_lora}
        (eps_uncond, _), (eps_cond, _) = _predict(prior, x.t, (z_t, x.null), (z_t, x.target))
        return {"cond": scale * (eps_cond - eps_uncond), "variational": eps_uncond - eps_lora}

    @staticmethod
    def predict_lora(prior: Prior, z_t: Tensor, x: LossInputs) -> tuple[Tensor, Tensor]:
        """See `LoraPrior.predict_lora`; which `prepare` made sure that there is.

        To ask here whether it is one, by isinstance, would take its identity at every step.
        """
        return cast(LoraPrior, prior).predict_lora(z_t, x.t, x.target)

    def learn(self, prior: Prior, x: LossInputs) -> None:
        """A step on ‖eps_LoRA(z_t, y, t) − eps‖², mean over pixels, batch and processes."""
        with torch.enable_grad():
            eps_lora, _ = self.predict_lora(prior, _noisy(prior, x.z, x), x)
            loss = (eps_lora - x.eps).square().mean()
            gradients = torch.autograd.grad(loss, list(self.lora.values()))
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        if torch.distributed.is_initialized():
            torch.distributed.all_reduce(flat)
            flat /= torch.distributed.get_world_size()
        parts = flat.split([gradient.numel() for gradient in gradients])
        for weight, part in zip(self.lora.values(), parts, strict=True):
            weight.grad = part.view_as(weight)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def state_dict(self) -> dict[str, Any]:
        lora = {name: weight.detach() for name, weight in self.lora.items()}
        # A copy: the optimizer's own holds the tensors it goes on changing.
        return copy.deepcopy({"lora": lora, "optimizer": self.optimizer.state_dict()})

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from another's `state_dict`.

        Raises:
            ValueError: it is of another LoRA.
        """
        there = {name: tuple(weight.shape) for name, weight in state.get("lora", {}).items()}
        if there != {name: tuple(weight.shape) for name, weight in self.lora.items()}:
            raise ValueError("the checkpoint's LoRA is of another prior or lora_rank than this one")
        with torch.no_grad():
            for name, weight in self.lora.items():
                weight.copy_(state["lora"][name])
        self.optimizer.load_state_dict(state["optimizer"])


class DMD(VSD):
    """Distribution Matching Distillation [Yin et al., DMD, Eq. 7, as its authors' code has it].

    g = (ẑ_fake − ẑ_guided) / mean|z − ẑ_guided|, the mean over each image

    VSD in estimates of z in place of eps, with a weight that makes the steps of all t and images
    alike; ẑ_fake is of a LoRA, or a copy of the denoiser, that learns several times a step, as in
    DMD2. DMD's regression and DMD2's adversarial loss are not here. The weight stands for 1/ω and
    alpha_t, which are left out by default; Eq. 7 and 8 as printed leave alpha_t in.

    With L2 to the source as the cost of transport, as in stage two, it is the recipe of RDMD
    [Rakitin et al.], one-step unpaired translation, but for where that begins: there the
    translator and the fake begin as the target domain's denoiser. Here the translator's network
    begins with nothing, the fake is a LoRA (`lora_rank: null`: a copy), and a prompt and ω say
    what the target is.

    Args:
        updates: how often a step trains ẑ_fake.
        normalise: false leaves the weight out; g is then sigma_t / alpha_t times VSD's. The mean
            in it counts as 1e-3 where it is less.

    Raises:
        ValueError: fewer than one update; see `VSD`.
    """

    name = "dmd"
    evaluations_note = "`updates` of them train the LoRA"
    evaluations = staticmethod(  # type: ignore[assignment]  # all options are given, by name
        lambda guidance_scale, updates, **_: _branches(guidance_scale) + 1 + updates
    )

    def __init__(
        self,
        *args: Any,
        updates: int = 5,
        normalise: bool = True,
        chain_alpha: bool = False,
        rescale: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, chain_alpha=chain_alpha, rescale=rescale, **kwargs)
        if updates < 1:
            raise ValueError(f"updates must be at least 1, got {updates}")
        self.updates, self.normalise = updates, normalise

    def terms(self, prior: Prior, x: LossInputs) -> dict[str, Tensor]:
        z_t, scale = _noisy(prior, x.z, x), self.guidance_scale
        _, z_fake = self.predict_lora(prior, z_t, x)
        prompts = [x.target] if scale == 1 else [x.target, x.null]
        z_hats = [z_hat for _, z_hat in _predict(prior, x.t, *((z_t, each) for each in prompts))]
        z_hat = z_hats[0] if scale == 1 else guide(z_hats[1], z_hats[0], scale)
        weight = torch.ones_like(z_hat[:, :1, :1, :1])
        if self.normalise:
            weight = 1 / (x.z - z_hat).abs().mean((1, 2, 3), keepdim=True).clamp(min=1e-3)
        return {"matching": weight * (z_fake - z_hat)}


class SDI(ScoreDistillation):
    """Score Distillation via Inversion [Lukoianov et al.]: SDS with inverted noise.

    g = sigma_t / alpha_t (eps_guided(z_t) − κ) = z − z_hat,  z_t = alpha_t z + sigma_t κ

    z_t comes from DDIM inversion of z with a negative guidance scale; nothing of it is random.
    alpha_t is in g already, so `chain_alpha` is false by default.

    Args:
        inversion_guidance_scale: ω of the inversion; None is −guidance_scale.
        inversion_steps: from t = 0 to 1; up to t it takes int(inversion_steps · t), at least one,
            of two evaluations each.

    Raises:
        ValueError: fewer than one step; or, when called, more than one t in the batch.
    """

    name = "sdi"
    evaluations_note = "about"
    needs_shared_time = True
    time = FallingTime(jitter=1 / 30)

    def __init__(
        self,
        guidance_scale: float = 7.5,
        *,
        chain_alpha: bool = False,
        inversion_guidance_scale: float | None = None,
        inversion_steps: int = 10,
        **kwargs: Any,
    ) -> None:
        super().__init__(guidance_scale, chain_alpha=chain_alpha, **kwargs)
        if inversion_steps < 1:
            raise ValueError(f"inversion_steps must be at least 1, got {inversion_steps}")
        if inversion_guidance_scale is None:
            inversion_guidance_scale = -guidance_scale
        self.inversion_guidance_scale = inversion_guidance_scale
        self.inversion_steps = inversion_steps

    @staticmethod
    def evaluations(
        guidance_scale: float,
        inversion_guidance_scale: float | None,
        inversion_steps: int,
        **_: Any,
    ) -> int:
        # The mean over t ~ U(0, 1) of max(1, int(n t)) is (n − 1) / 2 + 1 / n.
        steps = (inversion_steps - 1) / 2 + 1 / inversion_steps
        return round(steps * _branches(inversion_guidance_scale) + _branches(guidance_scale))

    def terms(self, prior: Prior, x: LossInputs) -> dict[str, Tensor]:
        times = x.times()
        if any(time != times[0] for time in times):
            raise ValueError(f"the loss 'sdi' needs one t for the whole batch, got {list(times)}")
        # The tolerance is for t = 0.7 in float32, which is a little less.
        steps = max(1, int(self.inversion_steps * times[0] + 1e-4))
        shares = [i / steps for i in range(steps + 1)]
        z_t = _ddim(prior, x.z, shares, x, self.inversion_guidance_scale)
        alpha_t, sigma_t = prior.schedule.coefficients(x.t, x.z.dtype)
        kappa = (z_t - alpha_t * x.z) / sigma_t
        (eps,) = _guided(prior, x.t, x.null, self.guidance_scale, (z_t, x.target))
        return {"inverted": sigma_t / alpha_t * (eps - kappa)}


class ASD(ScoreDistillation):
    """Asynchronous Score Distillation [Ma et al., ScaleDreamer, Eq. 9].

    g = eps_guided(z_t, y) − eps_cond(z_{t+Δ}, y),  Δ = shift (t − t_min), with the same eps

    The prior at a later time stands for VSD's LoRA: for networks that amortise many prompts, for
    which a LoRA learns too slowly. The authors' code draws Δ between 0 and this.

    Args:
        shift: Δ over t − t_min.
        t_min: below it Δ is 0.

    Raises:
        ValueError: a negative shift.
    """

    name = "asd"
    evaluations = staticmethod(lambda guidance_scale, **_: _branches(guidance_scale) + 1)

    def __init__(
        self, *args: Any, shift: float = 0.1, t_min: float = TIME_RANGE[0], **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        if shift < 0:
            raise ValueError(f"shift must not be negative, got {shift}")
        self.shift, self.t_min = shift, t_min

    def terms(self, prior: Prior, x: LossInputs) -> dict[str, Tensor]:
        later = x.t + self.shift * (x.t - self.t_min).clamp(min=0)
        later = torch.maximum(x.t, later.clamp(max=LATEST))
        z_later = _noisy(prior, x.z, replace(x, t=later))
        queries = [(z_later, later, x.target), (_noisy(prior, x.z, x), x.t, x.target)]
        if self.guidance_scale != 1:
            queries.append((*queries[1][:2], x.null))
        (eps_later, _), (eps_cond, _), *rest = _predict_each(prior, queries)
        if not rest:
            return {"guided": eps_cond - eps_later}
        eps_uncond = rest[0][0]
        return {
            "cond": self.guidance_scale * (eps_cond - eps_uncond),
            "asynchronous": eps_uncond - eps_later,
        }


class Bridge(SDS):
    """Score distillation as a bridge [McAllister et al., SDS-Bridge]: SDS, then by descriptions.

    g = ω (eps(z_t, y + target_suffix) − eps(z_t, y + source_suffix)) from `first_stage` on: from
    what SDS makes, in words, to what is wanted.

    Args:
        first_stage: the share of the run that is plain SDS.
        target_suffix: what the images shall be.
        source_suffix: what SDS's are; null, and their prompt is the empty one: `cond` of
            y + target_suffix.

    Raises:
        ValueError: first_stage is no share, or a suffix makes a prompt that the prior, one of
            classes, does not know.
    """

    name = "bridge"
    prompts_note = "the loss adds words to prompts, which a prior of classes does not know"
    evaluations_note = "at most"
    evaluations = staticmethod(lambda guidance_scale, **_: 2)

    def __init__(
        self,
        *args: Any,
        first_stage: float = 0.5,
        target_suffix: str = ", detailed high resolution, high quality, sharp",
        source_suffix: str | None = ", oversaturated, smooth, pixelated, cartoon, foggy, hazy, "
        "blurry, bad structure, noisy, malformed",
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.first_stage = _share(first_stage)
        self.needs_progress = first_stage > 0
        self.target_suffix, self.source_suffix = target_suffix, source_suffix
        self.suffixes = [each for each in (target_suffix, source_suffix) if each is not None]

    def terms(self, prior: Prior, x: LossInputs) -> dict[str, Tensor]:
        if _progress(x) < self.first_stage:
            return super().terms(prior, x)
        z_t = _noisy(prior, x.z, x)
        source = x.null if self.source_suffix is None else x.described[1]
        (there, _), (here, _) = _predict(prior, x.t, (z_t, x.described[0]), (z_t, source))
        return {"cond": self.guidance_scale * (there - here)}


class DVRF(ScoreDistillation):
    """Delta Velocity Rectified Flow [Beaudouin et al.]: DDS in velocities.

    g = v_guided(z_t + η sigma_t (z − z_src), y_target) − v_guided(z_src_t, y_source)
        + (1 − η) (z − z_src),  v = eps − z_hat, with the same t and eps

    At η = 0 it is DDS's times (alpha_t + sigma_t) / alpha_t, at η = 1 the difference that FlowEdit
    integrates. Published for flow priors, of which alpha_t + sigma_t = 1. A variance-preserving
    one is a flow prior too, of z_t / (alpha_t + sigma_t) at the time sigma_t / (alpha_t + sigma_t):
    what is above is the same in its terms.

    It is a step of an ODE along a falling t, and no potential's gradient: where the denoiser lets
    z_t through, and above all at low frequencies, g is −η (alpha_t + sigma_t) / alpha_t (z − z_src)
    and drives z away from its source. The authors take 50 small steps, of a rate of their own
    each, with ω 6 for the source and 16.5 for the target; here both share one.

    Args:
        eta: η at the end of the run, of the shift that takes z_t towards what the source's path
            says of z.
        progressive: η grows evenly from 0 over the run, as in the paper; false: it is `eta`.
    """

    name = "dvrf"
    by_default = False  # without `chain_alpha` what is nearly noise has nearly all the say
    needs_source = True
    evaluations = staticmethod(lambda guidance_scale, **_: 2 * _branches(guidance_scale))
    source_evaluations = staticmethod(lambda guidance_scale, **_: _branches(guidance_scale))

    def __init__(
        self, *args: Any, eta: float = 1.0, progressive: bool = True, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.eta, self.progressive = eta, progressive
        self.needs_progress = progressive

    def terms(self, prior: Prior, x: LossInputs) -> dict[str, Tensor]:
        assert x.z_source is not None
        apart = x.z - x.z_source
        _, sigma_t = prior.schedule.coefficients(x.t, x.z.dtype)
        eta = self.eta * _progress(x) if self.progressive else self.eta
        shift = eta * sigma_t * apart
        target, source = _guided_pair(prior, x, self.guidance_scale, shift, _velocity)
        return {"delta": target - source, "apart": (1 - eta) * apart}


def embed_prompts(
    prior: Prior,
    prompts: Sequence[str],
    losses: Iterable[ScoreDistillation],
    targets: Sequence[str],
) -> Embedding:
    """Embeddings of prompts, then of what losses ask besides (`further_prompts`) of some of them.

    Raises:
        ValueError: an unknown prompt of a class-conditional prior.
    """
    losses = list(losses)
    further = [prompt for loss in losses for prompt in loss.further_prompts(targets)]
    try:
        return prior.embed([*prompts, *further])
    except ValueError as error:
        prior.embed(prompts)  # where one of these is unknown, that is the error
        for loss in losses:
            try:
                prior.embed(loss.further_prompts(targets))
            except ValueError as its_own:
                said = f"the loss {loss.name!r}: {its_own}; {loss.prompts_note}"
                raise ValueError(said) from error
        raise


def surrogate(z: Tensor, gradient: Tensor) -> Tensor:
    """A scalar per image, (B,), whose autograd gradient with respect to `z` is `gradient`.

    Its value means nothing; the step that uses it chooses the reduction.
    """
    return (gradient.detach() * z).sum(dim=tuple(range(1, z.ndim)))


def _share(first_stage: float) -> float:
    if not 0 <= first_stage <= 1:
        raise ValueError(f"first_stage must be a share of the run in [0, 1], got {first_stage}")
    return first_stage


def _progress(x: LossInputs) -> float:
    return 1.0 if x.progress is None else x.progress


def _noisy(prior: Prior, z: Tensor, x: LossInputs) -> Tensor:
    return add_noise(z, x.eps, *prior.schedule.coefficients(x.t, z.dtype))


def _predict(
    prior: Prior, t: Tensor, *queries: tuple[Tensor, Embedding]
) -> Sequence[tuple[Tensor, Tensor]]:
    """(eps, z_hat) for each of several (z_t, embedding) at the same t: one batched call."""
    return _predict_each(prior, [(z_t, t, embedding) for z_t, embedding in queries])


def _predict_each(
    prior: Prior, queries: Sequence[tuple[Tensor, Tensor, Embedding]]
) -> Sequence[tuple[Tensor, Tensor]]:
    """(eps, z_hat) for each of several (z_t, t, embedding), of any lengths: one batched call."""
    z_t, t, embeddings = zip(*queries, strict=True)
    predicted = prior.predict(torch.cat(z_t), torch.cat(t), Embedding.cat(embeddings))
    lengths = [len(each) for each in t]
    return list(zip(*(each.split(lengths) for each in predicted), strict=True))


def _branches(guidance_scale: float | None) -> int:
    """Predictions in a guided one: at ω = 1 the conditional half alone."""
    return 1 if guidance_scale == 1 else 2


def _guided(
    prior: Prior, t: Tensor, null: Embedding, scale: float, *queries: tuple[Tensor, Embedding]
) -> list[Tensor]:
    """eps_guided for each of several (z_t, embedding) at the same t: one batched call."""
    if scale == 1:
        return [eps for eps, _ in _predict(prior, t, *queries)]
    both = [(z_t, prompt) for z_t, embedding in queries for prompt in (null, embedding)]
    eps = [eps for eps, _ in _predict(prior, t, *both)]
    return [guide(u, c, scale) for u, c in zip(eps[::2], eps[1::2], strict=True)]


def _eps(eps: Tensor, z_hat: Tensor) -> Tensor:
    return eps


def _velocity(eps: Tensor, z_hat: Tensor) -> Tensor:
    return eps - z_hat


def _guided_pair(
    prior: Prior,
    x: LossInputs,
    scale: float,
    shift: Tensor | float = 0.0,
    of: Callable[[Tensor, Tensor], Tensor] = _eps,
) -> list[Tensor]:
    """`of` the guided (eps, z_hat) of the image with its prompt and of the source with its own.

    One call. The image's z_t is moved by `shift`.
    """
    assert x.z_source is not None and x.source is not None
    once = slice(None, None, x.repeats)
    of_source = (_noisy(prior, x.z_source, x)[once], x.t[once])
    branches = [(*of_source, x.source.rows(once)), (_noisy(prior, x.z, x) + shift, x.t, x.target)]
    if scale != 1:
        nulls = (x.null.rows(once), x.null)
        branches += [(z_t, t, null) for (z_t, t, _), null in zip(branches, nulls, strict=True)]
    source, target, *unguided = (of(*each) for each in _predict_each(prior, branches))
    if scale != 1:
        source, target = (
            guide(u, c, scale) for u, c in zip(unguided, (source, target), strict=True)
        )
    return [target, source.repeat_interleave(x.repeats, 0)]


def _ddim(
    prior: Prior, z_s: Tensor, shares: Sequence[float], x: LossInputs, scale: float
) -> Tensor:
    """Guided DDIM steps from `z_s` at the first share of x.t through all of them to the last."""
    for here, there in pairwise(shares):
        (eps,) = _guided(prior, x.t * here, x.null, scale, (z_s, x.target))
        ends = (_clean_at_zero(prior, x.t * share, z_s) for share in (here, there))
        z_s = ddim_step(z_s, eps, *ends)
    return z_s


def _clean_at_zero(prior: Prior, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """(alpha_t, sigma_t), but exactly (1, 0) at t = 0, where a DDPM grid has a little noise."""
    alpha_t, sigma_t = prior.schedule.coefficients(t, like.dtype)
    clean = (t == 0).view(-1, 1, 1, 1)
    return alpha_t.masked_fill(clean, 1.0), sigma_t.masked_fill(clean, 0.0)
