"""Where images come from: files in folders, members of a tar, rows of parquet or arrow tables."""

import functools
import json
import tarfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

SUFFIXES = (
    *(".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm", ".jp2"),
)
TABLES = (".parquet", ".arrow")


class Refused(Exception):
    """Bad input, said in one line: what is wrong where, and what would be right."""


class Skip(NamedTuple):
    """An image that is left out, and why."""

    reason: str
    name: str
    detail: str = ""


@dataclass(frozen=True, slots=True)
class Source:
    """An image that can be read.

    Attributes:
        path: its file, or the tar or table that holds it.
        name: of the file, without folders; '' where a table gives none.
        label: its class.
        size: bytes.
        place: () for a file; (offset,) in a tar; (chunk, row) in a table.
    """

    path: str
    name: str
    label: str
    size: int
    place: tuple[int, ...] = ()

    @property
    def where(self) -> str:
        """For people to find it."""
        if len(self.place) == 2:
            return f"{self.path}/{self.place[0]}/{self.place[1]}"  # chunk and row
        return f"{self.path}/{self.name}" if self.place else self.path


def read(source: Source) -> bytes:
    """The encoded image.

    Raises:
        OSError: it cannot be read, or not all of it.
    """
    if len(source.place) == 2:
        chunk, row = source.place
        return image_column(source.path, chunk)[row]["bytes"].as_py()
    with open(source.path, "rb") as file:
        if source.place:
            file.seek(source.place[0])
        data = file.read(source.size)
    if len(data) != source.size:
        raise OSError(f"{len(data)} of {source.size} bytes: cut off")
    return data


def list_files(paths: Iterable[Path], label: str | None) -> tuple[list[Source], list[Skip]]:
    """Image files among `paths`, labelled `label`, or (None) by the folder that each is in.

    Hidden files and folders do not count as found; files that are no images by their suffix are
    skipped.
    """
    sources, skipped = [], []
    for path in sorted(set(paths)):
        if path.name.startswith("."):  # an archive made on a Mac has a ._NAME.jpg by each NAME.jpg
            continue
        if path.suffix.lower() not in SUFFIXES:
            skipped.append(Skip("no image by its suffix", str(path)))
            continue
        try:
            size = path.stat().st_size
        except OSError as error:
            skipped.append(Skip("missing", str(path), error.strerror or ""))
            continue
        label_here = path.resolve().parent.name if label is None else label
        sources.append(Source(str(path.absolute()), path.name, label_here, size))
    return sources, skipped


def files_below(folder: Path) -> list[Path]:
    """All files of a folder and its folders, less what is hidden."""
    return [
        path
        for path in folder.rglob("*")
        if not any(part.startswith(".") for part in path.relative_to(folder).parts)
        and not path.is_dir()
    ]


def list_tar(path: Path, label: str | None) -> tuple[list[Source], list[Skip]]:
    """Image files in an uncompressed tar; see `list_files`.

    Raises:
        Refused: it is compressed, damaged or cut off.
    """
    from lmc.shards.stream import check_shard

    sources, skipped = [], []
    try:
        check_shard(str(path))  # tarfile takes one that is cut off for one that ends
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                inside = Path(member.name)
                if not member.isreg() or inside.name.startswith("."):
                    continue
                if inside.suffix.lower() not in SUFFIXES:
                    skipped.append(Skip("no image by its suffix", f"{path}/{member.name}"))
                    continue
                label_here = inside.parent.name or path.stem if label is None else label
                place = (member.offset_data,)
                sources.append(
                    Source(str(path.absolute()), inside.name, label_here, member.size, place)
                )
    except (tarfile.TarError, ValueError) as error:
        raise Refused(
            f"{path} is no whole, uncompressed tar: fetch it again, or gunzip it first"
        ) from error
    return sources, skipped


