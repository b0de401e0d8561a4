"""`lmc export`: a released network as ONNX, for programs that have no Python.

The folder holds model.onnx, model.json (what a program has to know of it) and README.md, which says
the same to a reader. Numbers go in and come out as float32, whatever is inside.
"""

import copy
import json
import statistics
import time
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import CardData, ModelCard, ModelCardData, hf_hub_download
from huggingface_hub.errors import HFValidationError
from torch import Tensor, nn

from lmc import __version__
from lmc.device import processor
from lmc.errors import require
from lmc.files import whole_folder, write_json, write_text
from lmc.filter import FilterCorrector, HybridCorrector
from lmc.hub import split_revision
from lmc.load import Network, ReleasedCorrector, load_network
from lmc.translator import Translator

OPSETS = (13, 20)
OPSET = 17
# The most that an output may differ from PyTorch's, in parts of the largest number in it or of 1.
TOLERANCE = {"float32": 1e-4, "float16": 2e-2}
FILES = {"model.onnx", "model.json", "README.md"}
# What a release's card states of rights, which its export keeps.
STATED = ("license", "license_name", "license_link", "datasets", "training_data", "prior_license")
SIDE = 64  # where the network says no size, the one it is checked and timed at
PATIENCE = 2.0  # seconds to time it in


def export(release: str, *, out: Path, fp16: bool = False, opset: int = OPSET) -> None:
    """Write a release as ONNX: model.onnx, model.json and README.md, with names, shapes and ranges.

    The batch is of any size, and so are height and width where the network is a U-Net alone. What
    was written is run by onnxruntime and compared with PyTorch's output before it is kept.

    Args:
        release: folder or hub id[@revision] of a translator or corrector.
        out: folder to write; an export that is there is replaced.
        fp16: the U-Net in half precision, half the file; inputs and outputs stay float32.
        opset: version of ONNX's operators, 13 to 20.

    Raises:
        OSError, ValueError: see `load_network`; opset is out of range, fp16 is asked for where
            there is no U-Net, `out` is something else, or the outputs are not PyTorch's.
        ImportError: onnx or onnxruntime is not installed.
    """
    import_onnx()
    check_opset(opset)
    check_out(out, FILES)
    network = load_network(release).eval()
    card = released_card(release)
    out.parent.mkdir(parents=True, exist_ok=True)
    with whole_folder(out) as partial:
        about = write_onnx(network, partial, fp16, opset)
        write_text(partial / "README.md", _card(about, card))
    print(summary(about, out))


def import_onnx() -> None:
    """Fail at once where onnx or onnxruntime is not installed, and not after all the work."""
    import onnx  # noqa: F401
    import onnxruntime  # noqa: F401


def check_opset(opset: int) -> None:
    """Refuse what the exporter cannot write.

    Raises:
        ValueError: it is out of range.
    """
    low, high = OPSETS
    require(low <= opset <= high, "--opset", f"from {low} to {high}", opset)


def check_out(out: Path, files: Iterable[str]) -> None:
    """Refuse to replace a folder that holds anything but `files`.

    Raises:
        ValueError: `out` is there and holds something else, or is a file.
    """
    there = {file.name for file in out.iterdir()} if out.is_dir() else {out.name}
    if out.exists() and not there <= {*files}:
        other = sorted(there - {*files})[0]
        raise ValueError(
            f"--out {out} is there and is no earlier one ({other}): name another folder"
        )


def released_card(release: str) -> CardData:
    """The header of a release's card; empty where there is no card.

    Raises:
        ValueError: the header is no YAML.
    """
    name, revision = split_revision(release)
    file = Path(name) / "README.md"
    if not Path(name).is_dir():
        try:
            file = Path(hf_hub_download(name, "README.md", revision=revision))
        except (OSError, HFValidationError):
            return CardData()
    if not file.exists():
        return CardData()
    try:
        return ModelCard(file.read_text(encoding="utf-8"), ignore_metadata_errors=True).data
    except Exception as error:  # of PyYAML's many
        raise ValueError(f"{file} has no header that can be read: {error}") from error


def summary(about: Mapping[str, Any], out: Path) -> str:
    """One line of what was written."""
    measured = about["measured"]
    return (
        f"{about['kind']} to {out}: {about['bytes'] / 1e6:.2f} MB, opset {about['opset']}, "
        f"{about['precision']}; at most {about['difference']:.1e} from PyTorch's; "
        f"{measured['milliseconds']:.1f} ms at {' x '.join(map(str, measured['size']))}"
    )


