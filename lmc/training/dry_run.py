"""What a training would do and need, said before any of it: `fit --config … --dry_run true`.

No weights are loaded and nothing is written into the run folder. Where a prior comes from the hub,
its small JSON files are fetched as far as they are not in the cache, like by any other run.
"""

import inspect
import json
import math
import os
import pkgutil
import tarfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from huggingface_hub import HfApi, try_to_load_from_cache
from lightning.pytorch.cli import instantiate_class
from safetensors import safe_open

from lmc.shards.stream import expand_shards
from lmc.specs import denoiser_evaluations, source_evaluations
from lmc.training.base import TrainingModule
from lmc.training.validation import Validation

DENOISERS, CODERS = ("unet", "transformer"), ("vae",)
PARTS = (*DENOISERS, *CODERS, "text_encoder*", "tokenizer*", "scheduler")
# A prior that is not here; any side that can be halved will do.
UNKNOWN = SimpleNamespace(channels=3, latent=False, image_size=None, z_size=1 << 12)
COUNTED = 100  # shards whose samples are counted; of more, the number is an estimate


def report(
    model_class: type[TrainingModule], config: Mapping[str, Any], run: Path, save_every: int
) -> str:
    """The report, one line a fact.

    Args:
        model_class: of the stage.
        config: the parsed 'model', 'data' and 'trainer', as plain values.
        run: the run folder.
        save_every: steps between checkpoints.

    Raises:
        ValueError: of the model's constructor, or max_steps says no number of steps.
    """
    trainer, data = config["trainer"], config["data"]
    if trainer["max_steps"] < 1:
        raise ValueError("trainer.max_steps must say how many steps to train")
    named = config["model"].get("prior")  # one that is trained itself has none
    prior, missing = build_prior(named) if named else (None, "")
    model = build_model(model_class, config["model"], prior)
    size = sum(p.numel() for p in model.network.parameters())
    ranks, how = processes(trainer)
    batch = ranks * data["batch_size"] * trainer["accumulate_grad_batches"]
    lines = [("dry run", "nothing is loaded, trained, or written into the run folder")]
    kind = type(model.network).__name__
    known = prior or not named or "channels" not in _parameters(model.network)
    guess = "" if known else ", at three channels"
    lines.append(("network", f"{kind}, {size:,} parameters{guess}"))
    lines += prior_lines(named, prior, missing) if named else []
    corrector = _options(config["model"].get("loss")).get("corrector")
    if isinstance(corrector, str):
        lines.append(("corrector", f"{corrector}: {_corrector(corrector)}"))
    for split in ("train", "heldout"):
        lines.append((f"data.{split}", shards(data[split])))
    side = model.image_size if data["image_size"] is None else data["image_size"]
    lines.append(("images", f"{side} x {side} pixels" if side else "of the prior's size"))
    lines.append(("steps", f"{trainer['max_steps']:,}"))
    lines.append(
        (
            "batch",
            f"{batch} = {ranks} processes ({how}) x {data['batch_size']} images x "
            f"{trainer['accumulate_grad_batches']} accumulated"
            + (f"; the paper's is {model.paper_batch}" if model.paper_batch else "")
            + "; nothing rescales the learning rate",
        )
    )
    if named:
        lines.append(("evaluations", evaluations(config["model"], batch * trainer["max_steps"])))
    lines.append(("validation", validation(config)))
    lines.append(("memory", memory(size, named, prior, ranks)))
    lines.append(
        (
            "disk",
            f"{nbytes(16 * size)} for the checkpoint, twice that while it is written, every "
            f"{save_every:,} steps (weights, average, Adam's two moments)"
            + ("; as much for the best one" if _clip(config["model"]) else ""),
        )
    )
    lines += [("download", downloads(named))] if named else []
    there = (run / "checkpoints" / "last.ckpt").exists()
    lines.append(("run", f"{run}: " + ("a run is there and would go on" if there else "new")))
    return "\n".join(f"{name:<13}{text}" for name, text in lines)


def build_prior(config: Mapping[str, Any]) -> tuple[Any, str]:
    """The prior, or None and why it cannot be had here. Constructing it loads no weights."""
    try:
        return instantiate_class((), dict(config)), ""
    except FileNotFoundError as error:
        return None, str(error)


def build_model(
    model_class: type[TrainingModule], config: Mapping[str, Any], prior: Any
) -> TrainingModule:
    """The training module with its network on the meta device, for the sake of its sizes."""
    given = {**config, "prior": prior or UNKNOWN} if "prior" in config else dict(config)
    if "loss" in given:
        # It may load a corrector's weights.
        given["loss"] = SimpleNamespace(choose_time=lambda time: time)
    with torch.device("meta"):
        return model_class(**given)


