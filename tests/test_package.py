"""The package as others install it: what is in it, and what the light install alone can do."""

import json
import os
import re
import subprocess
import sys
import venv
from pathlib import Path

import pytest
import yaml
from test_layering import FILES, imports

import lmc.errors
from lmc.errors import EXTRAS, needs

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pytest brings it

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
RELEASE = ROOT / "tests/releases/0.1.0/translator"
BROUGHT = {"markupsafe", "tokenizers"}  # by jinja2 and transformers
IMPORTED = {"protobuf": "google", "pillow": "PIL", "pyyaml": "yaml"}  # where not by their own name

# As if what the extras bring were not installed.
LIGHT = f"""
import sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {sorted({name for each in EXTRAS.values() for name in each})}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Missing())
"""


def light(code: str, *args: object, **options) -> subprocess.CompletedProcess:
    """Run Python without the extras."""
    command = [sys.executable, "-c", LIGHT + code, *map(str, args)]
    return subprocess.run(command, capture_output=True, cwd=ROOT, text=True, **options)


def names(requirements: list[str]) -> set[str]:
    """What they are imported as."""
    found = {re.match(r"[\w-]+", each)[0].lower() for each in requirements}
    return {IMPORTED.get(name, name.replace("-", "_")) for name in found}


def test_the_extras_are_known_by_what_they_bring():
    extras = PROJECT["optional-dependencies"]
    assert names(extras["train"]) == {*EXTRAS["train"], "lmc_sds"} - set(EXTRAS["evaluate"])
    assert set(EXTRAS["evaluate"]) < set(EXTRAS["train"]), "train has evaluate's too"
    for name in EXTRAS.keys() - {"train"}:
        assert names(extras[name]) == set(EXTRAS[name]), name
    everything = next(each for each in extras["dev"] if each.startswith("lmc-sds["))
    assert set(re.findall(r"\w+", everything)) - {"lmc", "sds"} >= extras.keys() - {
        *("dev", "evaluate")
    }


def test_the_version_is_the_same_everywhere():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    first = re.search(r"^## (\S+) \(", (ROOT / "CHANGELOG.md").read_text(), re.M)[1]
    assert citation["version"] == first == lmc.__version__
    assert (ROOT / "tests/releases" / lmc.__version__).is_dir(), "python tests/releases/make.py"
    assert citation["license"] == PROJECT["license"]


def test_all_that_the_package_imports_is_a_requirement():
    """Of the light install, or of an extra."""
    known = names(PROJECT["dependencies"]) | {name for each in EXTRAS.values() for name in each}
    known |= {"lmc", *sys.stdlib_module_names, *BROUGHT}
    for file in FILES:
        for name in imports(file.read_text(encoding="utf-8"), file):
            assert name.partition(".")[0] in known, f"{file}: {name}"


def test_the_light_install_uses_releases(tmp_path):
    """Import, help and translation; nothing of the extras is even looked for."""
    code = """
from PIL import Image
import lmc.cli
from lmc import LMC, Corrector, FilterCorrector, HybridCorrector, Translator, load_translator
release, out = sys.argv[1:]
image = Image.new("RGB", (20, 30), "red")
image.save(f"{out}/cat.png")
lmc.cli.main(["translate", f"{out}/cat.png", "--translator", release, "--out", f"{out}/made"])
Translator.from_pretrained(release)
for kind in (Corrector, FilterCorrector, HybridCorrector):
    assert kind.__name__
lmc.cli.main(["--help"])
"""
    done = light(code, RELEASE, tmp_path)
    assert done.returncode == 0, done.stderr
    assert {path.name for path in (tmp_path / "made").iterdir()} == {"cat-dog.png", "cat-bear.png"}
    assert "usage: lmc COMMAND" in done.stdout


def test_a_command_names_the_extra_that_it_needs():
    commands = {
        "evaluate --translator x --shards y": "evaluate",
        "report pyproject.toml --out y": "evaluate",
        "compare configs/translator/demo.yaml --out x": "train",
        "release x --out y": "train",
        "export x --out y": "onnx",
        "dreamsampler edit --image x": "train",
    }
    code = """
import lmc.cli
for command in sys.argv[1:]:
    try:
        lmc.cli.main(command.split())
    except SystemExit as stopped:
        print(stopped.code)
"""
    done = light(code, *commands)
    for (command, extra), line in zip(commands.items(), done.stdout.splitlines(), strict=True):
        expected = rf"lmc: lmc {command.split()[0]}[ a-z]* needs \w+, which is not installed: "
        expected += rf"pip install 'lmc-sds\[{extra}\]', or in a clone '\.\[{extra}\]'"
        assert re.fullmatch(expected, line), line


def test_a_training_names_the_extra_that_it_needs():
    args = ("fit", "--config", "configs/bias/demo.yaml")
    done = light("from train_bias import main; main(sys.argv[1:])", *args)
    assert done.returncode == 1
    said = "train_bias.py: train_bias.py needs lightning, which is not installed: "
    assert done.stderr.strip() == said + "pip install 'lmc-sds[train]', or in a clone '.[train]'"


def test_what_no_extra_has_is_passed_on():
    for name in ("no_such_package", "lmc.no_such_module"):
        with pytest.raises(ImportError, match=f"^No module named '{name}'"), needs("x", "train"):
            __import__(name)
    with pytest.raises(ImportError, match=r"x needs peft, .*'lmc-sds\[vsd\]'"), needs("x", "train"):
        raise ModuleNotFoundError("No module named 'peft'", name="peft.tuners")
    assert lmc.errors.is_users(ImportError("y", name="peft"))


@pytest.mark.slow
def test_a_wheel_is_all_that_is_needed(tmp_path):
    """Built from the sdist, installed in an environment of its own, used outside the checkout.

    The light install's packages are this environment's, by path: they are not under test.
    """
    built = ["-m", "build", "--no-isolation", "--outdir", str(tmp_path / "dist"), str(ROOT)]
    subprocess.run([sys.executable, *built], check=True, capture_output=True)
    (wheel,) = (tmp_path / "dist").glob("lmc_sds-*.whl")
    home = tmp_path / "venv"
    venv.create(home, with_pip=True)
    (site,) = (home / "lib").glob("python*/site-packages")
    (site / "light.pth").write_text("\n".join(x for x in sys.path if x.endswith("-packages")))
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}

    def run(name: str, *args: object) -> str:
        command = [str(home / "bin" / name), *map(str, args)]
        done = subprocess.run(
            command, capture_output=True, cwd=tmp_path, env=environment, text=True
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    run("python", "-m", "pip", "install", "--no-deps", "--no-index", wheel)
    code = """
import json, lmc
from pathlib import Path
from importlib.metadata import version
from PIL import Image
Image.new("RGB", (9, 9)).save("cat.png")
here = Path(lmc.__file__).parent
files = [str(x.relative_to(here)) for x in here.rglob("*") if x.is_file() and x.suffix != ".pyc"]
print(json.dumps([str(here), version("lmc-sds"), sorted(files)]))
"""
    where, version, files = json.loads(run("python", "-c", code))
    assert where.startswith(str(home)) and version == lmc.__version__
    there = [path for path in (ROOT / "lmc").rglob("*") if path.is_file() and path.suffix != ".pyc"]
    assert files == sorted(str(path.relative_to(ROOT / "lmc")) for path in there)
    assert "translate" in run("lmc", "--help")
    run("lmc", "translate", "cat.png", "--translator", RELEASE, "--out", "made")
    assert len(list((tmp_path / "made").iterdir())) == 2
