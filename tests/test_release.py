"""Releases: exactly the averaged weights, rebuilt from the folder alone; clear errors."""

import copy
import inspect
import json
from pathlib import Path

import huggingface_hub
import pytest
import torch
import yaml
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_package import light

import lmc.cli
import lmc.release
import train_translator
from lmc.corrector import Corrector
from lmc.filter import FilterCorrector, HybridCorrector
from lmc.hub import FORMAT
from lmc.load import load_averaged, load_corrector, load_network, load_translator
from lmc.losses import LMC
from lmc.release import Terms, read_results, stated, write_release
from lmc.training.bias import load_closed_form
from lmc.translator import Translator

import worlds
from worlds import TERMS, release

ROOT = Path(__file__).parents[1]
RELEASED = sorted(path.parent for path in ROOT.glob("tests/releases/*/*/config.json"))
PRIOR = {"pretrained": "some/prior", "digest": "0123", "image_size": 16}


def write_run(folder: Path, network: Corrector | Translator, config: dict) -> Path:
    """A run folder as training leaves it: weights of 0.5, averaged ones as they are."""
    weights = network.state_dict()
    state = {f"ema.module.{name}": value for name, value in weights.items()}
    state |= {f"network.{name}": torch.full_like(value, 0.5) for name, value in weights.items()}
    state["ema.n_averaged"] = torch.tensor(3)
    (folder / "checkpoints").mkdir(parents=True)
    about = {"class": type(network).__name__, "config": config}
    content = {"network": about, "state_dict": state, "global_step": 1234}
    torch.save(content, folder / "checkpoints" / "last.ckpt")
    return folder


def translator_run(folder: Path, classes: tuple[str, ...] = ("dog", "bear")) -> Path:
    config = {"classes": list(classes), "image_size": 16, "widths": [8, 16], "norm": "group"}
    return write_run(folder, Translator(**config), config)


def corrector_run(folder: Path) -> Path:
    config = {"channels": 3, "widths": [8, 8], "statistics": "channel", "prior": PRIOR}
    return write_run(folder, Corrector(**config), config)


def averaged(run: Path) -> dict[str, torch.Tensor]:
    state = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    return {name[11:]: value for name, value in state.items() if name.startswith("ema.module.")}


def assert_weights(network: torch.nn.Module, expected: dict[str, torch.Tensor]) -> None:
    weights = network.state_dict()
    assert weights.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(weights[name], value), name


def test_a_training_is_released_with_its_averaged_weights(tiny_prior_folder, tmp_path):
    data = worlds.write_world(tmp_path / "data")
    args = worlds.translator_args(tiny_prior_folder, data, tmp_path / "run", "SDS")
    states = [f"--release.{name}={value}" for name, value in TERMS.items()]
    train_translator.main([*args, "--model.norm=group", *states])
    lmc.release.release(tmp_path / "run", out=tmp_path / "out", unmeasured=True)
    assert header(tmp_path / "out")["license"] == TERMS["license"]
    translator = Translator.from_pretrained(tmp_path / "out")
    expected = averaged(tmp_path / "run")
    assert_weights(translator, expected)
    state = torch.load(tmp_path / "run/checkpoints/last.ckpt", weights_only=True)["state_dict"]
    assert any(not torch.equal(state[f"network.{n}"], v) for n, v in expected.items())
    assert translator.classes == ["dog", "bear"] and translator.image_size == 16
    assert translator(torch.zeros(2, 3, 16, 16), torch.tensor([0, 1])).shape == (2, 3, 16, 16)


