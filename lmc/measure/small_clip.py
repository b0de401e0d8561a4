"""A small CLIP to be trained from scratch on labelled pictures, in transformers' own format.

It judges what ViT-B/16 cannot be had for: R-Precision and CLIP score among the captions that it was
trained on. An ordinary `CLIPModel` folder with its processor: the very code that loads
openai/clip-vit-base-patch16 loads it.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from torch import Tensor
from torch.nn import functional as F
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

from lmc.errors import require
from lmc.files import whole_folder
from lmc.perturbations import blur

TEXT_LENGTH = 32
GREATEST_SCALE = 100.0  # of the cosines, CLIP's own bound
GREY = (0.299, 0.587, 0.114)


class SmallClip(torch.nn.Module):
    """Two towers: cosines of pictures and captions, times a learned scale.

    Args:
        captions: of the classes; their words are the tokenizer's, beside single bytes.
        size: the side of the pictures in pixels.
        patch: of the vision transformer, in pixels; it divides the size.
        width: of the vision transformer, a multiple of 8.
        layers: of the vision transformer; the text's has half as many.
        embedding: dimensions in which both meet.

    Raises:
        ValueError: a number makes no sense, or a caption is too long.
    """

    def __init__(
        self,
        captions: Sequence[str],
        size: int = 64,
        patch: int = 8,
        width: int = 144,
        layers: int = 4,
        embedding: int = 64,
    ) -> None:
        super().__init__()
        require(patch >= 1 and size % patch == 0, "patch", f"a divisor of the size {size}", patch)
        require(width >= 8 and width % 8 == 0, "width", "a multiple of 8", width)
        require(layers >= 1, "layers", "at least 1", layers)
        require(embedding >= 1, "embedding", "at least 1", embedding)
        self.arguments: dict[str, Any] = {
            "captions": list(captions),
            "size": size,
            "patch": patch,
            "width": width,
            "layers": layers,
            "embedding": embedding,
        }
        tokenizer = build_tokenizer(captions)
        images = CLIPImageProcessor(
            size={"shortest_edge": size}, crop_size={"height": size, "width": size}
        )
        self.processor = CLIPProcessor(image_processor=images, tokenizer=tokenizer)
        special = {
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,  # where CLIPTextModel pools
            "pad_token_id": tokenizer.pad_token_id,
        }
        text = {
            "vocab_size": len(tokenizer),
            "hidden_size": 64,
            "intermediate_size": 256,
            "num_hidden_layers": max(1, layers // 2),
            "num_attention_heads": 4,
            "max_position_embeddings": TEXT_LENGTH,
            "projection_dim": embedding,
        }
        vision = {
            "image_size": size,
            "patch_size": patch,
            "hidden_size": width,
            "intermediate_size": 4 * width,
            "num_hidden_layers": layers,
            "num_attention_heads": 4,
            "projection_dim": embedding,
        }
        self.model = CLIPModel(
            CLIPConfig(text_config=text | special, vision_config=vision, projection_dim=embedding)
        )
        tokens = tokenizer(list(captions), padding=True, return_tensors="pt")
        longest = tokens.input_ids.shape[1]
        require(longest <= TEXT_LENGTH, "captions", f"of {TEXT_LENGTH} tokens at most", longest)
        self.register_buffer("ids", tokens.input_ids, persistent=False)
        self.register_buffer("mask", tokens.attention_mask, persistent=False)
        for name in ("mean", "std"):
            values = torch.tensor(getattr(images, f"image_{name}"))[:, None, None]
            self.register_buffer(name, values, persistent=False)
        self.mean: Tensor
        self.std: Tensor

    def forward(self, image: Tensor) -> Tensor:
        """Scaled cosines with the captions.

        The captions compete, one a class: pictures of one class do not repel each other's.

        Args:
            image: float (B, 3, size, size) in [-1, 1].

        Returns:
            (B, number of captions).
        """
        pixels = (image / 2 + 0.5 - self.mean) / self.std
        out = self.model(pixel_values=pixels, input_ids=self.ids, attention_mask=self.mask)
        return out.logits_per_image

    @torch.no_grad()
    def bound_scale(self) -> None:
        """Keep the cosines' scale at 100 at most, as CLIP does."""
        self.model.logit_scale.clamp_(max=torch.tensor(GREATEST_SCALE).log().item())

    def save(self, folder: Path) -> None:
        """Write it as a model folder of half precision; one that is there is replaced."""
        copy = CLIPModel(self.model.config)
        copy.load_state_dict(self.model.state_dict())
        with whole_folder(folder) as partial:
            copy.half().save_pretrained(partial)
            self.processor.save_pretrained(partial)


