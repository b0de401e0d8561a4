"""Triplets sampled once into shards, and trainings from them."""

import io
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import tracemalloc
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from test_images import write_tar
from torch.utils.data import DataLoader

import train_bias
import train_translator
from lmc.cli import main
from lmc.priors import DiffusersPrior, Embedding
from lmc.schedule import Schedule, add_noise
from lmc.shards.images import ImageStream, resize, write_shard
from lmc.shards.store import TripletSet, draw_for, summary, write_triplets
from lmc.shards.triplets import (
    RECORD,
    TripletBatch,
    TripletStream,
    check_origin,
    read_npy,
    sample_triplets,
    triplet_origin,
)
from lmc.training import bias
from lmc.training.bias import CorrectorTraining

import worlds

TIMES = 3
ROOT = Path(__file__).parents[2]
# float16 keeps 11 bits: rounding to nearest is off by 2^-11 of the value at most, and below its
# smallest normal number by 2^-25. Another batch size moves float32 sums by about 1e-6.
HALF = {"rtol": 2**-11, "atol": 2**-25 + 5e-6}


def write_config(file: Path, prior: Path, world: str, **changes: Any) -> Path:
    """A configuration of stage one; JSON is YAML."""
    model = {
        "prior": {
            "class_path": "lmc.priors.DiffusersPrior",
            "init_args": {"pretrained": str(prior)},
        },
        "widths": [8, 8],
    }
    shards = {"train": f"{world}/train-*.tar", "heldout": f"{world}/heldout-*.tar"}
    content = {"model": model, "data": {**shards, "image_size": 16, "batch_size": 4}} | changes
    file.write_text(json.dumps(content))
    return file


def command(config: Path, out: Path, *more: str) -> list[str]:
    return ["triplets", str(config), f"--out={out}", f"--times_per_image={TIMES}", *more]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return worlds.write_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, tiny_prior_folder: Path, data: str) -> Path:
    return write_config(tmp_path_factory.mktemp("config") / "c.yaml", tiny_prior_folder, data)


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory, config: Path) -> Path:
    """Triplets of `data` and the tiny prior."""
    out = tmp_path_factory.mktemp("triplets") / "set"
    main(command(config, out))
    return out


@pytest.fixture(scope="module")
def prior(tiny_prior_folder: Path) -> DiffusersPrior:
    prior = DiffusersPrior(str(tiny_prior_folder))
    prior.to("cpu")
    return prior


def what(data: str, **changes: Any) -> TripletSet:
    shards = (f"{data}/train-*.tar", f"{data}/heldout-*.tar")
    return TripletSet(shards, **({"image_size": 16, "times_per_image": TIMES} | changes))


def read(shards: str, batch_size: int = 10) -> dict[tuple[str, float], TripletBatch]:
    """All triplets of some shards, one by one."""
    found = {}
    for batch in TripletStream(shards, batch_size, training=False):
        for i, key in enumerate(batch.key):
            part = TripletBatch(batch.z[i], batch.z_hat[i], batch.t[i : i + 1], [key])
            found[key, batch.t[i].item()] = part
    return found


def images(data: str, size: int = 16) -> Iterator[tuple[str, torch.Tensor]]:
    for split in ("train", "heldout"):
        for batch in ImageStream(f"{data}/{split}-*.tar", size, 1, training=False):
            yield batch.key[0], batch.image


def tars(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.glob("*.tar"))}


class Echo:
    """A prior whose z_hat is z_t itself: it tells which z it saw.

    Args:
        channels: of z: 4 is the picture and its mean; 3 is the picture, times `scale`.
    """

    image_size = 16

    def __init__(self, channels: int = 3, scale: float = 1.0, seen: float = 1.0) -> None:
        self.channels, self.scale, self.seen = channels, scale, seen
        self.latent = (channels, scale) != (3, 1.0)
        self.schedule = Schedule(torch.linspace(0.999, 0.01, 100, dtype=torch.float64))
        self.identity = {"pretrained": "echo", "digest": "0", "prediction_type": "sample"}

    def to(self, device):
        pass

    def encode(self, image):
        rows = (image, image.mean(1, keepdim=True))[: self.channels - 2]
        return torch.cat(rows, 1) * self.scale

    def embed(self, prompts):
        return Embedding({"text": torch.zeros(len(prompts), 1)})

    def predict(self, z_t, t, embedding):
        assert len(embedding.tensors["text"]) == len(z_t) == len(t)
        return torch.zeros_like(z_t), z_t * self.seen


