"""Several real processes, signals, precision: what a run on a cluster meets."""

import functools
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import UNet2DConditionModel
from lightning.fabric.plugins.environments import SLURMEnvironment
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import lmc.priors.weights
import lmc.training.bias
import lmc.training.dry_run
import lmc.training.translator
import train_bias
import train_translator
from lmc.corrector import Corrector, corrector_loss, normalise
from lmc.measure.metrics import power_spectrum
from lmc.training.bias import CorrectorTraining
from lmc.training.callbacks import batch_note
from lmc.training.cli import TrainingCLI
from lmc.training.dry_run import downloads, nbytes, processes
from lmc.training.processes import Board, requeues
from lmc.unet import UNet

import ranks
import worlds

ROOT = Path(__file__).parents[2]
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
    args = long_args(tiny_prior_folder, data, folder / "run", "--model.stability=2")
    return folder / "run", ranks.run(folder, args)


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
        cli.datamodule.trainer = SimpleNamespace(
            global_rank=rank, world_size=2, lightning_module=model, training=True
        )
        batch = next(iter(cli.datamodule.stream(cli.datamodule.train, training=True)))
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
    assert {name for name in alone if "/t" not in name} == {
        "heldout/loss",
        "heldout/identity_loss",
        "heldout/normalised_identity_loss",
        "heldout/excess",
        "heldout/floor",
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
        f"({two[0] / 'stability.png'})",
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


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGUSR1, marks=pytest.mark.slow)]
)
def test_a_signal_to_one_rank_stops_both_and_both_go_on(
    two, tiny_prior_folder, data, tmp_path, number
):
    args = long_args(tiny_prior_folder, data, tmp_path / "run")
    stopped, log = stop_and_go_on(tmp_path, args, lambda pids: os.kill(pids[1], number), count=2)
    assert f"{number.name}: saved after step {stopped}; the same command goes on" in log
    assert "saved after" not in (tmp_path / "1.log").read_text()
    if number == signal.SIGTERM:
        assert_goes_on(tmp_path, args, stopped, two[1], count=2)


def stop_looking(folder, args, look, number=signal.SIGTERM, to=0):
    """Signal one rank of a run at its first look; the log, and how often each rank had looked.

    All leave well within ten seconds, most of which are the batch that is being looked at.
    """
    count = len(look.split(","))
    started = ranks.start(folder, args, ranks=count, environment={"LOOK": look})
    files = [folder / f"{rank}.look" for rank in range(count)]
    # One that looks quickly has begun its third and last batch, and waits for the other by then.
    batches = [3 if seconds == "0" else 1 for seconds in look.split(",")]
    begun = lambda: [len(f.read_text().split()) if f.exists() else 0 for f in files]  # noqa: E731
    ranks.wait_for(lambda: all(n >= b for n, b in zip(begun(), batches, strict=True)), "looks", 150)
    time.sleep(0.5)
    os.kill(started[to].pid, number)
    began = time.monotonic()
    assert ranks.finish(started, folder) == [0] * count
    took = time.monotonic() - began
    looks = begun()
    print(f"left after {took:.1f} s and {looks} looks")
    assert took < 10
    return (folder / "0.log").read_text(), looks


def test_a_signal_while_held_out_images_are_measured(one, tiny_prior_folder, data, tmp_path):
    args = alone(tiny_prior_folder, data, tmp_path / "run")
    args += ["--trainer.val_check_interval=8"]  # batches: after step 4
    log, looks = stop_looking(tmp_path, args, "3")
    assert "SIGTERM: saved after step 4; the same command goes on" in log
    assert looks == [1], "of six batches"
    assert_goes_on(tmp_path, args, 4, one)


@pytest.mark.slow
def test_a_signal_while_gradients_are_accumulated(one, tiny_prior_folder, data, tmp_path):
    """They are in no checkpoint: the look goes on to its end, and the step too."""
    args = alone(tiny_prior_folder, data, tmp_path / "run")
    args += ["--trainer.val_check_interval=7"]
    log, looks = stop_looking(tmp_path, args, "0.5")
    assert "SIGTERM: saved after step 4; the same command goes on" in log
    assert looks == [6]
    assert_goes_on(tmp_path, args, 4, one)


@pytest.mark.parametrize(
    ("look", "to"),
    [("3,3", 1), pytest.param("0,6", 0, marks=pytest.mark.slow)],
    ids=["both look", "one is done"],
)
def test_a_signal_to_one_rank_while_they_measure(two, tiny_prior_folder, data, tmp_path, look, to):
    """The one that is done waits for the other; told to leave, neither waits."""
    args = long_args(tiny_prior_folder, data, tmp_path / "run", "--trainer.val_check_interval=4")
    log, looks = stop_looking(tmp_path, args, look, to=to)
    assert "SIGTERM: saved after step 4; the same command goes on" in log
    assert looks[1] < 3 and looks[0] == (3 if look[0] == "0" else looks[0])
    assert_goes_on(tmp_path, args, 4, two[1], count=2)


