"""Tiny random pipelines of every family that DiffusersPrior loads, with the real classes."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

SD, SDXL, SD3 = (f"StableDiffusion{name}Pipeline" for name in ("", "XL", "3"))
WORDS = ("a", "photo", "of", "cat", "dog")
# As in DiT's model_index.json: several names a class, between commas.
LABELS = {"0": "tabby, tabby cat", "1": "brown bear, bruin", "2": "golden retriever"}
LABELS |= {"3": "lion, king of beasts", "4": "fox squirrel"}


def clip_tokenizer(length: int = 24) -> Any:
    """Letters, each also as the end of a word, a few merges, and the two special tokens."""
    from transformers import CLIPTokenizer

    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    merges = [("c", "a"), ("ca", "t</w>"), ("o", "f</w>"), ("d", "o"), ("do", "g</w>")]
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), *("".join(m) for m in merges)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    vocab = {token: i for i, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=length)


def clip_encoder(
    tokenizer: Any, projection: bool, width: int = 16, layers: int = 2, **config: Any
) -> torch.nn.Module:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    options = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=16,
        num_hidden_layers=layers,
        num_attention_heads=2,
        max_position_embeddings=tokenizer.model_max_length,
        projection_dim=width,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.bos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **config,
    )
    model = (CLIPTextModelWithProjection if projection else CLIPTextModel)(options)
    for parameter in model.parameters():  # CLIP starts with weights of 0.02: all prompts alike
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def t5(width: int = 16) -> tuple[Any, torch.nn.Module]:
    from transformers import T5Config, T5EncoderModel, T5Tokenizer

    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -4.0)]
    pieces += [(f"▁{word}", -2.0) for word in WORDS]
    pieces += [(letter, -6.0) for letter in "abcdefghijklmnopqrstuvwxyz"]
    tokenizer = T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=77)
    config = T5Config(
        vocab_size=len(tokenizer), d_model=width, d_kv=8, d_ff=16, num_layers=1, num_heads=2
    )
    return tokenizer, T5EncoderModel(config)


def vae(**config: Any) -> torch.nn.Module:
    """Halves the side twice, so 32 pixels are latents of 8."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        **{
            "block_out_channels": (4, 8, 8),
            "down_block_types": ("DownEncoderBlock2D",) * 3,
            "up_block_types": ("UpDecoderBlock2D",) * 3,
            "layers_per_block": 1,
            "norm_num_groups": 2,
            "sample_size": 32,
            **config,
        }
    )


def latent_unet(**config: Any) -> torch.nn.Module:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        **{
            "sample_size": 8,
            "block_out_channels": (8, 16),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
            "layers_per_block": 1,
            "attention_head_dim": 8,
            "norm_num_groups": 4,
            "cross_attention_dim": 16,
            **config,
        }
    )


