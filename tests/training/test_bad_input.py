"""What users get wrong, and the one line that each of them gets to read."""

import contextlib
import json
import re
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from diffusers import UNet2DConditionModel
from test_release import translator_run
from transformers import CLIPModel, T5EncoderModel

import lmc.cli
import lmc.training.__main__ as training
import train_bias
import train_translator
from lmc.corrector import Corrector
from lmc.errors import about, is_users, require
from lmc.losses import Bridge
from lmc.priors import DiffusersPrior
from lmc.release import Terms, write_release
from lmc.shards.images import write_shard
from lmc.training import processes
from lmc.training.base import Identified, TrainingModule
from lmc.training.cli import ConfigReader
from lmc.training.start import STAGES
from lmc.training.translator import TranslatorTraining
from lmc.translator import Translator
from lmc.typos import check_names, options

import worlds

TERMS = Terms(**worlds.TERMS)
ROOT = Path(__file__).parents[2]
MAINS = {"bias": train_bias.main, "translator": train_translator.main}


@dataclass
class World:
    """Good input, and bad."""

    folder: Path
    prior: Path
    data: str

    def arguments(self, stage: str, more: str) -> list[str]:
        """A tiny training that would run, and what is wrong in place of it: a word an option."""
        run = self.folder / "run"
        args = (
            worlds.bias_args(self.prior, self.data, run)
            if stage == "bias"
            else worlds.translator_args(self.prior, self.data, run, "SDS")
        )
        names = {"here": self.folder, "prior": self.prior, "data": self.data}
        return [*args, *(word.format(**names).replace("~", " ") for word in more.split())]


CONFIGS = {
    "key.yaml": "model:\n  widht: [8, 8]\n",
    "init.yaml": "model: {loss: {class_path: lmc.losses.SDS, init_args: {guidance: 3}}}\n",
    "group.yaml": "modle: {}\n",
    "broken.yaml": "model:\n  widths: [8, 8\ndata: 3\n",
    "list.yaml": "- model\n- data\n",
    "plain.yaml": "model: {widths: [8, 8]}\n",
    "empty.yaml": "",
}


