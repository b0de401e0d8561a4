"""A trained network as a folder others can load: averaged weights, config, card. No Lightning.

translator = Translator.from_pretrained("runs/mine/release")  # a folder or a hub id
huggingface_hub.upload_folder(repo_id="me/cats-to-others", folder_path="runs/mine/release")
"""

import json
import os
import re
import shutil
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import yaml
from huggingface_hub import ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from lmc import __version__
from lmc.files import whole_folder
from lmc.filter import FilterCorrector
from lmc.load import Network, load_averaged
from lmc.measure.comparison import read_comparison
from lmc.measure.results import numbers
from lmc.translator import Translator

MADE = "Made with LMC-SDS's code"  # by which a card of this library's is known
# What has to be stated, and how that is asked for.
ASKED = {
    "license": "of the weights: an id of the hub's list, as apache-2.0 or cc-by-nc-4.0, or other",
    "data": "what it was trained on, with its licence",
    "prior_license": "the prior and its licence",
}


@dataclass(frozen=True)
class Terms:
    """Whose rights a release touches: stated by who makes it, never assumed.

    Args:
        license: of the weights: an id of the hub's list of licences, such as apache-2.0 or
            cc-by-nc-4.0, or other.
        license_name: of license other: its name.
        license_link: of license other: where it can be read.
        data: what the network was trained on, with its licence.
        datasets: of that, what is on the hub, by id.
        prior_license: the prior and its licence.
    """

    license: str | None = None
    license_name: str | None = None
    license_link: str | None = None
    data: str | None = None
    datasets: Sequence[str] = ()
    prior_license: str | None = None

    def check(self, asked: Collection[str] = ASKED) -> None:
        """Refuse what does not say enough.

        Args:
            asked: what has to be stated, keys of `ASKED`.

        Raises:
            ValueError: names what is missing, or wrong, and what to write.
        """
        missing = [f"--{key} ({ASKED[key]})" for key in asked if not getattr(self, key)]
        if missing:
            raise ValueError(
                f"a release has to state {', '.join(missing)}: give it, or write it into the "
                "section 'release' of the training's config, without the dashes"
            )
        if not re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", str(self.license)):
            raise ValueError(f"--license {self.license!r}: has to be {ASKED['license']}")
        named = bool(self.license_name) + bool(self.license_link)
        if named != (2 if self.license == "other" else 0):
            raise ValueError(
                f"--license {self.license}: --license_name and --license_link say what 'other' is; "
                "give both with it, and neither with another"
            )