# ---------------------------------------------------------------------------------------------
# What is exported


class Port(NamedTuple):
    """An input or output: its name, type and shape, the least and most of its numbers, its use."""

    name: str
    type: str
    shape: list[str | int]
    range: list[int] | None
    about: str


class Plan(NamedTuple):
    """How a network is exported.

    Attributes:
        module: takes the inputs, gives the outputs.
        inputs, outputs: in their order.
        sizes: (height, width) it is checked at; timed at the first.
        multiple: what must divide height and width; None where they are fixed.
    """

    module: nn.Module
    inputs: list[Port]
    outputs: list[Port]
    sizes: list[tuple[int, int]]
    multiple: int | None


class _Corrected(nn.Module):
    """A corrector as it is applied: z, t and z_hat to b [LMC, Eq. 10], and b̂.

    Statistics 'none' are of no z_hat.
    """

    def __init__(self, corrector: ReleasedCorrector) -> None:
        super().__init__()
        self.corrector = corrector
        self.predict = _real(corrector)

    def forward(self, z: Tensor, t: Tensor, *z_hat: Tensor) -> tuple[Tensor, Tensor]:
        b_hat = self.predict(z, t)
        return self.corrector.normalised(b_hat, t, *z_hat or (b_hat,)), b_hat


class _Half(nn.Module):
    """A U-Net in half precision between numbers that are not."""

    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        self.unet = copy.deepcopy(unet).half()

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.unet(x.half()).float()
        return output


class _RealFilter(nn.Module):
    """`FilterCorrector` without complex numbers, which ONNX has none of: F as two matrices."""

    cos: Tensor
    sin: Tensor
    cos_back: Tensor
    sin_back: Tensor

    def __init__(self, corrector: FilterCorrector) -> None:
        super().__init__()
        self.corrector = corrector
        size = corrector.offset.shape[-1]
        index = torch.arange(size, dtype=torch.float64)
        angle = index[:, None] * index * (2 * torch.pi / size)
        half = size // 2 + 1
        # What is left out of the half spectrum is the conjugate of what is in it.
        twice = torch.full((half, 1), 2.0, dtype=torch.float64)
        twice[0] = 1
        if size % 2 == 0:
            twice[-1] = 1
        for name, wave in (("cos", angle.cos()), ("sin", angle.sin())):
            self.register_buffer(name, wave.float())
            self.register_buffer(f"{name}_back", (wave[:half] * twice / size**2).float())
        self.kept = half

    def forward(self, z: Tensor, t: Tensor) -> Tensor:
        cos, sin, half = self.cos, self.sin, self.kept
        real, imaginary = z @ cos[:, :half], -(z @ sin[:, :half])
        real, imaginary = cos @ real + sin @ imaginary, cos @ imaginary - sin @ real
        gain = self.corrector.interpolated(t, self.corrector.gain)
        mixes = self.corrector.mix_channels
        if mixes:  # by output channel, then by that of z
            real, imaginary = real[:, None], imaginary[:, None]
        a, b = gain[..., 0], gain[..., 1]
        real, imaginary = a * real - b * imaginary, a * imaginary + b * real
        if mixes:
            real, imaginary = real.sum(2), imaginary.sum(2)
        real, imaginary = cos @ real - sin @ imaginary, cos @ imaginary + sin @ real
        filtered = real @ self.cos_back - imaginary @ self.sin_back
        return filtered + self.corrector.interpolated(t, self.corrector.offset)


def _real(corrector: ReleasedCorrector) -> nn.Module:
    """A corrector's forward without complex numbers."""
    if isinstance(corrector, FilterCorrector):
        return _RealFilter(corrector)
    if isinstance(corrector, HybridCorrector):
        corrector = copy.deepcopy(corrector)
        corrector.closed_form = _RealFilter(corrector.closed_form)  # type: ignore[assignment]
    return corrector