def test_a_signal_at_the_last_look(tiny_prior_folder, data, tmp_path, capfd):
    args = long_args(tiny_prior_folder, data, tmp_path / "run", "--trainer.max_steps=2")
    log, looks = stop_looking(tmp_path, args, "3")
    assert "saved after step 2; all steps are done, but the held-out images were not" in log
    assert looks == [1] and last(tmp_path / "run")["global_step"] == 2
    train_bias.main(args)
    assert "all 2 steps are done" in capfd.readouterr().out


def test_notes_of_processes():
    """Each goes on when all have come, or one was told to leave while it waited."""
    store, left = torch.distributed.HashStore(), []
    boards = [Board(store, 2), Board(store, 2)]

    def arrive(number: int, told: bool = False) -> threading.Thread:
        def wait() -> None:
            boards[number].wait_for_all(lambda: told, seconds=60)
            left.append(number)

        thread = threading.Thread(target=wait)
        thread.start()
        return thread

    for _ in range(2):  # validation after validation
        first = arrive(0)
        first.join(0.3)
        assert first.is_alive() and not boards[1].is_told()
        for thread in (arrive(1), first):
            thread.join(30)
        assert sorted(left) == [0, 1]
        left.clear()
    arrive(0, told=True).join(30)
    assert left == [0] and boards[1].is_told()


def test_processes_without_a_shared_store_train_all_the_same(monkeypatch, capsys):
    def fails(*args, **kwargs):
        raise RuntimeError("no way there")

    monkeypatch.setattr(torch.distributed, "TCPStore", fails)
    strategy = SimpleNamespace(
        cluster_environment=SimpleNamespace(main_address="nowhere"),
        broadcast=lambda port: port,
        reduce_boolean_decision=lambda decision: decision,
    )
    trainer = SimpleNamespace(world_size=2, is_global_zero=True, strategy=strategy)
    assert Board.of_all(trainer) is None and "no way there" in capsys.readouterr().err
    trainer.world_size = 1
    assert Board.of_all(trainer) is None


