"""Files that are whole or not there, whoever else writes them."""

import glob
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from lmc.files import whole, write_json, write_text

WRITES_HALF = """
import sys, time
from pathlib import Path
from lmc.files import whole
with whole(Path(sys.argv[1])) as partial:
    partial.write_text("half")
    print("begun", flush=True)
    time.sleep(60)
"""


def names(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


def test_two_writers_never_share_a_name_and_the_later_one_wins(tmp_path):
    file = tmp_path / "deep" / "a.txt"
    with whole(file) as one:
        one.write_text("one")
        with whole(file) as other:
            assert one != other and one.parent == other.parent == file.parent
            other.write_text("other")
        assert file.read_text() == "other" and one.read_text() == "one"
    assert file.read_text() == "one" and names(file.parent) == ["a.txt"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("there", [False, True])
def test_a_failure_leaves_what_was(tmp_path, error, there):
    file = tmp_path / "a.txt"
    if there:
        file.write_text("before")
    with pytest.raises(error), whole(file) as partial:
        partial.write_text("half")
        raise error
    assert names(tmp_path) == (["a.txt"] if there else [])
    assert not there or file.read_text() == "before"


def test_nothing_written_is_an_error(tmp_path):
    (tmp_path / "a.txt").write_text("before")
    with pytest.raises(FileNotFoundError), whole(tmp_path / "a.txt"):
        pass
    assert (tmp_path / "a.txt").read_text() == "before"


def test_it_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    file, done = tmp_path / "a.txt", []
    fsync, replace = os.fsync, os.replace

    def noted_fsync(descriptor: int) -> None:
        done.append("folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file")
        fsync(descriptor)

    def noted_replace(one: Path, other: Path) -> None:
        done.append("name")
        replace(one, other)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(os, "replace", noted_replace)
    write_text(file, "é")
    assert done == ["file", "name", "folder"] and file.read_bytes() == "é".encode()


def test_permissions_are_those_of_open(tmp_path):
    before = os.umask(0o027)
    try:
        write_text(tmp_path / "a", "")
        with open(tmp_path / "b", "w"):
            pass
        modes = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in "ab"]
        assert modes == [0o640, 0o640]
        (tmp_path / "a").chmod(0o600)
        write_text(tmp_path / "a", "again")
        assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o600
    finally:
        os.umask(before)


def test_a_library_may_write_it(tmp_path):
    with whole(tmp_path / "a.png") as partial:
        Image.new("RGB", (2, 2)).save(partial, "png")
    assert Image.open(tmp_path / "a.png").size == (2, 2)
    write_json(tmp_path / "a.json", {"a": [1, 2]})
    assert (tmp_path / "a.json").read_text() == '{\n "a": [1, 2]\n}\n'


def test_what_a_killed_writer_left_is_no_shard_and_is_removed_by_the_next(tmp_path):
    """But not what one that still lives is writing, nor what belongs to another file."""
    files = [tmp_path / "a-0.tar", tmp_path / "a-0.tar.json"]
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", WRITES_HALF, str(file)], stdout=subprocess.PIPE, text=True
        )
        for file in files
    ]
    try:
        assert [writer.stdout.readline() for writer in writers] == ["begun\n"] * 2
        assert len(names(tmp_path)) == 2
        for pattern in ("*", "*.tar", "a-*", "a-0*"):
            assert glob.glob(f"{tmp_path}/{pattern}") == []
        write_text(files[0], "whole")
        assert len(names(tmp_path)) == 3, "both live"
        for writer in writers:
            writer.send_signal(signal.SIGKILL)
            writer.wait()
        write_text(files[0], "again")
        (left,) = (name for name in names(tmp_path) if name.endswith(".partial"))
        assert left.startswith(".a-0.tar.json.")
        write_text(files[1], "whole")
        assert names(tmp_path) == ["a-0.tar", "a-0.tar.json"]
    finally:
        for writer in writers:
            writer.kill()
            writer.wait()
