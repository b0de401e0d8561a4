"""The families of pipelines that are supported, and what their JSON files say of them."""

from dataclasses import dataclass
from typing import Any, Literal, get_args

from lmc.priors.weights import PipelineFolder
from lmc.schedule import FlowSchedule, PredictionType, Schedule


@dataclass(frozen=True)
class Family:
    """How the pipelines of one class are made up.

    Attributes:
        denoiser: the part that predicts.
        text_encoders: how many, each with its tokenizer; 0: classes stand in for prompts.
        latent: there is a VAE, and z is its latent.
        pooled: what the denoiser calls the text encoders' pooled output, if it takes that.
        lowercase: the pipeline makes prompts lower case.
    """

    denoiser: Literal["unet", "transformer"]
    text_encoders: int
    latent: bool
    pooled: str | None = None
    lowercase: bool = False

    @property
    def text_parts(self) -> list[str]:
        """text_encoder, text_encoder_2, …, tokenizer, tokenizer_2, …"""
        numbers = ["", *(f"_{i}" for i in range(2, self.text_encoders + 1))][: self.text_encoders]
        return [f"{part}{number}" for part in ("text_encoder", "tokenizer") for number in numbers]


FAMILIES = {
    "IFPipeline": Family("unet", 1, latent=False, lowercase=True),
    "StableDiffusionPipeline": Family("unet", 1, latent=True),
    "StableDiffusionXLPipeline": Family("unet", 2, latent=True, pooled="text_embeds"),
    "StableDiffusion3Pipeline": Family("transformer", 3, latent=True, pooled="pooled_projections"),
    "DDPMPipeline": Family("unet", 0, latent=False),
    "DiTPipeline": Family("transformer", 0, latent=True),
}


VAES = ("AutoencoderKL", "AutoencoderTiny")


@dataclass(frozen=True)
class LatentSpace:
    """What z is of a VAE's latents: (latent − shift) · scale. The defaults are those of no VAE.

    Attributes:
        scale, shift: see there.
        factor: of an image's side to a latent's.
        upcast: the VAE works in float32 whatever it is asked for.
    """

    scale: float = 1.0
    shift: float = 0.0
    factor: int = 1
    upcast: bool = False


def read_family(files: PipelineFolder) -> Family:
    """The family of a pipeline.

    Raises:
        ValueError: it is not supported, or lacks a part.
    """
    name = files.index.get("_class_name")
    if name not in FAMILIES:
        raise ValueError(
            f"{files.pretrained}: {name} is not supported; supported are {', '.join(FAMILIES)}"
        )
    family = FAMILIES[name]
    parts = [family.denoiser, "scheduler", *(["vae"] if family.latent else [])]
    for part in [*parts, *family.text_parts]:
        if not all(files.index.get(part) or [None]):
            raise ValueError(f"{files.pretrained}: a {name} without {part!r} is not supported")
    return family


def read_denoiser(files: PipelineFolder, family: Family) -> tuple[int, int]:
    """(channels, sample_size): of z, and the side of z.

    Raises:
        ValueError: they are no numbers, or the output is neither as the input nor, with a learned
            variance, twice that.
    """
    file = f"{family.denoiser}/config.json"
    config = files.json(file)
    channels = _number(files, file, config, "in_channels")
    sample_size = _number(files, file, config, "sample_size")
    out_channels = config.get("out_channels") or channels
    if out_channels not in (channels, 2 * channels):
        raise ValueError(
            f"{files.pretrained}/{file}: out_channels {out_channels} is neither "
            f"in_channels {channels} nor, with a learned variance, twice that"
        )
    return channels, sample_size


