"""How far long work is: a bar on a terminal, a line every few seconds in a log, the time left."""

import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as Bars

SECONDS = 5.0  # between two lines of a log
PROGRESS = "LMC_PROGRESS"  # environment: the file that a process shall write its numbers to
NOTE = "note at step "  # how a line begins that whoever started this process shows at once
T = TypeVar("T")


class Progress:
    """How far one piece of work is, on standard error.

        with Progress("evaluating", 400, "images") as progress:
            progress.update(50)

    Args:
        what: is being done.
        total: how much of it there is; None is not known yet.
        unit: of `total`, as in '400 images'; '' leaves the speed out.
        done: of it before: in an earlier session.
        quiet: say nothing, as all processes but one do.
        recorded: write the numbers, {"first", "done", "total"}, to the file that $LMC_PROGRESS
            names, for whoever started this process; see `read_record`.
    """

    def __init__(
        self,
        what: str,
        total: float | None,
        unit: str = "steps",
        done: float = 0,
        quiet: bool = False,
        recorded: bool = False,
    ) -> None:
        self.what, self.total, self.unit, self.quiet = what, total, unit, quiet
        named = os.environ.get(PROGRESS) if recorded else None
        self.record = Path(named) if named else None
        self.first = self.done = done
        self.note: str | Callable[[], str] = ""
        self.share = 0.0
        self.began = self.said = self.written = time.monotonic()
        self.console = Console(stderr=True, soft_wrap=True, highlight=False)
        self.bars: Bars | None = None
        if self.console.is_terminal and not quiet:
            columns = TextColumn("{task.description}"), BarColumn(24)
            self.bars = Bars(*columns, TextColumn("{task.fields[line]}"), console=self.console)
            self.bars.add_task(what, total=total, completed=int(done), line="")
            self.bars.start()
        self._record()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def seconds(self) -> float:
        """Since the beginning."""
        return time.monotonic() - self.began

    def update(
        self,
        done: float,
        note: str | Callable[[], str] = "",
        share: float | None = None,
        total: float | None = None,
    ) -> None:
        """Note how far it is, and say so where it is time to.

        Args:
            done: so far, in all.
            note: more to be said, such as losses; a function is asked only where it is time to, so
                that nothing waits for a GPU at every step.
            share: of this session's work, in [0, 1], for the time left; None: one unit of it is
                like another.
            total: in place of the one before.
        """
        self.done, self.note = done, note
        self.total = self.total if total is None else total
        whole = (self.total or 0) - self.first
        self.share = (done - self.first) / whole if share is None and whole > 0 else share or 0.0
        now = time.monotonic()
        complete = self.total is not None and done >= self.total
        if self.record is not None and (complete or now - self.written > 1):
            self._record()
        if self.quiet or (
            now - self.said < (SECONDS if self.bars is None else 0.2) and not complete
        ):
            return
        self.said = now
        if self.bars is None:
            self.say(self.line())
        else:
            line = self.line().removeprefix(f"{self.what} ")
            self.bars.update(self.bars.task_ids[0], total=self.total, completed=done, line=line)

    def advance(self, count: float) -> None:
        """`count` more are done."""
        self.update(self.done + count, self.note)

    def line(self) -> str:
        """How far it is, in a line."""
        total = "" if self.total is None else f"/{self.total:g}"
        speed = (self.done - self.first) / max(self.seconds(), 1e-9)
        left = "time left not known yet"
        if self.share > 0:
            seconds = self.seconds() * (1 - self.share) / self.share
            left = f"{timedelta(seconds=max(0, round(seconds)))} left"
        note = self.note if isinstance(self.note, str) else self.note()
        speeds = f"{speed:.1f} {self.unit}/s" if self.unit else ""
        parts = [f"{self.what} {self.done:g}{total}", note, speeds, left]
        return "  ".join(filter(None, parts))

    def say(self, text: str) -> None:
        """A line beside the bar."""
        if not self.quiet:
            self.console.print(text, markup=False)

    def close(self) -> None:
        """The bar, if there is one, stays as it is."""
        if self.bars is not None:
            self.bars.stop()

    def _record(self) -> None:
        if self.record is None:
            return
        self.written = time.monotonic()
        numbers = {"first": self.first, "done": self.done, "total": self.total}
        # Read while it is written, it would be half; not worth waiting for the disk.
        partial = self.record.with_name(f".{self.record.name}.{os.getpid()}.partial")
        try:
            partial.write_text(json.dumps(numbers))
            os.replace(partial, self.record)
        except OSError:  # a full disk is for whoever writes results to say
            partial.unlink(missing_ok=True)


def read_record(file: Path) -> dict[str, Any] | None:
    """The numbers that a process wrote, see `Progress`; None where there are none."""
    try:
        numbers = json.loads(file.read_text())
        return {name: numbers[name] for name in ("first", "done", "total")}
    except (OSError, ValueError, KeyError, TypeError):
        return None


def tracker(what: str) -> Callable[[Iterable[T]], Iterator[T]]:
    """What goes through an iterable and says how far it is."""

    def track(iterable: Iterable[T]) -> Iterator[T]:
        total = len(iterable) if isinstance(iterable, Sized) else None
        with Progress(what, total) as progress:
            for number, each in enumerate(iterable, 1):
                yield each
                progress.update(number)

    return track
