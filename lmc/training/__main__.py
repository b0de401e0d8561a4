"""Both trainings without their scripts: `python -m lmc.training translator fit --config …`."""

import sys
from collections.abc import Sequence
from typing import Any

from lmc.training.start import STAGES, train


def main(args: Sequence[str]) -> Any:
    """Run a stage's command line; `args` starts with a stage's name."""
    if not args or args[0] not in STAGES:
        sys.exit(f"usage: python -m lmc.training {{{','.join(STAGES)}}} fit --config FILE …")
    return train(args[0], args[1:], f"lmc.training {args[0]}")


if __name__ == "__main__":
    main(sys.argv[1:])