def read_latents(files: PipelineFolder, part: str, channels: int) -> LatentSpace:
    """What a VAE's config says.

    Args:
        files: that it is among.
        part: which of them, '' for the only one.
        channels: that the denoiser takes.

    Raises:
        ValueError: another kind of VAE, or of scaling, or one that does not fit the denoiser.
    """
    file = f"{part}/config.json" if part else "config.json"
    config, kind = files.json(file), files.index[part][1]
    if kind not in VAES:
        raise ValueError(f"{files.pretrained}: a {kind} is not supported; {' and '.join(VAES)} are")
    if config.get("latents_mean") or config.get("latents_std"):
        raise ValueError(f"{files.pretrained}/{file}: latents_mean/_std are not supported")
    # What an old config does not say is as AutoencoderKL has it by default.
    latent_channels = config.get("latent_channels", 4)
    if latent_channels != channels:
        raise ValueError(
            f"{files.pretrained}: the vae's latents have {latent_channels} channels, the "
            f"denoiser takes {channels}"
        )
    if kind == "AutoencoderTiny":  # whose latents are scaled already
        return LatentSpace(
            scale=config.get("scaling_factor", 1.0),
            shift=config.get("shift_factor") or 0.0,
            factor=2 ** (len(config.get("encoder_block_out_channels", [64] * 4)) - 1),
            upcast=config.get("force_upcast", False),
        )
    return LatentSpace(
        scale=config.get("scaling_factor", 0.18215),
        shift=config.get("shift_factor") or 0.0,
        factor=2 ** (len(config.get("block_out_channels", [64])) - 1),
        upcast=config.get("force_upcast", True),
    )


def read_schedule(files: PipelineFolder) -> tuple[Schedule | FlowSchedule, PredictionType]:
    """The scheduler's noise schedule and prediction type.

    Raises:
        ValueError: a scheduler without a DDPM grid, or an unknown prediction type.
    """
    scheduler = files.class_of("scheduler").from_pretrained(files.path, subfolder="scheduler")
    if type(scheduler).__name__ == "FlowMatchEulerDiscreteScheduler":
        return FlowSchedule(scheduler.config.num_train_timesteps), "flow"
    if not hasattr(scheduler, "alphas_cumprod"):
        raise ValueError(
            f"{files.pretrained}/scheduler: {type(scheduler).__name__} is not supported; one "
            "with a DDPM grid (alphas_cumprod) or FlowMatchEulerDiscreteScheduler is"
        )
    prediction_type = scheduler.config.prediction_type
    known = [kind for kind in get_args(PredictionType) if kind != "flow"]
    if prediction_type not in known:
        raise ValueError(
            f"{files.pretrained}/scheduler: unknown prediction_type {prediction_type!r}; "
            f"known are {', '.join(known)}"
        )
    return Schedule(scheduler.alphas_cumprod), prediction_type


def read_classes(
    files: PipelineFolder, family: Family, named: dict[str, int] | None
) -> dict[str, int]:
    """Prompts to class ids: '', the numbers, the labels of model_index.json, and those `named`.

    Empty where prompts are texts.

    Raises:
        ValueError: a class that is named is not there, or there are none.
    """
    if family.text_encoders:
        if named:
            raise ValueError(f"{files.pretrained}: prompts are texts, there are no classes to name")
        return {}
    file = f"{family.denoiser}/config.json"
    if family.denoiser == "transformer":
        null = _number(files, file, files.json(file), "num_embeds_ada_norm")
    else:
        null = _number(files, file, files.json(file), "num_class_embeds") - 1
    classes = {"": null} | {str(number): number for number in range(null + 1)}
    for number, labels in (files.index.get("id2label") or {}).items():
        classes |= {label.strip(): int(number) for label in labels.split(",")}
    for label, class_id in (named or {}).items():
        if str(class_id) not in classes:
            raise ValueError(f"classes: {label!r} is {class_id}, which {files.pretrained} has not")
        classes[label] = class_id
    return classes


def _number(files: PipelineFolder, file: str, config: dict[str, Any], key: str) -> int:
    if not isinstance(config.get(key), int):
        raise ValueError(f"{files.pretrained}/{file}: no number for {key!r}")
    return config[key]
