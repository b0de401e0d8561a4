"""The files with a model's weights, and what tells them apart."""

import contextlib
import hashlib
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open


def weight_files(folder: Path) -> list[Path]:
    """The files with the weights of one part: whole or in shards; .bin where no safetensors are.

    Variants that lie beside them (…fp16…, …non_ema…) are not among them.
    """
    for suffix in ("safetensors", "bin"):
        files = sorted(folder.glob(f"*.{suffix}"))
        files = [
            f for f in files if re.fullmatch(r"((diffusion_)?pytorch_)?model(-\d+-of-\d+)?", f.stem)
        ]
        if files:
            return files
    return []


def weights_digest(folder: Path) -> str:
    """SHA-256 over all tensors of the weights in `folder`, as half precision.

    As half precision and by tensor, so that the fp16 and fp32 files of one model, however they are
    cut into shards, have one digest.
    """
    where: dict[str, Any] = {}
    with contextlib.ExitStack() as stack:
        for file in weight_files(folder):
            if file.suffix == ".safetensors":
                opened = stack.enter_context(safe_open(file, "pt"))
                where |= dict.fromkeys(opened.keys(), opened.get_tensor)
            else:
                tensors = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
                where |= dict.fromkeys(tensors, tensors.__getitem__)
        digest = hashlib.sha256()
        for name in sorted(where):
            value = where[name](name).to(torch.float16).contiguous()
            digest.update(name.encode())
            digest.update(value.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
