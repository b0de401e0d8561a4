"""The start of a training: what is misspelt is said before anything large is imported."""

import argparse
import re
import sys
import warnings
from collections.abc import Sequence
from importlib import import_module
from typing import TYPE_CHECKING

from lmc.errors import message, needs, one_line
from lmc.typos import check_names

if TYPE_CHECKING:
    from lmc.training.cli import TrainingCLI

STAGES = {
    "prior": ("lmc.training.prior", "PriorTraining"),
    "clip": ("lmc.training.clip", "ClipTraining"),
    "bias": ("lmc.training.bias", "CorrectorTraining"),
    "translator": ("lmc.training.translator", "TranslatorTraining"),
}


def train(stage: str, args: Sequence[str] | None, program: str) -> "TrainingCLI":
    """Run a stage's command line.

    Args:
        stage: 'prior', 'clip', 'bias' or 'translator'.
        args: in place of the process's own.
        program: its name, before the line that an error is.

    Raises:
        SystemExit: with a line, which Python prints, and status 1.
    """
    module, name = STAGES[stage]
    with one_line(program), needs(program, "train"):
        check_names(module, name, sys.argv[1:] if args is None else args)
        from lmc.training.cli import TrainingCLI

        # LightningCLI wonders about arguments beside those of the process; these are meant.
        warnings.filterwarnings("ignore", "LightningCLI's args parameter")
        training = getattr(import_module(module), name)
        try:
            return TrainingCLI(training, None if args is None else list(args))
        except argparse.ArgumentError as error:
            sys.exit(f"{program}: {refused(error)}")


def refused(error: argparse.ArgumentError) -> str:
    """What the parser says of an option, as one line: the option's name first."""
    text = re.sub(r"- Expected a path but .* either not accessible or invalid", "", str(error))
    text = re.sub(r'Parser key "([^"]*)":', r"\1:", text)
    return message(ValueError(re.sub(r"<class '([\w.]+)'>", r"\1", text)))
