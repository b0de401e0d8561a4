"""The commands that documents show: their options are there, their files too, and they run.

All are parsed, by their own parsers. They are run as they stand, document by document and in their
order, in a world where trainings are short, but for those that are only mentioned and those that
say what they need: in a block '# needs a GPU', behind them or on a line above them, else their
paragraph. Of `make` and `pip`, under which the tests themselves run, and of `python -m`, what is
named has to be there.
"""

import argparse
import importlib.util
import json
import os
import re
import runpy
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from glob import glob
from importlib import import_module
from io import BytesIO, TextIOWrapper
from itertools import takewhile
from pathlib import Path
from string import Template
from typing import Any

import pytest
import torch
from PIL import Image
from test_package import PROJECT
from test_release import TERMS, write_run

import lmc.page
from lmc.cli import COMMANDS, check_options, joined, load, main, parser_of, types_of
from lmc.cli import STAGES as READS
from lmc.corrector import Corrector
from lmc.load import load_averaged
from lmc.priors import DiffusersPrior
from lmc.training.cli import ConfigReader
from lmc.training.start import STAGES, train
from lmc.translator import Translator
from lmc.typos import check_names

import worlds

ROOT = Path(__file__).parents[1]
DOCUMENTS = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "benchmarks/README.md")),
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "data").rglob("README.md")),
    *sorted((ROOT / "examples").rglob("README.md")),
    *sorted((ROOT / "configs").rglob("*.yaml")),
]
PROGRAMS = ("lmc", "python", "make", "pip", "torchrun", "srun", "hf", "twine")
TRAININGS = {
    "train_bias.py": "bias",
    "train_translator.py": "translator",
    "data/prior/train.py": "prior",
    "data/clip/train.py": "clip",
}


@dataclass(frozen=True)
class Command:
    """What a document shows.

    Attributes:
        file: the document, from the repository's root.
        words: as a shell gives them to the program, its name first.
        block: it stands in a block, and not within a sentence.
        needs: what no test has, where that is said; else ''.
    """

    file: str
    words: tuple[str, ...]
    block: bool = True
    needs: str = ""

    @property
    def whole(self) -> bool:
        """It does something as it stands; else it is only spoken of."""
        script = self.words[0] == "python" and self.words[1:] and self.words[1].endswith(".py")
        spoken = {"RUN", "DIR", "…"} & {*self.words}
        return self.block or (("--out" in self.words or bool(script)) and not spoken)

    def __str__(self) -> str:
        return f"{self.file}: {shlex.join(self.words)}"


# ---------------------------------------------------------------------------------------------
# Read


def read(file: Path) -> list[Command]:
    """The commands of a document, or of the comment that a configuration opens with."""
    text, name = file.read_text(encoding="utf-8"), str(file.relative_to(ROOT))
    if file.suffix == ".yaml":
        # What they need is in the prose around them.
        lines = re.findall(r"^#   ((?:lmc|python) .*)", text, re.M)
        return [Command(name, tuple(shlex.split(line)), needs="see there") for line in lines]
    found = []
    fenced = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)
    blocks = [body for kind, body in fenced.findall(text) if kind in ("", "sh")]
    text = fenced.sub("", text)
    indented = re.compile(r"(?:^    .*\n|(?<=\n)\n(?=    ))+", re.M)
    blocks += [re.sub("^    ", "", body, flags=re.M) for body in indented.findall(text)]
    for body in blocks:
        found += of_block(name, body)
    for part in re.split(r"\n *\n|\n(?=\d\. |- )", indented.sub("", text)):
        needs = re.search(r"\bneeds [^.;)]+", part)
        for span in re.findall(r"(?<!`)`([^`]+)`(?!`)", part):
            if span.split()[0] in (*PROGRAMS, *TRAININGS):
                words = expanded(shlex.split(" ".join(span.split())))
                found.append(Command(name, tuple(words), False, needs[0] if needs else ""))
    return found


def of_block(file: str, body: str) -> Iterator[Command]:
    """The commands of a block; none, if no line of it is one."""
    variables: dict[str, str] = {}
    needs = ""
    lines = body.replace("\\\n", " ").splitlines()
    if not any(line.split(" ")[0] in PROGRAMS for line in lines):
        return
    for line in lines:
        said = re.search(r"(?:^|\s)#\s+(needs .*)", line)
        words = shlex.split(Template(line).safe_substitute(variables), comments=True)
        if not words:
            needs = said[1] if said else needs
        elif re.fullmatch(r"[A-Z]+=.*", words[0]):
            variables.update([words[0].split("=", 1)])
        else:
            assert words[0] in PROGRAMS, f"{file}: what is {words[0]}?"
            yield Command(file, tuple(expanded(words)), needs=said[1] if said else needs)


