"""A corrector's error on held-out images, beside that of correcting nothing."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torchmetrics import Metric

from lmc.corrector import BiasCorrector, corrector_loss, normalise
from lmc.priors import Prior
from lmc.schedule import TIME_RANGE, check_time_range, time_bin
from lmc.shards.images import ImageBatch
from lmc.shards.triplets import heldout_triplets

HELDOUT = 1000  # images that a corrector is measured on, unless told otherwise


class CorrectorErrors(Metric):
    """L_k of a corrector, of the identity b = z, and of b̂ = z in the normalised space of Eq. 10.

    Means over images, and over processes.

    Args:
        bins: of t, each of whose means is wanted too; 0 is none.
        others: names of the errors of further correctors.
    """

    full_state_update = False

    def __init__(self, bins: int = 0, others: Sequence[str] = ()) -> None:
        super().__init__()
        self.bins = bins
        self.names = ("loss", "identity_loss", "normalised_identity_loss", *others)
        # By bin: the sum of each error, and how many images there were.
        sums = torch.zeros(max(1, bins), len(self.names) + 1, dtype=torch.float64)
        self.add_state("sums", sums, dist_reduce_fx="sum")
        self.sums: Tensor

    def update(self, z: Tensor, z_hat: Tensor, *b: Tensor, t: Tensor | None = None) -> None:
        """Add a batch.

        Args:
            z, z_hat: (B, C, H, W).
            b: of the corrector, then of the others, each (B, C, H, W).
            t: (B,); not needed without bins.
        """
        errors = [corrector_loss(x, z_hat) for x in (b[0], z, normalise(z, z_hat), *b[1:])]
        rows = torch.stack([*errors, torch.ones_like(errors[0])], 1).double()
        index = torch.zeros(len(z), dtype=torch.long)
        if self.bins:
            assert t is not None
            index = time_bin(t, self.bins)
        self.sums.index_add_(0, index.to(self.sums.device), rows.to(self.sums.device))

    def compute(self) -> dict[str, Tensor]:
        """'loss', 'identity_loss', 'normalised_identity_loss' and the others.

        With bins, also 'loss/t0.2' and so on, for each bin that any image was in.
        """
        whole = self.sums.sum(0)
        found = dict(zip(self.names, (whole[:-1] / whole[-1]).float(), strict=True))
        for i, row in enumerate(self.sums if self.bins else []):
            if row[-1]:
                names = [f"{name}/t{i / self.bins:.1f}" for name in self.names]
                found |= zip(names, (row[:-1] / row[-1]).float(), strict=True)
        return found


@torch.no_grad()
def evaluate_corrector(
    corrector: BiasCorrector,
    prior: Prior,
    batches: Iterable[ImageBatch],
    *,
    time_range: tuple[float, float] = TIME_RANGE,
    device: torch.device | str = "cpu",
) -> dict[str, float]:
    """L_k over held-out images, beside that of the identity, as stage one logs it.

    One t and eps an image, which follow from its key: see `heldout_triplets`. Under
    torch.distributed over the batches of all processes.

    Args:
        corrector: made for `prior`, on `device`.
        prior: loaded, on `device`.
        batches: held-out images of any size.
        time_range: of t, as the corrector was trained with.
        device: where to compute.

    Raises:
        ValueError: the corrector is another prior's, or the time range no interval in [0, 1].
    """
    corrector.check_prior(prior.identity)
    check_time_range(time_range)
    errors = CorrectorErrors().to(device)
    null = prior.embed([""]).to(device)
    for batch in batches:
        if not batch.key:  # only broken samples were left for the last batch
            continue
        x = heldout_triplets(prior, batch.image.to(device), batch.key, null, time_range)
        errors.update(x.z, x.z_hat, corrector.correct(x.z, x.t, x.z_hat))
    return {name: value.item() for name, value in errors.compute().items()}
