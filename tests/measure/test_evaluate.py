"""The runners on known networks, folders of images and bad input; results and their comparison."""

import json
import math
import multiprocessing
import os
import socket
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers.pre_tokenizers import ByteLevel
from torch.nn import functional as F
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

from lmc.cli import main
from lmc.corrector import Corrector
from lmc.files import write_json
from lmc.measure.commands import _named
from lmc.measure.correctors import CorrectorErrors, evaluate_corrector
from lmc.measure.evaluate import (
    Folder,
    Prompts,
    Tools,
    Truth,
    evaluate,
    heldout_keys,
    real_features,
    score_named_by_prompt,
    translated,
)
from lmc.measure.metrics import (
    Clip,
    cmmd,
    fid,
    kid,
    load_classifier,
    one_minus_ssim,
    power_spectrum,
    rmse,
    saturation,
    spectrum_error,
)
from lmc.measure.results import Real, combine, numbers
from lmc.measure.tables import evaluation_text
from lmc.shards.images import ImageBatch, ImageStream, from_uint8, to_uint8
from lmc.translator import Translator

import worlds
from gaussian import small_prior

SIZE = 16
PROMPTS = {"dog": "a photo of a dog", "bear": "a photo of a bear"}
CANDIDATES = [*PROMPTS.values(), "a photo of a cat"]


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def build_clip_folder(folder: Path) -> Path:
    """A tiny random CLIP of 16 x 16 pixels, whose tokenizer knows single bytes."""
    letters = sorted(ByteLevel.alphabet())
    pieces = [*letters, *(f"{x}</w>" for x in letters), "<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer(
        vocab={piece: i for i, piece in enumerate(pieces)}, merges=[], model_max_length=32
    )
    small = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "projection_dim": 8,
    }
    special = {f"{x}_token_id": getattr(tokenizer, f"{x}_token_id") for x in ("bos", "eos", "pad")}
    text = {"vocab_size": len(tokenizer), "max_position_embeddings": 32} | small | special
    vision = {"image_size": SIZE, "patch_size": 4} | small
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8))
    model.save_pretrained(folder)
    processor = CLIPImageProcessor(
        size={"shortest_edge": SIZE},
        crop_size={"height": SIZE, "width": SIZE},
        image_mean=[0.5, 0.4, 0.3],
        image_std=[0.2, 0.3, 0.4],
    )
    CLIPProcessor(image_processor=processor, tokenizer=tokenizer).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_clip_folder(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def tools(clip_folder: Path) -> Tools:
    return Tools({"rmse": rmse, "one_minus_ssim": one_minus_ssim}, Clip(str(clip_folder)))


class Known(Translator):
    """Not a network but a function of the image."""

    def __init__(self, function) -> None:
        super().__init__(list(PROMPTS), SIZE, [8, 8])
        self.function = function

    def forward(self, image, class_id):
        return self.function(image, class_id)


def steps(first: int, second: int) -> Known:
    """The image some 8-bit steps brighter, for each class."""
    return Known(lambda x, i: x + torch.where(i == 0, first, second)[:, None, None, None] / 127.5)


def half_batches(count: int = 11, size: int = 4) -> list[ImageBatch]:
    """8-bit images within ±0.5, in batches; the keys are not in order."""
    images = from_uint8(to_uint8(0.5 * random(count, 3, SIZE, SIZE)))
    keys = [f"{i * 3 % count:02d}" for i in range(count)]
    return [
        ImageBatch(images[i : i + size], keys[i : i + size], ["cat"] * len(keys[i : i + size]))
        for i in range(0, count, size)
    ]


def measure(tools: Tools, *translators: Translator | None, batches=None, **more) -> dict:
    """A result with a row 'source' of None, and rows 'a', 'b' … of translators."""
    names = iter("abc")
    rows = {
        "source" if x is None else next(names): x if x is None else translated(x)
        for x in translators
    }
    batches = half_batches() if batches is None else batches
    return evaluate(rows, lambda: batches, tools, Prompts(PROMPTS, CANDIDATES), **more)


def rows(result: dict) -> dict:
    return {name: numbers(row) for name, row in result["rows"].items()}


# ---------------------------------------------------------------------------------------------
# The numbers


def test_the_identity_has_no_distance(tools):
    found = rows(measure(tools, None, Known(lambda image, class_id: image)))
    row = found["a"]
    assert row["images"] == 11 and row["distance_name"] == "rmse"
    assert row["distance"] == row["distances"]["rmse"] == row["spectrum_error"] == 0
    assert row["distances"]["one_minus_ssim"] == pytest.approx(0, abs=1e-5)
    assert row == found["source"]


def test_a_known_change_has_known_numbers(tools):
    """+38 steps for one class and +14 for the other; half the contrast, a quarter of the power,
    but for the rounding to bytes."""
    result = measure(tools, steps(38, 14))
    row = result["rows"]["a"]["summary"]["rmse"]
    assert row["value"] == pytest.approx(26 / 127.5, abs=1e-6)
    assert row["by_class"]["dog"]["value"] == pytest.approx(38 / 127.5, abs=1e-6)
    for bound in ("low", "high"):  # every image is as far: the interval has no width
        assert row["by_class"]["bear"][bound] == pytest.approx(14 / 127.5, abs=1e-6)
    assert rows(result)["a"]["spectrum_error"] == pytest.approx(0, abs=1e-4)
    row = rows(measure(tools, Known(lambda image, class_id: image / 2)))["a"]
    assert row["spectrum_error"] == pytest.approx(math.log10(4), abs=0.01)


def outputs() -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The sources in the keys' order, and 8-bit outputs of `scaled`, for reference."""
    batches = half_batches()
    order = np.argsort([key for batch in batches for key in batch.key])
    source = torch.cat([batch.image for batch in batches])[order.copy()]
    factors = {"dog": 1.7, "bear": -2.3}
    return source, {name: from_uint8(to_uint8(f * source)) for name, f in factors.items()}


def scaled() -> Known:
    return Known(lambda x, i: x * torch.where(i == 0, 1.7, -2.3)[:, None, None, None])


def test_scores_are_means_over_images_and_classes(tools):
    """Against CLIP's embeddings one output at a time."""
    result = measure(tools, scaled())
    row = result["rows"]["a"]
    texts = F.normalize(tools.clip.texts(CANDIDATES))
    scores, confusion = {}, {}
    for i, (name, images) in enumerate(outputs()[1].items()):
        embedded = [F.normalize(tools.clip.images(image[None])) for image in images]
        table = [(x @ texts.T)[0].tolist() for x in embedded]
        scores[name] = [line[i] for line in table]
        first = [int(np.argmax(line)) for line in table]
        confusion[name] = [first.count(place) for place in range(3)] + [0]
        hits = row["per_image"]["r_precision"][name]
        assert hits == [float(place == i) for place in first]
        cell = row["summary"]["r_precision"]["by_class"][name]
        assert cell["value"] == pytest.approx(np.mean(hits))
        assert row["per_image"]["clip_score"][name] == pytest.approx(scores[name], abs=1e-5)
    assert row["confusion"] == confusion
    assert row["summary"]["clip_score"]["value"] == pytest.approx(
        np.mean(list(scores.values())), abs=1e-5
    )
    hundred = 100 * np.maximum(0, list(scores.values())).mean()
    assert row["summary"]["clip_score_100"]["value"] == pytest.approx(hundred, abs=1e-3)
    assert 0 < hundred != pytest.approx(100 * row["summary"]["clip_score"]["value"])
    assert rows(result)["a"]["r_precision_by_class"] == {
        name: pytest.approx(confusion[name][i] / 11) for i, name in enumerate(PROMPTS)
    }


def test_statistics_are_of_the_outputs(tools):
    """Channels, saturation, spectra and histograms, against numpy on all outputs at once."""
    result = measure(tools, scaled())
    row, (source, made) = result["rows"]["a"], outputs()
    every = torch.cat(list(made.values())).double().numpy()
    for i, name in enumerate(("red", "green", "blue")):
        mean, deviation = (row["summary"][f"{x}_{name}"]["value"] for x in ("mean", "deviation"))
        assert mean == pytest.approx(every[:, i].mean(), abs=1e-6)
        assert deviation == pytest.approx(every[:, i].std((1, 2)).mean(), abs=1e-6)
    ends = row["summary"]["saturation"]
    assert ends["value"] == pytest.approx((np.abs(every) == 1).mean()) and ends["value"] > 0
    assert ends["by_class"]["dog"]["value"] == saturation(made["dog"]).mean() == 0
    for name, images in {**made, "all": torch.cat(list(made.values()))}.items():
        expected = power_spectrum(images).mean(0)
        torch.testing.assert_close(torch.tensor(row["spectra"][name]), expected, rtol=1e-5, atol=0)
        steps = np.clip(np.diff(images.numpy(), axis=2), -1, 1)
        counts, _ = np.histogram(steps, 85, (-1, 1))
        assert row["histograms"][name] == pytest.approx(counts / counts.sum(), rel=1e-5)
    expected = power_spectrum(source).mean(0)
    torch.testing.assert_close(torch.tensor(result["source"]["spectrum"]), expected)
    assert sum(result["source"]["histogram"]) == pytest.approx(1, abs=1e-4)
    error = row["summary"]["spectrum_error"]
    pairs = {"all": "value", "dog": "dog"}
    for name, where in pairs.items():
        cell = error if where == "value" else error["by_class"][where]
        spectrum = torch.tensor(row["spectra"][name])
        assert cell["value"] == pytest.approx(spectrum_error(spectrum, expected).item(), abs=1e-4)
        assert cell["low"] < cell["value"] < cell["high"]
        # By numpy: the error's two sides, from the spectra that the result holds.
        decades = np.log10(spectrum.double().numpy() / expected.double().numpy())
        for side, sign in (("spectrum_lost", -1), ("spectrum_gained", 1)):
            about = row["summary"][side]
            each = about if where == "value" else about["by_class"][where]
            wanted = np.maximum(sign * decades, 0).mean()
            assert each["value"] == pytest.approx(wanted, abs=1e-4), side
            assert each["low"] <= each["value"] <= each["high"]


def test_what_was_lost_and_gained_makes_the_error(tools):
    """In every cell, of every row; half as bright is lost alone."""
    result = measure(tools, None, scaled(), Known(lambda x, i: x / 2))
    for row in result["rows"].values():
        every = row["summary"]
        for name in (None, *PROMPTS):
            error, lost, gained = (
                (every[key] if name is None else every[key]["by_class"][name])["value"]
                for key in ("spectrum_error", "spectrum_lost", "spectrum_gained")
            )
            assert lost + gained == pytest.approx(error, abs=1e-9)
    half = rows(result)["b"]
    assert half["spectrum_lost"] == pytest.approx(math.log10(4), abs=0.02)
    assert half["spectrum_gained"] < 1e-3


def test_intervals_are_those_of_resampled_images(tools):
    """All outputs of an image are drawn together: by a loop over numpy's own draws, whose
    quantiles scatter by some hundredths of the interval's width."""
    row = measure(tools, scaled())["rows"]["a"]
    values = np.array([row["per_image"]["rmse"][name] for name in PROMPTS]).mean(0)
    generator = np.random.default_rng(5)
    means = [values[generator.integers(0, 11, 11)].mean() for _ in range(4000)]
    low, high = np.quantile(means, (0.025, 0.975))
    cell = row["summary"]["rmse"]
    assert cell["n"] == 11 and cell["low"] < cell["value"] < cell["high"]
    for mine, expected in ((cell["low"], low), (cell["high"], high)):
        assert mine == pytest.approx(expected, abs=0.08 * (high - low))


def test_one_image_has_no_interval(tools):
    row = measure(tools, scaled(), batches=half_batches(1))["rows"]["a"]
    for name, cell in row["summary"].items():
        assert cell["low"] is None is cell["high"] and cell["n"] == 1, name


def test_rows_are_compared_image_by_image(tools):
    """A constant shift between two rows has no width, however the rows themselves scatter."""

    def noisy(image, class_id, more=0):
        generator = torch.Generator().manual_seed(0)
        scale = torch.rand(SIZE, generator=generator) * 0.2
        return from_uint8(to_uint8(image * scale)) + more / 127.5

    result = measure(
        tools, None, Known(noisy), Known(lambda x, i: noisy(x, i, 20)), Known(lambda x, i: x)
    )
    assert list(result["differences"]) == ["b", "c"], "the source is compared only if named"
    by_hand = {}
    for name in "abc":
        per_image = result["rows"][name]["per_image"]
        by_hand[name] = {m: np.mean([v[c] for c in PROMPTS], 0) for m, v in per_image.items()}
    for name in "bc":
        about = result["differences"][name]
        assert about["against"] == "a"
        for measure_, cell in about["summary"].items():
            if not measure_.startswith("spectrum_"):
                delta = by_hand[name][measure_] - by_hand["a"][measure_]
                assert cell["value"] == pytest.approx(delta.mean(), abs=2e-4), measure_
                assert cell["low"] <= cell["value"] + 1e-9 and cell["value"] - 1e-9 <= cell["high"]
    shift = result["differences"]["b"]["summary"]["mean_red"]
    for key in ("value", "low", "high"):
        assert shift[key] == pytest.approx(20 / 127.5, abs=1e-6)
    own = result["rows"]["b"]["summary"]["mean_red"]
    assert own["high"] - own["low"] > 1e-4
    error = result["differences"]["c"]["summary"]["spectrum_error"]
    assert error["high"] < 0 and error["value"] == pytest.approx(
        -result["rows"]["a"]["summary"]["spectrum_error"]["value"]
    )
    other = measure(tools, None, Known(noisy), against="source")["differences"]["a"]
    assert other["against"] == "source" and other["summary"]["rmse"]["low"] > 0
    with pytest.raises(ValueError, match=r"no row 'x' to compare against; there are source, a"):
        measure(tools, None, Known(noisy), against="x")


def test_the_batches_and_their_order_do_not_matter(tools):
    """But for float32's last digits, which a convolution's batch may change."""
    first = measure(tools, None, scaled(), batches=half_batches(size=4))
    for size in (1, 11):
        batches = half_batches(size=size)[::-1]
        other = measure(tools, None, scaled(), batches=batches)
        assert other["heldout"] == first["heldout"]
        assert_close(other["rows"], first["rows"])
    assert first["heldout"]["keys"] == sorted(first["heldout"]["keys"])


def assert_close(one, other) -> None:
    """Nested dicts and lists of numbers."""
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_close(one[key], other[key])
    elif isinstance(one, list):
        assert len(one) == len(other)
        for a, b in zip(one, other, strict=True):
            assert_close(a, b)
    elif isinstance(one, float):
        assert one == pytest.approx(other, rel=1e-4, abs=1e-5)
    else:
        assert one == other


def test_tied_prompts_are_no_hits(tools):
    """Two candidates whose tokens are the same: first by either is a tie."""

    class Same(Clip):
        def texts(self, prompts):
            return torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]])

        def images(self, image):
            return image.mean((2, 3))[:, :2].sign()

    clip = Same(tools.clip.name)
    made = Known(lambda x, i: torch.where(i == 0, 0.5, -0.5)[:, None, None, None] + 0 * x)
    row = measure(Tools(tools.distances, clip), made)["rows"]["a"]
    assert row["confusion"] == {"dog": [0, 0, 0, 11], "bear": [0, 0, 0, 11]}
    assert row["summary"]["r_precision"]["value"] == 0


