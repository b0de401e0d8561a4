"""Shards to batches and back: resume, held-out passes, broken files, decoding, resizing."""

import hashlib
import io
import itertools
import json
import random
import signal
import struct
import tarfile
import time
import zlib
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as tv
from PIL import Image, PngImagePlugin
from torch.utils.data import DataLoader

from lmc.shards import images, stream
from lmc.shards.images import (
    ImageBatch,
    ImageStream,
    decode_image,
    heldout_names,
    middle_square,
    resize,
    to_uint8,
    write_shard,
)
from lmc.shards.stream import ROUND, ahead, expand_shards, local_shards
from lmc.training.data import ImageData

import worlds

SIZE = 4
LABEL = json.dumps({"label": "cat"}).encode()


def write_tar(path: Path, files: dict[str, bytes]) -> Path:
    """A tar by the standard library, not by the code under test."""
    with tarfile.open(path, "w") as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def picture(value: float = 0.0, size: int = SIZE) -> bytes:
    return worlds.png(torch.full((3, size, size), value))


def write_shards(folder: Path, shards: int, each: int, split: str = "train") -> str:
    """Shards of pictures whose keys say shard and place; their pattern."""
    for shard in range(shards):
        files: dict[str, bytes] = {}
        for i in range(each):
            files |= {f"{shard:02d}-{i:02d}.png": picture(), f"{shard:02d}-{i:02d}.json": LABEL}
        write_tar(folder / f"{split}-{shard:05d}.tar", files)
    return f"{folder}/{split}-*.tar"


def keys_of(shards: int, each: int) -> list[str]:
    return [f"{shard:02d}-{i:02d}" for shard in range(shards) for i in range(each)]


SHARDS, EACH = ROUND + 3, 3  # a pass is two rounds, of unequal length


