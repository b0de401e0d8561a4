"""The benchmarks run; what they measure is for who runs them."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_steps_of_the_published_sizes_in_small(tmp_path):
    """Both kinds of prior, both stages; every part is timed."""
    command = [sys.executable, ROOT / "benchmarks/gpu.py", "--out", tmp_path, "--small"]
    command += ["--steps=6", "--batch=2", "--compile", "false", "--json", tmp_path / "rows.json"]
    subprocess.run([*map(str, command)], check=True, cwd=ROOT)
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert {name.split(",")[0] for name in rows} == {"if-m", "sd15"} and len(rows) == 8
    for name, times in rows.items():
        parts = {"step", "denoiser", "network, Adam"}
        parts |= {"corrector"} if "LMC" in name else set()
        parts |= {"VAE"} if name.startswith("sd15") else set()
        parts |= set() if "stage one" in name else {"plain loop"}
        assert set(times) == parts and min(times.values()) > 0
