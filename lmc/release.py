"""A trained network as a folder others can load: averaged weights, config, card. No Lightning.

translator = Translator.from_pretrained("runs/mine/release")  # a folder or a hub id
huggingface_hub.upload_folder(repo_id="me/cats-to-others", folder_path="runs/mine/release")
"""

import copy
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import yaml
from huggingface_hub import ModelCardData

from lmc import __version__
from lmc.card import (
    MADE,
    PICTURE,
    TRAINING,
    Measured,
    Terms,
    Training,
    card,
    model_index,
    named,
    network_card,
    numbers_measured,
    read_results,
    stated,
    stated_header,
)
from lmc.files import read_json, whole_folder
from lmc.load import Network, averaged_of, read_checkpoint
from lmc.translator import Translator


def release(
    run: Path,
    *,
    out: Path,
    license: str | None = None,
    license_name: str | None = None,
    license_link: str | None = None,
    data: str | None = None,
    datasets: list[str] | None = None,
    prior_license: str | None = None,
    best: bool = False,
    results: Path | None = None,
    row: str | None = None,
    unmeasured: bool = False,
    picture: Path | None = None,
    half: bool = False,
) -> None:
    """Turn a run folder into a release: model.safetensors, config.json and README.md, the card.

    The run's configuration goes with it, as training.yaml, with the paths that are in it.

    What was measured is on the card: of a translator --results, of the others what their training
    measured at its end where no --results are given. Without either it is refused.

    A small prior or CLIP of one's own (docs/own_prior.md) is released as the pipeline or model
    folder that its training wrote, with a card.

    What is not given of license, data and the others up to prior_license is taken from the section
    'release' of the run's config.yaml; the first two and the last have to be stated.

    Args:
        run: run folder, or a last.ckpt.
        out: folder to write; a release that is there is replaced.
        license: of the weights: an id of the hub's list of licences, such as apache-2.0 or
            cc-by-nc-4.0, or other.
        license_name: of license other: its name.
        license_link: of license other: where it can be read.
        data: what the network was trained on, with its licence.
        datasets: of that, what is on the hub, by id.
        prior_license: the prior and its licence.
        best: its checkpoints/best.ckpt, by held-out R-Precision, in place of last.ckpt.
        results: lmc evaluate's JSON, or a folder of lmc compare, for the card.
        row: which row of it is this network's, where there are several.
        unmeasured: release it all the same where nothing was measured; the card says so.
        picture: a PNG for the card.
        half: weights in float16, half the file; they are float32 again when loaded.

    Raises:
        FileNotFoundError, ValueError: see `read_checkpoint`.
        ValueError: nothing was measured; or see `stated`, `check_out` and `read_results`.
    """
    check_out(out)
    if results is None and row is not None:
        raise ValueError(f"--row {row} is of --results: name that file too")
    if results is not None and unmeasured:
        raise ValueError("--unmeasured is of a release without --results: give one of them")
    measured = None if results is None else read_results(results, row)
    given: dict[str, Any] = {
        "license": license,
        "license_name": license_name,
        "license_link": license_link,
        "data": data,
        "datasets": datasets,
        "prior_license": prior_license,
    }
    folder = run if run.is_dir() else run.parent.parent
    config = _config(folder)
    kinds = (kind for kind, model in MODELS.items() if (run / kind / model.mark).exists())
    made = next(kinds, None)
    if made is not None:
        terms = stated(config, ("license", "data"), **given)
        measured = measured or _measured(folder, None, unmeasured)
        write_model_release(run, made, config, out, terms, measured, picture)
        print(f"released to {out}: license {terms.license}; trained on {terms.data}")
        return
    state = read_checkpoint(run, best)
    terms = stated(config, **given)
    network, step = averaged_of(state), state["global_step"]
    if measured is None and isinstance(network, Translator) and not unmeasured:
        raise ValueError(
            f"{run}: a release says what was measured: --results FILE of lmc evaluate (or a folder "
            "of lmc compare, with --row), or --unmeasured"
        )
    if not isinstance(network, Translator):
        measured = measured or _measured(folder, step, unmeasured)
    which = ", the best of the run by held-out R-Precision" if best else ""
    batch = f" of {state['batch']} images" if state.get("batch") else ""
    how = f"{step} steps{batch}{which}; averaged weights"
    how += ", rounded to float16 after they were measured" if half else ""
    training = Training(how, config, state.get("identities", {}))
    of_run = folder / "config.yaml"
    write_release(network, out, training, terms, measured, picture, of_run, half)
    print(
        f"released to {out}: license {terms.license}; trained on {terms.data}; "
        f"prior {terms.prior_license}"
    )


def _measured(folder: Path, step: int | None, unmeasured: bool) -> Measured | None:
    """What the training in a run folder measured at its end.

    Args:
        folder: of the run.
        step: that it must have been measured at, where that is known.
        unmeasured: None will do.

    Raises:
        ValueError: there is nothing of that step, or it cannot be read.
    """
    file, why = folder / "heldout.json", "is not there"
    if file.exists():
        found = read_json(file, ("step", "measured"))
        if step in (None, found["step"]):
            # Those by time are too many for a card.
            values = {name: x for name, x in found["measured"].items() if "/t0." not in name}
            return numbers_measured(values, "the held-out pictures of its training")
        why = f"is of step {found['step']}, the weights are of step {step}"
    if unmeasured:
        return None
    raise ValueError(
        f"a release says what was measured, and {file} {why}: --results FILE, or --unmeasured"
    )