@pytest.fixture(scope="module")
def train(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_shards(tmp_path_factory.mktemp("shards"), SHARDS, EACH)


# Of damaged images Pillow has raised each of these; a MemoryError is of sizes it believed.
RAISED = [
    *(struct.error("unpack"), IndexError("out of range"), zlib.error("incorrect"), KeyError(3)),
    *(SyntaxError("not a TIFF"), TypeError("no int"), OverflowError("too large"), MemoryError()),
    *(Image.DecompressionBombError("large"), RecursionError(), EOFError(), AttributeError("x")),
    *(ZeroDivisionError(), AssertionError(), NotImplementedError(), RuntimeError("decoder")),
]


def training_batches(
    shards: str, workers: int, count: int, start: list[ImageBatch] | None = None, **options: int
) -> list[ImageBatch]:
    """`count` batches of a training stream, going on after the batches `start`."""
    stream = ImageStream(shards, SIZE, 4, training=True, shuffle=5, **options)
    if start:
        positions = {worker: (turn, read) for worker, turn, read in (b.position for b in start)}
        stream.resume(len(start), positions)
    return list(itertools.islice(DataLoader(stream, batch_size=None, num_workers=workers), count))


def keys(batches: list[ImageBatch]) -> list[list[str]]:
    return [batch.key for batch in batches]


# ---------------------------------------------------------------------------------------------
# Training


@pytest.mark.parametrize(("workers", "stops"), [(0, range(1, 40)), (3, (1, 2, 3, 7, 16, 28))])
def test_a_resumed_stream_goes_on_as_the_straight_one(train, workers, stops):
    """Through several passes, from any batch; three workers take turns."""
    straight = training_batches(train, workers, 50)
    assert {batch.position[0] for batch in straight} == set(range(max(workers, 1)))
    assert max(batch.position[1] for batch in straight) >= 3, "more than one pass is wanted"
    for stop in stops:
        resumed = training_batches(train, workers, 10, straight[:stop])
        assert keys(resumed) == keys(straight[stop : stop + 10]), stop
        assert [b.position for b in resumed] == [b.position for b in straight[stop : stop + 10]]


def test_a_stream_can_be_resumed_twice(train):
    straight = training_batches(train, 3, 30)
    read = straight[:5]
    read = read + training_batches(train, 3, 8, read)
    assert keys(training_batches(train, 3, 10, read)) == keys(straight[13:23])


def test_ranks_seeds_and_workers_see_other_orders(train):
    orders = [
        sum(keys(training_batches(train, 0, 8, **options)), [])
        for options in ({}, {"rank": 1, "world_size": 2}, {"seed": 1})
    ]
    by_worker: dict[int, list[str]] = {0: [], 1: []}
    for batch in training_batches(train, 2, 16):
        by_worker[batch.position[0]] += batch.key
    orders.append(by_worker[1])
    assert len({tuple(order) for order in orders}) == len(orders)
    again = sum(keys(training_batches(train, 0, 8)), [])
    assert again == orders[0], "the same seed is the same order"


def test_samples_are_shuffled_across_shards(train):
    """No shard is read out in one go, and two passes differ."""
    order = sum(keys(training_batches(train, 0, 33)), [])
    first, second = order[: SHARDS * EACH], order[SHARDS * EACH : 2 * SHARDS * EACH]
    assert sorted(first) == sorted(second) == keys_of(SHARDS, EACH)
    assert first != second
    runs = sum(one[:2] == other[:2] for one, other in itertools.pairwise(first))
    assert runs < SHARDS * (EACH - 1), "neighbours in a shard stayed neighbours"


@pytest.mark.parametrize("workers", [0, 3])
def test_training_sees_every_sample_equally_often(train, workers):
    """Every worker goes through all shards: counts differ by a begun pass of each at most."""
    counts = Counter(sum(keys(training_batches(train, workers, 200)), []))
    assert sorted(counts) == keys_of(SHARDS, EACH)
    assert max(counts.values()) - min(counts.values()) <= max(workers, 1)


def test_the_order_of_training_is_the_one_it_always_was(tmp_path):
    """Written down: what runs have trained on, and a resumed run goes on with, follows from it.

    The shuffle is webdataset's: if this fails, it has changed there (or our use of it has).
    """
    shards = write_shards(tmp_path, 3, 4)
    one = sum(keys(training_batches(shards, 0, 4)), [])
    assert one == [
        *("00-00", "00-02", "01-02", "01-03", "01-00", "02-00", "02-01", "02-03"),
        *("00-01", "00-03", "02-02", "01-01", "01-03", "00-00", "00-02", "01-01"),
    ]
    assert keys(training_batches(shards, 2, 4, seed=7, rank=1, world_size=2)) == [
        ["00-00", "00-02", "00-03", "01-02"],
        ["02-01", "00-00", "02-00", "02-03"],
        ["00-01", "01-00", "01-03", "01-01"],
        ["00-01", "02-02", "01-02", "01-03"],
    ]


def test_small_shards_are_taken_apart_once_and_in_the_same_order(tmp_path, monkeypatch):
    pattern = write_shards(tmp_path, 3, 4)
    opened = []

    def counted(file: str, *args: Any) -> Any:
        opened.append(file)
        return open(file, *args)

    def ten_passes() -> list[list[str]]:
        opened.clear()
        return keys(training_batches(pattern, 0, 30))

    monkeypatch.setattr(stream, "open", counted, raising=False)
    kept = ten_passes()
    assert len(opened) == 3 + 3  # checked, and read
    monkeypatch.setattr(stream, "KEPT", 2 * Path(expand_shards(pattern)[0]).stat().st_size)
    assert ten_passes() == kept
    assert len(opened) == 3 + 2 + 10  # room for two of them
    monkeypatch.setattr(stream, "KEPT", 0)
    assert ten_passes() == kept
    assert len(opened) == 3 + 30


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("batch_size", x) for x in (0, -1)),
        *(("shuffle", x) for x in (0, -5)),
        *(("image_size", x) for x in (0, -64)),
        ("limit", 0),
        ("rank", -1),
        ("rank", 2),
        ("world_size", 0),
        ("world_size", -2),
    ],
)
def test_numbers_out_of_range_are_named_before_anything_is_read(name, value):
    given = {"image_size": SIZE, "batch_size": 4, "rank": 0, "world_size": 2} | {name: value}
    with pytest.raises(ValueError, match=name):
        ImageStream("nowhere.tar", training=True, **given)


# ---------------------------------------------------------------------------------------------
# Held-out


