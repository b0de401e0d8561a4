"""Files that are written whole or not at all."""

import json
import os
import platform
import re
import secrets
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any


@contextmanager
def whole(file: Path, precious: bool = True) -> Iterator[Path]:
    """A name to write under, in `file`'s folder, which is made; it becomes `file` at the end.

    The name is this writer's alone, so that of two that write the same file at once the later one
    wins, whole. It begins with a dot and ends in '.partial': no wildcard takes it for a shard. It
    is on the disk before it becomes `file`, and is removed if anything goes wrong; one that a
    killed writer left is removed by the next who writes `file` on the same machine.

    Args:
        file: to write.
        precious: false for one of many that are soon made again: it still is whole or not there,
            but nothing waits for the disk, nor looks through the folder for what was left.

    Raises:
        OSError: there is no room or no right to write; `file` is as it was.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    mine = f".{file.name}.{platform.node()}-"
    if precious:
        _remove_left(file.parent, mine)
    partial = file.with_name(f"{mine}{os.getpid()}-{secrets.token_hex(4)}.partial")
    try:
        yield partial
        if file.exists():
            shutil.copymode(file, partial)
        if precious:
            _flush(partial)
        os.replace(partial, file)
    finally:
        partial.unlink(missing_ok=True)
    if precious:
        with suppress(OSError):  # not every file system can do that to a folder
            _flush(file.parent)


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A folder to write into that becomes `folder` at the end; one that is there is replaced.

    For a moment, between two renames, there is neither; killed then, the old one is '.NAME.old'.
    """
    partial, old = (folder.with_name(f".{folder.name}.{what}") for what in ("partial", "old"))
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        shutil.rmtree(old, ignore_errors=True)
        if folder.exists():
            folder.rename(old)
        partial.rename(folder)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _remove_left(folder: Path, mine: str) -> None:
    """Remove what writers on this machine left that are no more; `mine` is how theirs begin."""
    for name in os.listdir(folder):
        found = re.fullmatch(rf"{re.escape(mine)}(\d+)-[0-9a-f]+\.partial", name)
        if found and not _lives(int(found[1])):
            (folder / name).unlink(missing_ok=True)


def _lives(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):  # it is somebody else's, or no number of a process
        return True
    return True


def _flush(path: Path) -> None:
    """Have the system write a file or folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_json(file: Path, keys: Sequence[str] = ()) -> dict[str, Any]:
    """The object in a JSON file.

    Args:
        file: which.
        keys: it must have.

    Raises:
        OSError: it cannot be read.
        ValueError: it holds no object, or lacks a key; names the file.
    """
    try:
        content = json.loads(file.read_bytes())
    except ValueError as error:
        raise ValueError(f"{file} is no JSON: {error}") from error
    missing = [key for key in keys if not isinstance(content, dict) or key not in content]
    if missing or not isinstance(content, dict):
        what = repr(missing[0]) if missing else "keys"
        raise ValueError(f"{file} has no {what}: it is not what was written there")
    return content


def write_text(file: Path, text: str) -> None:
    """Write a text, in UTF-8."""
    with whole(file) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(file: Path, content: Any) -> None:
    """Atomically; a list of numbers or words on one line."""
    text = json.dumps(content, indent=1, ensure_ascii=False)
    text = re.sub(r"\[\n\s+([^\[\]{}]*?)\n\s+\]", lambda x: f"[{_line(x[1])}]", text)
    write_text(file, text + "\n")


def _line(text: str) -> str:
    return re.sub(r",\n\s+", ", ", text)