# ---------------------------------------------------------------------------------------------
# Writing


def test_stored_triplets_are_those_of_the_prior(stored, data, prior):
    """Every image of both splits at all its times: recomputed one image at a time."""
    found = {name: read(f"{stored}/{name}-*.tar") for name in ("train", "heldout")}
    assert all(key < "01000" for key, _ in found["train"])
    assert all(key >= "01000" for key, _ in found["heldout"])
    both = found["train"] | found["heldout"]
    null = prior.embed([""]).expand(TIMES)
    for key, z in images(data):
        t, eps = draw_for(key, z.shape[1:], what(data))
        expected = sample_triplets(prior, z.expand(TIMES, -1, -1, -1), t, eps, null)
        for i in range(TIMES):
            x = both.pop((key, t[i].item()))
            assert torch.equal(x.z, z[0]), "8 bits hold it exactly"
            torch.testing.assert_close(x.z_hat, expected.z_hat[i], **HALF)
    assert not both


def test_t_and_eps_are_drawn_as_in_training():
    """Uniform, normal; other images, repetitions and seeds get others, and the same the same."""
    some = TripletSet((), 8, 50, (0.2, 0.7))
    t, eps = zip(*(draw_for(f"{i:04d}", (3, 4, 4), some) for i in range(40)), strict=True)
    t, eps = torch.cat(t), torch.cat(eps)
    assert 0.2 <= t.min() < 0.21 and 0.69 < t.max() <= 0.7
    assert len(t.unique()) > 1990, "float32 holds few equal ones among 2000"
    assert t.mean().item() == pytest.approx(0.45, abs=4 * 0.5 / 12**0.5 / 2000**0.5)
    assert eps.mean().item() == pytest.approx(0, abs=4 / eps.numel() ** 0.5)
    assert eps.var().item() == pytest.approx(1, abs=4 * (2 / eps.numel()) ** 0.5)
    fewer = TripletSet((), 8, 2, (0.2, 0.7))
    assert torch.equal(draw_for("0001", (3, 4, 4), fewer)[1], eps[50:52])
    other = TripletSet((), 8, 2, (0.2, 0.7), seed=1)
    assert not set(draw_for("0001", (3, 4, 4), other)[0].tolist()) & set(t.tolist())


@pytest.mark.parametrize(("channels", "scale"), [(3, 1.0), (3, 0.18215), (4, 0.18215)])
def test_z_is_rounded_before_the_prior_sees_it(tmp_path, channels, scale):
    """Pixels to 8 bits, latents (also of three channels) to float16; resized ones are neither."""
    data = worlds.write_world(tmp_path / "data", size=24, count=4)
    echo, some = Echo(channels, scale), what(data, image_size=24)
    write_triplets(echo, some, tmp_path / "out")
    found = read(f"{tmp_path}/out/*.tar")
    with tarfile.open(tmp_path / "out" / "train-00000.tar") as tar:
        members = {name.split(".", 1)[1] for name in tar.getnames()}
    pixels = (channels, scale) == (3, 1.0)
    assert members == {"png" if pixels else "z.npy", "z_hat.npy", "json"}
    for key, image in images(data, 24):
        plain = echo.encode(resize(image, 16))
        t, eps = draw_for(key, (channels, 16, 16), some)
        coefficients = echo.schedule.coefficients(t)
        for i, time_ in enumerate(t.tolist()):
            x = found[key, time_]
            error = (x.z - plain[0]).abs().max()
            assert error <= (0.5 / 127.5 + 1e-6 if pixels else 2**-11 * plain.abs().max())
            at = [c[i] for c in coefficients]
            assert torch.equal(x.z_hat, add_noise(x.z, eps[i], *at).half().float())
            assert not torch.equal(x.z_hat, add_noise(plain[0], eps[i], *at).half().float())


def test_any_number_of_processes_writes_the_same_files(stored, config, tmp_path, monkeypatch):
    """By option and by torchrun's variables."""
    main(command(config, tmp_path, "--rank=1", "--world_size=2"))
    assert set(tars(tmp_path)) == {"train-00001.tar", "heldout-00001.tar"}
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    main(command(config, tmp_path))
    assert tars(tmp_path) == tars(stored)