class Model(NamedTuple):
    """What a training of labelled pictures makes, a folder in another library's format.

    Attributes:
        mark: a file that such a folder has.
        title: of the card.
        library, task: the hub's keys.
        about: for the card; {} are its captions' words.
        snippet: how it is loaded.
    """

    mark: str
    title: str
    library: str
    task: str
    about: str
    snippet: str


MODELS = {
    "prior": Model(
        "model_index.json",
        "A small prior",
        "diffusers",
        "text-to-image",
        "A small text-to-image model in DeepFloyd IF's format, trained from nothing. It draws {}, "
        "of {} x {} pixels, and nothing else.",
        'from lmc import DiffusersPrior\n\nprior = DiffusersPrior("…")',
    ),
    "clip": Model(
        "config.json",
        "A small CLIP",
        "transformers",
        "zero-shot-image-classification",
        "A small CLIP, trained from nothing, that tells {} apart, seen at {} x {} pixels, and "
        "nothing else.",
        'from lmc.measure.metrics import Clip\n\nclip = Clip("…")',
    ),
}


def write_model_release(
    run: Path,
    kind: str,
    config: Mapping[str, Any],
    out: Path,
    terms: Terms,
    measured: Measured | None,
    picture: Path | None,
) -> None:
    """Copy what a training of labelled pictures wrote, with a card.

    Args:
        run: its folder, which holds `kind`.
        kind: of `MODELS`.
        config: of the run.
        out: folder to write; a release that is there is replaced.
        terms: what is stated of licences.
        measured: of it, for the card; None: nothing was.
        picture: a PNG to show on the card.
    """
    model, settings = MODELS[kind], config["model"]
    captions = [settings["prompt"].format(name) for name in settings["classes"]]
    side = settings["image_size"]
    out.parent.mkdir(parents=True, exist_ok=True)
    with whole_folder(out) as partial:
        shutil.copytree(run / kind, partial, dirs_exist_ok=True)
        beside = _copy_beside(partial, picture, run / "config.yaml")
        head = ModelCardData(
            library_name=model.library,
            pipeline_tag=model.task,
            tags=["lmc-sds"],
            **stated_header(terms),
            **model_index(out.name, model.task, terms, measured),
        )
        about = model.about.format(", ".join(map(repr, captions)), side, side)
        how = [
            f"- {MADE}, version {__version__}: trained by `data/{kind}/train.py`; averaged weights."
        ]
        lines = [f"- Licence of these weights: {named(terms)}", f"- Trained on: {terms.data}"]
        text = card(head, model.title, about, model.snippet, how, lines, measured, beside=beside)
        (partial / "README.md").write_text(text, encoding="utf-8")


def _copy_beside(folder: Path, picture: Path | None, config: Path | None) -> list[str]:
    """Copy what lies beside a card, as far as it is there; the names."""
    found = []
    for name, file in ((PICTURE, picture), (TRAINING, config)):
        if file is not None and (name == PICTURE or file.exists()):
            shutil.copy(file, folder / name)
            found.append(name)
    return found


def _config(folder: Path) -> dict[str, Any]:
    """The config.yaml of a run folder; {} without one."""
    file = folder / "config.yaml"
    try:
        config = yaml.safe_load(file.read_text()) if file.exists() else {}
    except yaml.YAMLError as error:
        raise ValueError(f"{file} is no YAML: {error}") from error
    return config if isinstance(config, dict) else {}


def write_release(
    network: Network,
    out: Path,
    training: Training | str,
    terms: Terms,
    measured: Measured | Mapping[str, Any] | None = None,
    picture: Path | None = None,
    config: Path | None = None,
    half: bool = False,
) -> None:
    """Write model.safetensors, config.json and README.md (the card) into `out`.

    Args:
        network: what is released.
        out: folder to write; a release that is there is replaced.
        training: how it came about, for the card.
        terms: what is stated of licences.
        measured: of it, for the card: as `read_results` gives it, or names and numbers. None or no
            numbers: nothing was, and the card says so.
        picture: a PNG to show on the card.
        config: YAML of its training, which is copied.
        half: weights in float16.

    Raises:
        ValueError: see `Terms.check` and `check_out`.
    """
    terms.check()
    check_out(out)
    training = Training(training) if isinstance(training, str) else training
    if not isinstance(measured, Measured):
        measured = numbers_measured(measured) if measured else None
    out.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as folder:
        partial = Path(folder) / out.name
        (copy.deepcopy(network).half() if half else network).save_pretrained(partial)
        beside = _copy_beside(partial, picture, config)
        text = network_card(network, out.name, terms, training, measured, beside)
        (partial / "README.md").write_text(text, encoding="utf-8")
        shutil.rmtree(out, ignore_errors=True)
        os.replace(partial, out)


def check_out(out: Path) -> None:
    """Refuse to replace what is no release.

    Raises:
        ValueError: `out` is there and is something else.
    """
    if out.exists() and not is_release(out):
        raise ValueError(f"{out} is there and is no release: name another folder, or empty it")


def is_release(folder: Path) -> bool:
    """Whether a folder may be replaced by a release: it is one, or it is empty."""
    names = {file.name for file in folder.iterdir()} if folder.is_dir() else {"a file"}
    ours = names <= {"config.json", "model.safetensors", "README.md", PICTURE, TRAINING}
    about = folder / "README.md"
    return ours or (about.is_file() and MADE in about.read_text(errors="replace"))
