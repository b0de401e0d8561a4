"""Train the demo's prior: a small text-to-image diffusion model of the drawn animals, 32 x 32.

It is written as an ordinary diffusers `IFPipeline` folder (DeepFloyd IF's format: T5 text encoder,
`UNet2DConditionModel` with attention-pooled text, six output channels of which three are the
variance), so that the very code that loads DeepFloyd IF loads it. v-prediction, cosine schedule.

    python data/demo/train_prior.py --out data/demo/prior

takes about an hour and a half on two CPU cores; stopped, it goes on with the same command.
"""

import argparse
import json
from pathlib import Path

import torch
from diffusers import DDPMScheduler, IFPipeline, UNet2DConditionModel
from torch import Tensor
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import T5Config, T5EncoderModel, T5Tokenizer

from animals import CLASSES, caption, draw
from loop import Loop

SIZE = 32
TEXT_LENGTH = 77  # what IFPipeline pads every prompt to
WORDS = ("a", "photo", "of", "an", "the", "picture", "animal", "face")


def build_tokenizer() -> T5Tokenizer:
    """A T5 tokenizer whose pieces are the captions' whole words; single letters for the rest."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -4.0)]
    pieces += [(f"▁{word}", -2.0) for word in WORDS + CLASSES]
    pieces += [(letter, -6.0) for letter in "abcdefghijklmnopqrstuvwxyz"]
    return T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=TEXT_LENGTH)


def build_text_encoder(vocab_size: int) -> T5EncoderModel:
    """A one-layer T5 encoder, width 64."""
    return T5EncoderModel(
        T5Config(
            vocab_size=vocab_size,
            d_model=64,
            d_kv=16,
            d_ff=128,
            num_layers=1,
            num_heads=4,
            dropout_rate=0.0,
            feed_forward_proj="gated-gelu",
        )
    )


def build_unet(channels: tuple[int, ...] = (24, 48, 96, 120)) -> UNet2DConditionModel:
    """The denoiser: four levels, 32 to 4 pixels wide, text attention at the two lowest."""
    plain, attention = len(channels) - 2, 2
    unet = UNet2DConditionModel(
        sample_size=SIZE,
        in_channels=3,
        out_channels=6,
        block_out_channels=channels,
        down_block_types=("DownBlock2D",) * plain + ("SimpleCrossAttnDownBlock2D",) * attention,
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        up_block_types=("SimpleCrossAttnUpBlock2D",) * attention + ("UpBlock2D",) * plain,
        layers_per_block=1,
        attention_head_dim=24,
        norm_num_groups=8,
        cross_attention_dim=64,
        encoder_hid_dim=64,
        addition_embed_type="text",
        addition_embed_type_num_heads=4,
    )
    # The variance half is not trained: at zero it is halfway between DDPM's two bounds.
    with torch.no_grad():
        unet.conv_out.weight[3:].zero_()
        unet.conv_out.bias[3:].zero_()
    return unet


class Denoiser(torch.nn.Module):
    """Text encoder and U-Net, trained together. Maps noisy pictures and token ids to v."""

    def __init__(self) -> None:
        super().__init__()
        self.tokenizer = build_tokenizer()
        self.text_encoder = build_text_encoder(len(self.tokenizer))
        self.unet = build_unet()

    def tokens(self, prompts: list[str]) -> tuple[Tensor, Tensor]:
        """Token ids and attention mask of `prompts`, each int64 (len(prompts), TEXT_LENGTH)."""
        out = self.tokenizer(
            prompts,
            padding="max_length",
            max_length=TEXT_LENGTH,
            truncation=True,
            return_tensors="pt",
        )
        return out.input_ids, out.attention_mask

    def forward(
        self, z_t: Tensor, timestep: Tensor, ids: Tensor, mask: Tensor, which: Tensor
    ) -> Tensor:
        """v (B, 3, H, W) of noisy pictures `z_t`; row `which[b]` of `ids` is picture b's prompt."""
        text = self.text_encoder(input_ids=ids, attention_mask=mask)[0][which]
        return self.unet(z_t, timestep, encoder_hidden_states=text, return_dict=False)[0][:, :3]


def picture_table(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """`count` pictures as uint8 (count, 3, SIZE, SIZE) and their class ids, int64 (count,)."""
    labels = torch.arange(count) % len(CLASSES)
    seeds = torch.arange(count) + seed
    pictures = [
        ((draw(la, se, SIZE) + 1) * 127.5).round().to(torch.uint8)
        for la, se in zip(labels.split(256), seeds.split(256), strict=True)
    ]
    return torch.cat(pictures), labels


def save(model: Denoiser, scheduler: DDPMScheduler, out: Path) -> None:
    """Write the pipeline folder, half precision."""
    pipeline = IFPipeline(
        tokenizer=model.tokenizer,
        text_encoder=model.text_encoder,
        unet=model.unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        watermarker=None,
        requires_safety_checker=False,
    )
    pipeline.to(torch.float16).save_pretrained(out)
    pipeline.to(torch.float32)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="pipeline folder to write")
    parser.add_argument("--steps", type=int, default=12000)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--pictures", type=int, default=45000, help="size of the training set")
    parser.add_argument("--lr", type=float, default=1e-3, help="peak; warm-up, then cosine to zero")
    parser.add_argument("--dropout", type=float, default=0.1, help="share of empty prompts")
    parser.add_argument("--ema", type=float, default=0.999)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save_every", type=int, default=500, help="steps between checkpoints")
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    model = Denoiser()
    model.unet.to(memory_format=torch.channels_last)
    ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(args.ema))
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.99), weight_decay=0)
    scheduler = DDPMScheduler(
        num_train_timesteps=1000,
        beta_schedule="squaredcos_cap_v2",
        prediction_type="v_prediction",
        variance_type="learned_range",
        clip_sample=True,
    )
    pictures, labels = picture_table(args.pictures, seed=1_000_000)
    ids, mask = model.tokens([caption(i) for i in range(len(CLASSES))] + [""])
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(pictures):,} pictures")

    loop = Loop(
        args,
        {"model": model, "ema": ema},
        optimizer,
        warm_up=200,
        log_every=100,
        on_save=lambda: save(ema.module, scheduler, args.out),
    )
    for step, random in loop:
        pick = torch.randint(len(pictures), (args.batch,), generator=random)
        z = pictures[pick].float() / 127.5 - 1
        empty = torch.rand(args.batch, generator=random) < args.dropout
        which = torch.where(empty, len(CLASSES), labels[pick])
        timestep = torch.randint(1000, (args.batch,), generator=random)
        eps = torch.randn(z.shape, generator=random)
        z_t = scheduler.add_noise(z, eps, timestep).to(memory_format=torch.channels_last)
        loss = F.mse_loss(
            model(z_t, timestep, ids, mask, which), scheduler.get_velocity(z, eps, timestep)
        )
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        # A running average that starts short, so that the first pictures are not those of step 0.
        ema.multi_avg_fn = get_ema_multi_avg_fn(min(args.ema, (step + 1) / (step + 10)))
        ema.update_parameters(model)
        loop.record(loss)
    report = {**{k: str(v) for k, v in vars(args).items()}, "seconds": loop.seconds}
    args.out.joinpath("training.json").write_text(json.dumps({**report, "log": loop.log}, indent=1))
    loop.finish()


if __name__ == "__main__":
    main()