def test_the_batch_size_changes_the_last_bits_only(stored, config, tmp_path):
    main(command(config, tmp_path, "--batch_size=5"))
    one, other = (read(f"{folder}/*.tar") for folder in (stored, tmp_path))
    assert one.keys() == other.keys()
    for at in one:
        assert torch.equal(one[at].z, other[at].z)
        torch.testing.assert_close(one[at].z_hat, other[at].z_hat, rtol=2**-10, atol=1e-5)


def test_killed_processes_are_gone_on_with(tiny_prior_folder, tmp_path):
    """Two real ones, by SIGKILL; one finishes, and the files are those of a straight run."""
    pictures = [worlds.png(torch.full((3, 16, 16), i / 6)) for i in range(6)]
    for i in range(20):
        samples = [(f"{i:02d}{j}", x, "png", {"label": "x"}) for j, x in enumerate(pictures)]
        write_shard(tmp_path / "data" / f"{'heldout' if i == 19 else 'train'}-{i:05d}.tar", samples)
    config = write_config(tmp_path / "c.yaml", tiny_prior_folder, str(tmp_path / "data"))
    out = tmp_path / "killed"
    args = command(config, out, "--batch_size=1")
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "lmc.cli", *args],
            env={**os.environ, "RANK": str(rank), "WORLD_SIZE": "2"},
            cwd=ROOT,
            stdout=subprocess.DEVNULL,
        )
        for rank in range(2)
    ]
    deadline = time.time() + 120
    while len(list(out.glob("*.tar"))) < 2:
        assert time.time() < deadline and all(p.poll() is None for p in processes)
        time.sleep(0.005)
    for process in processes:
        process.send_signal(signal.SIGKILL)
        process.wait()
    before = {file: file.stat().st_mtime_ns for file in out.glob("*.tar")}
    assert 0 < len(before) < 20, "too fast to be killed half way"
    with pytest.raises(ValueError, match=r"shards of triplets are not there"):
        TripletStream(f"{out}/train-*.tar", 4, training=True)
    main(args)
    # The last of each process may have lacked its counts, and was made again.
    assert sum(file.stat().st_mtime_ns == at for file, at in before.items()) >= len(before) - 2
    main(command(config, tmp_path / "straight", "--batch_size=1"))
    assert tars(out) == tars(tmp_path / "straight") and len(tars(out)) == 20
    assert not list(out.glob("*.partial"))


def test_a_finished_set_is_left_alone_and_summed_up(stored, config, capsys):
    before = {file: file.stat().st_mtime_ns for file in stored.glob("*.tar")}
    main(command(config, stored))
    assert {file: file.stat().st_mtime_ns for file in stored.glob("*.tar")} == before
    said = capsys.readouterr().out
    size = sum(file.stat().st_size for file in before)
    assert "4 of 4 shards done" in said and "48 images, 144 triplets" in said
    assert f"{size / 144 / 1e3:.1f} GB a million" in said and "0 broken" in said


def test_broken_images_are_skipped_and_told(data, config, tiny_prior_folder, tmp_path, capsys):
    """Also by the run that finds the shard done."""
    with tarfile.open(f"{data}/train-00000.tar") as tar:
        files = {m.name: tar.extractfile(m).read() for m in tar}
    files["00003.png"] = files["00003.png"][:60]
    (tmp_path / "data").mkdir()
    write_tar(tmp_path / "data" / "train-0.tar", files)
    write_tar(tmp_path / "data" / "heldout-0.tar", files)
    broken = write_config(tmp_path / "c.yaml", tiny_prior_folder, str(tmp_path / "data"))
    for _ in range(2):
        main(command(broken, tmp_path / "out"))
        said = capsys.readouterr().out
        assert "22 images, 66 triplets" in said and "2 broken samples skipped" in said
        assert "skipped: 00003 in" in said
    write_tar(tmp_path / "data" / "train-0.tar", {n: files[n] for n in ("00003.png", "00003.json")})
    with pytest.raises(SystemExit, match=r"train-0\.tar has no sample that can be read.*00003"):
        main(command(broken, tmp_path / "other"))
    assert not tars(tmp_path / "other")