def stated(config: Mapping[str, Any], asked: Collection[str] = ASKED, **options: Any) -> Terms:
    """What a release states, checked.

    Args:
        config: a training's, whose section 'release' counts where an option is not given.
        asked: what has to be stated, keys of `ASKED`.
        options: of `Terms`; None is not given.

    Raises:
        ValueError: see `Terms.check`; or the section holds something else.
    """
    section = config.get("release") or {}
    known = [field.name for field in fields(Terms)]
    unknown = sorted(set(section) - set(known)) if isinstance(section, Mapping) else [section]
    if unknown:
        raise ValueError(f"release: {unknown[0]!r} in the config is none of {', '.join(known)}")
    given = {name: value for name, value in options.items() if value is not None}
    terms = Terms(**{**section, **given})
    terms.check(asked)
    return terms


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
    picture: Path | None = None,
) -> None:
    """Turn a run folder into a release: model.safetensors, config.json and README.md, the card.

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
        row: which row of it is this network's.
        picture: a PNG for the card.

    Raises:
        FileNotFoundError, ValueError: see `load_averaged`.
        ValueError: see `stated`, `check_out` and `read_results`.
    """
    check_out(out)
    measured = read_results(results, row)
    given: dict[str, Any] = {
        "license": license,
        "license_name": license_name,
        "license_link": license_link,
        "data": data,
        "datasets": datasets,
        "prior_license": prior_license,
    }
    config = _config(run)
    kinds = (kind for kind, model in MODELS.items() if (run / kind / model.mark).exists())
    made = next(kinds, None)
    if made is not None:
        terms = stated(config, ("license", "data"), **given)
        write_model_release(run, made, config, out, terms, measured, picture)
        print(f"released to {out}: license {terms.license}; trained on {terms.data}")
        return
    network, step = load_averaged(run, best)
    terms = stated(config, **given)
    which = ", the best of the run by held-out R-Precision" if best else ""
    how = f"{step} steps{which}; averaged weights"
    write_release(network, out, how, terms, measured, picture)
    print(
        f"released to {out}: license {terms.license}; trained on {terms.data}; "
        f"prior {terms.prior_license}"
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
    results: Mapping[str, Any],
    picture: Path | None,
) -> None:
    """Copy what a training of labelled pictures wrote, with a card.

    Args:
        run: its folder, which holds `kind`.
        kind: of `MODELS`.
        config: of the run.
        out: folder to write; a release that is there is replaced.
        terms: what is stated of licences.
        results: what was measured of it, for the card.
        picture: a PNG to show on the card.
    """
    model, settings = MODELS[kind], config["model"]
    captions = [settings["prompt"].format(name) for name in settings["classes"]]
    side = settings["image_size"]
    out.parent.mkdir(parents=True, exist_ok=True)
    with whole_folder(out) as partial:
        shutil.copytree(run / kind, partial, dirs_exist_ok=True)
        if picture is not None:
            shutil.copy(picture, partial / "samples.png")
        head = ModelCardData(
            library_name=model.library,
            pipeline_tag=model.task,
            tags=["lmc-sds"],
            **_stated(terms),
        )
        about = model.about.format(", ".join(map(repr, captions)), side, side)
        how = f"trained by `data/{kind}/train.py`; averaged weights"
        lines = [f"- Licence of these weights: {_named(terms)}", f"- Trained on: {terms.data}"]
        shown = picture is not None
        text = _card(head, model.title, about, how, lines, model.snippet, results, shown)
        (partial / "README.md").write_text(text)


def _config(run: Path) -> dict[str, Any]:
    """The config.yaml of a run folder, or of the one that a checkpoint is in; {} without one."""
    file = (run if run.is_dir() else run.parent.parent) / "config.yaml"
    try:
        config = yaml.safe_load(file.read_text()) if file.exists() else {}
    except yaml.YAMLError as error:
        raise ValueError(f"{file} is no YAML: {error}") from error
    return config if isinstance(config, dict) else {}


def read_results(file: Path | None, row: str | None) -> dict[str, Any]:
    """The numbers by name of a row of `lmc evaluate`'s JSON, or of any JSON of numbers.

    Or of a folder of `lmc compare`, whose rows are the losses, with their first seeds.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: there is no such row, one is named of no file, or the file holds something else.
    """
    if file is None:
        if row is not None:
            raise ValueError(f"--row {row} is of --results: name that file too")
        return {}
    try:
        content = read_comparison(file)[0] if file.is_dir() else json.loads(file.read_bytes())
        results = dict(content)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{file} holds no JSON of results: {error}") from error
    if row is None:
        return results
    rows = results.get("rows", results)  # of lmc evaluate, or numbers by name
    if row not in rows:
        raise ValueError(f"{file} has no row {row!r}; it has {', '.join(rows)}")
    return numbers(rows[row]) if "rows" in results else rows[row]


