"""Losses named on the command line, built: their options have the types of a configuration's."""

import functools
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import outside_loss
import pytest
import yaml

import lmc
import train_translator
from lmc.losses import LMC, NEGATIVE_PROMPT, NFSD, VSD
from lmc.priors import DiffusersPrior
from lmc.schedule import FallingTime, UniformTime
from lmc.specs import (
    LOSSES,
    Spec,
    defaults,
    denoiser_evaluations,
    parse_spec,
    parse_specs,
    table_row,
)
from lmc.training.cli import ConfigReader
from lmc.training.translator import TranslatorTraining

import worlds

ROOT = Path(__file__).parents[1]
COMMON = {"guidance_scale": 15.0, "weighting": "one", "chain_alpha": True, "rescale": True}
OPTIONS = {
    **dict.fromkeys(("sds", "cond", "csd", "dds", "pds"), COMMON),
    "lmc": {
        **COMMON,
        "corrector": "identity",
        "fixed_noise": False,
        "statistics": None,
        "keep_ratio": False,
        "first_stage": 0.0,
    },
    "nfsd": {**COMMON, "negative_prompt": NEGATIVE_PROMPT},
    "ms_sds": {**COMMON, "steps": 5},
    "vsd": {**COMMON, "lora_rank": 4, "lora_lr": 1e-4},
    "asd": {**COMMON, "shift": 0.1, "t_min": 0.02},
    "bridge": {
        **COMMON,
        "first_stage": 0.5,
        "target_suffix": ", detailed high resolution, high quality, sharp",
        "source_suffix": ", oversaturated, smooth, pixelated, cartoon, foggy, hazy, blurry, "
        "bad structure, noisy, malformed",
    },
    "dvrf": {**COMMON, "eta": 1.0, "progressive": True},
    "dmd": {
        **COMMON,
        "chain_alpha": False,
        "rescale": False,
        "lora_rank": 4,
        "lora_lr": 1e-4,
        "updates": 5,
        "normalise": True,
    },
    "sdi": {
        **COMMON,
        "guidance_scale": 7.5,
        "chain_alpha": False,
        "inversion_guidance_scale": None,
        "inversion_steps": 10,
    },
}
TEXTS = (
    "corrector",
    "negative_prompt",
    "target_suffix",
    "source_suffix",
)  # of which any word is one


def test_options_have_their_types():
    specs = parse_specs(
        "lmc:corrector=identity:fixed_noise=true,nfsd:negative_prompt=no,vsd:lora_lr=1e-4,"
        "nfsd:negative_prompt=a: b,nfsd:negative_prompt=,nfsd:negative_prompt=''"
    )
    lmc_loss, nfsd, vsd, colon, *empty = (spec.build(guidance_scale=3) for spec in specs)
    assert isinstance(lmc_loss, LMC) and lmc_loss.fixed_noise is True
    assert isinstance(nfsd, NFSD) and nfsd.negative_prompt == "no"
    assert isinstance(vsd, VSD) and vsd.lora_lr == 1e-4
    assert isinstance(colon, NFSD) and colon.negative_prompt == "a: b"
    assert [each.negative_prompt for each in empty] == ["", ""]
    assert {each.guidance_scale for each in (lmc_loss, nfsd, vsd)} == {3}


def test_a_loss_may_have_a_schedule_of_its_own():
    plain, uniform, falling = parse_specs(
        "sdi,sdi:time=UniformTime:time.shared=true:guidance_scale=3,"
        '"sds:time=lmc.schedule.FallingTime:time.time_range=[0.1, 0.9]:time.jitter=0.5"'
    )
    assert plain.schedule() is None and plain.build().guidance_scale == 7.5
    time = uniform.schedule()
    assert isinstance(time, UniformTime) and time.shared is True
    assert uniform.build().guidance_scale == 3
    time = falling.schedule()
    assert isinstance(time, FallingTime)
    assert list(time.time_range) == [0.1, 0.9] and time.jitter == 0.5
    assert uniform.arguments() == [
        "--model.loss=lmc.losses.SDI",
        "--model.loss.guidance_scale=3",
        "--model.time=UniformTime",
        "--model.time.shared=true",
    ]


