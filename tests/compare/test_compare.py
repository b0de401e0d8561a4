"""`lmc compare`: what is trained, what is not trained again, what is written, what is refused."""

import html
import json
import os
import re
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from diffusers import UNet2DConditionModel
from PIL import Image
from test_evaluate import build_clip_folder
from torch.utils.data import DataLoader

import lmc.compare.measured
import lmc.progress
import lmc.training.__main__ as training
from lmc.cli import main
from lmc.compare import side_by_side
from lmc.compare.side_by_side import AGAIN, Stopped, TrainingFailed, Trainings, gpu_parts
from lmc.corrector import Corrector
from lmc.load import load_averaged
from lmc.losses import NEGATIVE_PROMPT
from lmc.measure.evaluate import Prompts, Tools, evaluate, translated
from lmc.measure.metrics import Clip, distances
from lmc.measure.results import numbers
from lmc.measure.tables import markdown, seeds_table
from lmc.priors import DiffusersPrior
from lmc.priors.prompts import TextPrompts
from lmc.release import read_results
from lmc.shards.images import ImageStream
from lmc.specs import LOSSES, parse_specs

import worlds

STEPS = 4
TIME = ["--model.time=lmc.schedule.UniformTime", "--model.time.time_range=[0.9,0.1]"]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, tiny_prior_folder: Path) -> Path:
    """Shards, a CLIP, and a configuration with each of two losses."""
    folder = tmp_path_factory.mktemp("compare")
    data = worlds.write_world(folder / "shards")
    build_clip_folder(folder / "clip")
    prior = {"pretrained": str(tiny_prior_folder)}
    config = {
        "run": "none",
        "seed_everything": 3,
        "model": {
            "prior": {"class_path": "lmc.priors.DiffusersPrior", "init_args": prior},
            "classes": ["dog", "bear"],
            "image_size": 16,
            "widths": [8, 8],
        },
        "data": {
            "train": f"{data}/train-*.tar",
            "heldout": f"{data}/heldout-*.tar",
            "image_size": 16,
            "batch_size": 4,
            "shuffle": 10,
        },
        "trainer": {"accelerator": "cpu", "max_steps": STEPS, "limit_val_batches": 0},
        "save_every": 2,
    }
    for name, more in (("SDS", {}), ("LMC", {"corrector": "identity"})):
        init_args = {"guidance_scale": 5, **more}
        config["model"]["loss"] = {"class_path": f"lmc.losses.{name}", "init_args": init_args}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(config))
    return folder


def train_here(names: list[str]) -> Callable:
    """In place of `Trainings.train`: in this process, which is faster; notes the names."""

    def train(self: Trainings, name: str, command: list[str], log: Path) -> None:
        assert command[:3] == [sys.executable, "-m", "lmc.training"]
        names.append(name)
        log.write_text("")
        try:
            training.main(command[3:])
        except (Exception, SystemExit) as error:
            log.write_text(f"first line\n{error}\n")
            raise TrainingFailed(name, log) from error

    return train


@pytest.fixture
def trained(monkeypatch) -> list[str]:
    """Trains in this process; the names of what was trained."""
    names: list[str] = []
    monkeypatch.setattr(Trainings, "train", train_here(names))
    return names