# ---------------------------------------------------------------------------------------------
# Against true counterparts


def true_ones() -> dict[str, torch.Tensor]:
    """In the keys' order: the sources moved, coloured and made coarser, by class, of 8 bits."""
    source, _ = outputs()
    shift = torch.tensor([0.2, -0.1, 0.4])[:, None, None]
    coarse = F.interpolate(source[..., ::2, ::2], scale_factor=2)
    pair = {"dog": source.roll(3, -1) * 1.9 + shift, "bear": coarse - 0.3 * shift}
    return {name: from_uint8(to_uint8(x)) for name, x in pair.items()}


@pytest.fixture
def truth(tmp_path: Path) -> Truth:
    """`true_ones` as files, among others that are of no concern."""
    keys = sorted(key for batch in half_batches() for key in batch.key)
    more = {"dog": random(1, 3, SIZE, SIZE), "fox": random(1, 3, 8, 8)}
    write_outputs(tmp_path / "truth", more, ["not held out"])
    folder = Truth(
        write_outputs(tmp_path / "truth", true_ones(), keys), ["dog", "bear"], image_size=SIZE
    )
    folder.check_has(list(PROMPTS), keys, "true counterpart")
    return folder


def with_truth(tools: Tools, truth) -> Tools:
    return Tools(tools.distances, tools.clip, truth=truth)


