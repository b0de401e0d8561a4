"""Losses that the package does not know, given by their import path."""

import torch

from lmc.losses import SDS, ScoreDistillation, add_noise
from lmc.priors import Embedding


class Repeated(ScoreDistillation):
    """g = eps_cond − eps, predicted `copies` times and averaged."""

    name = "repeated"
    evaluations = staticmethod(lambda copies, **_: copies)

    def __init__(self, *args, copies: int = 3, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.copies = copies

    def terms(self, prior, x):
        z_t = add_noise(x.z, x.eps, *prior.schedule.coefficients(x.t, x.z.dtype))
        n = self.copies
        eps, _ = prior.predict(torch.cat([z_t] * n), x.t.repeat(n), Embedding.cat([x.target] * n))
        return {"guided": torch.stack(eps.chunk(n)).mean(0) - x.eps}


class Silent(SDS):
    """Does not say its evaluations, which need not be those of SDS any more."""

    name = "silent"

    def terms(self, prior, x):
        return super().terms(prior, x)


class Renamed(SDS):
    """SDS as it is."""

    name = "renamed"
