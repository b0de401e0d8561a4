"""Metrics as pure functions, and the runners that measure them over held-out images."""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.nn import functional as F
from torchmetrics import Metric
from torchmetrics.functional.image import structural_similarity_index_measure

from lmc.corrector import BiasCorrector, corrector_loss, normalise
from lmc.images import ImageBatch, resize
from lmc.priors import Prior
from lmc.schedule import TIME_RANGE
from lmc.translator import Translator
from lmc.triplets import triplets_of

Distance = Callable[[Tensor, Tensor], Tensor]


def rmse(image: Tensor, source: Tensor) -> Tensor:
    """Root mean squared difference per image; (B, C, H, W) in [-1, 1] to (B,) in [0, 2]."""
    return (image - source).square().mean((1, 2, 3)).sqrt()


def one_minus_ssim(image: Tensor, source: Tensor) -> Tensor:
    """1 − SSIM per image; (B, 3, H, W) in [-1, 1] to (B,) in [0, 2]."""
    ssim = structural_similarity_index_measure(image, source, data_range=2.0, reduction="none")
    return 1 - torch.as_tensor(ssim).reshape(-1)


def distances() -> dict[str, Distance]:
    """The distances to the source that can be computed here, by name, the main one first.

    'lpips' (AlexNet) leads where torchvision's AlexNet weights are on disk; nothing is downloaded
    and nothing else goes by its name.
    """
    found: dict[str, Distance] = {"rmse": rmse, "one_minus_ssim": one_minus_ssim}
    if any((Path(torch.hub.get_dir()) / "checkpoints").glob("alexnet-owt-*.pth")):
        import lpips

        alex = lpips.LPIPS(net="alex", verbose=False).eval().requires_grad_(False)

        def perceptual(image: Tensor, source: Tensor) -> Tensor:
            return alex.to(image.device)(image, source).reshape(-1)

        return {"lpips": perceptual, **found}
    return found


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
    rings = torch.arange(1, size // 2 + 1, device=image.device)
    member = (ring == rings[:, None]).to(power.dtype)
    with torch.autocast(image.device.type, enabled=False):  # powers span many orders of magnitude
        return power @ member.T / member.sum(1)


def spectrum_error(spectrum: Tensor, source: Tensor) -> Tensor:
    """Mean over frequencies of |log10(spectrum / source)|; (F,) each to a scalar. 0 is equal."""
    return (spectrum.clamp_min(1e-20).log10() - source.clamp_min(1e-20).log10()).abs().mean()


def derivative_histogram(image: Tensor, bins: int = 101) -> Tensor:
    """Histogram of vertical derivatives [LMC, Fig. 12]: (B, C, H, W) in [-1, 1] to (bins,).

    Over differences of neighbouring rows in [-1, 1] (clipped); sums to 1.
    """
    difference = (image[:, :, 1:] - image[:, :, :-1]).flatten().float().clamp(-1, 1)
    counts = torch.histc(difference, bins, -1, 1)
    return counts / counts.sum()


def clip_score(images: Tensor, texts: Tensor) -> Tensor:
    """The plain cosine of paired embeddings: (B, D) and (B, D) to (B,)."""
    return F.cosine_similarity(images, texts, dim=1)


def r_precision(images: Tensor, texts: Tensor, true: Tensor) -> Tensor:
    """Whether the true prompt ranks first among all: CLIP-R-Precision per image.

    Args:
        images: embeddings (B, D).
        texts: embeddings of all prompts that compete, (P, D).
        true: index of each image's prompt, int64 (B,).

    Returns:
        0 or 1, float (B,).
    """
    return ((F.normalize(images) @ F.normalize(texts).T).argmax(1) == true).float()


class Clip:
    """A transformers CLIP model: images and prompts to embeddings.

    Args:
        pretrained: a folder or hub id, such as openai/clip-vit-base-patch16.
        device: where it runs.

    Raises:
        OSError: there is no such model.
    """

    def __init__(self, pretrained: str, device: torch.device | str = "cpu") -> None:
        model: Any = transformers.CLIPModel.from_pretrained(pretrained, dtype=torch.float32)
        self.model = model.eval().requires_grad_(False).to(device)
        self.tokenizer = transformers.CLIPTokenizer.from_pretrained(pretrained)
        self.size: int = model.config.vision_config.image_size
        settings = transformers.CLIPImageProcessor.from_pretrained(pretrained)
        self.mean = torch.tensor(settings.image_mean, device=device)[:, None, None]
        self.std = torch.tensor(settings.image_std, device=device)[:, None, None]

    @torch.no_grad()
    def images(self, image: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1], square, any size: (B, D)."""
        pixels = (resize(image, self.size).clamp(-1, 1) / 2 + 0.5 - self.mean) / self.std
        out = self.model.get_image_features(pixel_values=pixels)
        return getattr(out, "pooler_output", out)

    @torch.no_grad()
    def texts(self, prompts: list[str]) -> Tensor:
        """(P, D)."""
        tokens = self.tokenizer(prompts, padding=True, truncation=True, return_tensors="pt")
        out = self.model.get_text_features(**tokens.to(self.model.device))
        return getattr(out, "pooler_output", out)


class CorrectorErrors(Metric):
    """L_k of a corrector, of the identity b = z, and of b̂ = z in the normalised space of Eq. 10.

    Means over images, and over processes.
    """

    full_state_update = False

    def __init__(self) -> None:
        super().__init__()
        self.add_state("sums", torch.zeros(4, dtype=torch.float64), dist_reduce_fx="sum")
        self.sums: Tensor

    def update(self, z: Tensor, z_hat: Tensor, b: Tensor) -> None:
        """Add a batch; each (B, C, H, W)."""
        errors = [corrector_loss(x, z_hat).sum() for x in (b, z, normalise(z, z_hat))]
        count = torch.tensor(float(len(z)), device=z.device)
        self.sums += torch.stack([*errors, count]).double().to(self.sums.device)

    def compute(self) -> dict[str, Tensor]:
        """'loss', 'identity_loss' and 'normalised_identity_loss'."""
        names = ("loss", "identity_loss", "normalised_identity_loss")
        return dict(zip(names, (self.sums[:3] / self.sums[3]).float(), strict=True))


@torch.no_grad()
def evaluate_corrector(
    corrector: BiasCorrector,
    prior: Prior,
    batches: Iterable[ImageBatch],
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> dict[str, float]:
    """L_k over held-out images, one t an image, beside that of the identity.

    Args:
        corrector: made for `prior`, on `device`.
        prior: loaded, on `device`.
        batches: held-out images of any size.
        seed: of t and eps.
        device: where to compute.

    Raises:
        ValueError: the corrector is another prior's.
    """
    corrector.check_prior(prior.identity)
    errors = CorrectorErrors().to(device)
    for x in triplets_of(batches, prior, seed, TIME_RANGE, device):
        errors.update(x.z, x.z_hat, corrector.correct(x.z, x.t, x.z_hat))
    return {name: value.item() for name, value in errors.compute().items()}


@torch.no_grad()
def evaluate_translator(
    translator: Translator | None,
    batches: Iterable[ImageBatch],
    clip: Clip,
    prompts: Mapping[str, str],
    source_prompt: str,
    device: torch.device | str = "cpu",
) -> dict[str, Any]:
    """Every held-out image to every target class, measured.

    Args:
        translator: on `device`; None measures the untouched source images.
        batches: held-out images.
        clip: on `device`.
        prompts: the prompt of each target class.
        source_prompt: competes with the targets' in R-Precision.
        device: where to compute.

    Returns:
        clip_score, r_precision, distance (the first of `distances`, which `distance_name` names),
        all distances by name, spectrum_error, r_precision by class, and the number of images.

    Raises:
        ValueError: there are no images.
    """
    texts = clip.texts([*prompts.values(), source_prompt])
    measures = distances()
    sums: dict[str, Tensor] = {}
    spectrum, source_spectrum = torch.zeros(()), torch.zeros(())
    images = 0

    def add(name: str, values: Tensor) -> None:
        sums[name] = sums.get(name, torch.zeros(())) + values.sum().cpu()

    for batch in filter(_has_images, batches):
        source = batch.image.to(device)
        images += len(source)
        source_spectrum = source_spectrum + power_spectrum(source).sum(0).cpu()
        for i, name in enumerate(prompts):
            output = source
            if translator is not None:
                output = translator(source, translator.class_ids([name] * len(source)).to(device))
            embedding = clip.images(output)
            true = torch.full((len(output),), i, device=device)
            hit = r_precision(embedding, texts, true)
            add("clip_score", clip_score(embedding, texts[true]))
            add("r_precision", hit)
            add(f"r_precision/{name}", hit)
            for label, measure in measures.items():
                add(label, measure(output, source))
            spectrum = spectrum + power_spectrum(output).sum(0).cpu() / len(prompts)
    if not images:
        raise ValueError("no held-out images to evaluate on")
    outputs = images * len(prompts)
    main = next(iter(measures))
    return {
        "clip_score": (sums["clip_score"] / outputs).item(),
        "r_precision": (sums["r_precision"] / outputs).item(),
        "distance": (sums[main] / outputs).item(),
        "spectrum_error": spectrum_error(spectrum, source_spectrum).item(),
        "distance_name": main,
        "distances": {name: (sums[name] / outputs).item() for name in measures},
        "r_precision_by_class": {n: (sums[f"r_precision/{n}"] / images).item() for n in prompts},
        "images": images,
    }


def _has_images(batch: ImageBatch) -> bool:
    """False of the last batch of a pass, where only broken samples were left for it."""
    return len(batch.image) > 0