def write_release(
    network: Network,
    out: Path,
    how: str,
    terms: Terms,
    results: Mapping[str, Any] | None = None,
    picture: Path | None = None,
) -> None:
    """Write model.safetensors, config.json and README.md (the card) into `out`.

    Args:
        network: what is released.
        out: folder to write; a release that is there is replaced.
        how: how it came about, for the card.
        terms: what is stated of licences.
        results: what was measured of it, for the card: names and numbers.
        picture: a PNG to show on the card.

    Raises:
        ValueError: see `Terms.check` and `check_out`.
    """
    terms.check()
    check_out(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as folder:
        partial = Path(folder) / out.name
        network.save_pretrained(partial)
        if picture is not None:
            shutil.copy(picture, partial / "samples.png")
        (partial / "README.md").write_text(card(network, how, terms, results, picture is not None))
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
    ours = names <= {"config.json", "model.safetensors", "README.md", "samples.png"}
    about = folder / "README.md"
    return ours or (about.is_file() and MADE in about.read_text(errors="replace"))


def card(
    network: Network, how: str, terms: Terms, results: Mapping[str, Any] | None, picture: bool
) -> str:
    """The model card, Markdown with the hub's YAML header."""
    kind = type(network).__name__
    if isinstance(network, Translator):
        about = (
            f"A feed-forward translator of {network.image_size} x {network.image_size} images "
            f"to {', '.join(network.classes)}."
        )
    else:
        prior = "\n".join(f"- {key}: `{value}`" for key, value in network.prior.items())
        of = "closed-form corrector" if isinstance(network, FilterCorrector) else "corrector b̂_ψ"
        about = f"The {of} of one prior, and valid for no other:\n\n{prior}"
    lines = [
        f"- Licence of these weights: {_named(terms)}",
        f"- Trained on: {terms.data}",
        f"- With the prior: {terms.prior_license}",
    ]
    snippet = f'from lmc import {kind}\n\nnetwork = {kind}.from_pretrained("…").eval()'
    return _card(header(network, terms), kind, about, how, lines, snippet, results, picture)


def _card(
    head: ModelCardData,
    title: str,
    about: str,
    how: str,
    lines: Sequence[str],
    snippet: str,
    results: Mapping[str, Any] | None,
    picture: bool,
) -> str:
    """A card of these parts, in Markdown."""
    values = {k: v for k, v in (results or {}).items() if isinstance(v, int | float)}
    measured = "\n".join(f"| {name} | {value:.4g} |" for name, value in values.items())
    parts = [
        f"---\n{head.to_yaml()}\n---",
        f"# {title}",
        about,
        f"{MADE}, version {__version__}: {how}.",
        "\n".join(lines),
        f"```python\n{snippet}\n```",
    ]
    if measured:
        parts.append(f"Measured on held-out images:\n\n| | |\n|---|---|\n{measured}")
    if picture:
        parts.append("![samples](samples.png)")
    return "\n\n".join(parts) + "\n"


def _named(terms: Terms) -> str:
    """The licence of the weights, as a card says it."""
    if terms.license == "other":
        return f"[{terms.license_name}]({terms.license_link})"
    return str(terms.license)


def header(network: Network, terms: Terms) -> ModelCardData:
    """The card's header: the hub's keys, and training_data and prior_license in free text."""
    tags = ["score-distillation", "lmc-sds"]
    more: dict[str, Any] = {}
    if isinstance(network, Translator):
        tags.append("image-to-image")
        more = {"pipeline_tag": "image-to-image"}
    elif _is_hub_id(pretrained := str(network.prior.get("pretrained"))):
        # Without the second the hub takes it for the prior itself, trained on.
        more = {"base_model": pretrained, "base_model_relation": "adapter"}
    return ModelCardData(
        library_name="lmc", tags=tags, prior_license=terms.prior_license, **_stated(terms), **more
    )


def _stated(terms: Terms) -> dict[str, Any]:
    """What every header says of licences and data."""
    return {
        "license": terms.license,
        "license_name": terms.license_name,
        "license_link": terms.license_link,
        "datasets": list(terms.datasets) or None,
        "training_data": terms.data,
    }


def _is_hub_id(pretrained: str) -> bool:
    """Whether a prior's name is an id on the hub, and no folder."""
    try:
        validate_repo_id(pretrained)
    except HFValidationError:
        return False
    return "/" in pretrained and not Path(pretrained).exists()
