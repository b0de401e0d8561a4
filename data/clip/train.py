"""Train a small CLIP of your own: `python data/clip/train.py fit --config configs/clip/…`"""

from typing import Any

from lmc.training.start import train


def main(args: list[str] | None = None) -> Any:
    """Run the command line, a `TrainingCLI`; `args` in place of the process's own."""
    return train("clip", args, "data/clip/train.py")


if __name__ == "__main__":
    main()
