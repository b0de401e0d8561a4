"""Metrics as pure functions, their uncertainty, and the networks that some of them need.

Every definition, with its source, is in docs/evaluation.md.
"""

import os
import pkgutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Protocol

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F
from torchmetrics.functional.image import structural_similarity_index_measure
from torchvision.models import AlexNet_Weights
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as transforms

Array = NDArray[np.float64]
Distance = Callable[[Tensor, Tensor], Tensor]
# Of the histogram of vertical derivatives: three levels of 8 bits each. Where a bin's width is no
# multiple of a level's, its neighbours hold more or fewer of them, and the histogram is a zigzag.
BINS = 85
SMALLEST_LPIPS = 31  # pixels, below which AlexNet's second pooling has nothing left to pool
KID_SUBSETS, KID_SUBSET_SIZE = 100, 1000
NO_FIDELITY = "torch-fidelity is not installed: pip install 'lmc-sds[fid]', or in a clone '.[fid]'"


# ---------------------------------------------------------------------------------------------
# Of an image and its source


def rmse(image: Tensor, source: Tensor) -> Tensor:
    """Root mean squared difference per image; (B, C, H, W) in [-1, 1] to (B,) in [0, 2]."""
    return (image - source).square().mean((1, 2, 3)).sqrt()


def one_minus_ssim(image: Tensor, source: Tensor) -> Tensor:
    """1 − SSIM per image; (B, 3, H, W) in [-1, 1] to (B,) in [0, 2]."""
    ssim = structural_similarity_index_measure(image, source, data_range=2.0, reduction="none")
    return 1 - torch.as_tensor(ssim).reshape(-1)


# ---------------------------------------------------------------------------------------------
# Statistics of images


def power_spectrum(image: Tensor) -> Tensor:
    """Radially averaged power spectrum, per image.

    |FFT|² / (H W) of the Hann-windowed channels (the window keeps the picture's borders from
    looking like detail), averaged over channels and over rings of integer radius.

    Args:
        image: float (B, C, S, S), square.

    Returns:
        (B, S // 2), for 1 … S // 2 cycles an image.
    """
    size = image.shape[-1]
    window = torch.hann_window(size, device=image.device, dtype=image.dtype)
    centred = (image - image.mean((2, 3), keepdim=True)) * window[:, None] * window
    power = torch.fft.fft2(centred).abs().square().mean(1).flatten(1) / size**2
    f = torch.fft.fftfreq(size, 1 / size, device=image.device)
    ring = torch.hypot(f[:, None], f).round().long().flatten()
    rings = size // 2 + 1
    within = ring.clamp(max=rings)  # the corners' in one that is dropped
    sums = power.new_zeros(len(power), rings + 1).index_add(1, within, power)
    counts = power.new_zeros(rings + 1).index_add(0, within, torch.ones_like(power[0]))
    return (sums / counts)[:, 1:rings]


def spectrum_error(spectrum: Tensor, source: Tensor) -> Tensor:
    """Mean over frequencies of |log10(spectrum / source)|; (…, F) each to (…). 0 is equal.

    The sum of `spectrum_lost` and `spectrum_gained`. Biased upwards, as both are, where the two are
    averages over pictures that do not derive from each other: chance alone takes each frequency to
    one side, by about 1 / √N of N pictures, and the absolute value keeps it (docs/evaluation.md).
    """
    return _decades(spectrum, source).abs().mean(-1)


def spectrum_lost(spectrum: Tensor, source: Tensor) -> Tensor:
    """The part of `spectrum_error` at frequencies with less power than the source: detail lost.

    Mean over all frequencies of max(0, −log10(spectrum / source)).
    """
    return (-_decades(spectrum, source)).clamp_min(0).mean(-1)


def spectrum_gained(spectrum: Tensor, source: Tensor) -> Tensor:
    """The part of `spectrum_error` at frequencies with more power than the source: noise, texture.

    Mean over all frequencies of max(0, log10(spectrum / source)).
    """
    return _decades(spectrum, source).clamp_min(0).mean(-1)


