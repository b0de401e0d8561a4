"""What is added to pictures: how much, at which frequencies, and that all of it is repeatable."""

import math

import numpy as np
import pytest
import torch
from scipy import ndimage

from lmc.perturbations import (
    PERTURBATIONS,
    Maxima,
    Restoring,
    Weights,
    band_noise,
    band_stripes,
    blur,
    contrast,
    even_cast,
    mix,
    perturb,
    smooth_cast,
    stripes,
)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pictures(count: int = 6, channels: int = 3, size: int = 16, dtype=torch.float64):
    return torch.rand(count, channels, size, size, generator=generator(9), dtype=dtype) - 0.5


def amounts(count: int = 6, most: float = 0.3) -> torch.Tensor:
    return torch.linspace(0.05, most, count, dtype=torch.float64)


def rms(delta: torch.Tensor) -> torch.Tensor:
    return delta.square().mean((1, 2, 3)).sqrt()


@pytest.mark.parametrize("name", PERTURBATIONS)
@pytest.mark.parametrize(("channels", "size"), [(1, 8), (3, 15), (4, 16)])
def test_each_is_of_any_shape_and_follows_from_its_generator(name, channels, size):
    z, how = pictures(5, channels, size), PERTURBATIONS[name]
    once, again, other = (how(z, amounts(5), generator(seed)) for seed in (1, 1, 2))
    assert once.shape == z.shape and once.dtype == z.dtype and once.isfinite().all()
    assert torch.equal(once, again)
    assert (name == "blur") == torch.equal(once, other)  # which has nothing to draw
    nothing = how(z, torch.zeros(5, dtype=z.dtype), generator(1))
    torch.testing.assert_close(nothing, z, rtol=0, atol=1e-12)
    single = how(z.float(), amounts(5).float(), generator(1))
    assert single.dtype == torch.float32


@pytest.mark.parametrize("name", ["cast", "noise", "stripes"])
def test_the_amount_of_the_additive_ones_is_their_rms(name):
    z = pictures(64)
    delta = PERTURBATIONS[name](z, amounts(64), generator()) - z
    torch.testing.assert_close(rms(delta), amounts(64), rtol=1e-9, atol=0)


