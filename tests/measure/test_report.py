"""The report: what stands on the page, what is refused, and the page in a real browser."""

import base64
import html
import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from test_evaluate import build_clip_folder
from torch.utils.tensorboard import SummaryWriter

from lmc.cli import main
from lmc.files import write_json
from lmc.measure.comparison import read_comparison
from lmc.measure.plots import thinned
from lmc.measure.report import _endings
from lmc.measure.results import combine, numbers
from lmc.measure.runs import read_run
from lmc.shards.images import ImageStream, to_uint8, write_shard
from lmc.translator import Translator

import worlds

NAMES = ("one", "two")
NASTY = "x <b>&\"' $y$"  # a name that would break a page that does not escape


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Held-out images, two translators, a folder of images and what was measured of them."""
    folder = tmp_path_factory.mktemp("report")
    worlds.write_world(folder / "shards", count=6)
    build_clip_folder(folder / "clip")
    for seed, name in enumerate(NAMES):
        torch.manual_seed(seed)
        Translator(["dog", "bear"], 16, [8, 8]).save_pretrained(folder / name)
    batch = next(iter(heldout(folder)))
    for name in ("dog", "bear"):
        (folder / NASTY / name).mkdir(parents=True)
        for key, image in zip(batch.key, batch.image, strict=True):
            (folder / NASTY / name / f"{key}.png").write_bytes(worlds.png(-image))
    evaluate(folder, *NAMES)
    return folder


def heldout(world: Path) -> ImageStream:
    return ImageStream(f"{world}/shards/heldout-*.tar", 16, 100, training=False)


def evaluate(world: Path, *names: str, out: str = "results.json", images: str = NASTY) -> None:
    clip = ["--clip", str(world / "clip"), "--offline", "--shards", f"{world}/shards/heldout-*.tar"]
    rows = ["--translator", *(str(world / name) for name in names)]
    more = ["--images", str(world / images)] if images else []
    main(["evaluate", *rows, *more, *clip, "--out", str(world / out)])


@pytest.fixture(scope="module")
def runs(world: Path) -> Path:
    """Run folders: of row 'one', of a second translator, of a corrector; the last says nothing."""
    folder = world / "runs"
    for name, tags in (
        ("one", ("train/loss", "train/l2", "heldout/r_precision")),
        ("another", ("train/loss", "train/l2")),
        ("corrector", ("train/loss", "heldout/loss", "heldout/loss/t0.0", "heldout/loss/t0.4")),
    ):
        with SummaryWriter(folder / name) as writer:
            for step in range(0, 1000, 2):
                for tag in tags:
                    writer.add_scalar(tag, step / 10, step)
        (folder / name / "config.yaml").write_text(f"loss: <{name}>\n")
        session = {
            "began": "2026-01-31T12:00:00+00:00",
            "seconds": 5000.0,
            "from_step": 0,
            "to_step": 998,
            "processes": 2,
            "hardware": "a machine",
            "commit": "0123456789abcdef",
            "dirty": name == "one",
            "versions": {"lmc": "9.9", "torch": "8.8"},
        }
        if name != "corrector":
            later = {**session, "seconds": 3000.0, "to_step": 2000, "hardware": "another one"}
            sessions = {"sessions": [session, later]}
            (folder / name / "about.json").write_text(json.dumps(sessions))
    return folder


def page_of(world: Path, tmp_path: Path, *more: str) -> str:
    out = tmp_path / "report.html"
    main(["report", str(world / "results.json"), "--out", str(out), *more])
    return out.read_text()


def message(*given: str) -> str:
    with pytest.raises(SystemExit) as caught:
        main(["report", *given])
    assert isinstance(caught.value.code, str), "exits with status 1 and a message"
    return caught.value.code


def pixels(address: str) -> np.ndarray:
    kind, _, data = address.partition(";base64,")
    assert kind == "data:image/png"
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))


# ---------------------------------------------------------------------------------------------
# What stands on it


def test_the_page_shows_the_numbers_and_pictures_of_the_result(world, tmp_path):
    text = page_of(world, tmp_path, "--pictures", "4")
    result = json.loads((world / "results.json").read_text())
    for name, row in result["rows"].items():
        for measure in ("rmse", "r_precision", "spectrum_error"):
            cell = row["summary"][measure]
            shown = f"{cell['value']:.3f} <small>[{cell['low']:.3f}, {cell['high']:.3f}]</small>"
            assert shown in text, (name, measure)
    assert result["heldout"]["digest"][:16] in text
    assert "lpips left out" in text and "R-Precision by class" in text
    assert "Differences to one" in text
    # The pictures are those that were measured, of the first keys, in every block.
    found = re.findall(r'data-column="(\d)"><img alt="([^"]*)" src="([^"]*)"', text)
    assert len(found) == 2 * 3 * 4
    batch = next(iter(heldout(world)))
    sources = dict(zip(batch.key, batch.image, strict=True))
    keys = result["heldout"]["keys"][:4]
    for column, caption, address in found:
        name, _, rest = html.unescape(caption).partition(", ")
        key, _, rest = rest.partition(" to ")
        target, _, measured = rest.partition(": ")
        assert key == keys[int(column)]
        if name == NASTY:
            expected = -sources[key]
        else:
            translator = Translator.from_pretrained(world / name).eval()
            ids = translator.class_ids([target])
            with torch.no_grad():
                expected = translator(sources[key][None], ids)[0]
        shown = torch.from_numpy(pixels(address).copy()).permute(2, 0, 1)
        torch.testing.assert_close(shown, to_uint8(expected), atol=1, rtol=0)
        values = result["rows"][name]["per_image"]
        i = keys.index(key)
        assert f"CLIP score {values['clip_score'][target][i]:.3f}" in measured
        assert ("not recognised" in measured) == (values["r_precision"][target][i] == 0)


def test_the_page_needs_nothing_from_elsewhere(world, runs, tmp_path):
    text = page_of(world, tmp_path, "--runs", *(str(x) for x in sorted(runs.iterdir())))
    shown = re.sub(r"<svg .*?</svg>", "", text, flags=re.S)
    addresses = re.findall(r'(?:src|href|action|data)="([^"]*)"', shown)
    assert addresses and all(x.startswith(("data:", "#")) for x in addresses)
    assert not re.search(r"@import|url\((?!#)", text)
    # In the plots only references into themselves; names of XML's namespaces are no addresses.
    for plot in re.findall(r"<svg .*?</svg>", text, flags=re.S):
        links = re.findall(r'(?:href|src)="([^"]*)"', plot) + re.findall(r"url\(([^)]*)\)", plot)
        assert all(x.startswith("#") for x in links)
        assert all(f'id="{x[1:]}"' in plot for x in links)


def test_names_are_escaped(world, tmp_path):
    text = page_of(world, tmp_path)
    assert NASTY not in text and html.unescape(text).count(NASTY) > 10
    scatter = re.search(r"RMSE to source over .*?</svg>", text, re.S)
    assert scatter and NASTY in html.unescape(scatter[0]), "not taken for TeX either"


def test_what_a_result_says_is_text_on_the_page(world, runs, tmp_path):
    """Nothing that a result, or a run that it names, holds becomes a part of the page."""
    evil = '<script>"x"</script><img src=x onerror=alert(1)>'
    result = json.loads((world / "results.json").read_text())
    result["rows"][evil] = result["rows"].pop("two")
    result["differences"][evil] = result["differences"].pop("two")
    result["left_out"].append(evil)
    result["heldout"] |= {"excluded": [evil], "digest": evil, "shards": evil}
    result["settings"]["versions"]["lmc"] = evil
    result["settings"]["clip"] = evil
    run = shutil.copytree(runs / "one", tmp_path / evil.replace("/", "\\"))
    (run / "config.yaml").write_text(f"a: !!python/object/apply:os.mkdir [{tmp_path}/made]\n{evil}")
    about = json.loads((run / "about.json").read_text())
    about["sessions"][-1] |= {"hardware": evil, "versions": {evil: evil}}
    (run / "about.json").write_text(json.dumps(about))
    result["rows"][evil]["path"] = str(run)
    (tmp_path / "results.json").write_text(json.dumps(result))
    out = tmp_path / "report.html"
    main(
        [
            "report",
            str(tmp_path / "results.json"),
            "--pictures=0",
            f"--title={evil}",
            f"--out={out}",
        ]
    )
    text = out.read_text()
    assert html.unescape(text).count(evil) >= 12
    assert "<img src=x" not in text and text.count("<script>") == 1
    assert "!!python" in html.unescape(text) and not (tmp_path / "made").exists()


def test_plots_are_of_the_result_and_in_the_pages_colours(world, runs, tmp_path):
    text = page_of(world, tmp_path, "--runs", str(runs / "one"), str(runs / "corrector"))
    plots = re.findall(r"<figcaption>([^<]*)</figcaption><svg ", text)
    assert [html.unescape(x).split(",")[0] for x in plots] == [
        "RMSE to source over CLIP score",
        "Average power spectrum",
        "Histogram of vertical derivatives",
        "size of the loss's gradient (RMS)",
        "L2 to the source",
        "R-Precision",
        "corrector: L_k of the corrector",
        "corrector: held-out L_k by noise level",
    ]
    assert "#fd000" not in text and "#fe00" not in text
    spectrum = re.search(r"Average power spectrum</figcaption>(<svg .*?</svg>)", text, re.S)
    assert spectrum
    corrector = text[text.index("corrector: L_k of the corrector") :]
    assert "var(--s1)" in corrector and "data-series" not in corrector[: corrector.index("<h2")]
    for i in range(3):
        assert f'data-series="{i}"' in spectrum[1] and f"var(--s{i})" in spectrum[1]


def test_the_page_shows_what_was_measured_against_the_truth(world, tmp_path):
    """Here the pictures of one row are the truth: no distance, and its power over it is 1."""
    out, page = tmp_path / "results.json", tmp_path / "page.html"
    args = ["--images", str(world / NASTY), "--shards", f"{world}/shards/heldout-*.tar"]
    args += ["--truth", str(world / NASTY), "--clip", str(world / "clip"), "--offline"]
    main(["evaluate", *args, "--out", str(out)])
    result = json.loads(out.read_text())
    row = result["rows"][NASTY]
    assert row["spectra"]["all"] == result["truth"]["spectra"]["all"]
    main(["report", str(out), "--out", str(page), "--pictures", "2"])
    text = html.unescape(page.read_text())
    for head in ("RMSE to truth", "lost against truth", "cast against truth"):
        assert f">{head}</th>" in text
    assert "RMSE to truth 0.000" in text and "Average power over the true counterparts'" in text
    assert "<td>0.000 <small>[0.000, 0.000]" in text
    assert "to truth" not in page_of(world, tmp_path)


def test_runs_say_how_they_were_made(world, runs, tmp_path):
    text = html.unescape(page_of(world, tmp_path, "--runs", *(str(x) for x in runs.iterdir())))
    for words in (
        "loss: <one>",
        "2.22 h, in 2 sessions",
        "a machine, then another one",
        "0123456789ab with changes",
        "lmc 9.9, torch 8.8",
        "not recorded",
    ):
        assert words in text


def test_steps_done_again_are_shown_once(tmp_path):
    """A run that was killed at step 9 and went on from its checkpoint of step 4."""
    (tmp_path / "config.yaml").write_text("")
    for number, steps in enumerate((range(10), range(5, 8))):
        with SummaryWriter(tmp_path / "new") as writer:
            for step in steps:
                writer.add_scalar("train/l2", 100 * number + step, step)
        (written,) = (tmp_path / "new").iterdir()
        written.rename(tmp_path / f"events.out.tfevents.{number}")  # by time, as by a later start
    expected = ([*range(8)], [0, 1, 2, 3, 4, 105, 106, 107])
    assert read_run(tmp_path).curves["train/l2"] == expected


def test_curves_are_read_and_thinned(runs):
    run = read_run(runs / "one")
    assert run.translator and not read_run(runs / "corrector").translator
    steps, values = run.curves["train/loss"]
    assert len(steps) == 500 and values[-1] == pytest.approx(99.8)
    thin = thinned(steps, values)
    assert len(thin[0]) == 125 and thin[0][0] == 3 and thin[1][0] == pytest.approx(0.3)
    assert thinned([1], [2.0]) == ([1], [2.0])


def test_prompts_lose_the_words_they_share():
    assert _endings(["a photo of a dog", "a photo of a big cat"]) == ["dog", "big cat"]
    assert _endings(["a dog", "a"]) == ["dog", "a"]
    assert _endings(["a dog"]) == ["a dog"]
    assert _endings(["cat", "catfish"]) == ["cat", "catfish"]


def test_results_are_put_together(world, tmp_path):
    evaluate(world, "one", out="first.json", images="")
    evaluate(world, "two", out="second.json", images="")
    second = json.loads((world / "second.json").read_text())
    second["left_out"].append("kid, fid left out: of the second alone")
    (world / "second.json").write_text(json.dumps(second))
    out = tmp_path / "report.html"
    files = [str(world / x) for x in ("first.json", "second.json")]
    main(["report", *files, "--against", "two", "--pictures", "2", "--out", str(out)])
    text = out.read_text()
    assert "Differences to two" in text
    assert "of the second alone" in text and text.count("lpips left out") == 1
    both = combine({x: json.loads(Path(x).read_text()) for x in files}, "two")
    cell = both["differences"]["one"]["summary"]["rmse"]
    assert f"{cell['value']:+.3f} <small>[{cell['low']:+.3f}, {cell['high']:+.3f}]</small>" in text


# ---------------------------------------------------------------------------------------------
# Of a comparison


@pytest.fixture(scope="module")
def comparison(world: Path) -> Path:
    """A comparison's folder as `lmc compare` leaves it: two seeds of one loss, one of another.

    The third seed failed; a loss failed altogether.
    """
    folder = world / "comparison"
    result = json.loads((world / "results.json").read_text())
    rows = result["rows"]
    here = {"source": ("source", "source")}
    here |= {f"sds/seed{i}": (f"sds seed {i}", name) for i, name in enumerate(NAMES)}
    here["sdi/seed0"] = ("sdi seed 0", NASTY)
    for where, (label, name) in here.items():
        (folder / where).mkdir(parents=True)
        row = {key: value for key, value in rows[name].items() if key != "path"}
        measured = {**result, "rows": {label: row}, "differences": {}}
        write_json(folder / where / "evaluation.json", {"of": {}, "measured": measured})
    sds: dict[str, Any] = {str(i): numbers(rows[name]) for i, name in enumerate(NAMES)}
    losses = {
        "sds": {**sds, "2": {"failed": "why", "log": "log.txt"}},
        "sdi": {"0": {**numbers(rows[NASTY]), "seconds": 12.0, "evaluations_per_image": 2}},
        "dds": {"0": {"failed": "why", "log": "log.txt"}},
    }
    write_json(folder / "results.json", {"source": numbers(rows["source"]), "losses": losses})
    data = {"heldout": f"{world}/shards/heldout-*.tar", "image_size": 16}
    write_json(folder / "comparison.json", {"config": {"data": data}})
    return folder


def test_a_comparison_is_one_result_and_a_table_over_seeds(comparison, world):
    """Of each loss the first seed that was measured; the first loss is compared with."""
    measured = json.loads((world / "results.json").read_text())
    result, seeds = read_comparison(comparison)
    assert list(result["rows"]) == ["source", "sds", "sdi"]
    for label, name in (("sds", "one"), ("sdi", NASTY)):
        assert result["rows"][label]["summary"] == measured["rows"][name]["summary"]
        assert result["rows"][label]["path"] == str(comparison / label / "seed0")
    assert {x["against"] for x in result["differences"].values()} == {"sds"}
    assert result["left_out"][-2:] == ["sds seed 2 failed", "dds seed 0 failed"]
    assert result["heldout"]["image_size"] == 16
    by_name = {line[0]: dict(zip(seeds[0][1:], line[1:], strict=False)) for line in seeds[1:]}
    assert list(by_name) == ["source", "sds (2 of 3 seeds)", "sdi", "dds"]
    values = [measured["rows"][name]["summary"]["rmse"]["value"] for name in NAMES]
    shown = f"{np.mean(values):.3f} ± {np.std(values, ddof=1):.3f}"
    assert by_name["sds (2 of 3 seeds)"]["rmse to source"] == shown
    assert by_name["sdi"]["seconds of training"] == "12"
    assert by_name["dds"]["rmse to source"] == "failed"
    (comparison / "comparison.json").rename(comparison / "elsewhere.json")
    with pytest.raises(FileNotFoundError, match="no finished comparison"):
        read_comparison(comparison)
    (comparison / "elsewhere.json").rename(comparison / "comparison.json")


def test_a_report_needs_no_lightning(comparison, tmp_path):
    """Not of a comparison either, nor to import all of lmc.measure."""
    source = f"""
