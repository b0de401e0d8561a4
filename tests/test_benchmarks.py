"""The benchmarks run; what they measure is for who runs them."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.profiler import ProfilerActivity, profile, record_function

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


def test_a_profile_counts_each_operation_for_the_innermost_part(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import profiled

    x = torch.randn(400, 400)
    with profile(activities=[ProfilerActivity.CPU], acc_events=True) as found:
        with record_function("Adam"):  # as Lightning runs all of a step within the optimizer's
            with record_function("rest of the step"), record_function("denoiser"):
                for _ in range(20):
                    x @ x
            x.sort()
        x.cumsum(0)
    times, operations = profiled.parts_of(found.events(), steps=2)
    total = sum(event.self_cpu_time_total for event in found.events()) / 1e3 / 2
    assert sum(times.values()) == pytest.approx(total)
    assert set(times) == {"Adam", "denoiser", "rest of the step", "rest of the loop"}
    assert {"aten::cumsum", "Python"} <= set(operations)
    assert not {"aten::mm", "aten::sort"} & set(operations)
    products = [event for event in found.events() if event.name == "aten::mm"]
    alone = sum(event.self_cpu_time_total for event in products) / 1e3 / 2
    assert alone <= times["denoiser"] < total
