"""ONNX: what onnxruntime makes of an export is what PyTorch makes of the release."""

import json
import re
from pathlib import Path
from typing import Any

import huggingface_hub
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor

import lmc.export
from lmc.cli import main
from lmc.corrector import Corrector
from lmc.export import plan, write_onnx
from lmc.filter import FilterCorrector, HybridCorrector
from lmc.hub import HubNetwork
from lmc.release import Terms, write_release
from lmc.translator import Translator

import worlds

PRIOR = {"pretrained": "some/prior", "digest": "0123", "image_size": 16, "channels": 3}


def random(network: Any) -> Any:
    """The network with random weights everywhere, also where it begins at zero."""
    generator = torch.Generator().manual_seed(0)
    for value in network.state_dict().values():
        value.copy_(torch.randn(value.shape, generator=generator) * 0.2)
    if hasattr(network, "ratio"):
        network.ratio.copy_(torch.rand(len(network.ratio), generator=generator) + 0.5)
    return network.eval()


def translator(**more: Any) -> Translator:
    return random(Translator(["dog", "bear", "lion"], 16, [8, 8, 8], **more))


def run(folder: Path, **given: Tensor) -> list[Tensor]:
    session = onnxruntime.InferenceSession(folder / "model.onnx")
    outputs = session.run(None, {name: value.numpy() for name, value in given.items()})
    return [torch.from_numpy(output) for output in outputs]


def pictures(*shape: int, seed: int = 5) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@pytest.mark.parametrize(
    "more", [{}, {"norm": "group", "residual": True, "gated": True}], ids=["paper", "gated"]
)
@torch.no_grad()
def test_a_translator_of_any_batch_and_size(tmp_path, more):
    network = translator(**more)
    about = write_onnx(network, tmp_path, fp16=False, opset=17)
    for batch, height, width in ((1, 16, 16), (5, 32, 12), (2, 4, 4)):
        image, target = pictures(batch, 3, height, width), torch.arange(batch) % 3
        (output,) = run(tmp_path, image=image, target=target)
        torch.testing.assert_close(output, network(image, target), atol=1e-4, rtol=0)
    assert about["multiple"] == 4 and about["difference"] < 1e-4


@pytest.mark.parametrize("statistics", ["image", "channel", "none", "calibrated"])
@torch.no_grad()
def test_a_corrector_with_its_time(tmp_path, statistics):
    network = random(Corrector(3, [8, 8], statistics=statistics, prior=PRIOR))
    about = write_onnx(network, tmp_path, fp16=False, opset=17)
    z, z_hat, t = pictures(4, 3, 8, 16), pictures(4, 3, 8, 16, seed=6), torch.rand(4)
    names = [each["name"] for each in about["inputs"]]
    given = {name: {"z": z, "t": t, "z_hat": z_hat}[name] for name in names}
    b, b_hat = run(tmp_path, **given)
    torch.testing.assert_close(b_hat, network(z, t), atol=1e-4, rtol=0)
    torch.testing.assert_close(b, network.correct(z, t, z_hat), atol=1e-4, rtol=1e-4)
    other = run(tmp_path, **{**given, "t": t.flip(0)})[1]
    assert (other - b_hat).abs().max() > 1e-3, "it depends on t"


