"""The configurations: each parses and builds, opens as it must, and names what there is."""

import importlib
import re
import shlex
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml

import train_bias
import train_translator
from lmc.corrector import Corrector
from lmc.release import Terms, stated, write_release
from lmc.specs import LOSSES
from lmc.training.base import StepDecay
from lmc.training.bias import CorrectorTraining
from lmc.training.cli import ConfigReader, TrainingCLI
from lmc.training.clip import ClipTraining
from lmc.training.prior import PriorTraining
from lmc.training.start import train
from lmc.training.translator import TranslatorTraining
from lmc.translator import Translator

import worlds
from gaussian import GaussianPrior

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "configs"
STAGES = {
    "bias": (train_bias.main, CorrectorTraining),
    "translator": (train_translator.main, TranslatorTraining),
}
LABELLED = {"prior": PriorTraining, "clip": ClipTraining}
# The overlays, by the family whose tiny pipeline stands in for the prior's weights.
PRIORS = {
    "if-m": "if",
    "if-l": "if",
    "if-xl": "if",
    "sd15": "sd15",
    "sd21-base": "sd21-base",
    "sd21": "sd21",
    "sdxl": "sdxl",
    "sd35-medium": "sd35",
    "dit": "dit",
}


def header(file: Path) -> str:
    """The comment that a configuration opens with."""
    return "".join(re.findall(r"^#.*\n", file.read_text(), re.M))


def commands(file: Path) -> list[list[str]]:
    """The commands of the header, in words."""
    found = re.findall(r"^#   ((?:python|lmc|tar) .*)", header(file), re.M)
    return [shlex.split(command) for command in found]


def command(file: Path, stage: str) -> list[str]:
    """The arguments that the header gives to a stage's script; paths from the repository's root."""
    found = [words for words in commands(file) if words[1] == f"train_{stage}.py"]
    assert len(found) == 1, "one command a stage"
    return [str(ROOT / word) if word.startswith("configs/") else word for word in found[0][2:]]