def test_outputs_are_measured_against_their_true_counterparts(tools, truth):
    """By numpy, of every image, class and row; the spectra and SSIM are tested by themselves."""
    result = measure(with_truth(tools, truth), None, scaled())
    source, made = outputs()
    theirs = {name: x.double().numpy() for name, x in true_ones().items()}
    for row, mine in (("source", dict.fromkeys(PROMPTS, source)), ("a", made)):
        about, found = result["rows"][row], {}
        for name in PROMPTS:
            x, y = mine[name].double().numpy(), theirs[name]
            rmse_ = np.sqrt(((x - y) ** 2).mean((1, 2, 3)))
            assert about["per_image"]["truth_rmse"][name] == pytest.approx(rmse_, abs=1e-5)
            ssim = one_minus_ssim(mine[name], true_ones()[name])
            wanted = pytest.approx(ssim.tolist(), abs=1e-5)
            assert about["per_image"]["truth_one_minus_ssim"][name] == wanted
            power = [power_spectrum(torch.from_numpy(z)).numpy().mean(0) for z in (x, y)]
            decades = np.log10(power[0] / power[1])
            cast = np.abs(x.mean((0, 2, 3)) - y.mean((0, 2, 3))).mean()
            found[name] = {
                "truth_rmse": rmse_.mean(),
                "truth_lost": np.maximum(-decades, 0).mean(),
                "truth_gained": np.maximum(decades, 0).mean(),
                "truth_cast": cast,
            }
        for measure_ in found["dog"]:
            cell = about["summary"][measure_]
            for name in PROMPTS:
                each = cell["by_class"][name]
                assert each["value"] == pytest.approx(found[name][measure_], abs=1e-5), measure_
                assert each["low"] <= each["value"] <= each["high"]
            mean = np.mean([found[name][measure_] for name in PROMPTS])
            assert cell["value"] == pytest.approx(mean, abs=1e-5), "of each against its own"
            assert cell["n"] == 11 and cell["low"] < cell["high"] and mean > 0.01
    spectrum = np.mean([power_spectrum(x).mean(0).numpy() for x in true_ones().values()], 0)
    assert result["truth"]["spectra"]["all"] == pytest.approx(spectrum, rel=1e-4)
    row = numbers(result["rows"]["a"])
    assert row["truth_cast"] == result["rows"]["a"]["summary"]["truth_cast"]["value"]
    lines = evaluation_text(result).splitlines()
    for head in ("RMSE to truth", "1 − SSIM to truth", "lost against truth", "cast against truth"):
        assert head in lines[0]
    assert "truth" not in evaluation_text(measure(tools, None, scaled()))


def test_the_truth_itself_has_no_distance(tools, truth):
    rows_ = {"source": None, "truth": truth, "lmc": translated(scaled())}
    prompts = Prompts(PROMPTS, CANDIDATES)
    result = evaluate(rows_, half_batches, with_truth(tools, truth), prompts, against="truth")
    row = result["rows"]["truth"]["summary"]
    for name in ("rmse", "one_minus_ssim", "lost", "gained", "cast"):
        assert row[f"truth_{name}"]["value"] == pytest.approx(0, abs=1e-6)
        # Differences to it are the other row's own values.
        other, less = (
            x["lmc"]["summary"][f"truth_{name}"]["value"]
            for x in (result["rows"], result["differences"])
        )
        assert less == pytest.approx(other, abs=1e-6) and other > 0


def test_the_interval_of_a_cast_is_of_resampled_images(tools, truth):
    """By a loop over numpy's own draws, as with the other measures."""
    cell = measure(with_truth(tools, truth), scaled())["rows"]["a"]["summary"]["truth_cast"]
    made = outputs()[1]
    shift = np.stack(
        [(made[name] - true_ones()[name]).double().numpy().mean((2, 3)) for name in PROMPTS]
    )
    generator = np.random.default_rng(5)
    draws = [generator.integers(0, 11, 11) for _ in range(4000)]
    casts = [np.abs(shift[:, draw].mean(1)).mean() for draw in draws]
    low, high = np.quantile(casts, (0.025, 0.975))
    for mine, expected in ((cell["low"], low), (cell["high"], high)):
        assert mine == pytest.approx(expected, abs=0.08 * (high - low))


def test_a_truth_that_does_not_fit_is_refused(truth, tmp_path):
    keys = sorted(key for batch in half_batches() for key in batch.key)
    with pytest.raises(FileNotFoundError, match=r"no such folder of true counterparts: .*nothing"):
        Truth(tmp_path / "nothing", ["dog"], SIZE)
    with pytest.raises(ValueError, match=r"truth has no true counterparts of class 'owl'"):
        Truth(truth.path, ["dog", "owl"], SIZE)
    with pytest.raises(ValueError, match=r"truth have 16 pixels, not 32"):
        Truth(truth.path, ["dog"], 32)
    with pytest.raises(
        ValueError, match=r"1 held-out images have no true counterpart in .*/dog, .* 77"
    ):
        truth.check_has(["dog", "bear"], [*keys, "77"], "true counterpart")