def build_tokenizer(captions: Sequence[str]) -> CLIPTokenizer:
    """A CLIP tokenizer whose merges make whole words of the captions' words.

    As in OpenAI's vocabulary, every byte comes twice, inside a word and at its end, so that any
    text tokenises, and the two special tokens come last.
    """
    letters = sorted(ByteLevel.alphabet())
    alphabet = letters + [f"{letter}</w>" for letter in letters]
    backend = CLIPTokenizer(vocab={"<|endoftext|>": 0, "<|startoftext|>": 1}).backend_tokenizer
    backend.train_from_iterator(
        list(captions), BpeTrainer(end_of_word_suffix="</w>", vocab_size=2000, show_progress=False)
    )
    merges: Any = [tuple(merge) for merge in json.loads(backend.to_str())["model"]["merges"]]
    pieces = dict.fromkeys(alphabet + [a + b for a, b in merges])
    vocab = {piece: i for i, piece in enumerate([*pieces, "<|startoftext|>", "<|endoftext|>"])}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=TEXT_LENGTH)


# ---------------------------------------------------------------------------------------------
# What a generator might make of pictures. It judges those, and must not fail on a blur.


def augment(x: Tensor, generator: torch.Generator) -> Tensor:
    """Pictures misplaced, of other colours, blurred, of half the size, and noisy.

    Args:
        x: float (B, 3, S, S) in [-1, 1], S even.
        generator: on their device.

    Returns:
        As x.
    """
    many = (len(x), 1, 1, 1)
    x = _recoloured(_moved(x, generator), generator)
    x = blur(x, 1.5 / x.shape[-1] * _rand(x, (len(x),), generator), generator)  # of 1.5 pixels
    x = torch.where(_rand(x, many, generator) < 0.4, halved(x), x)
    amount = 0.2 * _rand(x, many, generator) ** 2
    eps = torch.randn(x.shape, generator=generator, device=x.device, dtype=x.dtype)
    return (x + amount * eps).clamp(-1, 1)


def halved(x: Tensor) -> Tensor:
    """Down to half the size and up again, as a smaller generator's; (B, 3, S, S) to the same."""
    return F.interpolate(
        F.interpolate(x, scale_factor=0.5, mode="area"), scale_factor=2, mode="bicubic"
    )


def _moved(x: Tensor, generator: torch.Generator) -> Tensor:
    """Mirrored, turned by up to 9 degrees, scaled by a tenth, shifted by 4 % of the side."""
    flip, angle, scale, dx, dy = 2 * _rand(x, (5, len(x)), generator) - 1
    angle, scale = 0.15 * angle, 1 + 0.1 * scale
    flip = torch.where(flip < 0, -1.0, 1.0)
    cos, sin = scale * torch.cos(angle), scale * torch.sin(angle)
    rows = torch.stack((cos * flip, -sin, 0.08 * dx, sin * flip, cos, 0.08 * dy), 1)
    grid = F.affine_grid(rows.view(-1, 2, 3), list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, padding_mode="reflection", align_corners=False)


def _recoloured(x: Tensor, generator: torch.Generator) -> Tensor:
    """Of other brightness, contrast, saturation and tint."""
    u = 2 * _rand(x, (6, len(x), 1, 1, 1), generator) - 1
    grey = (x * x.new_tensor(GREY)[:, None, None]).sum(1, keepdim=True)
    x = torch.lerp(grey, x, 0.9 + 0.6 * u[0])
    tint = 0.12 * u[1:4, :, 0, 0, 0].T[..., None, None]
    return x * (1 + 0.3 * u[4]) + 0.2 * u[5] + tint


def _rand(x: Tensor, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.rand(shape, generator=generator, device=x.device, dtype=x.dtype)