def list_tables(paths: Iterable[Path], classes: list[str]) -> tuple[list[Source], list[Skip]]:
    """Rows of hub tables (an image column of {bytes, path}, a label column) of some classes.

    Without a label column all rows are of the one class asked for.

    Raises:
        Refused: pyarrow is missing, a table is damaged or has other columns, or a class is in none
            of them.
    """
    sources: list[Source] = []
    skipped: list[Skip] = []
    found: set[str] = set()
    for path in sorted(set(paths)):
        table = open_table(str(path.absolute()))
        if "label" not in table.columns and len(classes) > 1:
            raise Refused(f"{path} has no column 'label': ask for one class with --classes")
        for chunk in range(table.chunks):
            pictures = table.read(chunk, table.image)
            labels = [classes[0]] * len(pictures)
            if "label" in table.columns:
                labels = [table.class_name(x) for x in table.read(chunk, "label").to_pylist()]
            found.update(labels)
            for row, (picture, label) in enumerate(zip(pictures, labels, strict=True)):
                if label not in classes:
                    continue
                data = picture["bytes"].as_buffer() if picture.is_valid else None
                if data is None:
                    skipped.append(Skip("missing", f"{path}/{chunk}/{row}", "no bytes in the row"))
                    continue
                name = Path((table.has_path and picture["path"].as_py()) or "").name
                place = (chunk, row)
                sources.append(Source(str(path.absolute()), name, label, data.size, place))
    missing = [name for name in classes if name not in found]
    if missing:
        raise Refused(
            f"no rows of class {', '.join(missing)} in {', '.join(map(str, paths))}: "
            f"found {', '.join(sorted(found)) or 'no rows'}"
        )
    return sources, skipped


class Table:
    """A parquet file (a chunk is a row group) or an arrow file (a record batch).

    Attributes:
        columns: their names.
        chunks: how many.
        image: the name of the first column of {bytes, ...}.
        has_path: whether that gives the images' paths as well.

    Raises:
        Refused: pyarrow is missing, or the file is no such table.
    """

    def __init__(self, path: str) -> None:
        try:
            import pyarrow
            import pyarrow.parquet
        except ImportError as error:
            raise Refused(f"{path} needs pyarrow to be read: pip install pyarrow") from error
        self.parquet, self.batches = None, []
        try:
            if path.endswith(".parquet"):
                self.parquet = pyarrow.parquet.ParquetFile(path, memory_map=True)
                schema, self.chunks = self.parquet.schema_arrow, self.parquet.num_row_groups
            else:
                file = pyarrow.memory_map(path)
                try:
                    stored = pyarrow.ipc.open_stream(file).read_all()  # as `datasets` caches
                except pyarrow.ArrowInvalid:
                    stored = pyarrow.ipc.open_file(file).read_all()
                self.batches = stored.to_batches()
                schema, self.chunks = stored.schema, len(self.batches)
        except (pyarrow.ArrowException, OSError) as error:
            first_line = str(error).splitlines()[0]
            raise Refused(f"{path} is no whole table ({first_line}): fetch it again") from error
        self.columns = schema.names
        images = [
            field
            for field in schema
            if pyarrow.types.is_struct(field.type) and field.type.get_field_index("bytes") >= 0
        ]
        if not images:
            raise Refused(
                f"{path} has no column of images, {{bytes, path}} each: found "
                f"{', '.join(self.columns) or 'none'}"
            )
        self.image = images[0].name
        self.has_path = images[0].type.get_field_index("path") >= 0
        hub = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
        label = hub.get("info", {}).get("features", {}).get("label", {})
        self.class_names = label.get("names") or []

    def read(self, chunk: int, column: str) -> Any:
        """A column of a chunk, a pyarrow array."""
        if self.parquet is not None:
            return self.parquet.read_row_group(chunk, columns=[column])[column]
        return self.batches[chunk].column(column)

    def class_name(self, label: Any) -> str:
        """The class that a row's label, a name or a number, stands for."""
        if isinstance(label, int) and label < len(self.class_names):
            return self.class_names[label]
        return str(label)


@functools.lru_cache(maxsize=2)
def open_table(path: str) -> Table:
    """A table, kept open for the next row of it."""
    return Table(path)


@functools.lru_cache(maxsize=2)
def image_column(path: str, chunk: int) -> Any:
    """The images of a chunk, kept for the next row of it."""
    table = open_table(path)
    return table.read(chunk, table.image)
