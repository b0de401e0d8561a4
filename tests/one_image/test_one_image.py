"""lmc synthesize, edit and gradients as typed: what they write, and what they refuse."""

import json
import re
import shlex
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from test_evaluate import build_clip_folder

import lmc.measure.evaluate
import lmc.measure.metrics
import lmc.one_image.edits
import lmc.one_image.job
import lmc.one_image.synthesis
import lmc.progress
from lmc.cli import joined, load, main, parser_of, types_of
from lmc.filter import FilterCorrector
from lmc.losses import LMC, VSD, Cond, ScoreDistillation
from lmc.measure.metrics import (
    Clip,
    clip_score,
    derivative_histogram,
    distances,
    power_spectrum,
    rmse,
)
from lmc.optimize import Comparison, Editing, Synthesis
from lmc.priors import DiffusersPrior
from lmc.schedule import UniformTime
from lmc.shards.images import decode_image, resize
from lmc.specs import LOSSES

import worlds

BRIEF = ("--settings.steps=4", "--settings.whole_steps=2", "--settings.decay_steps=2")
EDITS = [("wide.png", "a cat", "a dog"), ("tall.jpg", "a cat", "a photo")]


class OwnLMC(LMC):
    """A loss of the user's that takes a corrector."""


class Another(Cond):
    """A loss of the user's, of which is not known what it costs."""

    name = "another"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIP, two pictures and a list of edits of them."""
    folder = tmp_path_factory.mktemp("image")
    build_clip_folder(folder / "clip")
    noise = torch.rand(3, 20, 28, generator=torch.Generator().manual_seed(0)) * 2 - 1
    (folder / "wide.png").write_bytes(worlds.png(noise))
    (folder / "tall.jpg").write_bytes(worlds.png(noise.mT, suffix="jpg"))
    lines = [
        json.dumps({"image": image, "source_prompt": source, "prompt": prompt})
        for image, source, prompt in EDITS
    ]
    (folder / "edits.jsonl").write_text("\n".join(lines) + "\n\n")
    return folder


@pytest.fixture
def prior(tiny_prior_folder) -> list[str]:
    return ["--prior=lmc.priors.DiffusersPrior", f"--prior.pretrained={tiny_prior_folder}"]


@pytest.fixture
def synthesize(prior, tmp_path) -> list[str]:
    args = ["synthesize", *prior, "--loss=SDS", "--prompt=a cat", "--size=24", *BRIEF]
    return [*args, "--snapshot_every=2", f"--out={tmp_path}/out"]


@pytest.fixture
def edit(prior, world, tmp_path) -> list[str]:
    args = ["edit", *prior, "--loss=DDS", "--prompt=a dog", f"--image={world}/wide.png", *BRIEF]
    return [*args, "--snapshot_every=3", f"--out={tmp_path}/out"]


@pytest.fixture
def edits(prior, world, tmp_path) -> list[str]:
    args = ["edits", f"--list={world}/edits.jsonl", *prior, f"--clip={world}/clip", *BRIEF]
    args += ["--losses=sds,lmc:corrector=identity", "--guidance_scales=2,5", "--size=20"]
    return [*args, f"--out={tmp_path}/out"]


def error(*args: object) -> str:
    """The one line that a command ends with, before any weights are loaded."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DiffusersPrior, "_load", lambda *_: pytest.fail("the prior is loaded"))
        with pytest.raises(SystemExit) as caught:
            main([str(arg) for arg in args])
    message = caught.value.code
    assert isinstance(message, str) and message.startswith("lmc: ") and "\n" not in message
    return message


def read(file: Path) -> torch.Tensor:
    return decode_image(file.read_bytes())


def test_help_has_the_commands_and_their_options(capsys):
    for args, words in (
        (["--help"], ["synthesize", "edit", "edits", "gradients", "dreamsampler inpaint"]),
        (["synthesize", "--help"], ["--seeds", "--settings.patch_range", "--loss", "--time"]),
        (["edit", "--help"], ["--image", "--source_prompt", "--config", "--print_config"]),
        (["edits", "--help"], ["--guidance_scales", "--statistics_scale"]),
        (["gradients", "--help"], ["--corrector", "--guidance_scale"]),
    ):
        with pytest.raises(SystemExit) as caught:
            main(args)
        assert caught.value.code == 0
        printed = capsys.readouterr().out
        assert all(word in printed for word in words)


