"""Frozen diffusion models: the Prior protocol, and DiffusersPrior, which speaks it.

The only wing that imports diffusers. It knows no loss, and guidance stays outside.
"""

from lmc.priors.diffusers import DiffusersPrior
from lmc.priors.protocol import Embedding, LoraPrior, Prior

__all__ = ["DiffusersPrior", "Embedding", "LoraPrior", "Prior"]