def test_results_with_and_without_truth_stand_side_by_side(tools, truth):
    """Older ones, which know of none, too; but not those of another truth."""
    new, old = measure(with_truth(tools, truth), None, scaled()), measure(tools, None, steps(9, 20))
    old["rows"]["old"] = old["rows"].pop("a")
    assert old.pop("truth") is None
    for results in ({"new": new, "old": old}, {"old": old, "new": new}):
        both = combine(results, "a")
        assert both["truth"] == new["truth"]
        assert "truth_rmse" not in both["rows"]["old"]["summary"]
        assert both["rows"]["source"]["summary"].keys() >= {"truth_rmse", "truth_cast"}
    other = Tools(tools.distances, tools.clip, truth=lambda keys, source, name: -source)
    third = measure(other, steps(1, 2))
    third["rows"]["third"] = third["rows"].pop("a")
    with pytest.raises(ValueError, match=r"\(--truth\) in new and third are different pictures"):
        combine({"old": old, "new": new, "third": third}, "a")


# ---------------------------------------------------------------------------------------------
# KID, FID and CMMD


def test_cmmd_is_of_each_class_against_its_own(tools):
    """And needs no Inception. By `cmmd` on CLIP's embeddings of all outputs at once."""
    pictures = from_uint8(to_uint8(0.8 * random(12, 3, SIZE, SIZE, seed=3)))
    labels = ["bear", "dog", "dog"] * 4
    batches = [ImageBatch(pictures, [str(i) for i in range(12)], labels)]
    real = real_features(batches, tools, list(PROMPTS))
    assert list(real.features) == ["clip"]
    backwards = Real({"clip": dict(reversed(real.features["clip"].items()))}, real.digest)
    row = measure(tools, None, scaled(), real=backwards)["rows"]["a"]["summary"]
    assert "kid" not in row and "fid" not in row
    found = []
    for name, images in outputs()[1].items():
        there = tools.clip.images(pictures[[label == name for label in labels]])
        found.append(cmmd(tools.clip.images(images), there))
        cell = row["cmmd"]["by_class"][name]
        assert cell["value"] == pytest.approx(found[-1], rel=1e-4)
        assert cell["low"] < cell["value"] < cell["high"]
    assert row["cmmd"]["value"] == pytest.approx(np.mean(found), rel=1e-4)
    assert found[0] != pytest.approx(found[1], rel=0.01)
    with pytest.raises(ValueError, match="CMMD need two held-out images"):
        measure(tools, None, real=real, batches=half_batches(1))


def test_results_against_other_real_images_do_not_stand_side_by_side(tools):
    """The batches that they come in make no difference."""
    pictures = from_uint8(to_uint8(0.8 * random(12, 3, SIZE, SIZE, seed=3)))
    labels = ["bear", "dog", "dog"] * 4

    def of(pictures, size):
        keys = [str(i) for i in range(12)]
        parts = [slice(i, i + size) for i in range(0, 12, size)]
        return real_features(
            [ImageBatch(pictures[x], keys[x], labels[x]) for x in parts], tools, list(PROMPTS)
        )

    one = measure(tools, None, scaled(), real=of(pictures, 12))
    same, other, none = (
        measure(tools, None, steps(9, 20), real=real)
        for real in (of(pictures, 5), of(-pictures, 12), None)
    )
    for each in (same, other, none):
        each["rows"]["b"] = each["rows"].pop("a")
    for found in (combine({"one": one, "b": same}, "a"), combine({"b": none, "one": one}, "a")):
        assert found["real"] == one["real"] is not None
    with pytest.raises(ValueError, match=r"\(--real\) in one and b are different pictures"):
        combine({"one": one, "b": other}, "a")


def test_kid_and_fid_are_of_all_classes_and_each(tools):
    def inception(pixels):
        assert pixels.dtype == torch.uint8
        return pixels.float().mean((2, 3)) / 255 + pixels.float().std((2, 3)) / 255

    with_sets = Tools(tools.distances, None, inception)
    pictures = 0.8 * random(20, 3, SIZE, SIZE, seed=3)
    labels = ["bear", "dog", "fox", "dog"] * 5
    batches = [
        ImageBatch(
            pictures[i : i + 6], [f"{k}" for k in range(i, i + 6)][: 20 - i], labels[i : i + 6]
        )
        for i in range(0, 20, 6)
    ]
    there = real_features(batches, with_sets, list(PROMPTS))
    real = there.features["inception"]
    assert {name: len(x) for name, x in real.items()} == {"dog": 10, "bear": 5}
    result = measure(with_sets, scaled(), real=there)
    summary = result["rows"]["a"]["summary"]
    made = {name: inception(to_uint8(x)) for name, x in outputs()[1].items()}
    expected = fid(real["dog"], made["dog"])
    assert summary["fid"]["by_class"]["dog"]["value"] == pytest.approx(expected, rel=1e-4)
    both = (torch.cat([x[name] for name in PROMPTS]) for x in (real, made))
    together = list(both)
    # The order of the images decides KID's subsets, so that only its unbiased mean is the same.
    mean, deviation = kid(*together)
    assert summary["kid"]["value"] == pytest.approx(mean, abs=deviation)
    assert summary["fid"]["value"] == pytest.approx(fid(*together), rel=1e-4)
    assert summary["fid"]["real"] == 15 and summary["fid"]["outputs"] == 22
    assert summary["kid"]["deviation"] > 0 and summary["kid"]["subset"] == 7
    for name in ("kid", "fid"):
        assert summary[name]["low"] is None and summary[name]["n"] == 11
    assert result["settings"]["real"] == {"dog": 10, "bear": 5}
    assert "kid" not in measure(with_sets, scaled())["rows"]["a"]["summary"]
    with pytest.raises(ValueError, match="0 real images of the class 'owl'"):
        real_features(batches, with_sets, ["dog", "owl"])
    broken = ImageBatch(pictures[:1], ["k"], ["dog"], skipped=("x in y: cut off",))
    with pytest.raises(ValueError, match="x in y: cut off"):
        real_features([broken], with_sets, ["dog"])


# ---------------------------------------------------------------------------------------------
# A classifier of the user's own


