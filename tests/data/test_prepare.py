"""Folders, lists, tars and tables of images to shards: data/afhq and data/openimages."""

import hashlib
import importlib.util
import io
import json
import os
import platform
import random
import signal
import struct
import subprocess
import sys
import tarfile
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image, PngImagePlugin
from test_images import BOMB, RAISED, damages

import lmc.progress
from lmc.shards.images import ImageStream, heldout_names

DATA = Path(__file__).parents[2] / "data"
sys.path.insert(0, str(DATA))

import shards  # noqa: E402
from pictures import Item, Options, process  # noqa: E402
from sources import Skip, Source  # noqa: E402


def script(name: str) -> ModuleType:
    """data/NAME/prepare.py under a name of its own: there are several prepare.py."""
    spec = importlib.util.spec_from_file_location(f"{name}_prepare", DATA / name / "prepare.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


AFHQ, PHOTOS = script("afhq"), script("openimages")


def afhq(*args: Any) -> None:
    AFHQ.main([*map(str, args), "--workers=1"])


def photos(*args: Any) -> None:
    PHOTOS.main([*map(str, args), "--workers=1"])


def encoded(image: Image.Image | np.ndarray, kind: str = "png", **options: Any) -> bytes:
    file = io.BytesIO()
    image = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    image.save(file, kind, **options)
    return file.getvalue()


def noise(seed: int, width: int = 8, height: int = 8) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def write(path: Path, data: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def write_cats(folder: Path, count: int, first: int = 0, size: int = 8) -> list[str]:
    names = [f"flickr_cat_{i:06d}.png" for i in range(first, first + count)]
    for i, name in enumerate(names, first):
        write(folder / name, encoded(noise(i, size, size)))
    return names


def samples(out: Path) -> dict[str, dict[str, Any]]:
    """What the shards hold by the images' names, read by the standard library alone."""
    found: dict[str, dict[str, Any]] = {}
    for path in sorted(out.glob("*.tar")):
        with tarfile.open(path) as tar:
            files = {member.name: tar.extractfile(member).read() for member in tar}
        for name in files:
            if name.endswith(".json"):
                about = json.loads(files[name])
                (suffix,) = {x.partition(".")[2] for x in files if x.startswith(name[:-4])} - {
                    "json"
                }
                data = files[f"{name[:-5]}.{suffix}"]
                pixels = np.asarray(Image.open(io.BytesIO(data)))
                assert about["split"] == path.name.partition("-")[0]
                assert about["name"] not in found
                about |= {"data": data, "pixels": pixels, "suffix": suffix, "key": name[:-5]}
                found[about["name"]] = about
    return found


def heldout(out: Path) -> set[str]:
    return {name for name, sample in samples(out).items() if sample["split"] == "heldout"}


def tree(out: Path, *but: str) -> dict[str, bytes]:
    return {
        str(file.relative_to(out)): file.read_bytes()
        for file in out.rglob("*")
        if file.is_file() and file.name not in but
    }


def index(out: Path) -> dict[str, Any]:
    return json.loads((out / "index.json").read_text())


# ---------------------------------------------------------------------------------------------
# Kinds of files. Size and format are such that pixels come through unchanged.

RGB = noise(0)


def png16(pixels: np.ndarray) -> bytes:
    """(H, W, 3) of 16 bits as PNG, which Pillow does not write."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        )

    height, width, _ = pixels.shape
    header = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    parts = chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def grey(values: np.ndarray) -> np.ndarray:
    return np.stack([values] * 3, -1)


def over_white(rgba: np.ndarray) -> np.ndarray:
    alpha = rgba[..., 3:] / 255
    return rgba[..., :3] * alpha + 255 * (1 - alpha)


def rgba() -> np.ndarray:
    return np.concatenate([RGB, noise(1)[..., :1]], -1)


def palette(**options: Any) -> bytes:
    image = Image.fromarray(np.tile(np.arange(4, dtype=np.uint8), (8, 2)), "L").convert("P")
    image.putdata(np.tile(np.arange(4), 16).tolist())
    image.putpalette([255, 0, 0, 1, 2, 3, 9, 200, 77, 50, 60, 70])
    return encoded(image, **options)


def palette_pixels(first: tuple[int, int, int]) -> np.ndarray:
    return np.tile(np.array([first, (1, 2, 3), (9, 200, 77), (50, 60, 70)]), (8, 2, 1))


def exif(orientation: int) -> Image.Exif:
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags


def animated(kind: str, **options: Any) -> bytes:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "lime", "blue")]
    return encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)


def flat(*colour: int) -> np.ndarray:
    return np.broadcast_to(np.array(colour), (8, 8, 3))


SIXTEEN = np.random.default_rng(2).integers(0, 65536, (8, 8, 3)).astype(np.uint16)
ONE_BIT = noise(3)[..., 0] > 127
INK = (200, 30, 120, 60)

# Exact unless said: half a step where a byte is rounded, one where Pillow blends in integers or
# takes the upper byte of sixteen, two for JPEG at quality 100 of one flat colour.
KINDS: dict[str, tuple[str, bytes, np.ndarray, float]] = {
    "rgb": ("a.png", encoded(RGB), RGB, 0),
    "upper case suffix": ("a.PNG", encoded(RGB), RGB, 0),
    "wrong suffix": ("a.jpg", encoded(RGB), RGB, 0),
    "webp": ("a.webp", encoded(RGB, "webp", lossless=True), RGB, 0),
    "bmp": ("a.bmp", encoded(RGB, "bmp"), RGB, 0),
    "tiff": ("a.tif", encoded(RGB, "tiff"), RGB, 0),
    "grey": ("a.png", encoded(RGB[..., 0].copy()), grey(RGB[..., 0]), 0),
    "one bit": ("a.png", encoded(Image.fromarray(ONE_BIT)), grey(ONE_BIT * 255), 0),
    "grey of 16 bits": ("a.png", encoded(SIXTEEN[..., 0]), grey(SIXTEEN[..., 0] / 257), 0.5),
    "grey tiff of 16 bits": (
        *("a.tiff", encoded(SIXTEEN[..., 0], "tiff")),
        *(grey(SIXTEEN[..., 0] / 257), 0.5),
    ),
    "rgb of 16 bits": ("a.png", png16(SIXTEEN), SIXTEEN / 257, 1),
    "cmyk": (
        *("a.jpg", encoded(Image.new("CMYK", (8, 8), INK), "jpeg", quality=100)),
        *(flat(*((255 - ink) * (255 - INK[3]) // 255 for ink in INK[:3])), 2),
    ),
    "palette": ("a.png", palette(), palette_pixels((255, 0, 0)), 0),
    "palette with a transparent colour": (
        *("a.png", palette(transparency=0)),
        *(palette_pixels((255, 255, 255)), 0),
    ),
    "transparent": ("a.png", encoded(rgba()), over_white(rgba()), 1),
    "transparent grey": (
        *("a.png", encoded(rgba()[..., 2:].copy())),
        *(over_white(np.concatenate([grey(rgba()[..., 2]), rgba()[..., 3:]], -1)), 1),
    ),
    "mirrored by exif": ("a.png", encoded(RGB, exif=exif(2)), RGB[:, ::-1], 0),
    "upside down by exif": ("a.png", encoded(RGB, exif=exif(3)), RGB[::-1, ::-1], 0),
    "turned by exif": ("a.png", encoded(RGB, exif=exif(6)), np.rot90(RGB, -1), 0),
    "animated gif": ("a.gif", animated("gif"), flat(255, 0, 0), 0),
    "animated webp": ("a.webp", animated("webp", lossless=True), flat(255, 0, 0), 0),
    "animated png": ("a.png", animated("png"), flat(255, 0, 0), 0),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_file_becomes_rgb(tmp_path, kind):
    name, data, expected, tolerance = KINDS[kind]
    write(tmp_path / "in" / name, data)
    photos(tmp_path / "in", "--out", tmp_path / "out", "--size=8", "--format=png")
    (sample,) = samples(tmp_path / "out").values()
    assert sample["pixels"].shape == (8, 8, 3) and sample["pixels"].dtype == np.uint8
    assert np.abs(sample["pixels"] - expected.astype(np.float64)).max() <= tolerance
    assert (sample["label"], sample["name"]) == ("photo", name)


DAMAGED = {
    "empty.jpg": b"",
    "text.jpg": b"<html>404</html>",
    "cut.jpg": encoded(noise(5, 64, 64), "jpeg")[:-600],
    "cut.png": encoded(noise(6, 64, 64))[:-600],
    "float.tif": encoded(np.ones((8, 8), np.float32), "tiff"),
    "bomb.png": BOMB,
}


def test_what_cannot_be_used_is_skipped_counted_and_named(tmp_path):
    source, out = tmp_path / "in", tmp_path / "out"
    write_cats(source / "deep" / "er", 3)
    for name, data in DAMAGED.items():
        write(source / name, data)
    write(source / "small.png", encoded(noise(7, 8, 7)))
    write(source / "copy.png", (source / "deep/er/flickr_cat_000001.png").read_bytes())
    write(source / "readme.txt", b"about")
    write(source / "._hidden.jpg", b"what a Mac leaves")
    write(source / ".cache" / "a.png", encoded(noise(8)))
    photos(source, "--out", out, "--size=8")
    counts = {"cannot be read": 6, "too small": 1, "duplicate": 1, "no image by its suffix": 1}
    assert index(out)["skipped"] == counts
    assert index(out)["train"] + index(out)["heldout"] == len(samples(out)) == 3
    lines = [line.split("\t") for line in (out / "skipped.txt").read_text().splitlines()]
    named = {Path(name).name: (reason, detail) for reason, name, detail in lines}
    assert {name for name, (reason, _) in named.items() if reason == "cannot be read"} == {*DAMAGED}
    assert named["small.png"] == ("too small", "8 x 7")
    assert named["readme.txt"][0] == "no image by its suffix" and len(lines) == 9


def test_damaged_images_are_skipped_whatever_is_raised(tmp_path):
    """150 seeded damages of three kinds: each becomes an image, or is skipped and named."""
    count = 0
    for kind, data in (
        ("png", encoded(noise(0, 24, 24))),
        ("jpeg", encoded(noise(1, 24, 24), "jpeg")),
        ("webp", encoded(noise(2, 24, 24), "webp")),
    ):
        for i, (damaged, _) in enumerate(damages(data, 50, kind)):
            write(tmp_path / "in" / f"{kind}{i}.{kind}", damaged)
            count += 1
    photos(tmp_path / "in", "--out", tmp_path / "out", "--size=8")
    about = index(tmp_path / "out")
    assert set(about["skipped"]) <= {"cannot be read", "too small", "duplicate"}
    assert 0 < about["train"] + about["heldout"] == len(samples(tmp_path / "out"))
    assert about["train"] + about["heldout"] + sum(about["skipped"].values()) == count


@pytest.mark.parametrize("error", RAISED)
def test_whatever_pillow_raises_is_a_skip(tmp_path, monkeypatch, error):
    def load(*_: object) -> None:
        raise error

    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", load)
    path = write(tmp_path / "a.png", encoded(noise(0)))
    source = Source(str(path), "a.png", "x", path.stat().st_size)
    skip = process(Item(source, "a", "a.png"), Options(8, "png", 8, 1))
    assert isinstance(skip, Skip) and skip.reason == "cannot be read" and skip.detail


def test_small_images_are_taken_where_asked_for(tmp_path):
    write(tmp_path / "in" / "a.png", encoded(noise(0, 4, 6)))
    photos(tmp_path / "in", "--out", tmp_path / "out", "--size=8", "--min_side=4")
    (sample,) = samples(tmp_path / "out").values()
    assert sample["pixels"].shape == (8, 8, 3)


# ---------------------------------------------------------------------------------------------
# Crops and sizes


def columns(seed: int, width: int = 64) -> bytes:
    """8 rows high; red says the column, blue makes the file another one."""
    image = np.zeros((8, width, 3), np.uint8)
    image[..., 0], image[..., 2] = np.arange(width), seed
    return encoded(image)


def test_the_centre_is_cropped(tmp_path):
    write(tmp_path / "in" / "wide.png", columns(0))
    write(
        tmp_path / "in" / "high.png",
        encoded(Image.open(io.BytesIO(columns(1))).rotate(90, expand=True)),
    )
    photos(tmp_path / "in", "--out", tmp_path / "out", "--size=8", "--format=png")
    found = samples(tmp_path / "out")
    assert (found["wide.png"]["pixels"][..., 0] == np.arange(28, 36)).all()
    assert (found["high.png"]["pixels"][..., 0] == np.arange(35, 27, -1)[:, None]).all()


def test_a_random_crop_follows_from_the_content(tmp_path):
    """57 places: of 40 images half of them or more are hit, near both ends as well."""
    for i in range(40):
        write(tmp_path / "one" / f"{i}.png", columns(i))
        write(tmp_path / "other" / f"renamed{99 - i}.png", columns(i))
    places = []
    for name in ("one", "other"):
        out = tmp_path / f"{name}_out"
        photos(tmp_path / name, "--out", out, "--size=8", "--crop=random", "--format=png")
        found = {}
        for sample in samples(out).values():
            left = sample["pixels"][0, 0, 0]
            assert (sample["pixels"][..., 0] == np.arange(left, left + 8)).all()
            found[int(sample["pixels"][0, 0, 2])] = int(left)
        places.append(found)
    assert places[0] == places[1] and len(places[0]) == 40
    assert len(set(places[0].values())) >= 20
    assert min(places[0].values()) < 8 and max(places[0].values()) > 48


def test_resizing_is_antialiased(tmp_path):
    """A checkerboard of single pixels, a quarter as large, is grey: picked pixels would be 0 or
    255. Lanczos leaves a little at the border, where its window is cut."""
    board = (np.indices((64, 64)).sum(0) % 2 * 255).astype(np.uint8)
    write(tmp_path / "in" / "a.png", encoded(board))
    photos(tmp_path / "in", "--out", tmp_path / "out", "--size=16", "--format=png")
    (sample,) = samples(tmp_path / "out").values()
    assert np.abs(sample["pixels"].astype(float) - 127.5).max() < 4


def test_a_large_jpeg_is_decoded_small_without_loss(tmp_path):
    """At a fraction of its size, but twice the target's: as decoded in full to an RMSE of 2, where
    decoding it at the target's size would make it 6."""
    image = Image.fromarray(noise(0, 64, 64)).resize((512, 512), Image.Resampling.BICUBIC)
    data = encoded(image, "jpeg", quality=95)
    write(tmp_path / "in" / "a.jpg", data)
    photos(tmp_path / "in", "--out", tmp_path / "out", "--size=64", "--format=png")
    (sample,) = samples(tmp_path / "out").values()
    full = Image.open(io.BytesIO(data)).resize((64, 64), Image.Resampling.LANCZOS)
    assert np.square(sample["pixels"].astype(float) - np.asarray(full)).mean() ** 0.5 < 3


def test_a_jpeg_of_the_right_size_is_not_encoded_again(tmp_path):
    plain, turned = encoded(RGB, "jpeg"), encoded(noise(1), "jpeg", exif=exif(6))
    grey_one = encoded(RGB[..., 0].copy(), "jpeg")
    for name, data in {"plain": plain, "turned": turned, "grey": grey_one}.items():
        write(tmp_path / "in" / f"{name}.jpg", data)
    photos(tmp_path / "in", "--out", tmp_path / "out", "--size=8")
    found = samples(tmp_path / "out")
    assert found["plain.jpg"]["data"] == plain and found["plain.jpg"]["suffix"] == "jpg"
    assert found["turned.jpg"]["data"] != turned
    assert found["grey.jpg"]["pixels"].shape == (8, 8, 3)


# ---------------------------------------------------------------------------------------------
# Where images come from

CATS = 45  # 2 of them are held out


def afhq_folder(top: Path, splits: tuple[str, ...], size: int = 8) -> list[str]:
    names = []
    for i, split in enumerate(splits):
        names += write_cats(
            top / split / "cat", CATS // len(splits), i * (CATS // len(splits)), size
        )
        write(top / split / "dog" / f"flickr_dog_{i:06d}.png", encoded(noise(900 + i, size, size)))
    return names


@pytest.mark.parametrize(
    ("splits", "top", "given"),
    [
        (("train", "val"), "afhq", "afhq"),
        (("train", "test"), "afhq", "afhq"),
        (("train", "val"), "here/afhq", "here"),
        (("train", "test"), "here/afhq_v2", "here"),
        (("train",), "afhq", "afhq"),
        (("",), "merged", "merged"),
    ],
)
def test_afhq_folders(tmp_path, splits, top, given):
    """The 5 % is of all splits together, whichever they were in."""
    names = afhq_folder(tmp_path / top, splits)
    out = tmp_path / "out"
    afhq(tmp_path / given, "--out", out, "--size=8")
    found = samples(out)
    assert sorted(found) == sorted(names)
    assert {sample["label"] for sample in found.values()} == {"cat"}
    assert heldout(out) == heldout_names(names)
    assert (out / "heldout.txt").read_text().splitlines() == sorted(heldout_names(names))
    assert len(heldout(out)) == round(0.05 * len(names)) == 2


def test_a_folder_of_images_alone(tmp_path):
    names = write_cats(tmp_path / "in", CATS)
    afhq(tmp_path / "in", "--out", tmp_path / "out", "--size=8", "--classes", "wild")
    found = samples(tmp_path / "out")
    assert sorted(found) == names and {s["label"] for s in found.values()} == {"wild"}
    assert heldout(tmp_path / "out") == heldout_names(names)


def test_cats_are_held_out_alike_with_and_without_dogs(tmp_path):
    cats = write_cats(tmp_path / "in" / "train" / "cat", CATS)
    dogs = [f"flickr_dog_{i:06d}.png" for i in range(30)]
    for i, name in enumerate(dogs):
        write(tmp_path / "in" / "train" / "dog" / name, encoded(noise(500 + i)))
    afhq(tmp_path / "in", "--out", tmp_path / "out", "--size=8", "--classes", "dog", "cat")
    assert heldout(tmp_path / "out") == heldout_names(cats) | heldout_names(dogs)
    counts = index(tmp_path / "out")["counts"]
    assert counts == {"cat": {"train": 43, "heldout": 2}, "dog": {"train": 28, "heldout": 2}}


@pytest.mark.parametrize("kind", ["parquet", "arrow stream", "arrow file"])
@pytest.mark.parametrize("named", [True, False])
def test_hub_tables(tmp_path, kind, named):
    """As `datasets` writes them: numbered classes, names in the schema's metadata; two files."""
    pyarrow = pytest.importorskip("pyarrow", reason="reads tables: pip install pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    names = afhq_folder(tmp_path / "in", ("train", "val"))
    files = sorted((tmp_path / "in").rglob("*.png"))
    rows = [
        {
            "image": {"bytes": file.read_bytes(), "path": f"x/{file.name}" if named else None},
            "label": ["dog", "cat"].index(file.parent.name),
        }
        for file in files
    ]
    rows.append({"image": None, "label": 1})
    features = {"label": {"names": ["dog", "cat"], "_type": "ClassLabel"}}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    image = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    schema = pyarrow.schema([("image", image), ("label", pyarrow.int64())], metadata)
    (tmp_path / "tables").mkdir()
    for i, part in enumerate((rows[:20], rows[20:])):
        table = pyarrow.Table.from_pylist(part, schema)
        path = tmp_path / "tables" / f"{i}.{kind.split()[0]}"
        if kind == "parquet":
            parquet.write_table(table, path, row_group_size=7)
            continue
        new = pyarrow.ipc.new_stream if kind == "arrow stream" else pyarrow.ipc.new_file
        with new(str(path), schema) as writer:
            writer.write_table(table, max_chunksize=7)
    out = tmp_path / "out"
    afhq(tmp_path / "tables", "--out", out, "--size=8", "--format=png")
    cats = {file.name: file.read_bytes() for file in files if file.parent.name == "cat"}
    digests = {hashlib.sha256(data).hexdigest(): name for name, data in cats.items()}
    chosen = heldout_names(names) if named else set(sorted(digests)[:2])
    assert heldout(out) == chosen and len(chosen) == 2
    found = samples(out)
    assert len(found) == len(names) and index(out)["skipped"] == {"missing": 1}
    for name, sample in found.items():
        data = cats[name if named else digests[name]]
        assert sample["label"] == "cat"
        assert (sample["pixels"] == np.asarray(Image.open(io.BytesIO(data)))).all()


def test_a_table_without_pyarrow_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    write(tmp_path / "in" / "a.parquet", b"PAR1")
    with pytest.raises(SystemExit, match=r"a\.parquet needs pyarrow.*pip install pyarrow"):
        afhq(tmp_path / "in", "--out", tmp_path / "out")


def test_folder_list_and_tar_make_the_same_shards(tmp_path):
    """Names count without their folders, so that the split is the same from wherever."""
    folder = tmp_path / "in"
    write_cats(folder / "a", 30)
    write_cats(folder / "b" / "c", 30, first=30)
    files = sorted(folder.rglob("*.png"))
    random.Random(0).shuffle(files)
    listing = "".join(f"{file.relative_to(tmp_path)}\n" for file in files) + "\nin/gone.jpg\n"
    (tmp_path / "list.txt").write_text(listing)
    with tarfile.open(tmp_path / "all.tar", "w") as tar:
        for file in files:
            tar.add(file, file.relative_to(folder))
    outs = []
    for given in ("in", "list.txt", "all.tar"):
        out = tmp_path / f"out {given}"
        photos(tmp_path / given, "--out", out, "--size=4", "--shard_size=25")
        outs.append({name: data for name, data in tree(out).items() if name.endswith(".tar")})
    assert outs[0] == outs[1] == outs[2] and len(outs[0]) == 4
    assert index(tmp_path / "out list.txt")["skipped"] == {"missing": 1}
    assert heldout(tmp_path / "out in") == heldout_names(file.name for file in files)


def test_labels_by_folder(tmp_path):
    write(tmp_path / "in" / "fish" / "a.png", encoded(noise(0)))
    write(tmp_path / "in" / "bird" / "b.png", encoded(noise(1)))
    photos(tmp_path / "in", "--out", tmp_path / "out", "--size=8", "--folder_labels")
    found = samples(tmp_path / "out")
    assert (found["a.png"]["label"], found["b.png"]["label"]) == ("fish", "bird")


def test_of_each_folder_its_share_is_held_out(tmp_path):
    """A rare label has held-out images too, and which they are does not depend on the others."""
    counts = {"cat": 40, "bear": 20}
    named = {kind: [f"{kind}{i}.png" for i in range(n)] for kind, n in counts.items()}
    for i, (kind, names) in enumerate(named.items()):
        for j, name in enumerate(names):
            write(tmp_path / "in" / kind / name, encoded(noise(100 * i + j)))
    photos(tmp_path / "in", "--out", tmp_path / "out", "--size=8", "--folder_labels")
    expected = [heldout_names(names) for names in named.values()]
    assert [len(names) for names in expected] == [2, 1]
    assert heldout(tmp_path / "out") == set.union(*expected)


def test_odd_names_are_told_apart(tmp_path):
    """By the key, which in a tar has no dot, and no sample takes another's image."""
    names = ["a.png", "a.bmp", "猫.png", "犬.png", "x.y.png", "x_y.png", "n" * 150 + ".png"]
    names.append(os.fsdecode(b"latin-\xe9.png"))
    for i, name in enumerate(names):
        write(tmp_path / "in" / name, encoded(noise(i), "bmp" if name.endswith("bmp") else "png"))
    photos(tmp_path / "in", "--out", tmp_path / "out", "--size=8", "--format=png")
    found = samples(tmp_path / "out")
    assert sorted(found) == sorted(names)
    for i, name in enumerate(names):
        assert (found[name]["pixels"] == noise(i)).all()
    read = [key for batch in ImageStream(f"{tmp_path}/out/*.tar", 8, 3, False) for key in batch.key]
    assert sorted(read) == sorted(sample["key"] for sample in found.values())


# ---------------------------------------------------------------------------------------------
# The plan

OPTIONS = Options(size=8, suffix="png", min_side=8, shard_size=1000, by_class=True)


def listed(names: list[str], label: str = "cat") -> list[Source]:
    return [Source(f"/in/{name}", name, label, 1000 + i) for i, name in enumerate(names)]


@pytest.mark.parametrize(("count", "held"), [(5653, 283), (5558, 278)])
def test_the_published_counts(count, held):
    """Whatever the order, and beside any other class."""
    names = [f"flickr_cat_{i:06d}.jpg" for i in range(count)]
    plan = shards.make_plan(listed(names), {}, OPTIONS)
    assert len(plan.heldout) == held and set(plan.heldout) == heldout_names(names)
    assert sum(map(len, plan.shards.values())) == count and not plan.skipped
    shuffled = listed(names)
    random.Random(0).shuffle(shuffled)
    assert shards.make_plan(shuffled, {}, OPTIONS).shards == plan.shards
    dogs = [Source(f"/in/dog{i}.jpg", f"dog{i}.jpg", "dog", i) for i in range(500)]
    both = shards.make_plan(dogs + shuffled, {}, OPTIONS).heldout
    assert len(both) == held + 25 and set(plan.heldout) < set(both)


def test_of_duplicates_the_held_out_one_stays():
    """Each held-out image has a copy in training, each other one among the first 20 as well."""
    names = [f"{i}.jpg" for i in range(100)]
    held = heldout_names(names)
    originals = {name: i for i, name in enumerate(names)}
    spare = iter(sorted(set(names) - held - {f"{i}.jpg" for i in range(20)}))
    content = {name: name for name in names}
    for name in sorted(held | {f"{i}.jpg" for i in range(20)}):
        content[next(spare)] = name
    digests = {originals[n]: hashlib.sha256(c.encode()).hexdigest() for n, c in content.items()}
    plan = shards.make_plan(listed(names), digests, OPTIONS)
    kept = [item.name for items in plan.shards.values() for item in items]
    assert set(plan.heldout) == held and held <= set(kept)
    assert sorted(content[name] for name in kept) == sorted(set(content.values()))
    assert len(plan.skipped) == 100 - len(kept) == 100 - len(set(content.values())) > 20


def test_only_files_of_the_same_size_are_read_for_the_plan():
    sources = listed(["a", "b", "c", "d"])
    assert shards.needs_digest(sources) == []
    twin = Source("/in/e", "e", "cat", sources[1].size)
    assert shards.needs_digest([*sources, twin]) == [1, 4]
    namesake = Source("/in/x/a", "a", "cat", 7)
    assert shards.needs_digest([*sources, namesake]) == [0, 1, 2, 3, 4]


def test_files_of_the_same_name_are_split_by_content(tmp_path):
    data = {}
    for i in range(40):
        file = write(tmp_path / "in" / f"folder {i}" / "image.png", encoded(noise(i)))
        data[hashlib.sha256(file.read_bytes()).hexdigest()] = file
    photos(tmp_path / "in", "--out", tmp_path / "out", "--size=8")
    assert heldout(tmp_path / "out") == set(sorted(data)[:2])
    assert set(samples(tmp_path / "out")) == set(data)


# ---------------------------------------------------------------------------------------------
# Runs that stop


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Photographs that take a while, with one of every fault, and shards made of them at once."""
    folder = tmp_path_factory.mktemp("straight")
    write_cats(folder / "in", 60, size=300)
    for i in range(3):
        write(folder / "in" / f"broken{i}.jpg", b"no image" * (i + 1))
    (first, *_) = sorted((folder / "in").glob("flickr*"))
    write(folder / "in" / "copy.png", first.read_bytes())
    photos(folder / "in", "--out", folder / "out", "--size=32", "--shard_size=4")
    assert index(folder / "out")["skipped"] == {"cannot be read": 3, "duplicate": 1}
    return folder / "in", folder / "out"


def test_a_killed_run_goes_on_to_the_same_bytes(tmp_path, straight):
    """Killed with two processes at work, which must not outlive it; continued by one."""
    source, expected = straight
    out = tmp_path / "out"
    args = [str(source), "--out", str(out), "--size=32", "--shard_size=4"]
    process = subprocess.Popen(
        [sys.executable, str(DATA / "openimages" / "prepare.py"), *args, "--workers=2"],
        start_new_session=True,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(DATA.parent)},
    )
    try:
        wait_for(lambda: len(list((out / ".plan").glob("train-*.json"))) >= 2)
        process.kill()
        assert process.wait() == -signal.SIGKILL, "it ended before it could be killed"
        wait_for(lambda: not group_lives(process.pid))
    finally:
        if group_lives(process.pid):
            os.killpg(process.pid, signal.SIGKILL)
    done = [file.with_suffix("").name for file in (out / ".plan").glob("train-*.json")]
    assert not (out / "index.json").exists() and len(done) < len(list(expected.glob("train-*.tar")))
    before = {name: (out / f"{name}.tar").stat().st_mtime_ns for name in done}
    for tar in out.glob("*.tar"):  # whatever bears the name is whole
        assert tar.read_bytes() == (expected / tar.name).read_bytes()
    photos(*args)
    assert tree(out) == tree(expected)
    after = {name: (out / f"{name}.tar").stat().st_mtime_ns for name in done}
    assert after == before, "a finished shard was made again"


def wait_for(condition: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.002)


def group_lives(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def test_the_number_of_processes_changes_nothing(tmp_path, straight):
    source, expected = straight
    out = tmp_path / "out"
    options = ["--size=32", "--shard_size=4", "--workers=3"]
    PHOTOS.main([str(source), "--out", str(out), *options])
    assert tree(out) == tree(expected)


def left_by_a_killed_run(file: Path) -> None:
    """Half of a file, under the name it has until it is whole, of a process that is no more."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    (file.parent / f".{file.name}.{platform.node()}-{process.pid}-0a.partial").write_bytes(b"half")


def test_what_is_not_whole_is_made_again(tmp_path, straight):
    """A tar without its record, one cut off after it, one of zeros, a lost one, half a file."""
    source, expected = straight
    args = [source, "--out", tmp_path / "out", "--size=32", "--shard_size=4"]
    out = tmp_path / "out"
    photos(*args)
    (out / ".plan" / "train-00001.json").unlink()
    (out / "train-00001.tar").write_bytes(b"half")
    cut = (out / "train-00002.tar").read_bytes()
    (out / "train-00002.tar").write_bytes(cut[: len(cut) // 2])
    (out / "train-00003.tar").unlink()
    (out / "train-00005.tar").write_bytes(bytes((out / "train-00005.tar").stat().st_size))
    left_by_a_killed_run(out / "train-00004.tar")
    (out / ".plan" / "train-00004.json").unlink()
    (out / "index.json").unlink()
    kept = (out / "train-00000.tar").stat().st_mtime_ns
    photos(*args)
    assert tree(out) == tree(expected)
    assert (out / "train-00000.tar").stat().st_mtime_ns == kept


def test_a_shard_of_nothing_but_broken_images_is_left_out(tmp_path):
    """A reader would take an empty one for damaged. Run twice: it is not tried again."""
    for i in range(40):
        write(tmp_path / "in" / f"{i}.png", b"no image" * i if i % 2 else encoded(noise(i)))
    photos(tmp_path / "in", "--out", tmp_path / "out", "--size=8", "--shard_size=1")
    before = tree(tmp_path / "out")
    photos(tmp_path / "in", "--out", tmp_path / "out", "--size=8", "--shard_size=1")
    assert tree(tmp_path / "out") == before
    assert len(list((tmp_path / "out").glob("*.tar"))) == len(index(tmp_path / "out")["shards"])
    assert len(samples(tmp_path / "out")) == 20
    ImageStream(f"{tmp_path}/out/*.tar", 8, 1, training=False).check()


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--size=16"], "size 32, not 16"),
        (["--format=png"], "suffix jpg, not png"),
        (["--crop=random"], "crop centre, not random"),
        (["--shard_size=5"], "shard_size 4, not 5"),
        (["--min_side=1"], "min_side 32, not 1"),
        (["--label=cat"], "label photo, not cat"),
    ],
)
def test_other_options_are_refused(straight, more, said):
    source, out = straight
    before = tree(out)
    with pytest.raises(SystemExit, match=f"out was begun with {said}: use another --out"):
        photos(source, "--out", out, "--size=32", "--shard_size=4", *more)
    assert tree(out) == before


def test_other_images_are_refused(tmp_path):
    write_cats(tmp_path / "in", 3)
    photos(tmp_path / "in", "--out", tmp_path / "out", "--size=8")
    write_cats(tmp_path / "in", 4)
    with pytest.raises(SystemExit, match="begun with other images"):
        photos(tmp_path / "in", "--out", tmp_path / "out", "--size=8")


def test_a_second_run_at_the_same_time_is_refused(tmp_path, straight):
    source, _ = straight
    (tmp_path / ".plan").mkdir()
    with (
        shards.only_run(tmp_path / ".plan"),
        pytest.raises(SystemExit, match="another run is writing"),
    ):
        photos(source, "--out", tmp_path, "--size=32", "--shard_size=4")


# ---------------------------------------------------------------------------------------------
# What is said


def test_the_index_tells_what_was_written(straight):
    _, out = straight
    about, found = index(out), samples(out)
    assert about["classes"] == ["photo"] and about["size"] == 32
    assert about["train"] == 57 and about["heldout"] == len(heldout(out)) == 3
    assert about["counts"] == {"photo": {"train": 57, "heldout": 3}} and len(found) == 60
    listing = (out / "heldout.txt").read_bytes()
    assert set(listing.decode().splitlines()) == heldout(out)
    assert about["heldout_hash"] == hashlib.sha256(listing).hexdigest()
    sums = {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in out.glob("*.tar")}
    assert {name: shard["sha256"] for name, shard in about["shards"].items()} == sums
    lines = "".join(f"{digest}  {name}\n" for name, digest in sorted(sums.items()))
    assert about["hash"] == hashlib.sha256(lines.encode()).hexdigest()
    assert sum(shard["images"] for shard in about["shards"].values()) == 60


@pytest.mark.parametrize("there", [True, False])
def test_a_dry_run_writes_nothing(tmp_path, straight, capsys, there):
    source, _ = straight
    out = tmp_path / "out"
    if there:
        out.mkdir()
    capsys.readouterr()
    photos(source, "--out", out, "--size=32", "--shard_size=4", "--dry_run")
    said = capsys.readouterr().out
    assert [file.name for file in tmp_path.rglob("*")] == (["out"] if there else [])
    assert "train: 60 images" in said and "heldout: 3 images" in said  # the broken ones included
    assert "1 duplicate" in said and "nothing was written" in said


def test_the_estimated_size_is_about_right(tmp_path, straight):
    """Two blocks of zeros end a tar, which is filled up to 10 KiB: little in larger shards."""
    source, _ = straight
    sources, _ = PHOTOS.list_photos(source, "photo")
    options = Options(size=32, suffix="jpg", min_side=32, shard_size=1000)
    digests = shards.digests_of(sources, None, 1)
    plan = shards.make_plan(sources, digests, options)
    photos(source, "--out", tmp_path, "--size=32")
    written = sum(path.stat().st_size for path in tmp_path.glob("*.tar"))
    assert shards.try_some(plan, options, None) == pytest.approx(written, rel=0.15)


def test_the_clock_starts_with_the_first_results(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(lmc.progress, "time", SimpleNamespace(monotonic=lambda: now[0]))

    def results() -> Iterator[list[int]]:
        now[0] += 500  # until the processes have started
        for i in range(4):
            yield [i] * 25
            now[0] += 25

    assert len(list(shards.watched("preparing", 1000, results()))) == 100
    said = capsys.readouterr().err.splitlines()
    assert said[-1] == "preparing 100/1000  1.0 images/s  0:15:00 left"


def faults() -> dict[str, tuple[Callable[..., None], list[str], str]]:
    """Scripts, arguments ({} is the folder) and what is said."""
    out = ["--out", "{}/out"]
    return {
        "no folder": (afhq, ["{}/none", *out], r"/none does not exist: name AFHQ's folder"),
        "no photos": (photos, ["{}/none", *out], r"/none does not exist: expected a folder"),
        "no class": (
            *(afhq, ["{}/afhq", *out, "--classes", "cat", "fox"]),
            r"no folder fox in .*/afhq/train, .*/afhq/val: found cat, dog; expected",
        ),
        "no images": (photos, ["{}/empty", *out], r"no images in .*/empty; 1 no image by its suf"),
        "no cats": (afhq, ["{}/empty", *out], r"no folder cat in .*/empty: found no folders"),
        "classes of a flat folder": (
            *(afhq, ["{}/afhq/train/cat", *out, "--classes", "cat", "dog"]),
            r"/train/cat holds images without a folder a class: name the one",
        ),
        "a zip": (afhq, ["{}/a.zip", *out], r"/a\.zip is no folder.*unpack"),
        "a tar.gz": (photos, ["{}/a.tar.gz", *out], r"a\.tar\.gz is not what can be read.*gunzip"),
        "a compressed tar": (photos, ["{}/gz.tar", *out], r"gz\.tar is no whole.*gunzip it"),
        "a cut tar": (photos, ["{}/cut.tar", *out], r"cut\.tar is no whole, uncompressed tar"),
        "out is a file": (photos, ["{}/afhq", "--out", "{}/a.zip"], r"--out .*a\.zip is a file"),
        "out in a file": (photos, ["{}/afhq", "--out", "{}/a.zip/b"], r"/a\.zip is a file"),
        "other shards": (photos, ["{}/afhq", "--out", "{}"], "holds shards that were not made by"),
        "size 0": (photos, ["{}/afhq", *out, "--size=0"], r"--size 0: must be at least 1"),
        "shard size": (photos, ["{}/afhq", *out, "--shard_size=0"], r"--shard_size 0: must be"),
        "all too small": (
            *(photos, ["{}/afhq", *out, "--size=9"]),
            r"none of 32 images tried can be used \(32 too small\).*8 x 8.*--min_side",
        ),
        "all broken": (photos, ["{}/broken", *out], r"none of 1 .*\(1 cannot be read\).*a\.jpg"),
    }


@pytest.fixture(scope="module")
def mistakes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mistakes")
    afhq_folder(folder / "afhq", ("train", "val"))
    write(folder / "empty" / "readme.md", b"")
    write(folder / "a.zip", b"PK")
    write(folder / "a.tar.gz", b"")
    write(folder / "broken" / "a.jpg", b"no image")
    with tarfile.open(folder / "gz.tar", "w:gz") as tar:
        tar.add(folder / "afhq")
    with tarfile.open(folder / "cut.tar", "w") as tar:
        tar.add(folder / "afhq")
    whole = (folder / "cut.tar").read_bytes()
    (folder / "cut.tar").write_bytes(whole[: len(whole) // 2])
    return folder


@pytest.mark.parametrize("fault", faults())
def test_bad_input_is_one_line(mistakes, fault):
    function, args, said = faults()[fault]
    with pytest.raises(SystemExit, match=said) as stopped:
        function(*(arg.format(mistakes) for arg in args))
    assert str(stopped.value).count("\n") == 0
    assert not list((mistakes / "out").glob("*.tar"))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written_to_is_named(tmp_path, straight):
    tmp_path.chmod(0o500)
    with pytest.raises(SystemExit, match="cannot be written to"):
        photos(straight[0], "--out", tmp_path / "out", "--size=32")


@pytest.mark.parametrize(("module", "words"), [(AFHQ, "--classes"), (PHOTOS, "--crop")])
def test_help_is_readable(module, words, capsys):
    with pytest.raises(SystemExit, match="0"):
        module.main(["--help"])
    said = capsys.readouterr().out
    assert words in said and "--dry_run" in said and "heldout" in said
    assert "%(" not in said


def test_what_was_written_trains(straight):
    """Through the project's own reader."""
    _, out = straight
    (key,) = {len(batch.key) for batch in ImageStream(f"{out}/heldout-*.tar", 32, 3, False)}
    assert key == 3
    stream = ImageStream(f"{out}/train-*.tar", 32, 4, training=True)
    stream.check()
    assert next(iter(stream)).image.shape == (4, 3, 32, 32)


def test_the_loader_benchmark_runs(straight, tmp_path, capsys, monkeypatch):
    monkeypatch.syspath_prepend(DATA.parent / "benchmarks")
    import loader

    args = [f"{straight[1]}/train-*.tar", "--size=32", "--batch=4", "--seconds=0.05", "--rounds=2"]
    loader.main([*args, "--workers", "0", "1", f"--json={tmp_path}/rates.json"])
    figures = json.loads((tmp_path / "rates.json").read_text())
    named = ["bare, processes: 1", "workers: 0", "workers: 1"]
    assert [row["name"] for row in figures["rows"]] == named
    assert all(len(row["rounds"]) == 2 and min(row["rounds"]) > 0 for row in figures["rows"])
    table, _, last = capsys.readouterr().out.strip().rpartition("\n")
    assert json.loads(last) == figures and "| workers: 1 |" in table