@pytest.fixture(scope="module")
def corrector(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A release, of no prior that is there."""
    folder = tmp_path_factory.mktemp("corrector")
    network = Corrector(3, [8, 8], prior={"digest": "0"})
    write_release(network, folder, "made up", Terms(**worlds.TERMS))
    return folder


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("which", ["demo", "paper", *PRIORS])
def test_configs_build_their_training(
    stage, which, family_folder, corrector, tmp_path, monkeypatch
):
    """By the header's own command, with a tiny prior in place of its own; built, not run."""
    monkeypatch.setattr(TrainingCLI, "_run_subcommand", lambda self, subcommand: None)
    file = CONFIGS / ("priors" if which in PRIORS else stage) / f"{which}.yaml"
    main, module = STAGES[stage]
    args = command(file, stage)
    prior = ConfigReader(module).read(args[1:])["model"]["prior"]
    own = yaml.safe_load(file.read_text())["model"]["prior"]
    assert {**prior["init_args"], **own["init_args"]} == prior["init_args"]
    assert prior["init_args"]["dtype"] == ("float32" if which == "demo" else "bfloat16")
    folder = family_folder(PRIORS.get(which, "if"))
    args += [f"--run={tmp_path}", f"--model.prior.init_args.pretrained={folder}"]
    if stage == "translator":
        args += [f"--model.loss.corrector={corrector}"]
    cli = main(args)
    model, data = cli.model, cli.datamodule
    if stage == "translator":
        rows = model.prior.embed(model.prompts).tensors  # its classes are classes of the prior
        assert {len(value) for value in rows.values()} == {2 + len(model.translator.classes)}
        assert data.image_size is None and model.image_size == (32 if which == "demo" else 256)
    else:
        bounded = which != "demo" and not model.prior.latent  # the demo's is a hybrid
        assert model.corrector.unet.bounded is bounded
        assert data.image_size == (32 if which == "demo" else None)
        assert model.image_size == model.prior.image_size
    if which in ("paper", "if-m"):
        size = sum(p.numel() for p in model.network.parameters())
        assert size == {"bias": 7_849_603, "translator": 7_850_115}[stage]
    if which != "demo":
        assert data.batch_size == model.paper_batch
        rates = {"bias": StepDecay(1e-4, 0.9, 100_000), "translator": StepDecay(5e-5, 0.9, 50_000)}
        assert model.adam == rates[stage]
        # The weights' own licence is for who releases them to say, and what they were trained on.
        given = {**worlds.TERMS, "prior_license": None}
        repo = own["init_args"]["pretrained"]
        config = yaml.safe_load(file.read_text())
        assert stated(config, **given).prior_license.startswith(f"{repo}, ")
    else:
        assert stated(yaml.safe_load(file.read_text())).license == "apache-2.0"


def test_eight_classes_are_all_that_the_demo_draws(monkeypatch):
    """And nothing else is another than with four."""
    monkeypatch.syspath_prepend(ROOT / "data" / "demo")
    drawn = importlib.import_module("animals").CLASSES
    reader, file = ConfigReader(TranslatorTraining), CONFIGS / "translator" / "demo-eight.yaml"
    args = command(file, "translator")
    four, eight = reader.read([args[1], args[2]]), reader.read(args[1:])
    classes = eight["model"].pop("classes")
    assert classes[:4] == four["model"].pop("classes")
    assert sorted([eight["model"]["source"], *classes]) == sorted(drawn)
    assert eight.pop("run") != four.pop("run") and eight == four


def test_what_make_try_uses_is_small_and_trained_longer(tmp_path):
    """Else as the eight classes, with the corrector that is released beside it."""
    reader, file = ConfigReader(TranslatorTraining), CONFIGS / "translator" / "demo-try.yaml"
    args = command(file, "translator")
    eight, mine = (reader.read(args[1:n])["model"] for n in (5, 7))
    given = {key: mine[key] for key in ("classes", "image_size", "widths", "norm", "residual")}
    network = Translator(**given, gated=mine["gated"])
    write_release(network, tmp_path / "out", "made up", Terms(**worlds.TERMS), half=True)
    assert sum(each.stat().st_size for each in (tmp_path / "out").iterdir()) < 1.49e6
    own = yaml.safe_load(file.read_text())
    assert own["trainer"]["max_steps"] > reader.read(args[1:5])["trainer"]["max_steps"]
    corrector = mine["loss"]["init_args"]["corrector"]
    assert f"--out {corrector} --half" in header(file)
    for key in own["model"]:
        assert eight.pop(key) != mine.pop(key), key
    assert eight == mine


@pytest.mark.parametrize("stage", LABELLED)
def test_configs_on_labelled_pictures_build_their_training(stage, tmp_path, monkeypatch):
    """By the header's own command; of the classes and captions that the demo draws."""
    monkeypatch.setattr(TrainingCLI, "_run_subcommand", lambda self, subcommand: None)
    monkeypatch.syspath_prepend(ROOT / "data" / "demo")
    animals = importlib.import_module("animals")
    (words,) = [x for x in commands(CONFIGS / stage / "demo.yaml") if x[1].endswith("train.py")]
    assert words[1] == f"data/{stage}/train.py"
    args = [str(ROOT / word) if word.startswith("configs/") else word for word in words[2:]]
    cli = train(stage, [*args, f"--run={tmp_path}"], words[1])
    assert type(cli.model) is LABELLED[stage] and cli.model.classes == list(animals.CLASSES)
    captions = [animals.caption(i) for i in range(len(animals.CLASSES))]
    assert cli.model.network.arguments["captions"] == captions


def test_what_is_recommended_is_trained_on_the_triplets_that_its_header_makes():
    file = CONFIGS / "bias" / "recommended.yaml"
    triplets = commands(file)[0]
    config = ConfigReader(CorrectorTraining).read(command(file, "bias")[1:])
    assert [*triplets[:2], triplets[3]] == ["lmc", "triplets", "--out"]
    assert config["data"]["train"] == f"{triplets[4]}/train-*.tar"
    model, paper = (
        config["model"],
        ConfigReader(CorrectorTraining).read([f"--config={triplets[2]}"]),
    )
    assert (model["kind"], model["statistics"]) == ("hybrid", "calibrated")
    assert model["restoring"] is not None and model["prior"] == paper["model"]["prior"]
    said = re.search(
        r"with (\d+) M photographs (\d+) M evaluations, ([\d.]+) GPU hours", header(file)
    )
    photographs, evaluations, hours = map(float, said.groups())
    assert evaluations == photographs * int(triplets[triplets.index("--times_per_image") + 1])
    assert hours == pytest.approx(evaluations * 1e6 * 0.23 / 200 / 3600, rel=0.04)


FACES = {**STAGES, **{stage: (None, kind) for stage, kind in LABELLED.items()}}


@pytest.mark.parametrize("which", ["faces", "faces-64"])
@pytest.mark.parametrize("stage", FACES)
def test_the_configs_of_faces_build_their_training(
    stage, which, family_folder, corrector, tmp_path, monkeypatch
):
    """By the header's own command; their classes are those that the script prepares."""
    monkeypatch.setattr(TrainingCLI, "_run_subcommand", lambda self, subcommand: None)
    monkeypatch.syspath_prepend(ROOT / "data" / "faces")
    targets = list(importlib.import_module("marks").CLASSES)
    file = CONFIGS / stage / f"{which}.yaml"
    (words,) = commands(file)
    args = [str(ROOT / word) if word.startswith("configs/") else word for word in words[2:]]
    args += [f"--run={tmp_path}"]
    if stage in STAGES:
        args += [f"--model.prior.init_args.pretrained={family_folder('if')}"]
    if stage == "translator":
        args += [f"--model.loss.corrector={corrector}"]
    main = STAGES[stage][0] if stage in STAGES else partial(train, stage, program=words[1])
    model = main(args).model
    assert type(model) is FACES[stage][1]
    if stage in ("prior", "translator"):
        assert model.image_size == (64 if which == "faces-64" else 32)
    if stage == "translator":
        assert model.translator.classes == targets and model.source == "cat"
    if stage in LABELLED:
        assert set(model.classes) == {"cat", *targets}
    else:
        plain = CONFIGS / stage / "faces.yaml"
        assert stated(yaml.safe_load(plain.read_text())).license == "cc-by-nc-4.0"


def test_every_config_is_tested():
    found = {str(file.relative_to(CONFIGS))[:-5] for file in CONFIGS.rglob("*.yaml")}
    stages = {f"{stage}/{which}" for stage in STAGES for which in ("demo", "paper")}
    mine = stages | {f"priors/{name}" for name in PRIORS} | {"translator/imagenet-classes"}
    mine |= {"translator/demo-eight", "translator/demo-try", "bias/recommended"}
    mine |= {*(f"{stage}/demo" for stage in LABELLED)}
    mine |= {f"{stage}/{name}" for stage in FACES for name in ("faces", "faces-64")}
    assert {name for name in found if not name.startswith("image/")} == mine


@pytest.mark.parametrize("which", PRIORS)
def test_an_overlay_says_what_its_prior_needs(which):
    """Commands, hardware, and times that follow from the figures that they are computed from."""
    file = CONFIGS / "priors" / f"{which}.yaml"
    text = " ".join(header(file).replace("#", "").split())
    run = [f"--run runs/{which}/{name}" for name in ("bias", "lmc")]
    stage_one, release, stage_two = (" ".join(words) for words in commands(file))
    assert stage_one.endswith(run[0]) and run[1] in stage_two
    assert f"runs/{which}/bias --out runs/{which}/corrector --license" in release
    assert stage_two.endswith(f"--model.loss.corrector runs/{which}/corrector")
    assert "Hardware: one GPU of 80 GB" in text and text.endswith("Not yet run.")
    assert "at 200 TFLOP/s in bfloat16" in text
    pretrained = yaml.safe_load(file.read_text())["model"]["prior"]["init_args"]["pretrained"]
    gated = re.search(r"licence of (\S+) accepted on its hub page and `hf auth login`", text)
    assert gated is None or gated[1] == pretrained
    evaluation = float(re.search(r"from ([\d.]+) TFLOP a denoiser evaluation", text)[1])
    encoding = re.search(r"and ([\d.]+) a pass through the VAE's encoder", text)
    encoding = float(encoding[1]) if encoding else 0.0
    # Of 750 K steps of 128 and 200 K of 32, in TFLOP at TFLOP/s; the translator's own runs in TF32.
    seconds = {
        "one": 750e3 * 128 * (evaluation / 200 + encoding / 200),
        "two": 200e3 * 32 * (2 * evaluation / 200 + 3 * encoding / 200 + 0.08 / 200),
    }
    for stage, expected in seconds.items():
        said = re.search(rf"stage {stage} about ([\d,]+) GPU hours", text)
        assert float(said[1].replace(",", "")) == pytest.approx(
            expected / 3600, rel=0.04, abs=0.5
        ), stage


@pytest.mark.parametrize("file", sorted(CONFIGS.rglob("*.yaml")), ids=lambda file: file.stem)
def test_a_config_opens_with_command_hardware_and_time(file):
    text, name = header(file), str(file.relative_to(ROOT))
    assert file.read_text().startswith("#") and commands(file)
    assert any(name in words for words in commands(file)), "the command that takes it"
    assert re.search(r"GPU|CPU core|[Hh]ardware", text)
    assert re.search(r"minutes|seconds|\d s |time", text)


def test_another_loss_keeps_its_own_defaults(tmp_path):
    """The parser takes over what a configuration says of its own loss, where both have it."""
    file, bare = CONFIGS / "translator" / "paper.yaml", tmp_path / "bare.yaml"
    config = yaml.safe_load(file.read_text())
    del config["model"]["loss"]
    bare.write_text(yaml.safe_dump(config))
    reader = ConfigReader(TranslatorTraining)
    for name, loss in LOSSES.items():
        args = [f"--model.loss=lmc.losses.{loss.__name__}"]
        args += ["--model.loss.corrector=x"] if name == "lmc" else []
        over, own = (
            reader.read([f"--config={each}", *args])["model"]["loss"]["init_args"]
            for each in (file, bare)
        )
        assert over.pop("guidance_scale") == 15
        del own["guidance_scale"]
        assert over == own, name


class OtherPrior(GaussianPrior):
    """A prior that is none of diffusers'."""

    def __init__(self, size: int) -> None:
        super().__init__({"": torch.zeros(3, size, size)}, torch.ones(size, size))


def test_an_overlay_replaces_the_prior(tmp_path):
    """Key by key where the class is the same; another class has nothing of it."""
    args = [f"--config={CONFIGS}/bias/paper.yaml", f"--config={tmp_path}/mine.yaml"]
    text = "model: {prior: {class_path: %s, init_args: {%s}}}"
    for class_path, given, expected in (
        (
            "lmc.priors.DiffusersPrior",
            "pretrained: a/b",
            {"pretrained": "a/b", "dtype": "bfloat16"},
        ),
        ("test_configs.OtherPrior", "size: 4", {"size": 4}),
    ):
        (tmp_path / "mine.yaml").write_text(text % (class_path, given))
        prior = ConfigReader(CorrectorTraining).read(args)["model"]["prior"]
        assert prior["class_path"] == class_path
        assert {**prior["init_args"], **expected} == prior["init_args"]
        assert ("pretrained" in prior["init_args"]) == ("pretrained" in expected)


def test_the_size_of_the_images_follows_the_prior(tiny_prior_folder, tmp_path, capsys):
    """Said by a dry run, trained on, and asked of the shards."""
    for size in (16, 24):
        data, run = worlds.write_world(tmp_path / str(size), size), tmp_path / f"run{size}"
        once = ["--trainer.max_steps=1", "--data.image_size=null"]
        args = worlds.bias_args(tiny_prior_folder, data, run, *once)
        with pytest.raises(SystemExit):
            train_bias.main([*args, "--dry_run=true"])
        assert re.search(r"^images +16 x 16 pixels$", capsys.readouterr().out, re.M)
        if size == 16:
            train_bias.main(args)
            assert (run / "checkpoints" / "last.ckpt").exists()
        else:
            with pytest.raises((ValueError, SystemExit), match="is 24 x 24 pixels"):
                train_bias.main(args)


def test_the_size_of_the_images_follows_the_translator():
    reader, args = ConfigReader(TranslatorTraining), [f"--config={CONFIGS}/translator/paper.yaml"]
    assert reader.read([*args, "--model.image_size=64"])["data"]["image_size"] == 64
    assert reader.read([*args, "--data.image_size=32"])["data"]["image_size"] == 32


def outs(file: Path) -> set[str]:
    """The folders that a document's commands write."""
    return {folder.rstrip("/") for folder in re.findall(r"--out\s+([\w./-]+)", file.read_text())}


def test_configs_read_the_shards_that_the_data_s_commands_write():
    made = outs(ROOT / "data" / "README.md")
    folders = set()
    for stage in STAGES:
        for file in (CONFIGS / stage).glob("*.yaml"):
            data = yaml.safe_load(file.read_text()).get("data", {})
            own = [words for words in commands(file) if words[:2] == ["lmc", "triplets"]]
            made |= {words[words.index("--out") + 1] for words in own}
            for split in data.keys() & {"train", "heldout"}:
                folder, name = data[split].rsplit("/", 1)
                assert name == f"{split}-*.tar"
                folders.add(folder)
    # data/demo/prepare.py writes two sets into its folder.
    made |= {f"{folder}/{name}" for folder in made for name in ("animals", "cats")}
    assert folders <= made
    assert {folder.split("/")[0] for folder in folders} == {"data", "runs"}


DOCUMENTS = [
    *CONFIGS.rglob("*.yaml"),
    *(ROOT / "docs").glob("*.md"),
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "data/README.md")),
]


