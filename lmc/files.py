"""Files that are written whole or not at all."""

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


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


def write_json(file: Path, content: Any) -> None:
    """Atomically; a list of numbers or words on one line."""
    text = json.dumps(content, indent=1, ensure_ascii=False)
    text = re.sub(r"\[\n\s+([^\[\]{}]*?)\n\s+\]", lambda x: f"[{_line(x[1])}]", text)
    write_text(file, text + "\n")


def _line(text: str) -> str:
    return re.sub(r",\n\s+", ", ", text)
