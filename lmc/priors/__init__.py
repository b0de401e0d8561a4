"""Frozen diffusion models: the Prior protocol, and DiffusersPrior, which speaks it.

The only wing that imports diffusers. It knows no loss, and guidance stays outside. `protocol` is
what losses see; `diffusers` speaks it, with the help of `families` (which pipelines, and what their
JSON files say), `prompts` (text encoders, their cache, classes), `weights` (files, from a folder or
the hub) and `lora`; `identity` tells priors apart.
"""

from lmc.priors.diffusers import DiffusersPrior
from lmc.priors.identity import check_identity, say_unchecked
from lmc.priors.protocol import Embedding, LoraPrior, Prior

__all__ = ["DiffusersPrior", "Embedding", "LoraPrior", "Prior", "check_identity", "say_unchecked"]