def test_synthesis_writes_pictures_their_progression_and_its_settings(synthesize, tmp_path, capsys):
    main([*synthesize, "--seeds=3,5,8"])
    out = tmp_path / "out"
    images = torch.stack([read(out / f"seed-{seed}.png") for seed in (3, 5, 8)])
    assert images.shape == (3, 3, 24, 24) and images.std((1, 2, 3)).min() > 0.01
    with Image.open(out / "progression.gif") as gif:
        assert gif.n_frames == 3  # after 0, 2 and 4 steps
        assert gif.size == (3 * 26 + 2, 28)
    assert Image.open(out / "progression.png").width == 76 + 3 * 50
    found = json.loads((out / "results.json").read_text())["diversity"]
    expected = rmse(images[1:], images[:1])
    assert found["runs"] == 2 and found["name"] == next(iter(distances(24)))
    if found["name"] == "rmse":  # the pictures are rounded to bytes
        assert found["mean"] == pytest.approx(expected.mean().item(), abs=5e-3)
        assert found["deviation"] == pytest.approx(expected.std(correction=0).item(), abs=5e-3)
    printed, said = capsys.readouterr()
    assert f"of 2 runs to the first: {found['mean']:.3f} ± {found['deviation']:.3f}" in printed
    assert re.search(r"optimising 4/4  [\d.]+ steps/s  0:00:00 left", said)
    # The settings alone make the same image, also of one seed; elsewhere.
    again = tmp_path / "again"
    main(["synthesize", f"--config={out}/settings.yaml", f"--out={again}", "--seeds=5"])
    difference = read(again / "seed-5.png") - images[1]
    assert difference.abs().max() <= 2 / 255 + 1e-6
    assert "diversity" not in json.loads((again / "results.json").read_text())


def test_numbers_and_lists_may_be_written_as_yaml_has_them(synthesize, edits, tmp_path):
    config = tmp_path / "more.yaml"
    for seeds, names in (
        ("3", {"seed-3"}),
        ("[4, 5]", {"seed-4", "seed-5"}),
        ("6,7", {"seed-6", "seed-7"}),
    ):
        config.write_text(f"seeds: {seeds}\n")
        out = tmp_path / names.copy().pop()
        main([*synthesize, f"--config={config}", f"--out={out}"])
        assert {file.stem for file in out.glob("seed-*.png")} == names
    config.write_text("losses: [sds, 'nfsd:negative_prompt=a, b']\nguidance_scales: 5\n")
    listed = [arg for arg in edits if not arg.startswith(("--losses", "--guidance_scales"))]
    main([*listed, f"--config={config}"])
    found = json.loads((tmp_path / "out" / "results.json").read_text())["results"]
    assert {label: list(scales) for label, scales in found.items()} == {
        "sds": ["5"],
        "nfsd:negative_prompt=a, b": ["5"],
    }


def test_a_folder_keeps_its_result(synthesize, tmp_path):
    main(synthesize)
    before = (tmp_path / "out" / "seed-0.png").read_bytes()
    assert "holds another result" in error(*synthesize, "--prompt=a dog")
    main(synthesize)
    assert (tmp_path / "out" / "seed-0.png").read_bytes() == before
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").touch()
    assert "something else" in error(*synthesize, f"--out={tmp_path}/other")


def test_editing_begins_with_the_photo_in_its_own_shape(edit, world, tmp_path):
    main([*edit, "--source_prompt=a cat", "--settings.lr=5e-3", "--seeds=0,1"])
    source, result = read(world / "wide.png"), read(tmp_path / "out" / "seed-0.png")
    assert result.shape == source.shape == (3, 20, 28)
    assert 0 < (result - source).abs().max() < 0.03
    # Two rows under a title; after 0, 3 and 4 steps.
    sheet = Image.open(tmp_path / "out" / "progression.png")
    assert sheet.size == (76 + 3 * 86, 18 + 2 * 62)
    sized = [*edit[:-1], f"--out={tmp_path}/sized", "--size=16", "--source_prompt=a cat"]
    main(sized)
    assert read(tmp_path / "sized" / "seed-0.png").shape == (3, 16, 22)


def test_latents_are_a_renderer(family_folder, synthesize, tmp_path):
    folder = family_folder("sd15")
    size = DiffusersPrior(str(folder)).image_size
    args = [*synthesize, f"--prior.pretrained={folder}", "--renderer=latents"]
    assert f"{size} x {size} pixels" in error(*args)
    main([*args, f"--size={size}"])
    assert read(tmp_path / "out" / "seed-0.png").shape == (3, size, size)


def test_fixed_noise_is_an_option_of_the_loss(synthesize, tmp_path):
    lmc = [*synthesize, "--loss=LMC", "--loss.corrector=identity", "--seeds=0,1"]
    main([*lmc, "--loss.fixed_noise=true"])
    text = (tmp_path / "out" / "settings.yaml").read_text()
    assert "fixed_noise: true" in text


