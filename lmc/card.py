"""The model card of a release: whose rights it touches, what was measured, how it was trained.

Markdown with the hub's YAML header. Licences are stated by who makes it and figures are measured:
what is not known is not in it.
"""

import json
import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from lmc import __version__
from lmc.filter import FilterCorrector, HybridCorrector
from lmc.load import Network
from lmc.measure.comparison import read_comparison
from lmc.measure.tables import MEASURES, markdown, measured_cell
from lmc.translator import Translator

MADE = "Made with LMC-SDS's code"  # by which a card of this library's is known
PICTURE, TRAINING = "samples.png", "training.yaml"  # beside it
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


@dataclass(frozen=True)
class Measured:
    """What was measured of a network, for its card.

    Attributes:
        values: by measure, its value, and low and high where it has an interval: a summary of
            docs/evaluation.md.
        source: the same of the untouched source images, where they were measured too.
        on: which pictures, in words.
        clip: the CLIP of CLIP's measures.
    """

    values: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    source: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    on: str = "held-out pictures"
    clip: str | None = None

    def heading(self, name: str) -> str:
        """Of a measure."""
        head = MEASURES[name][0] if name in MEASURES else name
        return head.replace(" ({clip})", f" ({self.clip})" if self.clip else "")

    def table(self) -> str:
        """As Markdown, a line a measure, those that are known first and in their order."""
        known = [name for name in MEASURES if name in self.values]
        rows = [["measure", "this network", *(["untouched source"] if self.source else [])]]
        for name in (*known, *(name for name in self.values if name not in MEASURES)):
            form = MEASURES[name][1] if name in MEASURES else ".4g"
            both = (self.values, self.source) if self.source else (self.values,)
            rows.append(
                [self.heading(name), *(measured_cell(each.get(name), form) for each in both)]
            )
        return markdown(rows)


def numbers_measured(numbers: Mapping[str, Any], on: str = Measured.on) -> Measured:
    """Plain numbers by name, without intervals; what else is in it is left out."""
    values = {
        name: {"value": value}
        for name, value in numbers.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }
    return Measured(values, on=on)


def read_results(file: Path, row: str | None = None) -> Measured:
    """What `lmc evaluate`'s JSON, a folder of `lmc compare`, or any JSON of numbers says.

    Args:
        file: one of these. Of a comparison, the rows are the losses, with their first seeds.
        row: which row is meant; None where there is but one beside the source images.

    Raises:
        FileNotFoundError: there is no such file, or it is no finished comparison.
        ValueError: there is no such row, several and none is named, or it holds something else.
    """
    try:
        content = read_comparison(file)[0] if file.is_dir() else json.loads(file.read_bytes())
        results = dict(content)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{file} holds no JSON of results: {error}") from error
    rows = results.get("rows", results)  # of lmc evaluate, or numbers by name
    if row is None and "rows" in results:
        several = [name for name in rows if name != "source"]
        if len(several) != 1:
            raise ValueError(f"{file} has the rows {', '.join(several)}: --row names one of them")
        (row,) = several
    if row is not None and row not in rows:
        raise ValueError(f"{file} has no row {row!r}; it has {', '.join(rows)}")
    if "rows" not in results:
        measured = numbers_measured(rows if row is None else rows[row])
        if not measured.values:
            raise ValueError(f"{file} holds no numbers: --results is a file with some")
        return measured
    heldout, settings = results["heldout"], results["settings"]
    found = {
        name: {
            measure: value
            for measure, value in rows[name]["summary"].items()
            if not measure.startswith(("mean_", "deviation_"))  # of the channels
        }
        for name in {row, "source"} & rows.keys()
    }
    return Measured(
        found[row],
        found.get("source", {}) if row != "source" else {},
        f"{heldout['count']} held-out pictures, each to {', '.join(settings['classes'])} "
        f"([95 % bootstrap intervals]; the pictures' digest is {heldout['digest'][:16]})",
        settings["clip"],
    )