@pytest.mark.parametrize(("shards", "each"), [(1, 5), (1, 22), (3, 4)])
@pytest.mark.parametrize("workers", [0, 1, 2, 4])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_each_heldout_image_is_read_exactly_once(tmp_path, shards, each, workers, world_size):
    """Also by more processes and workers than there are images or shards."""
    write_shards(tmp_path, 1, 2)
    write_shards(tmp_path, shards, each, "heldout")
    read: list[str] = []
    for rank in range(world_size):
        stream = ImageStream(
            f"{tmp_path}/heldout-*.tar", SIZE, 3, False, rank=rank, world_size=world_size
        )
        for batch in DataLoader(stream, batch_size=None, num_workers=workers):
            assert 1 <= len(batch.key) == len(batch.image) == len(batch.label) <= 3
            read += batch.key
    assert sorted(read) == keys_of(shards, each)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_batch_is_its_pictures_stacked(tmp_path, workers):
    """However they travel: in a worker they are stacked in shared memory, as they lie."""
    generator = torch.Generator().manual_seed(0)
    files = [worlds.png(torch.rand(3, 8, 8, generator=generator) * 2 - 1) for _ in range(3)]
    samples = [(str(i), data, "png", {"label": "cat"}) for i, data in enumerate(files)]
    write_shard(tmp_path / "a.tar", samples)
    stream = ImageStream(f"{tmp_path}/a.tar", 8, 3, training=False)
    (batch,) = DataLoader(stream, batch_size=None, num_workers=workers)
    assert torch.equal(batch.image, torch.stack([decode_image(data) for data in files]))
    assert batch.pixels.dtype == torch.uint8 and batch.pixels.is_shared() == (workers > 0)
    assert batch.image.is_contiguous(), "so that sums over it are in the order they always were"


# ---------------------------------------------------------------------------------------------
# Remote shards, through a command


def piped(folder: Path, split: str = "train") -> str:
    return f"pipe:cat {folder}/{split}-{{00000..00002}}.tar"


def test_shards_through_a_command_are_read_like_files(tmp_path):
    """Held-out and training, through the data module and its real workers."""
    write_shards(tmp_path, 3, 4)
    pattern = write_shards(tmp_path, 3, 4, "heldout")
    data = ImageData(piped(tmp_path), piped(tmp_path, "heldout"), 3, SIZE, num_workers=2)
    data.setup("fit")
    read = keys(list(data.val_dataloader()))
    assert sorted(sum(read, [])) == keys_of(3, 4)
    stream = ImageStream(pattern, SIZE, 3, training=False)
    assert read == keys(list(DataLoader(stream, batch_size=None, num_workers=2)))
    trained = keys(list(itertools.islice(data.train_dataloader(), 16)))
    assert sorted({*sum(trained, [])}) == keys_of(3, 4)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("command", ["false", "cat {}/none.tar", "head -c 2000 {}/train-00000.tar"])
def test_a_command_that_fails_or_is_cut_off_ends_the_stream_with_an_error(
    tmp_path, command, training
):
    """In silence, evaluation would be of fewer images, and training of fewer shards."""
    write_shards(tmp_path, 2, 4)
    urls = [f"{tmp_path}/train-00001.tar", f"pipe:{command.format(tmp_path)}"]
    stream = ImageStream(urls, SIZE, 3, training)
    with pytest.raises((OSError, ValueError, tarfile.ReadError), match=r"pipe:|end of data"):
        list(itertools.islice(stream, 30))


@pytest.fixture
def trap(tmp_path, monkeypatch) -> Path:
    """A file that a command in the name of a shard would make; beside a real shard, a.tar."""
    monkeypatch.chdir(tmp_path)
    write_tar(tmp_path / "a.tar", {"k.png": picture(), "k.json": LABEL})
    return tmp_path / "made"


@pytest.mark.parametrize(
    "url",
    [
        "pipe:touch made; cat a.tar",
        "a.tar::pipe:touch made; cat a.tar",
        "{a.tar,pipe:touch made}",
        "pip{e:touch made,}",
        " pipe:touch made",
        "\tpi\npe:touch made",
        "PIPE:touch made",
        "-",
        "http://somewhere/a.tar",
        "http:somewhere/a.tar",
        "hf://datasets/a/b/a.tar",
        "file:///a.tar",
        "s3:a.tar",
    ],
)
def test_a_url_or_command_that_a_file_names_is_refused(trap, url):
    for shards in (url, ["a.tar", url]):
        with pytest.raises(
            ValueError, match=r"results\.json: heldout\.shards names .*--shards"
        ) as e:
            local_shards(shards, "results.json: heldout.shards")
        assert any(word in str(e.value) for word in ("touch made", "a.tar", "'-'"))
    assert not trap.exists()


@pytest.mark.parametrize("value", [None, 3, {"a": 1}, ["a.tar", None], [["a.tar"]]])
def test_what_is_no_path_of_shards_is_refused(trap, value):
    with pytest.raises(ValueError, match="KEY is no path of shards"):
        local_shards(value, "KEY")