def _decades(spectrum: Tensor, source: Tensor) -> Tensor:
    """log10(spectrum / source)."""
    return spectrum.clamp_min(1e-20).log10() - source.clamp_min(1e-20).log10()


def derivative_counts(image: Tensor, bins: int = BINS) -> Tensor:
    """How often each vertical derivative occurs, per image; see `derivative_histogram`.

    Args:
        image: float (B, C, H, W) in [-1, 1].
        bins: of equal width over [-1, 1].

    Returns:
        int64 (B, bins); each sums to C (H − 1) W.
    """
    difference = (image[:, :, 1:] - image[:, :, :-1]).flatten(1).float().clamp(-1, 1)
    index = ((difference + 1) / 2 * bins).long().clamp_max(bins - 1)
    offset = torch.arange(len(image), device=image.device)[:, None] * bins
    return torch.bincount((index + offset).flatten(), minlength=len(image) * bins).view(-1, bins)


def derivative_histogram(image: Tensor, bins: int = BINS) -> Tensor:
    """Histogram of vertical derivatives [LMC, Fig. 12]: (B, C, H, W) in [-1, 1] to (bins,).

    Over differences of neighbouring rows in [-1, 1] (clipped); sums to 1.
    """
    counts = derivative_counts(image, bins).sum(0).float()
    return counts / counts.sum()


def saturation(image: Tensor) -> Tensor:
    """Share of values at the ends of the range, |x| ≥ 1 − 1/255: of 8 bits, those 0 and 255.

    (B, C, H, W) in [-1, 1] to (B,) in [0, 1].
    """
    return (image.abs() >= 1 - 1 / 255).float().mean((1, 2, 3))


# ---------------------------------------------------------------------------------------------
# CLIP


def clip_score(images: Tensor, texts: Tensor) -> Tensor:
    """The plain cosine of paired embeddings: (B, D) and (B, D) to (B,)."""
    return F.cosine_similarity(images, texts, dim=1)


def clip_score_100(score: Tensor) -> Tensor:
    """100 max(cos, 0) of plain cosines, the convention of torchmetrics [Hessel et al. 2021]."""
    return 100 * score.clamp_min(0)


def cosines(images: Tensor, texts: Tensor) -> Tensor:
    """The cosine of every image with every text: (B, D) and (P, D) to (B, P)."""
    return F.normalize(images) @ F.normalize(texts).T


def winners(table: Tensor) -> Tensor:
    """Which text is closest to each image, alone: (B, P) to int64 (B,), −1 where several tie."""
    best, index = table.max(1)
    return index.where((table == best[:, None]).sum(1) == 1, -1)


def r_precision(images: Tensor, texts: Tensor, true: Tensor) -> Tensor:
    """Whether the true prompt ranks first among all, a tie being no hit: CLIP-R-Precision.

    Args:
        images: embeddings (B, D).
        texts: embeddings of all prompts that compete, (P, D).
        true: index of each image's prompt, int64 (B,).

    Returns:
        0 or 1, float (B,).
    """
    return (winners(cosines(images, texts)) == true).float()


# ---------------------------------------------------------------------------------------------
# Sets of images


def fid(real: Tensor, made: Tensor) -> float:
    """Fréchet distance of two sets of Inception features, float (N, D) and (M, D), N, M ≥ 2.

    |μ − μ'|² + Tr(Σ + Σ' − 2 (Σ Σ')^½). With Σ = RᵀR and Σ' = R'ᵀR' the root's trace is the sum of
    the singular values of R R'ᵀ, faster and steadier than a root of D × D where N and M are fewer
    than D. Biased upwards for small sets: compare only at equal N and M.
    """
    one, two = real.double(), made.double()
    roots = [torch.linalg.qr((x - x.mean(0)) / (len(x) - 1) ** 0.5, mode="r").R for x in (one, two)]
    traces = roots[0].square().sum() + roots[1].square().sum()
    shared = torch.linalg.svdvals(roots[0] @ roots[1].T).sum()
    return ((one.mean(0) - two.mean(0)).square().sum() + traces - 2 * shared).item()