@pytest.mark.parametrize(
    ("raised", "said"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried"), "out of memory: lower the batch"),
        (ImportError("no sentencepiece"), "lmc: no sentencepiece"),
    ],
    ids=["memory", "import"],
)
def test_what_the_machine_lacks_is_said_in_a_line(synthesize, monkeypatch, raised, said):
    def fail(*_, **__):
        raise raised

    monkeypatch.setattr(lmc.one_image.synthesis.Optimization, "run", fail)
    assert said in error(*synthesize)


def test_an_error_of_the_program_keeps_its_traceback(synthesize, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("a bug")

    monkeypatch.setattr(lmc.one_image.synthesis.Optimization, "run", fail)
    with pytest.raises(RuntimeError, match="a bug"):
        main(synthesize)


def test_bad_input_of_synthesis_and_editing(synthesize, edit, world, tmp_path, family_folder):
    assert "must not be negative" in error(*synthesize, "--loss.guidance_scale=-1")
    assert "patches of 25 pixels are larger" in error(*synthesize, "--settings.patch_range=[16,25]")
    assert "snapshot_every must be at least 1" in error(*synthesize, "--snapshot_every=0")
    assert "seeds: 1 comes twice" in error(*synthesize, "--seeds=1,2,1")
    assert "seeds must be numbers" in error(*synthesize, "--seeds=one")
    assert "seeds: there are none" in error(*synthesize, "--seeds=[]")
    assert "seeds must be in [0, 2^63)" in error(*synthesize, f"--seeds={2**63}")
    for command in (synthesize, edit):
        said = error(*command, "--device=cpuu")
        assert "device 'cpuu' cannot be used here: Expected one of cpu, cuda" in said
    assert "size must be at least 8" in error(*synthesize, "--size=4")
    assert "has none" in error(*synthesize, "--renderer=latents")
    assert "--sede" in error(*synthesize, "--sede=1")
    assert "source prompt" in error(*edit)
    assert "no such image" in error(*edit, "--image=none.png")
    broken = tmp_path / "broken.png"
    broken.write_bytes((world / "wide.png").read_bytes()[:200])
    assert str(broken) in error(*edit, f"--image={broken}")
    classes = [*synthesize, f"--prior.pretrained={family_folder('ddpm')}", "--prompt=3"]
    assert "no class 'unicorn'" in error(*classes, "--prompt=unicorn")
    assert error(*classes, "--loss=NFSD").endswith("; set negative_prompt to ''")
    assert not (tmp_path / "out").exists()


def test_a_command_that_failed_late_leaves_its_folder_free(synthesize, tmp_path):
    failing = [*synthesize, "--loss=SDI", "--time=UniformTime", "--seeds=0,1"]
    with pytest.raises(SystemExit, match="one t for the whole batch"):
        main(failing)
    main([*failing, "--time=FallingTime"])
    assert (tmp_path / "out" / "seed-1.png").exists()
    assert "holds another result" in error(*synthesize)


def test_every_edit_of_a_list_is_measured(edits, world, tmp_path, capsys):
    main(edits)
    out = tmp_path / "out"
    found = json.loads((out / "results.json").read_text())
    assert found["results"].keys() == {"sds", "lmc:corrector=identity"}
    clip, name = Clip(str(world / "clip")), found["distance_name"]
    measure = distances(24)[name]
    for label, folder in (("sds", "sds"), ("lmc:corrector=identity", "lmc+corrector=identity")):
        for scale in ("2", "5"):
            rows = found["results"][label][scale]
            for i, (file, _, prompt) in enumerate(EDITS):
                image = read(out / "images" / folder / scale / f"{i:04d}.png")[None]
                source = read(world / file)[:, :, 4:24] if i == 0 else read(world / file)[:, 4:24]
                # The PNGs are rounded to bytes.
                assert rows[str(i)]["distance"] == pytest.approx(
                    measure(image, source[None]).item(), abs=6e-3
                )
                score = clip_score(clip.images(image), clip.texts([prompt])).item()
                assert rows[str(i)]["clip_score"] == pytest.approx(score, abs=6e-3)
            mean = sum(rows[str(i)]["distance"] for i in range(2)) / 2
            assert found["means"][label][scale]["distance"] == pytest.approx(mean)
    for figure in ("fig5.png", "fig6.png"):
        assert Image.open(out / figure).width > 300
        (out / figure).unlink()
    # Four steps of two edits with two losses at two scales.
    # Two of them see two patches; both losses take two evaluations.
    assert "editing 96/96" in capsys.readouterr().err
    # The settings are those of a list again; all is done.
    main(["edits", f"--config={out}/settings.yaml"])
    assert (out / "fig5.png").exists() and "editing" not in capsys.readouterr().err


def test_a_list_goes_on_with_what_is_not_done(edits, tmp_path, monkeypatch):
    runs: list[tuple[str, float, list[int]]] = []
    optimize = lmc.one_image.edits.optimize

    def counted(renderer, **options):
        if len(runs) == 3:
            raise KeyboardInterrupt
        loss = options["loss"]
        runs.append((loss.name, loss.guidance_scale, options["seeds"]))
        return optimize(renderer, **options)

    monkeypatch.setattr(lmc.one_image.edits, "optimize", counted)
    args = [*edits, "--batch_size=1", "--seed=7", "--losses=sds,cond"]
    with pytest.raises(SystemExit) as caught:
        main(args)
    assert caught.value.code == 130  # as of every program that Ctrl-C ends
    first, runs[:] = runs[:], []
    assert first == [("sds", 2, [7]), ("sds", 2, [8]), ("sds", 5, [7])]
    with pytest.raises(SystemExit):
        main(args)
    assert runs == [("sds", 5, [8]), ("cond", 2, [7]), ("cond", 2, [8])]
    runs.clear()
    main([*args, "--losses=sds"])  # what is done makes the figures, without the rest
    assert not runs and (tmp_path / "out" / "fig5.png").exists()
    main([*args, "--batch_size=2"])
    assert runs == [("cond", 5, [7, 8])]
    runs.clear()
    main(args)
    assert not runs
    assert "made with something else (seed)" in error(*args, "--seed=8")


@pytest.fixture
def drawn(monkeypatch) -> dict[str, list]:
    """What the figures were drawn from: their functions' arguments by name, the last command's."""
    import lmc.measure.figures

    given: dict[str, list] = {}

    def noting(name: str) -> None:
        draw = getattr(lmc.measure.figures, name)
        monkeypatch.setattr(
            lmc.measure.figures, name, lambda *args: (given.update({name: args}), draw(*args))[1]
        )

    noting("curves_figure")
    noting("statistics_figure")
    return given


def test_figures_keep_what_earlier_commands_measured(edits, tmp_path, drawn):
    def curves() -> dict[str, list[str]]:
        return {name: [scale for *_, scale in x] for name, x in drawn["curves_figure"][0].items()}

    main([*edits, "--losses=test_one_image.OwnLMC,cond", "--corrector=identity"])
    before = curves(), [*drawn["statistics_figure"][0]]
    assert before[1] == ["source", "test_one_image.OwnLMC", "cond"]
    # The user's own loss is of a module that is gone.
    out = tmp_path / "out"
    text = (out / "results.json").read_text()
    (out / "results.json").write_text(text.replace("test_one_image.OwnLMC", "gone.Loss"))
    (out / "images" / "test_one_image.OwnLMC").rename(out / "images" / "gone.Loss")
    main([*edits, "--losses=sds", "--guidance_scales=10,5"])
    assert curves() == {
        "gone.Loss": ["2", "5"],
        "cond": ["2", "5"],
        "sds": ["5", "10"],
        "source": [""],
    }
    main([*edits, "--losses=cond", "--guidance_scales=2", "--statistics_scale=2"])
    assert [*curves()] == ["gone.Loss", "cond", "sds", "source"]
    assert [*drawn["statistics_figure"][0]] == ["source", "gone.Loss", "cond"]


def test_a_loss_that_failed_is_drawn_in_the_order_it_was_measured(
    edits, monkeypatch, drawn, tmp_path
):
    def failing(*_, **__):
        raise FloatingPointError("not finite")

    with monkeypatch.context() as patch:
        patch.setattr(lmc.one_image.edits, "optimize", failing)
        with pytest.raises(SystemExit, match="failed: sds at 2, sds at 5"):
            main([*edits, "--losses=sds"])
    assert [*drawn["curves_figure"][0]] == ["source"]
    main([*edits, "--losses=cond"])
    main([*edits, "--losses=sds,cond"])
    assert [*drawn["curves_figure"][0]] == ["cond", "sds", "source"]
    assert [*drawn["statistics_figure"][1]] == ["source", "cond", "sds"]


def test_the_time_left_is_by_evaluations_of_the_denoiser(edits, monkeypatch, capsys):
    """Where an evaluation takes a second, it is right from the first line on, after a failure too.

    Of four steps two see two patches. An image and step take 2 evaluations of cond and of a loss
    that is not known, 4 of DDS, 11 of SDI.
    """
    each = {"cond": 2, "dds": 4, "sdi": 11, "another": 2}
    now, ended = [0.0], []

    def ticking(renderer, loss, seeds, settings, watch, **_):
        for step in range(settings.steps):
            now[0] += each[loss.name] * len(seeds) * (1 if step < 2 else 2)
            watch(step + 1)
            if loss.name == "dds" and step == 1:
                ended.append(now[0])
                raise FloatingPointError("not finite")
        return renderer.image.detach()

    monkeypatch.setattr(lmc.one_image.edits, "optimize", ticking)
    monkeypatch.setattr(lmc.progress, "SECONDS", 0.0)
    monkeypatch.setattr(lmc.progress, "time", SimpleNamespace(monotonic=lambda: now[0]))
    losses = "cond,test_one_image.Another,dds,sdi"
    with pytest.raises(SystemExit, match="failed: dds at 5"):
        main([*edits, f"--losses={losses}", "--guidance_scales=5", "--batch_size=1"])
    # Evaluations, of which each takes a second, and what is left.
    lines = [
        re.fullmatch(r"editing (\d+)/(\d+)  .* at 5  1.0 evaluations/s  (\d+):(\d+):(\d+) left", x)
        for x in capsys.readouterr().err.splitlines()
        if x.startswith("editing ")
    ]
    images, whole = 2, 6  # parts of an image in all its steps
    planned = sum(each.values()) * images * whole
    # Of the failed loss's two images 2 of 12 parts were done: 40 evaluations are never made.
    assert len(lines) >= 26 and int(lines[0][2]) == planned and int(lines[-1][2]) == planned - 40
    for line in lines:
        done, total, hours, minutes, seconds = (int(each) for each in line.groups())
        assert hours * 3600 + minutes * 60 + seconds == total - done
    assert done == total == now[0] and ended


def test_a_table_has_means_with_intervals_over_the_edits(edits, world, tmp_path, capsys):
    lines = (world / "edits.jsonl").read_text().splitlines()[:2]
    (world / "seven.jsonl").write_text("\n".join([*lines, *lines, *lines, lines[0]]))
    args = [*edits, f"--list={world}/seven.jsonl", "--batch_size=4"]
    main([*args, "--losses=sds,cond"])
    capsys.readouterr()
    main([*args, "--losses=cond"])  # what was measured before is there too
    out = tmp_path / "out"
    found = json.loads((out / "results.json").read_text())
    text = (out / "table.md").read_text()
    assert text in capsys.readouterr().out

    def cell(values: list[float]) -> str:
        resampled = np.random.default_rng(0).multinomial(7, np.full(7, 1 / 7), 1000) @ values / 7
        low, high = np.percentile(resampled, [2.5, 97.5])
        return f"{np.mean(values):.3f} [{low:.3f}, {high:.3f}]"

    def by_edit(label: str, scale: str, name: str) -> list[float]:
        return [found["results"][label][scale][str(i)][name] for i in range(7)]

    clip = Clip(str(world / "clip"))
    squares = [read(world / "wide.png")[:, :, 4:24], read(world / "tall.jpg")[:, 4:24]]
    texts = [clip.texts([prompt]) for *_, prompt in EDITS]
    untouched = [clip_score(clip.images(x[None]), y) for x, y in zip(squares, texts, strict=True)]
    scores = [untouched[i % 2].item() for i in range(7)]
    assert found["source"] == pytest.approx(sum(scores) / 7, abs=1e-5)
    rows = [
        ["loss", "ω", f"{found['distance_name']} to source", "CLIP score", "spectrum error"],
        ["source", "–", "–", cell(scores), "–"],
    ]
    sources = power_spectrum(torch.stack([squares[i % 2] for i in range(7)])).mean(0)
    for label in ("sds", "cond"):
        for scale in ("2", "5"):
            cells = [cell(by_edit(label, scale, x)) for x in ("distance", "clip_score")]
            files = sorted((out / "images" / label / scale).glob("*.png"))
            spectrum = power_spectrum(torch.stack([read(file) for file in files])).mean(0)
            error = (spectrum / sources).log10().abs().mean().item()
            rows.append([label, scale, *cells, f"{error:.3f}" if scale == "5" else "–"])
            if scale == "5":
                assert found["spectrum_error"]["5"][label] == pytest.approx(error, rel=1e-4)
    table, about = text.strip().split("\n\n")
    lines = table.splitlines()
    assert [line.strip("| ").split(" | ") for line in [lines[0], *lines[2:]]] == rows
    assert about == "[95 % bootstrap intervals] over 7 edits."


def test_image_statistics_are_of_batches_and_the_same(edits, world, tmp_path, monkeypatch, drawn):
    """Not all pictures at once, which for a thousand of 256 x 256 would be 0.8 GB a loss."""
    line = (world / "edits.jsonl").read_text().splitlines()[0]
    (world / "five.jsonl").write_text("\n".join([line] * 5))
    seen = []

    def noted(images: torch.Tensor) -> torch.Tensor:
        seen.append(len(images))
        return power_spectrum(images)

    monkeypatch.setattr(lmc.measure.metrics, "power_spectrum", noted)
    monkeypatch.setattr(lmc.measure.evaluate, "power_spectrum", noted)
    args = [*edits, f"--list={world}/five.jsonl", "--losses=sds", "--guidance_scales=5"]
    main([*args, "--batch_size=2"])
    assert seen == [2, 2, 1, 2, 2, 1]
    images = torch.stack([read(file) for file in sorted((tmp_path / "out/images/sds/5").iterdir())])
    spectra, histograms = drawn["statistics_figure"]
    torch.testing.assert_close(spectra["sds"], power_spectrum(images).mean(0), rtol=1e-6, atol=0)
    assert torch.equal(histograms["sds"], derivative_histogram(images))


def test_a_list_is_of_every_loss_by_default(edits, tmp_path):
    args = [arg for arg in edits if not arg.startswith("--losses")]
    args += ["--corrector=identity", "--guidance_scales=5"]
    main(args)
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    by_default = {name for name, loss in LOSSES.items() if loss.by_default}
    assert set(found["means"]) == by_default and not found["failed"]
    assert all("5" in scales for scales in found["means"].values())


def test_a_list_takes_a_loss_from_outside(edits, tmp_path):
    label = "outside_loss.Repeated:copies=2"
    main([*edits, f"--losses={label}", "--guidance_scales=5"])
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    assert found["means"][label].keys() == {"5"} and not found["failed"]


def test_a_config_that_cannot_be_read_is_said(edit, tmp_path):
    (tmp_path / "text.yaml").write_text("only text")
    for args in (["--config=none.yaml"], [f"--config={tmp_path}/text.yaml"], ["--config"]):
        assert "config" in error(*edit, *args)
    assert "--list" in error("edits", "--list")
    assert "unknown option --list" in error("edit", "--list", "x")


@pytest.mark.parametrize(
    ("option", "name", "one"), [("loss", "LMC", "fixed_noise"), ("renderer", "svg", "paths")]
)
def test_an_option_that_a_class_does_not_have_is_said(option, name, one, capsys):
    args = ["synthesize", f"--{option}={name}", f"--{option}.anw=3"]
    args += ["--prior.pretrained=data/demo/prior", "--prompt=x", "--out=none"]
    said = error(*args)
    assert said.endswith(
        f"{name} has no --{option}.anw: lmc synthesize --{option}.help {name} lists what it has"
    )
    with pytest.raises(SystemExit):
        main(["synthesize", f"--{option}.help", name])
    assert f"--{option}.{one}" in capsys.readouterr().out


def test_a_loss_that_fails_does_not_end_the_others(edits, tmp_path, monkeypatch, capsys):
    optimize = lmc.one_image.edits.optimize
    raised = [FloatingPointError("not finite"), TypeError("odd"), torch.OutOfMemoryError("CUDA")]

    def failing(renderer, **options):
        loss = options["loss"]
        if loss.name == "sds" and options["seeds"] == [1] and raised:
            raise raised.pop(0)
        return optimize(renderer, **options)

    monkeypatch.setattr(lmc.one_image.edits, "optimize", failing)
    args = [*edits, "--losses=sds,cond", "--batch_size=1"]
    with pytest.raises(SystemExit) as caught:
        main(args)
    message = caught.value.code
    assert isinstance(message, str) and "failed: sds at 2, sds at 5" in message
    out = tmp_path / "out"
    found = json.loads((out / "results.json").read_text())
    assert found["failed"]["sds at 2"] == "FloatingPointError: not finite"
    assert found["failed"]["sds at 5"] == "TypeError: odd"
    # A mean is over all edits, or there is none.
    assert "| cond |" in (text := (out / "table.md").read_text()) and "| sds |" not in text
    assert found["means"]["sds"] == {} and found["means"]["cond"].keys() == {"2", "5"}
    assert (out / "fig5.png").exists() and (out / "fig6.png").exists()
    assert "editing 72/72" in capsys.readouterr().err  # of 96, without what failed
    with pytest.raises(SystemExit):
        main(args)
    found = json.loads((out / "results.json").read_text())
    assert found["failed"].keys() == {"sds at 2"}
    assert "lower the batch size" in found["failed"]["sds at 2"]
    main([*args, "--losses=cond"])
    assert json.loads((out / "results.json").read_text())["failed"] == found["failed"]
    main(args)
    found = json.loads((out / "results.json").read_text())
    assert found["failed"] == {} and found["means"]["sds"].keys() == {"2", "5"}


def test_a_list_goes_on_with_the_same_corrector_and_measures_only(
    edits, world, tmp_path, monkeypatch, tiny_prior_folder
):
    corrector = FilterCorrector(3, 16, bins=2, prior={"digest": "another's"})
    corrector.save_pretrained(tmp_path / "filter")
    args = [*edits, f"--corrector={tmp_path}/filter", "--losses=lmc"]
    results = tmp_path / "out" / "results.json"
    with pytest.raises(SystemExit, match="failed: lmc at 2, lmc at 5"):
        main(args)
    assert "valid for the prior" in json.loads(results.read_text())["failed"]["lmc at 5"]
    identity = DiffusersPrior(str(tiny_prior_folder)).identity
    FilterCorrector(3, 16, bins=2, prior=identity).save_pretrained(tmp_path / "filter")
    main(args)
    made = results.read_bytes()
    # The same things by other paths, from elsewhere, and the same losses: nothing is left to do.
    monkeypatch.setattr(lmc.one_image.edits, "optimize", lambda *_, **__: pytest.fail("it is done"))
    monkeypatch.chdir(world)
    (tmp_path / "prior").symlink_to(tiny_prior_folder)
    (tmp_path / "filter").rename(tmp_path / "moved")
    args = [*args, "--list=edits.jsonl", "--clip=clip", f"--prior.pretrained={tmp_path}/prior"]
    args = [*args, f"--corrector={tmp_path}/moved"]
    main(args)
    assert results.read_bytes() == made
    # Another corrector in its place, but only for a loss that was measured with it.
    corrector = FilterCorrector(3, 16, bins=2, prior=identity)
    corrector.offset += 0.1
    corrector.save_pretrained(tmp_path / "moved")
    assert "something else (the corrector of lmc)" in error(*args)
    monkeypatch.undo()
    monkeypatch.chdir(world)
    main([*args, "--losses=sds,test_one_image.OwnLMC", "--guidance_scales=5"])
    assert "something else (the corrector of lmc)" in error(*args, "--losses=sds,lmc")
    measures = distances(24)
    monkeypatch.setattr(lmc.measure.metrics, "distances", lambda size: {"lpips": rmse, **measures})
    assert "something else (distances)" in error(*args, "--losses=sds")


def test_a_command_that_failed_before_measuring_leaves_its_folder_free(edits, tmp_path):
    args = [*edits, "--losses=sds", "--guidance_scales=5"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(SystemExit, match="empty"):
        main([*args, f"--clip={tmp_path}/empty"])
    assert (tmp_path / "out" / "settings.yaml").exists()
    main(args)
    assert (tmp_path / "out" / "fig5.png").exists()


def test_a_loss_of_a_list_may_have_a_schedule_of_its_own(edits, tmp_path, monkeypatch):
    drawn = []
    draw = UniformTime.draw

    def noting(self, *args):
        drawn.append((self.shared, tuple(self.time_range)))
        return draw(self, *args)

    monkeypatch.setattr(UniformTime, "draw", noting)
    given = 'sds,"sds:time=UniformTime:time.shared=true:time.time_range=[0.4, 0.6]"'
    main([*edits, f"--losses={given}", "--guidance_scales=5"])
    # Two whole steps and two of two patches: for each by itself, or one t a step for all.
    assert drawn == [(False, (0.02, 0.98))] * 12 + [(True, (0.4, 0.6))] * 4
    said = error(*edits, "--losses=sds,sdi:time=UniformTime", f"--out={tmp_path}/no")
    assert "the loss 'sdi' needs one t for the whole batch" in said


def test_a_loss_is_built_once_for_a_scale_unless_it_learns(edits, tmp_path, monkeypatch):
    seen: list[ScoreDistillation] = []

    def blurred(renderer, **options):
        seen.append(options["loss"])
        return renderer.image.detach()

    monkeypatch.setattr(lmc.one_image.edits, "optimize", blurred)
    # Two labels that differ in a character that no folder has.
    names = ["nfsd:negative_prompt=a cat", "nfsd:negative_prompt=a_cat", "vsd"]
    main([*edits, f"--losses={','.join(names)}", "--batch_size=1", "--guidance_scales=5"])
    assert seen[0] is seen[1] and seen[2] is seen[3] and seen[0] is not seen[2]
    assert isinstance(seen[4], VSD) and isinstance(seen[5], VSD) and seen[4] is not seen[5]
    assert len([*(tmp_path / "out" / "images").iterdir()]) == 3


def test_a_negative_prompt_that_is_no_class_is_refused_first(edits, family_folder, world, tmp_path):
    line = {"image": str(world / "wide.png"), "source_prompt": "1", "prompt": "3"}
    (tmp_path / "classes.jsonl").write_text(json.dumps(line))
    args = [*edits, f"--list={tmp_path}/classes.jsonl"]
    args += [f"--prior.pretrained={family_folder('ddpm')}"]
    assert error(*args, "--losses=sds,nfsd").endswith("; set negative_prompt to ''")
    assert not (tmp_path / "out").exists()


def test_bad_input_of_a_list(edits, world, tmp_path):
    assert "no such file" in error(*edits, "--list=none.jsonl")
    line = {"image": "gone.png", "source_prompt": "a cat", "prompt": "a dog"}
    file = tmp_path / "list.jsonl"
    for text, expected in (
        (json.dumps(line), "line 1: no such image"),
        ("{", "line 1 is no JSON"),
        (json.dumps({**line, "mask": "x"}), "line 1: an edit has"),
        ("", "no edits"),
    ):
        file.write_text(text)
        assert expected in error(*edits, f"--list={file}")
    assert "unknown loss 'sd'" in error(*edits, "--losses=sd")
    for loss in ("lmc", "test_one_image.OwnLMC"):
        assert f"{loss!r} needs a corrector" in error(*edits, f"--losses={loss}")
    assert "'ms_sds:steps=few': " in error(*edits, "--losses=ms_sds:steps=few")
    assert "guidance_scale is not" in error(*edits, "--losses=sds:guidance_scale=3")
    assert "must not be negative" in error(*edits, "--guidance_scales=5,-1")
    assert "5 is not among" in error(*edits, "--guidance_scales=1")
    assert "batch_size" in error(*edits, "--batch_size=0")
    assert "patches of 21" in error(*edits, "--settings.patch_range=[16,21]")
    assert not (tmp_path / "out").exists()
    said = error(*edits, f"--clip={tmp_path}/gone")
    assert f"no such folder: {tmp_path}/gone (CLIP, as --clip" in said


CONFIGS = [
    file
    for file in sorted((Path(__file__).parents[2] / "configs" / "image").glob("*.yaml"))
    if "lmc dreamsampler" not in file.read_text()  # see test_dreamsampler
]


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.stem)
def test_configs_open_with_a_command_that_takes_them(file):
    """Their keys and types; and the paper's settings are the defaults, written out."""
    header = [line[2:] for line in file.read_text().splitlines() if line.startswith("# ")]
    _, command, *args = shlex.split(header[1])
    function = load(command)
    assert f"--config configs/image/{file.name}" in header[1]
    args[args.index("--config") + 1] = str(file)
    given = parser_of(command, function).parse_args(joined(args, types_of(function)))
    settings = {"synthesize": Synthesis, "edit": Editing, "edits": Comparison}
    assert "Expected:" in "".join(header) or "not run" in "".join(header)
    # Other losses that it names: their options are known.
    for words in re.findall(r"--loss \w+(?: --loss\.\w+ [\w./]+)*", "\n".join(header)):
        parser_of(command, function).parse_args([*joined(args, types_of(function)), *words.split()])
    built = settings[function.__name__](**given.settings.as_dict())
    assert (built == settings[function.__name__]()) == file.stem.startswith("paper")


def test_gradients_are_pictured(prior, world, tmp_path, monkeypatch):
    """The halves of SDS as SDS itself has them, and b's."""
    import lmc.measure.figures
    from lmc.losses import LMC, SDS, LossInputs

    shown = {}
    figure = lmc.measure.figures.gradients_figure
    monkeypatch.setattr(
        lmc.one_image.gradients,
        "gradients_figure",
        lambda rows, names: shown.update(rows) or figure(rows, names),
    )
    args = ["gradients", *prior, f"--image={world}/wide.png", "--prompt=a dog", "--t=0.2,0.7"]
    args += ["--corrector=identity", "--seed=3", "--guidance_scale=4"]
    main([*args, f"--out={tmp_path}/deep/g.png"])
    assert Image.open(tmp_path / "deep" / "g.png").width > 1000
    network = DiffusersPrior(prior[1].split("=")[1])
    network.to("cpu")
    z = resize(read(world / "wide.png")[None, :, :, 4:24], 16)
    eps = torch.randn(z.shape, generator=torch.Generator().manual_seed(3))
    for name, t in (("t = 0.2", 0.2), ("t = 0.7", 0.7)):
        x = LossInputs(z, torch.tensor([t]), eps, network.embed([""]), network.embed(["a dog"]))
        sds = SDS(4).terms(network, x)
        row = shown[name]
        torch.testing.assert_close(row["g_cond"], sds["cond"][0], rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(row["g_proj"], sds["proj"][0], rtol=1e-3, atol=1e-5)
        g_lmc = LMC("identity", 4).terms(network, x)["lmc"][0]
        torch.testing.assert_close(row["g_lmc"], g_lmc, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(row["b(z, t)"] - row["ẑ_t"], g_lmc, rtol=1e-3, atol=1e-4)
    assert "t must be in (0, 1)" in error(*args, "--t=0.5,1.5", f"--out={tmp_path}/g.png")
    assert ".png" in error(*args, f"--out={tmp_path}/g")