def plan(network: Network, fp16: bool = False) -> Plan:
    """How a network is exported; it is left as it is.

    Raises:
        ValueError: fp16 of a network without a U-Net.
    """
    kind = type(network).__name__
    if fp16 and isinstance(network, FilterCorrector):
        raise ValueError(f"--fp16 is of U-Nets, and a {kind} has none: leave it out")
    network = copy.deepcopy(network)
    factor = 1 if isinstance(network, FilterCorrector) else network.unet.factor
    if fp16:
        network.unet = _Half(network.get_submodule("unet"))
    if isinstance(network, Translator):
        shape: list[str | int] = ["batch", 3, "height", "width"]
        many, side = len(network.classes), network.image_size
        names = ", ".join(f"{i} {name}" for i, name in enumerate(network.classes))
        inputs = [
            Port("image", "float32", shape, [-1, 1], "pictures, RGB"),
            Port("target", "int64", ["batch"], [0, many - 1], f"what each becomes: {names}"),
        ]
        outputs = [Port("output", "float32", shape, [-1, 1], "the pictures translated, RGB")]
        return Plan(network, inputs, outputs, _sizes(side, factor), factor)
    closed = getattr(network, "closed_form", network)
    fixed = closed.offset.shape[-1] if isinstance(closed, FilterCorrector) else None
    channels = network.arguments["channels"]
    shape = ["batch", channels, *([fixed, fixed] if fixed else ["height", "width"])]
    space = None if "latent_scale" in network.prior else [-1, 1]
    inputs = [
        Port("z", "float32", shape, space, "pictures in the prior's space, without noise"),
        Port("t", "float32", ["batch"], [0, 1], "the time of each, 0 without noise"),
        Port("z_hat", "float32", shape, None, "the prior's one-step estimate of each"),
    ]
    if network.statistics == "none":
        inputs = inputs[:2]
    outputs = [
        Port("b", "float32", shape, None, f"b̂ normalised, by statistics {network.statistics}"),
        Port("b_hat", "float32", shape, None, "b̂(z, t), which does not depend on z_hat"),
    ]
    # A latent is smaller than the pictures, by a factor that only the prior knows.
    known = None if "latent_scale" in network.prior else network.prior.get("image_size")
    sizes = [(fixed, fixed)] if fixed else _sizes(known or SIDE, factor)
    return Plan(_Corrected(network), inputs, outputs, sizes, None if fixed else factor)


