"""The Prior protocol, and DiffusersPrior, which speaks it for models in diffusers format.

The only file that imports diffusers. It knows no loss, and guidance stays outside.
"""

import gc
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

import torch
from huggingface_hub import snapshot_download
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from lmc.schedule import PredictionType, Schedule, to_eps_and_z_hat

Dtype = Literal["float32", "bfloat16", "float16"]


@dataclass(frozen=True)
class Embedding:
    """What a prior needs to know of some prompts: named tensors, the first axis counting prompts.

    The names are the prior's own business (for a U-Net, the keyword arguments of its forward).
    """

    tensors: Mapping[str, Tensor]

    def __getitem__(self, index: Tensor) -> "Embedding":
        """The rows `index` (int64 (B,)), for a batch that names its prompts by number."""
        return Embedding({name: value[index] for name, value in self.tensors.items()})

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
        schedule: alpha_t and sigma_t.
        identity: plain values that tell one prior from another; `digest` is compared.
    """

    image_size: int
    channels: int
    schedule: Schedule
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
        """(eps, z_hat) for noisy z_t (B, C, H, W) at times t (B,): fp32 or wider, no gradient."""
        ...


class DiffusersPrior:
    """A pixel-space text-to-image prior in diffusers format: DeepFloyd IF's first stage, say.

    Constructing it reads and checks the folder's JSON files; weights are loaded by `to`, and the
    text encoder by `embed` alone, only for prompts that are not in the cache yet.

    Args:
        pretrained: a pipeline folder (with model_index.json), or a hub id.
        revision: of a hub id; None is its main branch.
        dtype: of the denoiser. Predictions are converted to eps and z_hat in float32 always.
        cache_dir: where prompt embeddings are kept; default $LMC_CACHE, else ~/.cache/lmc.

    Raises:
        FileNotFoundError: the folder or a part of it is missing.
        ValueError: a kind of pipeline that is not supported, or an unknown option.
    """

    def __init__(
        self,
        pretrained: str,
        revision: str | None = None,
        dtype: Dtype = "float32",
        cache_dir: str | None = None,
    ) -> None:
        if dtype not in get_args(Dtype):
            raise ValueError(f"unknown dtype {dtype!r}; known are {', '.join(get_args(Dtype))}")
        self.pretrained, self.revision = pretrained, revision
        self.dtype: torch.dtype = getattr(torch, dtype)
        default = os.environ.get("LMC_CACHE", Path.home() / ".cache" / "lmc")
        self.cache_dir = Path(cache_dir or default) / "embeddings"
        self.folder = self._fetch("model_index.json", "*/*config.json")
        self.index: dict[str, Any] = self._json("model_index.json")
        if "unet" not in self.index or "vae" in self.index:
            raise ValueError(
                f"{pretrained}: {self.index.get('_class_name')} is not supported; "
                "a pixel-space pipeline with a unet and no vae is (IFPipeline)"
            )
        unet = self._json("unet/config.json")
        for key in ("sample_size", "in_channels", "out_channels"):
            if not isinstance(unet.get(key), int):
                raise ValueError(f"{pretrained}/unet/config.json: no number for {key!r}")
        self.image_size: int = unet["sample_size"]
        self.channels: int = unet["in_channels"]
        if unet["out_channels"] not in (self.channels, 2 * self.channels):
            raise ValueError(
                f"{pretrained}/unet/config.json: out_channels {unet['out_channels']} is neither "
                f"in_channels {self.channels} nor, with a learned variance, twice that"
            )
        scheduler = self._class("scheduler").from_pretrained(self.folder, subfolder="scheduler")
        if not hasattr(scheduler, "alphas_cumprod"):
            raise ValueError(
                f"{pretrained}/scheduler: {type(scheduler).__name__} is not supported; "
                "one with a DDPM grid (alphas_cumprod) is"
            )
        self.schedule = Schedule(scheduler.alphas_cumprod)
        self.prediction_type: PredictionType = scheduler.config.prediction_type
        known = [kind for kind in get_args(PredictionType) if kind != "flow"]
        if self.prediction_type not in known:
            raise ValueError(
                f"{pretrained}/scheduler: unknown prediction_type {self.prediction_type!r}; "
                f"known are {', '.join(known)}"
            )
        self._denoiser: torch.nn.Module | None = None
        self._digest: str | None = None

    @property
    def identity(self) -> dict[str, Any]:
        """pretrained, revision, prediction_type, image_size, channels and the weights' digest."""
        if self._digest is None:
            self._digest = weights_digest(self._fetch("unet/*.safetensors") / "unet")
        return {
            "pretrained": self.pretrained,
            "revision": self.revision,
            "prediction_type": self.prediction_type,
            "image_size": self.image_size,
            "channels": self.channels,
            "digest": self._digest,
        }

    def to(self, device: torch.device | str) -> None:
        """Load the denoiser if that has not happened, move it to `device`."""
        if self._denoiser is None:
            self._fetch("unet/*")
            unet = self._class("unet").from_pretrained(
                self.folder, subfolder="unet", torch_dtype=self.dtype
            )
            self._denoiser = unet.eval().requires_grad_(False)
        self._denoiser.to(device).to(memory_format=torch.channels_last)
        self.schedule = Schedule(self.schedule.alphas_cumprod.to(device))

    def encode(self, image: Tensor) -> Tensor:
        """The image itself: this prior works on pixels."""
        return image

    def decode(self, z: Tensor) -> Tensor:
        """z itself: this prior works on pixels."""
        return z

    def embed(self, prompts: Sequence[str]) -> Embedding:
        """Embed prompts through the cache on disk; the text encoder is loaded only for new ones.

        Args:
            prompts: any texts; '' gives the unconditional embedding.

        Returns:
            encoder_hidden_states, float32 (len(prompts), tokens, width), on the CPU.
        """
        files = [self._cache_file(prompt) for prompt in prompts]
        missing = {p: f for p, f in zip(prompts, files, strict=True) if not f.exists()}
        if missing:
            hidden = self._encode_text(list(missing))
            for row, file in zip(hidden, missing.values(), strict=True):
                file.parent.mkdir(parents=True, exist_ok=True)
                partial = file.with_suffix(f".{os.getpid()}.partial")
                save_file({"encoder_hidden_states": row.contiguous()}, partial)
                os.replace(partial, file)
        rows = [load_file(file)["encoder_hidden_states"] for file in files]
        return Embedding({"encoder_hidden_states": torch.stack(rows)})

    @torch.no_grad()
    def predict(self, z_t: Tensor, t: Tensor, embedding: Embedding) -> tuple[Tensor, Tensor]:
        """(eps, z_hat) of noisy pictures, unclipped; a learned variance is split off.

        Args:
            z_t: float32 (B, C, H, W).
            t: times in (0, 1), float32 (B,).
            embedding: B rows.

        Raises:
            RuntimeError: `to` was not called.
        """
        if self._denoiser is None:
            raise RuntimeError("call prior.to(device) before predict")
        given = {name: value.to(self.dtype) for name, value in embedding.tensors.items()}
        # The prior runs in its own dtype, whatever autocast the trained network runs under.
        with torch.autocast(z_t.device.type, enabled=False):
            raw = self._denoiser(
                z_t.to(self.dtype), self.schedule.timestep(t), **given, return_dict=False
            )[0]
        raw = raw[:, : self.channels].float()
        alpha_t, sigma_t = self.schedule.coefficients(t, torch.float32)
        return to_eps_and_z_hat(raw, z_t.float(), alpha_t, sigma_t, self.prediction_type)

    @torch.no_grad()
    def _encode_text(self, prompts: list[str]) -> Tensor:
        self._fetch("tokenizer/*", "text_encoder/*")
        tokenizer = self._class("tokenizer").from_pretrained(self.folder, subfolder="tokenizer")
        encoder = self._class("text_encoder").from_pretrained(
            self.folder, subfolder="text_encoder", dtype=torch.float32
        )
        # As the pipeline itself does it: stripped lower case, padded to 77 tokens [IFPipeline].
        tokens = tokenizer(
            [prompt.lower().strip() for prompt in prompts],
            padding="max_length",
            max_length=77,
            truncation=True,
            return_tensors="pt",
        )
        hidden = encoder.eval()(tokens.input_ids, attention_mask=tokens.attention_mask)[0].float()
        del encoder  # a T5-XXL is 11 GB: gone before the denoiser needs the room
        gc.collect()
        return hidden

    def _cache_file(self, prompt: str) -> Path:
        """One file a prior and prompt. The encoder's files are listed, never opened."""
        if Path(self.pretrained).is_dir():
            parts = sorted(self.folder.glob("text_encoder/*")) + sorted(
                self.folder.glob("tokenizer/*")
            )
            version: Any = [(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in parts]
        else:
            version = self.folder.name  # a hub snapshot's folder is named by its commit
        key = json.dumps([self.pretrained, version, prompt])
        return self.cache_dir / f"{hashlib.sha256(key.encode()).hexdigest()}.safetensors"

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
        folder = Path(self.pretrained)
        if not folder.is_dir():
            if self.pretrained.count("/") != 1 or self.pretrained.startswith((".", "/")):
                raise FileNotFoundError(f"no such folder: {self.pretrained}")
            try:
                snapshot = snapshot_download(
                    self.pretrained, revision=self.revision, allow_patterns=list(patterns)
                )
            except (OSError, ValueError) as error:
                raise FileNotFoundError(
                    f"{self.pretrained} is no folder here, and the hub has no such model: {error}"
                ) from error
            folder = Path(snapshot)
        for pattern in patterns:
            if not any(folder.glob(pattern)):
                raise FileNotFoundError(f"{folder} has no {pattern}: not a whole diffusers folder")
        return folder

    def _json(self, name: str) -> dict[str, Any]:
        file = self.folder / name
        if not file.exists():
            raise FileNotFoundError(f"{file} is missing: not a whole diffusers folder")
        try:
            return json.loads(file.read_text())
        except json.JSONDecodeError as error:
            raise ValueError(f"{file} is not JSON: {error}") from error


def weights_digest(folder: Path) -> str:
    """SHA-256 over all tensors of the safetensors files in `folder`, as half precision.

    As half precision and by tensor, so that the fp16 and fp32 files of one model, however they are
    cut into shards, have one digest.
    """
    where: dict[str, Path] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            where |= dict.fromkeys(tensors.keys(), file)
    digest = hashlib.sha256()
    for name in sorted(where):
        with safe_open(where[name], "pt") as tensors:
            value = tensors.get_tensor(name).to(torch.float16).contiguous()
        digest.update(name.encode())
        digest.update(value.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
