"""Train the demo's judge: a small CLIP model of the drawn animals, 64 x 64 pixels.

It is written as an ordinary transformers `CLIPModel` folder with its `CLIPProcessor`, so that the
very code that loads openai/clip-vit-base-patch16 loads it. As it is meant for generated pictures,
it learns from drawings that are blurred, noisy, of odd colours and slightly misplaced.

    OMP_NUM_THREADS=1 python data/demo/train_clip.py --out data/demo/clip

takes about ten minutes on one CPU core; a run that was stopped goes on with the same command.
"""

import argparse
import json
import math
import os
import shutil
from pathlib import Path

import torch
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from torch import Tensor
from torch.nn import functional as F
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

from animals import CLASSES, caption, draw
from loop import Loop

SIZE = 64
TEXT_LENGTH = 16
EMBEDDING = 64
CAPTIONS = [caption(i) for i in range(len(CLASSES))]
GREY = (0.299, 0.587, 0.114)
MAX_LOGIT_SCALE = math.log(100)  # CLIP's own bound


# ---------------------------------------------------------------------------------------------
# The model and its processor


def build_tokenizer() -> CLIPTokenizer:
    """A CLIP tokenizer whose merges make whole words of the captions' words.

    As in OpenAI's vocabulary, every byte comes twice, inside a word and at its end, so that any
    text tokenises, and the two special tokens come last.
    """
    letters = sorted(ByteLevel.alphabet())
    alphabet = letters + [f"{letter}</w>" for letter in letters]
    backend = CLIPTokenizer(vocab={"<|endoftext|>": 0, "<|startoftext|>": 1}).backend_tokenizer
    backend.train_from_iterator(
        CAPTIONS, BpeTrainer(end_of_word_suffix="</w>", vocab_size=1000, show_progress=False)
    )
    merges = [tuple(merge) for merge in json.loads(backend.to_str())["model"]["merges"]]
    pieces = dict.fromkeys(alphabet + [a + b for a, b in merges])
    pieces = [*pieces, "<|startoftext|>", "<|endoftext|>"]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=TEXT_LENGTH)


def build_processor() -> CLIPProcessor:
    """Tokenizer, and image processor with CLIP's own mean and standard deviation."""
    image_processor = CLIPImageProcessor(
        size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE}
    )
    return CLIPProcessor(image_processor=image_processor, tokenizer=build_tokenizer())


def build_model(tokenizer: CLIPTokenizer) -> CLIPModel:
    """A four-layer vision transformer of 8-pixel patches and a two-layer text transformer."""
    special = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,  # where CLIPTextModel pools: its first position
        "pad_token_id": tokenizer.pad_token_id,
    }
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": 64,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": TEXT_LENGTH,
        "projection_dim": EMBEDDING,
    }
    vision = {
        "image_size": SIZE,
        "patch_size": 8,
        "hidden_size": 144,
        "intermediate_size": 576,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "projection_dim": EMBEDDING,
    }
    return CLIPModel(
        CLIPConfig(text_config=text | special, vision_config=vision, projection_dim=EMBEDDING)
    )


# ---------------------------------------------------------------------------------------------
# Pictures


