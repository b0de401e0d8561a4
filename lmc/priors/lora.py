"""A LoRA beside a denoiser's frozen weights, by peft's public means."""

from collections.abc import Sequence
from typing import Any

import torch


def add_lora(denoiser: torch.nn.Module, rank: int) -> dict[str, torch.nn.Parameter]:
    """Add a LoRA of scale 1 to the attention projections; it begins the same every time.

    Returns:
        Its weights by name, float32. It is switched off.

    Raises:
        ValueError: the denoiser has no attention.
    """
    from peft import LoraConfig, inject_adapter_in_model

    names = ["to_q", "to_k", "to_v", "to_out.0"]
    names += ["add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"]  # of the text, in some
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=names)
    # Not diffusers' add_adapter, which not every denoiser has.
    inject_adapter_in_model(config, denoiser, adapter_name="lora")
    lora = {name: p for name, p in denoiser.named_parameters() if ".lora." in name}
    generator = torch.Generator().manual_seed(0)
    for name, weight in lora.items():
        weight.data = weight.data.float()  # whatever the denoiser's own dtype
        if ".lora_A." in name:  # peft draws from the state of the moment, on the device
            start = torch.empty(weight.shape)
            torch.nn.init.kaiming_uniform_(start, a=5**0.5, generator=generator)
            weight.data.copy_(start)
    switch_lora(lora_layers(denoiser), lora, False)
    return lora


def remove_lora(denoiser: torch.nn.Module) -> None:
    """Put the denoiser's own layers back; what peft knew of a LoRA is forgotten."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, module in list(denoiser.named_modules()):
        if isinstance(module, BaseTunerLayer):
            denoiser.set_submodule(name, module.get_base_layer())
    del denoiser.peft_config


def lora_layers(denoiser: torch.nn.Module) -> list[Any]:
    """The layers that a LoRA is beside."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [module for module in denoiser.modules() if isinstance(module, BaseTunerLayer)]


def switch_lora(layers: Sequence[Any], lora: dict[str, torch.nn.Parameter], on: bool) -> None:
    """Let the denoiser's `lora_layers` use its LoRA, or not."""
    for layer in layers:
        layer.enable_adapters(on)
    for weight in lora.values():
        weight.requires_grad_(True)  # which switching off has ended