def test_a_classifier_says_what_outputs_are_of(tools, tmp_path, monkeypatch):
    """The share that it calls the target's class; CMMD and KID of its features."""
    (tmp_path / "a_judge.py").write_text(worlds.JUDGE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    judge = load_classifier("a_judge:load")
    with_judge = Tools(tools.distances, None, classifier=judge)
    pictures = from_uint8(to_uint8(0.8 * random(12, 3, SIZE, SIZE, seed=3)))
    labels = ["bear", "dog", "dog"] * 4
    keys = [str(i) for i in range(12)]
    real = real_features([ImageBatch(pictures, keys, labels)], with_judge, list(PROMPTS))
    found = measure(with_judge, None, scaled(), real=real)
    assert found["settings"]["classifier"] == "brightness" and found["settings"]["clip"] is None
    row = found["rows"]["a"]["summary"]
    made = outputs()[1]
    bright = (to_uint8(made["dog"]).float().mean((1, 2, 3)) > 127).float().mean().item()
    assert 0 < bright < 1
    assert row["classified"]["by_class"]["dog"]["value"] == pytest.approx(bright)
    assert row["classified"]["by_class"]["bear"]["value"] == 0  # it knows no bears
    for name, images in made.items():
        there = to_uint8(pictures[[label == name for label in labels]]).flatten(1) / 255
        features = to_uint8(images).flatten(1) / 255
        by_class = row["classifier_cmmd"]["by_class"][name]["value"]
        assert by_class == pytest.approx(cmmd(features, there), rel=1e-4)
        mean, deviation = kid(there, features)
        assert row["classifier_kid"]["by_class"][name]["value"] == pytest.approx(
            mean, abs=deviation
        )
    assert "classified" in found["rows"]["source"]["summary"]
    assert "classified as the target" in evaluation_text(found)
    judge.name = "another"
    other = measure(with_judge, None, steps(9, 20))
    other["rows"]["b"] = other["rows"].pop("a")
    with pytest.raises(ValueError, match="classified by another and brightness: name one"):
        combine({"one": found, "two": other}, "a")


def test_what_is_no_classifier_is_refused(tools, tmp_path, monkeypatch):
    (tmp_path / "b_judge.py").write_text(worlds.JUDGE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    for path, said in (
        ("b_judge", "--classifier b_judge: name it as MODULE:FUNCTION"),
        ("no_judge:load", "--classifier no_judge:load: No module named 'no_judge'"),
        ("b_judge:lode", "--classifier b_judge:lode: .*no attribute 'lode'"),
        ("b_judge:JUDGE_NAME.x", "--classifier b_judge:JUDGE_NAME.x: .*no attribute"),
        ("b_judge:nameless", "a function of the device that gives a callable with a name"),
        ("math:pi", "a function of the device that gives a callable with a name"),
    ):
        with pytest.raises(ValueError, match=said):
            load_classifier(path)
    judge = load_classifier("b_judge:load")
    monkeypatch.setattr(type(judge), "__call__", lambda self, x: (["dog"], x.flatten(1).float()))
    with pytest.raises(ValueError, match=r"brightness gives 1 names .* \(4, 768\) for 4 images"):
        measure(Tools(tools.distances, None, classifier=judge), scaled())


# ---------------------------------------------------------------------------------------------
# Bad input


def test_evaluation_reads_shards(tools, tmp_path):
    shards = f"{worlds.write_world(tmp_path)}/heldout-*.tar"
    result = measure(tools, None, batches=ImageStream(shards, SIZE, 5, training=False))
    assert result["heldout"]["count"] == result["rows"]["source"]["images"] == 24


def test_a_broken_sample_is_excluded_and_named(tools, tmp_path):
    """What is left at the end of a pass may hold no picture at all."""
    good = worlds.png(random(3, SIZE, SIZE))
    samples = [("a", good, "png", {"label": "cat"}), ("b", b"broken", "png", {"label": "cat"})]
    worlds.write_shard(tmp_path / "heldout-00000.tar", samples)
    stream = ImageStream(f"{tmp_path}/heldout-*.tar", SIZE, 1, training=False)
    assert heldout_keys(stream)[0] == ["a"]
    result = measure(tools, None, scaled(), batches=stream)
    assert result["heldout"]["count"] == 1 and result["heldout"]["keys"] == ["a"]
    (line,) = result["heldout"]["excluded"]
    assert line.startswith("b in ")
    text = evaluation_text(result)
    assert "1 held-out images cannot be read and are in no figure" in text and line in text


def test_no_images_and_doubled_ones_are_errors(tools):
    for batches, said in (
        ([], "no held-out images"),
        (half_batches()[:1] * 2, "the key 00 twice"),
    ):
        with pytest.raises(ValueError, match=said):
            measure(tools, None, batches=batches)
        with pytest.raises(ValueError, match=said):
            heldout_keys(batches)


def test_outputs_that_are_not_finite_or_not_of_the_size_are_named(tools):
    def spoilt(image, class_id):
        bad = (class_id == 1) & (image[:, 0, 0, 0] == half_batches()[1].image[2, 0, 0, 0])
        return torch.where(bad[:, None, None, None], torch.nan, image)

    key = half_batches()[1].key[2]
    with pytest.raises(ValueError, match=f"a: the output for {key} to 'bear' is not finite"):
        measure(tools, Known(spoilt))
    with pytest.raises(ValueError, match=r"a: the outputs to 'dog' have 8 x 8 pixels, .* 16 x 16"):
        measure(tools, Known(lambda x, i: x[..., ::2, ::2]))


def test_prompts_are_checked():
    with pytest.raises(ValueError, match="'a photo of a bear', the prompt of bear, is not among"):
        Prompts(PROMPTS, CANDIDATES[:1])
    with pytest.raises(ValueError, match="'a photo of a dog' is given twice"):
        Prompts(PROMPTS, [*CANDIDATES, CANDIDATES[0]])


def test_tools_say_what_is_left_out(monkeypatch, tmp_path):
    before = torch.hub.get_dir()
    torch.hub.set_dir(str(tmp_path))
    try:
        small = Tools.load("nobody/nothing", 16, sets=True, offline=True)
        large = Tools.load("nobody/nothing", 64, sets=False, offline=True)
    finally:
        torch.hub.set_dir(before)
    assert list(small.distances) == list(large.distances) == ["rmse", "one_minus_ssim"]
    assert small.clip is None and small.inception is None
    starts = ("lpips left out: ", "clip_score, r_precision, cmmd left out: ", "kid, fid left out: ")
    assert large.left_out[1].startswith("clip_score, r_precision left out: ")
    assert len(small.left_out) == 3 and len(large.left_out) == 2
    for line, start in zip(small.left_out, starts, strict=True):
        assert line.startswith(start) and "\n" not in line
    assert "16 pixels" in small.left_out[0] and "alexnet" in large.left_out[0]
    result = measure(small, scaled())
    assert result["left_out"] == small.left_out and result["settings"]["clip"] is None
    assert not {"clip_score", "r_precision", "kid"} & set(result["rows"]["a"]["summary"])
    assert all(line in evaluation_text(result) for line in small.left_out)
    assert numbers(result["rows"]["a"])["r_precision_by_class"] == {}


# ---------------------------------------------------------------------------------------------
# Folders of images


def write_outputs(folder: Path, images: dict[str, torch.Tensor], keys: list[str]) -> Path:
    for name, several in images.items():
        for key, image in zip(keys, several, strict=True):
            file = folder / name / f"{key}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(worlds.png(image))
    return folder


@pytest.fixture
def made(tmp_path: Path) -> tuple[Folder, list[str]]:
    """What `scaled` makes of `half_batches`, as files."""
    keys = sorted(key for batch in half_batches() for key in batch.key)
    return Folder(write_outputs(tmp_path / "made", outputs()[1], keys)), keys


def test_a_folder_of_outputs_measures_as_their_translator(tools, made):
    folder, keys = made
    folder.check(list(PROMPTS), keys, [])
    assert folder.size() == SIZE
    prompts = Prompts(PROMPTS, CANDIDATES)
    result = evaluate(
        {"files": folder, "network": translated(scaled())}, half_batches, tools, prompts
    )
    assert_close(result["rows"]["files"], result["rows"]["network"])
    assert result["differences"]["network"]["summary"]["rmse"]["value"] == 0


def test_a_folder_that_does_not_fit_is_refused(made, tmp_path):
    folder, keys = made
    path = folder.path
    folder.check(["dog"], keys, [])
    with pytest.raises(ValueError, match=r"11 held-out images have no output in .*made/fox"):
        folder.check(["fox"], keys, [])
    with pytest.raises(ValueError, match=r"1 held-out images have no output in .*dog, such as 77"):
        folder.check(["dog"], [*keys, "77"], [])
    with pytest.raises(ValueError, match=r"2 images in .*dog have no held-out source, such as 00"):
        folder.check(["dog"], keys[2:], [])
    folder.check(["dog"], keys[1:], [f"{keys[0]} in heldout-00000.tar: cut off"])
    (path / "dog" / "00.jpg").write_bytes(worlds.png(random(3, SIZE, SIZE), suffix="jpg"))
    with pytest.raises(ValueError, match=r"00\.jpg and .*00\.png are of the same key"):
        Folder(path)
    (path / "dog" / "00.jpg").unlink()
    (path / "bear" / "03.png").write_bytes(worlds.png(random(3, 8, 8)))
    with pytest.raises(ValueError, match=r"bear/03\.png has 8 x 8 pixels and .* 16 x 16"):
        Folder(path).size()
    (path / "bear" / "03.png").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"bear/03\.png cannot be read"):
        Folder(path).size()
    (tmp_path / "empty" / "dog").mkdir(parents=True)
    with pytest.raises(ValueError, match="empty holds no images"):
        Folder(tmp_path / "empty")


def test_a_folder_is_read_once_by_all_processes(made):
    folder, keys = made
    seen = [
        (label, key)
        for rank in range(2)
        for batch in folder.batches(4, rank, 2)
        for label, key in zip(batch.label, batch.key, strict=True)
    ]
    assert sorted(seen) == sorted((name, key) for name in PROMPTS for key in keys)
    batch = next(folder.batches(4))
    first = list(PROMPTS).index(batch.label[0])
    expected = list(outputs()[1].values())[first][keys.index(batch.key[0])]
    torch.testing.assert_close(batch.image[0], expected)


# ---------------------------------------------------------------------------------------------
# Results beside each other


def test_results_over_the_same_images_stand_side_by_side(tools):
    one, two = measure(tools, None, scaled()), measure(tools, None, steps(9, 20))
    two["rows"]["other"] = two["rows"].pop("a")
    both = combine({"one.json": one, "two.json": two}, "a")
    assert list(both["rows"]) == ["source", "a", "other"]
    together = measure(tools, None, scaled(), steps(9, 20))["differences"]["b"]["summary"]
    apart = both["differences"]["other"]["summary"]
    assert set(together) - set(apart) == {"spectrum_error", "spectrum_lost", "spectrum_gained"}
    for name, cell in apart.items():
        for key in ("value", "low", "high"):
            assert cell[key] == pytest.approx(together[name][key], abs=1e-4), name
    assert combine({"one.json": one}, "a")["differences"] == one["differences"]


def test_results_that_cannot_be_compared_are_refused(tools):
    one = measure(tools, None, scaled())
    other = measure(tools, None, steps(1, 2), batches=half_batches(10))
    digests = [x["heldout"]["digest"][:16] for x in (one, other)]
    with pytest.raises(ValueError, match="different held-out images") as error:
        combine({"one.json": one, "other.json": other}, None)
    assert all(x in str(error.value) for x in (*digests, "one.json", "other.json"))
    # The same keys with other pixels are other images.
    batches = half_batches()
    batches[0].pixels = -batches[0].image
    changed = measure(tools, steps(1, 2), batches=batches)
    with pytest.raises(ValueError, match="different held-out images"):
        combine({"one": one, "changed": changed}, None)
    with pytest.raises(ValueError, match="one and two both have a row 'a'"):
        combine({"one": one, "two": one}, None)
    for key, value in (("clip", "another"), ("candidates", ["x"]), ("distance", "lpips")):
        two = {**one, "rows": {}, "settings": {**one["settings"], key: value}}
        with pytest.raises(ValueError, match=f"{key} is .* in one and .* in two"):
            combine({"one": one, "two": two}, None)
    for wrong in ({}, [], {**one, "version": 0}):
        with pytest.raises(ValueError, match=r"x\.json is no result of lmc evaluate"):
            combine({"one": one, "x.json": wrong}, None)
    with pytest.raises(ValueError, match="no row 'x'"):
        combine({"one": one}, "x")


def test_rows_over_different_images_are_refused(tools):
    """Should the shards change between two rows."""
    passes = iter([half_batches(), half_batches(10)])
    with pytest.raises(ValueError, match="source and a are of different held-out images"):
        evaluate(
            {"source": None, "a": translated(scaled())},
            lambda: next(passes),
            tools,
            Prompts(PROMPTS, CANDIDATES),
        )


def test_the_json_is_whole_and_short(tools, tmp_path):
    result = measure(tools, None, scaled())
    file = tmp_path / "deep" / "result.json"
    write_json(file, result)
    text = file.read_text()
    assert json.loads(text) == result
    assert [x.name for x in file.parent.iterdir()] == ["result.json"]
    keys = result["heldout"]["keys"]
    assert f'"keys": {json.dumps(keys)}' in text, "a list is a line"
    assert len(text) < 30_000
    for words in (["a, b", "c[0]", "{d"], [["x"], []], ["new\nline", "e"]):
        write_json(file, words)
        assert json.loads(file.read_text()) == words


def test_the_table_says_what_it_is_of(tools):
    result = measure(tools, None, scaled(), steps(3, 5))
    text = evaluation_text(result)
    lines = text.splitlines()
    name = tools.clip.name
    assert f"CLIP score ({name})" in lines[0] and "100 max(cos, 0)" in lines[0]
    cells = [cell.strip() for cell in lines[3].strip("|").split("|")]
    summary = result["rows"]["a"]["summary"]
    numbers_ = [summary["rmse"][key] for key in ("value", "low", "high")]
    assert cells[:2] == ["a", "{:.3f} [{:.3f}, {:.3f}]".format(*numbers_)]
    assert "over 11 held-out images" in text
    assert all(repr(candidate) in text for candidate in CANDIDATES)
    assert "| minus a |" in text and "| R-Precision | dog | bear |" in text
    delta = result["differences"]["b"]["summary"]["rmse"]["value"]
    assert f"| b | {delta:+.3f} [" in text


def test_a_result_from_before_a_measure_has_a_dash_for_it(tools):
    """It is read and put beside a new one; what it was measured by then is as it was."""
    new, old = measure(tools, None, scaled()), measure(tools, None, steps(9, 20))
    old["rows"]["old"] = old["rows"].pop("a")
    for row in old["rows"].values():
        for name in ("spectrum_lost", "spectrum_gained"):
            del row["summary"][name]
    both = combine({"new.json": new, "old.json": old}, "a")
    lines = [line.strip("|").split("|") for line in evaluation_text(both).splitlines()]
    heads = [head.strip() for head in lines[0]]
    cells = {line[0].strip(): [x.strip() for x in line] for line in lines[2:5]}
    for head in ("spectrum lost", "spectrum gained"):
        place = heads.index(head)
        assert cells["old"][place] == "–" and "[" in cells["a"][place]
    assert "[" in cells["old"][heads.index("spectrum error")]
    assert "spectrum_lost" not in numbers(both["rows"]["old"])
    assert "–" not in evaluation_text(old), "alone it has no such columns"


# ---------------------------------------------------------------------------------------------
# The command


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, clip_folder: Path) -> Path:
    """Held-out shards, two releases, and real images of the classes."""
    folder = tmp_path_factory.mktemp("world")
    worlds.write_world(folder / "shards")
    for seed, name in enumerate(("one", "two")):
        torch.manual_seed(seed)
        Translator(list(PROMPTS), SIZE, [8, 8]).save_pretrained(folder / name)
    write_outputs(
        folder / "real",
        {name: random(6, 3, SIZE, SIZE, seed=i) for i, name in enumerate(PROMPTS)},
        [f"r{i}" for i in range(6)],
    )
    return folder


