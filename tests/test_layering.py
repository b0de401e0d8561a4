"""The layering of the package, read from its sources."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "lmc"
# Modules and wings, along the data; those of one line know nothing of each other's order.
ORDER = (
    *("files", "errors", "typos", "device", "progress", "schedule", "configs", "unet", "hub"),
    "perturbations",
    "priors",
    "shards",
    *("corrector", "filter", "translator", "load", "translate"),
    *("losses", "specs", "patches", "renderers", "optimize", "dreamsampler"),
    "measure",
    *("release", "closed_form"),
    "one_image",
    "training",
    "compare",
    "cli",
)
FILES = sorted(PACKAGE.rglob("*.py"))


def module_of(file: Path) -> str:
    """The name in ORDER of a source file: its top folder's or its own; '__init__' for lmc's."""
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(source: str, file: Path) -> Iterator[str]:
    """Absolute dotted names of all that a source imports, wherever in the file it does."""
    package = ["lmc", *file.relative_to(PACKAGE).parts[:-1]]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = [*base, *(node.module or "").split(".")] if node.module else base
            yield from (".".join([*base, alias.name]) for alias in node.names)


def faults(source: str, file: Path) -> list[str]:
    """What a source file imports against the rules, inside its functions too."""
    module, found = module_of(file), []
    for name in imports(source, file):
        top, *rest = name.split(".")
        lightning = top in ("lightning", "pytorch_lightning", "lightning_fabric")
        if lightning and module != "training":
            found.append(f"{name}: only lmc/training/ imports lightning")
        if top == "diffusers" and module != "priors":
            found.append(f"{name}: only lmc/priors/ imports diffusers")
        ours = top == "lmc" and rest and rest[0] in ORDER and module != "__init__"
        if ours and ORDER.index(rest[0]) > ORDER.index(module):
            found.append(f"{name}: further right than {module}")
    return found


def test_the_package_is_there():
    assert {module_of(file) for file in FILES} >= {"schedule", "priors", "losses", "measure"}


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_imports_point_left(file):
    assert module_of(file) in (*ORDER, "__init__"), "a new module: give it a place in ORDER"
    assert faults(file.read_text(encoding="utf-8"), file) == []


@pytest.mark.parametrize(
    "file",
    [f for f in sorted(PACKAGE.rglob("*")) if f.is_file() and "__pycache__" not in f.parts],
    ids=lambda file: str(file.relative_to(PACKAGE)),
)
def test_the_package_knows_nothing_of_the_demo(file):
    assert "demo" not in file.name.lower()
    assert b"demo" not in file.read_bytes().lower()


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("schedule", "from lmc.priors import Prior"),
        ("schedule", "from lmc import priors"),
        ("schedule", "def f():\n    from . import priors"),
        ("priors", "from .losses import SDS"),
        ("corrector", "import lmc.losses as l"),
        ("release", "from lmc.training.data import Data"),
        ("release", "import lightning.pytorch as pl"),
        ("cli", "from pytorch_lightning import Trainer"),
        ("losses", "if True:\n    import diffusers.models"),
        ("training/data", "from lmc.cli import main"),
        ("training/data", "from diffusers import DDPMScheduler"),
    ],
)
def test_the_rules_find_what_breaks_them(module, source):
    assert len(faults(source, PACKAGE / f"{module}.py")) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("priors", "from lmc.schedule import Schedule\nimport diffusers"),
        ("training/modules", "import lightning\nfrom .. import losses\nfrom .data import Data"),
        ("cli", "from lmc.training.cli import main"),
        ("losses", "import torch\nfrom .corrector import Corrector"),
    ],
)
def test_the_rules_let_pass_what_keeps_them(module, source):
    assert faults(source, PACKAGE / f"{module}.py") == []
