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
from datetime import timedelta
from types import FrameType
from typing import Any

import torch.distributed
from lightning.fabric.plugins.environments import (
    ClusterEnvironment,
    SLURMEnvironment,
    TorchElasticEnvironment,
)
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.trainer.states import TrainerFn

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

    While held-out images are measured, the step is complete already: the measuring is given up
    after the current batch, and the run that goes on does not take it up again.
    All processes leave after the same step, whichever of them got the signal. Under SLURM, SIGUSR1
    also requeues the job, unless its environment plugin says auto_requeue false.

    Args:
        save: saves the checkpoint that the same command goes on from.
        environment: the user's plugin that knows the cluster, if there is one.
    """

    def __init__(
        self, save: Callable[[Trainer], None], environment: ClusterEnvironment | None = None
    ) -> None:
        self.save, self.environment = save, environment
        self.received, self.step, self.accumulating = 0, 0, False
        self.board: Board | None = None
        self.hosts: Any = None  # the processes by way of their hosts; None is the default group

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the signals over from Lightning, which gives them back when it tears down."""
        self.step = trainer.global_step
        self.received = int(trainer.received_sigterm)  # since Lightning took them
        self.board = Board.of_all(trainer)
        if trainer.world_size > 1 and torch.distributed.get_backend() != "gloo":
            self.hosts = torch.distributed.new_group(backend="gloo")
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
        self.accumulating = step == self.step
        if self.accumulating:
            return
        self.step = step
        # After the last step the held-out images are still to come.
        if (received := self._of_any_process(trainer)) and step < trainer.max_steps:
            self._leave(trainer, received)

    def on_validation_batch_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        """Leave, if any process was told to.

        Not before the end of the first batch, in which DDP synchronises buffers.

        Raises:
            SystemExit: see `on_train_batch_end`.
        """
        if not self._may_leave_validation(trainer):
            return
        if self.received and self.board:
            self.board.tell()
        if self.received or (self.board and self.board.is_told()):
            # The other processes join in here, or at their end of the measuring.
            self._leave(trainer, self._of_any_process(trainer))

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave, if any process was told to; before what all of them do together.

        Raises:
            SystemExit: see `on_train_batch_end`.
        """
        if not self._may_leave_validation(trainer):
            return
        if self.board:
            # In a collective, this process would not notice the signal before the others arrive.
            self.board.wait_for_all(lambda: bool(self.received))
        if received := self._of_any_process(trainer):
            self._leave(trainer, received)

    def _may_leave_validation(self, trainer: Trainer) -> bool:
        """Not where gradients are being accumulated, which no checkpoint holds."""
        fitting = trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking
        return fitting and not self.accumulating

    def _leave(self, trainer: Trainer, received: int) -> None:
        self.save(trainer)
        if trainer.is_global_zero:
            name = "SIGUSR1" if received == 1 + SIGNALS.index(signal.SIGUSR1) else "SIGTERM"
            step = trainer.global_step
            rest = "the same command goes on"
            if step >= trainer.max_steps:
                rest = "all steps are done, but the held-out images were not measured to the end"
            print(f"{name}: saved after step {step}; {rest}", flush=True)
            if name == "SIGUSR1" and requeues(trainer, self.environment):
                requeue()
        # While validating, Lightning would end the loading processes of the held-out images alone,
        # and those of the training keep this one from ending.
        trainer.training = True
        raise SystemExit(0)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = max(self.received, 1 + SIGNALS.index(signal.Signals(number)))

    def _of_any_process(self, trainer: Trainer) -> int:
        if trainer.world_size == 1:
            return self.received
        # One number a step, among the hosts: none waits for a device.
        received = torch.tensor(self.received)
        torch.distributed.all_reduce(received, torch.distributed.ReduceOp.MAX, self.hosts)
        return int(received)


class Board:
    """Where the processes of a run leave each other notes, each when it suits it: no collective.

    Args:
        store: shared by all of them.
        processes: how many they are.
    """

    def __init__(self, store: torch.distributed.Store, processes: int) -> None:
        self.store, self.processes, self.rounds = store, processes, 0

    @classmethod
    def of_all(cls, trainer: Trainer) -> "Board | None":
        """One for all processes of a run; None for a single one, or where they cannot share it."""
        if trainer.world_size == 1:
            return None
        strategy: Any = trainer.strategy
        host, store = strategy.cluster_environment.main_address, None
        first, count = trainer.is_global_zero, trainer.world_size
        port, wait = None, timedelta(seconds=60)  # a port of its own, whichever is free

        def connect(port: int) -> Any:
            try:
                return torch.distributed.TCPStore(
                    host, port, count, first, timeout=wait, wait_for_workers=False
                )
            except RuntimeError as error:
                print(f"processes of this run cannot leave notes: {error}", file=sys.stderr)
                return None

        if first and (store := connect(0)):
            port = store.port
        port = strategy.broadcast(port)
        if port and not first:
            store = connect(port)
        # All of them, or none: without it, a signal waits for the end of the measuring.
        have = strategy.reduce_boolean_decision(store is not None)
        return cls(store, count) if store and have else None

    def tell(self) -> None:
        """Note that all are to leave."""
        self.store.set("leave", "1")

    def is_told(self) -> bool:
        """Whether a process has noted that."""
        return self.store.check(["leave"])

    def wait_for_all(self, told: Callable[[], bool], seconds: float = 1800.0) -> None:
        """Until all processes have called this, one is `told` to leave, or the time is over."""
        self.rounds += 1
        arrived, end = f"arrived {self.rounds}", time.monotonic() + seconds
        count = self.store.add(arrived, 1)
        while count < self.processes and not self.is_told() and time.monotonic() < end:
            if told():
                self.tell()
            time.sleep(0.02)
            count = self.store.add(arrived, 0)


def requeues(trainer: Trainer, given: ClusterEnvironment | None) -> bool:
    """Whether SIGUSR1 is to requeue the job: under SLURM, unless its environment says no.

    Args:
        trainer: whose strategy knows the environment, where it starts several processes.
        given: the user's own, which is Lightning's too.
    """
    environment = given or getattr(trainer.strategy, "cluster_environment", None)
    if environment is None and not TorchElasticEnvironment.detect() and SLURMEnvironment.detect():
        environment = SLURMEnvironment()  # as Lightning chooses, which tells nobody
    return isinstance(environment, SLURMEnvironment) and environment.auto_requeue


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