def test_a_release_is_rebuilt_from_its_config(tmp_path):
    release(translator_run(tmp_path / "run"), tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    expected = {"classes": ["dog", "bear"], "image_size": 16, "widths": [8, 16], "norm": "group"}
    assert {key: config[key] for key in expected} == expected
    assert_weights(Translator.from_pretrained(tmp_path / "out"), averaged(tmp_path / "run"))
    weights = load_file(tmp_path / "out" / "model.safetensors")
    assert weights.keys() == averaged(tmp_path / "run").keys()


def test_a_folder_or_a_file_is_a_checkpoint(tmp_path):
    run = corrector_run(tmp_path / "run")
    for path in (run, run / "checkpoints" / "last.ckpt"):
        network, step = load_averaged(path)
        assert step == 1234 and not network.training
        assert_weights(network, averaged(run))


def test_the_card_shows_what_was_measured(tmp_path):
    picture = tmp_path / "grid.png"
    Image.new("RGB", (5, 7), "red").save(picture)
    results = tmp_path / "results.json"
    results.write_text(
        '{"clip_score": 0.26123, "images": 278, "name": "lpips", "nested": {"a": 1}}'
    )
    run = translator_run(tmp_path / "run")
    release(run, tmp_path / "out", results=results, picture=picture)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| CLIP score | 0.261 |" in card and "| images | 278 |" in card
    assert "nested" not in card and "| name" not in card
    assert 'Translator.from_pretrained("…")' in card and "1234 steps" in card
    assert "dog, bear" in card and "![samples](samples.png)" in card
    assert (tmp_path / "out" / "samples.png").read_bytes() == picture.read_bytes()


@pytest.mark.parametrize(
    "network",
    [
        Translator(["dog"], 16, [8, 16]),
        Corrector(4, [8, 8, 8], bounded=False, prior=PRIOR),
        FilterCorrector(3, 8, prior=PRIOR),
        HybridCorrector(3, {"size": 8}, [8, 8], prior=PRIOR),
    ],
    ids=lambda network: type(network).__name__,
)
def test_the_card_s_snippet_runs(tmp_path, network, monkeypatch):
    """Of every kind there is, as it stands but for the name of the release."""
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (30, 20), "green").save("cat.jpg")
    write_release(network, tmp_path / "out", "by hand", Terms(**TERMS))
    card = (tmp_path / "out" / "README.md").read_text()
    snippet = card.split("```python\n")[1].split("```")[0].replace("…", str(tmp_path / "out"))
    names: dict = {}
    exec(snippet, names)
    (loaded,) = (each for each in names.values() if type(each) is type(network))
    assert_weights(loaded, network.state_dict())
    assert not loaded.training
    if isinstance(network, Translator):
        assert Image.open("dog.png").size == (30, 20)
    else:
        assert names["b"].shape == names["z"].shape


def header(out: Path) -> dict:
    """The card's header, as the hub reads it; the card's text has to say the same."""
    card = (out / "README.md").read_text()
    found = yaml.safe_load(card.split("---\n")[1])
    loaded = huggingface_hub.ModelCard.load(out / "README.md")
    assert card.startswith("---\n") and loaded.data.to_dict() == found
    assert f"Trained on: {found['training_data']}\n" in loaded.text
    assert f"With the prior: {found['prior_license']}\n" in loaded.text
    return found


def test_the_card_states_the_licences(tmp_path):
    release(translator_run(tmp_path / "run"), tmp_path / "out")
    assert header(tmp_path / "out") == {
        "library_name": "lmc-sds",
        "license": "cc0-1.0",
        "tags": ["score-distillation", "lmc-sds", "image-to-image"],
        "pipeline_tag": "image-to-image",
        "training_data": "random pictures, CC0-1.0",
        "prior_license": "random weights, CC0-1.0",
    }
    own = {
        "license": "other",
        "license_name": "Mine: a 'licence'",
        "license_link": "https://x.org/l",
    }
    hard = "AFHQ: CC BY-NC 4.0 # 'non-commercial'"
    run = corrector_run(tmp_path / "bias")
    release(run, tmp_path / "out", **own, data=hard, datasets=["me/afhq"])
    found = header(tmp_path / "out")
    assert found["license"] == "other" and found["license_name"] == "Mine: a 'licence'"
    assert found["license_link"] == "https://x.org/l" and found["training_data"] == hard
    assert found["datasets"] == ["me/afhq"] and found["base_model"] == "some/prior"
    assert "[Mine: a 'licence'](https://x.org/l)" in (tmp_path / "out" / "README.md").read_text()
    assert "apache" not in (tmp_path / "out" / "README.md").read_text().lower()


def test_a_folder_is_no_base_model(tmp_path):
    """The hub would refuse the card, or link another's model."""
    for name in ("data/some/prior", "/data/prior", str(tmp_path), "prior"):
        write_release(
            FilterCorrector(3, 8, prior={**PRIOR, "pretrained": name}),
            tmp_path / "out",
            "by hand",
            Terms(**TERMS),
        )
        assert "base_model" not in header(tmp_path / "out"), name