@dataclass(frozen=True)
class Training:
    """How a network came about, for its card.

    Attributes:
        how: in words.
        config: of its training.
        identities: what its checkpoint says of prior and corrector, by the key of the config.
    """

    how: str
    config: Mapping[str, Any] = field(default_factory=dict)
    identities: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def identity(self, key: str) -> Mapping[str, Any]:
        """Of what the config names under `key`; empty where the checkpoint says nothing."""
        return next((x for name, x in self.identities.items() if name.startswith(key)), {})

    def lines(self) -> list[str]:
        """Of the loss with ω, the corrector and the prior, as far as they are known."""
        found = []
        model = self.config.get("model") or {}
        loss = model.get("loss") or {}
        if isinstance(loss, Mapping) and "class_path" in loss:
            options = dict(loss.get("init_args") or {})
            corrector = options.pop("corrector", None)
            scale = options.pop("guidance_scale", None)
            omega = "" if scale is None else f", guidance scale ω = {scale:g}"
            others = ", ".join(f"{k} {json.dumps(v)}" for k, v in options.items() if v is not None)
            others = f" ({others})" if others else ""
            found.append(f"- Loss: `{loss['class_path']}`{omega}{others}")
            digest = self.identity("model.loss").get("digest")
            if digest:
                found.append(f"- Its corrector: `{corrector}`, digest `{digest}`")
        prior = self.identity("model.prior")
        if prior:
            found.append(
                f"- Prior: `{prior.get('pretrained')}`, {prior.get('prediction_type')}, digest of "
                f"its denoiser `{prior.get('digest')}`"
            )
        return found


def network_card(
    network: Network,
    name: str,
    terms: Terms,
    training: Training,
    measured: Measured | None,
    beside: Collection[str] = (),
) -> str:
    """The card of a corrector or translator.

    Args:
        network: what is released.
        name: of the release.
        terms: what is stated of licences.
        training: how it came about.
        measured: None: nothing was.
        beside: which of `PICTURE` and `TRAINING` lie beside the card.
    """
    if isinstance(network, Translator):
        text = _TRANSLATOR
        about = (
            f"A feed-forward translator of {network.image_size} x {network.image_size} images "
            f"to {', '.join(network.classes)}: one small U-Net, trained by score distillation "
            "from a text-to-image model, which it does without."
        )
        snippet = TRANSLATE.format(target=network.classes[0])
    else:
        text = _CORRECTOR
        prior = "\n".join(f"- {key}: `{value}`" for key, value in network.prior.items())
        of = "closed-form corrector" if isinstance(network, FilterCorrector) else "corrector b̂_ψ"
        about = f"The {of} of one prior, and valid for no other:\n\n{prior}"
        channels, side = network.arguments["channels"], _side(network)
        snippet = CORRECT.format(kind=type(network).__name__, channels=channels, side=side)
    lines = [
        f"- Licence of these weights: {named(terms)}",
        f"- Trained on: {terms.data}",
        f"- With the prior: {terms.prior_license}",
    ]
    return card(
        header(network, name, terms, measured),
        name,
        about,
        snippet,
        [f"- {MADE}, version {__version__}: {training.how}.", *training.lines()],
        lines,
        measured,
        text,
        beside,
    )


TRANSLATE = """from PIL import Image

from lmc import Translator

translator = Translator.from_pretrained("…")
picture = Image.open("cat.jpg")  # of any size
translator.translate(picture, to="{target}").save("{target}.png")"""

CORRECT = """import torch

from lmc import {kind}

corrector = {kind}.from_pretrained("…")
z = torch.zeros(1, {channels}, {side}, {side})  # an image in the prior's space
t = torch.tensor([0.5])  # in (0, 1)
z_hat = torch.randn_like(z)  # the prior's one-step estimate of it
b = corrector.correct(z, t, z_hat)  # LMC-SDS moves z along z_hat - b"""

_TRANSLATOR = """## Intended use

Research on score distillation, and pictures like those it was trained on. `…` above is this \
folder, or its id on the hub; `pip install lmc-sds` is all that it needs. From the command line: \
`lmc translate cat.jpg --translator … --out out`.

## Limits

It knows pictures like those it was trained on, and the classes above: of any other picture it \
makes something too, without a warning. What it adds is what its prior holds for likely, with the \
prior's faults and prejudices; what it changes is no statement about what is in a picture. Sizes \
far from the one it was trained at are scaled to that and back, which costs detail."""