import importlib, pkgutil, sys
import lmc.measure
for module in pkgutil.iter_modules(lmc.measure.__path__, "lmc.measure."):
    importlib.import_module(module.name)
from lmc.cli import main
main(["report", {str(comparison)!r}, "--pictures", "0", "--out", {str(tmp_path / "r.html")!r}])
names = ("lightning", "pytorch_lightning", "lightning_fabric", "diffusers", "lmc.training")
print([name for name in names if name in sys.modules])
"""
    paths = os.pathsep.join(sys.path)
    done = subprocess.run(
        [sys.executable, "-c", source],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": paths},
    )
    assert done.stdout.splitlines()[-1:] == ["[]"], done.stdout + done.stderr
    assert "sds (2 of 3 seeds)" in (tmp_path / "r.html").read_text()


# ---------------------------------------------------------------------------------------------
# What is refused


def test_what_does_not_fit_is_refused(world, runs, tmp_path):
    results, out = str(world / "results.json"), str(tmp_path / "report.html")
    broken = shutil.copytree(runs / "another", tmp_path / "broken")
    (broken / "about.json").write_text("[]")
    for args, why in (
        ([str(world / "nothing.json")], "no such file or folder"),
        ([str(world / "one" / "config.json")], "no result of lmc evaluate"),
        ([str(runs)], "no finished comparison"),
        ([results, results], "the same is named twice"),
        ([results, "--against", "three"], "no row 'three'"),
        ([results, "--runs", str(world)], "not a run folder"),
        ([results, "--runs", str(broken)], "about.json is not what a training writes"),
        ([results, "--runs", str(runs / "one"), str(world / "one")], "two runs are named 'one'"),
    ):
        assert why in message(*args, "--out", out), args
    with pytest.raises(SystemExit):
        main(["report", results, "--pictures", "-1"])
    assert not Path(out).exists()


def test_pictures_of_something_else_are_refused(world, tmp_path):
    """Weights trained on, other held-out images, files that moved: no picture beside numbers that
    are not its own."""
    copy = tmp_path / "copy"
    shutil.copytree(world, copy)
    evaluate(copy, *NAMES)
    results, out = str(copy / "results.json"), str(tmp_path / "report.html")
    # As far from their sources as those that were measured, but in green instead of red.
    batch = next(iter(heldout(copy)))

    def write(channel: int) -> None:
        for name in ("dog", "bear"):
            (copy / "shifted" / name).mkdir(parents=True, exist_ok=True)
            for key, image in zip(batch.key, batch.image.clone(), strict=True):
                image[channel] -= 0.2 * image[channel].sign()
                (copy / "shifted" / name / f"{key}.png").write_bytes(worlds.png(image))

    write(0)
    evaluate(copy, "one", out="shifted.json", images="shifted")
    write(1)
    said = message(str(copy / "shifted.json"), "--out", out)
    assert "no longer those measured as 'shifted' (" in said and "rmse" not in said
    weights = copy / "two" / "model.safetensors"
    before = weights.read_bytes()
    torch.manual_seed(5)
    Translator(["dog", "bear"], 16, [8, 8]).save_pretrained(copy / "two")
    said = message(results, "--out", out)
    assert "no longer those measured as 'two'" in said and "--pictures 0" in said
    shutil.rmtree(copy / "two")
    assert "two" in message(results, "--out", out)
    shutil.copytree(world / "two", copy / "two")
    assert weights.read_bytes() == before
    shard = copy / "shards" / "heldout-00000.tar"
    batch = next(iter(heldout(copy)))
    (copy / "shards" / "heldout-00001.tar").unlink()
    write_shard(shard, [(batch.key[0], worlds.png(batch.image[0]), "png", {"label": "cat"})])
    assert "are not those that were measured" in message(results, "--out", out)
    main(["report", results, "--pictures", "0", "--out", out])
    assert 'class="picture"' not in Path(out).read_text()


def changed(world: Path, tmp_path: Path, **heldout: Any) -> Path:
    """The result with something else in its 'heldout'."""
    result = json.loads((world / "results.json").read_text())
    result["heldout"] |= heldout
    (tmp_path / "sent.json").write_text(json.dumps(result))
    return tmp_path / "sent.json"


@pytest.mark.parametrize("form", ["{}", "{}::{}", "{{{},x.tar}}", " {}"])
def test_a_command_in_a_result_is_refused(world, tmp_path, form):
    """It was run, with a shell."""
    url = f"pipe:touch {tmp_path}/made; cat {world}/shards/heldout-00000.tar"
    sent = changed(world, tmp_path, shards=form.format(url, url))
    out = tmp_path / "report.html"
    said = message(str(sent), "--out", str(out))
    assert "heldout.shards of the result names" in said and f"touch {tmp_path}/made" in said
    assert "--shards" in said
    for shards in (None, 3, [["x"]]):
        sent = changed(world, tmp_path, shards=shards)
        assert "is no path of shards" in message(str(sent), "--out", str(out))
    assert not (tmp_path / "made").exists() and not out.exists()


def test_a_command_in_a_comparison_is_refused(world, tmp_path):
    """Its comparison.json has the configuration, with the held-out shards."""
    result = json.loads((world / "results.json").read_text())
    out = tmp_path / "compared"
    command = f"pipe:touch {tmp_path}/made"
    contents = {
        "results.json": {"losses": {"one": {"0": {}}}, "source": {}},
        "comparison.json": {"config": {"data": {"heldout": command, "image_size": 16}}},
    }
    rows = {"source": "source", "one seed 0": "one"}
    for name, folder in zip(rows, ("source", "one/seed0"), strict=True):
        measured = {**result, "rows": {name: result["rows"][rows[name]]}, "differences": {}}
        del measured["heldout"]["shards"]
        contents[f"{folder}/evaluation.json"] = {"measured": measured}
        result = json.loads((world / "results.json").read_text())
    for name, content in contents.items():
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text(json.dumps(content))
    said = message(str(out), "--out", str(tmp_path / "report.html"))
    assert "heldout.shards of the result names" in said and command in said
    assert not (tmp_path / "made").exists()


class Command:
    """What a pickle can do."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.file,)


