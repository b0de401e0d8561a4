"""The way on photographs of heads: its judge, and on a few pictures all of it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from lmc.measure.metrics import load_classifier
from lmc.shards.images import decode_pixels

ROOT = Path(__file__).parents[2]
PHOTOGRAPHS = ROOT.parent / "shared" / "data" / "faces"
CLASSES = ("bear", "dog", "lion", "squirrel", "tiger", "fox", "wolf")


@pytest.fixture
def judge(monkeypatch):
    pytest.importorskip("efficientnet_lite_pytorch")
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "path", [*sys.path])
    return load_classifier("data.faces.judge:load")


def test_the_judge_says_which_animal_the_likeliest_class_is(judge):
    """Through a last layer that is told what to say; the features are what that one is given."""
    pixels = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    _, features = judge(pixels)
    assert features.shape == (3, 1280) and features.std() > 0.01
    last = judge.network._fc
    for number, name in ((291, "lion"), (292, "tiger"), (207, "dog"), (0, "other"), (277, "fox")):
        last.weight.data.zero_()
        last.bias.data.zero_()
        last.bias.data[number] = 1
        assert judge(pixels)[0] == [name] * 3


@pytest.mark.skipif(not PHOTOGRAPHS.exists(), reason="no photographs beside the repository")
def test_the_judge_knows_photographs(judge):
    for name, least in (("lion", 0.8), ("dog", 0.8), ("fox", 0.8)):
        files = sorted((PHOTOGRAPHS / name).iterdir())[:30]
        pixels = torch.stack([decode_pixels(file.read_bytes()) for file in files])
        called, _ = judge(pixels)
        assert called.count(name) >= least * len(files), name


def test_photographs_of_one_name_are_refused(tmp_path):
    """They would be held out by name among the cats, and by their bytes among all: not the same."""
    for folder in (*(f"heads/{name}" for name in CLASSES), "afhq/train/cat"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / f"{folder[-3:]}.png").touch()
    (tmp_path / "heads/lion/cat.png").touch()
    command = [sys.executable, "data/faces/run.py", "--photographs", str(tmp_path / "heads")]
    command += ["--cats", str(tmp_path / "afhq")]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 1
    assert "1 photographs have another's name, such as cat.png: rename" in result.stderr


@pytest.mark.slow
def test_all_of_it_on_a_few_pictures(tmp_path):
    """In a copy of what it reads, since it works in the repository's folder."""
    pytest.importorskip("efficientnet_lite_pytorch")
    generator = torch.Generator().manual_seed(0)
    folders = [tmp_path / "heads" / name for name in CLASSES] + [tmp_path / "afhq/train/cat"]
    for folder in folders:
        folder.mkdir(parents=True)
        for i in range(44):  # of which two are held out
            noise = torch.randint(256, (40, 40, 3), generator=generator, dtype=torch.uint8)
            Image.fromarray(noise.numpy()).save(folder / f"{folder.name}{i}.png")
    copy = tmp_path / "copy"
    copy.mkdir()
    for name in ("configs", "data", "lmc", "train_bias.py", "train_translator.py"):
        (copy / name).symlink_to(ROOT / name)
    script = copy / "faces.py"  # the script's own root is where it lies
    text = (ROOT / "data/faces/run.py").read_text()
    script.write_text(text.replace("Path(__file__).parents[2]", f"Path({str(copy)!r})"))
    path = f"{copy / 'data/faces'}{os.pathsep}{copy}"
    command = [sys.executable, script, "--photographs", tmp_path / "heads", "--cats"]
    command += [tmp_path / "afhq", "--steps", "2", "--seeds", "0", "--losses", "lmc,sds"]
    subprocess.run([*map(str, command)], check=True, env={**os.environ, "PYTHONPATH": path})
    faces = copy / "runs" / "faces"
    rows = json.loads((faces / "compare/results.json").read_text())["losses"]
    assert set(rows) == {"lmc", "sds"} and "classified" in rows["lmc"]["0"]
    marks = json.loads((faces / "marks.json").read_text())["rows"]
    assert set(marks) == {"source", "real", "samples", "dreamsampler"}
    assert (faces / "report.html").exists()