def test_a_z_hat_beyond_float16_is_an_error(data, tmp_path):
    with pytest.raises(ValueError, match=r"z_hat of 00000 is not finite in float16"):
        write_triplets(Echo(seen=1e6), what(data), tmp_path)
    assert not tars(tmp_path)


def test_other_options_are_refused(
    stored, config, data, tiny_prior_folder, other_prior_folder, tmp_path
):
    """The folder stays as it is, and each message names both values."""
    before = tars(stored)

    def message(file: Path, *more: str) -> str:
        with pytest.raises(SystemExit) as caught:
            main(command(file, stored, *more))
        assert tars(stored) == before
        return str(caught.value.code)

    def changed(**changes: Any) -> Path:
        return write_config(tmp_path / "c.yaml", tiny_prior_folder, data, **changes)

    assert "times_per_image 3 there, 5 now" in message(config, "--times_per_image=5")
    assert "seed 0 there, 7 now" in message(changed(seed_everything=7))
    model = json.loads(config.read_text())["model"]
    narrower = message(changed(model={**model, "time_range": [0.1, 0.9]}))
    assert "time_range [0.02, 0.98] there, [0.1, 0.9] now" in narrower
    line = message(write_config(tmp_path / "c.yaml", other_prior_folder, data))
    assert str(tiny_prior_folder) in line and str(other_prior_folder) in line
    other_data = worlds.write_world(tmp_path / "data")
    assert "shards" in message(write_config(tmp_path / "c.yaml", tiny_prior_folder, other_data))


def test_what_makes_no_sense_is_named(stored, config, data, tiny_prior_folder, tmp_path):
    def message(file: Path, *more: str) -> str:
        with pytest.raises(SystemExit) as caught:
            main(command(file, tmp_path / "out", *more))
        assert not (tmp_path / "out").exists()
        return str(caught.value.code)

    def changed(**changes: Any) -> Path:
        return write_config(tmp_path / "c.yaml", tiny_prior_folder, data, **changes)

    assert "at least 1" in message(config, "--times_per_image=0")
    assert "rank must be in [0, 2)" in message(config, "--rank=2", "--world_size=2")
    assert "no.yaml" in message(tmp_path / "no.yaml")
    assert "no data.heldout" in message(changed(data={"train": "x", "image_size": 16}))
    assert "no model.prior" in message(changed(model=None))
    assert "Nope" in message(changed(model={"prior": {"class_path": "lmc.priors.Nope"}}))
    (tmp_path / "c.yaml").write_text("{")
    assert "no YAML" in message(tmp_path / "c.yaml")
    mine = {"train": f"{stored}/train-*.tar", "heldout": f"{data}/heldout-*.tar", "image_size": 16}
    assert "holds triplets already" in message(changed(data=mine))
    assert "image_size says 32" in message_of_size(changed, data, tmp_path)
    twice = {"train": f"{data}/train-*.tar", "heldout": f"{data}/train-*.tar", "image_size": 16}
    assert "several shards are named train-00000.tar" in message(changed(data=twice))


def message_of_size(changed: Any, data: str, tmp_path: Path) -> str:
    """Found out while reading."""
    shards = {"train": f"{data}/train-*.tar", "heldout": f"{data}/heldout-*.tar"}
    with pytest.raises(SystemExit) as caught:
        main(command(changed(data={**shards, "image_size": 32}), tmp_path / "sized"))
    return str(caught.value.code)


def test_shards_behind_a_command_are_read_and_named(data, prior, stored, tmp_path):
    url = f"pipe:cat {data}/train-00000.tar"
    write_triplets(prior, TripletSet((url,), 16, TIMES), tmp_path)
    assert tars(tmp_path) == {"train-00000.tar": tars(stored)["train-00000.tar"]}
    with pytest.raises(ValueError, match=r"names no NAME\.tar"):
        write_triplets(prior, TripletSet(("pipe:cat x",), 16), tmp_path / "none")
    assert triplet_origin(f"pipe:cat {tmp_path}/train-00000.tar") == triplet_origin(
        f"{stored}/*.tar"
    )


# ---------------------------------------------------------------------------------------------
# Reading