@pytest.fixture(scope="module")
def made(tiny_prior_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> World:
    """All that the cases name. Shared: `world` gives each of them a folder of its own."""
    folder = tmp_path_factory.mktemp("bad")
    data = worlds.write_world(folder / "data")
    for name, text in CONFIGS.items():
        (folder / name).write_text(text)
    (folder / "a_file").write_text("")
    (folder / "empty.tar").write_bytes(b"\0" * 10240)
    picture = worlds.png(torch.zeros(3, 16, 16))
    write_shard(folder / "unlabelled.tar", [("0", picture, "png", {"class": "cat"})])
    small = worlds.png(torch.zeros(3, 8, 8))
    write_shard(folder / "small.tar", [("0", small, "png", {"label": "cat"})])
    twice = [("0", picture, "png", {"label": "cat"}), ("0", picture, "png", {"label": "cat"})]
    for number, sample in enumerate(twice):
        write_shard(folder / f"twice-{number}.tar", [sample])
    other = {"pretrained": "another", "prediction_type": "epsilon", "digest": "0" * 64}
    write_release(Corrector(3, (8, 8), prior=other), folder / "corrector", "made up", TERMS)
    write_release(Translator(["dog"], 16, (8, 8)), folder / "translator", "made up", TERMS)
    (folder / "no_prior").mkdir()
    (folder / "odd_prior").mkdir()
    odd = {"_class_name": "FluxPipeline"}
    (folder / "odd_prior" / "model_index.json").write_text(json.dumps(odd))
    for part in ("unet", "scheduler"):
        (folder / "odd_prior" / part).mkdir()
        (folder / "odd_prior" / part / "config.json").write_text("{}")
    return World(folder, tiny_prior_folder, data)


@pytest.fixture
def world(made: World, monkeypatch: pytest.MonkeyPatch) -> World:
    """The same, where nobody may load weights."""

    def from_pretrained(*args, **kwargs):
        raise AssertionError("weights were loaded")

    for kind in (UNet2DConditionModel, T5EncoderModel, CLIPModel):
        monkeypatch.setattr(kind, "from_pretrained", from_pretrained)
    return made


# Name; stage; what is wrong, where ~ is a blank; what the line must say.
TRAININGS = [
    # What is misspelt, or no configuration at all.
    ("key in a file", "translator", "--config={here}/key.yaml",
     ["key.yaml", "model has no 'widht'", "did you mean 'widths'?"]),
    ("option of a loss in a file", "translator", "--config {here}/init.yaml",
     ["init.yaml", "model.loss (SDS)", "'guidance'", "'guidance_scale'"]),
    ("group in a file", "bias", "-c {here}/group.yaml", ["group.yaml", "'modle'", "'model'"]),
    ("option", "bias", "--model.widht=[8,8]", ["--model.widht", "did you mean 'widths'?"]),
    ("option, abbreviated", "bias", "--model.width [8,8]", ["did you mean 'widths'?"]),
    ("option of a dataclass", "translator", "--model.l2_weight.step=5",
     ["model.l2_weight", "did you mean 'steps'?"]),
    ("option of the data", "bias", "--data.batchsize=5", ["'batchsize'", "'batch_size'"]),
    ("option of the trainer", "bias", "--trainer.device=2", ["trainer", "'devices'?"]),
    ("option without its group", "bias", "--max_steps=5", ["'trainer.max_steps'?"]),
    ("option of another loss", "translator", "--model.loss.corrector=x",
     ["model.loss (SDS)", "'corrector'", "guidance_scale"]),
    ("option of a prior", "bias", "--model.prior.init_args.pretraind=x",
     ["model.prior (DiffusersPrior)", "'pretrained'?"]),
    ("no such config", "bias", "--config=no/such.yaml", ["--config", "no/such.yaml"]),
    ("broken YAML", "bias", "--config={here}/broken.yaml", ["broken.yaml, line 3", "YAML"]),
    ("YAML of a list", "bias", "--config={here}/list.yaml", ["list.yaml", "a list"]),
    ("empty YAML", "bias", "--config={here}/empty.yaml", ["empty.yaml", "nothing"]),
    ("a shard as YAML", "bias", "--config={data}/train-00000.tar", ["train-00000.tar", "YAML"]),
    ("a folder as YAML", "bias", "--config={here}", ["--config", "directory"]),
    # Classes.
    ("unknown loss", "translator", "--model.loss=NFSDX", ["model.loss", "NFSDX"]),
    ("unknown loss of lmc", "translator", "--model.loss=lmc.losses.SDDS",
     ["lmc.losses has no 'SDDS'", "did you mean"]),
    ("unknown module of lmc", "translator", "--model.loss=lmc.loss.SDS", ["'lmc.loss'"]),
    ("module that is not there", "translator", "--model.loss=no_such_module.Loss",
     ["model.loss", "'no_such_module'"]),
    ("class that is no loss", "translator", "--model.loss=lmc.unet.UNet",
     ["model.loss", "UNet"]),
    ("loss without its corrector", "translator", "--model.loss=LMC",
     ["model.loss", "corrector", "required"]),
    # Kinds of values.
    ("text for a number", "bias", "--data.batch_size=many", ["data.batch_size", "int", "many"]),
    ("number for a list", "bias", "--model.widths=7", ["model.widths", "7"]),
    ("part of a step", "bias", "--trainer.max_steps=2.5", ["trainer.max_steps", "2.5"]),
    ("unknown norm", "bias", "--model.norm=batch", ["model.norm", "'none', 'group'"]),
    # Numbers out of range.
    ("no batch", "bias", "--data.batch_size=0", ["data.batch_size", "at least 1", "got 0"]),
    ("negative batch", "translator", "--data.batch_size=-4", ["data.batch_size", "got -4"]),
    ("negative workers", "bias", "--data.num_workers=-1", ["data.num_workers", "at least 0"]),
    ("negative shuffle", "bias", "--data.shuffle=-1", ["data.shuffle", "at least 0"]),
    ("no pixels", "bias", "--data.image_size=0", ["data.image_size", "at least 1"]),
    ("negative rate", "bias", "--model.optimizer.lr=-0.1", ["model.optimizer.lr", "-0.1"]),
    ("no rate", "translator", "--model.optimizer.lr=0", ["model.optimizer.lr", "above 0"]),
    ("rate that is no number", "bias", "--model.optimizer.lr=.nan", ["model.optimizer.lr"]),
    ("growing rate", "bias", "--model.optimizer={{lr:~0.1,~factor:~2}}",
     ["model.optimizer.factor", "(0, 1]"]),
    ("decay every 0", "bias", "--model.optimizer={{lr:~0.1,~every:~0}}",
     ["model.optimizer.every", "at least 1"]),
    ("average", "translator", "--model.ema_decay=1.5", ["model.ema_decay", "[0, 1)", "1.5"]),
    ("no steps", "bias", "--trainer.max_steps=0", ["trainer.max_steps", "at least 1"]),
    ("endless steps", "translator", "--trainer.max_steps=-1", ["trainer.max_steps", "-1"]),
    ("save every 0", "bias", "--save_every=0", ["save_every", "at least 1"]),
    ("accumulate 0", "bias", "--trainer.accumulate_grad_batches=0",
     ["trainer.accumulate_grad_batches", "at least 1"]),
    ("more GPUs than there are", "bias", "--trainer.accelerator=gpu --trainer.devices=99",
     ["gpu"]),
    ("negative score weight", "translator", "--model.score_weight={{start:~-1,~end:~1}}",
     ["model.score_weight.start", "at least 0"]),
    ("negative L2 weight", "translator", "--model.l2_weight={{start:~1,~end:~-1}}",
     ["model.l2_weight.end", "at least 0"]),
    ("negative ramp", "translator", "--model.l2_weight={{start:~1,~end:~1,~steps:~-5}}",
     ["model.l2_weight.steps", "at least 0"]),
    ("share of patches", "translator", "--model.patches.share=1.5",
     ["model.patches.share", "in [0, 1]", "1.5"]),
    ("patches of no size", "translator", "--model.patches={{range:~[0,8]}}",
     ["model.patches.range", "[0, 8]"]),
    ("patches larger than the images", "translator", "--model.patches={{range:~[8,17]}}",
     ["model.patches.range [8, 17]", "17 pixels are larger", "16 x 16"]),
    ("patches from before", "translator", "--model.patches={{from_step:~-1}}",
     ["model.patches.from_step", "at least 0"]),
    ("option of patches", "translator", "--model.patches.shares=1", ["'shares'", "'share'"]),
    ("L2 rescaled by nothing", "translator",
     "--model.l2_rescale=true --model.loss.rescale=false", ["model.l2_rescale", "rescale to true"]),
    ("L2 of an odd size", "translator", "--model.l2_size=5",
     ["model.l2_size must divide model.image_size 16, got 5"]),
    ("no held-out images", "translator", "--model.validation.images=0",
     ["model.validation.images", "at least 1"]),
    ("negative guidance", "translator", "--model.loss.guidance_scale=-1",
     ["model.loss", "guidance_scale", "-1"]),
    ("guidance 0 rescaled", "translator", "--model.loss.guidance_scale=0",
     ["model.loss", "guidance_scale 0", "set rescale to false"]),
    ("times reversed", "bias", "--model.time_range=[0.9,0.1]", ["model: time_range", "0.9"]),
    ("times of a loss reversed", "translator",
     "--model.time=UniformTime --model.time.time_range=[0.9,0.1]", ["model.time", "0.9"]),
    ("a t each for SDI", "translator", "--model.loss=SDI --model.time=UniformTime",
     ["sdi", "FallingTime"]),
    ("negative rate of a LoRA", "translator", "--model.loss=VSD --model.loss.lora_lr=-1",
     ["model.loss", "lora_lr", "above 0"]),
    # Networks.
    ("one width", "translator", "--model.widths=[1]", ["model: widths", "at least two", "[1]"]),
    ("widths for groups", "bias", "--model.widths=[7,7] --model.norm=group",
     ["widths", "8 divides", "[7, 7]"]),
    ("size that cannot be halved", "translator", "--model.image_size=50 --model.widths=[8,8,8]",
     ["model: image_size 50", "48 or 52 would do"]),
    ("prior's size that cannot be halved", "bias", "--model.widths=[8,8,8,8,8,8]",
     ["model.widths", "model.prior", "16", "32 would do"]),
    # Classes of pictures.
    ("no classes", "translator", "--model.classes=[]", ["model: classes", "[]"]),
    ("a class twice", "translator", "--model.classes=[dog,dog]", ["classes", "distinct"]),
    ("a source among the targets", "translator", "--model.classes=[cat,dog]",
     ["model.source 'cat'", "model.classes"]),
    ("a prompt for one", "translator", "--model.prompt=photo", ["model.prompt 'photo'", "{}"]),
    # Shards.
    ("missing shards", "bias", "--data.train={here}/none-*.tar",
     ["data.train", "none-*.tar", "prepare"]),
    ("missing held-out shards", "translator", "--data.heldout={here}/none.tar",
     ["data.heldout", "none.tar"]),
    ("empty shard", "bias", "--data.train={here}/empty.tar", ["data.train", "empty.tar"]),
    ("a shard that is none", "bias", "--data.train={here}/a_file",
     ["data.train", "a_file", "no tar"]),
    ("no labels", "translator", "--data.train={here}/unlabelled.tar",
     ["data.train", "unlabelled.tar", "label"]),
    ("shards of another size", "translator", "--data.heldout={here}/small.tar",
     ["data.heldout", "8 x 8", "image_size", "16"]),
    ("another size of the data", "translator", "--data.image_size=32", ["image_size", "32"]),
    ("another size of the model", "translator", "--model.image_size=32",
     ["model.image_size 32", "data.image_size 16"]),
    ("trained on what is held out", "bias", "--data.heldout={data}/train-00000.tar",
     ["data.heldout", "train-00000.tar", "data.train too"]),
    ("a key twice", "translator", "--data.heldout={here}/twice-*.tar",
     ["data.heldout", "twice-*.tar", "key"]),
    # Priors, correctors, CLIP.
    ("missing prior", "bias", "--model.prior.init_args.pretrained=no/such/prior",
     ["no/such/prior"]),
    ("an empty folder as prior", "translator",
     "--model.prior.init_args.pretrained={here}/no_prior", ["no_prior", "model_index.json"]),
    ("a prior of another kind", "bias", "--model.prior.init_args.pretrained={here}/odd_prior",
     ["odd_prior", "FluxPipeline", "supported are"]),
    ("missing corrector", "translator", "--model.loss=LMC --model.loss.corrector=no/such/one",
     ["model.loss", "no/such/one", "lmc release"]),
    ("another prior's corrector", "translator",
     "--model.loss=LMC --model.loss.corrector={here}/corrector",
     ["model.loss", "another", "for this prior"]),
    ("a translator as corrector", "translator",
     "--model.loss=LMC --model.loss.corrector={here}/translator", ["model.loss", "translator"]),
    ("missing closed form", "bias", "--model.closed_form=no/such/one",
     ["model.closed_form", "no/such/one", "lmc closed_form"]),
    ("a trained corrector as closed form", "bias", "--model.closed_form={here}/corrector",
     ["model.closed_form", "trained"]),
    ("missing CLIP", "translator", "--model.validation.clip=no/such/clip",
     ["model.validation.clip", "no/such/clip"]),
    # Run folders.
    ("a file as run folder", "bias", "--run={here}/a_file", ["run folder", "a_file", "a file"]),
    ("a run folder in a file", "bias", "--run={here}/a_file/run", ["run folder", "a_file"]),
    ("a run folder nobody can make", "bias", "--run=/proc/none/run", ["run folder", "/proc"]),
]  # fmt: skip


@pytest.mark.parametrize(
    ("stage", "wrong", "words"), [case[1:] for case in TRAININGS],
    ids=[case[0] for case in TRAININGS],
)  # fmt: skip
def test_a_training_says_what_is_wrong_in_one_line(world, capfd, stage, wrong, words):
    with pytest.raises(SystemExit) as left:
        MAINS[stage](world.arguments(stage, wrong))
    printed = capfd.readouterr().err
    assert "Traceback" not in printed
    line = left.value.code  # Python prints it, and exits with status 1
    assert isinstance(line, str)
    assert line.startswith(f"train_{stage}.py: ") and "\n" not in line
    for word in words:
        assert word in line
    assert not (world.folder / "run").exists()


def test_a_prior_of_classes_refuses_a_losss_words_and_says_whose_they_are(family_folder):
    prior = DiffusersPrior(str(family_folder("ddpm")))
    training = TranslatorTraining(prior, Bridge(), ["1"], "2", "{}", 16, (8, 8))
    with pytest.raises(ValueError, match=r"the loss 'bridge': .*no class '1, .*adds words"):
        training.prepare_data()


def test_what_is_right_gets_past_all_checks(made, monkeypatch):
    """Or the cases above would prove nothing: the same without what is wrong begins to load."""

    class Begun(Exception):
        pass

    def begun(*args, **kwargs):
        raise Begun

    monkeypatch.setattr(UNet2DConditionModel, "from_pretrained", begun)
    for stage, main in MAINS.items():
        with pytest.raises(Begun):
            main(made.arguments(stage, "--run={here}/right"))


def test_a_bug_keeps_its_traceback(world, monkeypatch):
    def bug(*args):
        raise ZeroDivisionError

    monkeypatch.setattr(TrainingModule, "check", bug)
    monkeypatch.setattr(TranslatorTraining, "check", bug)
    with pytest.raises(ZeroDivisionError):
        train_translator.main(world.arguments("translator", ""))


# ---------------------------------------------------------------------------------------------
# The commands of `lmc`

EDITS = '{"image": "x.png", "source_prompt": "a cat"}'
PRIOR = "--prior=lmc.priors.DiffusersPrior --prior.pretrained={prior}"
# What is wrong, where ~ is a blank and {out} a folder that must not come about; what the line says.
COMMANDS = {
    "no such command": ("translat x", ["translat;", "did you mean translate?"]),
    "option": ("edit --promt x", ["--promt", "did you mean --prompt?"]),
    "option with hyphens": ("evaluate --batch-size 3", ["--batch-size", "--batch_size"]),
    "option of a dataclass": (
        f"edit {PRIOR} --loss SDS --image x --prompt y --out {{out}} --settings.step=3",
        ["settings.step"],
    ),
    "task": ("dreamsampler inpant", ["inpant", "did you mean inpaint?"]),
    "a text for an image": (
        "translate {here}/a_text.png --translator {here}/translator --out {out}",
        ["1 of 1 files", "a_text.png", "no known format"],
    ),
    "a folder without images": (
        "translate {here}/no_prior --translator {here}/translator --out {out}",
        ["no images", "no_prior"],
    ),
    "a class that is none": (
        "translate {here}/a_text.png --translator {here}/translator --to cow --out {out}",
        ["'cow'", "dog"],
    ),
    "no translator": (
        "translate {here}/a_text.png --translator {here}/no_prior --out {out}",
        ["no config.json"],
    ),
    "a corrector as translator": (
        "translate {here}/a_text.png --translator {here}/corrector --out {out}",
        ["Corrector, not a Translator"],
    ),
    "nothing to evaluate": ("evaluate --out {out}", ["--shards", "--translator"]),
    "no workers": (
        "evaluate --shards {data}/heldout-*.tar --translator {here}/translator --num_workers=-1",
        ["num_workers"],
    ),
    "no batch": (
        "evaluate --shards {data}/heldout-*.tar --translator {here}/translator --batch_size=0 "
        "--offline",
        ["batch_size", "at least 1"],
    ),
    "no results": ("report {here}/none.json --out {out}", ["none.json"]),
    "a shell command in results": ("report {here}/pipe.json --out {out}", ["pipe:", "--shards"]),
    "pictures": ("report {here}/pipe.json --pictures=-1 --out {out}", ["pictures", "-1"]),
    "a run that is none": (
        "release {here}/none --out {out} --license mit",
        ["none", "train first"],
    ),
    "no licence": ("release {run} --out {out}", ["--license", "--data", "--prior_license"]),
    "no configuration": ("triplets {here}/none.yaml --out {out}", ["none.yaml"]),
    "a list for a configuration": ("triplets {here}/list.yaml --out {out}", ["list.yaml"]),
    "a misspelt key": ("closed_form {here}/key.yaml --out {out}", ["'widht'", "'widths'"]),
    "no prior in it": ("closed_form {here}/plain.yaml --out {out}", ["plain.yaml", "model.prior"]),
    "no bins": ("closed_form {here}/plain.yaml --bins=0 --out {out}", ["bins", "at least 1"]),
    "a configuration as an option": (
        "compare --config {here}/key.yaml --out {out}",
        ["without --config"],
    ),
    "a loss that is none": (
        "compare {here}/plain.yaml --losses sdss --out {out}",
        ["'sdss'", "sds"],
    ),
    "a broken comparison": ("report {here}/comparison --out {out}", ["results.json", "no JSON"]),
    "another comparison": ("report {here}/other --out {out}", ["comparison.json", "'config'"]),
    "no jobs": ("compare {here}/plain.yaml --jobs 0 --out {out}", ["jobs", "at least 1"]),
    "a device that is none": (
        "translate {here}/a_text.png --translator {here}/translator --device gpu --out {out}",
        ["'gpu'"],
    ),
    "no photo": (
        f"edit {PRIOR} --loss SDS --image {{here}}/none.png --prompt x --out {{out}}",
        ["none.png"],
    ),
    "edits that are none": (
        f"edits {PRIOR} --list {{here}}/edits.jsonl --clip x --losses sds --out {{out}}",
        ["edits.jsonl, line 1"],
    ),
    "a scale that is none": (
        f"edits {PRIOR} --list {{here}}/edits.jsonl --clip x --guidance_scales=a --out {{out}}",
        ["guidance_scales", "'a'"],
    ),
    "a picture that is to be none": (
        f"gradients {PRIOR} --image {{here}}/a_text.png --prompt x --corrector identity "
        "--out {out}",
        [".png"],
    ),
    "a mask without": (
        f"dreamsampler inpaint {PRIOR} --image {{here}}/a_text.png --out {{out}}",
        ["mask"],
    ),
}


@pytest.mark.parametrize("wrong", COMMANDS)
def test_a_command_says_what_is_wrong_in_one_line(world, tmp_path, capfd, wrong):
    here = world.folder
    (here / "a_text.png").write_text("not a picture")
    (here / "edits.jsonl").write_text(EDITS)
    for name, text in (("comparison", "{"), ("other", '{"source": {}, "losses": {}}')):
        (here / name).mkdir(exist_ok=True)
        (here / name / "results.json").write_text(text)
        (here / name / "comparison.json").write_text("{}")
    row = {"images": 1, "path": str(here / "translator"), "summary": {}}
    about = {"shards": f"pipe:touch {tmp_path}/touched", "image_size": 16, "keys": [], "digest": ""}
    settings = {"classes": ["dog"], "candidates": [], "clip": None}
    result = {"format": "lmc evaluation", "version": 1, "rows": {"one": row}, "heldout": about}
    result |= {"settings": settings, "differences": {}, "left_out": []}
    (here / "pipe.json").write_text(json.dumps(result))
    out, run = tmp_path / "out", tmp_path / "run"
    args, words = COMMANDS[wrong]
    names = {"here": here, "prior": world.prior, "data": world.data, "out": out, "run": run}
    if "{run}" in args:
        translator_run(run)
    with pytest.raises(SystemExit) as caught:
        lmc.cli.main([word.format(**names).replace("~", " ") for word in args.split()])
    line, said = caught.value.code, capfd.readouterr().err
    if line == 3:  # files were left out; what was said of it is the last line
        line = said.splitlines()[-1]
    assert isinstance(line, str) and line.startswith("lmc: ") and "\n" not in line
    assert all(word in line for word in words), line
    assert "Traceback" not in said
    assert not list(out.glob("**/*.*")) and not (tmp_path / "touched").exists()


def test_a_broken_file_does_not_end_the_others(made, tmp_path, capsys):
    """One is named, the other translated; the status says that not all went well."""
    (tmp_path / "good.png").write_bytes(worlds.png(torch.zeros(3, 16, 16)))
    (tmp_path / "broken.jpg").write_bytes(worlds.png(torch.zeros(3, 16, 16))[:60])
    args = ["translate", str(tmp_path), "--translator", str(made.folder / "translator")]
    with pytest.raises(SystemExit) as left:
        lmc.cli.main([*args, "--out", str(tmp_path / "out")])
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["good-dog.png"]
    assert left.value.code == 3
    lines = capsys.readouterr().err.splitlines()
    assert any(line.startswith("left out: ") for line in lines)
    assert lines[-1].startswith("lmc: 1 of 2 files cannot be read: ")
    assert "broken.jpg" in lines[-1]


def test_a_command_s_bug_keeps_its_traceback(made, tmp_path, monkeypatch):
    """A ValueError out of another library is none of the user's."""

    def broken(*args, **kwargs):
        return json.loads("{")

    monkeypatch.setattr("lmc.translate.load_translator", broken)
    with pytest.raises(ValueError, match="Expecting property name"):
        args = ["translate", __file__, "--translator", "y", "--out", str(tmp_path / "out")]
        lmc.cli.main(args)


def test_an_import_of_our_own_that_fails_is_a_bug():
    assert is_users(ModuleNotFoundError("No module named 'lpips'", name="lpips"))
    assert not is_users(ImportError("cannot import name 'x'", name="lmc.losses"))


# ---------------------------------------------------------------------------------------------
# In a moment


def fresh(code: str) -> list[str]:
    """The lines that a new Python prints."""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.parametrize(
    ("option", "word"),
    [
        ("--model.widht=3", "'widths'"),
        ("--model.loss=NFSDX", "'NFSD'"),  # known without its import where none has subclassed it
        ("--model.time=FalingTime", "'FallingTime'"),
    ],
)
def test_a_typo_is_named_without_waiting_for_torch(option, word):
    """The imports that take the seconds are not made; a limit in seconds would test the machine."""
    line, imported = fresh(
        "import sys, train_translator\n"
        "config = 'configs/translator/demo.yaml'\n"
        f"try: train_translator.main(['fit', '--config', config, {option!r}])\n"
        "except SystemExit as left: print(left.code)\n"
        "print(*{'torch', 'lightning', 'jsonargparse', 'numpy'} & set(sys.modules), '.')\n"
    )
    assert word in line and imported == "."


def test_the_script_itself_ends_at_once_with_one_line(made, tmp_path):
    """No batch ate 15 GB, and did not end."""
    args = made.arguments("bias", f"--data.batch_size=0 --run={tmp_path}/run")
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, ROOT / "train_bias.py", *args], capture_output=True, text=True, timeout=180
    )
    assert done.returncode == 1, time.monotonic() - began
    line = "train_bias.py: data.batch_size must be at least 1, got 0"
    assert [each for each in done.stderr.splitlines() if "Seed set" not in each] == [line]
    assert not (tmp_path / "run").exists()


