"""DiffusersPrior, which speaks the Prior protocol for models in diffusers format."""

import contextlib
import gc
import hashlib
import importlib.util
import inspect
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError
from safetensors.torch import load_file, save_file
from torch import Tensor

from lmc.priors.protocol import Embedding
from lmc.priors.weights import weight_files, weights_digest
from lmc.schedule import FlowSchedule, PredictionType, Schedule, to_eps_and_z_hat

Dtype = Literal["float32", "bfloat16", "float16"]


@dataclass(frozen=True)
class Family:
    """How the pipelines of one class are made up.

    Attributes:
        denoiser: the part that predicts.
        text_encoders: how many, each with its tokenizer; 0: classes stand in for prompts.
        latent: there is a VAE, and z is its latent.
        pooled: what the denoiser calls the text encoders' pooled output, if it takes that.
    """

    denoiser: Literal["unet", "transformer"]
    text_encoders: int
    latent: bool
    pooled: str | None = None

    @property
    def text_parts(self) -> list[str]:
        """text_encoder, text_encoder_2, …, tokenizer, tokenizer_2, …"""
        numbers = ["", *(f"_{i}" for i in range(2, self.text_encoders + 1))][: self.text_encoders]
        return [f"{part}{number}" for part in ("text_encoder", "tokenizer") for number in numbers]


FAMILIES = {
    "IFPipeline": Family("unet", 1, latent=False),
    "StableDiffusionPipeline": Family("unet", 1, latent=True),
    "StableDiffusionXLPipeline": Family("unet", 2, latent=True, pooled="text_embeds"),
    "StableDiffusion3Pipeline": Family("transformer", 3, latent=True, pooled="pooled_projections"),
    "DDPMPipeline": Family("unet", 0, latent=False),
    "DiTPipeline": Family("transformer", 0, latent=True),
}

VARIANTS = ("*fp16*", "*non_ema*")  # other forms of the same weights, beside them on the hub