@pytest.mark.parametrize(
    ("label", "said"),
    [
        ("sdi:time=Sometime", "Sometime"),
        ("sdi:time=UniformTime:time.shared=ja", "shared"),
        ("sdi:time=UniformTime:time.often=1", "often"),
        ("sdi:time=UniformTime:time.time_range=[1, 0]", "time_range must be an interval"),
    ],
)
def test_a_schedule_that_is_none_is_refused_by_the_specs_name(label, said):
    with pytest.raises(ValueError, match=re.escape(f"the loss '{label}': ")) as caught:
        parse_spec(label).schedule()
    assert said in str(caught.value)


def test_options_of_no_schedule_are_refused():
    with pytest.raises(ValueError, match="name the schedule first: time=UniformTime"):
        parse_spec("sdi:time.shared=true")


@pytest.mark.parametrize(
    "label",
    [
        "sds:chain_alpha=flase",
        "lmc:corrector=identity:keep_ratio=ja",
        "ms_sds:steps=2.5",
        "ms_sds:steps=0",
        "vsd:lora_lr=small",
        "sds:weighting=snr",
        "lmc",
    ],
)
def test_an_option_of_another_type_is_refused_by_the_specs_name(label):
    with pytest.raises(ValueError, match=f"the loss '{label}'"):
        parse_spec(label).build()


# ---------------------------------------------------------------------------------------------
# What a loss says of itself


@pytest.fixture(scope="module")
def reader() -> ConfigReader:
    return ConfigReader(TranslatorTraining)


def training(loss: str, *more: str) -> list[str]:
    """Arguments of a training that names nothing that is there."""
    return worlds.translator_args(Path("no/prior"), "no/data", Path("no/run"), loss, *more)


@pytest.mark.parametrize("name", LOSSES)
def test_a_training_has_every_option_of_a_loss_with_its_type(reader, name):
    needed = [f"--model.loss.{key}=identity" for key in OPTIONS[name] if key == "corrector"]
    _, *args = training(LOSSES[name].__name__, *needed)
    found = reader.read(args)["model"]["loss"]["init_args"]
    assert found == OPTIONS[name]
    assert {k: type(v) for k, v in found.items()} == {k: type(v) for k, v in OPTIONS[name].items()}
    assert defaults(LOSSES[name]).keys() == found.keys()
    with pytest.raises(ValueError, match="'no_such'"):
        reader.read([*args, "--model.loss.no_such=1"])


@pytest.mark.parametrize(
    ("name", "option"),
    [(name, key) for name, its in OPTIONS.items() for key in its if key not in TEXTS],
)
def test_a_value_of_another_type_is_refused_by_the_options_name(name, option):
    given = {key: "identity" for key in OPTIONS[name] if key == "corrector"}
    spec = Spec("label", f"lmc.losses.{LOSSES[name].__name__}", {**given, option: "words"})
    with pytest.raises(ValueError, match=f'"{option}".*words'):
        spec.build()


@pytest.mark.parametrize("name", LOSSES)
def test_an_unknown_keyword_is_an_error_in_python(name):
    given = {key: "identity" for key in OPTIONS[name] if key == "corrector"}
    with pytest.raises(TypeError, match="'no_such'"):
        LOSSES[name](**given, no_such=1)