@pytest.mark.parametrize("workers", [0, 3])
def test_a_resumed_stream_goes_on_as_the_straight_one(stored, workers):
    def batches(count: int, start: list[TripletBatch]) -> list[TripletBatch]:
        stream = TripletStream(f"{stored}/train-*.tar", 7, training=True, shuffle=20)
        positions = {worker: (turn, n) for worker, turn, n in (b.position for b in start)}
        stream.resume(len(start), positions)
        loader = DataLoader(stream, batch_size=None, num_workers=workers)
        return list(itertools.islice(loader, count))

    straight = batches(24, [])
    for stop in (1, 6, 13):
        resumed = batches(10, straight[:stop])
        for one, other in zip(resumed, straight[stop : stop + 10], strict=True):
            assert one.key == other.key and one.position == other.position
            assert all(torch.equal(getattr(one, n), getattr(other, n)) for n in ("z", "z_hat", "t"))


@pytest.mark.parametrize(("workers", "world_size"), [(0, 1), (2, 1), (0, 3), (2, 2)])
def test_one_pass_reads_each_triplet_exactly_once(stored, data, workers, world_size):
    counts: Counter[tuple[str, float]] = Counter()
    for rank in range(world_size):
        stream = TripletStream(
            f"{stored}/heldout-*.tar", 5, training=False, rank=rank, world_size=world_size
        )
        for batch in DataLoader(stream, batch_size=None, num_workers=workers):
            counts.update(zip(batch.key, batch.t.tolist(), strict=True))
            assert batch.z.shape == batch.z_hat.shape == (len(batch.key), 3, 16, 16)
            assert {x.dtype for x in (batch.z, batch.z_hat, batch.t)} == {torch.float32}
    assert len(counts) == 24 * TIMES and set(counts.values()) == {1}


def test_training_shuffles_images_and_times(stored):
    """A pass is every triplet once; an image's times are apart, two passes differ."""
    stream = TripletStream(f"{stored}/train-*.tar", 24 * TIMES, training=True, shuffle=1000)
    one, two = itertools.islice(stream, 2)
    assert sorted(one.t.tolist()) == sorted(two.t.tolist()) and one.key != two.key
    assert len(one.t.unique()) == 24 * TIMES
    neighbours = sum(a == b for a, b in itertools.pairwise(one.key))
    assert neighbours < 24, "of 48 that shared an image"


def npy(shape: str, data: bytes = b"", dtype: str = "<f2") -> bytes:
    """A .npy file by its format's description, whatever it holds."""
    head = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    return b"\x93NUMPY\x01\x00" + len(head).to_bytes(2, "little") + head + data


