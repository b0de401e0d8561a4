"""Train a small prior of your own: `python data/prior/train.py fit --config configs/prior/…`"""

from typing import Any

from lmc.training.start import train


def main(args: list[str] | None = None) -> Any:
    """Run the command line, a `TrainingCLI`; `args` in place of the process's own."""
    return train("prior", args, "data/prior/train.py")


if __name__ == "__main__":
    main()
