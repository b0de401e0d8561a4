"""A loss from outside the package, used like its own:

    PYTHONPATH=examples python train_translator.py fit --config configs/translator/demo.yaml \\
        --run runs/bounded --model.loss own_loss.BoundedSDS --model.loss.bound 0.5
    PYTHONPATH=examples lmc compare configs/translator/demo.yaml --losses sds,own_loss.BoundedSDS …

docs/losses.md has what a loss may say of itself; `lmc.losses` all that there are.
"""

from torch import Tensor

from lmc import SDS, LossInputs, Prior


class BoundedSDS(SDS):
    """SDS, no image's gradient larger than a bound: g · min(1, bound / RMS(g)).

    Args:
        bound: of the root mean square of an image's g.

    Raises:
        ValueError: bound is not above 0.
    """

    name = "bounded_sds"
    evaluations = staticmethod(SDS.evaluations)  # whoever writes `terms` anew says it anew

    def __init__(self, *args, bound: float = 1.0, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        if bound <= 0:
            raise ValueError(f"bound must be above 0, got {bound}")
        self.bound = bound

    def terms(self, prior: Prior, x: LossInputs) -> dict[str, Tensor]:
        terms = super().terms(prior, x)
        size = sum(terms.values()).square().mean((1, 2, 3), keepdim=True).sqrt()
        scale = (self.bound / size).clamp(max=1)
        return {name: scale * term for name, term in terms.items()}