def picture_table(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """`count` pictures as uint8 (count, 3, SIZE, SIZE) and their class ids, int64 (count,)."""
    labels = torch.arange(count) % len(CLASSES)
    seeds = torch.arange(count) + seed
    pictures = [
        to_bytes(draw(la, se, SIZE))
        for la, se in zip(labels.split(256), seeds.split(256), strict=True)
    ]
    return torch.cat(pictures), labels


def to_bytes(pictures: Tensor) -> Tensor:
    """Pictures in [-1, 1] (clipped) as uint8, same shape."""
    return ((pictures.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def move(x: Tensor, random: torch.Generator) -> Tensor:
    """Flip, turn, scale and shift every picture at random; (B, 3, S, S) -> same."""
    flip, angle, scale, dx, dy = torch.rand(5, len(x), generator=random) * 2 - 1
    angle, scale = 0.15 * angle, 1 + 0.1 * scale
    flip = torch.where(flip < 0, -1.0, 1.0)
    cos, sin = scale * torch.cos(angle), scale * torch.sin(angle)
    rows = torch.stack((cos * flip, -sin, 0.08 * dx, sin * flip, cos, 0.08 * dy), 1)
    grid = F.affine_grid(rows.view(-1, 2, 3), list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, padding_mode="reflection", align_corners=False)


def blur(x: Tensor, sigma: Tensor) -> Tensor:
    """Gaussian blur of (B, 3, S, S), picture i by `sigma[i]` pixels."""
    taps = torch.arange(-4, 5.0)
    kernel = torch.exp(-0.5 * (taps / sigma.clamp(min=0.05)[:, None]) ** 2)
    kernel = (kernel / kernel.sum(1, keepdim=True)).repeat_interleave(3, 0)[:, None, None]
    b, c, h, w = x.shape
    x = F.pad(x, (4, 4, 4, 4), mode="reflect").view(1, b * c, h + 8, w + 8)
    x = F.conv2d(F.conv2d(x, kernel, groups=b * c), kernel.mT, groups=b * c)
    return x.view(b, c, h, w)


def recolour(x: Tensor, random: torch.Generator) -> Tensor:
    """Change brightness, contrast, saturation and tint of every picture; (B, 3, S, S) -> same."""
    u = torch.rand(6, len(x), 1, 1, 1, generator=random) * 2 - 1
    grey = (x * torch.tensor(GREY)[:, None, None]).sum(1, keepdim=True)
    x = torch.lerp(grey, x, 0.9 + 0.6 * u[0])
    tint = 0.12 * u[1:4, :, 0, 0, 0].T[..., None, None]
    return x * (1 + 0.3 * u[4]) + 0.2 * u[5] + tint


def augment(x: Tensor, random: torch.Generator) -> Tensor:
    """What a generator might make of pictures in [-1, 1]; (B, 3, SIZE, SIZE) -> same."""
    b = len(x)
    x = recolour(move(x, random), random)
    x = blur(x, 1.5 * torch.rand(b, generator=random))
    small = F.interpolate(x, scale_factor=0.5, mode="area")
    small = F.interpolate(small, scale_factor=2, mode="bicubic")
    x = torch.where(torch.rand(b, 1, 1, 1, generator=random) < 0.4, small, x)
    noise = 0.2 * torch.rand(b, 1, 1, 1, generator=random) ** 2
    return (x + noise * torch.randn(x.shape, generator=random)).clamp(-1, 1)


# ---------------------------------------------------------------------------------------------
# Zero-shot classification


@torch.no_grad()
def cosines(folder: Path, pictures: Tensor) -> Tensor:
    """Cosine of every picture with every caption, by the model saved in `folder`.

    Pictures uint8 (N, 3, H, W) -> float32 (N, 9), columns as CLASSES.
    """
    model = CLIPModel.from_pretrained(folder, dtype=torch.float32).eval()
    processor = CLIPProcessor.from_pretrained(folder)
    rows = []
    for batch in pictures.split(250):
        inputs = processor(text=CAPTIONS, images=list(batch), padding=True, return_tensors="pt")
        out = model(**inputs)
        rows.append(out.image_embeds @ out.text_embeds.T)
    return torch.cat(rows)


def zero_shot(folder: Path, pictures: Tensor, labels: Tensor) -> dict[str, float]:
    """Accuracy over the nine captions, and mean cosine of the right and of the other captions.

    Pictures uint8 (N, 3, H, W), labels int64 (N,). "margin" is the mean distance between the right
    caption's cosine and that of the best wrong one.
    """
    cosine = cosines(folder, pictures)
    right = F.one_hot(labels, len(CLASSES)).bool()
    best_wrong = cosine.masked_fill(right, -1).amax(1)
    return {
        "accuracy": (cosine.argmax(1) == labels).float().mean().item(),
        "matching": cosine[right].mean().item(),
        "other": cosine[~right].mean().item(),
        "margin": (cosine[right] - best_wrong).mean().item(),
    }


def acceptance(folder: Path, count: int, seed: int) -> dict[str, dict[str, float]]:
    """`zero_shot` on `count` fresh pictures: as drawn, augmented, and drawn at half the size."""
    pictures, labels = picture_table(count, seed)
    random = torch.Generator().manual_seed(seed)
    batches = (pictures.float() / 127.5 - 1).split(250)
    seeds = torch.arange(count) + seed
    sets = {
        "drawn": pictures,
        "augmented": to_bytes(torch.cat([augment(batch, random) for batch in batches])),
        "half_size": to_bytes(draw(labels, seeds, SIZE // 2)),
    }
    return {name: zero_shot(folder, x, labels) for name, x in sets.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="model folder to write")
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--batch", type=int, default=48)
    parser.add_argument("--pictures", type=int, default=14400, help="size of the training set")
    parser.add_argument("--lr", type=float, default=1e-3, help="peak; warm-up, then cosine to zero")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save_every", type=int, default=200, help="steps between checkpoints")
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    processor = build_processor()
    model = build_model(processor.tokenizer)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.98))
    pictures, labels = picture_table(args.pictures, seed=2_000_000)
    prompts = processor.tokenizer(CAPTIONS, padding=True, return_tensors="pt")
    mean = torch.tensor(processor.image_processor.image_mean)[:, None, None]
    std = torch.tensor(processor.image_processor.image_std)[:, None, None]
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(pictures):,} pictures")

    loop = Loop(args, {"model": model}, optimizer, warm_up=100, log_every=50)
    for _, random in loop:
        pick = torch.randint(len(pictures), (args.batch,), generator=random)
        x = augment(pictures[pick].float() / 127.5 - 1, random)
        # Nine distinct captions, not one per picture: equal captions must not repel each other.
        out = model(pixel_values=(x / 2 + 0.5 - mean) / std, **prompts)
        loss = F.cross_entropy(out.logits_per_image, labels[pick])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(max=MAX_LOGIT_SCALE)
        loop.record(loss)

    seconds = loop.seconds
    partial = args.out.with_name(args.out.name + ".partial")
    model.half().save_pretrained(partial)
    processor.save_pretrained(partial)
    measured = acceptance(partial, 2000, seed=3_000_000)
    for name, result in measured.items():
        print(name, json.dumps({k: round(v, 4) for k, v in result.items()}))
    report = {**{k: str(v) for k, v in vars(args).items()}, "seconds": seconds}
    report |= {"zero_shot": measured, "log": loop.log}
    partial.joinpath("training.json").write_text(json.dumps(report, indent=1))
    if args.out.exists():
        shutil.rmtree(args.out)
    os.replace(partial, args.out)
    loop.finish()


if __name__ == "__main__":
    main()