_CORRECTOR = """## Intended use

As the corrective of LMC-SDS with the prior above: `lmc.LMC("…")` in Python, or \
`--model.loss LMC --model.loss.corrector …` of a training; `…` is this folder, or its id on the \
hub. `pip install 'lmc-sds[train]'` brings what loads a prior.

## Limits

It is refused with any other prior. What it predicts is right on pictures like those it was \
trained on; whether an optimisation that leaves them holds or runs away, `lmc stability` says."""


def _side(network: Any) -> int:
    """Of a z that a corrector takes."""
    if isinstance(network, FilterCorrector):
        return int(network.arguments["size"])
    if isinstance(network, HybridCorrector):
        return int(network.arguments["closed_form"]["size"])
    return int(4 * network.unet.factor)


def card(
    head: ModelCardData,
    title: str,
    about: str,
    snippet: str,
    trained: Sequence[str],
    licences: Sequence[str],
    measured: Measured | None,
    text: str = "",
    beside: Collection[str] = (),
) -> str:
    """A card of these parts, in Markdown.

    Args:
        head: the hub's keys.
        title, about: what it is.
        snippet: Python that uses it.
        trained, licences: lines on these.
        measured: None: nothing was.
        text: on intended use and limits.
        beside: see `network_card`.
    """
    figures = "Nothing was measured."
    if measured is not None:
        figures = f"On {measured.on}, and of no others:\n\n{measured.table()}"
    if TRAINING in beside:
        trained = [*trained, f"- [{TRAINING}]({TRAINING}): the configuration, every setting of it"]
    parts = [
        f"---\n{head.to_yaml()}\n---",
        f"# {title}",
        about,
        *([f"![samples]({PICTURE})"] if PICTURE in beside else []),
        f"## How to use\n\n```python\n{snippet}\n```",
        f"## Measured\n\n{figures}",
        "## Training\n\n" + "\n".join(trained),
        *([text] if text else []),
        "## Licences\n\n" + "\n".join(licences),
    ]
    return "\n\n".join(parts) + "\n"


def named(terms: Terms) -> str:
    """The licence of the weights, as a card says it."""
    if terms.license == "other":
        return f"[{terms.license_name}]({terms.license_link})"
    return str(terms.license)


def header(
    network: Network, name: str, terms: Terms, measured: Measured | None = None
) -> ModelCardData:
    """The card's header: the hub's keys, and training_data and prior_license in free text."""
    tags = ["score-distillation", "lmc-sds"]
    more: dict[str, Any] = {}
    if isinstance(network, Translator):
        tags.append("image-to-image")
        more = {"pipeline_tag": "image-to-image"}
    elif _is_hub_id(pretrained := str(network.prior.get("pretrained"))):
        # Without the second the hub takes it for the prior itself, trained on.
        more = {"base_model": pretrained, "base_model_relation": "adapter"}
    task = "image-to-image" if isinstance(network, Translator) else "score-distillation"
    return ModelCardData(
        library_name="lmc-sds",
        tags=tags,
        prior_license=terms.prior_license,
        **stated_header(terms),
        **model_index(name, task, terms, measured),
        **more,
    )


def stated_header(terms: Terms) -> dict[str, Any]:
    """What every header says of licences and data."""
    return {
        "license": terms.license,
        "license_name": terms.license_name,
        "license_link": terms.license_link,
        "datasets": list(terms.datasets) or None,
        "training_data": terms.data,
    }


def model_index(name: str, task: str, terms: Terms, measured: Measured | None) -> dict[str, Any]:
    """The header's keys of what was measured; none where nothing was.

    Args:
        name: of the release.
        task: the hub's name of what it does.
        terms: whose data name what it was measured on.
        measured: what was.
    """
    if measured is None:
        return {}
    results = [
        EvalResult(
            task_type=task,
            dataset_type=terms.datasets[0] if terms.datasets else "other",
            dataset_name=str(terms.data),
            dataset_split="held out",
            metric_type=measure,
            metric_name=measured.heading(measure),
            metric_value=each["value"],
        )
        for measure, each in measured.values.items()
        if math.isfinite(each["value"])
    ]
    return {"model_name": name, "eval_results": results} if results else {}


def _is_hub_id(pretrained: str) -> bool:
    """Whether a prior's name is an id on the hub, and no folder."""
    try:
        validate_repo_id(pretrained)
    except HFValidationError:
        return False
    return "/" in pretrained and not Path(pretrained).exists()