def expanded(words: list[str]) -> Iterator[str]:
    """With the shell's braces written out."""
    for word in words:
        start, *rest = re.split(r"\{([\w,]+)\}", word, maxsplit=1)
        yield from (start + each + rest[1] for each in rest[0].split(",")) if rest else [word]


# ---------------------------------------------------------------------------------------------
# What there is in the world where they run, besides the repository


def photographs(folder: Path, size: int = 80, count: int = 25) -> None:
    """Smooth random pictures, each another."""
    folder.mkdir(parents=True)
    for number in range(count):
        noise = torch.rand(1, 3, 5, 5, generator=torch.Generator().manual_seed(number)) * 2 - 1
        picture = torch.nn.functional.interpolate(noise, (size, size), mode="bicubic")
        (folder / f"{folder.name}-{number}.png").write_bytes(worlds.png(picture[0].clamp(-1, 1)))


def picture(file: Path) -> None:
    """Half of it white, as a mask's."""
    image = Image.new("RGB", (40, 30), "green")
    image.paste("white", (0, 0, 20, 30))
    image.save(file)


def drawing(file: Path) -> None:
    circle = "<circle cx='16' cy='16' r='9' fill='#d07030'/>"
    file.write_text(f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 32 32'>{circle}</svg>")


def edits(file: Path) -> None:
    about = {"image": "cat.png", "source_prompt": "a photo of a cat", "prompt": "a photo of a dog"}
    file.write_text(json.dumps(about) + "\n")


def trained(folder: Path) -> None:
    """What a training leaves: of a corrector of the demo's prior, or of a translator."""
    size = 256 if folder.name == "my_translator" else 16  # that of the shards it is used with
    kind, config = Translator, {"classes": ["bear", "lion"], "image_size": size, "widths": [8, 8]}
    if folder.name in ("bias", "corrector"):
        identity = DiffusersPrior("data/demo/prior").identity
        kind, config = Corrector, {"channels": 3, "widths": [8, 8], "prior": identity}
    write_run(folder, kind(**config), config)
    (folder / "config.yaml").write_text(json.dumps({"release": TERMS}))
    picture(folder / "grid.png")


def released(folder: Path) -> None:
    """The same, released."""
    trained(Path("trained") / folder.name)
    load_averaged(Path("trained") / folder.name)[0].save_pretrained(folder)


def drawings(folder: Path) -> None:
    """The demo's."""
    program = "data/demo/prepare.py"
    run_script(Path(program), [f"--out={folder}", *SMALL[program]])


def outputs(folder: Path) -> None:
    """Of any program, for the held-out pictures of `worlds.write_world`."""
    for name in ("bear", "lion"):
        (folder / name).mkdir(parents=True)
        for number in (*range(1000, 1012), *range(1100, 1112)):
            Image.new("RGB", (16, 16), "red").save(folder / name / f"{number:05d}.png")


def afhq(folder: Path) -> None:
    """Of its size, as far as it matters; and cats enough for one of them to be held out."""
    for name in ("cat", "dog", "wild"):
        photographs(folder / "train" / name, 260, 12 if name == "cat" else 1)


def heads(folder: Path) -> None:
    for name in ("bear", "dog", "lion", "squirrel", "tiger", "fox", "wolf"):
        photographs(folder / name)


# By name; made where a command names it, or its configuration does, and nothing has made it yet.
MAKERS: dict[str, Callable[[Path], object]] = {
    **dict.fromkeys(
        ("cat.png", "cat.jpg", "another.png", "mask.png", "runs/cat.png", "photo.jpg"), picture
    ),
    "cat.svg": drawing,
    "edits.jsonl": edits,
    **dict.fromkeys(("photos", "more", "photographs"), photographs),
    "afhq": afhq,
    "heads": heads,
    **dict.fromkeys(("runs/lmc", "runs/sds", "runs/lions", "runs/my_translator"), trained),
    **dict.fromkeys(("runs/bias", "runs/demo/bias"), trained),
    **dict.fromkeys(("runs/demo/release/lmc", "runs/demo/release/corrector", "me/lions"), released),
    "their_outputs": outputs,
    "runs/demo/data": drawings,
    "data/afhq/cats": lambda folder: worlds.write_world(folder, 16),
}
# No command that names these is run.
THEIRS = {"C.yaml", "my_translator.yaml", "outputs/sds", "openai/clip-vit-base-patch32"}
THEIRS |= {"runs/compare/mine"}

# That trainings and samplings are short, and that nothing is fetched.
STEP = ["--trainer.max_steps=1", "--data.batch_size=4", "--data.shuffle=4"]
FEW = ["--settings.steps=1", "--settings.whole_steps=1", "--settings.decay_steps=1"]
BIAS = ["--model.stability=0", "--model.closed_form_triplets=256", "--model.heldout_draws=1"]
SMALL: dict[str, list[str]] = {
    "train_bias.py": [*STEP, *BIAS],
    "train_translator.py": STEP,
    "data/prior/train.py": [*STEP, "--model.samples.each=1", "--model.samples.steps=1"],
    "data/clip/train.py": STEP,
    "data/demo/prepare.py": ["--count=40", "--real=2"],
    "data/afhq/prepare.py": ["--workers=1"],
    "data/openimages/prepare.py": ["--workers=1"],
    "benchmarks/loader.py": ["--workers=0", "--seconds=0.01", "--rounds=1"],
    "triplets": ["--times_per_image=1"],
    "synthesize": FEW,
    "edit": FEW,
    "edits": [*FEW, "--guidance_scales=5"],
    "dreamsampler": ["--sampler.steps=2"],
    "data/demo/check.py": ["--count=9"],
    "closed_form": ["--triplets=40", "--bins=2"],
    "stability": ["--images=1", "--steps=1"],
    "evaluate": ["--offline"],
    "page": ["--onnxruntime=onnxruntime-web"],
}


# ---------------------------------------------------------------------------------------------
# Parsed


def check(command: Command) -> None:
    """That there is what a command names.

    Raises:
        AssertionError, ValueError, argparse.ArgumentError, SystemExit: there is not.
    """
    program, args = inner(command)
    if program == "lmc":
        check_lmc(args, whole=command.block)
    elif program == "make":
        targets = re.findall(r"^(\w[\w-]*):", (ROOT / "Makefile").read_text(), re.M)
        assert set(args) <= set(targets), f"of {', '.join(targets)}"
    elif program == "pip":
        named = re.match(r"lmc-sds(?:\[(.+)\])?$", args[1])
        extras = named[1].split(",") if named and named[1] else []
        assert args[0] == "install" and {*extras} <= {*PROJECT["optional-dependencies"]}
    elif program == "-m":
        assert importlib.util.find_spec(args[0]) or args[0] in ("build",), args[0]
    elif program in TRAININGS:
        if not command.file.startswith("configs/"):  # test_configs.py builds those
            check_training(program, args)
    elif program.endswith(".py"):
        assert (ROOT / program).exists(), program
        if "argparse" in (ROOT / program).read_text():
            check_script(program, args)
    else:
        assert program in ("hf", "twine", "python"), program
    if program not in ("pip", "hf", "twine"):
        there = [word for word in args if is_path(word)]
        assert not (absent := [word for word in there if not is_there(word)]), absent


def inner(command: Command) -> tuple[str, list[str]]:
    """The program that is run in the end, 'lmc' or a script, and its arguments."""
    words = [*takewhile(lambda word: word not in ("<", ">"), command.words)]
    if words[0] in ("torchrun", "srun"):
        inside = [shlex.split(word) for word in words if word.startswith("lmc ")]
        scripts = [i for i, word in enumerate(words) if word.endswith(".py") or word == "-m"]
        words = inside[0] if inside else words[scripts[0] :]
        words = [re.sub(r"^\$SLURM_\w+$", "1", word) for word in words]
        words = ["python", *words] if words[0] == "-m" else words
    if words[:3] == ["python", "-m", "lmc.cli"]:
        words = ["lmc", *words[3:]]
    words = words[words[0] == "python" and len(words) > 1 :]
    return words[0], words[1:]


def check_lmc(args: list[str], whole: bool) -> None:
    """Of a command that is only spoken of, what is required may be missing."""
    name = next((n for n in (" ".join(args[:2]), *args[:1]) if n in COMMANDS), None)
    if name is None:  # the package, or one of several: lmc dreamsampler
        assert not args or any(each.startswith(f"{args[0]} ") for each in COMMANDS), args
        return
    words = args[len(name.split()) :]
    given = zip(words, ["", *words], strict=False)  # '…' is some value, or more of them
    words = ["x" if x == "…" else x for x, before in given if x != "…" or before.startswith("--")]
    check_options(name, words)
    if name in READS and whole:
        files = takewhile(lambda word: not word.startswith("-"), words)
        configs = [f"--config={file}" for file in files if file not in THEIRS]
        check_names(*READS[name], ["fit", *configs])
    command = load(name)
    try:
        parser_of(name, command).parse_args(joined(words, types_of(command)))
    except argparse.ArgumentError as error:
        if whole or not re.search("required|expected .*argument", str(error)):
            raise


def check_training(program: str, args: list[str]) -> None:
    """As the training reads them; '…' stands for any configuration."""
    module, name = STAGES[TRAININGS[program]]
    if not args:
        return
    some = f"configs/{TRAININGS[program]}/demo.yaml"
    args = [some if word == "…" else word for word in args]
    check_names(module, name, args)
    assert args[0] == "fit"
    ConfigReader(getattr(import_module(module), name)).read(args[1:])


class Parsed(Exception):
    """A script's arguments are what it takes."""


def check_script(program: str, args: list[str]) -> None:
    """Up to where a script has read its arguments."""
    parse = argparse.ArgumentParser.parse_args

    def stop(self: argparse.ArgumentParser, *given: Any) -> None:
        parse(self, *given)
        raise Parsed

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Parsed):
        patch.setattr(argparse.ArgumentParser, "parse_args", stop)
        run_script(ROOT / program, args)