def _sizes(side: int, factor: int) -> list[tuple[int, int]]:
    """Two that a U-Net takes: a square of about that side, and a small one that is no square."""
    square = -(-side // factor) * factor
    return [(square, square), (factor, 2 * factor)]


def _example(each: Plan, batch: int, size: tuple[int, int], seed: int) -> list[Tensor]:
    """Random inputs, within their ranges; the targets are all there are, in turn."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for port in each.inputs:
        if port.name == "target":
            many = port.range[1] + 1 if port.range else 1
            made.append(torch.arange(batch) % many)
        elif port.name == "t":
            made.append(torch.linspace(0.02, 0.98, batch))
        else:
            channels = int(port.shape[1])
            made.append(torch.rand(batch, channels, *size, generator=generator) * 2 - 1)
    return made


# ---------------------------------------------------------------------------------------------
# Writing and checking it


@torch.no_grad()
def write_onnx(network: Network, folder: Path, fp16: bool, opset: int) -> dict[str, Any]:
    """Write model.onnx and model.json into a folder, checked.

    Args:
        network: in evaluation mode.
        folder: that is there.
        fp16, opset: see `export`.

    Returns:
        What model.json says.

    Raises:
        ValueError: see `plan`; or the outputs are not PyTorch's.
    """
    import onnx

    each = plan(network, fp16)
    precision = "float16" if fp16 else "float32"
    about: dict[str, Any] = {
        "format": 1,
        "made_by": f"lmc {__version__}",
        "kind": type(network).__name__,
        "precision": precision,
        "opset": opset,
        "inputs": [port._asdict() for port in each.inputs],
        "outputs": [port._asdict() for port in each.outputs],
        "multiple": each.multiple,
    }
    if isinstance(network, Translator):
        about |= {"classes": network.classes, "image_size": network.image_size}
    else:
        about |= {"statistics": network.statistics, "prior": network.prior}
    _trace(each, opset, folder / "model.onnx")
    model = onnx.load(folder / "model.onnx")
    onnx.helper.set_model_props(model, {"lmc": json.dumps(about, ensure_ascii=False)})
    onnx.checker.check_model(model)
    data = model.SerializeToString()
    (folder / "model.onnx").write_bytes(data)
    about |= {
        "parameters": sum(parameter.numel() for parameter in network.parameters()),
        "bytes": len(data),
        **_compare(network, each, data, precision),
    }
    write_json(folder / "model.json", about)
    return about


def _trace(each: Plan, opset: int, file: Path) -> None:
    """Write the graph of a plan's module.

    By tracing: torch.export's exporter gives the same numbers, but takes half a minute for what
    this one does in a second. No branch of these networks depends on an input's values or size,
    and `_compare` runs other batches and sizes than were traced.
    """
    dynamic = {
        port.name: {i: name for i, name in enumerate(port.shape) if isinstance(name, str)}
        for port in (*each.inputs, *each.outputs)
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it traces, and that there is the other one
        torch.onnx.export(
            each.module.eval(),
            tuple(_example(each, 2, each.sizes[-1], seed=0)),  # the small one: it is run
            file,
            input_names=[port.name for port in each.inputs],
            output_names=[port.name for port in each.outputs],
            dynamic_axes=dynamic,
            opset_version=opset,
            dynamo=False,
        )


def _compare(network: Network, each: Plan, data: bytes, precision: str) -> dict[str, Any]:
    """What onnxruntime makes of it, against what the network itself does; and how long it takes.

    Returns:
        `difference`: the largest, in parts of the largest number of an output or of 1; `measured`.

    Raises:
        ValueError: it is larger than TOLERANCE.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    largest = 0.0
    for seed, size in enumerate(each.sizes, start=1):
        batch = max(3, len(network.classes) if isinstance(network, Translator) else 0)
        given = _example(each, batch, size, seed)
        if isinstance(network, Translator):
            expected = [network(*given)]
        else:
            z, t, *z_hat = given
            expected = [network.correct(z, t, *z_hat or (z,)), network(z, t)]
        for one, other in zip(_run(session, each, given), expected, strict=True):
            scale = max(1.0, float(other.abs().max()))
            largest = max(largest, float((one - other).abs().max()) / scale)
    # A number that is none is not below it either.
    if not largest <= TOLERANCE[precision]:
        raise ValueError(
            f"the ONNX model's output differs from PyTorch's by {largest:.1e}, more than "
            f"{TOLERANCE[precision]:g}: it is not written"
        )
    given = _example(each, 1, each.sizes[0], seed=0)
    _run(session, each, given)
    times: list[float] = []
    began = time.perf_counter()
    while len(times) < 20 and time.perf_counter() - began < PATIENCE:
        start = time.perf_counter()
        _run(session, each, given)
        times.append(time.perf_counter() - start)
    measured = {
        "milliseconds": round(1000 * statistics.median(times), 3),
        "batch": 1,
        "size": list(each.sizes[0]),
        "by": f"onnxruntime {onnxruntime.__version__} on {processor()}",
    }
    return {"difference": largest, "tolerance": TOLERANCE[precision], "measured": measured}


def _run(session: Any, each: Plan, given: Iterable[Tensor]) -> list[Tensor]:
    """The outputs of a session, in the order of the plan."""
    feed = {port.name: x.numpy() for port, x in zip(each.inputs, given, strict=True)}
    return [torch.from_numpy(x) for x in session.run([port.name for port in each.outputs], feed)]


# ---------------------------------------------------------------------------------------------
# Its card


def stated(card: CardData) -> dict[str, Any]:
    """What a release's card states of rights, by the card's keys."""
    given = card.to_dict()
    return {key: given[key] for key in STATED if given.get(key)}


def rights(card: CardData) -> str:
    """The same as lines of Markdown."""
    given = stated(card)
    name = given.get("license")
    if name == "other":
        name = f"[{given.get('license_name')}]({given.get('license_link')})"
    lines = [f"- Licence of the weights: {name or 'the release states none'}"]
    for key, what in (("training_data", "Trained on"), ("prior_license", "With the prior")):
        lines += [f"- {what}: {given[key]}"] if key in given else []
    return "\n".join(lines)


def _card(about: Mapping[str, Any], card: CardData) -> str:
    """README.md of an export."""
    translates = about["kind"] == "Translator"
    tags = ["onnx", "score-distillation", "lmc-sds"]
    more: dict[str, Any] = {"pipeline_tag": "image-to-image"} if translates else {}
    head = ModelCardData(library_name="onnx", tags=tags, **stated(card), **more)
    size, measured = about["multiple"], about["measured"]
    side = " x ".join(map(str, measured["size"]))
    sizes = (
        f"Height and width are fixed at {side}: the network has a filter of that size in it."
        if size is None
        else f"Height and width are any that {size} divides."
    )
    if translates:
        sizes += f" It was trained at {about['image_size']} x {about['image_size']}."
    parts = [
        f"---\n{head.to_yaml()}\n---",
        f"# {about['kind']}, ONNX",
        f"Written by {about['made_by']} from its release; `model.json` says all of this to a "
        "program, and most of it is in the model's metadata too, under `lmc`.",
        rights(card),
        f"## Inputs\n\n{_ports(about['inputs'])}",
        f"## Outputs\n\n{_ports(about['outputs'])}",
        f"Batch: any. {sizes} Numbers lie in C order, the last index fastest: a picture is its "
        "red plane, its green one, its blue one, each row by row from the top. A pixel p of "
        "0 to 255 is p / 127.5 − 1, and back it is (x + 1) · 127.5, rounded, within 0 to 255.",
        _translating(about) if translates else _correcting(about),
        "| | |\n|---|---|\n"
        f"| opset | {about['opset']} |\n"
        f"| precision inside | {about['precision']} |\n"
        f"| parameters | {about['parameters']:,} |\n"
        f"| model.onnx | {about['bytes']:,} bytes |\n"
        f"| largest difference from PyTorch | {about['difference']:.1e} (refused above "
        f"{about['tolerance']:g}) |\n"
        f"| one of {side} | {measured['milliseconds']:.1f} ms, {measured['by']} |",
    ]
    return "\n\n".join(parts) + "\n"


def _ports(ports: Iterable[Mapping[str, Any]]) -> str:
    """Inputs or outputs as a table."""
    lines = ["| name | type | shape | range | |", "|---|---|---|---|---|"]
    for port in ports:
        shape, span = (", ".join(map(str, port[key] or ["any"])) for key in ("shape", "range"))
        span = f"[{span}]" if port["range"] else span
        lines.append(
            f"| `{port['name']}` | {port['type']} | ({shape}) | {span} | {port['about']} |"
        )
    return "\n".join(lines)


SNIPPET = """```js
import * as ort from "onnxruntime-web"; // or onnxruntime-node

const session = await ort.InferenceSession.create("model.onnx");
// pixels: RGBA bytes of a {side} x {side} canvas; target: {targets}
async function translate(pixels, target) {{
  const n = {side} * {side};
  const image = Float32Array.from({{ length: 3 * n }}, (_, i) =>
    pixels[4 * (i % n) + Math.floor(i / n)] / 127.5 - 1);
  const {{ output }} = await session.run({{
    image: new ort.Tensor("float32", image, [1, 3, {side}, {side}]),
    target: new ort.Tensor("int64", BigInt64Array.of(BigInt(target)), [1]),
  }});
  return Uint8ClampedArray.from({{ length: 4 * n }}, (_, i) =>
    i % 4 === 3 ? 255 : (output.data[(i % 4) * n + Math.floor(i / 4)] + 1) * 127.5);
}}
```"""


def _translating(about: Mapping[str, Any]) -> str:
    """How a translator is used."""
    side, names = about["image_size"], about["classes"]
    targets = ", ".join(f"{i} {name}" for i, name in enumerate(names))
    return (
        "A picture of another shape: cut out its middle square and resize it with antialiasing "
        "(bilinear, its support widened by the factor of reduction). In JavaScript:\n\n"
        + SNIPPET.format(side=side, targets=" ".join(targets.split()).replace("`", "'"))
    )


def _correcting(about: Mapping[str, Any]) -> str:
    """How a corrector is used."""
    prior = "\n".join(f"- {key}: `{json.dumps(value)}`" for key, value in about["prior"].items())
    return (
        "`b - z_hat` is g_lmc of LMC-SDS (Eq. 9), for a clean picture `z` and what the prior "
        "estimates of it from noise at the same time `t`. `b` is `b_hat` with the standard "
        "deviation of `z_hat` (Eq. 10; statistics 'none' leave it as it is). It is valid for this "
        f"prior and no other:\n\n{prior or '- none is named'}"
    )