def test_the_module_says_which_stage(capsys):
    with pytest.raises(SystemExit, match=r"lmc\.training bias: --model\.widht: .*'widths'"):
        training.main(["bias", "fit", "--model.widht=3"])
    with pytest.raises(SystemExit, match=r"usage: .*bias,translator"):
        training.main(["corrector", "fit"])


# ---------------------------------------------------------------------------------------------
# No false alarm


@pytest.mark.parametrize("stage", STAGES)
def test_every_config_and_command_in_the_docs_passes(stage):
    module, name = STAGES[stage]
    files = sorted((ROOT / "configs" / stage).glob("*.yaml"))
    assert files
    for file in files:
        check_names(module, name, ["fit", "--config", str(file)])
    script = rf"train_{stage}\.py" if stage in MAINS else rf"data/{stage}/train\.py"
    found = 0
    texts = [*ROOT.glob("*.md"), *ROOT.glob("*/*.md"), *ROOT.glob("configs/*/*.yaml")]
    for text in [*texts, ROOT / "data" / "demo" / "run.py"]:
        # Commands as they are printed, with what is continued on the next line.
        joined = re.sub(r"\\\n[#\s]*", " ", text.read_text())
        for command in re.findall(rf"{script} (fit [^`\n]*)", joined):
            words = [word for word in command.split() if "…" not in word]
            words = [re.sub(r"^my_\w+\.yaml$", str(files[0]), word) for word in words]
            with contextlib.chdir(ROOT):
                check_names(module, name, words)
            found += 1
    assert found >= 2


