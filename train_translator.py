"""Stage two: train a translator. `python train_translator.py fit --config configs/translator/…`"""

from lmc.training.cli import TrainingCLI
from lmc.training.translator import TranslatorTraining


def main(args: list[str] | None = None) -> TrainingCLI:
    """Run the command line; `args` in place of the process's own."""
    return TrainingCLI(TranslatorTraining, args)


if __name__ == "__main__":
    main()