def test_paths_that_a_file_names_are_read_as_the_users_are(trap):
    write_shards(trap.parent, 3, 2)
    for pattern in ("train-*.tar", "train-{00000..00002}.tar", f"{trap.parent}/train-*.tar"):
        assert local_shards(pattern, "KEY") == expand_shards(pattern)
        assert len(local_shards([pattern], "KEY")) == 3
    with pytest.raises(FileNotFoundError, match="no shards at none"):
        local_shards("none-*.tar", "KEY")
    with pytest.raises(ValueError, match="WDS_HOME"):
        local_shards("${HOME}/a.tar", "KEY")
    assert len(expand_shards("pipe:touch made")) == 1, "what the user types is taken"
    assert not trap.exists(), "but not run before it is read"


@pytest.mark.parametrize(
    "name",
    ["pipe:touch made", "b.tar::pipe:touch made", "{b,pipe:touch made}.tar", "-", "b[1].tar"],
)
def test_a_file_with_the_name_of_a_command_is_a_file(trap, name):
    """As somebody may put one into a folder that a wildcard takes; however often it is expanded."""
    (trap.parent / "a.tar").rename(name)
    found = local_shards("*", "KEY")
    assert expand_shards(expand_shards(found)) == found == local_shards(name, "KEY")
    stream = ImageStream(found, SIZE, 1, training=False)
    (batch,) = DataLoader(stream, batch_size=None)
    assert batch.key == ["k"] and not trap.exists()
    stream = ImageStream(f"./{name}", SIZE, 1, training=False)
    assert [b.key for b in stream] == [["k"]] and not trap.exists()


def test_a_batch_holds_pictures_keys_and_labels(tmp_path):
    values = (-1.0, 0.2, 1.0)  # (0.2 + 1) · 127.5 = 153 is a byte
    files: dict[str, bytes] = {}
    for i, value in enumerate(values):
        label = json.dumps({"label": f"class {i}"}).encode()
        files |= {f"k{i}.png": picture(value), f"k{i}.json": label}
    (batch,) = ImageStream(str(write_tar(tmp_path / "a.tar", files)), SIZE, 3, training=False)
    assert batch.key == ["k0", "k1", "k2"]
    assert batch.label == ["class 0", "class 1", "class 2"]
    assert batch.image.shape == (3, 3, SIZE, SIZE) and batch.image.dtype == torch.float32
    torch.testing.assert_close(batch.image[:, 0, 0, 0], torch.tensor(values))
    assert batch.skipped == ()


# ---------------------------------------------------------------------------------------------
# What is broken


def bomb(width: int, height: int) -> bytes:
    """The head of a PNG that tells of that many pixels; none follow."""
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", head), (b"IDAT", zlib.compress(b"")), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in chunks
    )


BOMB = bomb(10_000, 10_000)  # Pillow warns of as many, and refuses twice as many


def broken_files() -> dict[str, bytes]:
    """Two good samples around one of each broken kind."""
    noise = torch.rand(3, SIZE, SIZE, generator=torch.Generator().manual_seed(0)) * 2 - 1
    jpeg = worlds.png(noise, suffix="jpg")
    return {
        "good0.png": picture(),
        "good0.json": LABEL,
        "truncated.jpg": jpeg[: len(jpeg) - 20],
        "truncated.json": LABEL,
        "nojson.png": picture(),
        "nolabel.png": picture(),
        "nolabel.json": b'{"caption": "a cat"}',
        "halfjson.png": picture(),
        "halfjson.json": b'{"label": "ca',
        "listjson.png": picture(),
        "listjson.json": b'["cat"]',
        "numberlabel.png": picture(),
        "numberlabel.json": b'{"label": 3}',
        "listlabel.png": picture(),
        "listlabel.json": b'{"label": ["cat", {}]}',
        "deepjson.png": picture(),
        "deepjson.json": b"[" * 200_000,
        "hugejson.png": picture(),
        "hugejson.json": b'{"label": ' + b"9" * 10_000 + b"}",
        "notext.png": picture(),
        "notext.json": b"\xff\xfe\x00",
        "bomb.png": BOMB,
        "bomb.json": LABEL,
        "noimage.json": LABEL,
        "good1.png": picture(),
        "good1.json": LABEL,
    }


