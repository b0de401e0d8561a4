"""The device that computes, and what is compiled for it."""

import os
import platform
from pathlib import Path
from typing import Any, Literal

# true is 'default'; 'reduce-overhead' records the kernels of a call as one graph on a GPU.
Compile = bool | Literal["default", "reduce-overhead"]


def to_device(value: Any, device: Any) -> Any:
    """A tensor of the host's on a device, without waiting for what that is doing."""
    if device.type == "cuda":
        value = value.pin_memory()
    return value.to(device, non_blocking=True)


def compile_in_place(module: Any, how: Compile) -> None:
    """`torch.nn.Module.compile`: slow first calls, then faster ones; its weights keep their names.

    Args:
        module: whose calls are to be fast.
        how: false leaves it as it is.
    """
    if how:
        module.compile(mode="default" if how is True else how)


def choose_device(device: str = "auto") -> str:
    """The device to compute on, checked before anything is loaded.

    Args:
        device: cpu, cuda, cuda:1, …; 'auto' is the GPU where there is one. Under torchrun, which
            sets LOCAL_RANK, the GPU of a process is its own.

    Raises:
        ValueError: it cannot be used; says why.
    """
    import torch

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and "LOCAL_RANK" in os.environ:
        device = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # no such device, or no torch for it
        why = str(error).splitlines()[0]
        raise ValueError(f"device {device!r} cannot be used here: {why}") from error
    return device


def processor() -> str:
    """The CPU's model, as far as the system says."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            name, _, model = line.partition(":")
            if name.strip() == "model name":
                return model.strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