@pytest.mark.parametrize("missing", [*TERMS, "all"])
def test_a_release_that_states_no_licence_is_refused(tmp_path, missing):
    run = translator_run(tmp_path / "run")
    left_out = {name: None for name in TERMS if missing in (name, "all")}
    with pytest.raises(ValueError, match="has to state") as refused:
        release(run, tmp_path / "out", **left_out)
    for name in TERMS:
        assert (f"--{name} (" in str(refused.value)) == (name in left_out)
    assert not (tmp_path / "out").exists()
    # The run's own config may have it; what is given goes before that.
    config = {
        "model": {},
        "release": {"license": "cc-by-nc-4.0", "data": "D", "prior_license": "P"},
    }
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    release(run / "checkpoints" / "last.ckpt", tmp_path / "out", **left_out)
    found = header(tmp_path / "out")
    for name in TERMS:
        expected = config["release"][name] if name in left_out else TERMS[name]
        assert found["training_data" if name == "data" else name] == expected


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"license": "Apache 2.0"}, "'Apache 2.0'.*apache-2.0"),
        ({"license": "other"}, "--license_name and --license_link"),
        ({"license": "other", "license_name": "Mine"}, "--license_name and --license_link"),
        ({"license_link": "https://x.org"}, "neither with another"),
    ],
)
def test_a_licence_that_the_hub_does_not_know_is_refused(options, words):
    with pytest.raises(ValueError, match=words):
        stated({}, **{**TERMS, **options})


def test_a_config_that_states_something_else_is_refused(tmp_path):
    for section in ({"licence": "mit"}, "mit"):
        with pytest.raises(ValueError, match=r"release: '\w+' in the config is none of license, "):
            stated({"release": section}, **TERMS)
    run = translator_run(tmp_path / "run")
    (run / "config.yaml").write_text("{")
    with pytest.raises(ValueError, match=r"config\.yaml is no YAML"):
        release(run, tmp_path / "out")


def test_results_are_a_row_of_a_file(tmp_path):
    file = tmp_path / "results.json"
    file.write_text('{"lmc": {"clip_score": 1.0}}')
    assert read_results(file, "lmc").values == {"clip_score": {"value": 1.0}}
    with pytest.raises(ValueError, match="no row 'sds'; it has lmc"):
        read_results(file, "sds")
    with pytest.raises(ValueError, match=r"results\.json holds no numbers: --results is"):
        read_results(file)
    run = translator_run(tmp_path / "run")
    with pytest.raises(ValueError, match="--row lmc is of --results"):
        release(run, tmp_path / "out", row="lmc")
    with pytest.raises(ValueError, match="--unmeasured is of a release without --results"):
        release(run, tmp_path / "out", results=file, row="lmc", unmeasured=True)
    for text in ("[1]", "{", "\x80"):
        file.write_bytes(text.encode("latin-1"))
        with pytest.raises(ValueError, match=r"results\.json holds no JSON"):
            read_results(file, None)


RESULT = {
    "settings": {"classes": ["dog", "bear"], "clip": "some/clip"},
    "heldout": {"count": 24, "digest": "0123456789abcdef0123"},
    "rows": {
        name: {
            "summary": {
                "spectrum_error": {"value": number, "low": None, "high": None},
                "lpips": {"value": number, "low": number - 0.25, "high": number + 0.25},
                "r_precision": {"value": number, "low": number - 0.5, "high": number + 0.5},
                "mean_red": {"value": 9.0, "low": 9.0, "high": 9.0},
                "odd": {"value": float("nan"), "low": None, "high": None},
            }
        }
        for name, number in (("source", 0.5), ("mine", 0.75))
    },
}


def test_the_card_s_table_has_intervals_and_the_hub_the_figures(tmp_path):
    """By the headings and in the order of the evaluation's own table, beside the source's."""
    run, file = translator_run(tmp_path / "run"), tmp_path / "results.json"
    file.write_text(json.dumps(RESULT))
    release(run, tmp_path / "lions", results=file, datasets=["me/cats"])
    loaded = huggingface_hub.ModelCard.load(tmp_path / "lions" / "README.md")
    rows = [line for line in loaded.text.splitlines() if line.startswith("| ")]
    assert rows == [
        "| measure | this network | untouched source |",
        "| LPIPS to source | 0.750 [0.500, 1.000] | 0.500 [0.250, 0.750] |",
        "| R-Precision (some/clip) | 0.750 [0.250, 1.250] | 0.500 [0.000, 1.000] |",
        "| spectrum error | 0.750 | 0.500 |",
        "| odd | nan | nan |",
    ]
    assert "24 held-out pictures, each to dog, bear" in loaded.text
    assert "the pictures' digest is 0123456789abcdef)" in loaded.text
    assert loaded.data.model_name == "lions"
    found = {each.metric_type: each for each in loaded.data.eval_results}
    assert found.keys() == {"lpips", "r_precision", "spectrum_error"}
    assert found["r_precision"].metric_value == 0.75
    assert found["r_precision"].metric_name == "R-Precision (some/clip)"
    assert found["lpips"].task_type == "image-to-image"
    assert found["lpips"].dataset_type == "me/cats"
    assert found["lpips"].dataset_name == TERMS["data"]