BROKEN = {
    *("truncated", "nojson", "nolabel", "halfjson", "listjson", "noimage", "numberlabel"),
    *("listlabel", "deepjson", "hugejson", "notext", "bomb"),
}


@pytest.mark.parametrize("kind", sorted(BROKEN))
def test_a_broken_sample_is_skipped_and_named(tmp_path, kind):
    files = {
        name: data for name, data in broken_files().items() if name.startswith(("good", f"{kind}."))
    }
    path = write_tar(tmp_path / "a.tar", files)
    (batch,) = ImageStream(str(path), SIZE, 2, training=False)
    assert batch.key == ["good0", "good1"]
    assert len(batch.skipped) == 1
    assert kind in batch.skipped[0] and "a.tar" in batch.skipped[0]


def test_training_goes_on_past_broken_samples(tmp_path):
    """Each is skipped once a pass, and all the others still come equally often."""
    files = broken_files()
    del files["listjson.png"], files["listjson.json"]
    stream = ImageStream(str(write_tar(tmp_path / "a.tar", files)), SIZE, 2, training=True)
    batches = list(itertools.islice(stream, 10))
    assert Counter(sum(keys(batches), [])) == {"good0": 10, "good1": 10}
    # A batch of two is one pass; the broken after its last good one are the next batch's.
    kinds = len(BROKEN) - 1
    assert sum(len(batch.skipped) for batch in batches) == pytest.approx(10 * kinds, abs=kinds)


def test_skipped_samples_are_counted_and_logged(tmp_path):
    files = {k: v for k, v in broken_files().items() if k.startswith(("good", "nojson", "noimage"))}
    path = str(write_tar(tmp_path / "a.tar", files))
    data = ImageData(path, path, 2, SIZE)
    with pytest.warns(UserWarning, match=r"2 so far.*noimage"):
        for batch in data.val_dataloader():
            data.on_after_batch_transfer(batch, 0)
    assert data.skipped == 2


def test_a_broken_first_sample_does_not_fail_the_check(tmp_path):
    files = {"a.jpg": b"no picture", "a.json": LABEL, "b.png": picture(), "b.json": LABEL}
    ImageStream(str(write_tar(tmp_path / "a.tar", files)), SIZE, 2, training=False).check()


def test_shards_without_a_readable_sample_end_the_stream(tmp_path):
    files = {"a.jpg": b"no picture", "a.json": LABEL}
    stream = ImageStream(str(write_tar(tmp_path / "a.tar", files)), SIZE, 1, training=True)
    with pytest.raises(ValueError, match=r"hardly a sample.*a in .*a\.tar"):
        next(iter(stream))


@pytest.mark.parametrize("training", [False, True])
def test_an_image_of_another_size_is_an_error(tmp_path, training):
    files = {"a.png": picture(), "a.json": LABEL, "odd.png": picture(size=6), "odd.json": LABEL}
    stream = ImageStream(str(write_tar(tmp_path / "s.tar", files)), SIZE, 2, training)
    with pytest.raises(ValueError, match=r"odd in .*s\.tar is 6 x 6 pixels, image_size says 4"):
        list(itertools.islice(stream, 3))


@pytest.mark.parametrize("pattern", ["{a", "a-{0..3.tar", "{" * 9000, "${NAME}"])
def test_what_is_no_pattern_is_named(pattern):
    with pytest.raises(ValueError, match="is no pattern of shards") as caught:
        expand_shards(pattern)
    assert pattern[:200] in str(caught.value)


def test_missing_shards_are_named(tmp_path):
    write_shards(tmp_path, 2, 1)
    with pytest.raises(FileNotFoundError, match=f"{tmp_path} is a folder: name the shards in it"):
        ImageStream(str(tmp_path), SIZE, 2, training=True)
    with pytest.raises(ValueError, match="no shards are named"):
        ImageStream([], SIZE, 2, training=True)
    for pattern, named in (
        ("none-*.tar", "none-"),
        ("none.tar", "none.tar"),
        ("train-{00000..00002}.tar", "train-00002"),
    ):
        with pytest.raises(FileNotFoundError, match=named):
            ImageStream(f"{tmp_path}/{pattern}", SIZE, 2, training=True)


def damaged(kind: str, whole: bytes) -> bytes:
    middle = whole.index(b"01-02.png")  # the header of the third sample
    return {
        "nothing": b"",
        "cut in a sample": whole[: middle + 700],
        "cut before its end": whole.rstrip(b"\0"),
        "no tar": b"<html>404</html>" * 300,
        "zeros": bytes(len(whole)),
        "a broken header": whole[:middle] + b"\xff" * 512 + whole[middle + 512 :],
    }[kind]