def run_script(file: Path, args: list[str]) -> None:
    """As `python FILE ARGS`, in this process."""
    before = {*sys.modules}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [str(file), *args])
        patch.syspath_prepend(file.parent)
        try:
            runpy.run_path(str(file), run_name="__main__")
        finally:
            for name in {*sys.modules} - before:  # several are named prepare, or train
                origin = getattr(sys.modules[name], "__file__", None) or ""
                if "/lmc/" not in origin and "site-packages" not in origin:
                    del sys.modules[name]


def is_path(word: str) -> bool:
    """Whether a word, of a command, is a file or folder."""
    if word.startswith("-") or re.match(r"pipe:|https?:", word):
        return False
    return "/" in word or bool(re.search(r"\.(yaml|json|jsonl|png|jpg|py|html|tar|zip)$", word))


def is_there(word: str) -> bool:
    """Whether a file or folder is ours, is made by a command, or is what a reader has."""
    places = {*made(), *MAKERS, *THEIRS}
    inside = any(word.rstrip("/") == each or word.startswith(f"{each}/") for each in places)
    return inside or bool(glob(word, root_dir=ROOT))


@cache
def made() -> frozenset[str]:
    """The files and folders that documented commands write."""
    found = {f"runs/demo/{name}" for name in ("report.html", "results.json", "grid.png")}
    found |= {f"runs/demo/release/{name}" for name in ("lmc", "sds", "dds", "corrector")}
    for command in everything():
        words = command.words
        for option, value in zip(words, (*words[1:], ""), strict=True):
            if option in ("--out", "--run", "--sheet", "--eval_json", ">"):
                found.add(value.rstrip("/"))
    for file in (ROOT / "configs").rglob("*.yaml"):
        found |= {*re.findall(r"^(?:run|out): (\S+)", file.read_text(), re.M)}
    # data/demo/prepare.py, and no other, makes several sets.
    return frozenset(found - {"runs/demo", "-", "DIR"})