def command(world: Path, clip_folder: Path, out: Path, *more: object) -> list[str]:
    args = ["evaluate", "--offline", "--shards", f"{world}/shards/heldout-*.tar"]
    return [*args, "--clip", str(clip_folder), "--out", str(out), *map(str, more)]


def refused(*args: str) -> str:
    with pytest.raises(SystemExit) as caught:
        main(list(args))
    message = caught.value.code
    assert isinstance(message, str) and message.startswith("lmc: ") and "\n" not in message
    return message


def test_the_command_measures_networks_and_files(world, clip_folder, tmp_path, capsys):
    """What one network made, as PNGs under the shards' keys, is a row like the network's own."""
    stream = ImageStream(f"{world}/shards/heldout-*.tar", SIZE, 24, training=False)
    batch = next(iter(stream))
    network = Translator.from_pretrained(world / "one").eval()
    with torch.no_grad():
        made = {n: network(batch.image, network.class_ids([n] * 24)) for n in PROMPTS}
    files = write_outputs(tmp_path / "files", made, batch.key)
    (files / "fox").mkdir()
    (files / "fox" / "x.png").write_bytes(worlds.png(random(3, SIZE, SIZE)))
    out = tmp_path / "out.json"
    args = command(world, clip_folder, out, "--translator", world / "one", world / "two")
    args += ["--images", str(files), "--real", f"{world}/real", "--truth", str(files)]
    main([*args, "--batch_size", "7"])
    result = json.loads(out.read_text())
    assert result["truth"].pop("path") == str(files)
    # What the first network made is the truth: its own row is at no distance from it.
    for name in ("one", "files"):
        assert result["rows"][name]["summary"]["truth_rmse"]["value"] == pytest.approx(0, abs=1e-6)
    assert result["rows"]["source"]["summary"]["truth_cast"]["value"] > 0
    # Without Inception there are no KID and FID, and a line says so; CMMD is there.
    assert {"cmmd"} == {"cmmd", "kid", "fid"} & result["rows"]["one"]["summary"].keys()
    assert len([line for line in result["left_out"] if line.startswith("kid, fid left out")]) == 1
    assert list(result["rows"]) == ["source", "one", "two", "files"]
    found = [result["rows"][name].pop("path") for name in ("one", "two", "files")]
    assert found == [f"{world}/one", f"{world}/two", str(files)]
    assert_close(result["rows"]["files"], result["rows"]["one"])
    assert result["heldout"]["shards"].endswith("heldout-*.tar")
    assert set(result["differences"]) == {"two", "files"} and result["seconds"] > 0
    printed = capsys.readouterr()
    # Three measures of weights that are not here, or small images, and the folder 'fox'.
    assert "files: its folder fox is of no class that is measured" in printed.out
    assert "lpips left out" in printed.out
    assert "files" in printed.err

    # The same rows again beside the files of before.
    again = tmp_path / "again.json"
    args = command(world, clip_folder, again, "--images", files, "--classes", *PROMPTS)
    renamed = {**result, "rows": {k: v for k, v in result["rows"].items() if k != "files"}}
    out.write_text(json.dumps(renamed))
    main([*args, "--beside", str(out), "--against", "one"])
    beside = json.loads(again.read_text())
    assert set(beside["rows"]) == {"source", "one", "two", "files"}
    delta = beside["differences"]["files"]["summary"]["rmse"]
    assert delta["value"] == pytest.approx(0, abs=1e-5)


