"""What a run says of itself: held-out measures, pictures, the best checkpoint, about.json."""

import hashlib
import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_evaluate import build_clip_folder, random
from torch.utils.data import DataLoader

import lmc.training.validation
import train_bias
import train_translator
from lmc.cli import main
from lmc.corrector import Corrector, corrector_loss, normalise
from lmc.filter import FilterCorrector
from lmc.load import load_averaged
from lmc.measure.correctors import CorrectorErrors, evaluate_corrector
from lmc.measure.evaluate import Prompts, Tools, Truth, evaluate, translated
from lmc.measure.metrics import Clip, MissingWeights, distances, rmse
from lmc.priors import DiffusersPrior
from lmc.release import Terms, write_release
from lmc.shards.images import ImageStream
from lmc.shards.store import TripletSet, draw_for, write_triplets
from lmc.shards.triplets import TripletStream, draw_for_key, draw_t_and_eps, sample_triplets
from lmc.training import about
from lmc.training.bias import CorrectorTraining
from lmc.training.cli import TrainingCLI
from lmc.training.validation import LOGGED, Heldout, Validation, load_tools

import ranks
import worlds

IMAGES = 7  # of the 24 held out
TARGETS = {name: f"a photo of a {name}" for name in ("dog", "bear")}
TRUTH = {f"heldout/{name}" for name in LOGGED if name.startswith("truth_")}
# The images are too small for AlexNet.
MEASURES = {f"heldout/{name}" for name in LOGGED if name != "lpips"} - TRUTH


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return worlds.write_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_clip_folder(tmp_path_factory.mktemp("clip"))


@pytest.fixture
def untrained(monkeypatch):
    """No weights of a prior may be loaded."""

    def from_pretrained(*args, **kwargs):
        raise AssertionError("the prior was loaded")

    monkeypatch.setattr(UNet2DConditionModel, "from_pretrained", from_pretrained)


def args(prior: Path, data: str, run: Path, clip: Path | str | None, *more: str) -> list[str]:
    """A tiny training of stage two that looks at some held-out images after steps 2 and 3."""
    options = [f"--model.validation.images={IMAGES}", "--model.validation.pictures=3"]
    options += [f"--model.validation.clip={clip}"] if clip else []
    rate = ["--model.optimizer.lr=0.01", "--trainer.max_steps=3"]
    return worlds.translator_args(prior, data, run, "SDS", *options, *rate, *more)


def last(run: Path, name: str = "last") -> dict:
    return torch.load(run / "checkpoints" / f"{name}.ckpt", weights_only=True)


def message(run, command: list[str]) -> str:
    with pytest.raises(SystemExit) as caught:
        run(command)
    return str(caught.value)


# ---------------------------------------------------------------------------------------------
# Stage two: the measures


@pytest.fixture(scope="module")
def alone(tiny_prior_folder, data, clip, tmp_path_factory):
    """A run of one process: its folder, what it logged last, and what it printed."""
    folder = tmp_path_factory.mktemp("alone")
    command = args(tiny_prior_folder, data, folder / "run", clip)
    (measured,) = ranks.run(folder, command, ranks=1, script="train_translator")
    return folder / "run", measured["metrics"], (folder / "0.log").read_text()


@pytest.fixture(scope="module")
def two(tiny_prior_folder, data, clip, tmp_path_factory):
    """The same of two processes, which do not share the images evenly, nor in whole batches."""
    folder = tmp_path_factory.mktemp("two")
    command = args(tiny_prior_folder, data, folder / "run", clip, "--data.batch_size=3")
    return folder / "run", ranks.run(folder, command, script="train_translator")


def test_what_is_logged_is_what_evaluate_says(alone, data, clip):
    """Of the averaged weights and the first images, after the last step."""
    run, metrics, _ = alone
    assert {name for name in metrics if name.startswith("heldout/")} == MEASURES
    translator, step = load_averaged(run)
    assert step == 3
    every = [
        key for batch in ImageStream(f"{data}/heldout-*.tar", 16, 5, False) for key in batch.key
    ]
    stream = ImageStream(f"{data}/heldout-*.tar", 16, 50, training=False, limit=IMAGES)
    result = evaluate(
        {"a": translated(translator)},
        lambda: DataLoader(stream, batch_size=None),
        Tools({"rmse": rmse}, Clip(str(clip))),
        Prompts(TARGETS, [*TARGETS.values(), "a photo of a cat"]),
    )
    assert result["heldout"]["keys"] == every[:IMAGES]
    row = result["rows"]["a"]["summary"]
    for name in MEASURES:
        wanted = row[name.removeprefix("heldout/")]["value"]
        assert metrics[name].item() == pytest.approx(wanted, rel=1e-5, abs=1e-6), name
    assert row["rmse"]["value"] > 0.01, "nothing was learned: everything would be equal"