@pytest.mark.parametrize("stage", STAGES)
def test_all_that_the_parser_knows_is_known(stage):
    """The sources are read as the parser reads the classes: neither more nor fewer options."""
    module, name = STAGES[stage]
    kind = getattr(__import__(module, fromlist=[name]), name)
    actions = ConfigReader(kind)._parser("fit")._actions
    known = {word for action in actions for word in action.option_strings}
    assert {"--model.ema_decay", "--data.train", "--trainer.max_steps", "--run", "-c"} <= known
    for word in sorted(known):
        check_names(module, name, ["fit", word, "{}"] if word[1:] not in ("c", "-config") else [])
    for group in ("model", "data", "trainer"):
        with pytest.raises(ValueError, match=f"{group} has no 'nothing'"):
            check_names(module, name, ["fit", f"--{group}.nothing=1"])


@pytest.mark.parametrize("stage", MAINS)
def test_a_run_s_own_config_passes(stage, made, capsys, tmp_path):
    """With every key there is, as the run folder has it."""
    with pytest.raises(SystemExit) as left:
        MAINS[stage]([*made.arguments(stage, ""), "--print_config"])
    assert not left.value.code
    file = tmp_path / "config.yaml"
    file.write_text(capsys.readouterr().out)
    assert yaml.safe_load(file.read_text())["trainer"]["max_steps"] == 4
    check_names(*STAGES[stage], ["fit", "--config", str(file)])


