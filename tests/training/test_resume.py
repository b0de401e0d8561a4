"""Runs that go on: with what they were begun with, from checkpoints that are finite."""

import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from packaging.requirements import Requirement
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import lmc.training.bias
import train_bias
import train_translator
from lmc.corrector import Corrector
from lmc.priors import DiffusersPrior
from lmc.training.base import NonFiniteGradient, TrainingModule, tensorboard
from lmc.training.callbacks import AtomicCheckpointIO, not_finite
from lmc.training.cli import TrainingCLI
from lmc.training.resume import ABSENT, check_changes, covers, differences, is_meaning
from lmc.training.translator import TranslatorTraining

import worlds


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return worlds.write_world(tmp_path_factory.mktemp("world"))


def last(run: Path, name: str = "last") -> dict:
    return torch.load(run / "checkpoints" / f"{name}.ckpt", weights_only=True)


def files(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


def assert_same(one: dict, other: dict) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


@pytest.fixture(scope="module")
def begun(tiny_prior_folder, data, tmp_path_factory) -> Path:
    """A folder with a prior, a corrector of it, and a run of four steps with LMC in run/."""
    folder = tmp_path_factory.mktemp("begun")
    shutil.copytree(tiny_prior_folder, folder / "prior")
    for seed in (0, 1):
        torch.manual_seed(seed)
        prior = DiffusersPrior(str(folder / "prior"))
        corrector = Corrector(3, [8, 8], prior=prior.identity)
        corrector.save_pretrained(folder / f"corrector{seed}")
    train_translator.main(lmc_args(folder, data))
    return folder


@pytest.fixture
def there(begun, tmp_path, monkeypatch) -> Path:
    """A copy of it at the same relative paths, from within."""
    shutil.copytree(begun, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def lmc_args(folder: Path, data: str, *more: str) -> list[str]:
    prior, corrector = folder / "prior", folder / "corrector0"
    args = worlds.translator_args(prior, data, folder / "run", "LMC")
    args += [f"--model.loss.init_args.corrector={corrector}", "--trainer.limit_val_batches=0"]
    return [*args, *more]


def moved(there: Path, data: str, *more: str, allow: Sequence[str] = ()) -> list[str]:
    """Of a copy: its prior and corrector are elsewhere, and the same."""
    allow = ["--allow_changes", "model.prior", "model.loss.corrector", *allow]
    return lmc_args(there, data, *more, *allow)


def refused(run: Callable, args: list[str], folder: Path) -> str:
    """The line that refuses to go on; nothing in the folder has changed."""
    before = files(folder)
    with pytest.raises(SystemExit) as caught:
        run(args)
    assert files(folder) == before
    message = str(caught.value.code)
    assert "\n" not in message
    return message


@pytest.fixture
def nothing_built(monkeypatch):
    """What is refused is refused before any class is built."""

    def built(self):
        raise AssertionError("classes were built")

    monkeypatch.setattr(TrainingCLI, "instantiate_classes", built)


@pytest.mark.parametrize(
    ("option", "old", "new"),
    [
        ("model.loss.init_args.guidance_scale", "15.0", "7.5"),
        ("model.loss.init_args.keep_ratio", "False", "True"),
        ("model.loss.init_args.corrector", "corrector0'", "'identity'"),
        ("model.prior.init_args.pretrained", "prior'", "'another'"),
        ("model.prior.init_args.dtype", "'float32'", "'bfloat16'"),
        ("model.optimizer.lr", "5e-05", "0.001"),
        ("model.l2_weight.end", "0.1", "0.2"),
        ("model.ema_decay", "0.999", "0.9"),
        ("model.prompt", "'a photo of a {}'", "'a {}'"),
        ("data.train", "train-*.tar'", "'other.tar'"),
        ("data.heldout", "heldout-*.tar'", "'other.tar'"),
        ("data.batch_size", "4", "8"),
        ("data.shuffle", "10", "20"),
        ("trainer.accumulate_grad_batches", "1", "2"),
        ("trainer.gradient_clip_val", "None", "1.0"),
        ("seed_everything", "0", "1"),
    ],
)
def test_what_changes_the_meaning_is_refused(begun, data, nothing_built, option, old, new):
    args = [*lmc_args(begun, data), f"--{option}={new.strip(chr(39))}"]
    message = refused(train_translator.main, args, begun / "run")
    assert re.search(
        rf"{re.escape(option)} was \S*{re.escape(old)} and is {re.escape(new)}\.", message
    )
    assert message.endswith(f"--allow_changes {option}") and str(begun / "run") in message


def test_another_loss_is_refused_and_so_is_a_dry_run_of_it(begun, data, nothing_built):
    args = worlds.translator_args(begun / "prior", data, begun / "run", "SDS")
    args += ["--trainer.limit_val_batches=0"]
    for more in ([], ["--dry_run"]):
        message = refused(train_translator.main, [*args, *more], begun / "run")
        assert "model.loss.class_path was 'lmc.LMC' and is 'lmc.SDS'" in message


def test_what_leaves_the_meaning_goes_on_and_the_history_is_kept(there, data, capsys):
    run = there / "run"
    before = (run / "config.yaml").read_text()
    first = moved(there, data, "--trainer.max_steps=6", "--trainer.limit_val_batches=1")
    more = ["--save_every=3", "--keep=1", "--trainer.log_every_n_steps=2"]
    more += [
        "--trainer.val_check_interval=3",
        "--data.num_workers=1",
        "--model.validation.images=8",
    ]
    more += ["--trainer.precision=bf16-mixed", f"--run={there}/./run"]
    train_translator.main([*first, *more])
    said = capsys.readouterr().out
    assert "trainer.max_steps was 4 and is 6" in said
    assert "trainer.precision was None and is 'bf16-mixed'" in said
    assert "data.num_workers was 0 and is 1" in said and "save_every" not in said
    assert "going on after step 4" in said and last(run)["global_step"] == 6
    assert (run / "config-000004.yaml").read_text() == before
    now = yaml.safe_load((run / "config.yaml").read_text())
    assert now["trainer"]["max_steps"] == 6 and now["allow_changes"] == []
    # The same once more: all is done, nothing differs, nothing is written.
    config = (run / "config.yaml").read_text()
    train_translator.main([*first, *more])
    assert "another configuration" not in capsys.readouterr().out
    assert (run / "config.yaml").read_text() == config
    assert len(list(run.glob("config*"))) == 2


def test_an_allowed_change_is_made(there, data, capsys):
    """Another learning rate is that of the very next step, though the checkpoint has its own."""
    run = there / "run"
    new = ["--model.optimizer.every=3", "--model.optimizer.factor=0.5", "--trainer.max_steps=5"]
    new += ["--model.optimizer.lr=0.01"]
    args = moved(there, data, *new, allow=["model.optimizer"])
    before = last(run)
    train_translator.main(args)
    assert "model.optimizer.lr was 5e-05 and is 0.01" in capsys.readouterr().out
    after = last(run)
    # An Adam step moves each weight by about its learning rate: here half of 0.01, after step 3.
    steps = [
        (after["state_dict"][name] - value).abs().max().item()
        for name, value in before["state_dict"].items()
        if name.startswith("network.")
    ]
    assert 0.003 < max(steps) < 0.02
    assert after["optimizer_states"][0]["param_groups"][0]["lr"] == pytest.approx(0.005)
    # What was allowed once is the run's own from then on, and is not allowed again.
    args = moved(there, data, *new[:-1])
    assert "model.optimizer.lr was 0.01 and is 5e-05" in refused(train_translator.main, args, run)


def test_another_loss_can_be_allowed(there, data):
    args = worlds.translator_args(there / "prior", data, there / "run", "SDS")
    args += ["--trainer.limit_val_batches=0", "--trainer.max_steps=5"]
    train_translator.main([*args, "--allow_changes", "model.loss", "model.prior"])
    assert last(there / "run")["loss"]["name"] == "sds"


def test_other_weights_of_the_same_name_are_refused(there, data):
    """The configuration is the same; the prior or the corrector in the folder is not."""
    args = [*lmc_args(Path(), data), "--trainer.max_steps=6"]
    train_translator.main([*args, "--allow_changes", "model.prior", "model.loss.corrector"])
    args[-1] = "--trainer.max_steps=8"
    shutil.copytree(there / "corrector1", there / "corrector0", dirs_exist_ok=True)
    message = refused(train_translator.main, args, there / "run")
    assert re.search(
        r"model\.loss\.init_args\.corrector names .* digest was \w+ and is \w+", message
    )
    allow = [*args, "--allow_changes", "model.loss.init_args.corrector"]
    train_translator.main(allow)
    args[-1] = "--trainer.max_steps=9"
    state = last(there / "run")
    mine = state["identities"]["model.prior.init_args.pretrained"]
    mine |= {"of a later version": 1, "image_size": 32}
    torch.save(state, there / "run" / "checkpoints" / "last.ckpt")
    message = refused(train_translator.main, args, there / "run")
    assert "model.prior.init_args.pretrained names" in message
    assert "image_size was 32 and is 16" in message


def test_a_run_without_its_config_goes_on_with_a_line(there, data, capsys):
    (there / "run" / "config.yaml").unlink()
    state = last(there / "run")
    del state["identities"], state["batch"]  # as before there were any
    torch.save(state, there / "run" / "checkpoints" / "last.ckpt")
    train_translator.main([*lmc_args(there, data), "--trainer.max_steps=5"])
    said = capsys.readouterr().out
    assert "config.yaml is not there" in said and "going on after step 4" in said
    assert yaml.safe_load((there / "run" / "config.yaml").read_text())["trainer"]["max_steps"] == 5
    assert not list((there / "run").glob("config-*"))


def test_another_effective_batch_is_said(there, data, capsys):
    new = ["--data.batch_size=2", "--trainer.max_steps=5"]
    train_translator.main(moved(there, data, *new, allow=["data"]))
    assert (
        "the effective batch was 4 up to step 4 and is 2 from there on" in capsys.readouterr().out
    )


def test_a_class_may_be_named_by_either_of_its_paths(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text("model: {loss: {class_path: lmc.losses.NFSD}}")
    assert check_changes(file, {"model": {"loss": {"class_path": "lmc.NFSD"}}}) == []
    for other in ("lmc.SDS", "mine.NFSD", "lmcx.NFSD"):
        with pytest.raises(ValueError, match=r"class_path was 'lmc.losses.NFSD' and is"):
            check_changes(file, {"model": {"loss": {"class_path": other}}})


@pytest.mark.parametrize("text", ["{", "- 1", "\0"])
def test_a_broken_config_is_named(tmp_path, text):
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(ValueError, match=r"config\.yaml .*Move it away to go on$"):
        check_changes(tmp_path / "config.yaml", {})


def test_a_broken_checkpoint_is_named(there, data):
    (there / "run" / "checkpoints" / "last.ckpt").write_bytes(b"half")
    message = refused(train_translator.main, moved(there, data), there / "run")
    assert "last.ckpt cannot be read" in message and "step-*.ckpt" in message


def test_the_configuration_kept_reads_as_the_command_did(begun, data):
    """And the parser's own dump of it is the same."""
    config = begun / "run" / "config.yaml"
    message = refused(
        train_translator.main, ["fit", f"--config={config}", "--data.batch_size=3"], begun / "run"
    )
    assert "data.batch_size was 4 and is 3. " in message and ";" not in message


def test_differences_of_nested_dicts():
    there = {"a": {"b": 1, "c": [1]}, "d": None, "e": 0}
    here = {"a": {"b": 2, "c": [1]}, "d": {"x": 1}, "f": 0}
    assert list(differences(there, here)) == [
        ("a.b", 1, 2),
        ("d", None, {"x": 1}),
        ("e", 0, ABSENT),
        ("f", ABSENT, 0),
    ]


def test_keys_cover_what_is_below_them():
    key = "model.loss.init_args.guidance_scale"
    for keys in (["model"], ["x", "model.loss"], ["model.loss.guidance_scale"], [key]):
        assert covers(keys, key)
    for keys in ([], ["mod"], ["model.loss.init_args.guidance"], [f"{key}.x"], ["data"]):
        assert not covers(keys, key)


def test_options_of_another_version_say_nothing(tmp_path):
    """Neither a new option nor one that is gone; both are named."""
    (tmp_path / "config.yaml").write_text("model: {loss: {init_args: {old: 1}}}\nrun: x\n")
    (line,) = check_changes(
        tmp_path / "config.yaml", {"model": {"loss": {"init_args": {"new": 2}}}}
    )
    assert "init_args.new was absent and is 2" in line and "old was 1 and is absent" in line
    assert is_meaning("model.loss.init_args.new") and not is_meaning("run")


def overflow_at(monkeypatch, step: int) -> None:
    """The loss and its gradient stay finite; on the way back through the network it overflows."""
    right = TranslatorTraining.training_step

    def training_step(self, batch, batch_idx):
        loss = right(self, batch, batch_idx)
        if self.global_step == step:
            parameter = next(self.network.parameters())
            handle = parameter.register_hook(lambda g: (handle.remove(), g * float("inf"))[1])
        return loss

    monkeypatch.setattr(TranslatorTraining, "training_step", training_step)


@pytest.mark.parametrize("every", [1, 100])
def test_an_overflow_on_the_way_back_reaches_no_checkpoint(
    tiny_prior_folder, data, tmp_path, monkeypatch, every
):
    overflow_at(monkeypatch, 3)
    args = worlds.translator_args(tiny_prior_folder, data, tmp_path, "SDS", f"--save_every={every}")
    args += ["--trainer.max_steps=6", "--trainer.limit_val_batches=0"]
    with pytest.raises(SystemExit, match=r": step 3: the gradient of the weights .*--allow"):
        train_translator.main(args)
    if every == 1:
        assert last(tmp_path)["global_step"] == 3 and not not_finite(last(tmp_path))
    else:
        assert not (tmp_path / "checkpoints" / "last.ckpt").exists()


def test_gradients_are_looked_at_without_waiting_for_the_device(
    tiny_prior_folder, data, tmp_path, monkeypatch
):
    """A look, which waits, comes every `check_every` steps; what is noted between does not."""
    waits: list[str] = []

    def waiting(right: Callable) -> Callable:
        def spied(self, *args, **kwargs):
            waits.append(right.__name__)
            return right(self, *args, **kwargs)

        return spied

    for name in ("item", "__bool__", "tolist", "__float__", "__int__", "nonzero"):
        monkeypatch.setattr(torch.Tensor, name, waiting(getattr(torch.Tensor, name)))
    right, counts = TrainingModule.on_before_optimizer_step, []

    def hook(self, optimizer):
        before = len(waits)
        right(self, optimizer)
        counts.append((len(waits) - before, len(self._gradients)))

    monkeypatch.setattr(TrainingModule, "on_before_optimizer_step", hook)
    looks = []
    look = TrainingModule.check_finite
    monkeypatch.setattr(
        TrainingModule, "check_finite", lambda self: (looks.append(self.global_step), look(self))[1]
    )
    args = worlds.bias_args(tiny_prior_folder, data, tmp_path, "--trainer.max_steps=120")
    args += ["--trainer.limit_val_batches=0", "--save_every=1000", "--data.batch_size=1"]
    train_bias.main(args)
    assert len(counts) == 120 and {waited for waited, _ in counts} == {0}
    assert max(noted for _, noted in counts) == 50
    assert looks[:2] == [49, 99] and set(looks[2:]) == {120}


def test_float16s_own_overflows_are_left_to_its_scaler(
    tiny_prior_folder, data, tmp_path, monkeypatch
):
    monkeypatch.setattr(TrainingCLI, "_run_subcommand", lambda self, subcommand: None)
    cli = train_bias.main(worlds.bias_args(tiny_prior_folder, data, tmp_path))
    cli.model.trainer = cli.trainer
    for parameter in cli.model.network.parameters():
        parameter.grad = torch.full_like(parameter, float("nan"))
    cli.trainer.precision_plugin.scaler = object()
    cli.model.on_before_optimizer_step(None)
    cli.model.check_finite()
    cli.trainer.precision_plugin.scaler = None
    cli.model.on_before_optimizer_step(None)
    with pytest.raises(NonFiniteGradient):
        cli.model.check_finite()


@pytest.mark.parametrize(
    "name",
    ["state_dict.ema.x", "optimizer_states.0.state.3.exp_avg_sq", "loss.state.lora.y"],
)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_poisoned_checkpoint_is_not_written(tmp_path, name, value):
    good = torch.ones(3)
    checkpoint = {
        "global_step": 7,
        "state_dict": {"ema.x": good.clone(), "network.x": good.clone(), "count": torch.tensor(1)},
        "optimizer_states": [{"state": {3: {"exp_avg_sq": good.clone()}}, "param_groups": [1e-4]}],
        "loss": {"name": "vsd", "state": {"lora": {"y": good.clone()}}},
        "callbacks": {"a user's": {"best": torch.tensor(float("inf"))}},
    }
    path = tmp_path / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint(checkpoint, path)
    before = path.read_bytes()
    part: object = checkpoint
    for key in re.findall(r"ema\.x|\w+", name):
        part = part[int(key) if key.isdecimal() else key]
    part[1] = value
    with pytest.raises(FloatingPointError, match=rf"step 7: {re.escape(name)} .* not finite"):
        AtomicCheckpointIO().save_checkpoint(checkpoint, path)
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1


def test_the_newest_snapshots_are_kept_and_gone_on_from(tiny_prior_folder, data, tmp_path):
    def train(run: str, *more: str) -> Path:
        args = worlds.bias_args(tiny_prior_folder, data, tmp_path / run, "--save_every=2", *more)
        train_bias.main([*args, "--trainer.max_steps=9", "--trainer.limit_val_batches=0"])
        return tmp_path / run

    run = train("run", "--keep=3")
    names = sorted(file.name for file in (run / "checkpoints").iterdir())
    assert names == ["last.ckpt", "step-000006.ckpt", "step-000008.ckpt", "step-000009.ckpt"]
    assert last(run, "step-000006")["global_step"] == 6
    end = last(run)
    shutil.copy(run / "checkpoints" / "step-000006.ckpt", run / "checkpoints" / "last.ckpt")
    train("run", "--keep=1")
    assert_same(last(run)["state_dict"], end["state_dict"])
    assert last(run, "step-000009")["global_step"] == 9
    assert len(list((run / "checkpoints").iterdir())) == 2
    assert_same(last(train("none"))["state_dict"], end["state_dict"])
    assert [file.name for file in (tmp_path / "none" / "checkpoints").iterdir()] == ["last.ckpt"]


@pytest.mark.parametrize("option", ["--save_every=0", "--keep=-1"])
def test_numbers_out_of_range_are_named(tiny_prior_folder, data, tmp_path, option):
    with pytest.raises(SystemExit, match=option[2:].partition("=")[0]):
        train_bias.main([*worlds.bias_args(tiny_prior_folder, data, tmp_path), option])


def test_the_users_logger_stands_beside_tensorboard(tiny_prior_folder, data, tmp_path):
    args = worlds.bias_args(tiny_prior_folder, data, tmp_path / "run")
    args += ["--trainer.logger=CSVLogger", f"--trainer.logger.save_dir={tmp_path}/csv"]
    cli = train_bias.main(args)
    assert [type(each) for each in cli.trainer.loggers] == [TensorBoardLogger, CSVLogger]
    (table,) = (tmp_path / "csv").rglob("metrics.csv")
    assert "train/loss" in table.read_text()
    tags = EventAccumulator(str(tmp_path / "run")).Reload().Tags()
    assert "train/loss" in tags["scalars"] and tags["images"]
    cli.trainer.loggers = cli.trainer.loggers[::-1]
    assert hasattr(tensorboard(cli.model), "add_image"), "wherever it is among them"


def test_no_logger_is_none(tiny_prior_folder, data, tmp_path):
    args = worlds.bias_args(tiny_prior_folder, data, tmp_path, "--trainer.logger=false")
    cli = train_bias.main(args)
    assert cli.trainer.loggers == [] and tensorboard(cli.model) is None
    assert not list(tmp_path.glob("events*")) and list((tmp_path / "validation").iterdir())
    assert (tmp_path / "config.yaml").exists() and last(tmp_path)["global_step"] == 4


def test_malicious_releases_of_lightning_are_excluded():
    """GHSA-w37p-236h-pfx3."""
    text = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    (line,) = re.findall(r'^    "(lightning\b[^"]*)",', text, re.MULTILINE)
    allowed = Requirement(line).specifier
    assert [v for v in ("2.6.1", "2.6.2", "2.6.3", "2.6.4", "2.7") if v not in allowed] == [
        "2.6.2",
        "2.6.3",
    ]


def test_what_is_logged_by_time_is_logged_by_the_step(
    tiny_prior_folder, data, tmp_path, monkeypatch
):
    """Once a step that is to be logged, also after a run that was at its end went on."""
    for slow in ("labelled_grid", "spectra_figure", "drawn", "show"):
        monkeypatch.setattr(lmc.training.bias, slow, lambda *args: None)
    more = ["--trainer.log_every_n_steps=3", "--trainer.accumulate_grad_batches=2"]
    more += ["--data.batch_size=8", "--trainer.limit_val_batches=1"]
    args = worlds.bias_args(tiny_prior_folder, data, tmp_path, *more)
    for steps in (4, 10):
        train_bias.main(
            [*args, f"--trainer.max_steps={steps}", f"--trainer.val_check_interval={2 * steps}"]
        )
    events = EventAccumulator(str(tmp_path)).Reload()
    names = [name for name in events.Tags()["scalars"] if name.startswith("train/loss_by_t/")]
    steps = {name: [event.step for event in events.Scalars(name)] for name in names}
    assert set().union(*steps.values()) == {2, 5, 8}
    assert all(len(each) == len(set(each)) for each in steps.values())
