"""Several processes that end together, and runs that leave cleanly when they are told to.

What Lightning 2.6 does by itself, and why it is not enough:

- Its launcher watches the processes it started, but they do not watch it: where rank 0 dies, the
  others wait in a collective for half an hour, or for ever.
- On SIGTERM it broadcasts from within the signal's handler, wherever the training happens to be,
  and leaves without a checkpoint. On SIGUSR1 under SLURM it saves from within the handler, in the
  middle of a step, to a file of its own, and trains on.
"""

import os
import re
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable
from types import FrameType
from typing import Any

import torch.distributed
from lightning.fabric.plugins.environments import SLURMEnvironment
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from lmc.errors import is_users, message

LAUNCHER = "LMC_LAUNCHER"  # environment: the process id of the launcher of this process
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class EndTogether(Callback):
    """Ends all processes of a run when one of them fails, with its error and status 1."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Say which process this is, for whoever reads the output of all of them."""
        self.name = f"rank {trainer.global_rank} of {trainer.world_size}"

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Print the error (of a bug its traceback), and end this process and those it started.

        At once, not by way of an ordinary exit: that waits for the device, hence for collectives
        that the other processes will never join.
        """
        if trainer.world_size == 1 or not isinstance(exception, Exception):
            return
        what = message(exception)
        if not is_users(exception):
            traceback.print_exception(exception)
            what = repr(exception)
        print(f"{getattr(self, 'name', 'a process')} failed: {what}", file=sys.stderr)
        for logger in trainer.loggers:
            logger.finalize("failed")
        for process in children(trainer):
            process.kill()
        _exit_now()


class LeaveOnSignal(Callback):
    """On SIGTERM or SIGUSR1: save after the current step, then leave with status 0.

    All processes leave after the same step, whichever of them got the signal. Under SLURM, SIGUSR1
    also requeues the job, unless its environment plugin says auto_requeue false.

    Args:
        save: saves the checkpoint that the same command goes on from.
    """

    def __init__(self, save: Callable[[Trainer], None]) -> None:
        self.save, self.received, self.step = save, 0, 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the signals over from Lightning, which gives them back when it tears down."""
        self.step = trainer.global_step
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                signal.signal(number, self._note)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Leave, if any process was told to.

        Raises:
            SystemExit: with status 0, after the checkpoint was written.
        """
        step = trainer.global_step
        if step == self.step:  # gradients are being accumulated
            return
        self.step = step
        received = self._of_any_process(trainer)
        if not received or step >= trainer.max_steps:
            return
        self.save(trainer)
        if trainer.is_global_zero:
            name = "SIGUSR1" if received == 1 + SIGNALS.index(signal.SIGUSR1) else "SIGTERM"
            print(f"{name}: saved after step {step}; the same command goes on", flush=True)
            environment = trainer._accelerator_connector.cluster_environment
            slurm = isinstance(environment, SLURMEnvironment) and environment.auto_requeue
            if name == "SIGUSR1" and slurm:
                requeue()
        raise SystemExit(0)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = max(self.received, 1 + SIGNALS.index(signal.Signals(number)))

    def _of_any_process(self, trainer: Trainer) -> int:
        if trainer.world_size == 1:
            return self.received
        # One number a step. It waits for the device, as a broadcast of Lightning's own does anyway.
        received = torch.tensor(self.received, device=trainer.strategy.root_device)
        torch.distributed.all_reduce(received, torch.distributed.ReduceOp.MAX)
        return int(received)


def requeue() -> None:
    """Ask SLURM to run this job again, as Lightning's own handler does."""
    job = os.environ["SLURM_JOB_ID"]
    if "SLURM_ARRAY_JOB_ID" in os.environ:
        job = f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    if not re.fullmatch(r"[0-9_]+", job):
        raise ValueError(f"{job!r} is no id of a SLURM job")
    try:
        status = subprocess.run(["scontrol", "requeue", job], check=False).returncode
    except FileNotFoundError:
        status = 127
    done = "requeued" if status == 0 else f"could not be requeued: scontrol's status is {status}"
    print(f"SLURM job {job} {done}", flush=True)


def children(trainer: Trainer) -> list[subprocess.Popen]:
    """The processes that Lightning's own launcher started from this one."""
    return getattr(trainer.strategy.launcher, "procs", [])


def announce_launcher(trainer: Trainer) -> None:
    """Let the processes that this one is about to start know it."""
    launcher: Any = trainer.strategy.launcher
    environment = getattr(launcher, "cluster_environment", None)
    if environment is not None and not environment.creates_processes_externally:
        os.environ[LAUNCHER] = str(os.getpid())


def wait_for_children(trainer: Trainer, seconds: float = 60.0) -> None:
    """Let the other processes end before this one, which they would otherwise miss."""
    end = time.monotonic() + seconds
    for process in children(trainer):
        try:
            process.wait(max(0.0, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()


def watch_launcher() -> None:
    """Where this process was started by a launcher (ours or torchrun), end when that is gone."""
    started = LAUNCHER in os.environ and "LOCAL_RANK" in os.environ
    if not started and "TORCHELASTIC_RUN_ID" not in os.environ:
        return
    launcher = int(os.environ[LAUNCHER]) if started else os.getppid()

    def watch() -> None:
        while os.getppid() == launcher:
            time.sleep(1)
        rank = os.environ.get("RANK", os.environ["LOCAL_RANK"])
        print(f"rank {rank}: the process that started this one is gone", file=sys.stderr)
        _exit_now()

    threading.Thread(target=watch, daemon=True, name="watch-launcher").start()


def shield_worker(worker: int) -> None:
    """Keep a loading process alive through the signals that its whole process group gets.

    The training process still needs it for the current step. A second SIGTERM ends it: that is
    how a process ends loading processes that do not finish by themselves.

    Args:
        worker: its number, as DataLoader's worker_init_fn gets it.
    """

    def once(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    signal.signal(signal.SIGTERM, once)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)


def _exit_now() -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)