@pytest.mark.parametrize(
    "kind",
    ["nothing", "cut in a sample", "cut before its end", "no tar", "zeros", "a broken header"],
)
def test_a_damaged_shard_is_named_at_construction(tmp_path, kind):
    """The last one would otherwise end the shard in silence, three samples early."""
    write_shards(tmp_path, 2, 5)
    path = tmp_path / "train-00001.tar"
    path.write_bytes(damaged(kind, path.read_bytes()))
    with pytest.raises(ValueError, match=r"train-00001\.tar"):
        ImageStream(f"{tmp_path}/train-*.tar", SIZE, 2, training=True)


@pytest.mark.parametrize("size", [b"\xff" * 12, b"\x80" + b"\xff" * 11, b"77777777777\0"])
def test_a_header_that_tells_an_absurd_size_is_an_error(tmp_path, size):
    """A negative one (in base 256) would be walked over again and again."""
    write_shards(tmp_path, 1, 3)
    path = tmp_path / "train-00000.tar"
    data = bytearray(path.read_bytes())
    start = data.index(b"00-01.png")
    data[start + 124 : start + 136] = size
    data[start + 148 : start + 156] = b" " * 8
    data[start + 148 : start + 156] = b"%06o\0 " % sum(data[start : start + 512])
    path.write_bytes(data)
    with within(5), pytest.raises(ValueError, match=r"train-00000\.tar is damaged after 2 files"):
        ImageStream(str(path), SIZE, 2, training=True)


# ---------------------------------------------------------------------------------------------
# Damage at random


class Hung(BaseException):
    """No Exception, lest it be taken for one of Pillow's."""


@contextmanager
def within(seconds: float) -> Iterator[None]:
    """Raise `Hung` if it takes longer."""

    def hung(*_: object) -> None:
        raise Hung

    before = signal.signal(signal.SIGALRM, hung)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def damages(data: bytes, count: int, seed: str) -> Iterator[tuple[bytes, bool]]:
    """Cut off somewhere, in turns with a few bytes changed; and whether it was cut."""
    rng = random.Random(seed)
    for i in range(count):
        if i % 2:
            yield data[: rng.randrange(len(data))], True
            continue
        changed = bytearray(data)
        # Half of them in the head, where sizes, tables and lengths are.
        end = len(data) if i % 4 else min(len(data), 100)
        for _ in range(rng.choice((1, 1, 2, 5, 20))):
            changed[rng.randrange(end)] = rng.randrange(256)
        yield bytes(changed), False


FUZZED: dict[str, dict[str, Any]] = {
    "png": {},
    "jpeg": {
        "quality": 90,
        "exif": b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0",
    },
    "webp": {"lossless": True},
    "progressive jpeg": {"progressive": True},
    "lossy webp": {"quality": 80},
    "palette png": {"bits": 4},
}


@pytest.mark.parametrize("kind", FUZZED)
def test_a_damaged_image_is_an_image_or_a_value_error(kind):
    """Seeded; 510 in all. None crashes or hangs, and none that is cut off is read in part."""
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (24, 40, 3), dtype=np.uint8))
    if kind == "palette png":
        image = image.quantize(16)
    data = encoded(image, kind.split()[-1], **FUZZED[kind])
    intact = decode_image(data)
    read = 0
    for damaged_data, cut in damages(data, 85, kind):
        with within(5):
            try:
                found = decode_image(damaged_data, "this one")
            except ValueError as error:
                assert str(error).startswith("this one: ") and "object at 0x" not in str(error)
                continue
        read += 1
        assert found.dtype == torch.float32 and found.ndim == 3 and found.shape[0] == 3
        assert found.min() >= -1 and found.max() <= 1
        if cut:
            assert torch.equal(found, intact), "a part of an image"
    assert 0 < read < 60, "of 85, some are harmless and most are not"


@pytest.mark.parametrize("error", RAISED)
def test_whatever_pillow_raises_is_a_value_error(monkeypatch, error):
    def load(*_: object) -> None:
        raise error

    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", load)
    with pytest.raises(ValueError, match=r"^this one: .") as caught:
        decode_image(picture(), "this one")
    assert caught.value.__cause__ is not None