def test_a_checkpoint_that_a_result_names_is_not_run(world, tmp_path):
    run = tmp_path / "run" / "checkpoints"
    run.mkdir(parents=True)
    torch.save({"network": Command(tmp_path / "made")}, run / "last.ckpt")
    result = json.loads((world / "results.json").read_text())
    result["rows"]["two"]["path"] = str(run.parent)
    (tmp_path / "sent.json").write_text(json.dumps(result))
    said = message(str(tmp_path / "sent.json"), "--out", str(tmp_path / "report.html"))
    assert "last.ckpt is no checkpoint that can be read" in said
    assert not (tmp_path / "made").exists()


def test_true_counterparts_stand_beside_the_outputs(world, tmp_path):
    """As measured against; others are refused, and a folder that is gone is left out."""
    truth, out = tmp_path / "truth", tmp_path / "report.html"
    batch = next(iter(heldout(world)))
    for name, sign in (("dog", 1), ("bear", -1)):
        (truth / name).mkdir(parents=True)
        for key, image in zip(batch.key, batch.image, strict=True):
            (truth / name / f"{key}.png").write_bytes(worlds.png(image.roll(3, 2) * sign))
    shards = ["--shards", f"{world}/shards/heldout-*.tar", "--clip", "none"]
    results = str(tmp_path / "results.json")
    given = ["--translator", str(world / "one"), "--truth", str(truth), "--out", results]
    main(["evaluate", *given, *shards, "--offline"])
    main(["report", results, "--out", str(out)])
    found = re.findall(
        r'<img alt="(\S+) as a (\w+), its true counterpart" src="([^"]+)"', out.read_text()
    )
    assert len(found) == 2 * len(batch.key)
    for key, name, address in found:
        there = np.asarray(Image.open(truth / name / f"{key}.png"))
        assert (pixels(address) == there).all()
    for file in (truth / "dog").iterdir():
        file.write_bytes((truth / "bear" / file.name).read_bytes())
    assert "(truth_rmse)" in message(results, "--out", str(out))
    shutil.rmtree(truth)
    main(["report", results, "--out", str(out)])
    assert "its true counterpart" not in out.read_text()