class Command:
    """What a pickle can do."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.file,)


def pickled(file: Path) -> bytes:
    out = io.BytesIO()
    np.save(out, np.array([Command(file)], dtype=object), allow_pickle=True)
    return out.getvalue()


NPY = {
    "a huge shape": npy("(1000000000, 1000000, 3, 16)"),
    "no shape": npy("()", b"12"),
    "a negative shape": npy("(3, -1, 16, 16)", bytes(3 * 3 * 16 * 16 * 2)),
    "no numbers": npy("(0, 3, 16, 16)"),
    "another type": npy("(3, 3, 16, 16)", bytes(3 * 3 * 16 * 16 * 8), "<f8"),
    "not finite": npy("(3, 3, 16, 16)", b"\xff" * (3 * 3 * 16 * 16 * 2)),
    "a code for a shape": npy("__import__('os').system('touch made')"),
    "brackets for a shape": npy("(" * 5000),
    "nothing": b"",
    "a zip": b"PK\x03\x04" + bytes(100),
    "text": b"<html>404</html>",
}
KINDS = ["no z", "no z_hat", "cut z_hat", "another shape", "no t", "half", "pickle", *NPY]
ABOUT = {
    "t is a word": {"t": "abc"},
    "t is out of range": {"t": [0.5, 7.0, 0.5]},
    "t is nested": {"t": [[0.5], 0.5, 0.5]},
    "origin is a word": {"origin": "pipe:touch made"},
    "prior is a word": {"origin": {"prior": "echo", "time_range": [0, 1]}},
}


@pytest.mark.parametrize("kind", [*KINDS, *ABOUT])
def test_a_broken_triplet_is_skipped_and_named(stored, tmp_path, kind):
    with tarfile.open(stored / "train-00000.tar") as tar:
        files = {m.name: tar.extractfile(m).read() for m in tar if m.name < "00003"}
    about = json.loads(files["00001.json"])
    if kind == "no z":
        del files["00001.png"]
    elif kind == "no z_hat":
        del files["00001.z_hat.npy"]
    elif kind == "cut z_hat":
        files["00001.z_hat.npy"] = files["00001.z_hat.npy"][:-100]
    elif kind == "another shape":
        files["00001.png"] = worlds.png(torch.zeros(3, 8, 8))
    elif kind == "no t":
        files["00001.json"] = json.dumps(about | {"t": []}).encode()
    elif kind == "half":
        files["00001.json"] = files["00001.json"][:20]
    elif kind == "pickle":
        files["00001.z_hat.npy"] = pickled(tmp_path / "made")
    elif kind in NPY:
        files["00001.z_hat.npy"] = NPY[kind]
    elif kind in ABOUT:
        files["00001.json"] = json.dumps(about | ABOUT[kind]).encode()
    path = write_tar(tmp_path / "a.tar", files)
    (batch,) = TripletStream(str(path), 2 * TIMES, training=False)
    assert batch.key == ["00000"] * TIMES + ["00002"] * TIMES
    assert len(batch.skipped) == (1 if kind in ("no t", "half", *ABOUT) else TIMES)
    assert all("00001 in" in what for what in batch.skipped)
    assert not (tmp_path / "made").exists()


def test_npy_files_are_read_as_numpy_reads_them():
    rng = np.random.default_rng(0)
    for shape in ((3, 2, 4), (1,), (), (2, 0)):
        array = rng.standard_normal(shape).astype(np.float16)
        for each in (array, np.asfortranarray(array)):
            file = io.BytesIO()
            np.save(file, each)
            np.testing.assert_array_equal(read_npy(file.getvalue()), array)


def test_damaged_npy_files_are_value_errors_and_make_no_room():
    """500 seeded damages, half of them to the header."""
    file = io.BytesIO()
    np.save(file, np.zeros((2, 3, 8, 8), np.float16))
    intact, rng, read = file.getvalue(), random.Random(0), 0
    for i in range(500):
        data = bytearray(intact if i % 5 else intact[: rng.randrange(len(intact))])
        for _ in range(rng.choice((1, 2, 10)) if data and i % 5 else 0):
            data[rng.randrange(min(len(data), 128 if i % 2 else 10**6))] = rng.randrange(256)
        tracemalloc.start()
        try:
            read += read_npy(bytes(data)).nbytes <= len(intact)
        except ValueError:
            pass
        finally:
            _, most = tracemalloc.get_traced_memory()
            tracemalloc.stop()
        assert most < 1e6
    assert 0 < read < 400


def test_the_origin_is_told_past_broken_triplets(stored, tmp_path):
    with tarfile.open(stored / "train-00000.tar") as tar:
        files = {m.name: tar.extractfile(m).read() for m in tar if m.name < "00003"}
    files["00000.json"] = b"{"
    path = str(write_tar(tmp_path / "a.tar", files))
    assert triplet_origin(path) == triplet_origin(f"{stored}/train-*.tar")
    broken = {name: b"{" if name.endswith("json") else data for name, data in files.items()}
    with pytest.raises(ValueError, match=r"no triplet of .*b\.tar can be read, last: 00002 in"):
        triplet_origin(str(write_tar(tmp_path / "b.tar", broken)))


def test_what_the_record_of_a_set_names_is_not_run(stored, tmp_path):
    """Names in triplets.json are looked for in its folder; what it was made of is not at all."""
    out = shutil.copytree(stored, tmp_path / "set")
    record = json.loads((out / RECORD).read_text())
    command = f"pipe:touch {tmp_path}/made"
    for name in record["shards"]:
        record["shards"][name] = command
    (out / RECORD).write_text(json.dumps(record))
    assert summary(out)["shards_done"] == len(record["shards"])
    next(iter(TripletStream(f"{out}/train-*.tar", 4, training=True)))
    record["shards"] |= {command: command}
    (out / RECORD).write_text(json.dumps(record))
    with pytest.raises(ValueError, match="1 of 5 shards of triplets are not there"):
        TripletStream(f"{out}/train-*.tar", 4, training=True)
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("name", ["batch_size", "image_size", "times_per_image", "rank"])
def test_numbers_out_of_range_are_named(tmp_path, name):
    """Before a shard is looked for."""
    given = {"batch_size": 4, "image_size": 16, "times_per_image": 1, "rank": 0} | {
        name: -1 if name == "rank" else 0
    }
    size, times = given.pop("image_size"), given.pop("times_per_image")
    with pytest.raises(ValueError, match=name):
        write_triplets(Echo(), TripletSet(("none.tar",), size, times), tmp_path / "out", **given)
    if name in ("batch_size", "rank"):
        with pytest.raises(ValueError, match=name):
            TripletStream("none.tar", training=True, **given)
    assert not (tmp_path / "out").exists()


def test_triplets_of_two_priors_are_not_mixed(stored, data, tmp_path):
    write_triplets(Echo(), what(data), tmp_path)
    shards = [f"{stored}/train-00000.tar", f"{tmp_path}/train-00000.tar"]
    with pytest.raises(ValueError, match=r"another origin.*echo.*tiny"):
        list(TripletStream(shards, 4, training=False))


def test_shards_of_images_are_no_triplets(stored, data):
    assert triplet_origin(f"{data}/train-*.tar") is None
    origin = triplet_origin(f"{stored}/train-*.tar")
    assert origin is not None and origin["time_range"] == [0.02, 0.98]
    with pytest.raises(ValueError, match=r"KEY\.z_hat\.npy"):
        TripletStream(f"{data}/train-*.tar", 4, training=True).check()


# ---------------------------------------------------------------------------------------------
# Training


def training_args(prior: Path, data: str, run: Path, train: Path, *more: str) -> list[str]:
    """As on images, with one argument changed."""
    return worlds.bias_args(prior, data, run, f"--data.train={train}/train-*.tar", *more)


def last(run: Path) -> dict:
    return torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)


def test_the_gradient_is_that_of_sampling_on_the_fly(stored, data, prior, monkeypatch):
    """The same images, t and eps through both ways of the same module."""
    monkeypatch.setattr(CorrectorTraining, "log", lambda *args, **kwargs: None)
    monkeypatch.setattr(CorrectorTraining, "log_by_time", lambda *args, **kwargs: None)
    torch.manual_seed(0)
    module = CorrectorTraining(prior, (8, 8))
    module.null = prior.embed([""])
    cached = next(iter(TripletStream(f"{stored}/train-*.tar", 8 * TIMES, training=False)))
    (on_the_fly,) = itertools.islice(ImageStream(f"{data}/train-*.tar", 16, 8, training=False), 1)
    repeated = [i for i in range(8) for _ in range(TIMES)]
    on_the_fly.pixels, on_the_fly.key = on_the_fly.pixels[repeated], cached.key
    drawn = [draw_for(key, (3, 16, 16), what(data)) for key in cached.key[::TIMES]]
    t, eps = (torch.cat(part) for part in zip(*drawn, strict=True))
    monkeypatch.setattr(bias, "draw_t_and_eps", lambda *args: (t, eps))

    def gradient(batch: Any) -> torch.Tensor:
        module.zero_grad()
        module.training_step(batch, 0).backward()
        return torch.cat([p.grad.flatten().double() for p in module.network.parameters()])

    one, other = gradient(cached), gradient(on_the_fly)
    # z_hat is off by 2^-11 of itself at most, and so may be a gradient that is linear in it; as the
    # roundings are random, far less is left of their mean over 24 x 768 values.
    assert (one - other).norm() < 2**-11 * other.norm()
    assert not torch.equal(one, other)


def test_a_stopped_training_goes_on_to_the_same_weights(stored, data, tiny_prior_folder, tmp_path):
    """4 + 6 steps equal 10 straight, bit for bit; through two passes."""
    more = ["--data.batch_size=16", "--data.shuffle=20"]
    for run, steps in (("stopped", 4), ("stopped", 10), ("straight", 10)):
        train_bias.main(
            training_args(
                *(tiny_prior_folder, data, tmp_path / run, stored),
                *(*more, f"--trainer.max_steps={steps}", "--trainer.val_check_interval=5"),
            )
        )
    one, other = last(tmp_path / "stopped"), last(tmp_path / "straight")
    assert one["global_step"] == other["global_step"] == 10
    for name, value in one["state_dict"].items():
        assert torch.equal(value, other["state_dict"][name]), name
    assert one["ImageData"] == other["ImageData"]
    assert max(turn for turn, _ in one["ImageData"]["ranks"][0]["positions"].values()) >= 1


def test_the_prior_is_loaded_for_images_only(
    stored, data, tiny_prior_folder, tmp_path, monkeypatch
):
    """Not even its empty prompt is embedded; held-out images still need both."""

    def load(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("the prior was loaded")

    def embed(self: DiffusersPrior, prompts: Sequence[str]) -> Embedding:
        return load()

    monkeypatch.setattr(UNet2DConditionModel, "from_pretrained", load)
    monkeypatch.setattr(DiffusersPrior, "embed", embed)
    args = training_args(tiny_prior_folder, data, tmp_path / "a", stored)
    train_bias.main([*args, f"--data.heldout={stored}/heldout-*.tar"])
    state = last(tmp_path / "a")
    assert state["global_step"] == 4
    with pytest.raises(AssertionError, match="the prior was loaded"):
        train_bias.main(training_args(tiny_prior_folder, data, tmp_path / "b", stored))


def test_heldout_images_measure_a_training_from_triplets(stored, data, tiny_prior_folder, tmp_path):
    cli = train_bias.main(training_args(tiny_prior_folder, data, tmp_path, stored))
    assert cli.trainer.callback_metrics["heldout/identity_loss"] > 0


def test_triplets_of_another_prior_or_time_range_are_refused(
    stored, data, tiny_prior_folder, other_prior_folder, tmp_path
):
    args = training_args(other_prior_folder, data, tmp_path, stored)
    with pytest.raises(SystemExit) as caught:
        train_bias.main(args)
    assert str(tiny_prior_folder) in str(caught.value)
    assert str(other_prior_folder) in str(caught.value)
    args = worlds.bias_args(tiny_prior_folder, data, tmp_path, "--model.time_range=[0.1,0.5]")
    with pytest.raises(SystemExit, match=r"time_range \[0\.02, 0\.98\].*\[0\.1, 0\.5\]"):
        train_bias.main([*args, f"--data.heldout={stored}/heldout-*.tar"])


def test_what_tells_priors_apart():
    """Where the folder lies does not; the weights and how they are read do."""
    mine = {"pretrained": "a", "digest": "1", "prediction_type": "epsilon"}
    origin = {"prior": mine, "time_range": [0.02, 0.98]}
    check_origin(origin, mine | {"pretrained": "b"}, (0.02, 0.98))
    for change in ({"digest": "2"}, {"prediction_type": "sample"}):
        with pytest.raises(ValueError, match="another prior"):
            check_origin(origin, mine | change, (0.02, 0.98))


def test_stage_two_reads_their_pictures_as_images(stored, data, tiny_prior_folder, tmp_path):
    args = worlds.translator_args(tiny_prior_folder, data, tmp_path, "SDS")
    train_translator.main([*args, f"--data.train={stored}/train-*.tar"])
    assert last(tmp_path)["global_step"] == 4


def test_latents_are_read_back_as_float16_stored_them(data, tmp_path):
    write_triplets(Echo(4), what(data), tmp_path)
    batch = next(iter(TripletStream(f"{tmp_path}/train-*.tar", 4, training=True)))
    assert batch.z.shape == (4, 4, 16, 16)
    assert np.array_equal(batch.z.half().float(), batch.z)


def test_stored_latents_are_trained_on_without_the_prior(family_folder, data, tmp_path):
    """Its VAE neither: their pictures are left out, their spectra are not."""
    folder = family_folder("sd15")
    main(command(write_config(tmp_path / "c.yaml", folder, data), tmp_path / "set"))
    run = tmp_path / "run"
    stored = [f"--data.{x}={tmp_path}/set/{x}-*.tar" for x in ("train", "heldout")]
    train_bias.main([*worlds.bias_args(folder, data, run), *stored])
    assert last(run)["global_step"] == 4
    names = {file.name.split("_")[0] for file in (run / "validation").iterdir()}
    assert names == {"spectra"}
