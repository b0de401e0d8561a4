"""A small text-to-image model to be trained from scratch, written in DeepFloyd IF's format.

An ordinary diffusers `IFPipeline`: a T5 text encoder, a `UNet2DConditionModel` with
attention-pooled text, six output channels of which three are the variance; v-prediction, cosine
schedule. The very code that loads DeepFloyd IF loads it.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, DDPMScheduler, IFPipeline, UNet2DConditionModel
from torch import Tensor
from transformers import T5Config, T5EncoderModel, T5Tokenizer

from lmc.files import whole_folder

TEXT_LENGTH = 77  # what IFPipeline pads every prompt to
TEXT_WIDTH = 64
WORDS = ("a", "an", "the", "of", "photo", "picture", "animal", "face")
STEPS = 1000  # of the schedule


class TextDenoiser(torch.nn.Module):
    """Text encoder and U-Net, trained together: noisy pictures and captions to v.

    v = α_t ε − σ_t z (Salimans and Ho, 2022).

    Args:
        captions: of the pictures it will be trained on; their words are the tokenizer's, beside
            single letters for what else it is asked.
        size: the side of the pictures in pixels.
        widths: channels of the U-Net's levels, each half as wide as the one before: multiples of 8.
        attention: at how many of the levels, the lowest ones, the U-Net looks at the text.
        layers: residual blocks a level.

    Raises:
        ValueError: the levels do not fit the size, or a number makes no sense.
    """

    def __init__(
        self,
        captions: Sequence[str],
        size: int,
        widths: Sequence[int] = (24, 48, 96, 120),
        attention: int = 2,
        layers: int = 1,
    ) -> None:
        super().__init__()
        if not 1 <= attention <= len(widths):
            raise ValueError(
                f"attention must be in [1, {len(widths)}], the levels, got {attention}"
            )
        if any(width < 8 or width % 8 for width in widths):
            raise ValueError(f"widths must be multiples of 8, got {list(widths)}")
        step = 2 ** (len(widths) - 1)
        if size < step or size % step:
            raise ValueError(
                f"size must be a multiple of {step}, halved at each of {len(widths)} widths but "
                f"the last, got {size}"
            )
        self.arguments: dict[str, Any] = {
            "captions": list(captions),
            "size": size,
            "widths": list(widths),
            "attention": attention,
            "layers": layers,
        }
        self.captions = list(captions)
        self.tokenizer = build_tokenizer(captions)
        self.text_encoder = build_text_encoder(len(self.tokenizer))
        self.unet: Any = build_unet(size, widths, attention, layers)
        # The last row is the empty prompt.
        ids, mask = self._tokens([*captions, ""])
        self.register_buffer("ids", ids, persistent=False)
        self.register_buffer("mask", mask, persistent=False)

    def _tokens(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Ids and attention mask, int64 (N, TEXT_LENGTH) each."""
        out = self.tokenizer(
            list(prompts),
            padding="max_length",
            max_length=TEXT_LENGTH,
            truncation=True,
            return_tensors="pt",
        )
        return out.input_ids, out.attention_mask

    def forward(self, z_t: Tensor, timestep: Tensor, caption: Tensor) -> Tensor:
        """v.

        Args:
            z_t: float (B, 3, size, size).
            timestep: int64 (B,) in [0, 1000).
            caption: the number of each one's caption, int64 (B,); one above the last is none.

        Returns:
            As z_t.
        """
        text = self.text_encoder(input_ids=self.ids, attention_mask=self.mask)[0][caption]
        return self.unet(z_t, timestep, encoder_hidden_states=text, return_dict=False)[0][:, :3]

    def alphas_cumprod(self) -> Tensor:
        """ᾱ of the schedule's 1,000 steps, float32."""
        return scheduler().alphas_cumprod.clone()

    def save_pipeline(self, folder: Path) -> None:
        """Write it as a pipeline folder of half precision; one that is there is replaced.

        Args:
            folder: to write.
        """
        pipeline: Any = IFPipeline(
            tokenizer=self.tokenizer,
            text_encoder=_half(self.text_encoder),
            unet=_half(self.unet),
            scheduler=scheduler(),
            safety_checker=None,
            feature_extractor=None,
            watermarker=None,
            requires_safety_checker=False,
        )
        with whole_folder(folder) as partial:
            pipeline.save_pretrained(partial)


