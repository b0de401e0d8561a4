"""Both training scripts, run for real on a tiny world: resume, EMA, errors, checkpoints."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import train_bias
import train_translator
from lmc import losses
from lmc.corrector import Corrector
from lmc.load import load_averaged
from lmc.priors import DiffusersPrior
from lmc.training.callbacks import AtomicCheckpointIO
from lmc.training.processes import LeaveOnSignal
from lmc.training.translator import Ramp, l2_to

import worlds
from worlds import release

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return worlds.write_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="session")
def corrector(tmp_path_factory: pytest.TempPathFactory, tiny_prior_folder: Path, data: str) -> Path:
    """A released corrector of the tiny prior."""
    folder = tmp_path_factory.mktemp("bias")
    train_bias.main(worlds.bias_args(tiny_prior_folder, data, folder / "run"))
    release(folder / "run", folder / "release")
    return folder / "release"


def last(run: Path) -> dict:
    return torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)


def assert_same(one: dict, other: dict) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_a_killed_run_goes_on_to_the_same_weights(tiny_prior_folder, data, tmp_path, workers):
    """N + N steps across a SIGKILL equal 2N straight, bit for bit: weights, EMA, Adam."""
    more = ["--trainer.max_steps=30", "--save_every=3", f"--data.num_workers={workers}"]
    args = worlds.bias_args(tiny_prior_folder, data, tmp_path / "killed", *more)
    process = subprocess.Popen(
        [sys.executable, ROOT / "train_bias.py", *args, "--trainer.max_steps=100000"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    checkpoint = tmp_path / "killed" / "checkpoints" / "last.ckpt"
    deadline = time.time() + 120
    while not checkpoint.exists():
        assert process.poll() is None and time.time() < deadline
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    stopped = last(tmp_path / "killed")["global_step"]
    assert 0 < stopped < 30, "the run was too fast to be killed half way"
    train_bias.main(args)
    straight = worlds.bias_args(tiny_prior_folder, data, tmp_path / "straight", *more)
    train_bias.main(straight)
    one, other = last(tmp_path / "killed"), last(tmp_path / "straight")
    assert one["global_step"] == other["global_step"] == 30
    assert_same(one["state_dict"], other["state_dict"])
    adam, other_adam = (x["optimizer_states"][0]["state"] for x in (one, other))
    for i in adam:
        assert_same(adam[i], other_adam[i])
    assert one["ImageData"] == other["ImageData"]


def test_plugins_of_the_user_stay(tiny_prior_folder, data, tmp_path):
    args = worlds.bias_args(tiny_prior_folder, data, tmp_path, "--trainer.max_steps=1")
    slurm = "lightning.pytorch.plugins.environments.SLURMEnvironment"
    more = [f"--trainer.plugins={slurm}", "--trainer.plugins.auto_requeue=false"]
    trainer = train_bias.main([*args, *more]).trainer
    (leave,) = (each for each in trainer.callbacks if isinstance(each, LeaveOnSignal))
    assert type(leave.environment).__name__ == "SLURMEnvironment"
    assert not leave.environment.auto_requeue
    assert type(trainer.strategy.checkpoint_io).__name__ == "AtomicCheckpointIO"


@pytest.mark.parametrize(
    "loss", ["SDS", "Cond", "DDS", "LMC", "LMC fixed", "NFSD", "MSSDS", "PDS", "VSD", "SDI"]
)
def test_every_loss_trains_a_translator(tiny_prior_folder, data, corrector, tmp_path, loss):
    name, _, fixed = loss.partition(" ")
    more = [f"--model.loss.init_args.corrector={corrector}"] if name == "LMC" else []
    more += ["--model.loss.init_args.fixed_noise=true"] if fixed else []
    args = worlds.translator_args(tiny_prior_folder, data, tmp_path, name, *more)
    train_translator.main(args)
    state = last(tmp_path)
    assert state["global_step"] == 4
    # The network and its average, and nothing of the prior or the corrector.
    assert {name.split(".")[0] for name in state["state_dict"]} == {"network", "ema"}
    assert (tmp_path / "config.yaml").exists()
    events = EventAccumulator(str(tmp_path)).Reload()
    scalars = events.Tags()["scalars"]
    assert "train/l2" in scalars and "heldout/spectrum_error" in scalars
    assert any(name.startswith("gradient_") for name in scalars)
    assert events.Tags()["images"]


def seen_by(loss: type, args: list[str], monkeypatch) -> list[losses.LossInputs]:
    """What a loss is given, step by step, while the translator trains with it."""
    right, seen = loss.terms, []

    def terms(self, prior, x):
        seen.append(x)
        return right(self, prior, x)

    monkeypatch.setattr(loss, "terms", terms)
    train_translator.main(args)
    return seen


def test_the_fixed_noise_is_one_over_images_steps_and_the_fresh_one_is_not(
    tiny_prior_folder, data, corrector, tmp_path, monkeypatch
):
    more = [f"--model.loss.init_args.corrector={corrector}"]
    more += ["--model.loss.init_args.fixed_noise=true"]
    args = worlds.translator_args(tiny_prior_folder, data, tmp_path, "LMC", *more)
    seen = seen_by(losses.LMC, args, monkeypatch)
    fixed = torch.cat([x.eps_fixed for x in seen])
    fresh = torch.cat([x.eps for x in seen])
    assert (fixed == fixed[:1]).all() and len(fixed) == 16
    assert fixed.std().item() == pytest.approx(1, abs=0.1)
    assert len(fresh.flatten(1).unique(dim=0)) == 16


def test_the_negative_prompt_is_the_losss(tiny_prior_folder, data, tmp_path, monkeypatch):
    more = ["--model.loss.init_args.negative_prompt=a dog"]
    args = worlds.translator_args(tiny_prior_folder, data, tmp_path, "NFSD", *more)
    (x, *_) = seen_by(losses.NFSD, args, monkeypatch)
    wanted = DiffusersPrior(str(tiny_prior_folder)).embed(["a dog"])
    for name, value in wanted.tensors.items():
        torch.testing.assert_close(x.negative.tensors[name], value.expand(4, *value.shape[1:]))


def test_t_falls_over_the_run_for_sdi_and_for_whom_the_config_says_so(
    tiny_prior_folder, data, tmp_path, monkeypatch
):
    args = worlds.translator_args(tiny_prior_folder, data, tmp_path / "sdi", "SDI")
    seen = seen_by(losses.SDI, args, monkeypatch)
    for step, x in enumerate(seen):
        assert x.t.unique().numel() == 1
        low = min(1 - step / 4, 0.98)
        assert low - 1e-6 <= x.t[0] <= min(low + 1 / 30, 0.98) + 1e-6
    args = worlds.translator_args(tiny_prior_folder, data, tmp_path / "sds", "SDS")
    args += ["--model.time=lmc.schedule.FallingTime", "--model.time.init_args.time_range=[0.3,0.6]"]
    seen = seen_by(losses.SDS, args, monkeypatch)
    torch.testing.assert_close(
        torch.stack([x.t[0] for x in seen]), torch.tensor([0.6, 0.6, 0.5, 0.3])
    )


def test_every_class_gives_each_image_to_all_with_one_noise(
    tiny_prior_folder, data, tmp_path, monkeypatch
):
    args = worlds.translator_args(tiny_prior_folder, data, tmp_path, "SDS")
    args += ["--model.every_class=true", "--trainer.max_steps=1"]
    seen = seen_by(losses.SDS, args, monkeypatch)
    x = seen[0]
    assert len(x.z) == 4 * 2  # a batch of four, two classes
    assert torch.equal(x.t[0::2], x.t[1::2]) and torch.equal(x.eps[0::2], x.eps[1::2])
    assert len(x.t.unique()) == 4
    text = x.target.tensors["encoder_hidden_states"]
    assert torch.equal(text[0], text[2]) and not torch.equal(text[0], text[1])


def test_l2_rescaled_is_l2_over_the_guidance_scale(tiny_prior_folder, data, tmp_path):
    """By 4, which is exact."""

    def weights(name: str, weight: float, *more: str) -> dict:
        args = worlds.translator_args(tiny_prior_folder, data, tmp_path / name, "SDS", *more)
        args += [f"--model.l2_weight={{start: {weight}, end: {weight}}}"]
        train_translator.main([*args, "--model.loss.init_args.guidance_scale=4"])
        return last(tmp_path / name)["state_dict"]

    rescaled = weights("rescaled", 2.0, "--model.l2_rescale=true")
    assert_same(rescaled, weights("quarter", 0.5))
    with pytest.raises(AssertionError):
        assert_same(rescaled, weights("whole", 2.0))


def test_l2_of_a_smaller_size_leaves_what_is_finer():
    """Its gradient: of a checkerboard none, of a cast as at full size, of the mean of four a share
    of a quarter each."""
    source = torch.rand(2, 3, 8, 8, dtype=torch.float64)
    rows = torch.arange(8)
    board = ((rows[:, None] + rows) % 2 * 2.0 - 1).double().expand(2, 3, 8, 8)

    def gradient(shift: torch.Tensor, size: int | None) -> torch.Tensor:
        output = (source + shift).requires_grad_()
        return torch.autograd.grad(l2_to(source, output, size), output)[0]

    assert gradient(board, 4).abs().max() < 1e-15
    cast = torch.full_like(source, 0.3)
    for size in (None, 8, 4, 1):
        torch.testing.assert_close(gradient(cast, size), 2 * cast / cast.numel())
        torch.testing.assert_close(gradient(cast + board, 4), gradient(cast, None))
    noise = torch.randn_like(source)
    blocks = noise.reshape(2, 3, 4, 2, 4, 2).mean((3, 5))
    expected = blocks.repeat_interleave(2, 2).repeat_interleave(2, 3) * 2 / source.numel()
    torch.testing.assert_close(gradient(noise, 4), expected)


def test_the_size_of_l2_is_what_trains(tiny_prior_folder, data, tmp_path):
    def weights(name: str, *more: str) -> dict:
        args = worlds.translator_args(tiny_prior_folder, data, tmp_path / name, "SDS", *more)
        train_translator.main(args)
        return last(tmp_path / name)["state_dict"]

    whole = weights("whole")
    assert_same(weights("own", "--model.l2_size=16"), whole)
    with pytest.raises(AssertionError):
        assert_same(weights("smaller", "--model.l2_size=4"), whole)


def test_stage_one_logs_losses_pictures_and_spectra(tiny_prior_folder, data, tmp_path):
    train_bias.main(worlds.bias_args(tiny_prior_folder, data, tmp_path))
    tags = EventAccumulator(str(tmp_path)).Reload().Tags()
    expected = {"train/loss", "heldout/loss", "heldout/identity_loss"}
    assert expected <= set(tags["scalars"])
    assert any(name.startswith("train/loss_by_t/") for name in tags["scalars"])
    assert {"z, z_hat, b(z, t) by t", "power spectra by t"} <= set(tags["images"])


def test_the_average_is_of_the_weights(tiny_prior_folder, data, tmp_path):
    """Against the recursion, from the weights after each step."""
    args = worlds.bias_args(tiny_prior_folder, data, tmp_path / "0", "--model.ema_decay=0.5")
    expected: dict[str, torch.Tensor] = {}
    for steps in (1, 2, 3, 4):
        run = tmp_path / str(steps)
        train_bias.main([*args, f"--run={run}", f"--trainer.max_steps={steps}"])
        weights = {
            name.removeprefix("network."): value
            for name, value in last(run)["state_dict"].items()
            if name.startswith("network.")
        }
        decay = min(0.5, steps / (9 + steps))
        expected = {
            # The first update of an average copies the weights.
            name: value if steps == 1 else decay * expected[name] + (1 - decay) * value
            for name, value in weights.items()
        }
    averaged = load_averaged(tmp_path / "4")[0].state_dict()
    for name, value in expected.items():
        torch.testing.assert_close(averaged[name], value, atol=1e-7, rtol=1e-6)


def test_ramps_are_half_cosines():
    ramp = Ramp(0.1, 1.0, 20_000)
    assert [ramp(step) for step in (0, 10_000, 20_000, 50_000)] == pytest.approx([0.1, 0.55, 1, 1])
    assert Ramp(1.0, 0.1, 4)(1) == pytest.approx(0.1 + 0.9 * (1 + 2**-0.5) / 2)


def test_learning_rate_falls_by_steps(tiny_prior_folder, data, tmp_path):
    cli = train_bias.main(
        worlds.bias_args(
            tiny_prior_folder,
            data,
            tmp_path,
            *("--model.optimizer.lr=0.01", "--model.optimizer.factor=0.1"),
            "--model.optimizer.every=3",
        )
    )
    assert cli.trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.001)


def fails(capsys: pytest.CaptureFixture, run, args: list[str]) -> str:
    """The message of a command line that must end in an error."""
    with pytest.raises(BaseException) as caught:
        run(args)
    assert not isinstance(caught.value, KeyboardInterrupt)
    return f"{caught.value} {capsys.readouterr().err}"


@pytest.mark.slow
def test_wrong_configurations_are_named(tiny_prior_folder, data, tmp_path, capsys, monkeypatch):
    """Each before any weights are loaded."""

    def from_pretrained(*args, **kwargs):
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(UNet2DConditionModel, "from_pretrained", from_pretrained)

    def message(*more: str, loss: str = "SDS") -> str:
        args = worlds.translator_args(tiny_prior_folder, data, tmp_path, loss, *more)
        return fails(capsys, train_translator.main, args)

    misspelt = message("--model.widhts=[8,8]")
    assert "model.widhts" in misspelt and len(misspelt.splitlines()) < 8, "not under all the keys"
    assert "NFSDX" in message(loss="NFSDX")
    assert "'cat'" in message("--model.classes=[cat,dog]")
    assert "distinct" in message("--model.classes=[dog,dog]")
    assert "has no {}" in message("--model.prompt=a photo")
    assert "time_range" in message("--model.time_range=[0.9,0.1]")
    assert "no/such/prior" in message("--model.prior.init_args.pretrained=no/such/prior/folder")
    assert "max_steps" in message("--trainer.max_steps=-1")
    assert "rescaled" in message("--model.loss.init_args.guidance_scale=0")
    assert "no shards at" in message(f"--data.train={tmp_path}/none-*.tar")
    assert "no/corrector" in message("--model.loss.init_args.corrector=no/corrector", loss="LMC")
    assert "image_size" in message("--data.image_size=32")
    (tmp_path / "file").write_text("")
    assert "run folder" in message(f"--run={tmp_path}/file/run")


def test_the_checkpoint_of_another_network_is_refused(tiny_prior_folder, data, tmp_path, capsys):
    args = worlds.bias_args(tiny_prior_folder, data, tmp_path)
    train_bias.main(args)
    before = (tmp_path / "checkpoints" / "last.ckpt").read_bytes()
    more = ["--model.widths=[16,16]", "--allow_changes", "model.widths"]
    message = fails(capsys, train_bias.main, [*args, *more])
    assert "another network" in message and "(8,) there, (16,) here" in message
    assert (tmp_path / "checkpoints" / "last.ckpt").read_bytes() == before


def test_a_corrector_of_another_prior_is_refused(
    other_prior_folder, data, corrector, tmp_path, capsys
):
    args = worlds.translator_args(
        other_prior_folder,
        data,
        tmp_path,
        "LMC",
        f"--model.loss.init_args.corrector={corrector}",
    )
    message = fails(capsys, train_translator.main, args)
    assert "trained on" in message and str(other_prior_folder) in message


def test_a_nonfinite_gradient_stops_the_run(tiny_prior_folder, data, tmp_path, monkeypatch):
    """Named by step, loss, t and sample; what it may have touched is never saved."""
    right, calls = losses._predict, []

    def predict(*args):
        predictions = right(*args)
        calls.append(1)
        if len(calls) == 4:
            predictions[0][0][1] = float("nan")
        return predictions

    monkeypatch.setattr(losses, "_predict", predict)
    args = worlds.translator_args(tiny_prior_folder, data, tmp_path, "SDS")
    with pytest.raises(SystemExit, match=r"step 3: .*'sds'.* t = 0\.\d+, sample \d{5}"):
        train_translator.main([*args, "--trainer.max_steps=8"])
    state = last(tmp_path)
    assert state["global_step"] == 2
    assert all(torch.isfinite(value).all() for value in state["state_dict"].values())


def test_a_failed_save_leaves_the_last_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / "last.ckpt"
    io = AtomicCheckpointIO()
    io.save_checkpoint({"step": 1}, path)

    def full(checkpoint, file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match=r"last\.ckpt.*No space left.*MB are free.*untouched"):
        io.save_checkpoint({"step": 2}, path)
    assert torch.load(path, weights_only=True) == {"step": 1}
    assert [file.name for file in tmp_path.iterdir()] == ["last.ckpt"]


def lmc_args(folder: Path, data: str, run: Path) -> list[str]:
    """Of a tiny training with LMC-SDS and a corrector of its own."""
    release = run.parent / "corrector"
    torch.manual_seed(0)
    identity = DiffusersPrior(str(folder)).identity
    Corrector(3, [8, 8], prior=identity).save_pretrained(release)
    args = worlds.translator_args(folder, data, run, "LMC")
    return [*args, f"--model.loss.init_args.corrector={release}"]


def test_what_is_compiled_is_chosen(tiny_prior_folder, data, tmp_path, monkeypatch):
    compiled = []
    note = lambda self, mode: compiled.append((type(self).__name__, mode))  # noqa: E731
    monkeypatch.setattr(torch.nn.Module, "compile", note)
    args = lmc_args(tiny_prior_folder, data, tmp_path / "run")
    args += ["--trainer.max_steps=1", "--model.prior.init_args.compile=true"]
    train_translator.main([*args, "--model.compile=reduce-overhead"])
    denoiser = ("UNet2DConditionModel", "default")
    ours = [(name, "reduce-overhead") for name in ("Translator", "Corrector")]
    assert sorted(compiled) == sorted([denoiser, *ours])


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["bias", "translator"])
def test_what_is_compiled_trains_to_the_same_weights(stage, tiny_prior_folder, data, tmp_path):
    """But for rounding; denoiser, trained network and corrector."""
    runs = {}
    for compiled in ("false", "true"):
        run = tmp_path / compiled
        if stage == "bias":
            args = worlds.bias_args(tiny_prior_folder, data, run)
            main = train_bias.main
        else:
            args = lmc_args(tiny_prior_folder, data, run)
            main = train_translator.main
        flags = [f"--model.compile={compiled}", f"--model.prior.init_args.compile={compiled}"]
        main([*args, *flags, "--trainer.limit_val_batches=0", "--model.optimizer.lr=0.001"])
        runs[compiled] = last(run)["state_dict"]
    assert runs["true"].keys() == runs["false"].keys()
    for name, value in runs["false"].items():
        torch.testing.assert_close(runs["true"][name], value, atol=2e-4, rtol=1e-3)