@pytest.mark.parametrize("requeue", [True, False])
def test_who_requeues(monkeypatch, requeue):
    """Lightning tells no one which environment it took for a single process."""
    alone = SimpleNamespace(strategy=SimpleNamespace())
    assert not requeues(alone, None)
    for name, value in {"NTASKS": "1", "JOB_NAME": "train", "JOB_ID": "1"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    assert requeues(alone, None)
    plugin = SLURMEnvironment(auto_requeue=requeue)
    assert requeues(alone, plugin) is requeue
    several = SimpleNamespace(strategy=SimpleNamespace(cluster_environment=plugin))
    assert requeues(several, None) is requeue
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    assert not requeues(alone, None)


def test_two_ranks_train_one_lora(tiny_prior_folder, data, tmp_path):
    """Of VSD: begun alike, moved alike, by images and noise that are each rank's own."""
    args = worlds.translator_args(tiny_prior_folder, data, tmp_path / "run", "VSD")
    args += ["--model.loss.init_args.lora_lr=0.01"]
    states = [rank["loss"]["lora"] for rank in ranks.run(tmp_path, args, script="train_translator")]
    for name, weight in states[0].items():
        assert torch.equal(weight, states[1][name]), name
        assert "lora_B" not in name or weight.any(), "starts at 0"


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
            assert "steps 0 to" in output(), "it ended before it trained"
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
    "fail", ["0 kill", *(pytest.param(f, marks=slow) for f in ("0 raise", "1 raise", "1 kill"))]
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
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    # Without the dashes torchrun takes --run for an abbreviation of its own --run-path.
    output = fail_for_real([*command, "--", *script], tmp_path, fail)
    if "raise" in fail:
        assert f"rank {fail[0]} of 2 failed: RuntimeError('broken on purpose')" in output


@linux
@slow
@pytest.mark.parametrize("launcher", ["lightning", "torchrun"])
def test_launchers_pass_a_signal_on(two, tiny_prior_folder, data, tmp_path, launcher):
    """To the process that was started by hand; all of them save, leave, and can go on."""
    args = long_args(tiny_prior_folder, data, tmp_path / "run", "--trainer.devices=2")
    args += ["--trainer.strategy=ddp", "--save_every=1", "--trainer.max_steps=100000"]
    script = [ROOT / "train_bias.py", *args]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--"]
    checkpoint = tmp_path / "run" / "checkpoints" / "last.ckpt"
    with open(tmp_path / "log", "w+") as log:
        process = subprocess.Popen(
            [sys.executable, *(torchrun if launcher == "torchrun" else []), *script],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=log,
            stderr=log,
        )
        try:
            ranks.wait_for(checkpoint.exists, "a checkpoint", 150)
            process.send_signal(signal.SIGTERM)
            status = process.wait(60)
            ranks.wait_for(lambda: not writers(tmp_path / "log"), "all ranks to end", 60)
        finally:
            print((tmp_path / "log").read_text())
            for pid in writers(tmp_path / "log"):
                os.kill(pid, signal.SIGKILL)
    stopped = last(tmp_path / "run")["global_step"]
    output = (tmp_path / "log").read_text()
    assert output.count(f"SIGTERM: saved after step {stopped}") == 1
    # torchrun has been told to end, which it takes for an error; the ranks left well.
    assert status == 0 or launcher == "torchrun"
    if stopped < STEPS:
        assert_goes_on(tmp_path, [*args, f"--trainer.max_steps={STEPS}"], stopped, two[1], count=2)


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
    assert difference < 0.25 * spread


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


def dry(main, args: list[str], capsys: pytest.CaptureFixture) -> dict[str, str]:
    """What a dry run says, by the first word of each line."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as left:
        main(args)
    assert left.value.code == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.strip()]
    return {line[:13].strip(): line[13:] for line in lines}


@pytest.fixture
def untouched(monkeypatch):
    """No weights may be read, nor their digest taken."""

    def touched(*args, **kwargs):
        raise AssertionError("weights were read")

    monkeypatch.setattr(UNet2DConditionModel, "from_pretrained", touched)
    monkeypatch.setattr(lmc.priors.weights, "weights_digest", touched)
    monkeypatch.setattr(Corrector, "from_pretrained", touched)


@pytest.mark.parametrize("flag", [["--dry_run", "true"], ["--dry_run"]])
def test_a_dry_run_reports_and_leaves(tiny_prior_folder, data, tmp_path, capsys, untouched, flag):
    more = ["--trainer.devices=2", "--trainer.accumulate_grad_batches=3", *flag]
    args = worlds.bias_args(tiny_prior_folder, data, tmp_path / "run", *more)
    said = dry(train_bias.main, args, capsys)
    assert not (tmp_path / "run").exists()
    model = Corrector(3, [8, 8])
    size = sum(p.numel() for p in model.parameters())
    assert said["network"] == f"Corrector, {size:,} parameters"
    unet = tiny_prior_folder / "unet" / "diffusion_pytorch_model.safetensors"
    parameters = sum(value.numel() for value in load_file(unet).values())
    for part in ("tiny", "v_prediction", "image size 16", "3 channels", "float32"):
        assert part in said["prior"]
    assert said["data.train"] == said["data.heldout"] == "2 shards, 24 samples"
    assert said["batch"].startswith("24 = 2 processes")
    assert "the paper's is 128" in said["batch"] and "rescales" in said["batch"]
    assert said["steps"] == "4" and said["evaluations"].startswith("96 of the denoiser")
    assert f"{nbytes(24 * size)} for the network" in said["memory"]
    assert f"{nbytes(4 * parameters)} for the prior in float32" in said["memory"]
    assert said["disk"].startswith(nbytes(16 * size))
    assert said["download"] == "nothing, the prior is a local folder"
    assert said["run"].endswith("new")


def test_a_dry_runs_sizes_are_those_of_a_run(two, tiny_prior_folder, data, capsys):
    run, _ = two
    said = dry(train_bias.main, [*long_args(tiny_prior_folder, data, run), "--dry_run"], capsys)
    size = sum(p.numel() for n, p in last(run)["state_dict"].items() if n.startswith("network."))
    assert f"{size:,} parameters" in said["network"]
    written = (run / "checkpoints" / "last.ckpt").stat().st_size
    assert 16 * size < written < 16 * size + 50_000  # names, settings, positions
    assert "would go on" in said["run"]


@pytest.mark.parametrize(
    "loss",
    [
        *("SDS", "Cond", "DDS", "LMC", "LMC fixed", "PDS", "MSSDS"),
        *("SDS at 1", "DDS at 1", "PDS at 1", "MSSDS at 1"),
    ],
)
@pytest.mark.parametrize("every_class", ["true", "false"])
def test_a_dry_run_counts_the_evaluations(
    tiny_prior_folder, data, tmp_path, capsys, monkeypatch, loss, every_class
):
    """Against the images that a training shows the prior."""
    name, _, scale = loss.removesuffix(" fixed").partition(" at ")
    args = worlds.translator_args(tiny_prior_folder, data, tmp_path / "run", name)
    args += [f"--model.every_class={every_class}", "--trainer.limit_val_batches=0"]
    args += [f"--model.loss.init_args.guidance_scale={scale}"] if scale else []
    args += ["--trainer.max_steps=1"]
    if name == "LMC":
        prior = lmc.priors.DiffusersPrior(str(tiny_prior_folder))
        Corrector(3, [8, 8], prior=prior.identity).save_pretrained(tmp_path / "corrector")
        args += [f"--model.loss.init_args.corrector={tmp_path / 'corrector'}"]
        args += [f"--model.loss.init_args.fixed_noise={'fixed' in loss}"]
    said = dry(train_translator.main, [*args, "--dry_run"], capsys)
    counted, right = [], lmc.priors.DiffusersPrior.predict

    @functools.wraps(right)
    def predict(self, z_t, *rest):
        counted.append(len(z_t))
        return right(self, z_t, *rest)

    monkeypatch.setattr(lmc.priors.DiffusersPrior, "predict", predict)
    train_translator.main(args)
    assert said["evaluations"].split()[0] == f"{sum(counted):,}"


@pytest.mark.parametrize("script", ["bias", "translator"])
def test_a_dry_run_of_the_papers_config_without_any_files(
    script, tmp_path, capsys, monkeypatch, untouched
):
    """No prior, no data, no corrector, no network: said, each of them."""
    offline = FileNotFoundError("the hub cannot be reached")

    def fails(*args, **kwargs):
        raise offline

    monkeypatch.setattr(lmc.priors.weights, "snapshot_download", fails)
    monkeypatch.setattr(lmc.training.dry_run.HfApi, "model_info", fails)
    monkeypatch.chdir(tmp_path)
    config = f"{ROOT}/configs/{script}/paper.yaml"
    main = {"bias": train_bias.main, "translator": train_translator.main}[script]
    said = dry(main, ["fit", f"--config={config}", "--dry_run=true"], capsys)
    assert {"bias": "7,849,603", "translator": "7,850,115"}[script] in said["network"]
    assert "the hub cannot be reached" in said["prior"]
    assert said["download"].startswith("cannot be known")
    assert "no shards at" in said["data.train"] and "no shards at" in said["data.heldout"]
    evaluations = {"bias": "96,000,000", "translator": "12,800,000"}[script]
    assert said["evaluations"].startswith(evaluations)
    assert "three channels" in said["network"] or script == "translator"
    assert not list(tmp_path.iterdir())


def test_a_dry_run_lists_what_is_not_in_the_cache(monkeypatch):
    files = {"model_index.json": 1, "unet/a.safetensors": 3_000_000_000, "unet/config.json": 5}
    files |= {"text_encoder_2/b.safetensors": 2_000_000, "safety_checker/c.bin": 7, "card.png": 9}
    about = SimpleNamespace(
        siblings=[SimpleNamespace(rfilename=n, size=size) for n, size in files.items()]
    )
    monkeypatch.setattr(lmc.training.dry_run.HfApi, "model_info", lambda *a, **k: about)
    here = {"model_index.json", "unet/config.json"}
    monkeypatch.setattr(
        lmc.training.dry_run,
        "try_to_load_from_cache",
        lambda repo, name, revision: f"/cache/{name}" if name in here else None,
    )
    prior = {"class_path": "x", "init_args": {"pretrained": "some/prior"}}
    assert downloads(prior) == (
        "at most 2 files of some/prior, 3.0 GB: "
        "unet/a.safetensors 3.0 GB, text_encoder_2/b.safetensors 2.0 MB"
    )
    here |= files.keys()
    assert downloads(prior).startswith("nothing, all 4 files")


@pytest.mark.parametrize(
    ("devices", "nodes", "count"), [(8, 2, 16), ("auto", 1, 1), ("0,1", 1, 2), ([0, 1, 2], 1, 3)]
)
def test_processes_are_counted_from_the_configuration(devices, nodes, count):
    assert processes({"devices": devices, "num_nodes": nodes, "accelerator": "cpu"})[0] == count


def test_numbers_of_bytes():
    assert [nbytes(n) for n in (0, 999, 1000, 31_400_000, 5 * 10**15)] == [
        "0 bytes",
        "999 bytes",
        "1.0 kB",
        "31.4 MB",
        "5000.0 TB",
    ]