@pytest.fixture(scope="module")
def finished(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A comparison of two losses with two seeds. Shared: see `copy`."""
    out = tmp_path_factory.mktemp("finished") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainings, "train", train_here([]))
        main(args(world, out, "cond,sds", "--seeds", "0,1"))
    return out


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    """It in a folder of its own."""
    return shutil.copytree(finished, tmp_path / "copy")


def args(world: Path, out: Path, losses: str | None, *more: str, config: str = "LMC") -> list[str]:
    named = ["--losses", losses] if losses else []
    where = [str(world / f"{config}.yaml"), "--out", str(out)]
    return ["compare", *where, "--clip", str(world / "clip"), *named, *more]


def message(*given: str) -> str:
    with pytest.raises(SystemExit) as caught:
        main(list(given))
    assert isinstance(caught.value.code, str), "exits with status 1 and a message"
    return caught.value.code


# ---------------------------------------------------------------------------------------------
# Which losses


def test_specs():
    text = (
        'sds, sds:guidance_scale=100,lmc:corrector=a:b:keep_ratio=true,"nfsd:negative_prompt=x, y",'
        "lmc.losses.DDS"
    )
    specs = parse_specs(text)
    assert [(spec.label, spec.class_path, spec.options) for spec in specs] == [
        ("sds", "lmc.losses.SDS", {}),
        ("sds:guidance_scale=100", "lmc.losses.SDS", {"guidance_scale": "100"}),
        (
            "lmc:corrector=a:b:keep_ratio=true",
            "lmc.losses.LMC",
            {"corrector": "a:b", "keep_ratio": "true"},
        ),
        ("nfsd:negative_prompt=x, y", "lmc.losses.NFSD", {"negative_prompt": "x, y"}),
        ("lmc.losses.DDS", "lmc.losses.DDS", {}),
    ]
    assert specs[1].arguments() == [
        "--model.loss=lmc.losses.SDS",
        "--model.loss.guidance_scale=100",
    ]


def test_all_losses_are_the_default():
    found = {spec.label for spec in parse_specs(None)}
    assert found == set(LOSSES) - {"csd", "dvrf"}, "one is another's name, one needs chain_alpha"
    assert found >= {"sds", "cond", "lmc", "dds", "nfsd", "ms_sds", "pds", "vsd", "sdi"}


def test_folders_are_safe_and_tell_labels_apart():
    labels = [
        "sds",
        "sds:guidance_scale=100",
        "lmc:corrector=../a/b",
        "lmc:corrector=.._a_b",
        "lmc:corrector=../a b",
        "nfsd:negative_prompt=a+b",
        "nfsd:negative_prompt=a_b",
        f"nfsd:negative_prompt={'x' * 300}",
        f"nfsd:negative_prompt={'x' * 301}",
    ]
    folders = [parse_specs(label)[0].folder() for label in labels]
    assert folders[:2] == ["sds", "sds+guidance_scale=100"]
    assert len(set(folders)) == len(labels)
    assert all(re.fullmatch(r"[\w.=+-]{1,120}", folder, re.ASCII) for folder in folders)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", ["known are", "sds"]),
        ("sds,", ["''", "known are"]),
        ("sdss", ["'sdss'", "sds, cond"]),
        ("sds:guidance_scale", ["'sds:guidance_scale'"]),
        ("sds:omega=3", ["'omega'", "guidance_scale, weighting"]),
        ("sds:rescale=true:rescale=false", ["'rescale' twice"]),
        ("sds,lmc,sds", ["'sds' is named twice"]),
        ("lmc.losses.NoSuch", ["'lmc.losses.NoSuch'", "class path"]),
        ("no_such_module.Loss", ["no_such_module"]),
        ("lmc.losses.Gradient", ["no class of a loss"]),
    ],
)
def test_refused_specs(text, words):
    with pytest.raises(ValueError) as caught:
        parse_specs(text)
    assert all(word in str(caught.value) for word in words)


@pytest.mark.parametrize(
    ("losses", "more", "words"),
    [
        (None, [], "the loss 'lmc'.*required: corrector"),
        ("lmc:corrector=no/such/at", [], "the loss 'lmc:corrector=no/such/at'.*no/such/at"),
        ("lmc:corrector=ANOTHERS", [], "the loss 'lmc:.*valid for the prior it was trained on"),
        ("sds:guidance_scale=x", [], "the loss 'sds:guidance_scale=x'.*float"),
        ("sds:guidance_scale=-1", [], "must not be negative"),
        ("cond,sds,sds:guidance_scale=5", [], "'sds' and 'sds:guidance_scale=5' are one"),
        ("sds", ["--", "--trainer.max_steps=-1"], "max_steps"),
        ("sds", ["--", "--trainer.no_such=1"], "no_such"),
        ("sds", ["--", "--model.prompt=a photo"], "has no {}"),
        ("sds", ["--", *TIME], r"model\.time: time_range .*\[0\.9, 0\.1\]"),
        ("sds", ["--", "--data.heldout=no/such-*.tar"], "no shards at no/such"),
        ("sds", ["--", "--model.prior.init_args.pretrained=no/prior/at"], "no/prior/at"),
        ("sds", ["--clip", "no/clip/at"], r"no such folder: no/clip/at .*--clip"),
    ],
)
def test_refused_before_anything_is_trained(world, trained, tmp_path, losses, more, words):
    out = tmp_path / "out"
    if losses and "ANOTHERS" in losses:
        Corrector(3, [8, 8], prior={"digest": "another"}).save_pretrained(tmp_path / "corrector")
        losses = losses.replace("ANOTHERS", str(tmp_path / "corrector"))
    assert re.search(words, message(*args(world, out, losses, *more, config="SDS")), re.DOTALL)
    assert not trained and not out.exists()


def test_prompts_are_embedded_once_and_before_the_trainings(world, trained, tmp_path, monkeypatch):
    monkeypatch.setenv("LMC_CACHE", str(tmp_path / "cold"))
    encode, encoded = TextPrompts.encode, []

    def note(self: TextPrompts, prompts: list[str]) -> object:
        encoded.append((list(trained), sorted(prompts)))
        return encode(self, prompts)

    monkeypatch.setattr(TextPrompts, "encode", note)
    losses = "nfsd,nfsd:negative_prompt=a cat:guidance_scale=3"
    more = ("--", "--trainer.max_steps=1", "--save_every=1")
    main(args(world, tmp_path / "out", losses, "--seeds", "0", *more, config="SDS"))
    assert len(trained) == 2
    photos = [f"a photo of a {name}" for name in ("bear", "cat", "dog")]
    assert encoded == [([], sorted(["", "a cat", *photos, NEGATIVE_PROMPT]))]


@pytest.mark.parametrize(
    ("losses", "prompt", "words"),
    [
        ("sds,nfsd", "{}", "the loss 'nfsd'.*no class 'unrealistic.*set negative_prompt to ''$"),
        ("sds,bridge", "{}", "the loss 'bridge'.*no class '.*, detailed.*adds words to prompts"),
        ("sds", "a {}", "model.prompt, for every loss: .*no class 'a tabby'"),
        ("nfsd:negative_prompt=,sds", "a {}", "model.prompt, for every loss"),
    ],
)
def test_prompts_that_name_no_class(world, trained, family_folder, tmp_path, losses, prompt, words):
    out = tmp_path / "out"
    options = {
        "prior.init_args.pretrained": family_folder("ddpm"),
        "classes": "[lion,bruin]",
        "source": "tabby",
        "prompt": prompt,
    }
    more = [f"--model.{key}={value}" for key, value in options.items()]
    assert re.search(words, message(*args(world, out, losses, "--", *more, config="SDS")))
    assert not trained and not out.exists()


@pytest.mark.parametrize("option", [["--seeds", "0,0"], ["--seeds", "-1"], ["--jobs", "0"]])
def test_refused_numbers(world, tmp_path, option):
    said = message(*args(world, tmp_path / "out", "sds", *option))
    assert said.startswith(f"lmc: {option[0][2:]}") and not (tmp_path / "out").exists()


# ---------------------------------------------------------------------------------------------
# A comparison


def cells(markdown: str, label: str) -> list[str]:
    """A row of a table."""
    (line,) = [line for line in markdown.splitlines() if line.startswith(f"| {label} |")]
    return [cell.strip() for cell in line.strip("|").split("|")][1:]


def test_a_loss_from_outside_is_compared(world, trained, tmp_path):
    label = "outside_loss.Repeated:copies=3"
    more = ("--seeds", "0", "--", "--trainer.max_steps=1", "--save_every=1")
    main(args(world, tmp_path / "out", f"{label},outside_loss.Silent", *more, config="SDS"))
    rows = json.loads((tmp_path / "out" / "results.json").read_text())["losses"]
    counts = [row["evaluations_per_image"] for seeds in rows.values() for row in seeds.values()]
    assert list(rows) == [label, "outside_loss.Silent"] and counts == [3, None]
    assert cells((tmp_path / "out" / "table.md").read_text(), label)


def test_a_comparison(world, trained, tmp_path, capsys):
    """Two losses and one that fails with one seed; then again; then with another loss."""
    out, obstacle = tmp_path / "out", tmp_path / "obstacle"
    obstacle.write_text("[1]")
    failing = f"failing_loss.While:file={obstacle}"
    command = args(world, out, f"cond,{failing},lmc:guidance_scale=2", "--seeds", "1,0")
    said = message(*command)
    assert "1 trainings failed" in said
    names = [
        *(f"cond seed {seed}" for seed in (1, 0)),
        *(f"{failing} seed {seed}" for seed in (1, 0)),
        *(f"lmc:guidance_scale=2 seed {seed}" for seed in (1, 0)),
    ]
    assert trained == names
    results = json.loads((out / "results.json").read_text())
    rows = results["losses"]
    assert list(rows) == ["cond", failing, "lmc:guidance_scale=2"]
    row = rows[failing]["1"]
    assert "the file is there" in row["failed"] and Path(row["log"]).exists()
    assert rows[failing]["0"]["images"] == 24
    for label, evaluations in (("cond", 2), ("lmc:guidance_scale=2", 2)):
        assert set(rows[label]) == {"0", "1"}
        for row in rows[label].values():
            assert row["steps"] == STEPS and row["seconds"] > 0
            assert row["evaluations_per_image"] == evaluations

    # What was trained is what was asked for, and the figures are of it.
    config = yaml.safe_load((out / "lmc+guidance_scale=2" / "seed1" / "config.yaml").read_text())
    loss = config["model"]["loss"]
    assert loss["class_path"] == "lmc.losses.LMC" and config["seed_everything"] == 1
    assert loss["init_args"]["guidance_scale"] == 2 and loss["init_args"]["corrector"] == "identity"
    config = yaml.safe_load((out / "cond" / "seed0" / "config.yaml").read_text())
    assert config["model"]["loss"]["init_args"]["guidance_scale"] == 5, "the configuration's"
    stream = ImageStream(f"{world}/shards/heldout-*.tar", 16, 7, training=False)
    prompts = {name: f"a photo of a {name}" for name in ("dog", "bear")}
    result = evaluate(
        {"it": translated(load_averaged(out / "cond" / "seed1")[0])},
        lambda: DataLoader(stream, batch_size=None),
        Tools(distances(16), Clip(str(world / "clip"))),
        Prompts(prompts, [*prompts.values(), "a photo of a cat"]),
    )
    expected = numbers(result["rows"]["it"])
    for key in ("clip_score", "distance", "spectrum_error", "r_precision"):
        assert rows["cond"]["1"][key] == pytest.approx(expected[key], abs=1e-5)
    assert rows["cond"]["0"]["distance"] != rows["cond"]["1"]["distance"]

    # The table: mean and sample deviation, by numpy.
    markdown = (out / "table.md").read_text()
    assert markdown in capsys.readouterr().out
    for label in ("cond", "lmc:guidance_scale=2"):
        for cell, key in zip(
            cells(markdown, label), ("distance", "clip_score", "r_precision"), strict=False
        ):
            values = np.array([row[key] for row in rows[label].values()])
            assert cell == f"{values.mean():.3f} ± {values.std(ddof=1):.3f}"
        assert cells(markdown, label)[6] == "2"
    row = cells(markdown, f"{failing} (1 of 2 seeds)")
    assert row[0] == f"{rows[failing]['0']['distance']:.3f}" and row[6] == "–"
    assert f"{failing} seed 1 failed, see {rows[failing]['1']['log']}" in markdown
    assert cells(markdown, "source")[0] == f"{0:.3f}"
    # A block of a source row, and one of two classes for each loss.
    assert Image.open(out / "grid.png").size[1] == (1 + 3 * 2) * (64 + 2) + 4 * 18

    # The report: the table over seeds, and the first seed of each that did not fail.
    page = html.unescape((out / "report.html").read_text())
    for label in ("cond", "lmc:guidance_scale=2"):
        assert f"<td>{cells(markdown, label)[0]}</td>" in page
        cell = json.loads(
            (out / parse_specs(label)[0].folder() / "seed0/evaluation.json").read_text()
        )
        cell = cell["measured"]["rows"][f"{label} seed 0"]["summary"]["rmse"]
        assert f"{cell['value']:.3f} <small>[{cell['low']:.3f}, {cell['high']:.3f}]" in page
    assert f"{failing} seed 1 failed" in page
    assert page.count('class="picture"') == 3 * 2 * 6

    # Again: what failed goes on from its checkpoint, the rest is neither trained nor measured.
    trained.clear()
    obstacle.unlink()
    kept = {file: file.stat().st_mtime_ns for file in out.rglob("evaluation.json")}
    assert len(kept) == 6
    run = out / parse_specs(failing)[0].folder() / "seed1"
    seconds = json.loads((run / "training.json").read_text())
    assert seconds["steps"] == 2
    main(command)
    assert trained == [f"{failing} seed 1"]
    said = capsys.readouterr().out
    assert said.count("going on after step 2") == 1 and "5 of them done already" in said
    assert said.count("measured ") == 1
    assert all(file.stat().st_mtime_ns == before for file, before in kept.items())
    again = json.loads((out / "results.json").read_text())
    assert {k: v for k, v in again["losses"].items() if k != failing} == {
        k: v for k, v in rows.items() if k != failing
    }
    row = again["losses"][failing]["1"]
    assert row["steps"] == STEPS and row["seconds"] > seconds["seconds"], "of both sessions"

    # More losses and seeds may be added, another configuration may not.
    trained.clear()
    main(args(world, out, "cond,sds", "--seeds", "2"))
    assert trained == ["cond seed 2", "sds seed 2"]
    trained.clear()
    main(args(world, out, "cond", "--seeds", "2", "--", "--model.validation.images=3"))
    said = message(*args(world, out, "cond", "--", "--trainer.max_steps=5"))
    assert "trainer.max_steps is 4 there and 5 here" in said and "--out" in said
    said = message(*args(world, out, "cond", "--", "--model.loss.guidance_scale=6"))
    assert "cond.loss.init_args.guidance_scale is 5.0 there and 6.0 here" in said
    said = message(*args(world, out, "cond", "--", *TIME[:1]))
    assert "cond.time" in said and "UniformTime" in said
    # An option that the version which began it had not yet.
    file = out / "comparison.json"
    there = json.loads(file.read_text())
    del there["config"]["data"]["balance"]
    file.write_text(json.dumps(there))
    main(args(world, out, "cond", "--seeds", "2"))
    assert not trained


def test_against_truth_and_real_pictures(world, trained, copy, tmp_path, capsys, monkeypatch):
    """A finished comparison is measured again with them, not trained, and is what evaluate says."""
    (batch,) = ImageStream(f"{world}/shards/heldout-*.tar", 16, 24, training=False)
    truth, real = tmp_path / "truth", tmp_path / "real"
    for folder, sign in ((truth, -1), (real, 0.5)):
        for name in ("dog", "bear"):
            (folder / name).mkdir(parents=True)
            for key, image in zip(batch.key, batch.image, strict=True):
                (folder / name / f"{key}.png").write_bytes(worlds.png(sign * image))
    command = args(world, copy, "cond", "--seeds", "0,1", "--truth", str(truth))
    (tmp_path / "its_judge.py").write_text(worlds.JUDGE)
    monkeypatch.syspath_prepend(tmp_path)
    command += ["--real", str(real), "--classifier", "its_judge:load"]
    main(command)
    assert not trained
    row = results(copy)["cond"]["0"]
    out = tmp_path / "out.json"
    more = ["--shards", f"{world}/shards/heldout-*.tar", "--clip", str(world / "clip")]
    more += ["--truth", str(truth), "--real", str(real), "--classifier", "its_judge:load"]
    more += ["--offline", "--out", str(out)]
    main(["evaluate", "--translator", str(copy / "cond" / "seed0"), *more])
    wanted = numbers(json.loads(out.read_text())["rows"]["seed0"])
    asked = {key for key in wanted if key.startswith("truth_")} | {"cmmd", "classifier_cmmd"}
    assert asked >= {"truth_rmse", "truth_lost", "truth_gained", "truth_cast"}
    for key in asked:
        assert row[key] == pytest.approx(wanted[key], rel=1e-4, abs=1e-5), key
    assert min(row["truth_rmse"], row["truth_cast"], row["cmmd"]) > 0
    head = (copy / "table.md").read_text().splitlines()[0]
    assert set(row["classified_by_class"]) == {"dog", "bear"}
    assert row["classified"] == wanted["classified"] and "classified as the target" in head
    assert "RMSE to truth" in head and "cast against truth" in head and "CMMD" in head
    assert "RMSE to truth" in (copy / "report.html").read_text()

    # Once more nothing is measured; with other pictures in the folder, all is.
    capsys.readouterr()
    main(command)
    assert "measured " not in capsys.readouterr().out
    (truth / "dog" / f"{batch.key[0]}.png").write_bytes(worlds.png(batch.image[0]))
    main(command)
    assert capsys.readouterr().out.count("measured ") == 1 + 4
    assert results(copy)["cond"]["0"]["truth_rmse"] != row["truth_rmse"]


def test_a_truth_or_real_pictures_that_do_not_fit_end_it_before_training(world, trained, tmp_path):
    command = args(world, tmp_path / "out", "cond")
    assert "no such folder of true" in message(*command, "--truth", f"{tmp_path}/no")
    for name in ("dog", "bear"):
        (tmp_path / "few" / name).mkdir(parents=True)
        (tmp_path / "few" / name / "a.png").write_bytes(worlds.png(torch.zeros(3, 16, 16)))
    few = str(tmp_path / "few")
    assert "24 held-out images have no true counterpart" in message(*command, "--truth", few)
    assert "1 real images of the class 'dog'; two are" in message(*command, "--real", few)
    assert not trained and not (tmp_path / "out").exists()


def results(out: Path) -> dict:
    """The rows of results.json."""
    return json.loads((out / "results.json").read_text())["losses"]


def test_a_training_whose_time_is_not_known(world, trained, copy):
    """Killed after the last checkpoint, before training.json was written."""
    for seed in (0, 1):
        (copy / "cond" / f"seed{seed}" / "training.json").unlink()
    main(args(world, copy, "cond,sds", "--seeds", "0,1"))
    assert not trained
    for row in results(copy)["cond"].values():
        assert row["seconds"] is None and row["steps"] == STEPS
    markdown = (copy / "table.md").read_text()
    assert cells(markdown, "cond")[7] == "–" and cells(markdown, "sds")[7] != "–"


def damage(out: Path, run: str, change: Callable[[dict], object]) -> None:
    """Change the last checkpoint of a run."""
    file = out / run / "checkpoints" / "last.ckpt"
    state = torch.load(file, weights_only=True)
    change(state)
    torch.save(state, file)


def test_all_losses_fail(world, trained, tmp_path):
    obstacle = tmp_path / "obstacle"
    obstacle.write_text("[0]")
    out = tmp_path / "out"
    said = message(*args(world, out, f"failing_loss.While:file={obstacle}", "--seeds", "0"))
    assert "1 trainings failed" in said
    assert "seed 0 failed" in (out / "report.html").read_text()


def test_a_run_that_cannot_be_measured(world, trained, copy):
    """Weights that diverged, a checkpoint of nothing known: the others have rows and pictures."""
    before = results(copy)
    for seed in (0, 1):
        damage(
            copy,
            f"sds/seed{seed}",
            lambda state: [w.mul_(torch.nan) for w in state["state_dict"].values() if w.ndim],
        )
    damage(copy, "cond/seed1", lambda state: state["network"].update({"class": "Other"}))
    (copy / "grid.png").unlink()
    said = message(*args(world, copy, "cond,sds", "--seeds", "0,1"))
    assert "3 trainings failed, or could not be measured" in said and not trained
    rows = results(copy)
    assert rows["cond"]["0"] == before["cond"]["0"]
    for label, seed, why in (
        ("cond", "1", "no checkpoint of"),
        ("sds", "0", "is not finite"),
        ("sds", "1", "is not finite"),
    ):
        assert set(rows[label][seed]) == {"failed", "log"} and why in rows[label][seed]["failed"]
        assert why in Path(rows[label][seed]["log"]).read_text()
    markdown = (copy / "table.md").read_text()
    assert cells(markdown, "cond (1 of 2 seeds)")[0] == f"{rows['cond']['0']['distance']:.3f}"
    assert cells(markdown, "sds")[0] == "failed" and "sds seed 1 failed, see" in markdown
    assert Image.open(copy / "grid.png").size[1] == (1 + 2) * (64 + 2) + 2 * 18


def test_a_loss_that_cannot_be_drawn(world, trained, copy, monkeypatch, capsys):
    drawn = lmc.compare.measured._translator

    def failing(run: Path) -> object:
        if run.parent.name == "sds":
            raise RuntimeError("no room")
        return drawn(run)

    monkeypatch.setattr(lmc.compare.measured, "_translator", failing)
    assert "1 trainings failed" in message(*args(world, copy, "cond,sds", "--seeds", "0,1"))
    assert "sds is not in grid.png: no room" in capsys.readouterr().out
    assert Image.open(copy / "grid.png").size[1] == (1 + 2) * (64 + 2) + 2 * 18


def test_no_class_is_imported_that_a_file_alone_names(world, trained, copy, tmp_path, monkeypatch):
    """comparison.json is data, whoever wrote it; its row is shown, without the evaluations."""
    (tmp_path / "planted.py").write_text(f"open({str(tmp_path / 'imported')!r}, 'w').close()")
    monkeypatch.syspath_prepend(tmp_path)
    file = copy / "comparison.json"
    content = json.loads(file.read_text())
    loss = {"class_path": "planted.Loss", "init_args": {}}
    content["losses"]["planted"] = {"loss": loss, "time": None}
    file.write_text(json.dumps(content))
    shutil.copytree(copy / "sds" / "seed0", copy / "planted" / "seed0")
    (copy / "planted" / "seed0" / "evaluation.json").unlink()
    main(args(world, copy, "cond", "--seeds", "0"))
    assert results(copy)["planted"]["0"]["evaluations_per_image"] is None
    assert not (tmp_path / "imported").exists() and "planted" not in sys.modules


def test_a_release_takes_its_numbers_from_a_comparison(finished):
    found = read_results(finished, "cond")
    row = results(finished)["cond"]["0"]
    assert found.values["rmse"]["value"] == pytest.approx(row["distances"]["rmse"])
    assert found.values["rmse"]["low"] < found.values["rmse"]["value"] and found.source
    assert f"{row['images']} held-out pictures" in found.on
    with pytest.raises(ValueError, match="has no row 'dds'; it has source, cond, sds"):
        read_results(finished, "dds")


def test_what_was_finished_before_is_kept(world, trained, copy):
    """A seed more of one loss, and a new loss; an unfinished run is no result."""
    before = results(copy)
    both = [("cond", "0"), ("cond", "1"), ("sds", "0")]
    checkpoint = copy / "sds" / "seed1" / "checkpoints" / "last.ckpt"
    checkpoint.unlink()
    shutil.copytree(copy / "sds" / "seed0", copy / "sds" / "seed0 of mine")
    kept = {file: file.stat().st_mtime_ns for file in copy.rglob("evaluation.json")}
    main(args(world, copy, "lmc,cond", "--seeds", "2"))
    assert trained == ["lmc seed 2", "cond seed 2"]
    rows = results(copy)
    assert {label: list(seeds) for label, seeds in rows.items()} == {
        "cond": ["0", "1", "2"],
        "sds": ["0"],
        "lmc": ["2"],
    }
    assert all(rows[label][seed] == before[label][seed] for label, seed in both)
    assert all(file.stat().st_mtime_ns == time for file, time in kept.items())
    markdown = (copy / "table.md").read_text()
    values = [row["distance"] for row in rows["cond"].values()]
    assert cells(markdown, "cond")[0] == f"{np.mean(values):.3f} ± {np.std(values, ddof=1):.3f}"
    assert cells(markdown, "sds")[0] == f"{before['sds']['0']['distance']:.3f}"
    assert Image.open(copy / "grid.png").size[1] == (1 + 3 * 2) * (64 + 2) + 4 * 18


def test_a_corrector_made_again_is_another(world, trained, tiny_prior_folder, tmp_path):
    """At the same path; results of the old one stay what they are."""
    identity = DiffusersPrior(str(tiny_prior_folder)).identity
    at, out = tmp_path / "corrector", tmp_path / "out"
    command = args(world, out, f"cond,lmc:corrector={at}", "--", "--trainer.max_steps=1")
    Corrector(3, [8, 8], prior=identity).save_pretrained(at)
    main(command)
    trained.clear()
    first = Corrector.from_pretrained(at)
    first.save_pretrained(at)  # written again, it is the same
    main(command)
    kept = (out / "comparison.json").read_text()
    other = Corrector(3, [8, 8], statistics="none", prior=identity)
    other.load_state_dict(first.state_dict())
    for corrector in (Corrector(3, [8, 8], prior=identity), other):
        shutil.rmtree(at)
        corrector.save_pretrained(at)
        for losses in (f"lmc:corrector={at}", f"lmc:corrector={at}:guidance_scale=2"):
            said = message(*args(world, out, losses, "--", "--trainer.max_steps=1"))
            assert f"the corrector {at} changed since" in said and "--out" in said
    assert not trained and (out / "comparison.json").read_text() == kept
    main(args(world, out, "cond", "--", "--trainer.max_steps=1"))  # which has no corrector


def test_a_comparison_of_an_earlier_version_is_refused(world, trained, copy):
    record = json.loads((copy / "comparison.json").read_text())
    del record["prior"]
    (copy / "comparison.json").write_text(json.dumps(record))
    assert "of an earlier version" in message(*args(world, copy, "cond"))
    assert not trained


def test_another_prior_at_the_same_path(world, trained, tiny_prior_folder, tmp_path):
    prior, out = tmp_path / "prior", tmp_path / "out"
    shutil.copytree(tiny_prior_folder, prior)
    more = ["--", "--trainer.max_steps=1", f"--model.prior.init_args.pretrained={prior}"]
    main(args(world, out, "cond", *more))
    trained.clear()
    unet = UNet2DConditionModel.from_pretrained(prior / "unet")
    with torch.no_grad():
        next(unet.parameters()).mul_(1.05)
    unet.save_pretrained(prior / "unet")
    said = message(*args(world, out, "sds", *more))
    assert "the prior (" in said and "changed since" in said and not trained


def test_what_never_made_a_step_is_in_nothings_way(world, trained, tmp_path):
    """All fail at once: then other data will do. One does: then it may become another itself."""
    out, obstacle = tmp_path / "out", tmp_path / "obstacle"
    obstacle.write_text("[3]")
    failing = f"failing_loss.While:file={obstacle}:at=1"
    message(*args(world, out, failing, "--", "--trainer.max_steps=1"))
    assert json.loads((out / "results.json").read_text())["source"]["images"] == 24
    more = ["--", "--trainer.max_steps=2", f"--data.heldout={world}/shards/heldout-00000.tar"]
    message(*args(world, out, f"sds,{failing}", *more))
    assert results(out)["sds"]["3"]["steps"] == 2
    assert json.loads((out / "results.json").read_text())["source"]["images"] == 12
    obstacle.unlink()
    trained.clear()
    main(args(world, out, f"sds,{failing}", *more))
    assert trained == [f"{failing} seed 3"]


def test_a_schedule_of_one_loss(world, trained, tmp_path):
    """Beside another loss with its own; the same loss with another schedule is another."""
    out, more = tmp_path / "out", ["--", "--trainer.max_steps=1"]
    uniform = "sdi:time=UniformTime:time.shared=true"
    main(args(world, out, f"sds,sdi,{uniform}", *more))
    times = {}
    for label in ("sds", "sdi", uniform):
        run = out / parse_specs(label)[0].folder() / "seed3" / "config.yaml"
        times[label] = yaml.safe_load(run.read_text())["model"]["time"]
    assert times["sds"] is None and times["sdi"] is None
    assert times[uniform]["init_args"]["shared"] is True
    said = message(*args(world, tmp_path / "no", "sds,sdi:time=UniformTime", *more))
    assert "the loss 'sdi:time=UniformTime'" in said and "shared: true" in said
    main(args(world, out, "sds", *more))
    assert set(results(out)) == {"sds", "sdi", uniform}


def test_seed_and_folder_by_default(world, trained, tmp_path, monkeypatch):
    """Everything else that the configuration has holds; the folder is named after it."""
    monkeypatch.chdir(tmp_path)
    config = [str(world / "SDS.yaml"), "--clip", str(world / "clip")]
    main(["compare", *config, "--losses", "sds", "--", "--trainer.max_steps=1"])
    assert trained == ["sds seed 3"]
    assert (tmp_path / "runs" / "compare" / "SDS" / "sds" / "seed3" / "config.yaml").exists()
    markdown = (tmp_path / "runs" / "compare" / "SDS" / "table.md").read_text()
    assert "±" not in markdown and len(cells(markdown, "sds")) == 8


def test_a_folder_of_something_else_is_left_alone(world, trained, tmp_path):
    (tmp_path / "mine.txt").touch()
    assert "no comparison" in message(*args(world, tmp_path, "sds"))
    assert not trained and [file.name for file in tmp_path.iterdir()] == ["mine.txt"]


def test_a_crash_does_not_end_the_others(world, tmp_path, monkeypatch):
    """In processes of their own, side by side."""
    paths = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))
    out = tmp_path / "out"
    command = args(world, out, "failing_loss.Crash,sds", "--jobs", "2", "--seeds", "0")
    assert "1 trainings failed" in message(*command)
    rows = json.loads((out / "results.json").read_text())["losses"]
    assert rows["sds"]["0"]["images"] == 24 and rows["sds"]["0"]["steps"] == STEPS
    assert rows["failing_loss.Crash"]["0"]["failed"].endswith("about to crash\n")
    assert cells((out / "table.md").read_text(), "failing_loss.Crash")[0] == "failed"
    assert Image.open(out / "grid.png").size[1] == (1 + 2) * (64 + 2) + 2 * 18
    assert f"step {STEPS}/{STEPS}" in (out / "sds" / "seed0" / "log.txt").read_text()


# ---------------------------------------------------------------------------------------------
# The table, and the trainings side by side


def test_table_over_seeds():
    def row(value: float, **more: float) -> dict:
        keys = ("distance", "clip_score", "r_precision")
        keys += ("spectrum_error", "spectrum_lost", "spectrum_gained")
        return {**dict.fromkeys(keys, value), "distance_name": "rmse", **more}

    rows = {
        "one": row(0.25),
        "two": [row(0.1, n=3, m=2), row(0.3, n=5, m=2)],
        "none": [],
        "dash": [row(1)],
    }
    columns = {"n": ("number", ".0f"), "m": ("same", ".0f")}
    lines = markdown(seeds_table(rows, columns)).splitlines()
    assert lines[0].startswith("| loss | rmse to source |") and lines[0].endswith(
        "| number | same |"
    )
    assert len({line.count("|") for line in lines}) == 1
    assert cells("\n".join(lines), "one") == ["0.250"] * 6 + ["–", "–"]
    assert cells("\n".join(lines), "two") == ["0.200 ± 0.141"] * 6 + ["4 ± 1", "2"]
    assert cells("\n".join(lines), "none")[0] == "failed"


# Says where it is, then waits; leaves cleanly when it is told to, as a training does.
STEADY = """
import os, pathlib, signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: (print("saved", flush=True), sys.exit(0)))
pathlib.Path(os.environ["LMC_PROGRESS"]).write_text('{"first": 10, "done": 30, "total": 50}')
print("step 30", flush=True)
time.sleep(60)
"""
FAILING = "import time; time.sleep(1); print('bad'); raise SystemExit(3)"


def python(source: str) -> list[str]:
    return [sys.executable, "-c", source]


def test_a_job_that_raises_ends_the_others(tmp_path):
    trainings = Trainings({"a": 50, "b": 50, "c": 50}, dict.fromkeys("abc", 1.0))
    after: list[str] = []

    def steady() -> None:
        trainings.train("a", python(STEADY), tmp_path / "a.log")
        after.append("a")

    jobs = [
        steady,
        lambda: trainings.train("b", python(FAILING), tmp_path / "b.log"),
        lambda: trainings.train("c", python("print('c')"), tmp_path / "c.log"),
    ]
    with pytest.raises(TrainingFailed, match="'b' failed") as caught:
        trainings.run(jobs, side_by_side=2)
    assert caught.value.tail == "bad\n" and caught.value.log == tmp_path / "b.log"
    assert (tmp_path / "a.log").read_text().endswith("saved\n"), "told to save and leave"
    assert not after, "what comes after a training that was stopped is not done"
    assert not (tmp_path / "c.log").exists() or not (tmp_path / "c.log").read_text()
    with pytest.raises(Stopped):
        trainings.train("d", python(""), tmp_path / "d.log")


def test_sigterm_lets_the_trainings_save(tmp_path):
    log, before = tmp_path / "log", signal.getsignal(signal.SIGTERM)
    trainings = Trainings({"a": 50}, {"a": 1.0})

    def end() -> None:
        while not (log.exists() and "step 30" in log.read_text()):
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=end, daemon=True).start()
    with pytest.raises(KeyboardInterrupt):
        trainings.run([lambda: trainings.train("a", python(STEADY), log)], 1)
    assert log.read_text().endswith("saved\n")
    assert signal.getsignal(signal.SIGTERM) is before


def test_progress_is_of_all_together(tmp_path):
    """a is at 30 of 10 … 50 at three times the cost of b, which is done, and of c, not begun:
    60 + 20 of 120 + 20 + 40 are done."""
    trainings = Trainings({"a": 50, "b": 20, "c": 40}, {"a": 3.0, "b": 1.0, "c": 1.0})
    for name, first, done in (("a", 10, 30), ("b", 0, 20)):
        trainings.records[name] = tmp_path / name
        trainings.records[name].write_text(
            json.dumps({"first": first, "done": done, "total": trainings.steps[name]})
        )
    trainings.running["a"] = None
    trainings.ended.add("b")
    share, note = trainings.progress()
    assert share == pytest.approx(80 / 180) and note == "a 30/50"
    (tmp_path / "a").write_text("{")  # half written, or something else's
    assert trainings.progress()[0] == pytest.approx(20 / (150 + 20 + 40))


def test_progress_comes_from_numbers_not_from_prose(tmp_path, monkeypatch, capfd):
    """A training that prints lines like those of its progress does not move the bar."""
    monkeypatch.setattr(lmc.progress, "SECONDS", 0.0)
    monkeypatch.setattr(side_by_side, "EVERY", 0.1)
    source = STEADY.replace("step 30", "step 49/50").replace("sleep(60)", "sleep(1)")
    trainings = Trainings({"a": 50}, {"a": 1.0})
    trainings.run([lambda: trainings.train("a", python(source), tmp_path / "log")], 1)
    printed = capfd.readouterr().err
    assert "a 30/50" in printed and "49/50" not in printed and "left" in printed


def test_trainings_side_by_side_have_gpus_of_their_own(tmp_path):
    source = "import os, time; print(os.environ.get('CUDA_VISIBLE_DEVICES')); time.sleep(0.5)"

    def seen(gpus: list[str], count: int) -> list[str]:
        trainings = Trainings(dict.fromkeys("abc", 1), dict.fromkeys("abc", 1.0), gpus=gpus)
        logs = [tmp_path / f"{len(gpus)}-{count}-{name}" for name in "abc"]
        jobs = [
            partial(trainings.train, name, python(source), log)
            for name, log in zip("abc", logs, strict=True)
        ]
        trainings.run(jobs, count)
        return sorted(log.read_text().strip() for log in logs)

    assert seen(["0", "3"], 2) in (["0", "0", "3"], ["0", "3", "3"])
    assert seen(["0", "1", "2", "3"], 2) in (["0,2", "0,2", "1,3"], ["0,2", "1,3", "1,3"])
    assert seen(["0"], 3) == ["0", "0", "0"]
    assert gpu_parts([], 2) == []


def test_threads_are_those_asked_for(tmp_path):
    trainings = Trainings({"a": 1}, {"a": 1.0}, threads=3)
    source = "import os; print(os.environ['OMP_NUM_THREADS'])"
    trainings.train("a", python(source), tmp_path / "log")
    assert (tmp_path / "log").read_text() == "3\n"


def test_the_log_of_a_retry_keeps_what_was_there(tmp_path):
    log = tmp_path / "log"
    for source, tail in (("print('one'); raise SystemExit(1)", "one\n"), ("exit(2)", "")):
        with pytest.raises(TrainingFailed) as caught:
            Trainings({"a": 1}, {"a": 1.0}).train("a", python(source), log)
        assert caught.value.tail == tail, "of this session alone"
    Trainings({"a": 1}, {"a": 1.0}).train("a", python("print('three')"), log)
    assert log.read_text() == f"one\n{AGAIN}{AGAIN}three\n"


def test_a_training_s_notes_are_shown_at_once(tmp_path, capfd):
    source = f"print('step 1/2'); print({lmc.progress.NOTE!r} + '2: it runs away'); print('end')"
    Trainings({"a": 1}, {"a": 1.0}).train("a seed 0", python(source), tmp_path / "log")
    assert capfd.readouterr().out == "a seed 0: note at step 2: it runs away\n"
    assert "note at step 2: it runs away" in (tmp_path / "log").read_text()


def test_the_module_says_how_it_is_used():
    for given in ([], ["fit"]):
        with pytest.raises(SystemExit, match=r"lmc\.training \{prior,clip,bias,translator\}"):
            training.main(given)


def test_both_stages_can_be_started(tiny_prior_folder, world, tmp_path):
    more = ("--trainer.max_steps=1", "--trainer.limit_val_batches=0")
    data = f"{world}/shards"
    training.main(["bias", *worlds.bias_args(tiny_prior_folder, data, tmp_path, *more)])
    state = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)
    assert state["network"]["class"] == "Corrector"
