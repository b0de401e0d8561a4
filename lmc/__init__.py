"""LMC-SDS: score distillation with a learned manifold corrective."""

from importlib import import_module
from typing import Any

__version__ = "0.2.0"

# Loaded on first use: `import lmc` must not wait for torch or diffusers.
_MODULES = {
    "lmc.corrector": ["Corrector", "IdentityCorrector"],
    "lmc.filter": ["FilterCorrector", "HybridCorrector"],
    "lmc.translator": ["Translator"],
    "lmc.measure.stability": ["stability"],
    "lmc.load": ["load_corrector", "load_translator"],
    "lmc.priors": ["DiffusersPrior", "Prior"],
    "lmc.losses": [
        *("ScoreDistillation", "LossInputs", "surrogate"),
        *("SDS", "Cond", "LMC", "DDS", "NFSD", "MSSDS", "PDS", "VSD", "SDI"),
        *("CSD", "ASD", "Bridge", "DVRF", "DMD"),
    ],
}
_PUBLIC = {name: module for module, names in _MODULES.items() for name in names}
__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'lmc' has no attribute {name!r}")