def stable_diffusion(folder: Path, prediction_type: str, scheduler: str, layers: int) -> None:
    """1.x, and 2.x, whose text encoder's config has one layer less than was trained."""
    import diffusers

    tokenizer = clip_tokenizer()
    diffusers.StableDiffusionPipeline(
        vae=vae(),
        text_encoder=clip_encoder(tokenizer, projection=False, layers=layers),
        tokenizer=tokenizer,
        unet=latent_unet(),
        scheduler=getattr(diffusers, scheduler)(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            prediction_type=prediction_type,
            steps_offset=1,
            set_alpha_to_one=False,
            **{"PNDMScheduler": {"skip_prk_steps": True}}.get(scheduler, {"clip_sample": False}),
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    # Published configs say nothing of what has a default.
    file = folder / "vae" / "config.json"
    config = json.loads(file.read_text())
    for key in ("scaling_factor", "force_upcast", "shift_factor"):
        del config[key]
    file.write_text(json.dumps(config))


def sdxl(folder: Path) -> None:
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline

    first, second = clip_tokenizer(), clip_tokenizer()
    StableDiffusionXLPipeline(
        vae=vae(scaling_factor=0.13025, force_upcast=True),
        text_encoder=clip_encoder(first, projection=False),
        text_encoder_2=clip_encoder(second, projection=True, width=24),
        tokenizer=first,
        tokenizer_2=second,
        unet=latent_unet(
            cross_attention_dim=16 + 24,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=24 + 6 * 8,
        ),
        scheduler=EulerDiscreteScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            steps_offset=1,
            timestep_spacing="leading",
        ),
        force_zeros_for_empty_prompt=True,
        add_watermarker=False,
    ).save_pretrained(folder)


def sd3(folder: Path) -> None:
    from diffusers import (
        FlowMatchEulerDiscreteScheduler,
        SD3Transformer2DModel,
        StableDiffusion3Pipeline,
    )

    first, second = clip_tokenizer(), clip_tokenizer()
    third, t5_encoder = t5(width=48)
    StableDiffusion3Pipeline(
        transformer=SD3Transformer2DModel(
            sample_size=8,
            patch_size=2,
            in_channels=16,
            out_channels=16,
            num_layers=1,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=48,
            caption_projection_dim=16,
            pooled_projection_dim=16 + 24,
            pos_embed_max_size=8,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae(
            latent_channels=16,
            scaling_factor=1.5305,
            shift_factor=0.0609,
            use_quant_conv=False,
            use_post_quant_conv=False,
        ),
        text_encoder=clip_encoder(first, projection=True),
        tokenizer=first,
        text_encoder_2=clip_encoder(second, projection=True, width=24),
        tokenizer_2=second,
        text_encoder_3=t5_encoder,
        tokenizer_3=third,
    ).save_pretrained(folder)


def ddpm(folder: Path) -> None:
    """Classes 0 to 4, and 5 for none of them."""
    from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

    unet = UNet2DModel(
        sample_size=16,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        attention_head_dim=8,
        norm_num_groups=4,
        num_class_embeds=6,
    )
    scheduler = DDPMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction")
    DDPMPipeline(unet=unet, scheduler=scheduler).save_pretrained(folder)


def dit(folder: Path) -> None:
    from diffusers import DDIMScheduler, DiTPipeline, DiTTransformer2DModel

    DiTPipeline(
        transformer=DiTTransformer2DModel(
            num_attention_heads=2,
            attention_head_dim=8,
            in_channels=4,
            out_channels=8,
            num_layers=1,
            sample_size=8,
            num_embeds_ada_norm=1000,  # or DiTPipeline's null class would be another
        ),
        vae=vae(),
        scheduler=DDIMScheduler(clip_sample=False),
    ).save_pretrained(folder)
    index = folder / "model_index.json"
    index.write_text(json.dumps({**json.loads(index.read_text()), "id2label": LABELS}))


BUILDERS: dict[str, Callable[[Path], None]] = {
    "sd15": lambda folder: stable_diffusion(folder, "epsilon", "PNDMScheduler", 2),
    "sd21-base": lambda folder: stable_diffusion(folder, "epsilon", "DDIMScheduler", 1),
    "sd21": lambda folder: stable_diffusion(folder, "v_prediction", "DDIMScheduler", 1),
    "sdxl": sdxl,
    "sd35": sd3,
    "ddpm": ddpm,
    "dit": dit,
}


def build(name: str, folder: Path) -> Path:
    """Write the family `name` as a pipeline folder, and return it.

    Weights are the classes' own random ones, but for those that they start at 0 with: an output
    of 0 would hide what goes in.
    """
    from diffusers.models.modeling_utils import ModelMixin

    with torch.random.fork_rng():
        torch.manual_seed(0)
        BUILDERS[name](folder)
        from diffusers import DiTTransformer2DModel, SD3Transformer2DModel

        for kind in (DiTTransformer2DModel, SD3Transformer2DModel):
            file = folder / "transformer" / "config.json"
            if file.exists() and json.loads(file.read_text())["_class_name"] == kind.__name__:
                model: ModelMixin = kind.from_pretrained(folder, subfolder="transformer")
                for parameter in model.parameters():
                    torch.nn.init.normal_(parameter, std=0.2)
                model.save_pretrained(folder / "transformer")
    return folder
