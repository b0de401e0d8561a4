"""Training processes side by side: a log each, one line of progress and time left for all."""

import os
import re
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path

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
        say: where a line of progress goes.
        every: seconds between lines.
    """

    def __init__(
        self,
        steps: Mapping[str, int],
        cost: Mapping[str, float],
        threads: int = 1,
        say: Callable[[str], None] = lambda line: print(line, flush=True),
        every: float = 10.0,
    ) -> None:
        self.steps, self.cost, self.threads = steps, cost, threads
        self.say, self.every = say, every
        self.start = time.monotonic()
        self.first: dict[str, int] = {}  # the step each began at, and the one it is at
        self.at: dict[str, int] = {}
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
            with ThreadPoolExecutor(side_by_side) as pool:
                futures = [pool.submit(job) for job in jobs]
                try:
                    while not all(future.done() for future in futures):
                        wait(futures, self.every, FIRST_EXCEPTION)
                        if any(future.done() and future.exception() for future in futures):
                            break
                        if line := self.progress():
                            self.say(line)
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
        """Run one training to its end; its output goes to the end of `log`.

        Raises:
            TrainingFailed: its exit status is not 0.
            Stopped: see there.
        """
        environment = {"OMP_NUM_THREADS": str(self.threads), "PYTHONUNBUFFERED": "1"}
        with open(log, "a") as file:
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
                    env={**os.environ, **environment},
                    # Ctrl-C is not for it: it gets SIGTERM from `stop`, and saves. Where this
                    # process is killed it ends too: its next line finds the pipe broken.
                    start_new_session=True,
                )
                self.running[name] = process
            try:
                assert process.stdout is not None
                for line in process.stdout:
                    file.write(line)
                    file.flush()
                    if match := re.search(r"steps? (\d+)(?:/| to )\d+", line):
                        with self.lock:
                            self.at[name] = int(match[1])
                            self.first.setdefault(name, int(match[1]))
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

    def stop(self) -> None:
        """Begin no further training, and tell those that run to save and leave."""
        with self.lock:
            self.stopping = True
            for process in self.running.values():
                process.terminate()

    def progress(self) -> str:
        """One line: where each running training is, and the time left for all; '' at the start."""
        with self.lock:
            at, first, ended = dict(self.at), dict(self.first), set(self.ended)
            running = [name for name in self.running if name in at]
        work = done = 0.0
        for name, total in self.steps.items():
            begun = first.get(name, 0)
            so_far = at.get(name, begun) - begun
            done += self.cost[name] * so_far
            work += self.cost[name] * (so_far if name in ended else total - begun)
        if not done:
            return ""
        left = (time.monotonic() - self.start) * (work - done) / done
        parts = [f"{name} {at[name]}/{self.steps[name]}" for name in running]
        parts.append(f"{len(ended)} of {len(self.steps)} trainings ended")
        return "  ".join([*parts, f"about {left / 60:.1f} min of training left"])