def prior_lines(config: Mapping[str, Any], prior: Any, missing: str) -> list[tuple[str, str]]:
    """What is known of the prior without its weights, and of the weights from their headers."""
    options = _options(config)
    name = f"{options.get('pretrained')} ({config['class_path']})"
    if prior is None:
        return [("prior", f"{name}: not here, so its size is not known: {missing}")]
    about = [
        f"{label} {getattr(prior, key)}"
        for key, label in (("prediction_type", "predicts"), ("image_size", "image size"))
        if hasattr(prior, key)
    ]
    about += [f"{prior.channels} channels", str(options.get("dtype", ""))]
    lines = [("prior", f"{name}: " + ", ".join(filter(None, about)))]
    for label, parts in (
        ("denoiser", DENOISERS),
        ("image coder", CODERS),
        ("text encoder", ("text_encoder*",)),
    ):
        count, size, files = weights(prior, parts)
        note = (
            "; loaded for prompts that are not in the cache, then freed" if "text" in label else ""
        )
        if files:
            lines.append(("", f"{label}: {count:,} parameters, {nbytes(size)} on disk{note}"))
        elif label == "denoiser":
            lines.append(("", "denoiser: its weights are not here"))
    return lines


def weights(prior: Any, parts: Iterable[str]) -> tuple[int, int, int]:
    """(parameters, bytes on disk, files) of some parts of a pipeline, from the files' headers."""
    folder = Path(getattr(prior, "folder", None) or os.devnull)
    files = [file for part in parts for file in sorted(folder.glob(f"{part}/*.safetensors"))]
    counts: dict[tuple[str, str], int] = {}  # fp16 and fp32 files may hold the same tensors
    for file in files:
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (it is no dict)
                shape = tensors.get_slice(name).get_shape()
                counts[file.parent.name, name] = torch.Size(shape).numel()
    return sum(counts.values()), sum(file.stat().st_size for file in files), len(files)


def shards(pattern: str) -> str:
    """How many shards a pattern names, and the samples in those that are local tars."""
    try:
        found = expand_shards(pattern)
    except (FileNotFoundError, ValueError) as error:
        return str(error)
    local = [url for url in found if url.endswith(".tar") and Path(url).exists()]
    if not local:
        return f"{len(found)} shards, not local: their samples are not counted"
    samples = sum(count_samples(url) for url in local[:COUNTED])
    if len(local) > COUNTED:
        samples = round(samples * len(local) / COUNTED)
        return f"{len(found)} shards, about {samples:,} samples (the first {COUNTED} counted)"
    return f"{len(found)} shards, {samples:,} samples"


def count_samples(url: str) -> int:
    """The samples in a shard: every one has a KEY.json."""
    with tarfile.open(url) as tar:
        return sum(member.name.endswith(".json") for member in tar)


def processes(trainer: Mapping[str, Any]) -> tuple[int, str]:
    """How many processes will train, and how that is known."""
    devices, nodes = trainer["devices"], trainer["num_nodes"]
    text = f"devices {devices}, nodes {nodes}"
    if isinstance(devices, str) and devices not in ("auto", "-1"):
        devices = len([d for d in devices.split(",") if d]) if "," in devices else int(devices)
    if isinstance(devices, list):
        devices = len(devices)
    if devices in ("auto", "-1", -1):
        gpus = 0 if trainer["accelerator"] == "cpu" else torch.cuda.device_count()
        devices, text = max(1, gpus), f"{text}, {gpus} GPUs here"
    return int(devices) * nodes, text


def evaluations(model: Mapping[str, Any], images: int) -> str:
    """The denoiser evaluations of a whole training on `images` images."""
    each, what = per_image(model)
    if each is None:
        return f"not known of the loss {what}"
    before, note = 0, ""
    if model.get("kind") == "hybrid" and model["closed_form"] is None:
        before = model["closed_form_triplets"]
        note = f", and {before:,} before for the closed form"
    return (
        f"{each * images + before:,} of the denoiser = {each} per image and step ({what}) x "
        f"{images:,}{note}"
    )


def per_image(model: Mapping[str, Any]) -> tuple[int | None, str]:
    """The denoiser evaluations of an image and step, and of what."""
    if "loss" not in model:
        return 1, "a triplet"
    loss = pkgutil.resolve_name(model["loss"]["class_path"])
    each, what = denoiser_evaluations(loss, _options(model["loss"]))
    if each is not None and model.get("every_class"):
        classes = len(model["classes"])
        of_source = source_evaluations(loss, _options(model["loss"]))
        each = (each - of_source) * classes + of_source
        return each, f"{what}, each image to {classes} classes"
    return each, what