def _half(model: Any) -> Any:
    """A copy in half precision."""
    copy = type(model).from_config(model.config) if hasattr(model, "from_config") else None
    copy = type(model)(model.config) if copy is None else copy
    copy.load_state_dict(model.state_dict())
    return copy.to(torch.float16)


def scheduler() -> Any:
    """A DDPMScheduler: cosine schedule, v-prediction."""
    return DDPMScheduler(
        num_train_timesteps=STEPS,
        beta_schedule="squaredcos_cap_v2",
        prediction_type="v_prediction",
        variance_type="learned_range",
        clip_sample=True,
    )


@torch.no_grad()
def sample(
    denoiser: TextDenoiser,
    caption: Tensor,
    steps: int,
    guidance_scale: float,
    generator: torch.Generator,
) -> Tensor:
    """Pictures by DDIM, with classifier-free guidance.

    Args:
        denoiser: trained.
        caption: the number of each picture's caption, int64 (B,), on its device.
        steps: of DDIM; each is two evaluations a picture.
        guidance_scale: 1 is none.
        generator: of the noise they begin as, there too.

    Returns:
        float32 (B, 3, size, size) in [-1, 1].
    """
    size, device = denoiser.arguments["size"], caption.device
    ddim = DDIMScheduler.from_config(scheduler().config)
    ddim.set_timesteps(steps, device=device)
    z = torch.randn(len(caption), 3, size, size, generator=generator, device=device)
    both = torch.cat([torch.full_like(caption, len(denoiser.captions)), caption])
    for step in ddim.timesteps:
        v = denoiser(torch.cat([z, z]), step.expand(len(both)), both).float()
        unconditional, conditional = v.chunk(2)
        guided = unconditional + guidance_scale * (conditional - unconditional)
        z = ddim.step(guided, step, z).prev_sample
    return z.clamp(-1, 1)


def build_tokenizer(captions: Sequence[str]) -> T5Tokenizer:
    """A T5 tokenizer whose pieces are the captions' whole words; single letters for the rest."""
    words = dict.fromkeys(WORDS)
    for caption in captions:
        words |= dict.fromkeys(re.findall(r"\S+", caption.lower()))
    letters = dict.fromkeys("abcdefghijklmnopqrstuvwxyz" + "".join(words))
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -4.0)]
    pieces += [(f"▁{word}", -2.0) for word in words]
    pieces += [(letter, -6.0) for letter in letters]
    return T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=TEXT_LENGTH)


def build_text_encoder(vocab_size: int) -> T5EncoderModel:
    """A one-layer T5 encoder."""
    return T5EncoderModel(
        T5Config(
            vocab_size=vocab_size,
            d_model=TEXT_WIDTH,
            d_kv=16,
            d_ff=2 * TEXT_WIDTH,
            num_layers=1,
            num_heads=4,
            dropout_rate=0.0,
            feed_forward_proj="gated-gelu",
        )
    )


def build_unet(
    size: int, widths: Sequence[int], attention: int, layers: int
) -> UNet2DConditionModel:
    """The denoiser: text attention at the lowest levels, and in the middle."""
    plain = len(widths) - attention
    head = next(x for x in (32, 24, 16, 8) if not any(width % x for width in widths[plain:]))
    unet: Any = UNet2DConditionModel(
        sample_size=size,
        in_channels=3,
        out_channels=6,
        block_out_channels=tuple(widths),
        down_block_types=("DownBlock2D",) * plain + ("SimpleCrossAttnDownBlock2D",) * attention,
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        up_block_types=("SimpleCrossAttnUpBlock2D",) * attention + ("UpBlock2D",) * plain,
        layers_per_block=layers,
        attention_head_dim=head,
        norm_num_groups=8,
        cross_attention_dim=TEXT_WIDTH,
        encoder_hid_dim=TEXT_WIDTH,
        addition_embed_type="text",
        addition_embed_type_num_heads=4,
    )
    # The variance half is not trained: at zero it is halfway between DDPM's two bounds.
    with torch.no_grad():
        unet.conv_out.weight[3:].zero_()
        unet.conv_out.bias[3:].zero_()
    return unet