@pytest.mark.parametrize(
    "words",
    [
        "--help",
        "-h",
        "--model.loss.help",
        "--model.loss.help lmc.losses.SDS",
        "--print_config=skip_null",
        "--config {demo} --print_config",
        "-c {demo} --config={demo}",
        "--config {demo} --trainer.callbacks+=lmc.training.callbacks.Progress",
        "--config {demo} --trainer.callbacks+ Timer --trainer.callbacks.interval step",
        '--trainer={{"max_steps":3}}',
        '--model.loss={{"class_path":"SDS","init_args":{{"guidance_scale":3}}}}',
        "--model.loss SDS --model.loss.guidance_scale=3 --model.loss.init_args.rescale=false",
        "--model.loss lmc.SDS --model.loss.guidance_scale=3",
        "--config {demo} --model.loss SDS --model.loss.guidance_scale -1",
        "--config {demo} --model.loss tests.failing_loss.Mine --model.loss.anything 1",
        "--model.prior tests.Mine --model.prior.anything 1",
        "--model.prior.classes.cat 3 --model.prior.init_args.classes.cat=3",
        "--model.time null --model.closed_form null",
        "--dry_run true --trainer.devices -1 --seed_everything=false",
        "--ckpt_path last --weights_only true",
        "--model.score_weight.start 1 --model.score_weight score.yaml",
        "--model model.yaml --data data.yaml",
        '{{"model":{{"seed":1}}}}',
        '--config={{"model":{{"seed":1}}}}',
    ],
)
def test_what_the_parser_takes_is_not_refused(words):
    demo = ROOT / "configs" / "translator" / "demo.yaml"
    module, name = STAGES["translator"]
    given = [word.format(demo=demo) for word in words.split()]
    given = [word for word in given if "closed_form" not in word]
    check_names(module, name, ["fit", *given])


