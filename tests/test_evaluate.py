"""Metrics against independent implementations and known values; the runners on known networks."""

import math
from pathlib import Path

import lpips
import numpy as np
import pytest
import torch
from PIL import Image
from skimage.metrics import structural_similarity
from tokenizers.pre_tokenizers import ByteLevel
from torch.nn import functional as F
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

from lmc.corrector import Corrector
from lmc.evaluate import (
    Clip,
    CorrectorErrors,
    clip_score,
    derivative_histogram,
    distances,
    evaluate_corrector,
    evaluate_translator,
    one_minus_ssim,
    power_spectrum,
    r_precision,
    rmse,
    spectrum_error,
)
from lmc.images import ImageBatch, ImageStream, to_uint8
from lmc.translator import Translator

import worlds
from gaussian import small_prior

SIZE = 16
PROMPTS = {"dog": "a photo of a dog", "bear": "a photo of a bear"}


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


@pytest.fixture
def no_weights(tmp_path: Path):
    """Torch's hub folder, empty."""
    before = torch.hub.get_dir()
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    torch.hub.set_dir(str(tmp_path / "hub"))
    yield tmp_path / "hub" / "checkpoints"
    torch.hub.set_dir(before)


# ---------------------------------------------------------------------------------------------
# Statistics of images