def test_the_command_says_what_is_wrong(world, clip_folder, tmp_path, capsys, monkeypatch):
    def message(*more: object) -> str:
        said = refused(*command(world, clip_folder, tmp_path / "x.json", *more))
        assert not (tmp_path / "x.json").exists() and "|" not in capsys.readouterr().out
        return said

    one, real = ("--translator", world / "one"), world / "real"
    assert "--translator RUN" in message()
    assert "does not know the class 'owl', it knows dog, bear" in message(
        *one, "--classes", "dog", "owl"
    )
    assert "24 held-out images have no output" in message("--images", real)
    assert "no row 'x'" in message(*one, "--against", "x")
    assert "is not among the candidates" in message(*one, "--candidates", "a dog")
    assert "no result of lmc evaluate" in message(*one, "--beside", clip_folder / "config.json")
    (tmp_path / "text").write_text("text")
    assert "text is no JSON" in message(*one, "--beside", tmp_path / "text")
    Translator(list(PROMPTS), 32, [8, 8]).save_pretrained(tmp_path / "larger")
    assert "larger is of 32 pixels, one of 16" in message(*one, tmp_path / "larger")
    write_outputs(tmp_path / "few", {"dog": random(2, 3, SIZE, SIZE)}, ["a", "b"])
    assert "no real images of 'bear'" in message(*one, "--real", tmp_path / "few")
    write_outputs(tmp_path / "big", {n: random(2, 3, 32, 32) for n in PROMPTS}, ["a", "b"])
    assert "have 32 pixels, not 16" in message(*one, "--real", tmp_path / "big")
    missing = message(*one, "--truth", real)
    assert "24 held-out images have no true counterpart in" in missing and "real/dog" in missing
    assert "no such folder of true counterparts" in message(*one, "--truth", tmp_path / "no")
    assert "no true counterparts of class 'bear'" in message(*one, "--truth", tmp_path / "few")
    assert "have 32 pixels, not 16" in message(*one, "--truth", tmp_path / "big")
    assert "the same is named twice" in message(*one, world / "one")
    (tmp_path / "source").symlink_to(world / "one")
    monkeypatch.chdir(tmp_path)
    assert "no row can be named 'source'" in message("--translator", "source")


def test_folders_of_one_name_are_told_apart_by_those_above():
    paths = ["runs/a/seed0", "runs/b/seed0", "/x/b/seed1", "hub/one"]
    assert list(_named(paths)) == ["a/seed0", "b/seed0", "seed1", "one"]
    assert list(_named(["runs/source"])) == ["runs/source"]


def _rank(rank: int, port: int, args: list[str]) -> None:
    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank),
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    main(args)


