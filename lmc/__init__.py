"""LMC-SDS: score distillation with a learned manifold corrective."""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

# Loaded on first use: `import lmc` must not wait for torch or diffusers.
_PUBLIC = {
    "Corrector": "lmc.corrector",
    "FilterCorrector": "lmc.filter",
    "Translator": "lmc.translator",
    "DiffusersPrior": "lmc.priors",
    "Prior": "lmc.priors",
    "SDS": "lmc.losses",
    "Cond": "lmc.losses",
    "LMC": "lmc.losses",
    "DDS": "lmc.losses",
}
__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'lmc' has no attribute {name!r}")