def test_a_later_file_changes_options_of_an_earlier_one_s_class(tmp_path):
    """An overlay need not name the class again, and another class forgets the first one's."""
    for name, text in (
        ("lmc.yaml", "model: {loss: {class_path: LMC, init_args: {corrector: x}}}"),
        ("more.yaml", "model: {loss: {init_args: {keep_ratio: true}}}"),
        ("sds.yaml", "model: {loss: SDS}"),
    ):
        (tmp_path / name).write_text(text)

    def check(*names: str) -> None:
        files = [word for name in names for word in ("--config", str(tmp_path / f"{name}.yaml"))]
        check_names(*STAGES["translator"], ["fit", *files])

    check("lmc", "more")
    check("lmc", "more", "sds")
    with pytest.raises(ValueError, match=r"more.yaml: model.loss \(SDS\) has no 'keep_ratio'"):
        check("sds", "more")


def test_a_class_whose_arguments_cannot_be_told_is_left_to_the_parser(tmp_path, monkeypatch):
    import ast

    from lmc import typos

    source = """
class Plain:
    def __init__(self, a, *, b=1): ...
class Passes(Plain):
    def __init__(self, c=0, *args, **kwargs):
        super().__init__(*args, **kwargs)
class Inherits(Passes): ...
class Takes(Plain):
    def __init__(self, **kwargs):
        self.d = kwargs.pop("d")
        super().__init__(**kwargs)
class Foreign(torch.nn.Module):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
@decorated
class Decorated: ...
@dataclass(frozen=True)
class Fields:
    e: int
    f: int = 3
@dataclass
class More(Fields):
    g: int = 3
"""
    tree = ast.parse(source)
    monkeypatch.setattr(typos, "_source", lambda module: tree)
    typos.find.cache_clear()
    typos.options.cache_clear()

    def known(name: str) -> list[str] | None:
        found = typos.find("made.up", name)
        assert found is not None
        names = options(found)
        return None if names is None else sorted(names)

    try:
        assert known("Plain") == ["a", "b"]
        assert known("Passes") == known("Inherits") == ["a", "b", "c"]
        assert known("Takes") is known("Foreign") is known("Decorated") is None
        assert known("Fields") == ["e", "f"] and known("More") == ["e", "f", "g"]
    finally:
        typos.find.cache_clear()
        typos.options.cache_clear()