def test_of_several_rows_one_is_named(tmp_path):
    file = tmp_path / "results.json"
    rows = {**RESULT["rows"], "other": RESULT["rows"]["mine"]}
    file.write_text(json.dumps({**RESULT, "rows": rows}))
    with pytest.raises(ValueError, match="has the rows mine, other: --row names one of them"):
        read_results(file)
    assert read_results(file, "source").source == {}


def test_a_translator_that_was_not_measured_is_refused_unless_it_is_said(tmp_path):
    run = translator_run(tmp_path / "run")
    with pytest.raises(ValueError, match=r"--results FILE of lmc evaluate .* or --unmeasured"):
        release(run, tmp_path / "out", unmeasured=False)
    assert not (tmp_path / "out").exists()
    release(run, tmp_path / "out", unmeasured=True)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "Nothing was measured." in card and "model-index" not in card


def test_a_corrector_s_card_has_what_its_training_measured(tmp_path):
    run = corrector_run(tmp_path / "run")
    file = run / "heldout.json"
    with pytest.raises(ValueError, match=f"{file} is not there: --results FILE, or --unm"):
        release(run, tmp_path / "out", unmeasured=False)
    file.write_text(json.dumps({"step": 7, "measured": {}}))
    with pytest.raises(ValueError, match=f"{file} is of step 7, the weights are of step 1234"):
        release(run, tmp_path / "out", unmeasured=False)
    file.write_text("{}")
    with pytest.raises(ValueError, match=f"{file} has no 'step'"):
        release(run, tmp_path / "out", unmeasured=False)
    measured = {"loss": 0.01234, "identity_loss": 0.5, "loss/t0.3": 0.7}
    file.write_text(json.dumps({"step": 1234, "measured": measured}))
    release(run, tmp_path / "out", unmeasured=False)
    card = huggingface_hub.ModelCard.load(tmp_path / "out" / "README.md")
    assert "| loss | 0.01234 |\n| identity_loss | 0.5 |\n\n" in card.text
    assert [each.metric_type for each in card.data.eval_results] == ["loss", "identity_loss"]