def kid(real: Tensor, made: Tensor) -> tuple[float, float]:
    """Kernel distance of two sets of Inception features, float (N, D) and (M, D), N, M ≥ 2.

    Unbiased. 100 random subsets without replacement, each of 1,000 of either set, or of half the
    smaller set where that is less.

    Returns:
        Mean and standard deviation over the subsets.
    """
    from torch_fidelity.metric_kid import (
        KEY_METRIC_KID_MEAN,
        KEY_METRIC_KID_STD,
        kid_features_to_metric,
    )

    found = kid_features_to_metric(
        real.double(),
        made.double(),
        kid_subsets=KID_SUBSETS,
        kid_subset_size=kid_subset_size(len(real), len(made)),
        rng_seed=0,
        verbose=False,
    )
    return found[KEY_METRIC_KID_MEAN], found[KEY_METRIC_KID_STD]


def cmmd(x: Tensor, y: Tensor, sigma: float = 10.0) -> float:
    """CMMD [Jayasumana et al. 2024]: 1,000 × MMD² of two sets of CLIP's embeddings of images.

    MMD² = E k(x, x') + E k(y, y') − 2 E k(x, y), with k(a, b) = exp(−|a − b|² / 2σ²) of embeddings
    of norm 1. σ and the factor are those of the authors' code, which takes the means over all
    pairs, each picture with itself among them: biased upwards, by 1,000 (1 − mean k) / N of N
    pictures. Here it is the unbiased estimate, of pairs of different pictures; it may be below 0.

    At σ = 10 this is little more than a distance of means: of unit embeddings with the cosine c,
    k = e^−0.01 (1 + c / 100 + c² / 20,000 + …), and of the term in c alone MMD² is
    |mean x − mean y|² / 100. Second moments count 200 times less, so that sets of one mean that are
    spread otherwise are hardly told apart; a σ of the embeddings' own distances does.

    Args:
        x, y: float (N, D) and (M, D), of any norm but 0; N, M ≥ 2.
        sigma: of the kernel.
    """
    weights = torch.full((1, len(x)), 1 / len(x), dtype=torch.double, device=x.device)
    return weighted_cmmd(x, y, weights, sigma).item()


def weighted_cmmd(x: Tensor, y: Tensor, weights: Tensor, sigma: float = 10.0) -> Tensor:
    """`cmmd` of weighted x, such as resamples of it: (R, N), rows of sum 1, to double (R,).

    A picture that is drawn twice makes no pair with itself; one alone has no spread.
    """
    x, y, weights = F.normalize(x.double()), F.normalize(y.double()), weights.double()

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return torch.expm1((a @ b.T - 1) / sigma**2)  # k − 1: the ones cancel, their digits do not

    within = kernel(x, x).fill_diagonal_(0)
    pairs = (1 - weights.square().sum(1)).clamp_min(1e-12)
    mine = ((weights @ within) * weights).sum(1) / pairs
    theirs = kernel(y, y).fill_diagonal_(0).sum() / (len(y) * (len(y) - 1))
    return 1000 * (mine + theirs - 2 * (weights @ kernel(x, y)).mean(1))


