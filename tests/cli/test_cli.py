"""The command line, as typed: files written, tables printed, errors in one line."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from test_evaluate import build_clip_folder
from test_release import averaged, corrector_run, translator_run

from lmc.cli import main
from lmc.filter import FilterCorrector
from lmc.load import load_corrector
from lmc.measure.correctors import evaluate_corrector
from lmc.priors import DiffusersPrior
from lmc.shards.images import ImageStream, decode_image, resize, to_uint8
from lmc.translator import Translator

import worlds
from worlds import release

OPTIONS = {
    "evaluate": "--translator --images --shards --real --clip --classes --source --prompt "
    "--candidates --against --beside --batch_size --num_workers --device --offline --out "
    "--named_by_prompt --eval_json",
    "translate": "IMAGES --translator --to --out --sheet --overwrite --batch_size --device",
    "release": "RUN --out --results --row --unmeasured --picture --license --license_name "
    "--license_link --data --prior_license",
    "closed_form": "TRAINING --config --out --triplets --bins --batch_size --seed --each_channel "
    "--statistics --device",
    "triplets": "TRAINING --config --out --times_per_image --batch_size --rank --world_size",
    "compare": "TRAINING --config --losses --seeds --out --clip --jobs --device --overrides",
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two releases, a run, shards and a CLIP."""
    folder = tmp_path_factory.mktemp("cli")
    torch.manual_seed(0)
    release(translator_run(folder / "run"), folder / "first")
    release(translator_run(folder / "other_run"), folder / "second")
    release(corrector_run(folder / "bias"), folder / "corrector")
    worlds.write_world(folder / "shards")
    build_clip_folder(folder / "clip")
    return folder


@pytest.fixture
def inputs(tmp_path: Path) -> tuple[Path, Path]:
    """A wide PNG, whose middle 20 x 20 are not as its sides, and a tall greyscale JPEG."""
    noise = torch.rand(3, 20, 40, generator=torch.Generator().manual_seed(0)) * 2 - 1
    noise[:, :, :10] = noise[:, :, 30:] = 1
    wide, tall = tmp_path / "wide.png", tmp_path / "tall.jpg"
    wide.write_bytes(worlds.png(noise))
    tall.write_bytes(worlds.png(noise.mT, mode="L", suffix="jpg"))
    return wide, tall


def own_output(capsys: pytest.CaptureFixture) -> list[str]:
    """What was printed, but for a line of huggingface_hub's."""
    lines = capsys.readouterr().out.splitlines()
    return [line for line in lines if line != "Loading weights from local directory"]


def error(capsys: pytest.CaptureFixture, *args: object) -> str:
    """The one line that a command ends with."""
    with pytest.raises(SystemExit) as caught:
        main([str(arg) for arg in args])
    message = caught.value.code
    assert isinstance(message, str), "exits with status 1 and a message"
    assert message.startswith("lmc: ") and "\n" not in message
    assert not own_output(capsys), "nothing was done before"
    return message


@pytest.mark.parametrize("command", list(OPTIONS))
def test_help_names_every_option(capsys, command):
    with pytest.raises(SystemExit) as caught:
        main([command, "--help"])
    assert caught.value.code == 0
    words = capsys.readouterr().out
    assert all(option in words for option in OPTIONS[command].split())


