"""Training processes side by side: a log each, one progress and time left for all."""

import os
import queue
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path

from lmc.progress import NOTE, PROGRESS, Progress, read_record

EVERY = 2.0  # seconds between looks at how far the trainings are
TAIL = 15  # lines of a log that are shown of a training that failed
AGAIN = "======== another session ========\n"  # between those in a log


class TrainingFailed(RuntimeError):
    """A training ended with an error.

    Attributes:
        log: the file with its whole output.
        tail: the last lines of it, of the last session.
    """

    def __init__(self, name: str, log: Path) -> None:
        self.log = log
        text = log.read_text(errors="replace").rpartition(AGAIN)[2]
        self.tail = "".join(text.splitlines(keepends=True)[-TAIL:])
        super().__init__(f"training {name!r} failed, see {log}:\n{self.tail}")


class Stopped(RuntimeError):
    """A training was ended, or not begun, since all are to stop."""


class Trainings:
    """Runs trainings as processes of their own and says how far they are together.

    Args:
        steps: of every training there will be, by name.
        cost: of a step of each, relative to the others', for the estimate of the time left.
        threads: of each process, on the CPU.
        gpus: those there are, as CUDA_VISIBLE_DEVICES names them; trainings side by side get parts
            of them.
    """

    def __init__(
        self,
        steps: Mapping[str, int],
        cost: Mapping[str, float],
        threads: int = 1,
        gpus: Sequence[str] = (),
    ) -> None:
        self.steps, self.cost, self.threads, self.gpus = steps, cost, threads, gpus
        self.slots: queue.SimpleQueue[Sequence[str]] = queue.SimpleQueue()
        self.records: dict[str, Path] = {}
        self.running: dict[str, subprocess.Popen[str]] = {}
        self.ended: set[str] = set()
        self.stopping = False
        self.lock = threading.Lock()

    def run(self, jobs: Sequence[Callable[[], None]], side_by_side: int) -> None:
        """Run jobs, which call `train`, to the end of all, or of the first that raises.

        Where one raises, or the user interrupts or sends SIGTERM, the trainings are told to save
        and leave, and this waits until they have.

        Raises:
            Exception: what the job raised.
        """
        main = threading.current_thread() is threading.main_thread()
        if main:  # what ends by SIGTERM must not leave trainings behind
            before = signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            for part in gpu_parts(self.gpus, side_by_side):
                self.slots.put(part)
            with (
                Progress("trainings ended", 1, "") as progress,
                ThreadPoolExecutor(side_by_side) as pool,
            ):
                futures = [pool.submit(job) for job in jobs]
                try:
                    while not all(future.done() for future in futures):
                        wait(futures, EVERY, FIRST_EXCEPTION)
                        if any(future.done() and future.exception() for future in futures):
                            break
                        share, note = self.progress()
                        progress.update(len(self.ended), note, share, len(self.steps))
                finally:
                    for future in futures:
                        future.cancel()
                    self.stop()
        finally:
            if main:
                signal.signal(signal.SIGTERM, before)
        errors = [future.exception() for future in futures if not future.cancelled()]
        for error in sorted(filter(None, errors), key=lambda error: isinstance(error, Stopped)):
            raise error

    def train(self, name: str, command: Sequence[str], log: Path) -> None:
        """Run one training to its end; its output goes to the end of `log`, its notes here too.

        Raises:
            TrainingFailed: its exit status is not 0.
            Stopped: see there.
        """
        record = log.with_name(f".{log.stem}.progress.json")
        record.unlink(missing_ok=True)  # of another session
        environment = {
            "OMP_NUM_THREADS": str(self.threads),
            "PYTHONUNBUFFERED": "1",
            PROGRESS: str(record.resolve()),
        }
        with self._some_gpus() as gpus, open(log, "a") as file:
            with self.lock:
                if self.stopping:
                    raise Stopped(name)
                if file.tell():
                    file.write(AGAIN)
                process = subprocess.Popen(
                    command,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    text=True,
                    errors="replace",
                    env={**os.environ, **environment, **gpus},
                    # Ctrl-C is not for it: it gets SIGTERM from `stop`, and saves. Where this
                    # process is killed it ends too: its next line finds the pipe broken.
                    start_new_session=True,
                )
                self.running[name], self.records[name] = process, record
            try:
                assert process.stdout is not None
                for line in process.stdout:
                    file.write(line)
                    file.flush()
                    if line.startswith(NOTE):
                        print(f"{name}: {line}", end="", flush=True)
                process.wait()
            finally:
                process.terminate()  # where the log could not be written
                process.wait()
                with self.lock:
                    self.ended.add(name)
                    del self.running[name]
        if self.stopping:
            raise Stopped(name)
        if process.returncode != 0:
            raise TrainingFailed(name, log)

    @contextmanager
    def _some_gpus(self) -> Iterator[dict[str, str]]:
        """The environment that gives a training its part of the GPUs, another's afterwards."""
        try:
            part = self.slots.get_nowait()
        except queue.Empty:  # there are none, or they are not dealt out
            yield {}
            return
        try:
            yield {"CUDA_VISIBLE_DEVICES": ",".join(part)}
        finally:
            self.slots.put(part)

    def stop(self) -> None:
        """Begin no further training, and tell those that run to save and leave."""
        with self.lock:
            self.stopping = True
            for process in self.running.values():
                process.terminate()

    def progress(self) -> tuple[float, str]:
        """The share of all the work that is done, in [0, 1], and where each running training is."""
        with self.lock:
            running, ended = list(self.running), set(self.ended)
        records = {name: read_record(file) for name, file in self.records.items()}
        at = {name: record for name, record in records.items() if record is not None}
        work = done = 0.0
        for name, total in self.steps.items():
            begun, now = (at[name]["first"], at[name]["done"]) if name in at else (0, 0)
            done += self.cost[name] * (now - begun)
            # Of what ended, all there was to do is done.
            work += self.cost[name] * ((now if name in ended else total) - begun)
        note = "  ".join(
            f"{name} {at[name]['done']:g}/{self.steps[name]}" for name in running if name in at
        )
        return done / work if work else 1.0, note


def gpu_parts(gpus: Sequence[str], count: int) -> list[Sequence[str]]:
    """`count` parts of some GPUs, as equal as can be; of fewer GPUs, several parts are one."""
    if not gpus:
        return []
    return [gpus[i::count] or [gpus[i % len(gpus)]] for i in range(count)]


def visible_gpus() -> list[str]:
    """The GPUs of this process, as CUDA_VISIBLE_DEVICES names them."""
    import torch

    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [each for each in named.split(",") if each]
    return [str(i) for i in range(torch.cuda.device_count())]