def test_an_error_of_ours_does_not_hide_as_one_of_the_image(monkeypatch):
    def wrong(*_: object) -> None:
        raise KeyError("a bug")

    monkeypatch.setattr(images, "from_uint8", wrong)
    with pytest.raises(KeyError, match="a bug"):
        decode_image(picture())


@pytest.mark.parametrize("side", [10_000, 14_000, 2**31 - 1])
def test_a_bomb_is_a_value_error_before_it_goes_off(side):
    with within(5), pytest.raises(ValueError, match=r"this one: Image size .* exceeds limit"):
        decode_image(bomb(side, side), "this one")


# ---------------------------------------------------------------------------------------------
# Pixels


def encoded(image: Image.Image, suffix: str = "png", **options: int) -> bytes:
    file = io.BytesIO()
    image.save(file, suffix, **options)
    return file.getvalue()


def scaled(rgb: np.ndarray) -> torch.Tensor:
    """(H, W, 3) bytes to (3, H, W) in [-1, 1], in float64."""
    return torch.tensor(rgb.astype(np.float64).transpose(2, 0, 1) / 255 * 2 - 1)


def close(image: torch.Tensor, expected: torch.Tensor, atol: float = 1e-6) -> None:
    assert image.dtype == torch.float32
    torch.testing.assert_close(image.double(), expected, rtol=0, atol=atol)


RGB = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)


def test_rgb_is_read_as_it_is():
    image = decode_image(encoded(Image.fromarray(RGB)))
    assert image.shape == (3, 5, 7)
    close(image, scaled(RGB))
    close(decode_image(encoded(Image.fromarray(RGB), "webp", lossless=True)), scaled(RGB))


def test_grey_becomes_rgb():
    grey = RGB[..., 0]
    close(decode_image(encoded(Image.fromarray(grey))), scaled(np.stack([grey] * 3, -1)))


def test_sixteen_bit_grey_becomes_rgb():
    """The upper byte, or it rounded: 1/255 of the range apart at most."""
    grey = np.array([[0, 1000, 20000], [32768, 50000, 65535]], dtype=np.uint16)
    expected = torch.tensor(grey / 65535 * 2 - 1).expand(3, -1, -1)
    close(decode_image(encoded(Image.fromarray(grey))), expected, atol=2 / 255)


def test_a_palette_becomes_rgb():
    indices = np.array([[0, 1], [2, 1]], dtype=np.uint8)
    colours = np.array([[255, 0, 0], [1, 2, 3], [9, 200, 77]], dtype=np.uint8)
    image = Image.fromarray(indices, "L").convert("P")
    image.putdata(indices.flatten().tolist())
    image.putpalette(colours.flatten().tolist())
    close(decode_image(encoded(image)), scaled(colours[indices]))


def test_alpha_is_dropped():
    alpha = np.full((5, 7, 1), 255, np.uint8)
    alpha[0] = 128
    image = Image.fromarray(np.concatenate([RGB, alpha], -1))
    assert image.mode == "RGBA"
    close(decode_image(encoded(image)), scaled(RGB))


def test_cmyk_becomes_rgb():
    """R = (1 − C)(1 − K) …, of one flat colour; JPEG rounds it by up to 2/255."""
    c, m, y, k = 200, 30, 120, 60
    image = Image.new("CMYK", (16, 16), (c, m, y, k))
    expected = torch.tensor([(255 - ink) * (255 - k) / 255 for ink in (c, m, y)]).double()
    expected = (expected / 127.5 - 1)[:, None, None].expand(3, 16, 16)
    close(decode_image(encoded(image, "jpeg", quality=100)), expected, atol=2 / 127.5)


@pytest.mark.parametrize("shape", [(2, 3, 10, 17), (2, 3, 17, 10), (2, 3, 10, 10)])
def test_the_middle_square_is_the_centre_crop(shape):
    image = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    side = min(shape[-2:])
    top, left = (shape[2] - side) // 2, (shape[3] - side) // 2
    assert torch.equal(middle_square(image, side), tv.crop(image, top, left, side, side))
    assert middle_square(image, 6).shape == (2, 3, 6, 6)


def test_no_image_is_named():
    with pytest.raises(ValueError, match="my picture"):
        decode_image(b"nothing of the kind", "my picture")


