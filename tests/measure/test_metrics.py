"""Metrics against independent implementations and known values."""

import math
import urllib.error
from pathlib import Path

import lpips
import numpy as np
import pytest
import scipy.fft
import scipy.linalg
import torch
from PIL import Image
from skimage.metrics import structural_similarity
from test_evaluate import SIZE, build_clip_folder, random
from torch.nn import functional as F
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from transformers import CLIPModel, CLIPProcessor

from lmc.measure import metrics
from lmc.measure.metrics import (
    Clip,
    MissingWeights,
    clip_score,
    clip_score_100,
    cmmd,
    cosines,
    derivative_counts,
    derivative_histogram,
    distances,
    fid,
    interval,
    kid,
    load_inception,
    load_lpips,
    one_minus_ssim,
    perceptual,
    power_spectrum,
    r_precision,
    resampling,
    rmse,
    saturation,
    spectrum_error,
    spectrum_gained,
    spectrum_lost,
    weighted_cmmd,
    winners,
)
from lmc.shards.images import from_uint8, to_uint8


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


def scipy_spectrum(image: np.ndarray) -> np.ndarray:
    """(C, S, S) to (S // 2,), coefficient by coefficient."""
    size = image.shape[-1]
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(size) / size)
    rings: dict[int, list[float]] = {}
    for channel in image:
        power = np.abs(scipy.fft.fft2((channel - channel.mean()) * np.outer(hann, hann))) ** 2
        for y in range(size):
            for x in range(size):
                fy, fx = (k if k < size / 2 else k - size for k in (y, x))
                ring = rings.setdefault(round(math.sqrt(fy**2 + fx**2)), [])
                ring.append(power[y, x] / size**2)
    return np.array([np.mean(rings[r]) for r in range(1, size // 2 + 1)])


@pytest.mark.parametrize("size", [16, 24])
def test_the_power_spectrum_agrees_with_scipy(size):
    images = random(2, 3, size, size).double()
    expected = np.stack([scipy_spectrum(image) for image in images.numpy()])
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


def test_a_field_of_known_spectrum_has_its_slope():
    """White noise filtered to a power of 1/f²: from ring 3 (below, the window smears the steep
    start) to half of Nyquist's frequency the spectrum falls by two decades a decade; 0.1 is what
    64 fields scatter."""
    noise = torch.randn(64, 3, 64, 64, generator=torch.Generator().manual_seed(0)).double()
    f = torch.from_numpy(scipy.fft.fftfreq(64, 1 / 64))
    radius = torch.hypot(f[:, None], f).clamp_min(1)
    field = torch.fft.ifft2(torch.fft.fft2(noise) / radius).real
    spectrum = power_spectrum(field).mean(0).numpy()
    rings = np.arange(3, 17)
    slope = np.polyfit(np.log10(rings), np.log10(spectrum[2:16]), 1)[0]
    assert slope == pytest.approx(-2, abs=0.1)


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


def test_what_a_spectrum_lost_and_gained_is_told_apart():
    """A quarter of the frequencies ten times weaker, a half a hundred times stronger."""
    source = power_spectrum(random(2, 3, 32, 32))
    ring = torch.arange(16)
    factor = torch.where(ring < 4, 0.1, torch.where(ring < 12, 100.0, 1.0))
    for scale, lost, gained in ((factor, 1 / 4, 1.0), (1 / factor, 1.0, 1 / 4)):
        spectrum = scale * source
        torch.testing.assert_close(spectrum_lost(spectrum, source), torch.full((2,), lost))
        torch.testing.assert_close(spectrum_gained(spectrum, source), torch.full((2,), gained))
        both = spectrum_lost(spectrum, source) + spectrum_gained(spectrum, source)
        torch.testing.assert_close(both, spectrum_error(spectrum, source))
    assert spectrum_lost(source, source).eq(0).all()
    assert spectrum_gained(source, source).eq(0).all()


def test_a_blur_loses_and_noise_gains():
    sharp = random(4, 3, 32, 32)
    source = power_spectrum(sharp).mean(0)
    blurred = F.avg_pool2d(F.pad(sharp, (1, 1, 1, 1), mode="circular"), 3, 1)
    noisy = sharp + random(4, 3, 32, 32, seed=1)
    for image, more, less in (
        (blurred, spectrum_lost, spectrum_gained),
        (noisy, spectrum_gained, spectrum_lost),
    ):
        spectrum = power_spectrum(image).mean(0)
        assert more(spectrum, source) > 0.2 and less(spectrum, source) < 1e-3


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


def test_a_bin_of_the_derivative_histogram_is_three_levels_of_8_bits():
    """The 255 steps from -127 to 127 levels, one each, fill all bins alike."""
    levels = torch.arange(-127, 128)
    pairs = torch.stack([torch.zeros(255), levels]) * 2 / 255
    histogram = derivative_histogram(pairs[None, None])
    assert torch.allclose(histogram, torch.full((85,), 1 / 85), atol=1e-6)


def test_the_derivative_histogram_of_a_ramp_is_one_bin():
    """Steps of 0.1 downwards; sideways ones do not count. Bins are 2/85 wide."""
    down = torch.linspace(-1, 1, 21)[:, None].expand(1, 3, 21, 5)
    histogram = derivative_histogram(down)
    assert histogram.shape == (85,)
    assert histogram.argmax() == math.floor(1.1 * 85 / 2) and histogram.max() == 1
    assert derivative_histogram(down.mT).argmax() == 42
    assert derivative_histogram(2 * random(2, 3, 8, 8)).sum().item() == pytest.approx(1)


def test_derivatives_are_counted_per_image_as_numpy_does():
    images = random(3, 3, 9, 7)
    counts = derivative_counts(images)
    assert counts.shape == (3, 85)
    for image, mine in zip(images.numpy(), counts.numpy(), strict=True):
        steps = np.clip(np.diff(image, axis=1), -1, 1)
        expected, _ = np.histogram(steps, 85, (-1, 1))
        assert (mine == expected).all() and mine.sum() == 3 * 8 * 7
    together = counts.sum(0) / counts.sum()
    torch.testing.assert_close(derivative_histogram(images), together.float())


def test_saturation_is_the_share_of_the_end_bytes():
    pixels = torch.tensor([[0, 1, 254, 255], [7, 255, 255, 255]], dtype=torch.uint8)
    image = from_uint8(pixels.view(2, 1, 2, 2))
    assert saturation(image).tolist() == [0.5, 0.75]


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
    for there in (f"{tmp_path}/nothing_here", "./nothing_here", "~/nothing_here"):
        with pytest.raises(FileNotFoundError, match=f"^no such folder: {there} .*--clip"):
            Clip(there)


@pytest.mark.parametrize("width", [50, 31])
def test_clip_prepares_other_sizes_as_its_processor(clip_folder, width):
    """Bicubic, short side, the middle square: nearer to it than bilinear, but for rounded bytes."""
    clip, processor = Clip(str(clip_folder)), CLIPProcessor.from_pretrained(clip_folder)
    pixels = to_uint8(random(3, 3, 40, width))
    files = [Image.fromarray(x.permute(1, 2, 0).numpy()) for x in pixels]
    inputs = processor(images=files, return_tensors="pt", input_data_format="channels_last")
    with torch.no_grad():
        theirs = clip.model.get_image_features(**inputs)
    theirs = F.normalize(getattr(theirs, "pooler_output", theirs))
    image = from_uint8(pixels)
    mine = F.normalize(clip.images(image))
    side = min(40, width)
    square = image[..., (40 - side) // 2 :, (width - side) // 2 :][..., :side, :side]
    linear = F.interpolate(square, (SIZE, SIZE), mode="bilinear", antialias=True)
    bilinear = F.normalize(clip.images(linear))
    error = (mine - theirs).norm(dim=1)
    assert error.max() < 0.02 and (error < 0.3 * (bilinear - theirs).norm(dim=1)).all()


def test_the_clip_score_is_the_models_own_logit(clip_folder):
    """transformers' logits_per_image are cosines times exp(logit_scale); 1e-5 is rounding."""
    clip, processor = Clip(str(clip_folder)), CLIPProcessor.from_pretrained(clip_folder)
    model = CLIPModel.from_pretrained(clip_folder).eval()
    pixels, prompts = to_uint8(random(4, 3, SIZE, SIZE)), ["a photo of a dog", "cat"]
    files = [Image.fromarray(x.permute(1, 2, 0).numpy()) for x in pixels]
    with torch.no_grad():
        out = model(**processor(text=prompts, images=files, return_tensors="pt", padding=True))
    expected = out.logits_per_image / model.logit_scale.exp()
    images, texts = clip.images(from_uint8(pixels)), clip.texts(prompts)
    torch.testing.assert_close(cosines(images, texts), expected, rtol=0, atol=1e-5)
    for i in range(2):
        mine = clip_score(images, texts[[i] * 4])
        torch.testing.assert_close(mine, expected[:, i], rtol=0, atol=1e-5)
        hundred = [100 * max(x, 0) for x in expected[:, i].tolist()]
        assert clip_score_100(mine).tolist() == pytest.approx(hundred, abs=1e-3)
    assert expected.min() < 0 < expected.max(), "the clipping at 0 is seen"


def test_a_tie_is_no_hit():
    """By dyadic cosines, which are exact: alone first, tied first, tied behind the true one."""
    texts = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [0.0, -1.0]])
    images = torch.tensor([[0.0, 2.0], [3.0, 0.0], [-1.0, 0.0], [0.0, -1.0]])
    assert winners(cosines(images, texts)).tolist() == [1, -1, -1, 3]
    assert r_precision(images, texts, torch.tensor([1, 0, 1, 3])).tolist() == [1, 0, 0, 1]
    assert r_precision(images, texts, torch.tensor([0, 2, 3, 3])).tolist() == [0, 0, 0, 1]
    assert winners(torch.tensor([[float("nan"), 0.5]])).tolist() == [-1]


# ---------------------------------------------------------------------------------------------
# LPIPS, KID, FID


def test_lpips_agrees_with_the_package_and_the_paper():
    """A random AlexNet under the published linear layers: sum over layers of the mean over pixels
    of w · (â − b̂)², with activations normalised over channels."""
    torch.manual_seed(0)
    network = lpips.LPIPS(net="alex", pnet_rand=True, verbose=False).eval()
    a, b = random(2, 3, 64, 64), random(2, 3, 64, 64, seed=1)
    with torch.no_grad():
        mine = perceptual(network)(a, b)
        expected = torch.zeros(2)
        shift = torch.tensor([-0.030, -0.088, -0.188])[:, None, None]
        scale = torch.tensor([0.458, 0.448, 0.450])[:, None, None]
        layers = [network.net((x - shift) / scale) for x in (a, b)]
        for one, two, linear in zip(*layers, network.lins, strict=True):
            difference = (F.normalize(one) - F.normalize(two)).square()
            weight = dict(linear.named_parameters())["model.1.weight"]
            assert weight.min() >= 0
            expected += (difference * weight).sum(1).mean((1, 2))
    assert mine.shape == (2,) and mine.min() > 0
    torch.testing.assert_close(mine, expected, rtol=1e-4, atol=0)


def test_lpips_is_only_offered_with_its_weights(no_weights, monkeypatch):
    assert list(distances(64)) == ["rmse", "one_minus_ssim"]
    (no_weights / "vgg16-397923af.pth").touch()
    assert "lpips" not in distances(64)
    (no_weights / "alexnet-owt-7be5be79.pth").touch()
    with pytest.raises(ValueError, match=r"alexnet-owt-7be5be79\.pth cannot be read: delete it"):
        distances(64)
    assert list(distances(30)) == ["rmse", "one_minus_ssim"], "too small for AlexNet"

    class Fake(torch.nn.Module):
        def __init__(self, net: str, **options: bool) -> None:
            super().__init__()
            assert net == "alex"

        def forward(self, image, source):
            return torch.full((len(image), 1, 1, 1), 7.0)

    monkeypatch.setattr(lpips, "LPIPS", Fake)
    found = distances(31)
    assert list(found) == ["lpips", "rmse", "one_minus_ssim"]
    assert found["lpips"](random(2, 3, 8, 8), random(2, 3, 8, 8)).tolist() == [7, 7]


@pytest.mark.parametrize(
    ("load", "file", "url", "sha"),
    [
        (load_lpips, "alexnet-owt-7be5be79.pth", "https://download.pytorch.org/", "7be5be79"),
        (
            load_inception,
            "weights-inception-2015-12-05-6726825d.pth",
            "https://github.com/toshas/torch-fidelity/",
            "6726825d",
        ),
    ],
)
def test_missing_weights_are_named_and_only_fetched_if_allowed(
    no_weights, monkeypatch, load, file, url, sha
):
    asked = []

    def download(address, target, prefix, progress):
        asked.append((address, target, prefix))
        raise urllib.error.URLError("no route")

    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    with pytest.raises(MissingWeights) as missing:
        load(offline=True)
    said = str(missing.value)
    assert file in said and url in said and str(no_weights) in said and not asked
    with pytest.raises(MissingWeights, match=r"could not be fetched.*no route"):
        load(offline=False)
    ((address, target, prefix),) = asked
    assert address.startswith(url) and target == str(no_weights / file) and prefix == sha


def test_a_missing_clip_is_left_out_only_as_a_hub_id(tmp_path):
    with pytest.raises(MissingWeights, match=r"https://huggingface\.co/nobody/nothing are not in"):
        Clip("nobody/nothing", offline=True)
    (tmp_path / "empty").mkdir()
    for folder in ("nothing_here", "empty"):
        with pytest.raises(OSError, match=folder) as error:
            Clip(str(tmp_path / folder), offline=True)
        assert not isinstance(error.value, MissingWeights)


def test_inception_runs_with_the_weights_on_disk(no_weights, monkeypatch):
    from torch_fidelity import feature_extractor_inceptionv3 as package

    file = no_weights / package.URL_INCEPTION_V3.rsplit("/", 1)[1]
    file.write_bytes(b"cut off")
    with pytest.raises(ValueError, match="cannot be read: delete it"):
        load_inception(offline=True)
    given = {}

    class Fake(torch.nn.Module):
        def __init__(self, *args) -> None:
            super().__init__()
            given["args"] = args

        def forward(self, pixels):
            assert pixels.dtype == torch.uint8
            return (pixels.double().mean((2, 3)),)

    monkeypatch.setattr(package, "FeatureExtractorInceptionV3", Fake)
    features = load_inception(offline=True)(torch.full((2, 3, 4, 4), 9, dtype=torch.uint8))
    assert given["args"] == ("inception-v3-compat", ["2048"], str(file))
    assert features.dtype == torch.float32 and features.tolist() == [[9.0] * 3] * 2


@pytest.mark.parametrize("sizes", [(60, 40), (4, 9)])
def test_fid_is_the_frechet_distance(sizes):
    """By scipy's matrix root, and as torch-fidelity has it; also of fewer images than features."""
    one = torch.randn(sizes[0], 5, generator=torch.Generator().manual_seed(0))
    two = 1.5 * torch.randn(sizes[1], 5, generator=torch.Generator().manual_seed(1)) + 0.3
    a, b = one.double().numpy(), two.double().numpy()
    s, t = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    if min(sizes) > 5:
        root = scipy.linalg.sqrtm(s @ t).real
        expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(s + t - 2 * root)
        assert fid(one, two) == pytest.approx(expected, rel=1e-6)
    package = [fid_features_to_statistics(x.double()) for x in (one, two)]
    expected = fid_statistics_to_metric(*package, verbose=False)["frechet_inception_distance"]
    assert fid(one, two) == pytest.approx(expected, rel=1e-6)
    assert fid(one, one) == pytest.approx(0, abs=1e-6)


def test_kid_is_the_unbiased_kernel_distance():
    """Against the sums over all pairs; subsets scatter about it by deviation / sqrt(100) or so."""
    one = torch.randn(60, 5, generator=torch.Generator().manual_seed(0))
    two = torch.randn(40, 5, generator=torch.Generator().manual_seed(1)) + 0.7
    a, b = one.double().numpy(), two.double().numpy()

    def kernel(x, y):
        return (x @ y.T / 5 + 1) ** 3

    def off_diagonal(k):
        return (k.sum() - np.trace(k)) / (len(k) * (len(k) - 1))

    cross = kernel(a, b).mean()
    expected = off_diagonal(kernel(a, a)) + off_diagonal(kernel(b, b)) - 2 * cross
    mean, deviation = kid(one, two)
    assert deviation > 0 and mean == pytest.approx(expected, abs=0.4 * deviation)
    assert expected > 2 * deviation, "not just anything near 0"
    assert metrics.kid_subset_size(60, 40) == 20 and metrics.kid_subset_size(9000, 5000) == 1000
    assert metrics.kid_subset_size(2, 3) == 2


def mmd_of_pairs(x: np.ndarray, y: np.ndarray, sigma: float) -> float:
    """1,000 × the unbiased MMD² by one pair after the other."""
    x, y = (z / np.linalg.norm(z, axis=1, keepdims=True) for z in (x, y))

    def mean(a: np.ndarray, b: np.ndarray, same: bool) -> float:
        return float(
            np.mean(
                [
                    math.exp(-((p - q) ** 2).sum() / (2 * sigma**2))
                    for i, p in enumerate(a)
                    for j, q in enumerate(b)
                    if not same or i != j
                ]
            )
        )

    return 1000 * (mean(x, x, True) + mean(y, y, True) - 2 * mean(x, y, False))


@pytest.mark.parametrize("sigma", [10.0, 0.3])
def test_cmmd_is_the_unbiased_mmd_of_unit_embeddings(sigma):
    x, y = 3 * random(7, 5).double(), 0.2 + random(9, 5, seed=1).double()
    wanted = mmd_of_pairs(x.numpy(), y.numpy(), sigma)
    assert cmmd(x, y, sigma) == pytest.approx(wanted, abs=1e-8) and abs(wanted) > 0.1
    assert cmmd(x.float(), 5 * y.float(), sigma) == pytest.approx(wanted, rel=1e-4)
    if sigma == 10:
        assert cmmd(x, y) == cmmd(x, y, sigma)


def test_cmmd_of_two_points_is_known():
    """All of either set alike and at right angles: 2 (1 − e^(−2 / 2σ²)); of one point 0."""
    x, y = torch.tensor([[2.0, 0.0]] * 3), torch.tensor([[0.0, 0.5]] * 4)
    for sigma in (10.0, 0.5):
        assert cmmd(x, y, sigma) == pytest.approx(2000 * -math.expm1(-(sigma**-2)), rel=1e-9)
    assert cmmd(x, x) == pytest.approx(0, abs=1e-9)


def test_cmmd_of_sets_drawn_alike_is_zero_on_average():
    """Over 300 draws of 6 and 5: within three standard errors of 0, some below it; the mean over
    all pairs, each with itself, would be above it by far."""
    generator = torch.Generator().manual_seed(0)
    centre = torch.tensor([2.0, 0, 0, 0])
    draws = [[torch.randn(n, 4, generator=generator) + centre for n in (6, 5)] for _ in range(300)]
    found = np.array([cmmd(x, y, 1.0) for x, y in draws])
    error = found.std() / 300**0.5
    assert abs(found.mean()) < 3 * error and found.min() < 0
    cosines_ = F.normalize(torch.cat([x for x, _ in draws]))
    alike = torch.exp(cosines_ @ cosines_.T - 1).mean().item()
    assert 1000 * (1 - alike) * (1 / 6 + 1 / 5) > 10 * error, "the bias would be seen"


def test_cmmd_at_its_own_sigma_is_nearly_a_distance_of_means():
    """10 |difference of the means|² of unit embeddings, unbiased: within 2 %."""
    x, y = (F.normalize(random(40, 6, seed=s).double() + shift) for s, shift in ((0, 0.3), (1, 0)))
    squares = [(z.sum(0).square().sum() - len(z)) / (len(z) * (len(z) - 1)) for z in (x, y)]
    means = 10 * (squares[0] + squares[1] - 2 * x.mean(0) @ y.mean(0))
    assert cmmd(x, y) == pytest.approx(means.item(), rel=0.02) and means > 0.5
    # Of one mean and another spread: hardly anything at 10.
    one = torch.tensor([[1.0, 0.0]] * 20)
    two = torch.tensor([[0.8, 0.6], [0.8, -0.6]] * 10)
    assert cmmd(one, two, 0.3) > 100 * cmmd(one, two)


def test_a_weighted_cmmd_is_that_of_the_pictures_drawn():
    """A weight of twice that of others is two pictures whose pair is left out; by a loop."""
    x, y = random(5, 4).double(), random(6, 4, seed=1).double()
    counts = np.array([2, 0, 1, 1, 1])
    drawn = np.repeat(np.arange(5), counts)
    a, b = (F.normalize(z).numpy() for z in (x, y))

    def k(p, q):
        return math.exp(-((p - q) ** 2).sum() / 2)

    mine = [k(a[i], a[j]) for i in drawn for j in drawn if i != j]
    theirs = [k(p, q) for i, p in enumerate(b) for j, q in enumerate(b) if i != j]
    across = [k(a[i], q) for i in drawn for q in b]
    wanted = 1000 * (np.mean(mine) + np.mean(theirs) - 2 * np.mean(across))
    weights = torch.tensor(np.stack([counts / 5, np.full(5, 0.2), [1, 0, 0, 0, 0]]))
    found = weighted_cmmd(x, y, weights, 1.0)
    assert found[0].item() == pytest.approx(wanted, abs=1e-8)
    assert found[1].item() == pytest.approx(cmmd(x, y, 1.0), abs=1e-8)
    assert found[2].isfinite(), "a resample of one picture alone"


# ---------------------------------------------------------------------------------------------
# Uncertainty


def test_resamples_are_means_of_draws_with_replacement():
    weights = resampling(7, resamples=50)
    assert weights.shape == (50, 7)
    np.testing.assert_allclose(weights.sum(1), 1)
    np.testing.assert_allclose(weights * 7, np.round(weights * 7))
    assert (weights == resampling(7, resamples=50)).all()
    assert len(np.unique(weights, axis=0)) > 40


def test_the_intervals_cover_the_truth():
    """Of 300 samples of 60 exponential values about 95 % of the intervals hold the mean, 1: the
    percentile interval of so skewed a mean covers 93 to 94 %, the count scatters by 1.4 %."""
    generator = np.random.default_rng(0)
    weights = resampling(60)
    samples = generator.exponential(size=(60, 300))
    low, high = interval(weights @ samples)
    assert low.shape == (300,)
    assert np.mean((low <= 1) & (high >= 1)) == pytest.approx(0.95, abs=0.04)
    # Both tails are missed, and wider samples have wider intervals.
    assert np.mean(high < 1) > 0 and np.mean(low > 1) > 0
    assert np.corrcoef(high - low, samples.std(0))[0, 1] > 0.95
    deviation = samples.std(0) / 60**0.5
    np.testing.assert_allclose(np.median((high - low) / deviation), 2 * 1.96, rtol=0.05)