def test_the_card_says_how_it_was_trained(tmp_path):
    """Loss, ω, corrector and prior with their digests; the configuration lies beside it."""
    run = translator_run(tmp_path / "run")
    file = run / "checkpoints" / "last.ckpt"
    state = torch.load(file, weights_only=True)
    state["batch"] = 32
    state["identities"] = {
        "model.prior.init_args.pretrained": {**PRIOR, "prediction_type": "epsilon"},
        "model.loss.init_args.corrector": {"digest": "89ab"},
    }
    torch.save(state, file)
    options = {"corrector": "runs/c", "guidance_scale": 15.0, "chain_alpha": False, "x": None}
    loss = {"class_path": "lmc.losses.LMC", "init_args": options}
    config = yaml.safe_dump({"model": {"loss": loss}})
    (run / "config.yaml").write_text(config)
    release(run, tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "1234 steps of 32 images; averaged weights." in card
    assert "Loss: `lmc.losses.LMC`, guidance scale ω = 15 (chain_alpha false)\n" in card
    assert "corrector: `runs/c`, digest `89ab`\n" in card
    assert "Prior: `some/prior`, epsilon, digest of its denoiser `0123`\n" in card
    assert "[training.yaml](training.yaml)" in card
    assert (tmp_path / "out" / "training.yaml").read_text() == config
    release(run, tmp_path / "out")  # replaces it
    for heading in ("How to use", "Measured", "Training", "Intended use", "Limits", "Licences"):
        assert f"\n## {heading}\n" in card


@pytest.mark.parametrize("folder", RELEASED, ids=lambda x: f"{x.parent.name} {x.name}")
def test_releases_of_before_give_what_they_gave(folder):
    """Of every version and kind; other machines add up in another order."""
    with safe_open(folder / "expected.st", "pt") as file:
        expected = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        about = file.metadata() or {}
    network = load_network(str(folder))
    with torch.no_grad():
        if isinstance(network, Translator):
            found, wanted = network(expected["image"], expected["class_id"]), expected["output"]
        else:
            x, wanted = (expected[name] for name in ("z", "t", "z_hat")), expected["b"]
            found = network.correct(*x)
            assert network.digest() == about["digest"], "that trainings have recorded"
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    assert wanted.std() > 0.1 and len(wanted.unique()) > wanted.numel() // 4


def test_every_kind_of_release_is_kept():
    """Of the first version, and of this one where its format is another."""
    kinds = {"Translator", "Corrector", "FilterCorrector", "HybridCorrector"}
    by_format: dict = {}
    for folder in RELEASED:
        number = json.loads((folder / "config.json").read_text()).get("format", 0)
        by_format.setdefault(number, set()).add(type(load_network(str(folder))).__name__)
    assert by_format == dict.fromkeys(range(FORMAT + 1), kinds)


def test_another_format_is_refused(tmp_path):
    Translator(["dog"], 16, [8, 16]).save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    config = json.loads(file.read_text())
    assert (config["format"], config["kind"]) == (FORMAT, "Translator")
    for number in (FORMAT + 1, "1", None):
        file.write_text(json.dumps({**config, "format": number}))
        for load in (load_network, Translator.from_pretrained):
            with pytest.raises(
                ValueError, match=f"{tmp_path} is of format {number!r} of rel.*--up"
            ):
                load(str(tmp_path))
    file.write_text(json.dumps({**config, "attention": True}))
    with pytest.raises(ValueError, match=r"no Translator that lmc-sds .*has 'attention'"):
        load_network(str(tmp_path))


@pytest.mark.parametrize("old", [False, True])
def test_another_kind_of_network_is_refused_by_its_own_class(tmp_path, old):
    networks = (
        Translator(["dog"], 16, [8, 16]),
        Corrector(widths=[8, 8], prior=PRIOR),
        FilterCorrector(3, 8, prior=PRIOR),
    )
    for network in networks:
        folder = tmp_path / type(network).__name__
        network.save_pretrained(folder)
        if old:
            config = json.loads((folder / "config.json").read_text())
            kept = {k: v for k, v in config.items() if k not in ("format", "kind")}
            (folder / "config.json").write_text(json.dumps(kept))
        for kind in (Translator, Corrector, FilterCorrector, HybridCorrector):
            if kind is not type(network):
                said = f"{folder} is (no {kind.__name__}|the release of a {type(network).__name__})"
                with pytest.raises(ValueError, match=said):
                    kind.from_pretrained(folder)


@pytest.mark.parametrize("kind", [Translator, HybridCorrector])
def test_half_a_release_is_the_network_with_rounded_weights(kind, tmp_path):
    if kind is Translator:
        network = Translator(["dog"], 16, [8, 8]).eval()
    else:
        network = HybridCorrector(3, {"size": 8}, [8, 8], prior=PRIOR).eval()
    for name, half in (("whole", False), ("half", True)):
        how = {"terms": Terms(**TERMS), "half": half}
        write_release(network, tmp_path / name, "by hand", **how)
    sizes = [(tmp_path / name / "model.safetensors").stat().st_size for name in ("whole", "half")]
    assert sizes[1] < 0.6 * sizes[0]
    loaded = load_network(str(tmp_path / "half"))
    assert type(loaded) is type(network) and loaded.arguments == network.arguments
    for name, value in network.state_dict().items():
        found = loaded.state_dict()[name]
        expected = value.half().float() if value.is_floating_point() else value
        assert torch.equal(found, expected) and found.dtype == value.dtype


def test_from_pretrained_takes_what_the_hub_needs(two_revisions, tmp_path):
    """A revision, either way; a cache elsewhere, in which there is nothing."""
    expected = two_revisions["me/translator@v1"].state_dict()
    assert_weights(Translator.from_pretrained("me/translator", revision="v1"), expected)
    assert_weights(Translator.from_pretrained("me/translator@v1"), expected)
    with pytest.raises(FileNotFoundError, match="no release at me/translator: no such folder"):
        Translator.from_pretrained("me/translator", cache_dir=tmp_path / "other", token="none")


def test_a_release_is_reloaded_bit_for_bit_where_there_is_no_lightning(tmp_path):
    """By a process that has only the light install."""
    torch.manual_seed(0)
    config = {"classes": ["dog", "bear"], "image_size": 16, "widths": [8, 16], "norm": "group"}
    run = write_run(tmp_path / "run", Translator(**config), config)
    release(run, tmp_path / "translator")
    release(corrector_run(tmp_path / "bias"), tmp_path / "corrector")
    image, t = torch.rand(3, 3, 16, 16) * 2 - 1, torch.tensor([0.1, 0.5, 0.9])
    with torch.no_grad():
        translated = load_averaged(run)[0](image, torch.tensor([0, 1, 0]))
        corrected = load_averaged(tmp_path / "bias")[0].correct(image, t, -image)
    save_file({"image": image, "t": t}, tmp_path / "inputs")
    code = """
import torch
from safetensors.torch import load_file, save_file
from lmc import Corrector, Translator
torch.set_num_threads(1)
folder = sys.argv[1]
x = load_file(f"{folder}/inputs")
with torch.no_grad():
    translator = Translator.from_pretrained(f"{folder}/translator")
    translated = translator(x["image"], translator.class_ids(["dog", "bear", "dog"]))
    corrector = Corrector.from_pretrained(f"{folder}/corrector")
    corrected = corrector.correct(x["image"], x["t"], -x["image"])
save_file({"translated": translated, "corrected": corrected}, f"{folder}/outputs")
assert "lightning" not in sys.modules
"""
    done = light(code, tmp_path)
    assert done.returncode == 0, done.stderr
    found = load_file(tmp_path / "outputs")
    assert torch.equal(found["translated"], translated)
    assert torch.equal(found["corrected"], corrected)


def test_no_pickle_is_released(tmp_path):
    release(translator_run(tmp_path / "run"), tmp_path / "out")
    files = {path.name for path in (tmp_path / "out").rglob("*")}
    assert files == {"model.safetensors", "config.json", "README.md"}


def test_releasing_again_replaces(tmp_path):
    run = translator_run(tmp_path / "run")
    picture = tmp_path / "grid.png"
    Image.new("RGB", (5, 7)).save(picture)
    results = tmp_path / "results.json"
    results.write_text('{"clip_score": 1.0}')
    release(run, tmp_path / "out", results=results, picture=picture)
    newer = translator_run(tmp_path / "newer", ("lion",))
    release(newer, tmp_path / "out")
    assert_weights(Translator.from_pretrained(tmp_path / "out"), averaged(newer))
    assert not (tmp_path / "out" / "samples.png").exists()
    assert "clip_score" not in (tmp_path / "out" / "README.md").read_text()
    made = {"run", "newer", "out", "grid.png", "results.json"}
    assert {path.name for path in tmp_path.iterdir()} == made


def test_a_failed_release_leaves_the_old_one(tmp_path):
    run = translator_run(tmp_path / "run")
    release(run, tmp_path / "out")
    with pytest.raises(FileNotFoundError):
        release(run, tmp_path / "out", picture=tmp_path / "missing.png")
    assert_weights(Translator.from_pretrained(tmp_path / "out"), averaged(run))


@pytest.mark.parametrize("out", ["run", "notes"])
def test_only_a_release_is_replaced(tmp_path, out):
    """A mistyped --out must not cost a run folder or anything else."""
    run = translator_run(tmp_path / "run")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("keep")
    with pytest.raises(ValueError, match=out):
        release(run, tmp_path / out)
    assert (run / "checkpoints" / "last.ckpt").exists()
    assert (tmp_path / "notes" / "mine.txt").exists()


def test_a_missing_checkpoint_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere.*train first"):
        release(tmp_path / "nowhere", tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"empty/checkpoints/last\.ckpt"):
        release(tmp_path / "empty", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "content",
    [
        {"state_dict": {}, "global_step": 3},
        {"network": {"class": "Other", "config": {}}, "state_dict": {}, "global_step": 3},
        torch.zeros(3),
        b"not written by torch at all",
    ],
    ids=["of nothing", "of another class", "a tensor", "another file"],
)
def test_a_checkpoint_of_something_else_is_refused(tmp_path, content):
    path = tmp_path / "last.ckpt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    with pytest.raises(ValueError, match=r"last\.ckpt is no checkpoint"):
        release(path, tmp_path / "out")


def test_a_corrector_keeps_its_prior(tmp_path):
    release(corrector_run(tmp_path / "run"), tmp_path / "out")
    corrector = load_corrector(str(tmp_path / "out"))
    assert_weights(corrector, averaged(tmp_path / "run"))
    assert corrector.prior == PRIOR and corrector.statistics == "channel"
    corrector.check_prior(PRIOR)
    with pytest.raises(ValueError, match=r"(?s)0123.*4567"):
        corrector.check_prior({**PRIOR, "digest": "4567"})
    assert "`some/prior`" in (tmp_path / "out" / "README.md").read_text()


def test_the_kinds_are_told_apart(tmp_path):
    release(corrector_run(tmp_path / "b"), tmp_path / "corrector")
    filters = FilterCorrector(3, 8, prior=PRIOR)
    write_release(filters, tmp_path / "filter", "by hand", Terms(**TERMS))
    assert isinstance(load_network(str(tmp_path / "filter")), FilterCorrector)
    card = (tmp_path / "filter" / "README.md").read_text()
    assert "closed-form corrector of one prior" in card and "by hand" in card
    release(translator_run(tmp_path / "t"), tmp_path / "translator")
    assert isinstance(load_network(str(tmp_path / "corrector")), Corrector)
    assert isinstance(load_network(str(tmp_path / "translator")), Translator)


def test_a_translator_is_no_corrector(tmp_path):
    """Never a network with random weights in place of those that do not fit."""
    release(translator_run(tmp_path / "t"), tmp_path / "translator")
    with pytest.raises((ValueError, OSError), match="translator"):
        load_corrector(str(tmp_path / "translator"))


def test_releases_of_the_first_version_load(tmp_path):
    """Their configs have the keys of then: a translator's no `residual`."""
    for network, keys in (
        (Translator(["dog"], 16, [8, 16]), "classes image_size widths norm"),
        (Corrector(widths=[8, 8]), "channels widths norm bounded statistics prior"),
    ):
        folder = tmp_path / type(network).__name__
        network.save_pretrained(folder)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({key: config[key] for key in keys.split()}))
        found = load_network(str(folder))
        assert type(found) is type(network)
        assert_weights(found, network.state_dict())