@pytest.fixture(scope="module")
def truth(data, tmp_path_factory) -> Path:
    """True counterparts of the images looked at: other colours, less contrast, or next to none."""
    folder = tmp_path_factory.mktemp("truth")
    (batch,) = ImageStream(f"{data}/heldout-*.tar", 16, 50, training=False, limit=IMAGES)
    for name, contrast, shift in (("dog", 0.5, 0.4), ("bear", 0.02, -0.6)):
        (folder / name).mkdir()
        for key, image in zip(batch.key, batch.image, strict=True):
            (folder / name / f"{key}.png").write_bytes(worlds.png(contrast * image + shift))
    return folder


def test_what_is_logged_against_the_truth_is_what_evaluate_says(
    tiny_prior_folder, data, truth, tmp_path
):
    """And it is shown: the source, then by class the truth and the output."""
    command = args(tiny_prior_folder, data, tmp_path / "run", None)
    train_translator.main([*command, f"--model.validation.truth={truth}"])
    events = EventAccumulator(str(tmp_path / "run")).Reload()
    logged = {x for x in events.Tags()["scalars"] if x.startswith("heldout/truth")}
    assert logged == TRUTH - {"heldout/truth_lpips"}
    stream = ImageStream(f"{data}/heldout-*.tar", 16, 50, training=False, limit=IMAGES)
    result = evaluate(
        {"a": translated(load_averaged(tmp_path / "run")[0])},
        lambda: DataLoader(stream, batch_size=None),
        Tools(distances(16), truth=Truth(truth, list(TARGETS), 16)),
        Prompts(TARGETS, [*TARGETS.values()]),
    )
    for name in logged:
        wanted = result["rows"]["a"]["summary"][name.removeprefix("heldout/")]["value"]
        found = events.Scalars(name)[-1].value
        assert found == pytest.approx(wanted, rel=1e-5, abs=1e-6) and found > 0.01, name
    picture = np.asarray(Image.open(tmp_path / "run" / "validation" / "step_000003.png"))
    assert picture.shape[0] == 18 + 5 * 66  # 16 pixels are shown as 64
    (batch,) = stream
    for row, image in ((0, batch.image[0]), (1, batch.image[0] / 2 + 0.4)):
        shown = picture[18 + 1 + row * 66 :][:64:4, 76 + 1 :][:, :64:4].astype(int)
        wanted = ((image.clamp(-1, 1) + 1) * 127.5).round().int().permute(1, 2, 0).numpy()
        assert abs(shown - wanted).max() <= 1


def test_a_truth_that_does_not_fit_ends_it_before_training(
    tiny_prior_folder, data, truth, tmp_path, untrained
):
    def said(folder: Path, *more: str) -> str:
        command = args(tiny_prior_folder, data, tmp_path / "run", None, *more)
        return message(train_translator.main, [*command, f"--model.validation.truth={folder}"])

    start = "model.validation.truth: "
    assert f"{start}no such folder of true counterparts: {tmp_path}/no" in said(tmp_path / "no")
    more = "--model.validation.images=9"
    assert f"{start}2 held-out images have no true counterpart in {truth}/dog" in said(truth, more)
    shutil.copytree(truth / "dog", tmp_path / "half" / "dog")
    assert f"{start}{tmp_path}/half has no true counterparts of class 'bear'" in said(
        tmp_path / "half"
    )
    assert not (tmp_path / "run").exists()


def test_two_processes_measure_and_show_what_one_does(
    two, tiny_prior_folder, data, clip, tmp_path, monkeypatch
):
    run, measured = two
    monkeypatch.setattr(TrainingCLI, "_run_subcommand", lambda self, subcommand: None)
    cli = train_translator.main(args(tiny_prior_folder, data, tmp_path / "one", clip))
    cli.model.load_state_dict(last(run)["state_dict"])
    (metrics,) = cli.trainer.validate(cli.model, datamodule=cli.datamodule, verbose=False)
    assert metrics.keys() == MEASURES
    for name, value in metrics.items():
        for rank in measured:
            assert rank["metrics"][name].item() == pytest.approx(value, rel=1e-5, abs=1e-6), name
    one, both = (
        # Below the title, which says the step.
        np.asarray(Image.open(file))[18:].astype(int)
        for file in (
            tmp_path / "one" / "validation" / "step_000000.png",
            run / "validation" / "step_000003.png",
        )
    )
    assert one.shape == both.shape and abs(one - both).max() <= 1


@pytest.mark.parametrize(("processes", "limit"), [(1, 7), (2, 7), (3, 7), (2, 100), (2, None)])
def test_the_first_images_are_the_same_for_any_number_of_processes(data, processes, limit):
    def keys(rank: int, count: int, limit: int | None) -> list[str]:
        where = {"rank": rank, "world_size": count, "limit": limit}
        stream = ImageStream(f"{data}/heldout-*.tar", 16, 4, training=False, **where)
        return [key for batch in stream for key in batch.key]

    read = [keys(rank, processes, limit) for rank in range(processes)]
    assert sorted(sum(read, [])) == sorted(keys(0, 1, None)[:limit])
    assert len(set(sum(read, []))) == min(limit or 24, 24)


