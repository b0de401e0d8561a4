"""Files that are written whole or not at all."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole(file: Path) -> Iterator[Path]:
    """A name to write under, in `file`'s folder, which is made; it becomes `file` at the end."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f"{file.name}.partial")
    yield partial
    os.replace(partial, file)


def write_text(file: Path, text: str) -> None:
    """Write a text."""
    with whole(file) as partial:
        partial.write_text(text)