@pytest.mark.parametrize("size", [16, 9])
@pytest.mark.parametrize("mix_channels", [True, False])
@torch.no_grad()
def test_a_closed_form_at_its_size(tmp_path, size, mix_channels):
    """Of an odd size too, whose half spectrum has no Nyquist frequency."""
    network = random(FilterCorrector(3, size, 4, mix_channels=mix_channels, prior=PRIOR))
    about = write_onnx(network, tmp_path, fp16=False, opset=17)
    z, z_hat, t = pictures(4, 3, size, size), pictures(4, 3, size, size, seed=6), torch.rand(4)
    b, b_hat = run(tmp_path, z=z, t=t, z_hat=z_hat)
    torch.testing.assert_close(b_hat, network(z, t), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(b, network.correct(z, t, z_hat), atol=1e-4, rtol=1e-4)
    assert about["multiple"] is None
    assert about["inputs"][0]["shape"] == ["batch", 3, size, size]


@torch.no_grad()
def test_a_hybrid_is_left_as_it_was(tmp_path):
    network = random(HybridCorrector(3, {"size": 16, "bins": 4}, [8, 8], statistics="calibrated"))
    before = {name: value.clone() for name, value in network.state_dict().items()}
    write_onnx(network, tmp_path, fp16=True, opset=17)
    assert isinstance(network.closed_form, FilterCorrector)
    for name, value in network.state_dict().items():
        assert torch.equal(value, before[name])
    z, t = pictures(3, 3, 16, 16), torch.rand(3)
    b_hat = run(tmp_path, z=z, t=t, z_hat=z)[1]
    torch.testing.assert_close(b_hat, network(z, t), atol=2e-2, rtol=2e-2)


@torch.no_grad()
def test_half_precision_is_half_the_file_with_the_same_inputs(tmp_path):
    network = Translator(["dog", "bear"], 16, [32, 64]).eval()
    sizes = {}
    for fp16 in (False, True):
        folder = tmp_path / str(fp16)
        folder.mkdir()
        about = write_onnx(network, folder, fp16, opset=17)
        sizes[fp16] = about["bytes"]
        kinds = {each.data_type for each in onnx.load(folder / "model.onnx").graph.initializer}
        assert (onnx.TensorProto.FLOAT16 in kinds) == fp16
        image, target = pictures(2, 3, 16, 16), torch.tensor([0, 1])
        (output,) = run(folder, image=image, target=target)
        assert output.dtype == torch.float32
        limit = about["tolerance"]
        torch.testing.assert_close(output, network(image, target), atol=limit, rtol=0)
    assert about["precision"] == "float16"
    assert sizes[True] < 0.6 * sizes[False]


def release(folder: Path, network: HubNetwork, **more: str) -> Path:
    write_release(network, folder, "made up", Terms(**{**worlds.TERMS, **more}))
    return folder


def test_the_command_says_what_a_program_has_to_know(tmp_path, capsys):
    source = release(tmp_path / "release", translator(), data="pictures of *cats*, CC0-1.0")
    out = tmp_path / "made" / "onnx"
    for opset in ("20", "13"):  # what is there is replaced
        main(["export", str(source), "--out", str(out), "--opset", opset])
    assert {file.name for file in out.iterdir()} == {"model.onnx", "model.json", "README.md"}
    model = onnx.load(out / "model.onnx")
    assert [each.version for each in model.opset_import] == [13]
    about = json.loads((out / "model.json").read_text())
    within = {each.key: each.value for each in model.metadata_props}["lmc"]
    assert json.loads(within).items() <= about.items()
    assert about["classes"] == ["dog", "bear", "lion"] and about["image_size"] == 16
    assert about["bytes"] == (out / "model.onnx").stat().st_size
    assert about["measured"]["milliseconds"] > 0
    ports = [*model.graph.input, *model.graph.output]
    for port, told in zip(ports, about["inputs"] + about["outputs"], strict=True):
        kind = port.type.tensor_type
        dims = [each.dim_param or each.dim_value for each in kind.shape.dim]
        names = {"float32": onnx.TensorProto.FLOAT, "int64": onnx.TensorProto.INT64}
        assert (port.name, dims) == (told["name"], told["shape"])
        assert kind.elem_type == names[told["type"]]
    assert about["inputs"][1]["range"] == [0, 2]
    card = huggingface_hub.ModelCard.load(out / "README.md")
    assert card.data.license == "cc0-1.0" and card.data.pipeline_tag == "image-to-image"
    assert card.data.to_dict()["training_data"] == "pictures of *cats*, CC0-1.0"
    for said in (
        "0 dog, 1 bear, 2 lion",
        "| opset | 13 |",
        f"{about['bytes']:,} bytes",
        "4 divides",
    ):
        assert said in card.text
    said = capsys.readouterr().out.splitlines()[-1]
    assert re.search(
        r"Translator to .*: 0\.\d\d MB, opset 13, float32; at most .* ms at 16 x 16", said
    )


def test_the_card_of_a_corrector_names_its_prior_and_a_foreign_licence(tmp_path):
    network = random(HybridCorrector(3, {"size": 16, "bins": 4}, [8, 8], prior=PRIOR))
    mine = {"license": "other", "license_name": "Mine", "license_link": "https://x.org/l"}
    source = release(tmp_path / "release", network, **mine)
    main(["export", str(source), "--out", str(tmp_path / "onnx")])
    card = (tmp_path / "onnx" / "README.md").read_text()
    assert "[Mine](https://x.org/l)" in card and "fixed at 16 x 16" in card
    assert '- pretrained: `"some/prior"`' in card
    (source / "README.md").unlink()
    main(["export", str(source), "--out", str(tmp_path / "onnx")])
    card = (tmp_path / "onnx" / "README.md").read_text()
    assert "license:" not in card and "the release states none" in card


def test_a_latent_correctors_sizes_and_range():
    prior = {**PRIOR, "channels": 4, "image_size": 512, "latent_scale": 0.18}
    made = plan(Corrector(4, [8, 8], bounded=False, prior=prior))
    assert made.sizes[0] == (64, 64) and made.inputs[0].range is None


def message(*given: object) -> str:
    with pytest.raises(SystemExit) as caught:
        main(["export", *map(str, given)])
    assert isinstance(caught.value.code, str), "exits with status 1 and a message"
    return caught.value.code


def test_bad_input_ends_in_one_line_and_writes_nothing(tmp_path, monkeypatch):
    source, out = release(tmp_path / "release", translator()), tmp_path / "onnx"
    assert "--opset must be from 13 to 20, got 12" in message(source, "--out", out, "--opset=12")
    assert "no such folder" in message(tmp_path / "none", "--out", out)
    assert "did you mean --fp16" in message(source, "--out", out, "--fp_16")
    closed = release(tmp_path / "filter", FilterCorrector(3, 16, 4, prior=PRIOR))
    assert "a FilterCorrector has none" in message(closed, "--out", out, "--fp16")
    assert not out.exists()
    out.mkdir()
    (out / "thesis.tex").touch()
    assert "thesis.tex" in message(source, "--out", out) and (out / "thesis.tex").exists()
    assert "release" in message(source, "--out", source), "not over itself"
    monkeypatch.setitem(lmc.export.TOLERANCE, "float32", 0.0)
    said = message(source, "--out", tmp_path / "new")
    assert "differs from PyTorch's by" in said and not (tmp_path / "new").exists()


def test_onnx_that_is_not_installed_is_named(tmp_path, monkeypatch):
    source = release(tmp_path / "release", translator())
    monkeypatch.setitem(__import__("sys").modules, "onnxruntime", None)
    assert "pip install 'lmc-sds[onnx]'" in message(source, "--out", tmp_path / "onnx")