def test_training_reads_all_shards_whatever_is_looked_at(data):
    stream = ImageStream(f"{data}/train-*.tar", 16, 4, training=True, limit=2)
    batches = iter(stream)
    assert len({key for _ in range(6) for key in next(batches).key}) > 12


def test_what_measures_is_no_part_of_the_module(alone, two):
    for run in (alone[0], two[0]):
        assert {name.split(".")[0] for name in last(run)["state_dict"]} == {"network", "ema"}
    size = sum(x.numel() for x in last(two[0])["state_dict"].values())
    for rank in two[1]:
        assert set(rank["wrapped"]) == {("DistributedDataParallel", size)}


def test_a_picture_of_every_look(alone, two):
    """A title, then the source and two classes, of three images with a gap of two pixels."""
    for run in (alone[0], two[0]):
        files = sorted(file.name for file in (run / "validation").iterdir())
        assert files == ["step_000002.png", "step_000003.png"]
        picture = Image.open(run / "validation" / files[0])
        assert picture.size == (76 + 3 * 66, 18 + 3 * 66)
    events = EventAccumulator(str(alone[0])).Reload()
    assert [x.step for x in events.Images("source, then a row a class")] == [2, 3]
    assert len(events.Scalars("heldout/r_precision")) == 2


def test_the_pictures_first_row_is_the_source(alone, data):
    (batch,) = ImageStream(f"{data}/heldout-*.tar", 16, 50, training=False, limit=IMAGES)
    picture = np.asarray(Image.open(alone[0] / "validation" / "step_000003.png"))
    for i, image in enumerate(batch.image[:3]):  # the keys are in order
        shown = picture[18 + 1 :][:64:4, 76 + 1 + i * 65 :][:, :64:4]
        assert (shown == ((image + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()).all()


def test_alexnet_measures_where_it_is(monkeypatch):
    def known(size: int) -> dict:
        return {"lpips": rmse, "rmse": rmse, "other": rmse} if size == 64 else {"rmse": rmse}

    monkeypatch.setattr(lmc.training.validation, "distances", known)
    for size, names in ((63, ["rmse"]), (64, ["lpips", "rmse"])):
        assert list(load_tools(Validation(), size, torch.device("cpu")).distances) == names


def test_only_what_all_processes_have_measures(monkeypatch, clip):
    found = [{"rmse", "clip"}, {"rmse"}]
    monkeypatch.setattr(lmc.training.validation, "from_all_processes", lambda mine: found)
    tools = load_tools(Validation(str(clip)), 64, torch.device("cpu"))
    assert tools.clip is None and list(tools.distances) == ["rmse"]
    assert "another process has none" in tools.left_out[0]


def test_an_output_that_is_not_finite_is_named(data):
    (batch,) = ImageStream(f"{data}/heldout-*.tar", 16, 50, training=False, limit=IMAGES)

    class Broken(torch.nn.Module):
        def class_ids(self, names):
            return torch.zeros(len(names), dtype=torch.long)

        def forward(self, image, class_id):
            return torch.where(torch.arange(len(image))[:, None, None, None] == 2, torch.nan, image)

    heldout = Heldout(Tools({"rmse": rmse}), Prompts(TARGETS, [*TARGETS.values()]), 3)
    with pytest.raises(ValueError, match=f"{batch.key[2]} to 'dog' is not finite"):
        heldout.add(Broken(), batch)


# ---------------------------------------------------------------------------------------------
# CLIP, missing or wrong


def test_without_clip_the_others_are_measured(tiny_prior_folder, data, tmp_path, capsys):
    train_translator.main(args(tiny_prior_folder, data, tmp_path, None))
    said = capsys.readouterr().out
    assert said.count("no best.ckpt is kept: no CLIP: model.validation.clip names none") == 1
    scalars = EventAccumulator(str(tmp_path)).Reload().Tags()["scalars"]
    left = {"heldout/r_precision", "heldout/clip_score"}
    assert {name for name in scalars if name.startswith("heldout/")} == MEASURES - left
    assert [file.name for file in (tmp_path / "checkpoints").iterdir()] == ["last.ckpt"]
    with pytest.raises(SystemExit, match=r"best\.ckpt: train_translator\.py keeps one where"):
        main(["release", str(tmp_path), "--out", str(tmp_path / "out"), "--best"])


def test_a_hub_id_that_cannot_be_had_is_said_and_training_goes_on(
    tiny_prior_folder, data, tmp_path, capsys, monkeypatch
):
    def no_clip(name, device):
        raise MissingWeights(f"{name} could not be fetched")

    monkeypatch.setattr(lmc.training.validation, "Clip", no_clip)
    train_translator.main(args(tiny_prior_folder, data, tmp_path, "some/clip"))
    assert "no CLIP: some/clip could not be fetched" in capsys.readouterr().out
    assert last(tmp_path)["global_step"] == 3


def test_a_wrong_folder_ends_it_before_training(tiny_prior_folder, data, tmp_path, untrained):
    (tmp_path / "nothing").mkdir()
    for wrong in (f"{tmp_path}/nothing", f"{tmp_path}/not/there"):
        command = args(tiny_prior_folder, data, tmp_path / "run", wrong)
        assert f"model.validation.clip {wrong}" in message(train_translator.main, command)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("option", ["images", "pictures"])
def test_bad_numbers_are_named(tiny_prior_folder, data, tmp_path, untrained, option):
    more = [f"--model.validation.{option}=0"]
    wanted = f"model.validation.{option} must be at least 1, got 0"
    command = args(tiny_prior_folder, data, tmp_path / "run", None, *more)
    assert wanted in message(train_translator.main, command)
    assert wanted in message(train_translator.main, [*command, "--dry_run"])


def test_a_key_that_is_there_twice_ends_it_before_training(
    tiny_prior_folder, data, tmp_path, untrained
):
    """Among the images that are looked at; twelve are in a shard."""
    for name in ("a", "b"):
        shutil.copy(f"{data}/heldout-00000.tar", tmp_path / f"{name}.tar")
    more = [f"--data.heldout={tmp_path}/*.tar", "--model.validation.images=13"]
    said = message(
        train_translator.main, args(tiny_prior_folder, data, tmp_path / "run", None, *more)
    )
    assert f"data.heldout {tmp_path}/*.tar: " in said and "the key 01000 twice" in said
    assert not (tmp_path / "run").exists()


# ---------------------------------------------------------------------------------------------
# The best checkpoint


def scripted(monkeypatch, *scores: tuple[float, float]) -> None:
    """R-Precision and CLIP score of the looks at the held-out images, one after the other."""
    left = list(scores)

    def measures(self) -> dict[str, float]:
        return dict(zip(("r_precision", "clip_score"), left.pop(0), strict=True))

    monkeypatch.setattr(Heldout, "measures", measures)


def test_the_best_is_kept_over_resuming(tiny_prior_folder, data, clip, tmp_path, monkeypatch):
    def go_on(steps: int, *scores: tuple[float, float]) -> int:
        scripted(monkeypatch, *scores)
        train_translator.main([*command, f"--trainer.max_steps={steps}"])
        assert last(tmp_path)["global_step"] == steps
        return last(tmp_path, "best")["global_step"]

    command = args(tiny_prior_folder, data, tmp_path, clip)
    assert go_on(4, (0.5, 0.1), (0.5, 0.1)) == 2  # the first of equals
    best = (tmp_path / "checkpoints" / "best.ckpt").read_bytes()
    assert go_on(8, (0.4, 0.9), (0.5, 0.05)) == 2
    assert (tmp_path / "checkpoints" / "best.ckpt").read_bytes() == best
    assert go_on(10, (0.5, 0.2)) == 10  # a tie, broken by the CLIP score
    # The run is killed after a best one, and goes on from before it.
    shutil.copy(tmp_path / "checkpoints" / "last.ckpt", tmp_path / "before")
    assert go_on(12, (0.9, 0.1)) == 12
    (tmp_path / "before").rename(tmp_path / "checkpoints" / "last.ckpt")
    assert go_on(14, (0.8, 0.1), (0.7, 0.1)) == 12
    figures = last(tmp_path, "best")["callbacks"]["SaveBest"]["best"]
    assert figures == pytest.approx([0.9, 0.1])
    # It is gone: what there is from now on is the best.
    (tmp_path / "checkpoints" / "best.ckpt").unlink()
    assert go_on(16, (0.1, 0.1)) == 16
    # It is broken: likewise.
    (tmp_path / "checkpoints" / "best.ckpt").write_bytes(b"broken")
    assert go_on(18, (0.05, 0.1)) == 18
    # Of other images nothing compares with what was.
    command.append("--model.validation.images=5")
    assert go_on(20, (0.02, 0.1)) == 20
    # The run begins anew: what an earlier one left is not its best.
    (tmp_path / "checkpoints" / "last.ckpt").unlink()
    assert go_on(2, (0.01, 0.1)) == 2
    (tmp_path / "checkpoints" / "last.ckpt").unlink()
    train_translator.main([*command, "--trainer.max_steps=1", "--trainer.limit_val_batches=0"])
    assert not (tmp_path / "checkpoints" / "best.ckpt").exists()


def test_a_look_that_fails_after_the_last_step_loses_no_step(
    tiny_prior_folder, data, clip, tmp_path, monkeypatch
):
    def fail(self, translator, batch):
        raise ValueError("an output is not finite")

    monkeypatch.setattr(Heldout, "add", fail)
    more = ["--trainer.val_check_interval=3", "--trainer.max_steps=3", "--save_every=1000"]
    with pytest.raises(ValueError, match="not finite"):
        train_translator.main([*args(tiny_prior_folder, data, tmp_path, clip), *more])
    assert last(tmp_path)["global_step"] == 3


def test_two_processes_keep_one_best(two):
    run, measured = two
    figures = last(run, "best")["callbacks"]["SaveBest"]["best"]
    assert last(run)["callbacks"]["SaveBest"]["best"] == figures
    assert figures[0] >= measured[0]["metrics"]["heldout/r_precision"].item()
    assert sorted(x.name for x in (run / "checkpoints").iterdir()) == ["best.ckpt", "last.ckpt"]


def test_a_run_can_go_on_from_its_best(alone, tiny_prior_folder, data, clip, tmp_path, monkeypatch):
    """To the same weights: it is a whole checkpoint, though written amid a validation."""
    command = args(tiny_prior_folder, data, tmp_path, clip)
    scripted(monkeypatch, (0.5, 0.1), (0.4, 0.1), (0.4, 0.1), (0.4, 0.1))
    train_translator.main(command)
    assert last(tmp_path, "best")["global_step"] == 2
    (tmp_path / "checkpoints" / "best.ckpt").rename(tmp_path / "checkpoints" / "last.ckpt")
    train_translator.main(command)
    assert last(tmp_path)["global_step"] == 3
    for name, value in last(alone[0])["state_dict"].items():
        assert torch.equal(last(tmp_path)["state_dict"][name], value), name


def test_the_best_is_released(tiny_prior_folder, data, clip, tmp_path, monkeypatch):
    run = tmp_path / "run"
    scripted(monkeypatch, (0.5, 0.1), (0.4, 0.1))
    train_translator.main(args(tiny_prior_folder, data, run, clip))
    stated = ["--unmeasured", *worlds.STATED]
    main(["release", str(run), "--out", str(tmp_path / "best"), "--best", *stated])
    main(["release", str(run), "--out", str(tmp_path / "last"), *stated])
    (network, step), (other, end) = load_averaged(run, best=True), load_averaged(run)
    assert (step, end) == (2, 3)
    weights, others = network.state_dict(), other.state_dict()
    assert any(not torch.equal(value, others[name]) for name, value in weights.items())
    card = (tmp_path / "best" / "README.md").read_text()
    best = "2 steps of 4 images, the best of the run by held-out R-Precision; averaged weights"
    assert best in card
    assert "3 steps of 4 images; averaged" in (tmp_path / "last" / "README.md").read_text()
    for folder, wanted in (("best", weights), ("last", others)):
        released = type(network).from_pretrained(tmp_path / folder).state_dict()
        assert all(torch.equal(released[name], value) for name, value in wanted.items())
    with pytest.raises(ValueError, match="name the run folder"):
        load_averaged(run / "checkpoints" / "last.ckpt", best=True)


# ---------------------------------------------------------------------------------------------
# Stage one

RANGE = (0.1, 0.7)  # of t, in the run below


def drawn_by_hand(key: str, time_range: tuple[float, float], name: str = "0/0"):
    """t and eps of a held-out image of 16 x 16: of a hash of its key."""
    digest = hashlib.sha256(f"{name}/{key}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big"))
    return draw_t_and_eps(torch.empty(1, 3, 16, 16), generator, time_range)


@pytest.mark.parametrize(("seed", "repetition"), [(0, 0), (3, 1)])
def test_what_is_drawn_for_a_key_is_of_nothing_else(seed, repetition):
    """To the bit: the triplets that somebody has stored are of these t and eps."""
    t, eps = drawn_by_hand("a/b 1", RANGE, f"{seed}/{repetition}")
    mine = draw_for_key("a/b 1", (3, 16, 16), RANGE, seed, repetition)
    stored = draw_for("a/b 1", (3, 16, 16), TripletSet((), 16, 2, RANGE, seed))
    assert torch.equal(mine[0], t) and torch.equal(mine[1], eps)
    assert torch.equal(stored[0][[repetition]], t) and torch.equal(stored[1][[repetition]], eps)


@pytest.fixture(scope="module")
def closed_form(tiny_prior_folder, tmp_path_factory) -> Path:
    """A released closed-form corrector of the tiny prior, that is no identity."""
    corrector = FilterCorrector(
        3, 16, bins=3, prior=DiffusersPrior(str(tiny_prior_folder)).identity
    )
    corrector.gain.copy_(random(*corrector.gain.shape))
    corrector.offset.copy_(random(*corrector.offset.shape, seed=1))
    folder = tmp_path_factory.mktemp("closed_form")
    write_release(corrector, folder, "made up", Terms(**worlds.TERMS))
    return folder


@pytest.fixture(scope="module")
def stage_one(tiny_prior_folder, data, closed_form, tmp_path_factory):
    """A run of two processes with a closed form beside: its folder and what each measured."""
    folder = tmp_path_factory.mktemp("stage_one")
    more = [f"--model.closed_form={closed_form}", "--data.batch_size=5"]
    more += [f"--model.time_range={list(RANGE)}"]
    return folder / "run", ranks.run(
        folder, worlds.bias_args(tiny_prior_folder, data, folder / "run", *more)
    )


def test_errors_by_t_are_those_of_a_direct_computation(
    stage_one, tiny_prior_folder, data, closed_form
):
    """Image by image, over all of both processes; and their weighted mean is the whole."""
    run, measured = stage_one
    prior = DiffusersPrior(str(tiny_prior_folder))
    prior.to("cpu")
    model = CorrectorTraining(prior, widths=(8, 8))
    model.load_state_dict(last(run)["state_dict"])
    null = prior.embed([""])
    beside = FilterCorrector.from_pretrained(closed_form)
    errors: dict[int, list[dict[str, float]]] = {}
    with torch.no_grad():
        for batch in ImageStream(f"{data}/heldout-*.tar", 16, 1, training=False):
            x = sample_triplets(prior, batch.image, *drawn_by_hand(batch.key[0], RANGE), null)
            each = {
                "loss": model.averaged.correct(x.z, x.t, x.z_hat),
                "identity_loss": x.z,
                "normalised_identity_loss": normalise(x.z, x.z_hat),
                "closed_form_loss": beside.correct(x.z, x.t, x.z_hat),
            }
            losses = {name: corrector_loss(b, x.z_hat).item() for name, b in each.items()}
            errors.setdefault(min(4, int(x.t.item() / 0.2)), []).append(losses)
    assert len(errors) > 2 and sum(map(len, errors.values())) == 24
    wanted: dict[str, float] = {}
    for name in losses:
        whole = sum(sum(x[name] for x in errors[i]) for i in errors) / 24
        wanted[f"heldout/{name}"] = whole
        for i, found in errors.items():
            mean = sum(x[name] for x in found) / len(found)
            wanted[f"heldout/{name}/t{i / 5:.1f}"] = mean
    for rank in measured:
        metrics = {k: x.item() for k, x in rank["metrics"].items() if k.startswith("heldout/")}
        # Of these, from more than one draw of eps, the sum is known.
        both = {k: metrics.pop(k) for k in list(metrics) if "/excess" in k or "/floor" in k}
        for name in (name for name in both if "excess" in name):
            total = both[name] + both[name.replace("excess", "floor")]
            assert total == pytest.approx(wanted[name.replace("excess", "loss")], rel=1e-4)
        assert len(both) == 2 * (1 + len(errors))
        assert metrics == pytest.approx(wanted, rel=1e-4)
        for name in losses:
            means = sum(metrics[f"heldout/{name}/t{i / 5:.1f}"] * len(errors[i]) for i in errors)
            assert means / 24 == pytest.approx(metrics[f"heldout/{name}"], rel=1e-5)


@pytest.mark.parametrize(("batch_size", "processes"), [(1, 1), (3, 1), (50, 1), (3, 2)])
def test_evaluate_corrector_says_what_is_logged(
    stage_one, tiny_prior_folder, data, closed_form, batch_size, processes
):
    """Of the same weights, images and times, whatever the batches and processes of either."""
    run, (measured, _) = stage_one
    prior = DiffusersPrior(str(tiny_prior_folder))
    prior.to("cpu")
    network, _ = load_averaged(run)
    for name, corrector in (
        ("loss", network),
        ("closed_form_loss", FilterCorrector.from_pretrained(closed_form)),
    ):
        each = []
        for rank in range(processes):
            where = {"rank": rank, "world_size": processes}
            stream = ImageStream(f"{data}/heldout-*.tar", 16, batch_size, training=False, **where)
            each.append(evaluate_corrector(corrector, prior, stream, time_range=RANGE))
        # 24 images: the processes have equally many.
        for mine, logged in {
            "loss": name,
            "identity_loss": "identity_loss",
            "normalised_identity_loss": "normalised_identity_loss",
        }.items():
            wanted = measured["metrics"][f"heldout/{logged}"].item()
            assert np.mean([x[mine] for x in each]) == pytest.approx(wanted, rel=1e-5), mine


def test_the_first_heldout_images_only_are_measured(tiny_prior_folder, data, tmp_path):
    """From images and from stored triplets, where an image counts with all its times."""
    prior = DiffusersPrior(str(tiny_prior_folder))
    what = TripletSet((f"{data}/heldout-*.tar",), 16, times_per_image=3)
    write_triplets(prior, what, tmp_path / "stored")
    wanted = {}
    for name, stream in (
        ("images", ImageStream(f"{data}/heldout-*.tar", 16, 7, training=False)),
        ("stored", TripletStream(f"{tmp_path}/stored/heldout-*.tar", 21, training=False)),
    ):
        model = CorrectorTraining(prior, widths=(8, 8))
        model.null = prior.embed([""])
        x = model.triplets(next(iter(stream)))
        wanted[name] = corrector_loss(x.z, x.z_hat).mean().item()
    run = worlds.bias_args(tiny_prior_folder, data, tmp_path / "a", "--model.heldout_images=7")
    run += ["--trainer.max_steps=1", "--trainer.val_check_interval=1"]
    for name, more in (
        ("images", []),
        ("stored", [f"--data.heldout={tmp_path}/stored/heldout-*.tar", f"--run={tmp_path}/b"]),
    ):
        metrics = train_bias.main([*run, *more]).trainer.callback_metrics
        assert metrics["heldout/identity_loss"].item() == pytest.approx(wanted[name], rel=1e-5)
    assert wanted["images"] != pytest.approx(wanted["stored"], rel=1e-2)


@pytest.mark.parametrize(("processes", "limit"), [(1, 7), (2, 7), (2, 100), (2, None)])
def test_the_first_images_of_triplets_are_the_same_for_any_number_of_processes(
    tiny_prior_folder, data, tmp_path, processes, limit
):
    prior = DiffusersPrior(str(tiny_prior_folder))
    what = TripletSet((f"{data}/heldout-*.tar",), 16, times_per_image=2)
    write_triplets(prior, what, tmp_path)

    def keys(rank: int, count: int, limit: int | None) -> list[str]:
        where = {"rank": rank, "world_size": count, "limit": limit}
        stream = TripletStream(f"{tmp_path}/heldout-*.tar", 4, training=False, **where)
        return [key for batch in stream for key in batch.key]

    read = [keys(rank, processes, limit) for rank in range(processes)]
    every = keys(0, 1, None)
    assert sorted(sum(read, [])) == sorted(every[: None if limit is None else 2 * limit])
    assert len(set(sum(read, []))) == min(limit or 24, 24)


def test_a_thousand_heldout_images_by_default(tiny_prior_folder):
    prior = DiffusersPrior(str(tiny_prior_folder))
    assert CorrectorTraining(prior, (8, 8)).heldout_images == 1000
    assert CorrectorTraining(prior, (8, 8), heldout_images=None).heldout_images is None
    with pytest.raises(ValueError, match=r"model\.heldout_images must be at least 1.*got 0"):
        CorrectorTraining(prior, (8, 8), heldout_images=0)


def test_errors_have_bins_only_where_they_are_asked_for():
    z, z_hat, b, other = random(4, 3, 3, 8, 8)
    t = torch.tensor([0.1, 0.45, 1.0])
    plain, binned = CorrectorErrors(), CorrectorErrors(2, ["other_loss"])
    plain.update(z, z_hat, b)
    binned.update(z, z_hat, b, other, t=t)
    names = ["loss", "identity_loss", "normalised_identity_loss"]
    assert list(plain.compute()) == names
    found = binned.compute()
    assert {x for x in found if "/" not in x} == {*names, "other_loss"}
    error = corrector_loss(other, z_hat)
    torch.testing.assert_close(found["other_loss/t0.0"], error[:2].mean())
    torch.testing.assert_close(found["other_loss/t0.5"], error[2])
    torch.testing.assert_close(found["loss"], plain.compute()["loss"])


def test_stage_one_keeps_its_pictures(stage_one):
    run, _ = stage_one
    files = sorted(file.name for file in (run / "validation").iterdir())
    assert files == [f"{name}_00000{step}.png" for name in ("spectra", "step") for step in (2, 4)]
    # Rank 0's first batch is five images.
    assert Image.open(run / "validation" / "step_000004.png").size == (76 + 5 * 66, 18 + 3 * 66)
    width, height = Image.open(run / "validation" / "spectra_000004.png").size
    assert width == 2 * 400 and height == 300  # a panel for each third of the times
    tags = EventAccumulator(str(run)).Reload().Tags()["images"]
    assert set(tags) == {"z, z_hat, b(z, t) by t", "power spectra by t"}
    assert {name.split(".")[0] for name in last(run)["state_dict"]} == {"network", "ema"}


def test_a_wrong_closed_form_is_named(
    tiny_prior_folder, other_prior_folder, data, closed_form, tmp_path, untrained
):
    prior = DiffusersPrior(str(tiny_prior_folder))
    corrector, terms = Corrector(3, [8, 8], prior=prior.identity), Terms(**worlds.TERMS)
    write_release(corrector, tmp_path / "trained", "made up", terms)
    for wrong, folder, words in (
        (f"{tmp_path}/not/there", tiny_prior_folder, "no release there"),
        (tmp_path / "trained", tiny_prior_folder, "is a trained corrector"),
        (closed_form, other_prior_folder, "valid for the prior it was trained on only"),
    ):
        command = worlds.bias_args(folder, data, tmp_path / "run", f"--model.closed_form={wrong}")
        said = message(train_bias.main, command)
        assert f"model.closed_form {wrong}" in said and words in said


# ---------------------------------------------------------------------------------------------
# about.json


def sessions(run: Path) -> list[dict]:
    return json.loads((run / "about.json").read_text())["sessions"]


def test_about_has_an_entry_a_start(tiny_prior_folder, data, tmp_path, capsys):
    command = worlds.bias_args(tiny_prior_folder, data, tmp_path, "--trainer.limit_val_batches=0")
    train_bias.main([*command, "--trainer.max_steps=3"])
    train_bias.main([*command, "--trainer.max_steps=5"])
    train_bias.main([*command, "--trainer.max_steps=5"])  # all done: no start
    first, second = sessions(tmp_path)
    assert [(x["from_step"], x["to_step"]) for x in (first, second)] == [(0, 3), (3, 5)]
    assert first["began"] <= second["began"] and first["began"].endswith("+00:00")
    for session in (first, second):
        assert session["seconds"] > 0 and session["processes"] == 1
        assert session["hardware"].endswith("cores")
        assert session["versions"]["torch"] == torch.__version__.split("+")[0]
        assert {"lmc", "python", "lightning", "diffusers", "transformers"} <= set(
            session["versions"]
        )
    # Of a start that was killed before it saved anything nothing is in the weights.
    lost = {**second, "from_step": 5, "to_step": 5}
    (tmp_path / "about.json").write_text(json.dumps({"sessions": [first, second, lost]}))
    train_bias.main([*command, "--trainer.max_steps=6"])
    starts = [(x["from_step"], x["to_step"]) for x in sessions(tmp_path)]
    assert starts == [(0, 3), (3, 5), (5, 6)]
    # A broken one stops nothing.
    for broken in ("{", '{"sessions": 3}', "[]"):
        (tmp_path / "about.json").write_text(broken)
        capsys.readouterr()
        steps = last(tmp_path)["global_step"] + 1
        train_bias.main([*command, f"--trainer.max_steps={steps}"])
        assert "about.json" in capsys.readouterr().out
        assert [(x["from_step"], x["to_step"]) for x in sessions(tmp_path)] == [(steps - 1, steps)]
    # Begun anew, nothing of an earlier run is in the weights.
    (tmp_path / "checkpoints" / "last.ckpt").unlink()
    train_bias.main([*command, "--trainer.max_steps=1"])
    assert [x["to_step"] for x in sessions(tmp_path)] == [1]


def test_about_is_written_once_for_all_processes(two):
    (session,) = sessions(two[0])
    assert (session["processes"], session["to_step"]) == (2, 3)


def test_about_that_cannot_be_written_stops_nothing(tiny_prior_folder, data, tmp_path, capsys):
    (tmp_path / "about.json").mkdir()
    train_bias.main(worlds.bias_args(tiny_prior_folder, data, tmp_path))
    assert "about.json cannot be written" in capsys.readouterr().out
    assert last(tmp_path)["global_step"] == 4


def test_the_commit_is_that_of_the_packages_own_checkout(tmp_path, monkeypatch):
    def git(*command: str) -> str:
        who = ["-c", "user.name=a", "-c", "user.email=a@b"]
        done = subprocess.run(
            ["git", "-C", str(tmp_path), *who, *command], check=True, capture_output=True, text=True
        )
        return done.stdout.strip()

    none = {"commit": None, "dirty": None}
    package = tmp_path / "package"
    package.mkdir()
    (package / "__init__.py").write_text("")
    git("init", "--quiet")
    git("commit", "--quiet", "--allow-empty", "-m", "one")
    assert about.source_commit(package) == none  # installed into somebody else's checkout
    git("add", ".")
    git("commit", "--quiet", "-m", "two")
    commit = git("rev-parse", "HEAD")
    (tmp_path / "left_over").write_text("")
    assert about.source_commit(package) == {"commit": commit, "dirty": False}
    (package / "__init__.py").write_text("1")
    assert about.source_commit(package) == {"commit": commit, "dirty": True}
    monkeypatch.setenv("PATH", str(tmp_path))
    assert about.source_commit(package) == none


# ---------------------------------------------------------------------------------------------
# The dry run


def test_a_dry_run_says_what_is_looked_at(
    tiny_prior_folder, data, clip, closed_form, tmp_path, capsys
):
    def said(run, command: list[str]) -> str:
        with pytest.raises(SystemExit):
            run([*command, "--dry_run"])
        (line,) = [x for x in capsys.readouterr().out.splitlines() if x.startswith("validation")]
        return line

    two = said(train_translator.main, args(tiny_prior_folder, data, tmp_path, clip))
    assert f"every 2 steps and at the end, 7 held-out images to 2 classes; CLIP {clip}" in two
    assert "no CLIP" in said(train_translator.main, args(tiny_prior_folder, data, tmp_path, None))
    one = worlds.bias_args(tiny_prior_folder, data, tmp_path)
    assert said(train_bias.main, one).endswith(
        "the first 1,000 held-out images, 2 evaluations each (not for stored triplets)"
    )
    every = [*one, "--model.heldout_images=null", "--model.heldout_draws=1"]
    assert said(train_bias.main, every).endswith("all held-out images")
    every += ["--model.stability=3"]
    assert said(train_bias.main, every).endswith("images; the stability test on 3 at the end")
    one += [f"--model.closed_form={closed_form}"]
    assert f"beside {closed_form}: here, of the prior {tiny_prior_folder}" in said(
        train_bias.main, one
    )