@pytest.mark.parametrize("kind", ["corrector", "filter", "translator"])
def test_a_hub_id_is_told_by_the_config_of_its_cache(tmp_path, monkeypatch, kind):
    """As huggingface_hub leaves a download; there is no way to the hub."""
    network = {
        "corrector": lambda: Corrector(widths=[8, 8], prior=PRIOR),
        "filter": lambda: FilterCorrector(3, 8, prior=PRIOR),
        "translator": lambda: Translator(["dog"], 16, [8, 16]),
    }[kind]()
    model, commit = tmp_path / f"models--me--{kind}", "0123456789abcdef" * 2 + "01234567"
    network.save_pretrained(model / "snapshots" / commit)
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text(commit)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    found = load_network(f"me/{kind}")
    assert type(found) is type(network)
    assert_weights(found, network.state_dict())
    if kind == "translator":
        with pytest.raises(ValueError, match=r"me/translator is the .* kind is 'Translator'$"):
            load_corrector(f"me/{kind}")
    else:
        assert type(load_corrector(f"me/{kind}")) is type(network)
    with pytest.raises(OSError):
        load_network("me/other")
    with pytest.raises(FileNotFoundError, match="no released corrector at me/other"):
        load_corrector("me/other")


@pytest.fixture
def two_revisions(tmp_path, monkeypatch) -> dict[str, torch.nn.Module]:
    """Releases by 'ID@REVISION' in the hub's cache, as downloaded; no way to the hub."""
    networks: dict = {}
    for number, revision in enumerate(("main", "v1", "refs/pr/2")):
        for kind, network in (
            ("corrector", Corrector(widths=[8, 8], prior=PRIOR)),
            ("translator", Translator(["dog"], 16, [8, 16])),
        ):
            model, commit = tmp_path / f"models--me--{kind}", str(number) * 40
            network.save_pretrained(model / "snapshots" / commit)
            (model / "refs" / revision).parent.mkdir(parents=True, exist_ok=True)
            (model / "refs" / revision).write_text(commit)
            networks[f"me/{kind}@{revision}"] = network
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return networks


