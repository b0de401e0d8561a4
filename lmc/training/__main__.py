"""Both trainings without their scripts: `python -m lmc.training translator fit --config …`."""

import sys
import warnings
from collections.abc import Sequence

from lmc.training.bias import CorrectorTraining
from lmc.training.cli import TrainingCLI
from lmc.training.translator import TranslatorTraining

STAGES = {"bias": CorrectorTraining, "translator": TranslatorTraining}


def main(args: Sequence[str]) -> TrainingCLI:
    """Run a stage's command line; `args` starts with 'bias' or 'translator'."""
    if not args or args[0] not in STAGES:
        sys.exit(f"usage: python -m lmc.training {{{','.join(STAGES)}}} fit --config FILE …")
    # LightningCLI wonders about arguments beside those of the process; they are a part of those.
    warnings.filterwarnings("ignore", "LightningCLI's args parameter")
    return TrainingCLI(STAGES[args[0]], list(args[1:]))


if __name__ == "__main__":
    main(sys.argv[1:])