@pytest.mark.parametrize("file", DOCUMENTS, ids=lambda file: str(file.relative_to(ROOT)))
def test_paths_that_are_named_are_there(file):
    assert absent(file) == []


def absent(file: Path) -> list[str]:
    """The paths that a text names in this repository's folders and that are not there.

    What its commands write, or those of data/README.md, is not there yet.
    """
    written = outs(ROOT / "data" / "README.md") | outs(file)
    pattern = r"(?<![\w./{-])(?:configs|data|docs|lmc|tests|benchmarks)/[\w./*-]*[\w/*]"
    return [
        path
        for path in re.findall(pattern, file.read_text())
        if not any(path == folder or path.startswith(f"{folder}/") for folder in written)
        and not list(ROOT.glob(path.rstrip("/")))
    ]


def test_paths_that_are_not_there_are_found(tmp_path):
    file = tmp_path / "text.md"
    good = "data/afhq/cats/train-*.tar, (configs/priors/), lmc/losses.py. --out data/x `data/x/a`"
    file.write_text(f"{good} configs/bias/sd15.yaml, docs/none.md; data/afhq/shards/a-*.tar")
    assert absent(file) == ["configs/bias/sd15.yaml", "docs/none.md", "data/afhq/shards/a-*.tar"]


def test_the_hooks_run_what_make_lint_runs():
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    lint = (ROOT / "Makefile").read_text().split("\nlint:")[1].split("\n\n")[0]
    expected = [line.strip().replace("$(BIN)", ".venv/bin") for line in lint.splitlines()[1:]]
    assert [hook["entry"] for hook in hooks] == expected
