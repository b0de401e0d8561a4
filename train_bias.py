"""Stage one: train the corrector of a prior. `python train_bias.py fit --config configs/bias/…`"""

from lmc.training.bias import CorrectorTraining
from lmc.training.cli import TrainingCLI


def main(args: list[str] | None = None) -> TrainingCLI:
    """Run the command line; `args` in place of the process's own."""
    return TrainingCLI(CorrectorTraining, args)


if __name__ == "__main__":
    main()
