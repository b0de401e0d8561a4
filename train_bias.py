"""Stage one: train the corrector of a prior. `python train_bias.py fit --config configs/bias/…`"""

from typing import Any

from lmc.training.start import train


def main(args: list[str] | None = None) -> Any:
    """Run the command line, a `TrainingCLI`; `args` in place of the process's own."""
    return train("bias", args, "train_bias.py")


if __name__ == "__main__":
    main()
