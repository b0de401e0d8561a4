"""`step.py` at true sizes: random networks as large as DeepFloyd IF-M and Stable Diffusion 1.5.

    python benchmarks/gpu.py --out runs/gpu

Builds both pipelines with random weights, which cost as much as trained ones, and pictures of
noise; then trains some steps with the paper's translator and corrector by configs/*/paper.yaml and
configs/priors/sd15.yaml, in bfloat16, as they are and compiled, and times each step and its parts.
On a GPU it also runs steps in which any wait of the host for the device is an error. --small
builds tiny networks, to see on a CPU that everything is in its place.
"""

import argparse
import io
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import LambdaCallback
from PIL import Image

from lmc.corrector import Corrector
from lmc.priors import DiffusersPrior
from lmc.priors.small import build_text_encoder, build_tokenizer, scheduler
from lmc.shards.images import write_shard
from lmc.training.bias import CorrectorTraining
from lmc.training.translator import TranslatorTraining

sys.path.insert(0, str(Path(__file__).parent))
from step import Timed, measure, report

ROOT = Path(__file__).parents[1]
PROMPTS = [f"a photo of a {name}" for name in ("cat", "bear", "dog", "lion", "squirrel")]


def build_if_m(folder: Path, small: bool) -> None:
    """DeepFloyd IF-M's first stage: 372 million parameters, 0.229 TFLOP an evaluation."""
    from diffusers import IFPipeline, UNet2DConditionModel

    widths, layers = ((8, 8, 16, 32), 1) if small else ((192, 384, 576, 768), 3)
    tokenizer = build_tokenizer(PROMPTS)
    text = build_text_encoder(len(tokenizer))
    width = text.config.d_model
    unet = UNet2DConditionModel(
        sample_size=16 if small else 64,
        in_channels=3,
        out_channels=6,
        block_out_channels=widths,
        down_block_types=("ResnetDownsampleBlock2D", *["SimpleCrossAttnDownBlock2D"] * 3),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        up_block_types=(*["SimpleCrossAttnUpBlock2D"] * 3, "ResnetUpsampleBlock2D"),
        layers_per_block=layers,
        attention_head_dim=8 if small else 64,
        norm_num_groups=8 if small else 32,
        cross_attention_dim=widths[-1],
        encoder_hid_dim=width,
        addition_embed_type="text",
        addition_embed_type_num_heads=4,
        resnet_time_scale_shift="scale_shift",
        act_fn="gelu",
        time_embedding_act_fn="gelu",
        resnet_skip_time_act=True,
        resnet_out_scale_factor=2**0.5,
        mid_block_scale_factor=2**0.5,
        cross_attention_norm="group_norm",
    )
    IFPipeline(
        tokenizer=tokenizer,
        text_encoder=text,
        unet=unet.to(torch.float16),
        scheduler=scheduler(),
        safety_checker=None,
        feature_extractor=None,
        watermarker=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)


def build_sd15(folder: Path, small: bool) -> None:
    """Stable Diffusion 1.5's U-Net (860 million parameters) and VAE, for 512 x 512."""
    from diffusers import (
        AutoencoderKL,
        PNDMScheduler,
        StableDiffusionPipeline,
        UNet2DConditionModel,
    )
    from transformers import CLIPTextConfig, CLIPTextModel

    from lmc.measure.small_clip import build_tokenizer as build_clip_tokenizer

    tokenizer = build_clip_tokenizer(PROMPTS)
    width = 16 if small else 768
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=width,
        num_hidden_layers=1,
        num_attention_heads=4,
        max_position_embeddings=tokenizer.model_max_length,
        eos_token_id=tokenizer.eos_token_id,
    )
    widths = (8, 8, 16, 16) if small else (320, 640, 1280, 1280)
    unet = UNet2DConditionModel(
        sample_size=8 if small else 64,
        block_out_channels=widths,
        cross_attention_dim=width,
        norm_num_groups=8 if small else 32,
        attention_head_dim=4 if small else 8,
    )
    vae = AutoencoderKL(
        block_out_channels=(8, 8) if small else (128, 256, 512, 512),
        down_block_types=("DownEncoderBlock2D",) * (2 if small else 4),
        up_block_types=("UpDecoderBlock2D",) * (2 if small else 4),
        layers_per_block=1 if small else 2,
        norm_num_groups=8 if small else 32,
        latent_channels=4,
    )
    StableDiffusionPipeline(
        vae=vae,
        text_encoder=CLIPTextModel(config),
        tokenizer=tokenizer,
        unet=unet,
        scheduler=PNDMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            skip_prk_steps=True,
            steps_offset=1,
            set_alpha_to_one=False,
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)