def test_the_user_may_say_where_the_pictures_lie(world, tmp_path):
    """By a command too; they must be the same pictures all the same."""
    sent = changed(world, tmp_path, shards="moved/heldout-*.tar")
    out = tmp_path / "report.html"
    assert "no shards at moved/" in message(str(sent), "--out", str(out))
    command = f"pipe:touch {tmp_path}/made; cat {world}/shards/heldout-{{00000..00001}}.tar"
    main(["report", str(sent), "--shards", command, "--pictures=2", "--out", str(out)])
    assert out.read_text().count('class="picture"') == 2 * 3 * 2 and (tmp_path / "made").exists()
    other = f"{world}/shards/train-*.tar"
    assert "not those that were measured" in message(
        str(sent), "--shards", other, "--out", str(out)
    )


@pytest.mark.parametrize("path", ["someone/translator", "https://somewhere/x", "pipe:touch made"])
def test_what_a_result_was_made_with_is_not_fetched(world, tmp_path, path, monkeypatch):
    def fetched(*_: object, **__: object) -> None:
        raise AssertionError("asked the hub")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("lmc.hub.hf_hub_download", fetched)
    result = json.loads((world / "results.json").read_text())
    result["rows"]["two"]["path"] = path
    (tmp_path / "sent.json").write_text(json.dumps(result))
    said = message(str(tmp_path / "sent.json"), "--out", str(tmp_path / "report.html"))
    assert f"{path}, which the row 'two' was made with, is no folder here" in said
    assert "--pictures 0" in said and [x.name for x in tmp_path.iterdir()] == ["sent.json"]


