"""Several real processes, signals, precision: what a run on a cluster meets."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import ranks
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import lmc.priors
import lmc.training.bias
import lmc.training.translator
import train_bias
import train_translator
from lmc.corrector import Corrector, corrector_loss, normalise
from lmc.evaluate import power_spectrum
from lmc.training.bias import CorrectorTraining
from lmc.training.callbacks import batch_note
from lmc.training.cli import TrainingCLI
from lmc.unet import UNet

import worlds

ROOT = Path(__file__).parents[1]
STEPS = 20


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return worlds.write_world(tmp_path_factory.mktemp("world"))


def last(run: Path) -> dict:
    return torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)


def long_args(prior: Path, data: str, run: Path, *more: str) -> list[str]:
    """Long enough to be stopped half way; held-out batches that two ranks do not share evenly."""
    settings = [f"--trainer.max_steps={STEPS}", f"--trainer.val_check_interval={STEPS}"]
    settings += ["--data.batch_size=5", "--model.ema_decay=0.5", "--save_every=1000"]
    return worlds.bias_args(prior, data, run, *settings, *more)


@pytest.fixture(scope="module")
def two(tiny_prior_folder: Path, data: str, tmp_path_factory: pytest.TempPathFactory):
    """A whole run of two processes: its folder and what each measured."""
    folder = tmp_path_factory.mktemp("two")
    return folder / "run", ranks.run(folder, long_args(tiny_prior_folder, data, folder / "run"))


@pytest.fixture
def cli(tiny_prior_folder, data, tmp_path, monkeypatch) -> TrainingCLI:
    """The same training in this one process: built, not run."""
    monkeypatch.setattr(TrainingCLI, "_run_subcommand", lambda self, subcommand: None)
    return train_bias.main(long_args(tiny_prior_folder, data, tmp_path / "one"))


def test_two_ranks_step_as_one_process_with_both_batches(two, cli, monkeypatch):
    """The mean of both ranks' losses, each with its own images and noise, computed by hand."""
    model, losses = cli.model, []
    model.trainer = cli.trainer
    model.prior.to("cpu")
    model.null = model.prior.embed([""])
    for rank in (0, 1):
        monkeypatch.setattr(CorrectorTraining, "global_rank", property(lambda self, r=rank: r))
        cli.datamodule.trainer = type("Rank", (), {"global_rank": rank, "world_size": 2})()
        batch = next(iter(cli.datamodule._stream(cli.datamodule.train, training=True)))
        x = model.triplets(batch, model.generator())
        losses.append(corrector_loss(model.corrector.correct(x.z, x.t, x.z_hat), x.z_hat).mean())
    assert losses[0] != losses[1]
    parameters = dict(model.network.named_parameters())
    torch.stack(losses).mean().backward()
    for measured in two[1]:
        for name, parameter in parameters.items():
            torch.testing.assert_close(measured["gradients"][0][name], parameter.grad)
    torch.optim.Adam(parameters.values(), lr=1e-4).step()
    for name, parameter in parameters.items():
        # Adam's first step divides by |gradient|: its rounding weighs most where that is small.
        close = {"rtol": 1e-4, "atol": 1e-6}
        torch.testing.assert_close(two[1][0]["weights"][0][name], parameter.data, **close)


def test_ranks_keep_equal_weights_and_averages(two):
    run, (one, other) = two
    assert len(one["weights"]) == STEPS
    for name, value in one["ema"].items():
        assert torch.equal(value, other["ema"][name]), name
    expected: dict[str, torch.Tensor] = {}
    for step, (mine, theirs) in enumerate(zip(one["weights"], other["weights"], strict=True), 1):
        decay = min(0.5, (1 + step) / (10 + step)) if expected else 0.0
        for name, value in mine.items():
            assert torch.equal(value, theirs[name]), (step, name)
            expected[name] = decay * expected.get(name, value) + (1 - decay) * value
    for name, value in expected.items():
        torch.testing.assert_close(one["ema"][name], value)
        assert torch.equal(last(run)["state_dict"][f"ema.module.{name}"], one["ema"][name])


def test_two_ranks_measure_what_one_process_does(two, cli):
    run, measured = two
    cli.model.load_state_dict(last(run)["state_dict"])
    (alone,) = cli.trainer.validate(cli.model, datamodule=cli.datamodule, verbose=False)
    assert alone.keys() == {
        "heldout/loss",
        "heldout/identity_loss",
        "heldout/normalised_identity_loss",
    }
    for name, value in alone.items():
        for rank in measured:
            assert rank["metrics"][name].item() == pytest.approx(value, rel=1e-5), name