def test_two_processes_measure_what_one_does(world, clip_folder, tmp_path):
    batch = next(iter(ImageStream(f"{world}/shards/heldout-*.tar", SIZE, 24, training=False)))
    truth = write_outputs(tmp_path / "truth", dict.fromkeys(PROMPTS, -0.5 * batch.image), batch.key)
    args = ("--translator", world / "one", "--batch_size", "5")
    args += ("--truth", truth, "--real", world / "real")
    main(command(world, clip_folder, tmp_path / "1.json", *args))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("fork")
    args = command(world, clip_folder, tmp_path / "2.json", *args)
    processes = [context.Process(target=_rank, args=(i, port, args)) for i in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        process.kill()
    assert [process.exitcode for process in processes] == [0, 0]
    one, two = (json.loads((tmp_path / f"{i}.json").read_text()) for i in (1, 2))
    assert one.pop("seconds") > 0 and two.pop("seconds") > 0
    assert two["heldout"]["count"] == 24
    assert_close(one, two)


def test_images_named_by_their_prompts(clip_folder, tmp_path, capsys):
    """As the course's eval.py: the plain cosine, one prompt once, the mean over prompts."""
    images = random(3, 3, SIZE, SIZE)
    names = ("a_photo_of_a_dog.png", "a photo of a cat.0.png", "a_photo_of_a_cat.1.png")
    for name, image in zip(names, images, strict=True):
        (tmp_path / name).write_bytes(worlds.png(image))
    (tmp_path / "ignored.jpg").write_bytes(worlds.png(images[0], suffix="jpg"))
    out = tmp_path / "eval.json"
    args = ["evaluate", "--offline", "--clip", str(clip_folder), "--named_by_prompt", str(tmp_path)]
    assert "--eval_json" in refused(*args)
    assert "no --shards" in refused(*args, "--shards", "x.tar", "--eval_json", str(out))
    main([*args, "--eval_json", str(out)])
    scores = json.loads(out.read_text())
    clip = Clip(str(clip_folder))
    embedded = F.normalize(clip.images(from_uint8(to_uint8(images))))
    texts = F.normalize(clip.texts(["a photo of a dog", "a photo of a cat"]))
    dog = (embedded[0] @ texts[0]).item()
    cat = ((embedded[1] + embedded[2]) @ texts[1] / 2).item()
    assert scores == {
        "source_dir": str(tmp_path),
        f"{tmp_path}/{names[1]}": pytest.approx(cat, abs=1e-5),
        f"{tmp_path}/{names[0]}": pytest.approx(dog, abs=1e-5),
        "score": pytest.approx((dog + cat) / 2, abs=1e-5),
    }
    assert f"of 2 prompts: {scores['score']:.4f}" in capsys.readouterr().out
    (tmp_path / "none").mkdir()
    with pytest.raises(ValueError, match="none holds no PNG files"):
        score_named_by_prompt(tmp_path / "none", clip)


# ---------------------------------------------------------------------------------------------
# The corrector


class Halving:
    """A prior whose estimate is known: z_hat = z/2 + 0.1, whatever t."""

    def __init__(self) -> None:
        self.inner = small_prior(SIZE)
        self.schedule, self.identity = self.inner.schedule, {"digest": "halving"}
        self.image_size, self.channels = SIZE, 3

    def encode(self, image):
        self.z = image
        return image

    def embed(self, prompts):
        assert list(prompts) == [""]
        return self.inner.embed(prompts)

    def predict(self, z_t, t, embedding):
        assert len(z_t) == len(t) == len(embedding.tensors["mean"])
        return torch.zeros_like(z_t), self.z / 2 + 0.1


class IdentityCorrector(Corrector):
    def forward(self, z, t):
        return z


def test_the_corrector_is_measured_beside_the_identity():
    """b normalised is (z − μ)/2 + μ, so b − z_hat = μ/2 − 0.1 at every pixel."""
    corrector = IdentityCorrector(3, [8, 8], prior={"digest": "halving"})
    images = torch.cat([batch.image for batch in half_batches()])
    errors = evaluate_corrector(corrector, Halving(), half_batches())
    expected = (images.mean((1, 2, 3)) / 2 - 0.1).square().mean().item()
    assert errors["loss"] == pytest.approx(expected, rel=1e-4)
    assert errors["normalised_identity_loss"] == pytest.approx(expected, rel=1e-4)
    identity = (images / 2 - 0.1).square().mean().item()
    assert errors["identity_loss"] == pytest.approx(identity, rel=1e-4)


def test_a_corrector_is_measured_with_its_own_prior_only():
    corrector = IdentityCorrector(3, [8, 8], prior={"digest": "another"})
    with pytest.raises(ValueError, match="another"):
        evaluate_corrector(corrector, Halving(), half_batches())
    corrector = IdentityCorrector(3, [8, 8], prior={"digest": "halving"})
    with pytest.raises(ValueError, match=r"time_range must be an interval.*\[0\.5, 0\.5\]"):
        evaluate_corrector(corrector, Halving(), half_batches(), time_range=(0.5, 0.5))


class Seeing(Halving):
    """Halving that keeps what it was asked: t and z_t by the value of a source's first pixel."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: dict[float, tuple[float, torch.Tensor]] = {}

    def predict(self, z_t, t, embedding):
        for i, z in enumerate(self.z):
            self.asked[z[0, 0, 0].item()] = (t[i].item(), z_t[i])
        return super().predict(z_t, t, embedding)


def test_a_corrector_is_measured_at_times_in_the_range_that_it_was_trained_in():
    corrector = IdentityCorrector(3, [8, 8], prior={"digest": "halving"})
    for low, high in ((0.02, 0.98), (0.4, 0.45)):
        seen = Seeing()
        evaluate_corrector(corrector, seen, half_batches(), time_range=(low, high))
        times = [t for t, _ in seen.asked.values()]
        assert len(set(times)) == 11 and low <= min(times) and max(times) <= high
        assert max(times) - min(times) > 0.5 * (high - low)


def test_a_heldout_image_has_its_noise_whatever_the_batch():
    corrector = IdentityCorrector(3, [8, 8], prior={"digest": "halving"})
    asked = []
    for size in (1, 4, 11):
        seen = Seeing()
        evaluate_corrector(corrector, seen, reversed(half_batches(size=size)))
        asked.append(seen.asked)
    for other in asked[1:]:
        assert other.keys() == asked[0].keys() and len(other) == 11
        for pixel, (t, z_t) in other.items():
            assert t == asked[0][pixel][0]
            torch.testing.assert_close(z_t, asked[0][pixel][1])


def _corrector_rank(rank: int, port: int, file: Path) -> None:
    torch.set_num_threads(1)
    where = f"tcp://127.0.0.1:{port}"
    torch.distributed.init_process_group("gloo", init_method=where, rank=rank, world_size=2)
    corrector = IdentityCorrector(3, [8, 8], prior={"digest": "halving"})
    errors = evaluate_corrector(corrector, Halving(), half_batches()[rank::2])
    write_json(file, errors)


def test_two_processes_measure_a_corrector_as_one_does(tmp_path):
    """Of eight and of three images."""
    corrector = IdentityCorrector(3, [8, 8], prior={"digest": "halving"})
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("fork")
    files = [tmp_path / f"{i}.json" for i in range(2)]
    processes = [
        context.Process(target=_corrector_rank, args=(i, port, file))
        for i, file in enumerate(files)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        process.kill()
    wanted = evaluate_corrector(corrector, Halving(), half_batches())
    for file in files:
        assert json.loads(file.read_text()) == pytest.approx(wanted, rel=1e-5)


def test_errors_of_uneven_batches_are_those_of_one():
    z, z_hat, b = (random(7, 3, 4, 4, seed=i) for i in range(3))
    whole, parts = CorrectorErrors(), CorrectorErrors()
    whole.update(z, z_hat, b)
    for part in (slice(0, 1), slice(1, 5), slice(5, 7)):
        parts.update(z[part], z_hat[part], b[part])
    for name, value in whole.compute().items():
        torch.testing.assert_close(parts.compute()[name], value)
    assert whole.compute()["loss"].item() == pytest.approx(F.mse_loss(b, z_hat).item(), rel=1e-5)
    assert whole.compute()["identity_loss"].item() == pytest.approx(F.mse_loss(z, z_hat).item())
