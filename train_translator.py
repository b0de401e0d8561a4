"""Stage two: train a translator. `python train_translator.py fit --config configs/translator/…`"""

from typing import Any

from lmc.training.start import train


def main(args: list[str] | None = None) -> Any:
    """Run the command line, a `TrainingCLI`; `args` in place of the process's own."""
    return train("translator", args, "train_translator.py")


if __name__ == "__main__":
    main()