def kid_subset_size(real: int, made: int) -> int:
    """How many images of either set `kid` draws for a subset."""
    return min(KID_SUBSET_SIZE, max(2, min(real, made) // 2))


# ---------------------------------------------------------------------------------------------
# Uncertainty


def resampling(images: int, resamples: int = 1000, seed: int = 0) -> Array:
    """Weights of bootstrap resamples: (resamples, images), each row sums to 1.

    `weights @ values` are the means over each resample. The same weights for two sets of values
    pair them.
    """
    generator = np.random.default_rng(seed)
    return generator.multinomial(images, np.full(images, 1 / images), resamples) / images


def interval(statistics: Array) -> tuple[Array, Array]:
    """The 95 % percentile interval of resampled statistics: (resamples, …) to low and high (…)."""
    low, high = np.quantile(statistics, (0.025, 0.975), axis=0)
    return low, high


# ---------------------------------------------------------------------------------------------
# The networks


class Classifier(Protocol):
    """A classifier of the user's own, independent of the priors and CLIPs that are compared.

    Attributes:
        name: for tables.
    """

    name: str

    def __call__(self, pixels: Tensor) -> tuple[Sequence[str], Tensor]:
        """What images show.

        Args:
            pixels: uint8 (B, 3, S, S), on the device that it was loaded for.

        Returns:
            The class of each, in the words of the targets (any other where it is none of them),
            and features, float (B, D).
        """


def load_classifier(path: str, device: torch.device | str = "cpu") -> Classifier:
    """A `Classifier`, from 'MODULE:FUNCTION': what FUNCTION(device) gives.

    Args:
        path: of a function in a module that Python finds, such as one in the working folder.
        device: that it is to run on.

    Raises:
        ValueError: there is no such function, or it gives something else.
    """
    option = f"--classifier {path}"
    if ":" not in path:
        raise ValueError(f"{option}: name it as MODULE:FUNCTION, such as my_classifier:load")
    if "" not in sys.path and os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        load = pkgutil.resolve_name(path)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"{option}: {error}") from error
    classifier = load(device) if callable(load) else None
    if not callable(classifier) or not isinstance(getattr(classifier, "name", None), str):
        raise ValueError(
            f"{option}: it must be a function of the device that gives a callable with a name "
            "(lmc.measure.metrics.Classifier)"
        )
    return classifier


class MissingWeights(OSError):
    """Weights are not there and were not fetched; says which file, from where, to which folder."""


class Clip:
    """A transformers CLIP model: images and prompts to embeddings.

    Args:
        pretrained: a folder or hub id, such as openai/clip-vit-base-patch16.
        device: where it runs.
        offline: take it from the disk only.

    Raises:
        FileNotFoundError: what can only be a folder, and is not there.
        MissingWeights: a hub id that is not on disk and was not fetched.
        OSError: a folder without a model.
    """

    def __init__(
        self, pretrained: str, device: torch.device | str = "cpu", offline: bool = False
    ) -> None:
        from huggingface_hub.constants import HF_HUB_CACHE

        here = Path(pretrained).exists()
        if not here and (pretrained.count("/") > 1 or pretrained.startswith((".", "/", "~"))):
            raise FileNotFoundError(
                f"no such folder: {pretrained} (CLIP, as --clip or model.validation.clip names it)"
            )
        try:
            self._load(pretrained, device, {"local_files_only": offline})
        except (OSError, ValueError) as error:
            if here:
                raise
            raise MissingWeights(
                f"no folder {pretrained}, and model.safetensors, tokenizer and "
                f"preprocessor_config.json of https://huggingface.co/{pretrained} are not in "
                f"{HF_HUB_CACHE}"
                f"{'' if offline else f' and could not be fetched ({_first_line(error)})'}"
            ) from error

    def _load(self, pretrained: str, device: torch.device | str, options: Any) -> None:
        model: Any = transformers.CLIPModel.from_pretrained(
            pretrained, dtype=torch.float32, **options
        )
        self.name = pretrained
        self.model = model.eval().requires_grad_(False).to(device)
        self.tokenizer = transformers.CLIPTokenizer.from_pretrained(pretrained, **options)
        self.size: int = model.config.vision_config.image_size
        settings: Any = transformers.CLIPImageProcessor.from_pretrained(pretrained, **options)
        self.mean = torch.tensor(settings.image_mean, device=device)[:, None, None]
        self.std = torch.tensor(settings.image_std, device=device)[:, None, None]

    @torch.no_grad()
    def images(self, image: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1], any size: (B, D).

        As CLIP's own preparation: the short side resized to the model's (bicubic, antialiased),
        the middle square.
        """
        scaled = transforms.resize(image, [self.size], InterpolationMode.BICUBIC, antialias=True)
        square = transforms.center_crop(scaled, [self.size])
        pixels = (square.clamp(-1, 1) / 2 + 0.5 - self.mean) / self.std
        out = self.model.get_image_features(pixel_values=pixels)
        return getattr(out, "pooler_output", out)

    @torch.no_grad()
    def texts(self, prompts: list[str]) -> Tensor:
        """(P, D)."""
        tokens = self.tokenizer(prompts, padding=True, truncation=True, return_tensors="pt")
        out = self.model.get_text_features(**tokens.to(self.model.device))
        return getattr(out, "pooler_output", out)


def perceptual(network: torch.nn.Module) -> Distance:
    """A network of the `lpips` package as a distance per image, (B, 3, H, W) in [-1, 1] to (B,)."""

    def distance(image: Tensor, source: Tensor) -> Tensor:
        return network.to(image.device)(image, source).reshape(-1)

    return distance


def load_lpips(offline: bool = False) -> Distance:
    """LPIPS, AlexNet, v0.1 [Zhang et al. 2018].

    Raises:
        MissingWeights: torchvision's AlexNet is not on disk and was not fetched.
        ValueError: the file cannot be read.
    """
    import lpips

    file = _fetched(AlexNet_Weights.DEFAULT.url, offline)
    try:
        network = lpips.LPIPS(net="alex", verbose=False)
    except (UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(f"{file} cannot be read: delete it ({error})") from error
    return perceptual(network.eval().requires_grad_(False))


def distances(image_size: int) -> dict[str, Distance]:
    """The distances to the source that can be computed here, by name, the main one first.

    'lpips' (AlexNet) leads where torchvision's AlexNet weights are on disk; nothing is downloaded
    and nothing else goes by its name.

    Args:
        image_size: the shorter side of the images in pixels; LPIPS needs `SMALLEST_LPIPS`.
    """
    found: dict[str, Distance] = {"rmse": rmse, "one_minus_ssim": one_minus_ssim}
    if image_size < SMALLEST_LPIPS:
        return found
    try:
        return {"lpips": load_lpips(offline=True), **found}
    except MissingWeights:
        return found


def load_inception(device: torch.device | str = "cpu", offline: bool = False) -> Any:
    """FID's Inception v3: a callable from uint8 (B, 3, H, W) to float (B, 2048).

    Raises:
        MissingWeights: its weights or torch-fidelity are not there.
        ValueError: the file cannot be read.
    """
    try:
        from torch_fidelity import feature_extractor_inceptionv3 as inception
    except ImportError as error:
        raise MissingWeights(NO_FIDELITY) from error
    file = _fetched(inception.URL_INCEPTION_V3, offline)
    try:
        network = inception.FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], str(file))
    except (UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(f"{file} cannot be read: delete it ({error})") from error
    network = network.to(device)
    return lambda pixels: network(pixels)[0].float().cpu()


def _fetched(url: str, offline: bool) -> Path:
    """A file of torch.hub's folder, fetched if it is not there and may be."""
    file = Path(torch.hub.get_dir()) / "checkpoints" / url.rsplit("/", 1)[1]
    if file.exists():
        return file
    missing = f"{file.name} ({url}) is not in {file.parent}"
    if offline:
        raise MissingWeights(missing)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        named = torch.hub.HASH_REGEX.search(file.name)
        torch.hub.download_url_to_file(url, str(file), named and named[1], progress=False)
    except (OSError, RuntimeError) as error:  # RuntimeError: another hash
        raise MissingWeights(f"{missing} and could not be fetched ({error})") from error
    return file


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