def spectrum(delta: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Radii in cycles a picture and the power there, by numpy."""
    size = delta.shape[2]
    k = np.fft.fftfreq(size, 1 / size)
    radius = np.hypot(k[:, None], k)
    power = (np.abs(np.fft.fft2(delta.numpy())) ** 2).mean((0, 1))
    return radius, power


def test_frequencies_are_those_that_are_named():
    z = pictures(32, size=32)
    amount = torch.full((32,), 0.1, dtype=z.dtype)
    radius, power = spectrum(band_noise(z, amount, generator(), 4, 8) - z)
    inside = (radius >= 4) & (radius < 8)
    assert power[inside].min() > 1e3 * power[~inside].max()
    flat = even_cast(z, amount, generator()) - z
    assert (flat - flat[:, :, :1, :1]).abs().max() < 1e-12
    radius, power = spectrum(smooth_cast(z, amount, generator()) - z)
    assert power[radius < 2].sum() > 2 * power[radius >= 2].sum()
    _, power = spectrum(PERTURBATIONS["noise"](z, amount, generator()) - z)
    assert 0 < power.min() < power.max()


def test_stripes_are_plane_waves_of_any_direction():
    z = torch.zeros(200, 3, 32, 32, dtype=torch.float64)
    delta = stripes(z, torch.ones(200, dtype=z.dtype), generator())
    # All channels have the same wave, and each shift by a pixel is a turn of its phase:
    # x[i+1] + x[i-1] = 2 cos(angle) x[i], along either axis.
    rank = torch.linalg.matrix_rank(delta.flatten(2), tol=1e-6)
    assert (rank == 1).all()
    for axis in (2, 3):
        x = delta.movedim(axis, 3)
        both, middle = (x[..., 2:] + x[..., :-2]).flatten(1), x[..., 1:-1].flatten(1)
        cosine = (both * middle).sum(1) / middle.square().sum(1) / 2
        assert (both - 2 * cosine[:, None] * middle).abs().max() < 1e-6
        cycles = cosine.clamp(-1, 1).arccos() / (2 * math.pi) * 32
        assert cycles.min() < 1 and cycles.max() > 12
    fast = band_stripes(z, torch.ones(200, dtype=z.dtype), generator(), 8, 16)
    radius, power = spectrum(fast)
    assert power[radius > 6].sum() > 10 * power[radius <= 6].sum()


def test_contrast_is_about_the_mean():
    z = pictures(50)
    amount = torch.full((50,), 0.4, dtype=z.dtype)
    changed = contrast(z, amount, generator())
    torch.testing.assert_close(changed.mean((1, 2, 3)), z.mean((1, 2, 3)), rtol=0, atol=1e-12)
    factor = changed.std((1, 2, 3)) / z.std((1, 2, 3))
    assert {round(each, 9) for each in factor.tolist()} == {0.6, 1.4}


@pytest.mark.parametrize("size", [16, 31])
def test_blur_is_scipys(size):
    z = pictures(4, size=size)
    sigma = np.array([1.0, 1.5, 2.0, 2.5])  # in pixels
    made = blur(z, torch.tensor(sigma / size), generator())
    for i in range(4):
        wanted = ndimage.gaussian_filter(
            z[i].numpy(), (0, sigma[i], sigma[i]), mode="reflect", truncate=8
        )
        # A sampled Gaussian there, in the Fourier domain here: they differ for a narrow one.
        np.testing.assert_allclose(made[i].numpy(), wanted, atol=4e-3 if i == 0 else 1e-4)


def test_the_mix_is_with_another_picture():
    z = pictures(7)
    for seed in range(5):
        made = mix(z, torch.full((7,), 0.25, dtype=z.dtype), generator(seed))
        other = z + (made - z) / 0.25
        pairs = (other[:, None] - z[None]).abs().amax((2, 3, 4))
        nearest = pairs.argmin(1)
        assert pairs.amin(1).max() < 1e-12 and (nearest != torch.arange(7)).all()
    assert torch.equal(mix(z[:1], amounts(1), generator()), z[:1])


@pytest.mark.parametrize("name", PERTURBATIONS)
def test_pictures_stay_in_range_and_latents_are_scaled(name):
    how, additive = PERTURBATIONS[name], name in ("cast", "noise", "stripes")
    z = 1.9 * pictures(32)
    amount = torch.full((32,), getattr(Maxima(), name), dtype=z.dtype)
    assert perturb(how, z, amount, generator(), False, additive).abs().max() <= 1
    delta = perturb(how, z, amount, generator(), True, additive) - z
    wide = perturb(how, 10 * z, amount, generator(), True, additive) - 10 * z
    torch.testing.assert_close(wide, 10 * delta, rtol=1e-6, atol=1e-9)


def test_restoring_draws_by_weight_and_up_to_the_maximum():
    # Of even pictures blur, contrast and mix make nothing.
    z = torch.zeros(4000, 1, 8, 8)
    only = Weights(**{**dict.fromkeys(PERTURBATIONS, 0.0), "none": 1.0, "stripes": 3.0})
    restoring = Restoring(only, Maxima(stripes=0.2))
    moved = restoring.perturb(z, generator())
    size = rms(moved - z)
    assert (size > 0).float().mean() == pytest.approx(0.75, abs=0.02)  # 3 sigma
    drawn = size[size > 0]
    assert 0.19 < drawn.max() <= 0.2001 and drawn.median() == pytest.approx(0.1, abs=0.006)
    assert torch.equal(moved, restoring.perturb(z, generator()))


def test_some_pictures_stay_as_they_are():
    z = pictures(64).float()
    moved = Restoring().perturb(z, generator())
    same = (moved == z).all(3).all(2).all(1).float().mean().item()
    assert 0.02 < same < 0.4  # one kind of seven is none


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"weights": Weights(cast=-1)}, r"restoring\.weights\.cast must be at least 0, got -1"),
        (
            {"weights": Weights(**dict.fromkeys(PERTURBATIONS, 0))},
            r"weights must be above 0 of one kind",
        ),
        ({"maxima": Maxima(noise=math.inf)}, r"restoring\.maxima\.noise must be at least 0"),
        ({"maxima": Maxima(contrast=1.5)}, r"restoring\.maxima\.contrast must be at most 1"),
    ],
)
def test_what_there_is_not_is_refused(given, words):
    with pytest.raises(ValueError, match=words):
        Restoring(**given)