PRIORS: dict[str, Any] = {"if-m": build_if_m, "sd15": build_sd15}


def write_pictures(folder: Path, size: int, count: int = 64, shards: int = 1) -> str:
    """Shards of noise, train and heldout, `count` pictures each; the folder as a string."""
    generator = torch.Generator().manual_seed(0)
    for split, parts in (("train", shards), ("heldout", 1)):
        for part in range(parts):
            samples = []
            for i in range(count):
                noise = torch.randint(256, (size, size, 3), generator=generator, dtype=torch.uint8)
                file = io.BytesIO()
                Image.fromarray(noise.numpy()).save(file, "jpeg", quality=95)
                key = f"{split}{part:04d}{i:04d}"
                samples.append((key, file.getvalue(), "jpg", {"label": "cat"}))
            write_shard(folder / f"{split}-{part:05d}.tar", samples)
    return str(folder)


class NoWaits(Timed):
    """Steps in which the host may not wait for the device."""

    def before_fit(self) -> None:
        super().before_fit()
        self.trainer.callbacks.remove(self.parts)
        start, end = "on_train_batch_start", "on_train_batch_end"
        mode = torch.cuda.set_sync_debug_mode
        hooks = {start: lambda t, *_: mode("error" if t.global_step > 1 else "default")}
        hooks |= {end: lambda *_: mode("default")}
        self.trainer.callbacks.append(LambdaCallback(**hooks))


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"), help="(%(default)s)")
    parser.add_argument("--priors", nargs="+", choices=PRIORS, default=list(PRIORS))
    parser.add_argument("--losses", nargs="+", default=["LMC", "SDS", "DDS"])
    parser.add_argument("--batch", type=int, default=8, help="images a step (%(default)s)")
    parser.add_argument("--steps", type=int, default=16, help="of each training (%(default)s)")
    parser.add_argument("--compile", nargs="+", default=["false", "true"], help="(%(default)s)")
    parser.add_argument("--small", action="store_true", help="tiny networks")
    parser.add_argument("--json", type=Path, help="write the figures there as well")
    args = parser.parse_args(argv)
    out, size = args.out.absolute(), 32 if args.small else 256
    os.chdir(ROOT)
    rows: dict[str, dict[str, float]] = {}
    for name in args.priors:
        folder = out / f"{name}{'-small' if args.small else ''}"
        if not folder.exists():
            torch.manual_seed(0)
            PRIORS[name](folder, args.small)
        prior = DiffusersPrior(str(folder))
        channels = prior.channels
        widths = [8, 8] if args.small else [32, 64, 128, 256, 512]
        own = Corrector(channels, widths, bounded=not prior.latent, prior=prior.identity)
        own.save_pretrained(out / f"{name}-corrector")
        for stage, kind, side in (
            ("translator", TranslatorTraining, size),
            ("bias", CorrectorTraining, prior.image_size),
        ):
            data = write_pictures(out / f"{name}-{stage}", side)
            options = [f"--config={ROOT}/configs/priors/sd15.yaml"] if name == "sd15" else []
            options += [f"--model.prior.init_args.pretrained={folder}"]
            options += [f"--data.{x}={data}/{x}-*.tar" for x in ("train", "heldout")]
            options += [f"--data.batch_size={args.batch}", "--trainer.devices=1"]
            options += ["--trainer.logger=false", "--data.num_workers=1"]
            losses = args.losses if stage == "translator" else [None]
            if stage == "translator":
                options += [f"--model.image_size={size}", "--model.validation.clip=null"]
            else:
                options += ["--model.stability=0"]
            if args.small:
                options += ["--model.widths=[8,8]"]
            for loss in losses:
                chosen = [] if loss in (None, "LMC") else [f"--model.loss={loss}"]
                if loss == "LMC":
                    chosen = [f"--model.loss.init_args.corrector={out / f'{name}-corrector'}"]
                config = f"configs/{stage}/paper.yaml"
                eager = [f"--model{x}.compile=false" for x in ("", ".prior.init_args")]
                for compiled in args.compile:
                    flags = [f"--model.compile={compiled}"]
                    flags += [f"--model.prior.init_args.compile={compiled}"]
                    what = f"{name}, {loss or 'stage one'}"
                    what += ", compiled" if compiled != "false" else ""
                    print(f"{what} …", flush=True)
                    rows[what] = measure(kind, config, args.steps, [*options, *chosen, *flags])
                if torch.cuda.is_available():
                    measure(kind, config, 4, [*options, *chosen, *eager], NoWaits)
                    rows[what]["waits"] = 0
    report(rows, args.json)


if __name__ == "__main__":
    main()
