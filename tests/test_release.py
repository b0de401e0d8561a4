"""Releases: exactly the averaged weights, rebuilt from the folder alone; clear errors."""

import copy
import inspect
import json
from pathlib import Path

import huggingface_hub
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import train_translator
from lmc.corrector import Corrector
from lmc.filter import FilterCorrector
from lmc.load import load_averaged, load_corrector, load_network, load_translator
from lmc.losses import LMC
from lmc.release import release, write_release
from lmc.training.bias import load_closed_form
from lmc.translator import Translator

import worlds

ROOT = Path(__file__).parents[1]
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
    train_translator.main([*args, "--model.norm=group"])
    release(tmp_path / "run", tmp_path / "out")
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
    results = {"clip_score": 0.26123, "images": 278, "distance_name": "lpips", "nested": {"a": 1}}
    release(translator_run(tmp_path / "run"), tmp_path / "out", results, picture)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| clip_score | 0.2612 |" in card and "| images | 278 |" in card
    assert "nested" not in card
    assert 'Translator.from_pretrained("…")' in card and "1234 steps" in card
    assert "dog, bear" in card and "![samples](samples.png)" in card
    assert card.startswith("---\n")
    header = json.loads(card.split("---\n")[1])  # JSON is YAML
    assert header["license"] == "apache-2.0" and header["library_name"] == "lmc"
    assert (tmp_path / "out" / "samples.png").read_bytes() == picture.read_bytes()


def test_the_card_s_snippet_runs(tmp_path):
    release(translator_run(tmp_path / "run"), tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    snippet = card.split("```python\n")[1].split("```")[0].replace("…", str(tmp_path / "out"))
    names: dict = {}
    exec(snippet, names)
    assert_weights(names["network"], averaged(tmp_path / "run"))


def test_no_pickle_is_released(tmp_path):
    release(translator_run(tmp_path / "run"), tmp_path / "out")
    files = {path.name for path in (tmp_path / "out").rglob("*")}
    assert files == {"model.safetensors", "config.json", "README.md"}


def test_releasing_again_replaces(tmp_path):
    run = translator_run(tmp_path / "run")
    picture = tmp_path / "grid.png"
    Image.new("RGB", (5, 7)).save(picture)
    release(run, tmp_path / "out", {"clip_score": 1.0}, picture)
    newer = translator_run(tmp_path / "newer", ("lion",))
    release(newer, tmp_path / "out")
    assert_weights(Translator.from_pretrained(tmp_path / "out"), averaged(newer))
    assert not (tmp_path / "out" / "samples.png").exists()
    assert "clip_score" not in (tmp_path / "out" / "README.md").read_text()
    assert {path.name for path in tmp_path.iterdir()} == {"run", "newer", "out", "grid.png"}


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
    write_release(FilterCorrector(3, 8, prior=PRIOR), tmp_path / "filter", "by hand")
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
        with pytest.raises(ValueError, match=r"me/translator .*has classes, image_size"):
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
    with pytest.warns(UserWarning), pytest.raises(ValueError, match=f"{name} is a trained corr"):
        load_closed_form(name, PRIOR)


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