# ---------------------------------------------------------------------------------------------
# The parts


def test_errors_name_the_option():
    with pytest.raises(ValueError, match=r"^model\.loss: guidance"), about("model.loss"):
        raise ValueError("guidance")
    with pytest.raises(FileNotFoundError, match=r"^data\.train: none"), about("data.train"):
        raise FileNotFoundError("none")
    require(True, "a", "b", 0)
    with pytest.raises(ValueError, match=r"^a\.b must be at least 1, got nan$"):
        require(float("nan") >= 1, "a.b", "at least 1", float("nan"))


@pytest.mark.parametrize(("mine", "traces"), [(True, False), (False, True)])
def test_a_rank_prints_the_traceback_of_a_bug_only(monkeypatch, capsys, mine, traces):
    monkeypatch.setattr(processes, "_exit_now", lambda: None)
    trainer = SimpleNamespace(
        world_size=2, loggers=[], strategy=SimpleNamespace(launcher=None), global_rank=1
    )
    callback = processes.EndTogether()
    callback.setup(trainer, None, "fit")
    try:
        require(not mine, "data.batch_size", "at least 1", 0)
        raise RuntimeError("broken")
    except (ValueError, RuntimeError) as error:
        callback.on_exception(trainer, None, error)
    printed = capsys.readouterr().err
    assert ("Traceback" in printed) is traces
    assert printed.splitlines()[-1].startswith("rank 1 of 2 failed: ")
    assert ("data.batch_size must be at least 1, got 0" in printed) is mine


def test_the_identity_is_taken_by_rank_zero_for_all(monkeypatch):
    class Unasked:
        channels = 3

        @property
        def identity(self):
            raise AssertionError("the weights were read by another rank too")

    strategy = SimpleNamespace(broadcast=lambda mine: {"digest": "of rank zero"})
    module = SimpleNamespace(
        prior=Unasked(), trainer=SimpleNamespace(is_global_zero=False, strategy=strategy)
    )
    assert TrainingModule.share_identity(module) == {"digest": "of rank zero"}
    assert isinstance(module.prior, Identified) and module.prior.channels == 3
    assert module.prior.identity == {"digest": "of rank zero"}


def test_a_corrector_still_names_its_prior(tiny_prior_folder, made, tmp_path):
    """Though its constructor no longer reads the prior's weights."""
    args = [*made.arguments("bias", "--trainer.max_steps=1"), f"--run={tmp_path}"]
    cli = train_bias.main(args)
    identity = dict(cli.model.prior.identity)
    assert len(identity["digest"]) == 64 and cli.model.corrector.prior == identity
    saved = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)
    assert saved["network"]["config"]["prior"] == identity