def test_help_runs_without_torch():
    """As installed, and `import lmc` alone waits for nothing heavy."""
    out = subprocess.run(
        [sys.executable, "-m", "lmc.cli", "--help"], capture_output=True, text=True, check=True
    ).stdout
    assert all(command in out for command in OPTIONS)
    check = (
        "import sys, lmc, lmc.cli; lmc.cli.overview(list(lmc.cli.COMMANDS))\n"
        "heavy = {'torch', 'diffusers', 'transformers', 'numpy', 'PIL'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "assert lmc.Translator.__name__ == 'Translator' and 'torch' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", check], check=True)


@pytest.mark.parametrize("network", ["first", "run"])
def test_translate_writes_a_picture_a_class(world, inputs, tmp_path, capsys, network):
    """From a release or a run; the middle square of each input, through the network itself."""
    out = tmp_path / "deep" / "out"
    main(["translate", *map(str, inputs), "--translator", f"{world}/{network}", "--out", str(out)])
    names = {f"{stem}-{name}.png" for stem in ("wide", "tall") for name in ("dog", "bear")}
    assert {path.name for path in out.iterdir()} == names
    translator = Translator.from_pretrained(world / "first").eval()
    for stem, crop in (("wide", (10, 0, 30, 20)), ("tall", (0, 10, 20, 30))):
        file = next(path for path in inputs if path.stem == stem)
        square = tmp_path / "square.png"
        Image.open(file).convert("RGB").crop(crop).save(square)
        source = resize(decode_image(square.read_bytes())[None], 16)
        for i, name in enumerate(("dog", "bear")):
            picture = Image.open(out / f"{stem}-{name}.png")
            assert picture.size == (16, 16) and picture.mode == "RGB"
            with torch.no_grad():
                expected = to_uint8(translator(source, torch.tensor([i])))[0]
            written = to_uint8(decode_image((out / f"{stem}-{name}.png").read_bytes()))
            # Another batch size may round one value to the next byte.
            assert (written.int() - expected.int()).abs().max() <= 1
    assert "translating 2/2" in capsys.readouterr().err


def test_translate_to_one_class(world, inputs, tmp_path):
    out = tmp_path / "out"
    args = ["translate", str(inputs[0]), "--translator", f"{world}/first", "--to", "bear"]
    main([*args, "--out", str(out)])
    assert [path.name for path in out.iterdir()] == ["wide-bear.png"]


def test_translate_says_what_is_wrong_before_any_work(world, inputs, tmp_path, capsys):
    def message(*inputs: object, network: str = "first", more: tuple[str, ...] = ()) -> str:
        out = tmp_path / "out"
        line = error(
            capsys, "translate", *inputs, "--translator", world / network, "--out", out, *more
        )
        assert not out.exists()
        return line

    unknown = message(inputs[0], more=("--to", "horse"))
    assert "'horse'" in unknown and "dog, bear" in unknown
    assert "missing.png" in message(*inputs, "missing.png")
    assert "Corrector, not a Translator" in message(inputs[0], network="corrector")
    assert "no config.json" in message(inputs[0], network="shards")


def test_translate_keeps_what_is_there_unless_told_to_replace_it(world, inputs, tmp_path, capsys):
    out, sheet = tmp_path / "out", tmp_path / "sheet.png"
    out.mkdir()
    (out / "tall-bear.png").write_text("mine")
    args = ("translate", *inputs, "--translator", world / "first", "--out", out)
    said = error(capsys, *args)
    assert said == f"lmc: {out}/tall-bear.png is there: name another place, or --overwrite it"
    assert [file.read_text() for file in out.iterdir()] == ["mine"]
    sheet.write_text("mine")
    assert f"{sheet} is there" in error(capsys, *args, "--to", "dog", "--sheet", sheet)
    main([*map(str, args), "--overwrite", f"--sheet={sheet}"])
    assert len(list(out.iterdir())) == 4 and Image.open(out / "tall-bear.png").size == (16, 16)
    # The source and each class beside it, 16 pixels as 96, by row.
    shown = Image.open(sheet)
    assert shown.size == (3 * 100 + 4, 2 * 100 + 16)
    for row, stem in enumerate(("wide", "tall")):
        for column, name in ((1, "dog"), (2, "bear")):
            box = (4 + 100 * column, 16 + 100 * row, 100 + 100 * column, 112 + 100 * row)
            tile = shown.crop(box).resize((16, 16), Image.Resampling.NEAREST)
            assert tile.tobytes() == Image.open(out / f"{stem}-{name}.png").tobytes()


def test_translate_reads_and_writes_pipes(world, inputs, tmp_path):
    """One picture, and not a byte beside it, whatever the libraries say."""
    args = [sys.executable, "-m", "lmc.cli", "translate", "-", "--translator", f"{world}/first"]
    piped = subprocess.run(
        [*args, "--to=bear", "--out", "-"], input=inputs[0].read_bytes(), capture_output=True
    )
    assert piped.returncode == 0, piped.stderr
    main(["translate", str(inputs[0]), f"--translator={world}/first", f"--out={tmp_path}/out"])
    assert piped.stdout == (tmp_path / "out" / "wide-bear.png").read_bytes()
    broken = subprocess.run([*args, "--to=bear", "--out=-"], input=b"no", capture_output=True)
    assert broken.returncode == 3 and not broken.stdout
    assert b"1 of 1 files cannot be read: standard input: in no known format" in broken.stderr


def test_translate_writes_one_picture_to_a_pipe(world, inputs, tmp_path, capsys):
    for more, said in (([], "1 to 2 classes"), ([inputs[1], "--to", "dog"], "2 to 1 classes")):
        args = ("translate", inputs[0], *more, "--translator", world / "first", "--out", "-")
        assert f"--out - is for one picture, not {said}" in error(capsys, *args)


def test_translate_keeps_alpha_and_orientation(world, tmp_path):
    picture = Image.radial_gradient("L").resize((20, 30)).convert("RGBA")
    picture.putalpha(Image.linear_gradient("L").resize((20, 30)))
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    picture.save(tmp_path / "a.png", exif=exif)
    args = ["--translator", f"{world}/first", "--to", "dog", "dog", "--out", str(tmp_path / "out")]
    main(["translate", str(tmp_path / "a.png"), *args, f"--sheet={tmp_path}/sheet.png"])
    (made,) = (tmp_path / "out").iterdir()
    alpha = torch.tensor(list(Image.open(made).getchannel("A").tobytes())).view(16, 16)
    assert (alpha.diff(dim=0) < 0).all(), "of the middle square, turned"
    assert 255 * 0.75 < alpha[0, 0] < 255 * 0.85 and alpha[:, :1].eq(alpha).all()
    assert Image.open(tmp_path / "sheet.png").size == (2 * 100 + 4, 100 + 16)


@pytest.mark.parametrize("device", ["cpuu", "cuda:99"])
def test_a_device_that_cannot_be_used_is_said_in_a_line(inputs, tmp_path, capsys, device):
    command = ("translate", inputs[0], "--translator=none", f"--out={tmp_path}/out")
    said = error(capsys, *command, f"--device={device}")
    assert said.startswith(f"lmc: device '{device}' cannot be used here: ")


def test_inputs_of_one_name_do_not_overwrite_each_other(world, inputs, tmp_path):
    """a/wide.png and b/wide.png: both are written, or it is an error."""
    other = tmp_path / "b" / "wide.png"
    other.parent.mkdir()
    other.write_bytes(inputs[1].read_bytes())
    out = tmp_path / "out"
    args = ["translate", str(inputs[0]), str(other), "--translator", f"{world}/first"]
    try:
        main([*args, "--to", "dog", "--out", str(out)])
    except SystemExit as stopped:
        assert "wide" in str(stopped.code)
    else:
        assert len(list(out.iterdir())) == 2


def evaluate_args(world: Path, *translators: str) -> list[str]:
    paths = [str(world / name) for name in translators]
    return [
        *("evaluate", "--shards", f"{world}/shards/heldout-*.tar", "--clip", f"{world}/clip"),
        *("--offline", "--batch_size", "7", "--translator", *paths),
    ]


def test_evaluate_writes_a_row_a_translator(world, tmp_path, capsys):
    out = tmp_path / "rows.json"
    main([*evaluate_args(world, "first", "other_run"), "--out", str(out)])
    rows = json.loads(out.read_text())["rows"]
    assert list(rows) == ["source", "first", "other_run"]
    assert all(row["images"] == 24 for row in rows.values())
    distance = {name: row["summary"]["rmse"]["value"] for name, row in rows.items()}
    assert distance["source"] == 0 < distance["first"] != distance["other_run"]
    assert rows["first"].keys() == rows["source"].keys() | {"path"}
    printed = own_output(capsys)
    assert printed[0].startswith("|  | RMSE to source | 1 − SSIM to source | CLIP score (")
    keys = ("rmse", "one_minus_ssim", "clip_score", "clip_score_100", "r_precision")
    for line, (name, row) in zip(printed[2:5], rows.items(), strict=True):
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        assert cells[0] == name
        for cell, key in zip(cells[1:], keys, strict=False):
            about = row["summary"][key]
            # Printed with one to three decimals.
            shown = [float(x) for x in re.findall(r"-?[\d.]+", cell)]
            expected = [about["value"], about["low"], about["high"]]
            assert shown == pytest.approx(expected, abs=0.06 if key == "clip_score_100" else 6e-4)


def test_releases_of_one_name_keep_a_row_each(world, tmp_path):
    """a/release and b/release: two rows, or an error, never one of them lost."""
    for name in ("a", "b"):
        release(world / "run", tmp_path / name / "release")
    out = tmp_path / "rows.json"
    paths = [str(tmp_path / name / "release") for name in ("a", "b")]
    try:
        main([*evaluate_args(world)[:-1], "--translator", *paths, "--out", str(out)])
    except SystemExit as stopped:
        assert "release" in str(stopped.code)
    else:
        assert len(json.loads(out.read_text())["rows"]) == 3


def test_evaluate_says_what_is_wrong(world, tmp_path, capsys):
    release(translator_run(tmp_path / "run", ("lion",)), tmp_path / "lions")
    capsys.readouterr()
    args = evaluate_args(world, "first")
    assert "no shards" in error(capsys, *args, "--shards", tmp_path / "none-*.tar")
    said = error(capsys, *args, "--clip", tmp_path / "nothing")
    assert f"no such folder: {tmp_path}/nothing (CLIP, as --clip" in said
    said = error(capsys, *args, str(tmp_path / "lions"))
    assert "lions does not know the class 'dog'" in said


def test_release_end_to_end(world, inputs, tmp_path, capsys):
    results = tmp_path / "rows.json"
    results.write_text(json.dumps({"sds": {"clip_score": 0.25}, "lmc": {"clip_score": 0.75}}))
    out = tmp_path / "out"
    args = ["release", str(world / "run"), "--out", str(out), "--results", str(results)]
    args += worlds.STATED
    main([*args, "--row", "lmc", "--picture", str(inputs[0])])
    assert str(out) in capsys.readouterr().out
    card = (out / "README.md").read_text()
    assert "| CLIP score | 0.750 |" in card and "0.25" not in card
    assert (out / "samples.png").exists()
    weights = Translator.from_pretrained(out).state_dict()
    for name, value in averaged(world / "run").items():
        assert torch.equal(weights[name], value)
    assert "'dds'" in error(capsys, *args, "--row", "dds")
    evaluation = tmp_path / "evaluation.json"
    main([*evaluate_args(world, "first"), "--out", str(evaluation)])
    main([*args, "--results", str(evaluation), "--row", "first"])
    rows = json.loads(evaluation.read_text())["rows"]
    cells = [rows[name]["summary"]["clip_score"] for name in ("first", "source")]
    both = [f"{x['value']:.3f} [{x['low']:.3f}, {x['high']:.3f}]" for x in cells]
    line = f"| CLIP score ({world}/clip) | {both[0]} | {both[1]} |"
    assert line in (out / "README.md").read_text()
    capsys.readouterr()
    assert "train first" in error(capsys, "release", tmp_path / "none", "--out", out)


def stage_one_config(folder: Path, prior: Path, train: str, heldout: str) -> Path:
    """A configuration of train_bias.py, as far as `lmc closed_form` reads it."""
    config = {
        "model": {
            "prior": {
                "class_path": "lmc.priors.DiffusersPrior",
                "init_args": {"pretrained": str(prior)},
            }
        },
        "data": {"train": train, "heldout": heldout, "image_size": 16},
    }
    file = folder / "bias.yaml"
    file.write_text(json.dumps(config))
    return file


def closed_form(config: Path, out: Path, *more: str) -> None:
    args = ["closed_form", str(config), f"--out={out}", "--batch_size=8", "--bins=2"]
    main([*args, *worlds.STATED, "--triplets=64", *more])


def test_a_closed_form_corrector_is_one_command_away(world, tiny_prior_folder, tmp_path, capsys):
    shards = f"{world}/shards"
    config = stage_one_config(
        tmp_path, tiny_prior_folder, f"{shards}/train-*.tar", f"{shards}/heldout-*.tar"
    )
    closed_form(config, tmp_path / "out")
    said = own_output(capsys)
    assert "estimated from 64 triplets" in said[0]
    corrector = load_corrector(str(tmp_path / "out"))
    assert isinstance(corrector, FilterCorrector) and corrector.gain.shape == (2, 3, 3, 16, 9, 2)
    prior = DiffusersPrior(str(tiny_prior_folder))
    corrector.check_prior(prior.identity)
    prior.to("cpu")
    heldout = ImageStream(f"{shards}/heldout-*.tar", 16, 8, training=False)
    errors = evaluate_corrector(corrector, prior, heldout)
    for name, value in errors.items():
        assert f"held-out {name}: {value:.4f}" in "\n".join(said)


def test_a_closed_form_corrector_from_stored_triplets(world, tiny_prior_folder, tmp_path):
    """The prior's weights are not needed then; with the triplets' own prior only."""
    shards = f"{world}/shards"
    config = stage_one_config(
        tmp_path, tiny_prior_folder, f"{shards}/train-*.tar", f"{shards}/heldout-*.tar"
    )
    main(["triplets", str(config), f"--out={tmp_path / 'triplets'}"])
    stored = f"{tmp_path / 'triplets'}/train-*.tar"
    config = stage_one_config(tmp_path, tiny_prior_folder, stored, stored)
    closed_form(config, tmp_path / "out", "--each_channel")
    corrector = load_corrector(str(tmp_path / "out"))
    assert isinstance(corrector, FilterCorrector) and corrector.gain.shape == (2, 3, 16, 9, 2)


def test_closed_form_says_what_is_wrong_first(
    world, tiny_prior_folder, other_prior_folder, tmp_path, capsys
):
    shards = f"{world}/shards"
    train, heldout = f"{shards}/train-*.tar", f"{shards}/heldout-*.tar"
    config = stage_one_config(tmp_path, tiny_prior_folder, train, heldout)
    given = ("closed_form", str(config), "--triplets=8", "--batch_size=8", *worlds.STATED)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    assert "is no release" in error(capsys, *given, f"--out={tmp_path / 'mine'}")
    assert "too few triplets" in error(capsys, *given, f"--out={tmp_path / 'o'}", "--bins=16")
    assert "bins must be at least 1" in error(capsys, *given, f"--out={tmp_path / 'o'}", "--bins=0")
    as_option = ("closed_form", f"--config={config}", f"--out={tmp_path / 'o'}")
    assert "goes without --config" in error(capsys, *as_option)
    config.write_text("model: {}")
    assert "has no model.prior" in error(capsys, *given, f"--out={tmp_path / 'o'}")
    config = stage_one_config(tmp_path, tiny_prior_folder, train, heldout)
    main(["triplets", str(config), f"--out={tmp_path / 'triplets'}"])
    capsys.readouterr()
    stored = f"{tmp_path / 'triplets'}/train-*.tar"
    stage_one_config(tmp_path, other_prior_folder, stored, stored)
    with pytest.raises(SystemExit, match="sampled from another prior"):
        main([*given, f"--out={tmp_path / 'o'}"])