def test_the_prior_is_neither_broadcast_nor_wrapped_nor_saved(two):
    run, measured = two
    saved = last(run)["state_dict"]
    assert {name.split(".")[0] for name in saved} == {"network", "ema"}
    size = sum(value.numel() for name, value in saved.items() if name.startswith("network."))
    trained = 2 * size + 1  # the network, its average, and the count of what was averaged
    for rank in measured:
        assert set(rank["wrapped"]) == {("DistributedDataParallel", trained)}
        # Once all of it, then the one buffer every step.
        assert rank["broadcast"][0] == trained and set(rank["broadcast"][1:]) == {1}


def test_progress_is_printed_by_one_rank(two):
    folder = two[0].parent
    logs = [(folder / f"{rank}.log").read_text() for rank in (0, 1)]
    for line in (
        "effective batch 10 = 2 processes x 5 images x 1 accumulated",
        "the paper's effective batch is 128, not 10; the learning rate stays the configured 0.0001",
        f"step {STEPS}/{STEPS}",
    ):
        assert line in logs[0] and line not in logs[1]


def test_the_papers_batch_needs_no_note():
    assert batch_note(128, 128, 1e-4) == ""
    assert "32, not 64" in batch_note(64, 32, 5e-5) and "5e-05" in batch_note(64, 32, 5e-5)


def stop_and_go_on(folder, args, send, environment=None, count=1):
    """Send signals to a slowed run, run it to its end, and return the step and the first log."""
    run = Path(next(arg for arg in args if arg.startswith("--run="))[len("--run=") :])
    slow = {**(environment or {}), "PAUSE": "0.3"}
    started = ranks.start(folder, [*args, "--save_every=1"], ranks=count, environment=slow)
    ranks.wait_for((run / "checkpoints" / "last.ckpt").exists, "a checkpoint")
    send([process.pid for process in started])
    assert ranks.finish(started, folder) == [0] * count
    log = (folder / "0.log").read_text()
    stopped = last(run)["global_step"]
    assert 0 < stopped < STEPS
    return stopped, log


def assert_goes_on(folder, args, stopped, straight, count=1):
    """The same command ends with the weights of a run that was never stopped, bit for bit."""
    resumed = ranks.run(folder / "resumed", args, ranks=count)
    log = (folder / "resumed" / "0.log").read_text()
    assert f"going on after step {stopped}" in log
    for one, other in zip(resumed, straight, strict=True):
        assert len(one["weights"]) == STEPS - stopped
        assert len(other["weights"]) == STEPS
        for name, value in one["weights"][-1].items():
            assert torch.equal(value, other["weights"][-1][name]), name
        for name, value in one["ema"].items():
            assert torch.equal(value, other["ema"][name]), name


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_to_one_rank_stops_both_and_both_go_on(
    two, tiny_prior_folder, data, tmp_path, number
):
    args = long_args(tiny_prior_folder, data, tmp_path / "run")
    stopped, log = stop_and_go_on(tmp_path, args, lambda pids: os.kill(pids[1], number), count=2)
    assert f"{number.name}: saved after step {stopped}; the same command goes on" in log
    assert "saved after" not in (tmp_path / "1.log").read_text()
    if number == signal.SIGTERM:
        assert_goes_on(tmp_path, args, stopped, two[1], count=2)


@pytest.fixture(scope="module")
def one(tiny_prior_folder: Path, data: str, tmp_path_factory: pytest.TempPathFactory):
    """A whole run of one process with two loading processes, which accumulates two batches."""
    folder = tmp_path_factory.mktemp("one")
    return ranks.run(folder, alone(tiny_prior_folder, data, folder / "run"), ranks=1)


def alone(prior: Path, data: str, run: Path) -> list[str]:
    more = ["--data.num_workers=2", "--trainer.accumulate_grad_batches=2"]
    return long_args(prior, data, run, *more)


def test_a_signal_to_the_whole_group_stops_the_run(one, tiny_prior_folder, data, tmp_path):
    """As a scheduler or torchrun sends it: the loading processes get it as well."""
    args = alone(tiny_prior_folder, data, tmp_path / "run")
    stopped, log = stop_and_go_on(
        tmp_path, args, lambda pids: os.killpg(pids[0], signal.SIGTERM), count=1
    )
    assert f"SIGTERM: saved after step {stopped}" in log
    assert_goes_on(tmp_path, args, stopped, one)


