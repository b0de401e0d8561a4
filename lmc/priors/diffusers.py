"""DiffusersPrior, which speaks the Prior protocol for models in diffusers format."""

import copy
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from lmc.device import Compile, compile_in_place
from lmc.priors.families import (
    LatentSpace,
    read_classes,
    read_denoiser,
    read_family,
    read_latents,
    read_schedule,
)
from lmc.priors.identity import schedule_identity
from lmc.priors.lora import add_lora, lora_layers, remove_lora, switch_lora
from lmc.priors.prompts import TextPrompts, class_ids
from lmc.priors.protocol import Embedding
from lmc.priors.weights import ModelFolder, PipelineFolder
from lmc.schedule import to_eps_and_z_hat

Dtype = Literal["float32", "bfloat16", "float16"]


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
        compile: torch.compile the denoiser, true ('default') or 'reduce-overhead': slow first
            steps, then faster ones.
        channels_last: memory format of the denoiser and the VAE.
        vae: another VAE of the same latents in place of the pipeline's own, a folder or hub id of
            an AutoencoderKL or AutoencoderTiny, such as madebyollin/taesd for Stable Diffusion 1.x
            and 2.x: its encoder, of which stage two needs three passes an image, costs a small part
            of the other's. What it keeps of a picture is less; a corrector is of one VAE.
        vae_dtype: of the VAE, in place of what is said above.
        vae_slicing: a picture at a time through the VAE, in less memory.
        vae_checkpointing: of the VAE's activations keep only those between its blocks: what a
            translator's gradient needs beyond is computed again on the way back, in a third pass.

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
        compile: Compile = False,
        channels_last: bool = True,
        vae: str | None = None,
        vae_dtype: Dtype | None = None,
        vae_slicing: bool = True,
        vae_checkpointing: bool = True,
    ) -> None:
        for name, given in (("dtype", dtype), ("vae_dtype", vae_dtype or dtype)):
            if given not in get_args(Dtype):
                known = ", ".join(get_args(Dtype))
                raise ValueError(f"unknown {name} {given!r}; known are {known}")
        self.pretrained, self.revision = pretrained, revision
        self.dtype: torch.dtype = getattr(torch, dtype)
        self.compile = compile
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self._files = PipelineFolder(pretrained, revision)
        self.folder, self.index = self._files.path, self._files.index
        self.family = read_family(self._files)
        self.channels, self.image_size = read_denoiser(self._files, self.family)
        self.latent = self.family.latent
        self._vae_files, self._vae_part = self._files, "vae"
        latents = LatentSpace()
        if vae is not None and not self.latent:
            raise ValueError(f"vae {vae!r}: {pretrained} is a prior of pixels, without a VAE")
        if vae is not None:
            self._vae_files, self._vae_part = ModelFolder(vae), ""
        if self.latent:
            latents = read_latents(self._vae_files, self._vae_part, self.channels)
        self.vae_slicing, self.vae_checkpointing = vae_slicing, vae_checkpointing
        self.z_size = self.image_size  # the side of z
        self.image_size *= latents.factor
        self.latent_scale, self.latent_shift = latents.scale, latents.shift
        own = torch.float32 if latents.upcast else self.dtype
        self._vae_dtype: torch.dtype = own if vae_dtype is None else getattr(torch, vae_dtype)
        self.schedule, self.prediction_type = read_schedule(self._files)
        self.classes = read_classes(self._files, self.family, classes)
        default = os.environ.get("LMC_CACHE", Path.home() / ".cache" / "lmc")
        self.cache_dir = Path(cache_dir or default) / "embeddings"
        self._texts = TextPrompts(self._files, self.family, self.cache_dir)
        self._denoiser: torch.nn.Module | None = None
        self._vae: Any = None
        self._lora: dict[str, torch.nn.Parameter] = {}
        self._lora_layers: list[Any] = []
        self._copy: Any = None  # in place of a LoRA

    @property
    def identity(self) -> dict[str, Any]:
        """What tells it from others, in plain values; see `lmc.priors.check_identity`.

        Where it comes from (pretrained, revision), prediction_type, schedule, image_size, channels
        and the `digest` of the denoiser's weights; of a latent prior, latent_scale, latent_shift
        and the digest of its vae's weights too. Weights are read for it, once a process.

        Raises:
            FileNotFoundError: weights are missing.
        """
        of_latents = {}
        if self.latent:
            of_latents = {
                "latent_scale": self.latent_scale,
                "latent_shift": self.latent_shift,
                "vae": self._vae_files.digest(self._vae_part),
            }
        return {
            "pretrained": self.pretrained,
            "revision": self.revision,
            "prediction_type": self.prediction_type,
            "schedule": schedule_identity(self.schedule),
            "image_size": self.image_size,
            "channels": self.channels,
            **of_latents,
            "digest": self._files.digest(self.family.denoiser),
        }

    def to(self, device: torch.device | str) -> None:
        """Load the denoiser, and the VAE if there is one, unless done; move them to `device`.

        Raises:
            FileNotFoundError: weights are missing; nothing is loaded then.
        """
        if self._denoiser is None:
            part = self.family.denoiser
            own_vae = self.latent and self._vae_files is self._files
            self._files.fetch_weights(part, *(["vae"] if own_vae else []))
            if self.latent and not own_vae:
                self._vae_files.fetch_weights(self._vae_part)
            self._denoiser = self._load(self._files, part, self.dtype)
            compile_in_place(self._denoiser, self.compile)
            if self.latent:
                self._vae = self._load(self._vae_files, self._vae_part, self._vae_dtype)
                if self.vae_slicing:
                    self._vae.enable_slicing()
                # An AutoencoderTiny is small, and where it is checkpointed its encoder leaves out
                # the step from [-1, 1] to [0, 1] in diffusers 0.42.
                if self.vae_checkpointing and type(self._vae).__name__ != "AutoencoderTiny":
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
            encoded = self._loaded(self._vae).encode(image.to(self._vae_dtype))
        # An AutoencoderTiny has no distribution.
        mode = encoded.latents if "latents" in encoded else encoded.latent_dist.mode()
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

        Warns:
            Of words that a text encoder's tokenizer does not know, once a prompt.
        """
        if not self.family.text_encoders:
            ids = class_ids(self.pretrained, self.classes, prompts)
            return Embedding({"class_labels": ids})
        rows = self._texts.embed(prompts)
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

    def add_lora(self, rank: int | None) -> dict[str, torch.nn.Parameter]:
        """Add a LoRA to the denoiser's attention projections; one that is there is replaced.

        It begins the same every time, on every device.

        Args:
            rank: of the LoRA; its scale is 1. None: in place of a LoRA a copy of the denoiser.

        Returns:
            The LoRA's weights by name, float32; untrained they change nothing.

        Raises:
            RuntimeError: `to` was not called.
            ValueError: the denoiser has no attention.
        """
        denoiser = self._loaded(self._denoiser)
        if self._lora and self._copy is None:
            remove_lora(denoiser)
        self._lora, self._copy = {}, None
        if rank is None:
            self._copy = copy.deepcopy(denoiser).float().requires_grad_(True)
            self._lora = dict(self._copy.named_parameters())
            return self._lora
        try:
            self._lora = add_lora(denoiser, rank)
        except ValueError as error:
            raise ValueError(f"{self.pretrained}: no LoRA fits the denoiser: {error}") from error
        self._lora_layers = lora_layers(denoiser)
        return self._lora

    def predict_lora(self, z_t: Tensor, t: Tensor, embedding: Embedding) -> tuple[Tensor, Tensor]:
        """`predict` with the LoRA of `add_lora`; differentiable in its weights.

        Raises:
            RuntimeError: `to` or `add_lora` was not called.
        """
        if not self._lora:
            raise RuntimeError("call prior.add_lora(rank) before predict_lora")
        if self._copy is not None:
            return self._predict(z_t, t, embedding, self._copy, torch.float32)
        switch_lora(self._lora_layers, self._lora, True)
        try:
            return self._predict(z_t, t, embedding)
        finally:
            switch_lora(self._lora_layers, self._lora, False)

    def _predict(
        self,
        z_t: Tensor,
        t: Tensor,
        embedding: Embedding,
        other: Any = None,
        dtype: torch.dtype | None = None,
    ) -> tuple[Tensor, Tensor]:
        """(eps, z_hat) of the denoiser, or of another one of its kind in a dtype of its own."""
        denoiser, dtype = other or self._loaded(self._denoiser), dtype or self.dtype
        # The prior runs in its own dtype, whatever autocast the trained network runs under.
        with torch.autocast(z_t.device.type, enabled=False):
            raw = denoiser(
                z_t.to(dtype),
                timestep=self.schedule.timestep(t),
                **self._conditions(embedding, dtype),
                return_dict=False,
            )[0]
        wide = torch.promote_types(z_t.dtype, torch.float32)
        alpha_t, sigma_t = self.schedule.coefficients(t, wide)
        return to_eps_and_z_hat(
            raw[:, : self.channels].to(wide), z_t.to(wide), alpha_t, sigma_t, self.prediction_type
        )

    def _conditions(self, embedding: Embedding, dtype: torch.dtype) -> dict[str, Any]:
        """An embedding as keyword arguments of the denoiser."""
        given: dict[str, Any] = {
            name: value.to(dtype) if value.is_floating_point() else value
            for name, value in embedding.tensors.items()
        }
        if "text_embeds" in given:  # SDXL's U-Net has no arguments for these
            given["added_cond_kwargs"] = {n: given.pop(n) for n in ("text_embeds", "time_ids")}
        return given

    def _loaded(self, model: Any) -> Any:
        if model is None:
            raise RuntimeError("call prior.to(device) before predict, encode or decode")
        return model

    def _load(self, files: PipelineFolder, part: str, dtype: torch.dtype) -> torch.nn.Module:
        model = files.class_of(part).from_pretrained(
            files.path, subfolder=part or None, torch_dtype=dtype
        )
        return model.eval().requires_grad_(False)