def test_a_hub_id_takes_a_revision(two_revisions):
    for name, network in two_revisions.items():
        load = load_corrector if "corrector" in name else load_translator
        assert_weights(load(name), network.state_dict())
        assert_weights(load_network(name), network.state_dict())
    for kind in ("corrector", "translator"):
        newest = two_revisions[f"me/{kind}@main"].state_dict()
        assert_weights(load_network(f"me/{kind}"), newest)
        commit = load_network(f"me/{kind}@{'1' * 40}")
        assert_weights(commit, two_revisions[f"me/{kind}@v1"].state_dict())
        with pytest.raises(FileNotFoundError, match=f"no release at me/{kind}@v3"):
            load_network(f"me/{kind}@v3")
    for wrong in ("me/corrector@", "@v1"):
        with pytest.raises(ValueError, match=f"^{wrong}: a revision is given as ID@REVISION"):
            load_corrector(wrong)


def test_a_loss_and_the_closed_form_take_a_revision_too(two_revisions, tmp_path):
    name = "me/corrector@v1"
    assert_weights(LMC(name).corrector, two_revisions[name].state_dict())
    with pytest.raises(FileNotFoundError, match="no released corrector at me/corrector@v3"):
        LMC("me/corrector@v3")
    with pytest.raises(ValueError, match=f"{name} is a trained corr"):
        load_closed_form(name)