def numpy_spectrum(image: np.ndarray) -> np.ndarray:
    """(C, S, S) to (S // 2,), coefficient by coefficient."""
    size = image.shape[-1]
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(size) / size)
    rings: dict[int, list[float]] = {}
    for channel in image:
        power = np.abs(np.fft.fft2((channel - channel.mean()) * np.outer(hann, hann))) ** 2
        for y in range(size):
            for x in range(size):
                fy, fx = (k if k < size / 2 else k - size for k in (y, x))
                ring = rings.setdefault(round(math.sqrt(fy**2 + fx**2)), [])
                ring.append(power[y, x] / size**2)
    return np.array([np.mean(rings[r]) for r in range(1, size // 2 + 1)])


@pytest.mark.parametrize("size", [16, 24])
def test_the_power_spectrum_agrees_with_numpy(size):
    images = random(2, 3, size, size).double()
    expected = np.stack([numpy_spectrum(image) for image in images.numpy()])
    torch.testing.assert_close(power_spectrum(images), torch.from_numpy(expected))


@pytest.mark.parametrize("cycles", [3, 7, 12])
def test_a_sine_peaks_in_its_own_ring(cycles):
    wave = torch.sin(2 * torch.pi * cycles * torch.arange(32) / 32)
    for image in (wave.expand(1, 3, 32, 32), wave[:, None].expand(1, 3, 32, 32)):
        spectrum = power_spectrum(image)[0]
        assert spectrum.argmax() + 1 == cycles
        far = (torch.arange(1, 17) - cycles).abs() > 2  # Hann's lobe is one frequency wide
        assert spectrum[far].max() < 1e-3 * spectrum.max()


def test_white_noise_has_the_level_of_the_window():
    """σ² times the mean square of Hann's window along each axis, (3/8)².

    200 x 3 pictures make the rarest ring (8 coefficients, half of them independent) an average
    of more than 2,000 exponential variables: 2 % each; 10 % is beyond five deviations.
    """
    noise = 0.3 * torch.randn(200, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    spectrum = power_spectrum(noise).mean(0)
    # The first ring loses a little to the subtracted mean, which the window smears into it.
    torch.testing.assert_close(spectrum[1:] / 0.09 / 0.375**2, torch.ones(15), rtol=0.1, atol=0)


def test_blur_takes_the_high_frequencies():
    sharp = random(4, 3, 32, 32)
    blurred = F.avg_pool2d(F.pad(sharp, (1, 1, 1, 1), mode="circular"), 3, 1)
    ratio = power_spectrum(blurred).mean(0) / power_spectrum(sharp).mean(0)
    assert ratio[0] > 0.8 and ratio[7:].max() < 0.5


def test_spectrum_error_is_in_decades():
    spectrum = power_spectrum(random(1, 3, 32, 32))[0]
    assert spectrum_error(spectrum, spectrum) == 0
    for factor in (100, 0.01):
        assert spectrum_error(factor * spectrum, spectrum).item() == pytest.approx(2, rel=1e-5)
    half = torch.where(torch.arange(16) < 8, 10.0, 0.1)  # ups and downs must not cancel
    assert spectrum_error(half * spectrum, spectrum).item() == pytest.approx(1, rel=1e-5)


def test_rmse_is_per_image():
    image = random(2, 3, 8, 8)
    other = image + torch.tensor([0.5, -0.1])[:, None, None, None]
    torch.testing.assert_close(rmse(other, image), torch.tensor([0.5, 0.1]))
    single = torch.zeros(1, 3, 8, 8)
    single[0, 0, 0, 0] = 1
    assert rmse(single, torch.zeros(1, 3, 8, 8)).item() == pytest.approx((1 / 192) ** 0.5)


def test_ssim_agrees_with_scikit_image():
    """Gaussian of σ = 1.5, 11 x 11, over all pixels: torchmetrics mirrors the border's five where
    scikit-image leaves them out, so that it is given the mirrored ones here. 1e-4 is float32's
    rounding of variances as differences of squares, against float64."""
    image, noise = random(3, 3, 32, 32), random(3, 3, 32, 32, seed=1)
    other = (image + torch.tensor([0.0, 0.2, 1.0])[:, None, None, None] * noise).clamp(-1, 1)
    expected = []
    for pair in zip(other, image, strict=True):
        a, b = (np.pad(x.double().numpy(), ((0, 0), (5, 5), (5, 5)), "reflect") for x in pair)
        ssim = structural_similarity(
            a,
            b,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
            data_range=2,
            channel_axis=0,
        )
        expected.append(1 - ssim)
    assert expected[2] > 0.5 > expected[1] > 0.05
    result = one_minus_ssim(other, image).double()
    torch.testing.assert_close(result, torch.tensor(expected).double(), rtol=0, atol=1e-4)
    assert one_minus_ssim(image[:1], image[:1]).shape == (1,)


def test_the_derivative_histogram_of_a_ramp_is_one_bin():
    """Steps of 0.1 downwards; sideways ones do not count. Bins are 2/101 wide."""
    down = torch.linspace(-1, 1, 21)[:, None].expand(1, 3, 21, 5)
    histogram = derivative_histogram(down)
    assert histogram.shape == (101,)
    assert histogram.argmax() == math.floor(1.1 * 101 / 2) and histogram.max() == 1
    assert derivative_histogram(down.mT).argmax() == 50
    assert derivative_histogram(2 * random(2, 3, 8, 8)).sum().item() == pytest.approx(1)


# ---------------------------------------------------------------------------------------------
# CLIP


def test_clip_score_is_the_cosine():
    images = torch.tensor([[2.0, 0.0], [0.0, 3.0], [1.0, 1.0]])
    texts = torch.tensor([[5.0, 0.0], [1.0, 0.0], [-1.0, 0.0]])
    torch.testing.assert_close(clip_score(images, texts), torch.tensor([1, 0, -(0.5**0.5)]))


def test_r_precision_ranks_by_cosine():
    """Not by dot product: the second text is long but points elsewhere."""
    texts = torch.tensor([[1.0, 0.0], [5.0, 5.0], [0.0, 1.0]])
    images = torch.tensor([[9.0, 1.0], [1.0, 1.1], [0.1, 1.0], [1.0, 0.0]])
    assert r_precision(images, texts, torch.tensor([0, 1, 0, 2])).tolist() == [1, 1, 0, 0]


def test_clip_agrees_with_its_processor(clip_folder):
    """On images of the model's own size; 1e-5 is float32's rounding."""
    clip, processor = Clip(str(clip_folder)), CLIPProcessor.from_pretrained(clip_folder)
    model = CLIPModel.from_pretrained(clip_folder).eval()
    pixels = to_uint8(random(3, 3, SIZE, SIZE))
    prompts = ["a photo of a dog", "a cat", ""]
    files = [Image.fromarray(x.permute(1, 2, 0).numpy()) for x in pixels]
    with torch.no_grad():
        out = model(**processor(text=prompts, images=files, return_tensors="pt", padding=True))
    image, text = clip.images(pixels.float() / 127.5 - 1), clip.texts(prompts)
    for mine, theirs in ((image, out.image_embeds), (text, out.text_embeds)):
        torch.testing.assert_close(F.normalize(mine), theirs, rtol=0, atol=1e-5)
    assert (out.image_embeds[0] - out.image_embeds[1]).abs().max() > 1e-3


def test_clip_takes_other_sizes_and_long_prompts(clip_folder):
    clip = Clip(str(clip_folder))
    flat = torch.full((1, 3, SIZE, SIZE), 0.3)
    large = torch.full((1, 3, 50, 50), 0.3)
    torch.testing.assert_close(clip.images(large), clip.images(flat), rtol=0, atol=1e-5)
    assert clip.texts(["long " * 100]).shape == (1, 8)


def test_a_missing_clip_is_named(tmp_path):
    with pytest.raises(OSError, match="nothing_here"):
        Clip(str(tmp_path / "nothing_here"))


# ---------------------------------------------------------------------------------------------
# The runners


def test_lpips_is_only_offered_with_its_weights(no_weights, monkeypatch):
    assert list(distances()) == ["rmse", "one_minus_ssim"]
    (no_weights / "vgg16-397923af.pth").touch()
    assert "lpips" not in distances()
    (no_weights / "alexnet-owt-7be5be79.pth").touch()

    class Fake(torch.nn.Module):
        def __init__(self, net: str, **options: bool) -> None:
            super().__init__()
            assert net == "alex"

        def forward(self, image, source):
            return torch.full((len(image), 1, 1, 1), 7.0)

    monkeypatch.setattr(lpips, "LPIPS", Fake)
    found = distances()
    assert list(found) == ["lpips", "rmse", "one_minus_ssim"]
    assert found["lpips"](random(2, 3, 8, 8), random(2, 3, 8, 8)).tolist() == [7, 7]


class Known(Translator):
    """Not a network but a function of the image."""

    def __init__(self, function) -> None:
        super().__init__(list(PROMPTS), SIZE, [8, 8])
        self.function = function

    def forward(self, image, class_id):
        return self.function(image, class_id)


def half_batches(count: int = 11) -> list[ImageBatch]:
    """Images within ±0.5, in batches of 4, 4 and 3."""
    images = 0.5 * random(count, 3, SIZE, SIZE)
    return [ImageBatch(x, ["k"] * len(x), ["cat"] * len(x)) for x in images.split(4)]


def measure(clip_folder: Path, translator: Translator | None, batches=None):
    clip = Clip(str(clip_folder))
    batches = half_batches() if batches is None else batches
    return evaluate_translator(translator, batches, clip, PROMPTS, "a photo of a cat")


def test_the_identity_has_no_distance(clip_folder, no_weights):
    row = measure(clip_folder, Known(lambda image, class_id: image))
    assert row["images"] == 11 and row["distance_name"] == "rmse"
    assert row["distance"] == row["distances"]["rmse"] == 0
    # Spectra are summed in another order: float32's rounding.
    assert row["spectrum_error"] == pytest.approx(0, abs=1e-5)
    assert row["distances"]["one_minus_ssim"] == pytest.approx(0, abs=1e-5)
    assert row == measure(clip_folder, None)


def test_a_known_change_has_known_numbers(clip_folder, no_weights):
    """+0.3 for one class and +0.1 for the other; half the contrast is a quarter of the power."""
    row = measure(
        clip_folder, Known(lambda x, i: x + torch.where(i == 0, 0.3, 0.1)[:, None, None, None])
    )
    assert row["distance"] == pytest.approx(0.2, abs=1e-5)
    assert row["spectrum_error"] == pytest.approx(0, abs=1e-4)
    row = measure(clip_folder, Known(lambda image, class_id: image / 2))
    assert row["spectrum_error"] == pytest.approx(math.log10(4), rel=1e-4)


def test_scores_are_means_over_images_and_classes(clip_folder, no_weights):
    """Against CLIP's embeddings one output at a time."""
    translator = Known(lambda x, i: x * torch.where(i == 0, 1.7, -1.3)[:, None, None, None])
    row = measure(clip_folder, translator)
    clip = Clip(str(clip_folder))
    texts = F.normalize(clip.texts([*PROMPTS.values(), "a photo of a cat"]))
    images = torch.cat([batch.image for batch in half_batches()])
    scores, hits = [], {"dog": [], "bear": []}
    for i, (name, factor) in enumerate((("dog", 1.7), ("bear", -1.3))):
        for image in images:
            cosines = (F.normalize(clip.images(factor * image[None])) @ texts.T)[0].tolist()
            scores.append(cosines[i])
            hits[name].append(max(cosines) == cosines[i])
    assert row["clip_score"] == pytest.approx(np.mean(scores), abs=1e-5)
    assert row["r_precision_by_class"] == pytest.approx({n: np.mean(h) for n, h in hits.items()})
    assert row["r_precision"] == pytest.approx(np.mean(list(row["r_precision_by_class"].values())))


def test_evaluation_reads_shards(clip_folder, no_weights, tmp_path):
    shards = f"{worlds.write_world(tmp_path)}/heldout-*.tar"
    row = measure(clip_folder, None, ImageStream(shards, SIZE, 5, training=False))
    assert row["images"] == 24


def test_a_batch_of_broken_samples_does_not_end_the_evaluation(clip_folder, no_weights, tmp_path):
    """What is left at the end of a pass may hold no picture at all."""
    good = worlds.png(random(3, SIZE, SIZE))
    samples = [("a", good, "png", {"label": "cat"}), ("b", b"broken", "png", {"label": "cat"})]
    worlds.write_shard(tmp_path / "heldout-00000.tar", samples)
    stream = ImageStream(f"{tmp_path}/heldout-*.tar", SIZE, 1, training=False)
    assert measure(clip_folder, None, stream)["images"] == 1


def test_no_images_is_an_error(clip_folder, no_weights):
    with pytest.raises(ValueError, match="no held-out images"):
        measure(clip_folder, None, [])


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
