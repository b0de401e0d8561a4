"""A corrector's error on held-out images, beside that of correcting nothing."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torchmetrics import Metric

from lmc.corrector import BiasCorrector, corrector_loss, normalise
from lmc.errors import require
from lmc.priors import Embedding, Prior
from lmc.schedule import TIME_RANGE, check_time_range, time_bin
from lmc.shards.images import ImageBatch
from lmc.shards.triplets import Triplets, draw_for_key, heldout_triplets, sample_triplets

HELDOUT = 1000  # images that a corrector is measured on, unless told otherwise


class CorrectorErrors(Metric):
    """L_k of a corrector, of the identity b = z, and of b̂ = z in the normalised space of Eq. 10.

    Means over images, and over processes.

    Args:
        bins: of t, each of whose means is wanted too; 0 is none.
        others: names of the errors of further correctors.
        excess: the excess of L_k over its floor is given too, see `excess_over_floor`.
    """

    full_state_update = False

    def __init__(self, bins: int = 0, others: Sequence[str] = (), excess: bool = False) -> None:
        super().__init__()
        self.bins = bins
        self.names = ("loss", "identity_loss", "normalised_identity_loss", *others)
        self.names += ("excess", "floor") if excess else ()
        # By bin: the sum of each error, and how many images there were.
        sums = torch.zeros(max(1, bins), len(self.names) + 1, dtype=torch.float64)
        self.add_state("sums", sums, dist_reduce_fx="sum")
        self.sums: Tensor

    def update(
        self,
        z: Tensor,
        z_hat: Tensor,
        *b: Tensor,
        t: Tensor | None = None,
        excess: Tensor | None = None,
    ) -> None:
        """Add a batch.

        Args:
            z, z_hat: (B, C, H, W).
            b: of the corrector, then of the others, each (B, C, H, W).
            t: (B,); not needed without bins.
            excess: (B,), where the class was told of it.
        """
        errors = [corrector_loss(x, z_hat) for x in (b[0], z, normalise(z, z_hat), *b[1:])]
        if excess is not None:
            errors += [excess, errors[0] - excess]
        rows = torch.stack([*errors, torch.ones_like(errors[0])], 1).double()
        index = torch.zeros(len(z), dtype=torch.long)
        if self.bins:
            assert t is not None
            index = time_bin(t, self.bins)
        self.sums.index_add_(0, index.to(self.sums.device), rows.to(self.sums.device))

    def compute(self) -> dict[str, Tensor]:
        """'loss', 'identity_loss', 'normalised_identity_loss' and the others.

        Where the excess is given, 'excess' and 'floor' too, which add up to 'loss'.

        With bins, also 'loss/t0.2' and so on, for each bin that any image was in.
        """
        whole = self.sums.sum(0)
        found = dict(zip(self.names, (whole[:-1] / whole[-1]).float(), strict=True))
        for i, row in enumerate(self.sums if self.bins else []):
            if row[-1]:
                names = [f"{name}/t{i / self.bins:.1f}" for name in self.names]
                found |= zip(names, (row[:-1] / row[-1]).float(), strict=True)
        return found


def excess_over_floor(residuals: Sequence[Tensor]) -> Tensor:
    """What of L_k another b could still take away: ‖b − E ẑ_t‖², mean over pixels, per image.

    L_k = ‖b − E ẑ_t‖² + E Var ẑ_t, of which the latter, given z and t, is out of reach of any
    function of z and t: the floor. Of independent draws of eps at one z and t,

        excess = mean over pairs i ≠ j of ⟨b_i − ẑ_i, b_j − ẑ_j⟩,

    which is unbiased where b does not depend on the draw (statistics 'none'). Eq. 10 gives b the
    deviation of each draw's ẑ: the excess is then of what is common to all draws.

    Args:
        residuals: b_i − ẑ_i of each draw, (B, C, H, W); at least two.

    Returns:
        (B,); of a few images it may be below 0.
    """
    draws, every = len(residuals), torch.stack(list(residuals)).double()
    pairs = every.sum(0).square() - every.square().sum(0)
    return pairs.mean((1, 2, 3)) / (draws * (draws - 1))


@torch.no_grad()
def heldout_excess(
    corrector: BiasCorrector,
    prior: Prior,
    x: Triplets,
    keys: Sequence[str],
    null: Embedding,
    draws: int,
) -> Tensor:
    """`excess_over_floor` of held-out triplets and of further draws of eps at their z and t.

    Args:
        corrector: made for `prior`, on its device.
        prior: loaded.
        x: of `heldout_triplets`, the first draw.
        keys: of their images, from which the other draws follow.
        null: the unconditional embedding, one row.
        draws: of eps in all, at least two; each but the first is an evaluation an image.

    Returns:
        (B,).
    """
    b_hat = corrector(x.z, x.t)
    estimates = [x.z_hat]
    for repetition in range(1, draws):
        drawn = (draw_for_key(key, x.z.shape[1:], repetition=repetition)[1] for key in keys)
        eps = torch.cat(list(drawn)).to(x.z.device)
        estimates.append(sample_triplets(prior, x.z, x.t, eps, null.expand(len(x.z))).z_hat)
    return excess_over_floor(
        [corrector.normalised(b_hat, x.t, z_hat) - z_hat for z_hat in estimates]
    )


@torch.no_grad()
def evaluate_corrector(
    corrector: BiasCorrector,
    prior: Prior,
    batches: Iterable[ImageBatch],
    *,
    time_range: tuple[float, float] = TIME_RANGE,
    draws: int = 2,
    device: torch.device | str = "cpu",
) -> dict[str, float]:
    """L_k over held-out images, beside that of the identity, as stage one logs it.

    One t and eps an image, which follow from its key: see `heldout_triplets`; and further draws of
    eps for the excess of L_k over its floor. Under torch.distributed over the batches of all
    processes.

    Args:
        corrector: made for `prior`, on `device`.
        prior: loaded, on `device`.
        batches: held-out images of any size.
        time_range: of t, as the corrector was trained with.
        draws: of eps an image, each an evaluation; 1 leaves 'excess' and 'floor' out.
        device: where to compute.

    Raises:
        ValueError: the corrector is another prior's, the time range no interval in [0, 1], or there
            are no draws.
    """
    require(draws >= 1, "draws", "at least 1", draws)
    corrector.check_prior(prior.identity)
    check_time_range(time_range)
    errors = CorrectorErrors(excess=draws > 1).to(device)
    null = prior.embed([""]).to(device)
    for batch in batches:
        if not batch.key:  # only broken samples were left for the last batch
            continue
        x = heldout_triplets(prior, batch.image.to(device), batch.key, null, time_range)
        excess = None
        if draws > 1:
            excess = heldout_excess(corrector, prior, x, batch.key, null, draws)
        errors.update(x.z, x.z_hat, corrector.correct(x.z, x.t, x.z_hat), excess=excess)
    return {name: value.item() for name, value in errors.compute().items()}