def test_a_folder_that_is_there_wins_over_a_revision(two_revisions, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    here = Corrector(widths=[8, 8], prior=PRIOR)
    here.save_pretrained("me/corrector@v1")
    assert_weights(load_corrector("me/corrector@v1"), here.state_dict())


@pytest.mark.parametrize(
    "network",
    [
        Corrector(4, [8, 8], bounded=False, prior=PRIOR),
        FilterCorrector(3, size=8, prior=PRIOR),
        Translator(["dog", "cat"], widths=[8, 16], residual=True),
    ],
    ids=lambda network: type(network).__name__,
)
def test_a_networks_arguments_are_what_its_release_says(tmp_path, network):
    """The library keeps them too, under a private name, and writes them: both must agree."""
    network.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert (written.pop("format"), written.pop("kind")) == (FORMAT, type(network).__name__)
    assert json.loads(json.dumps(network.arguments)) == written
    assert {"self", *written} == set(inspect.signature(type(network).__init__).parameters)
    for again in (copy.deepcopy(network), type(network).from_pretrained(tmp_path)):
        assert json.loads(json.dumps(again.arguments)) == written
    rebuilt = type(network)(**network.arguments)
    rebuilt.load_state_dict(network.state_dict())


def test_weights_that_do_not_fit_are_refused_through_the_librarys_own_way(tmp_path):
    """Fails where the library no longer asks `_from_pretrained`, which it says to override."""
    network = Translator(["dog"], 16, [8, 16])
    network.save_pretrained(tmp_path)
    save_file({"other": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=f"{tmp_path} is no Translator: (.|\\n)*unet"):
        Translator.from_pretrained(tmp_path)


def test_a_release_of_something_else_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no config"):
        load_network(str(tmp_path))
    with pytest.raises(ValueError, match=r"clip is the release of no T.* has architectures, "):
        load_network(str(ROOT / "data/demo/clip"))
    for text in ("{", "null", "[1]"):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ValueError, match=f"config.json of {tmp_path} cannot be read"):
            load_network(str(tmp_path))


def test_weights_that_do_not_fit_the_config_are_refused(tmp_path):
    """Of a file that lacks some, say: what is missing must not stay random."""
    release(translator_run(tmp_path / "run"), tmp_path / "out")
    file = tmp_path / "out" / "model.safetensors"
    weights = load_file(file)
    weights.pop(next(iter(weights)))
    save_file(weights, file)
    with pytest.raises((RuntimeError, ValueError)):
        load_network(str(tmp_path / "out"))


def test_the_page_on_releases_runs_as_it_stands(tmp_path, monkeypatch):
    """Its Python, with a release in place of the hub's id."""
    monkeypatch.chdir(tmp_path)
    Translator(["lion", "bear"], 16, [8, 16]).save_pretrained("me/lions")
    for name in ("cat.jpg", "other.png"):
        Image.new("RGB", (30, 20), "green").save(name)
    text = (ROOT / "docs/releases.md").read_text()
    names: dict = {}
    exec(text.split("```python\n")[1].split("```")[0], names)
    assert Image.open("lion.png").size == (30, 20) and len(names["both"]) == 2