@cache
def everything() -> list[Command]:
    """All commands of all documents."""
    return [command for file in DOCUMENTS for command in read(file)]


@pytest.mark.parametrize("file", DOCUMENTS, ids=lambda file: str(file.relative_to(ROOT)))
def test_commands_name_what_there_is(file, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    for command in read(file):
        try:
            check(command)
        except BaseException as error:  # SystemExit of a parser among them
            if isinstance(error, SystemExit) and not error.code:  # help that was asked for
                continue
            pytest.fail(f"{command}\n{type(error).__name__}: {error}\n{capsys.readouterr().err}")


@pytest.mark.parametrize(
    "text",
    [
        "lmc trnslate cat.png --translator me/lions --out out",
        "lmc translate cat.png --translator me/lions --out out --too lion",
        "lmc translate cat.png --out out",
        "lmc edit --config configs/image/none.yaml --image cat.png --prompt x --out out",
        "lmc report runs/never/made.json --out report.html",
        "torchrun --nproc_per_node 2 -m lmc.cli evaluate --shard x --out out",
        "python data/demo/none.py",
        "python data/demo/prepare.py --out out --cuont 3",
        "python train_bias.py fit --config configs/bias/demo.yaml --model.widht 3",
        "python train_bias.py fit --config configs/bias/demo.yaml --data.batch_size many",
        "python train_bias.py fit --config configs/bias/none.yaml",
        "python -m lmc.none",
        "make tri",
        "pip install 'lmc-sds[none]'",
    ],
)
def test_what_is_not_there_is_found(text, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    (command,) = of_block("text.md", text)
    with pytest.raises((AssertionError, ValueError, OSError, argparse.ArgumentError, SystemExit)):
        check(command)


def test_commands_are_found(tmp_path, monkeypatch):
    """In blocks of both kinds and in sentences, with what they need."""
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    text = """`lmc edit` and `python a.py\n--b`, which needs a day.

    lmc page x \\\n        --out y  # a page
    # needs a GPU
    lmc page x{1,2} --out z

```sh
Z="--to 'a b'"
make z  # needs that
lmc y $Z
```

```python
lmc = 1
```

    v = 1

`python c.py d`
"""
    (tmp_path / "a.md").write_text(text)
    assert [(" ".join(x.words), x.whole, x.needs) for x in read(tmp_path / "a.md")] == [
        ("make z", True, "needs that"),
        ("lmc y --to a b", True, ""),
        ("lmc page x --out y", True, ""),
        ("lmc page x1 x2 --out z", True, "needs a GPU"),
        ("lmc edit", False, "needs a day"),
        ("python a.py --b", True, "needs a day"),
        ("python c.py d", True, ""),
    ]


# ---------------------------------------------------------------------------------------------
# Run


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The repository's data, configurations and scripts, as links, in a folder to work in."""
    ignored = shutil.ignore_patterns("__pycache__", "cats", "photos", ".plan")
    for name in ("data", "configs", "benchmarks"):
        shutil.copytree(ROOT / name, tmp_path / name, copy_function=os.symlink, ignore=ignored)
    for file in ROOT.glob("train_*.py"):
        (tmp_path / file.name).symlink_to(file)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def provide(command: Command) -> None:
    """Make what a command names and is not there yet."""
    configs = [word for word in command.words if word.endswith(".yaml")]
    given = zip(command.words, ["", *command.words], strict=False)
    named = [word for word, before in given if before not in ("--out", "--run")]
    texts = (re.sub(r"^(run|out):.*", "", Path(file).read_text(), flags=re.M) for file in configs)
    named += " ".join(texts).split()
    for word in named:
        for name, make in MAKERS.items():
            if re.match(rf"{name}(?![\w-])", word.strip("'\",{}")) and not Path(name).exists():
                Path(name).parent.mkdir(parents=True, exist_ok=True)
                make(Path(name))


def run(command: Command) -> None:
    """Run a command of `lmc` or a script, with `SMALL`."""
    program, args = inner(command)
    small = SMALL.get(args[0] if program == "lmc" else program, [])
    if program in TRAININGS:
        train(TRAININGS[program], [*args, *small], program)
    elif program.endswith(".py"):
        run_script(Path(program), [*args, *small])
    elif program == "lmc":
        streams = dict(zip(command.words, command.words[1:], strict=False))
        with pytest.MonkeyPatch.context() as patch, BytesIO() as output:
            if "<" in streams:
                data = BytesIO(Path(streams["<"]).read_bytes())
                patch.setattr(sys, "stdin", TextIOWrapper(data))
                patch.setattr(sys, "stdout", TextIOWrapper(output, write_through=True))
            main([*args, *small])
            if ">" in streams:
                Path(streams[">"]).write_bytes(output.getvalue())
    else:
        assert program in ("make", "pip", "-m"), f"{command}: say what it needs"


RUN = {file: [x for x in read(file) if x.whole and not x.needs] for file in DOCUMENTS}
SAID = [file for file, found in RUN.items() if {x.words[0] for x in found} - {"make", "pip"}]


@pytest.mark.parametrize("file", SAID, ids=lambda file: str(file.relative_to(ROOT)))
def test_commands_run(file, world, capsys):
    """What they write is there."""
    (world / "onnxruntime-web/dist").mkdir(parents=True)  # stands for npm's
    for name in lmc.page.RUNTIME:
        (world / "onnxruntime-web/dist" / name).touch()
    package = '{"name": "onnxruntime-web", "version": "9.8.7"}'
    (world / "onnxruntime-web/package.json").write_text(package)
    for command in RUN[file]:
        try:
            provide(command)
            run(command)
        except BaseException as error:  # SystemExit of a user's error among them
            text = f"{command}\n{type(error).__name__}: {error}\n{capsys.readouterr().err}"
            raise AssertionError(text) from error
        for option, value in zip(command.words, command.words[1:], strict=False):
            if option in ("--out", "--run", "--sheet", ">") and value != "-":
                assert Path(value).stat().st_size > 0, f"{command}: no {value}"
