"""Progress: lines in a log, a bar on a terminal, numbers for whoever started the process."""

import io
import json
from types import SimpleNamespace

import pytest
from rich.console import Console

import lmc.progress
from lmc.progress import PROGRESS, Progress, read_record, tracker


@pytest.fixture
def clock(monkeypatch) -> list[float]:
    """The time, which stands still unless it is changed."""
    now = [100.0]
    monkeypatch.setattr(lmc.progress, "time", SimpleNamespace(monotonic=lambda: now[0]))
    return now


def test_a_log_has_a_line_every_few_seconds_and_the_last(clock, capsys):
    with Progress("working", 100, "images", done=20) as progress:
        for done in range(21, 101):
            clock[0] += 1
            progress.update(done, "loss 1")
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "working 25/100  loss 1  1.0 images/s  0:01:15 left"
    assert lines[-1] == "working 100/100  loss 1  1.0 images/s  0:00:00 left"
    assert len(lines) == 80 // 5, "one every five seconds"


def test_the_time_left_follows_the_share_of_the_work(clock, capsys):
    with Progress("working", 10) as progress:
        clock[0] += 6
        progress.update(5, share=0.25)
        clock[0] += 6
        progress.update(6, share=0.0)
    first, second = capsys.readouterr().err.splitlines()
    assert first.endswith("0:00:18 left") and second.endswith("not known yet")


def test_a_total_that_is_not_known(clock, capsys):
    with Progress("working", None, "images") as progress:
        clock[0] += 10
        progress.advance(5)
        clock[0] += 10
        progress.update(progress.done + 5, total=40)
    first, second = capsys.readouterr().err.splitlines()
    assert first == "working 5  0.5 images/s  time left not known yet"
    assert second == "working 10/40  0.5 images/s  0:01:00 left"


def test_a_note_is_asked_for_only_where_it_is_said(clock, capsys):
    asked = []

    def note() -> str:
        asked.append(clock[0])
        return "loss 2"

    with Progress("working", 1000) as progress:
        for done in range(60):
            clock[0] += 0.1
            progress.update(done, note)
    assert len(asked) == 1 and "loss 2" in capsys.readouterr().err


def test_quiet_processes_say_nothing(clock, capsys):
    with Progress("working", 10, quiet=True) as progress:
        progress.say("something")
        clock[0] += 100
        progress.update(10)
    assert capsys.readouterr() == ("", "")


def test_a_terminal_has_a_bar(monkeypatch):
    out = io.StringIO()
    terminal = Console(file=out, force_terminal=True, width=100)
    monkeypatch.setattr(lmc.progress, "Console", lambda **_: terminal)
    with Progress("working", 10, "images") as progress:
        progress.update(10, "loss 3")
        progress.say("a line beside it")
    assert "━" in out.getvalue() and "loss 3" in out.getvalue()
    assert "a line beside it" in out.getvalue()


def test_numbers_are_written_for_the_parent(clock, tmp_path, monkeypatch):
    file = tmp_path / "progress.json"
    with Progress("working", 10) as progress:
        progress.update(10)
    assert not file.exists(), "only where it is asked for"
    monkeypatch.setenv(PROGRESS, str(file))
    progress = Progress("working", 10, done=2, quiet=True, recorded=True)
    assert read_record(file) == {"first": 2, "done": 2, "total": 10}
    progress.update(3)
    assert read_record(file)["done"] == 2, "once a second is enough"
    clock[0] += 2
    progress.update(4)
    assert read_record(file)["done"] == 4 and [x.name for x in tmp_path.iterdir()] == [file.name]
    for broken in ("{", "[]", json.dumps({"done": 1})):
        file.write_text(broken)
        assert read_record(file) is None
    assert read_record(tmp_path / "none") is None


def test_a_tracker_goes_through_everything(capsys):
    assert list(tracker("sampling")([1.0, 0.5])) == [1.0, 0.5]
    assert "sampling 2/2" in capsys.readouterr().err