def test_print_config_and_help_show_what_comes_from_the_base(capsys):
    with pytest.raises(SystemExit) as caught:
        train_translator.main([*training("SDI"), "--print_config"])
    assert not caught.value.code
    found = yaml.safe_load(capsys.readouterr().out)["model"]["loss"]
    assert pkgutil.resolve_name(found["class_path"]) is LOSSES["sdi"]
    assert found["init_args"] == OPTIONS["sdi"]
    with pytest.raises(SystemExit) as caught:
        train_translator.main(["fit", "--model.loss.help=LMC"])
    said = capsys.readouterr().out
    assert not caught.value.code
    assert all(f"--model.loss.{option} " in said for option in OPTIONS["lmc"])
    assert "ω; 1 is the plain conditional prediction" in " ".join(said.split())


def test_the_docs_table_says_what_the_losses_say():
    """Where this fails, the row is to be put into the docs as it is printed here."""
    lines = (ROOT / "docs" / "losses.md").read_text(encoding="utf-8").splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]
    by_loss = {row[0]: [row[0], *row[2:5]] for row in rows if len(row) == 6}
    for loss in LOSSES.values():
        assert by_loss[table_row(loss)[0]] == table_row(loss)


def test_every_public_name_loads_and_none_at_once():
    assert {loss.__name__ for loss in LOSSES.values()} < set(lmc.__all__)
    for name in set(lmc.__all__) - {"__version__"}:
        assert getattr(lmc, name).__name__ == name
    code = "import sys, lmc; sys.exit('torch' in sys.modules or 'diffusers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, cwd=ROOT).returncode == 0
    with pytest.raises(AttributeError, match="'lmc' has no attribute 'NoSuch'"):
        _ = lmc.NoSuch


# ---------------------------------------------------------------------------------------------
# A loss from outside the package; in tests of `lmc compare` and `lmc edit --list` too


def test_a_loss_from_outside_is_named_by_its_import_path():
    spec = parse_spec("outside_loss.Repeated:copies=4:guidance_scale=2")
    loss = spec.build()
    assert isinstance(loss, outside_loss.Repeated)
    assert (loss.copies, loss.guidance_scale, loss.chain_alpha) == (4, 2, True)
    with pytest.raises(ValueError, match="no 'steps'; it has copies, guidance_scale, weighting"):
        parse_spec("outside_loss.Repeated:steps=4")
    assert table_row(outside_loss.Repeated) == ["`repeated`, `Repeated`", "–", "`copies: 3`", "3"]


def test_a_loss_that_writes_its_terms_anew_must_say_its_evaluations():
    assert denoiser_evaluations(outside_loss.Repeated, {}) == (3, "repeated")
    assert denoiser_evaluations(outside_loss.Repeated, {"copies": 5}) == (5, "repeated")
    assert denoiser_evaluations(outside_loss.Renamed, {"guidance_scale": 1}) == (1, "renamed")
    assert denoiser_evaluations(outside_loss.Silent, {}) == (None, "silent")
    assert table_row(outside_loss.Silent)[3] == "not said"


def test_a_loss_from_outside_trains_and_takes_what_its_dry_run_says(
    tiny_prior_folder, tmp_path, capsys, monkeypatch
):
    data = worlds.write_world(tmp_path / "data", count=4)
    path, option = "outside_loss.Repeated", "--model.loss.copies=4"
    args = worlds.translator_args(tiny_prior_folder, data, tmp_path / "run", path, option)
    args += ["--trainer.max_steps=1", "--trainer.limit_val_batches=0"]
    with pytest.raises(SystemExit) as caught:
        train_translator.main([*args, "--dry_run"])
    assert not caught.value.code
    (said,) = [x for x in capsys.readouterr().out.splitlines() if x.startswith("evaluations")]
    assert said.split(maxsplit=1)[1] == "16 of the denoiser = 4 per image and step (repeated) x 4"
    counted, right = [], DiffusersPrior.predict

    @functools.wraps(right)
    def predict(self, z_t, *rest):
        counted.append(len(z_t))
        return right(self, z_t, *rest)

    monkeypatch.setattr(DiffusersPrior, "predict", predict)
    train_translator.main(args)
    assert counted == [16]
