"""LMC-SDS for threestudio, which imports what lies in custom/."""

from . import guidance  # noqa: F401