def test_bytes_survive_the_round_trip():
    grey = torch.arange(256, dtype=torch.uint8).reshape(16, 16)
    image = decode_image(encoded(Image.fromarray(grey.numpy())))
    assert torch.equal(to_uint8(image), grey.expand(3, 16, 16))
    assert image.min() == -1 and image.max() == 1


def test_to_uint8_clips_and_rounds():
    values = torch.tensor([-7.0, -1.0, 0.6 / 127.5 - 1, 0.4 / 127.5 - 1, 1.0, 7.0])
    assert to_uint8(values).tolist() == [0, 0, 1, 0, 255, 255]


def test_resizing_agrees_with_pillow_and_torchvision():
    """Pillow's own bilinear filter on floats, written in C apart from torch's."""
    image = torch.rand(2, 3, 24, 24, generator=torch.Generator().manual_seed(0)) * 2 - 1
    for size in (8, 16, 40):
        resized = resize(image, size)
        expected = torch.stack(
            [
                torch.from_numpy(
                    np.asarray(
                        Image.fromarray(plane.numpy(), "F").resize(
                            (size, size), Image.Resampling.BILINEAR
                        )
                    ).copy()
                )
                for plane in image.flatten(0, 1)
            ]
        ).view(2, 3, size, size)
        torch.testing.assert_close(resized, expected, rtol=0, atol=1e-5)
        torch.testing.assert_close(resized, tv.resize(image, [size, size], antialias=True))
    assert torch.equal(resize(image, 24), image)


def test_resizing_averages_a_checkerboard():
    """By three, where plain bilinear sampling would pick single pixels: ±1.

    The triangle filter leaves 1/9 of it along each axis, 1/81 of the board, 0.02 at its corners.
    """
    i = torch.arange(24)
    board = ((i[:, None] + i) % 2 * 2 - 1).float()[None, None]
    assert resize(board, 8).abs().max() < 0.03


def test_resizing_is_differentiable():
    image = torch.rand(1, 1, 6, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: resize(x, 4), image)


# ---------------------------------------------------------------------------------------------
# The split, and writing


@pytest.mark.parametrize(("count", "heldout"), [(5653, 283), (5558, 278)])
def test_the_held_out_are_the_smallest_hashes(count, heldout):
    names = [f"flickr_cat_{i:06d}.jpg" for i in range(count)]
    chosen = heldout_names(names)
    assert len(chosen) == heldout
    hashes = {n: int.from_bytes(hashlib.sha256(n.encode()).digest(), "big") for n in names}
    threshold = max(hashes[name] for name in chosen)
    assert chosen == {name for name in names if hashes[name] <= threshold}
    assert heldout_names(reversed(names)) == chosen


def test_what_is_read_ahead_is_the_same_and_one_is():
    read: list[int] = []

    def batches() -> Iterator[int]:
        for i in range(5):
            read.append(i)
            yield i
        raise ValueError("broken")

    found = []
    with pytest.raises(ValueError, match="broken"):
        for number in ahead(batches()):
            while len(read) < min(number + 2, 5):  # the thread's turn; a test that hangs has failed
                time.sleep(0.001)
            found.append(number)
    assert found == [*range(5)]
    read.clear()
    endless = ahead(itertools.count())
    assert [next(endless) for _ in range(3)] == [0, 1, 2]
    endless.close()


def test_a_written_shard_is_read_back(tmp_path):
    path = tmp_path / "deep" / "a.tar"
    samples = [("a", picture(), "png", {"label": "cat"}), ("b", b"x", "jpg", {"label": "dog"})]
    assert write_shard(path, iter(samples)) == 2
    with tarfile.open(path) as tar:
        read = {member.name: tar.extractfile(member).read() for member in tar}
    assert {"a.png", "a.json", "b.jpg", "b.json"} == set(read)
    assert read["a.png"] == picture() and json.loads(read["b.json"]) == {"label": "dog"}
    assert [file.name for file in path.parent.iterdir()] == ["a.tar"]


def test_a_shard_is_written_whole_or_not_at_all(tmp_path):
    def failing():
        yield "a", picture(), "png", {"label": "cat"}
        raise RuntimeError("the disk is full")

    path = tmp_path / "a.tar"
    with pytest.raises(RuntimeError, match="disk"):
        write_shard(path, failing())
    assert not list(tmp_path.glob("*.tar"))
    write_shard(path, [("old", picture(), "png", {"label": "cat"})])
    old = path.read_bytes()
    with pytest.raises(RuntimeError, match="disk"):
        write_shard(path, failing())
    assert path.read_bytes() == old