def test_slurm_requeues_on_sigusr1(one, tiny_prior_folder, data, tmp_path):
    """Our checkpoint and no other, then scontrol, then the same command."""
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "scontrol").write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/asked\n')
    (tools / "scontrol").chmod(0o755)
    slurm = {
        "PATH": f"{tools}:{os.environ['PATH']}",
        "SLURM_JOB_NAME": "train",
        "SLURM_JOB_ID": "1234",
        "SLURM_NTASKS": "1",
        "SLURM_NTASKS_PER_NODE": "1",
        "SLURM_PROCID": "0",
        "SLURM_LOCALID": "0",
        "SLURM_NODEID": "0",
    }
    args = alone(tiny_prior_folder, data, tmp_path / "run")
    stopped, log = stop_and_go_on(
        tmp_path, args, lambda pids: os.kill(pids[0], signal.SIGUSR1), slurm
    )
    assert (tmp_path / "asked").read_text() == "requeue 1234\n"
    assert "SLURM job 1234 requeued" in log
    assert not list((tmp_path / "run").rglob("hpc_ckpt*"))
    assert_goes_on(tmp_path, args, stopped, one)


def fail_for_real(command: list, folder: Path, fail: str, seconds: float = 60) -> str:
    """Run a command whose rank fails; its output. It must end, with an error, and leave nothing.

    Raises:
        AssertionError: it ended well, or not all of it within `seconds` of the failure.
    """
    folder.mkdir(exist_ok=True)
    variables = {**os.environ, "FAIL": fail, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    with open(folder / "log", "w+") as log:
        process = subprocess.Popen(
            [sys.executable, *command],
            env=variables,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
        output = lambda: (folder / "log").read_text()  # noqa: E731
        try:
            ranks.wait_for(
                lambda: "steps 0 to" in output() or process.poll() is not None, "training", 150
            )
            began = time.monotonic()
            assert process.wait(seconds) != 0
            # Whoever is left of the run has its log open.
            ranks.wait_for(lambda: not writers(folder / "log"), "all ranks to end", seconds)
            print(f"all ended {time.monotonic() - began:.1f} s after the start of training")
        finally:
            print(output())
            for pid in writers(folder / "log"):
                os.kill(pid, signal.SIGKILL)
    return output()


def writers(file: Path) -> list[int]:
    """Other processes that have `file` open."""
    found = []
    for link in Path("/proc").glob("[0-9]*/fd/1"):
        pid = int(link.parts[2])
        try:
            if pid != os.getpid() and os.readlink(link) == str(file):
                found.append(pid)
        except OSError:
            continue
    return found


linux = pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")
slow = pytest.mark.slow


@linux
@pytest.mark.parametrize(
    "fail",
    ["0 raise", "0 kill", pytest.param("1 raise", marks=slow), pytest.param("1 kill", marks=slow)],
)
def test_a_rank_that_dies_ends_the_run(tiny_prior_folder, data, tmp_path, fail):
    """Under Lightning's launcher, the other rank being in a call that never returns."""
    args = long_args(tiny_prior_folder, data, tmp_path / "run", "--trainer.devices=2")
    command = [ROOT / "tests" / "failing_rank.py", *args, "--trainer.strategy=ddp"]
    output = fail_for_real(command, tmp_path, fail)
    if "raise" in fail:
        assert f"rank {fail[0]} of 2 failed: RuntimeError('broken on purpose')" in output
        assert "Traceback" in output


@linux
@slow
@pytest.mark.parametrize("fail", ["0 raise", "0 kill", "1 raise", "1 kill"])
def test_a_rank_that_dies_ends_torchrun(tiny_prior_folder, data, tmp_path, fail):
    args = long_args(tiny_prior_folder, data, tmp_path / "run", "--trainer.devices=2")
    script = [ROOT / "tests" / "failing_rank.py", *args, "--trainer.strategy=ddp"]
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", *script]
    output = fail_for_real(command, tmp_path, fail)
    if "raise" in fail:
        assert f"rank {fail[0]} of 2 failed: RuntimeError('broken on purpose')" in output


def losses_of(prior: Path, data: str, run: Path, seed: int, precision: str) -> torch.Tensor:
    """The loss of every step of a short stage one."""
    args = worlds.bias_args(
        prior,
        data,
        run,
        f"--seed_everything={seed}",
        f"--trainer.precision={precision}",
        "--trainer.max_steps=80",
        "--trainer.limit_val_batches=0",
        "--model.optimizer.lr=0.01",
        "--save_every=1000",
    )
    train_bias.main(args)
    events = EventAccumulator(str(run)).Reload()
    return torch.tensor([event.value for event in events.Scalars("train/loss")])


def test_bf16_mixed_trains_as_float32_does(tiny_prior_folder, data, tmp_path):
    """Same seed: the same images and noise, so that only the precision differs. The difference of
    the curves is held against that of another seed, which nobody would call another result."""
    curves = {
        (seed, precision): losses_of(
            tiny_prior_folder, data, tmp_path / f"{seed}{precision}", seed, precision
        )
        for seed, precision in ((0, "32-true"), (1, "32-true"), (0, "bf16-mixed"))
    }
    exact, other, mixed = curves.values()
    assert len(exact) == 80 and exact[-20:].mean() < 0.8 * exact[:5].mean(), "nothing was learned"
    assert not torch.equal(exact, mixed), "it was not trained in another precision"
    smooth = lambda curve: curve.view(8, 10).mean(1)  # noqa: E731
    spread = (smooth(exact) - smooth(other)).square().mean().sqrt()
    difference = (smooth(exact) - smooth(mixed)).square().mean().sqrt()
    print(f"seeds {spread:.4f}, precision {difference:.5f}")
    assert difference < 0.1 * spread


@pytest.mark.parametrize("script", ["bias", "translator"])
def test_losses_are_computed_in_float32_under_autocast(
    tiny_prior_folder, data, tmp_path, monkeypatch, script
):
    """Eq. 10, L_k, the gradients (with the corrector's share) and the surrogate's z; the trained
    network itself is not."""
    dtypes: dict[str, set] = {}

    def spy(module, name):
        real = getattr(module, name)

        def spied(*args, **kwargs):
            out = real(*args, **kwargs)
            tensors = [x for x in (*args, out) if isinstance(x, torch.Tensor)]
            dtypes.setdefault(name, set()).update(x.dtype for x in tensors if x.is_floating_point())
            return out

        monkeypatch.setattr(module, name, spied)

    def note(self, inputs, output):
        trained = self.training
        dtypes.setdefault("trained" if trained else "frozen", set()).add(output.dtype)

    spy(lmc.training.bias, "corrector_loss")
    spy(lmc.training.translator, "surrogate")
    hook = torch.nn.modules.module.register_module_forward_hook(
        lambda self, *rest: note(self, *rest) if isinstance(self, UNet) else None
    )
    more = ("--trainer.precision=bf16-mixed", "--trainer.max_steps=2", "--model.ema_decay=0")
    try:
        if script == "bias":
            spied = worlds.bias_args(tiny_prior_folder, data, tmp_path, *more)
            spied.append("--trainer.limit_val_batches=0")
            train_bias.main(spied)
            assert dtypes == {"corrector_loss": {torch.float32}, "trained": {torch.bfloat16}}
            return
        prior = lmc.priors.DiffusersPrior(str(tiny_prior_folder))
        Corrector(3, [8, 8], prior=prior.identity).save_pretrained(tmp_path / "corrector")
        spied = worlds.translator_args(tiny_prior_folder, data, tmp_path / "run", "LMC", *more)
        corrector = f"--model.loss.init_args.corrector={tmp_path / 'corrector'}"
        train_translator.main([*spied, corrector, "--trainer.limit_val_batches=0"])
    finally:
        hook.remove()
    assert dtypes == {
        "surrogate": {torch.float32},
        "trained": {torch.bfloat16},
        "frozen": {torch.float32},
    }


def test_normalise_is_float32_of_a_bfloat16_network():
    generator = torch.Generator().manual_seed(0)
    b_hat, z_hat = torch.randn(2, 2, 3, 8, 8, generator=generator).bfloat16()
    z_hat = z_hat.float()
    with torch.autocast("cpu", torch.bfloat16):
        b = normalise(b_hat, z_hat)
        spectrum = power_spectrum(z_hat)
    assert b.dtype == torch.float32
    torch.testing.assert_close(b, normalise(b_hat.double(), z_hat.double()).float())
    torch.testing.assert_close(spectrum, power_spectrum(z_hat))