def validation(config: Mapping[str, Any]) -> str:
    """What will be looked at of the held-out images, how often, and with what.

    Raises:
        ValueError: of `Validation`.
    """
    model, interval = config["model"], config["trainer"]["val_check_interval"]
    # Anything else is Lightning's: a share of an epoch, a span of time.
    every = f"every {interval:,} steps" if isinstance(interval, int) else f"by {interval!r}"
    if "validation" not in model:
        compared = model.get("closed_form")
        beside = f", beside {compared}: {_corrector(compared)}" if compared else ""
        images = model.get("heldout_images")
        many = "all" if images is None else f"the first {images:,}"
        draws, tested = model.get("heldout_draws", 1), model.get("stability", 0)
        each = f", {draws} evaluations each (not for stored triplets)" if draws > 1 else ""
        last = f"; the stability test on {tested} at the end" if tested else ""
        return f"{every} and at the end, {many} held-out images{each}{beside}{last}"
    what = Validation(**model["validation"])
    clip = f"CLIP {what.clip}, in float32 in each process" if what.clip else "no CLIP"
    truth = f"; against the true counterparts in {what.truth}" if what.truth else ""
    return (
        f"{every} and at the end, {what.images} held-out images to {len(model['classes'])} "
        f"classes; {clip}{truth}"
    )


def _clip(model: Mapping[str, Any]) -> str | None:
    return (model.get("validation") or {}).get("clip")


def memory(size: int, config: Mapping[str, Any] | None, prior: Any, ranks: int) -> str:
    """Bytes a process needs for what does not depend on the batch."""
    copies = 5 if ranks == 1 else 6  # weights, gradients, two moments, average; DDP's buckets
    text = f"{nbytes(4 * copies * size)} for the network, its gradients, Adam and the average"
    count = weights(prior, (*DENOISERS, *CODERS))[0] if prior else 0
    if count:
        dtype = getattr(torch, str(_options(config).get("dtype", "float32")))
        text += f" + {nbytes(count * dtype.itemsize)} for the prior in {str(dtype)[6:]}"
    elif config:
        text += " + the prior (not known here)"
    return f"{text}, in each process; activations are not estimated"


def downloads(config: Mapping[str, Any]) -> str:
    """The files of a hub id that a run would fetch."""
    options = _options(config)
    name, revision = str(options.get("pretrained")), options.get("revision")
    if Path(name).is_dir():
        return "nothing, the prior is a local folder"
    try:
        about = HfApi().model_info(name, revision=revision, files_metadata=True, timeout=10)
    except Exception as error:  # whatever the network or the hub has to say
        reason = str(error).strip().splitlines() or [type(error).__name__]
        return f"cannot be known: the hub cannot be asked about {name} ({reason[0]})"
    wanted = [
        file
        for file in about.siblings or []
        if file.rfilename == "model_index.json"
        or any(Path(file.rfilename).match(f"{part}/*") for part in PARTS)
    ]
    absent = [
        file
        for file in wanted
        if not isinstance(try_to_load_from_cache(name, file.rfilename, revision=revision), str)
    ]
    if not absent:
        return f"nothing, all {len(wanted)} files of {name} are in the cache"
    size = sum(file.size or 0 for file in absent)
    return f"at most {len(absent)} files of {name}, {nbytes(size)}: " + ", ".join(
        f"{file.rfilename} {nbytes(file.size or 0)}"
        for file in sorted(absent, key=lambda file: -(file.size or 0))[:5]
    )


def nbytes(count: int) -> str:
    """A number of bytes as '31.4 MB'."""
    if count < 1000:
        return f"{count} bytes"
    units = ("kB", "MB", "GB", "TB")
    power = min(len(units), int(math.log10(count) / 3))
    return f"{count / 1000**power:.1f} {units[power - 1]}"


def _corrector(pretrained: str) -> str:
    file = Path(pretrained) / "config.json"
    if file.exists():
        prior = json.loads(file.read_text()).get("prior", {})
        return f"here, of the prior {prior.get('pretrained')}"
    return "no such folder here; train and release it first, or it is fetched from the hub"


def _options(config: Any) -> Mapping[str, Any]:
    return (config or {}).get("init_args") or {}


def _parameters(network: Any) -> Iterable[str]:
    return inspect.signature(type(network)).parameters