class DiffusersPrior:
    """A prior in diffusers format: a pipeline's folder, or its id on the hub.

    | pipeline | z | prompts |
    |---|---|---|
    | IFPipeline (DeepFloyd IF, first stage) | pixels | text |
    | StableDiffusionPipeline (1.x, 2.x), StableDiffusionXLPipeline | latents | text |
    | StableDiffusion3Pipeline (3, 3.5): flow matching, a time is its sigma | latents | text |
    | DDPMPipeline (a class-conditional UNet2DModel) | pixels | classes |
    | DiTPipeline | latents | classes |

    Constructing it reads and checks the JSON files; weights are loaded by `to`, and the text
    encoders by `embed` alone, only for prompts that are not in the cache yet. Offline, or with
    HF_HUB_OFFLINE=1, a hub id is looked up among what was downloaded before.

    **Prompts of a class-conditional prior** name a class: a label from `id2label` in
    model_index.json (one of those between commas, 'tabby' of 'tabby, tabby cat'), a name from
    `classes`, or the class's number ('3'). '' is the null class: a DiT's is one above its last
    class; a UNet2DModel's the last of its num_class_embeds, unless `classes` says otherwise.
    Train a translator on such a prior with the prompt '{}'.

    **Latents** are the mode of the VAE's distribution, scaled and shifted as the VAE's config says.

    Args:
        pretrained: a pipeline folder (with model_index.json), or a hub id.
        revision: of a hub id; None is its main branch.
        dtype: of the denoiser and the VAE. A VAE that asks for it (force_upcast, the default of
            its class; SDXL's overflows in float16) stays in float32. Predictions are converted to
            eps and z_hat in float32 always.
        cache_dir: where prompt embeddings are kept; default $LMC_CACHE, else ~/.cache/lmc.
        classes: more names for the classes of a class-conditional prior, by number; '' there
            says which is the null class.
        compile: torch.compile the denoiser: slow first steps, then faster ones.
        channels_last: memory format of the denoiser and the VAE.

    Raises:
        FileNotFoundError: the folder or a part of it is missing, or the hub has no such model.
        PermissionError: a gated model whose licence was not accepted, or no login.
        ValueError: a kind of pipeline that is not supported, or an unknown option.
    """

    def __init__(
        self,
        pretrained: str,
        revision: str | None = None,
        dtype: Dtype = "float32",
        cache_dir: str | None = None,
        classes: dict[str, int] | None = None,
        compile: bool = False,
        channels_last: bool = True,
    ) -> None:
        if dtype not in get_args(Dtype):
            raise ValueError(f"unknown dtype {dtype!r}; known are {', '.join(get_args(Dtype))}")
        self.pretrained, self.revision = pretrained, revision
        self.dtype: torch.dtype = getattr(torch, dtype)
        self.compile = compile
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        default = os.environ.get("LMC_CACHE", Path.home() / ".cache" / "lmc")
        self.cache_dir = Path(cache_dir or default) / "embeddings"
        self._commit: str | None = None
        self.folder = self._fetch("model_index.json", "*/*config.json")
        self.index: dict[str, Any] = self._json("model_index.json")
        name = self.index.get("_class_name")
        if name not in FAMILIES:
            raise ValueError(
                f"{pretrained}: {name} is not supported; supported are {', '.join(FAMILIES)}"
            )
        self.family = FAMILIES[name]
        self.latent = self.family.latent
        parts = [self.family.denoiser, "scheduler", *(["vae"] if self.latent else [])]
        for part in [*parts, *self.family.text_parts]:
            if not all(self.index.get(part) or [None]):
                raise ValueError(f"{pretrained}: a {name} without {part!r} is not supported")

        config_file = f"{self.family.denoiser}/config.json"
        config = self._json(config_file)
        self.channels = self._number(config_file, config, "in_channels")
        self.image_size = self._number(config_file, config, "sample_size")
        out_channels = config.get("out_channels") or self.channels
        if out_channels not in (self.channels, 2 * self.channels):
            raise ValueError(
                f"{pretrained}/{config_file}: out_channels {out_channels} is neither "
                f"in_channels {self.channels} nor, with a learned variance, twice that"
            )
        self.latent_shift, self.latent_scale = 0.0, 1.0
        if self.latent:
            self._read_vae_config()
        self.schedule: Schedule | FlowSchedule
        self.prediction_type: PredictionType
        self._read_scheduler()
        self.classes = {} if self.family.text_encoders else self._read_classes(config_file, config)
        if classes and not self.classes:
            raise ValueError(f"{pretrained}: prompts are texts, there are no classes to name")
        for label, number in (classes or {}).items():
            if str(number) not in self.classes:
                raise ValueError(f"classes: {label!r} is {number}, which {pretrained} has not")
            self.classes[label] = number
        self._denoiser: torch.nn.Module | None = None
        self._vae: Any = None
        self._lora: dict[str, torch.nn.Parameter] = {}
        self._digest: str | None = None

    @property
    def identity(self) -> dict[str, Any]:
        """What tells it from others: id, prediction type, image_size, channels, weights' digest.

        A latent prior's has latent_scale and latent_shift as well.
        """
        if self._digest is None:
            part = self.family.denoiser
            self._digest = weights_digest(self._fetch_weights(part) / part)
        latent = {"latent_scale": self.latent_scale, "latent_shift": self.latent_shift}
        return {
            "pretrained": self.pretrained,
            "revision": self.revision,
            "prediction_type": self.prediction_type,
            "image_size": self.image_size,
            "channels": self.channels,
            **(latent if self.latent else {}),
            "digest": self._digest,
        }

    def to(self, device: torch.device | str) -> None:
        """Load the denoiser, and the VAE if there is one, unless done; move them to `device`.

        Raises:
            FileNotFoundError: weights are missing; nothing is loaded then.
        """
        if self._denoiser is None:
            part = self.family.denoiser
            self._fetch_weights(part, *(["vae"] if self.latent else []))
            self._denoiser = self._load(part, self.dtype)
            if self.compile:
                self._denoiser.compile()
            if self.latent:
                self._vae = self._load("vae", self._vae_dtype)
                # A picture at a time, and of its activations only those between blocks: what a
                # translator's gradient needs beyond is computed again on the way back.
                self._vae.enable_slicing()
                self._vae.enable_gradient_checkpointing()
        for model in (self._denoiser, self._vae):
            if model is not None:
                model.to(device).to(memory_format=self.memory_format)
        self.schedule = self.schedule.to(device)

    def encode(self, image: Tensor) -> Tensor:
        """Images to z; differentiable, in bounded memory.

        Args:
            image: float (B, 3, image_size, image_size) in [-1, 1].

        Returns:
            The images themselves, or the scaled mode of the VAE's distribution of latents, float32
            or wider, (B, channels, image_size / f, image_size / f).

        Raises:
            RuntimeError: a latent prior's, and `to` was not called.
        """
        if not self.latent:
            return image
        with torch.autocast(image.device.type, enabled=False):
            mode = self._loaded(self._vae).encode(image.to(self._vae_dtype)).latent_dist.mode()
        mode = mode.to(torch.promote_types(image.dtype, torch.float32))
        return (mode - self.latent_shift) * self.latent_scale

    def decode(self, z: Tensor) -> Tensor:
        """z to images (B, 3, image_size, image_size), about [-1, 1], float32 or wider.

        Raises:
            RuntimeError: a latent prior's, and `to` was not called.
        """
        if not self.latent:
            return z
        latent = z / self.latent_scale + self.latent_shift
        with torch.autocast(z.device.type, enabled=False):
            image = self._loaded(self._vae).decode(latent.to(self._vae_dtype)).sample
        return image.to(torch.promote_types(z.dtype, torch.float32))

    def embed(self, prompts: Sequence[str]) -> Embedding:
        """Embed prompts through the cache on disk; text encoders are loaded only for new ones.

        Args:
            prompts: any texts; '' gives the unconditional embedding, as the pipeline makes it. Of
                a class-conditional prior: classes, see there.

        Returns:
            On the CPU, a row a prompt: encoder_hidden_states, float32 (N, tokens, width), and
            where the pipeline has a pooled embedding that too, (N, width), and for SDXL time_ids
            (N, 6); or class_labels, int64 (N,).

        Raises:
            FileNotFoundError: a text encoder is needed, and missing.
            ImportError: its tokenizer needs sentencepiece, which is not installed.
            ValueError: an unknown class.
        """
        if not self.family.text_encoders:
            return Embedding({"class_labels": torch.tensor([self._class_id(p) for p in prompts])})
        files = [self._cache_file(prompt) for prompt in prompts]
        missing = {p: f for p, f in zip(prompts, files, strict=True) if not f.exists()}
        if missing:
            encoded = self._encode_text(list(missing))
            gc.collect()  # a T5-XXL is 19 GB: gone before the denoiser needs the room
            for row, file in zip(encoded, missing.values(), strict=True):
                file.parent.mkdir(parents=True, exist_ok=True)
                partial = file.with_suffix(f".{os.getpid()}.partial")
                save_file(row, partial)
                os.replace(partial, file)
        loaded = [load_file(file) for file in files]
        rows = {name: torch.stack([row[name] for row in loaded]) for name in loaded[0]}
        if "text_embeds" in rows:
            # SDXL is told the picture's size before cropping, the crop's corner, and the target's
            # size: here an uncropped picture of just this size [SDXL, Sec. 2.2].
            sizes = [self.image_size] * 2
            rows["time_ids"] = torch.tensor([*sizes, 0, 0, *sizes]).float().repeat(len(prompts), 1)
        return Embedding(rows)

    @torch.no_grad()
    def predict(self, z_t: Tensor, t: Tensor, embedding: Embedding) -> tuple[Tensor, Tensor]:
        """(eps, z_hat) of noisy z, unclipped; a learned variance is split off.

        Args:
            z_t: float32 or float64 (B, C, H, W); the conversion keeps that.
            t: times in (0, 1), float (B,).
            embedding: B rows.

        Raises:
            RuntimeError: `to` was not called.
        """
        return self._predict(z_t, t, embedding)

    def add_lora(self, rank: int) -> dict[str, torch.nn.Parameter]:
        """Add a LoRA to the denoiser's attention projections; one that is there is replaced.

        It begins the same every time, on every device.

        Args:
            rank: of the LoRA; its scale is 1.

        Returns:
            The LoRA's weights by name, float32; untrained they change nothing.

        Raises:
            RuntimeError: `to` was not called.
            ValueError: the denoiser has no attention.
        """
        from peft import LoraConfig, inject_adapter_in_model

        denoiser = self._loaded(self._denoiser)
        self._remove_lora()
        names = ["to_q", "to_k", "to_v", "to_out.0"]
        names += ["add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"]  # of the text, in some
        config = LoraConfig(r=rank, lora_alpha=rank, target_modules=names)
        try:
            # Not diffusers' add_adapter, which not every denoiser has.
            inject_adapter_in_model(config, denoiser, adapter_name="lora")
        except ValueError as error:
            raise ValueError(f"{self.pretrained}: no LoRA fits the denoiser: {error}") from error
        self._lora = {name: p for name, p in denoiser.named_parameters() if ".lora." in name}
        generator = torch.Generator().manual_seed(0)
        for name, weight in self._lora.items():
            weight.data = weight.data.float()  # whatever the denoiser's own dtype
            if ".lora_A." in name:  # peft draws from the state of the moment, on the device
                start = torch.empty(weight.shape)
                torch.nn.init.kaiming_uniform_(start, a=5**0.5, generator=generator)
                weight.data.copy_(start)
        self._switch_lora(False)
        return self._lora

    def predict_lora(self, z_t: Tensor, t: Tensor, embedding: Embedding) -> tuple[Tensor, Tensor]:
        """`predict` with the LoRA of `add_lora`; differentiable in its weights.

        Raises:
            RuntimeError: `to` or `add_lora` was not called.
        """
        self._loaded(self._denoiser)
        if not self._lora:
            raise RuntimeError("call prior.add_lora(rank) before predict_lora")
        self._switch_lora(True)
        try:
            return self._predict(z_t, t, embedding)
        finally:
            self._switch_lora(False)

    def _remove_lora(self) -> None:
        """Put the denoiser's own layers back; what peft knew of a LoRA is forgotten."""
        from peft.tuners.tuners_utils import BaseTunerLayer

        if not self._lora:
            return
        denoiser = self._loaded(self._denoiser)
        for name, module in list(denoiser.named_modules()):
            if isinstance(module, BaseTunerLayer):
                denoiser.set_submodule(name, module.get_base_layer())
        del denoiser.peft_config
        self._lora = {}

    def _switch_lora(self, on: bool) -> None:
        from peft.tuners.tuners_utils import BaseTunerLayer

        for module in self._loaded(self._denoiser).modules():
            if isinstance(module, BaseTunerLayer):
                module.enable_adapters(on)
        for weight in self._lora.values():
            weight.requires_grad_(True)  # which switching off has ended

    def _predict(self, z_t: Tensor, t: Tensor, embedding: Embedding) -> tuple[Tensor, Tensor]:
        denoiser = self._loaded(self._denoiser)
        # The prior runs in its own dtype, whatever autocast the trained network runs under.
        with torch.autocast(z_t.device.type, enabled=False):
            raw = denoiser(
                z_t.to(self.dtype),
                timestep=self.schedule.timestep(t),
                **self._conditions(embedding),
                return_dict=False,
            )[0]
        wide = torch.promote_types(z_t.dtype, torch.float32)
        alpha_t, sigma_t = self.schedule.coefficients(t, wide)
        return to_eps_and_z_hat(
            raw[:, : self.channels].to(wide), z_t.to(wide), alpha_t, sigma_t, self.prediction_type
        )

    def _conditions(self, embedding: Embedding) -> dict[str, Any]:
        """An embedding as keyword arguments of the denoiser."""
        given: dict[str, Any] = {
            name: value.to(self.dtype) if value.is_floating_point() else value
            for name, value in embedding.tensors.items()
        }
        if "text_embeds" in given:  # SDXL's U-Net has no arguments for these
            given["added_cond_kwargs"] = {n: given.pop(n) for n in ("text_embeds", "time_ids")}
        return given

    @torch.no_grad()
    def _encode_text(self, prompts: list[str]) -> list[dict[str, Tensor]]:
        """What the pipeline's own encode_prompt gives, in float32; nothing but text is loaded."""
        import diffusers

        encoders = [part for part in self.family.text_parts if part.startswith("text_encoder")]
        tokenizers = [part for part in self.family.text_parts if part.startswith("tokenizer")]
        self._fetch(*(f"{part}/*" for part in tokenizers))
        installed = importlib.util.find_spec("sentencepiece") is not None
        for part in tokenizers:
            files = {file.name for file in (self.folder / part).iterdir()}
            # DeepFloyd IF's tokenizer is published in this form alone.
            if "spiece.model" in files and "tokenizer.json" not in files and not installed:
                raise ImportError(
                    f"{self.pretrained}/{part} is in SentencePiece's format: "
                    "pip install sentencepiece protobuf"
                )
        self._fetch_weights(*encoders)
        parts = {
            part: self._class(part).from_pretrained(self.folder, subfolder=part)
            for part in tokenizers
        }
        for part in encoders:
            model = self._class(part)
            parts[part] = model.from_pretrained(
                self.folder, subfolder=part, dtype=torch.float32
            ).eval()
        pipeline_class = getattr(diffusers, self.index["_class_name"])
        known = inspect.signature(pipeline_class.__init__).parameters
        parts |= dict.fromkeys(
            name
            for name, parameter in known.items()
            if parameter.default is parameter.empty and name not in ("self", *parts)
        )
        for option in ("requires_safety_checker", "add_watermarker"):
            if option in known:
                parts[option] = False
        if "force_zeros_for_empty_prompt" in self.index:
            parts["force_zeros_for_empty_prompt"] = self.index["force_zeros_for_empty_prompt"]
        pipeline = pipeline_class(**parts)
        options: dict[str, Any] = {"device": torch.device("cpu"), "num_images_per_prompt": 1}
        asked = inspect.signature(pipeline.encode_prompt).parameters
        options |= dict.fromkeys({"prompt_2", "prompt_3"} & set(asked))  # as `prompt`
        rows = []
        for prompt in prompts:
            found = pipeline.encode_prompt(
                prompt, **options, do_classifier_free_guidance=prompt == ""
            )
            # (hidden, negative hidden), or those and (pooled, negative pooled).
            tensors = found[1::2] if prompt == "" else found[::2]
            names = ["encoder_hidden_states", *([self.family.pooled] if self.family.pooled else [])]
            rows.append({n: x[0].float().contiguous() for n, x in zip(names, tensors, strict=True)})
        return rows

    def _cache_file(self, prompt: str) -> Path:
        """One file a prior and prompt. The encoders' files are listed, never opened."""
        if Path(self.pretrained).is_dir():
            files = [
                file
                for part in self.family.text_parts
                for file in sorted(self.folder.glob(f"{part}/*"))
            ]
            version: Any = [(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in files]
            if "force_zeros_for_empty_prompt" in self.index:
                version.append(self.index["force_zeros_for_empty_prompt"])
        else:
            version = self.folder.name  # a hub snapshot's folder is named by its commit
        key = json.dumps([self.pretrained, version, prompt])
        return self.cache_dir / f"{hashlib.sha256(key.encode()).hexdigest()}.safetensors"

    def _class_id(self, prompt: str) -> int:
        if prompt not in self.classes:
            names = [name for name in self.classes if name and not name.isdigit()]
            numbers = [name for name in self.classes if name.isdigit()]
            known = ", ".join(map(repr, [*names[:10], *(["…"] if len(names) > 10 else [])]))
            raise ValueError(
                f"{self.pretrained}: no class {prompt!r}; known are {known + ', ' if known else ''}"
                f"the numbers {numbers[0]} to {numbers[-1]}, and '' for none"
            )
        return self.classes[prompt]

    def _read_classes(self, file: str, config: dict[str, Any]) -> dict[str, int]:
        """Prompts to class ids: '', the numbers, and the labels of model_index.json."""
        if self.family.denoiser == "transformer":
            null = self._number(file, config, "num_embeds_ada_norm")
        else:
            null = self._number(file, config, "num_class_embeds") - 1
        classes = {"": null} | {str(number): number for number in range(null + 1)}
        for number, labels in (self.index.get("id2label") or {}).items():
            classes |= {label.strip(): int(number) for label in labels.split(",")}
        return classes

    def _read_scheduler(self) -> None:
        scheduler = self._class("scheduler").from_pretrained(self.folder, subfolder="scheduler")
        if type(scheduler).__name__ == "FlowMatchEulerDiscreteScheduler":
            self.schedule = FlowSchedule(scheduler.config.num_train_timesteps)
            self.prediction_type = "flow"
            return
        if not hasattr(scheduler, "alphas_cumprod"):
            raise ValueError(
                f"{self.pretrained}/scheduler: {type(scheduler).__name__} is not supported; one "
                "with a DDPM grid (alphas_cumprod) or FlowMatchEulerDiscreteScheduler is"
            )
        self.schedule = Schedule(scheduler.alphas_cumprod)
        self.prediction_type = scheduler.config.prediction_type
        known = [kind for kind in get_args(PredictionType) if kind != "flow"]
        if self.prediction_type not in known:
            raise ValueError(
                f"{self.pretrained}/scheduler: unknown prediction_type {self.prediction_type!r}; "
                f"known are {', '.join(known)}"
            )

    def _read_vae_config(self) -> None:
        """image_size, and how latents are scaled: z = (latent − shift) · scale."""
        file = "vae/config.json"
        config = self._json(file)
        if self.index["vae"][1] != "AutoencoderKL":
            raise ValueError(
                f"{self.pretrained}: a {self.index['vae'][1]} is not supported; AutoencoderKL is"
            )
        if config.get("latents_mean") or config.get("latents_std"):
            raise ValueError(f"{self.pretrained}/{file}: latents_mean/_std are not supported")
        # What an old config does not say is as AutoencoderKL has it by default.
        latent_channels = config.get("latent_channels", 4)
        if latent_channels != self.channels:
            raise ValueError(
                f"{self.pretrained}: the vae's latents have {latent_channels} channels, the "
                f"{self.family.denoiser} takes {self.channels}"
            )
        self.latent_scale = config.get("scaling_factor", 0.18215)
        self.latent_shift = config.get("shift_factor") or 0.0
        self._vae_dtype = torch.float32 if config.get("force_upcast", True) else self.dtype
        self.image_size *= 2 ** (len(config.get("block_out_channels", [64])) - 1)

    def _loaded(self, model: Any) -> Any:
        if model is None:
            raise RuntimeError("call prior.to(device) before predict, encode or decode")
        return model

    def _load(self, part: str, dtype: torch.dtype) -> torch.nn.Module:
        model = self._class(part).from_pretrained(self.folder, subfolder=part, torch_dtype=dtype)
        return model.eval().requires_grad_(False)

    def _number(self, file: str, config: dict[str, Any], key: str) -> int:
        if not isinstance(config.get(key), int):
            raise ValueError(f"{self.pretrained}/{file}: no number for {key!r}")
        return config[key]

    def _class(self, part: str) -> Any:
        """The class that model_index.json names for a part of the pipeline."""
        import diffusers
        import transformers

        library, name = self.index[part]
        modules = {"diffusers": diffusers, "transformers": transformers}
        if library not in modules or not hasattr(modules[library], name):
            raise ValueError(f"{self.pretrained}/model_index.json: unknown {part} {library}.{name}")
        return getattr(modules[library], name)

    def _fetch(self, *patterns: str) -> Path:
        """The pipeline's folder, with the files of `patterns` in it if it comes from the hub."""
        folder = self._download(patterns)
        for pattern in patterns:
            if not any(folder.glob(pattern)):
                raise self._missing(pattern)
        return folder

    def _fetch_weights(self, *parts: str) -> Path:
        """The pipeline's folder, with the weights of `parts`; .bin where no safetensors are."""
        kinds = ("json", "safetensors")
        folder = self._download([f"{part}/*.{kind}" for part in parts for kind in kinds])
        old = [f"{part}/*.bin" for part in parts if not weight_files(folder / part)]
        if old:
            with contextlib.suppress(FileNotFoundError):
                self._download(old)
        for part in parts:
            if not weight_files(folder / part):
                raise self._missing(f"{part}/*.safetensors")
            for index in (folder / part).glob("*.safetensors.index.json"):
                for name in set(self._json(f"{part}/{index.name}")["weight_map"].values()):
                    if not (folder / part / name).exists():
                        raise self._missing(f"{part}/{name}")
        return folder

    def _download(self, patterns: Sequence[str]) -> Path:
        """The pipeline's folder; one of the hub's after fetching there what `patterns` name."""
        folder = Path(self.pretrained)
        if folder.is_dir():
            return folder
        if self.pretrained.count("/") != 1 or self.pretrained.startswith((".", "/")):
            raise FileNotFoundError(f"no such folder: {self.pretrained}")
        try:
            snapshot = snapshot_download(
                self.pretrained,
                revision=self._commit or self.revision,
                allow_patterns=list(patterns),
                ignore_patterns=list(VARIANTS),
                # Said here: huggingface_hub 1 asks the hub for a commit's files even offline.
                local_files_only=constants.HF_HUB_OFFLINE,
            )
        except GatedRepoError as error:
            raise PermissionError(
                f"{self.pretrained} is gated: accept its licence at "
                f"https://huggingface.co/{self.pretrained} (logged in there), then log in here "
                "with `hf auth login`, or set HF_TOKEN"
            ) from error
        except LocalEntryNotFoundError as error:
            raise self._missing(*patterns) from error
        except (OSError, ValueError) as error:
            raise FileNotFoundError(
                f"{self.pretrained} is no folder here, and the hub has no such model (or it is "
                f"private, and `hf auth login` was not done): {error}"
            ) from error
        # All parts from one commit, even if somebody pushes another one meanwhile.
        self._commit = Path(snapshot).name
        return Path(snapshot)

    def _missing(self, *patterns: str) -> FileNotFoundError:
        """The error for files that are not here: which, and how to get them."""
        files = ", ".join(patterns)
        if Path(self.pretrained).is_dir():
            return FileNotFoundError(
                f"{self.pretrained} has no {files}: not a whole diffusers folder"
            )
        wanted = ["*.json", "*/*.safetensors", "tokenizer*/*"]
        options = [f"--include '{pattern}'" for pattern in wanted]
        options += [f"--exclude '{pattern}'" for pattern in VARIANTS]
        if self.revision:
            options.insert(0, f"--revision {self.revision}")
        return FileNotFoundError(
            f"{self.pretrained}: {files} not downloaded, and the hub cannot be reached "
            "(no network, or HF_HUB_OFFLINE is set) or does not have it. Where there is network:\n"
            f"  hf download {self.pretrained} {' '.join(options)}"
        )

    def _json(self, name: str) -> dict[str, Any]:
        file = self.folder / name
        if not file.exists():
            raise self._missing(name)
        try:
            return json.loads(file.read_text())
        except json.JSONDecodeError as error:
            raise ValueError(f"{file} is not JSON: {error}") from error