def test_a_folder_that_no_training_wrote_is_not_shown(world, tmp_path):
    """A result that somebody sent may name any folder; its config.yaml may hold a password."""
    private = tmp_path / "private"
    private.mkdir()
    (private / "config.yaml").write_text("password: open sesame")
    result = json.loads((world / "results.json").read_text())
    result["rows"]["two"]["path"] = str(private)
    (tmp_path / "sent.json").write_text(json.dumps(result))
    out = tmp_path / "report.html"
    main(["report", str(tmp_path / "sent.json"), "--pictures=0", "--out", str(out)])
    assert "sesame" not in out.read_text()
    assert "not a run folder" in message(str(tmp_path / "sent.json"), "--runs", str(private))


# ---------------------------------------------------------------------------------------------
# In a browser


@pytest.fixture(scope="module")
def file(world: Path, runs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page with everything."""
    folder = tmp_path_factory.mktemp("page")
    page_of(world, folder, "--runs", *(str(x) for x in sorted(runs.iterdir())))
    return folder / "report.html"


@pytest.mark.parametrize("width", [1300, 390])
def test_the_page_in_a_browser(browser, file, width):
    page = browser.new_page(viewport={"width": width, "height": 800})
    wrong: list[str] = []
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("console", lambda said: wrong.append(said.text))
    page.on("request", lambda it: it.url[:5] in ("data:", "file:") or wrong.append(it.url))
    page.goto(file.as_uri())
    # All pictures load, nothing is wider than the window.
    sizes = page.evaluate("[...document.querySelectorAll('.strip img')].map(x => x.naturalWidth)")
    assert sizes and set(sizes) == {16}
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    # A click enlarges a picture; the slider moves the edge between source and result.
    page.locator(".picture").nth(7).click()
    dialog = page.locator("dialog")
    assert dialog.is_visible()
    caption = page.locator(".picture").nth(7).locator("img").get_attribute("alt")
    assert dialog.locator("p").inner_text() == caption
    box = dialog.locator("input").bounding_box()
    lefts = []
    for share in (0.25, 0.75):
        page.mouse.click(box["x"] + share * box["width"], box["y"] + box["height"] / 2)
        value = float(dialog.locator("input").input_value())
        assert value == pytest.approx(100 * share, abs=4)
        assert dialog.locator(".under").evaluate("x => x.style.clipPath") == (
            f"inset(0px {100 - value:g}% 0px 0px)"
        )
        lefts.append(dialog.locator(".edge").bounding_box()["x"])
    stage = dialog.locator(".stage").bounding_box()["width"]
    assert lefts[1] - lefts[0] == pytest.approx(stage / 2, rel=0.1)
    # The source beneath is that of the same column, whichever picture is looked at.
    for _ in range(2):
        dialog.locator(".next").click()
    shown = dialog.locator(".result").get_attribute("src")
    assert shown == page.locator(".picture").nth(9).locator("img").get_attribute("src")
    under = dialog.locator(".under").get_attribute("src")
    assert under == page.locator(".source").nth(9 % 6).get_attribute("src")
    page.keyboard.press("Escape")
    assert not dialog.is_visible()
    # A row by itself in all plots, and back.
    button = page.locator(".legend button").nth(1)
    button.click()
    page.mouse.move(0, 0)
    faded = page.locator("#plots ~ .plots .series").evaluate_all(
        "all => all.map(x => [x.dataset.series, x.classList.contains('on')])"
    )
    assert faded and all((series == "1") == on for series, on in faded)
    assert {series for series, _ in faded} >= {"0", "1", "2"}
    button.click()
    page.mouse.move(0, 0)
    assert not page.evaluate("document.body.classList.contains('highlighting')")
    assert wrong == []
    page.close()


def test_the_page_is_dark_where_the_system_is_and_light_on_paper(browser, file):
    page = browser.new_page(color_scheme="dark")
    page.goto(file.as_uri())

    def brightness() -> tuple[float, float]:
        of = "x => getComputedStyle(document.body)[x].match(/\\d+/g).slice(0, 3).map(Number)"
        back, ink = (sum(page.evaluate(of, x)) / 765 for x in ("backgroundColor", "color"))
        return back, ink

    back, ink = brightness()
    assert back < 0.2 and ink > 0.8
    page.emulate_media(media="print")
    back, ink = brightness()
    assert back == 1 and ink == 0
    page.close()
