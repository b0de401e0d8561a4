"""Eq. 10's normalisation, the networks' sizes, and that training finds a blur known in advance."""

from itertools import pairwise

import pytest
import torch
from torch import nn

from lmc import losses
from lmc.corrector import Corrector, IdentityCorrector, corrector_loss, normalise
from lmc.filter import FilterCorrector, HybridCorrector, estimate_filter
from lmc.load import load_corrector
from lmc.shards.triplets import Triplets, draw_t_and_eps, sample_triplets
from lmc.translator import Translator

from gaussian import GaussianPrior, power_spectrum


def pictures(seed: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(4, 3, 16, 16, generator=generator, dtype=dtype)


@pytest.mark.parametrize("statistics", ["image", "channel"])
@pytest.mark.parametrize("factor", [1e-3, 0.3, 40.0])
def test_scale_of_the_network_changes_nothing_but_the_mean(statistics, factor):
    b_hat, z_hat = 0.2 * pictures(0) + 0.1, 0.7 * pictures(1) - 0.3
    dims = (1, 2, 3) if statistics == "image" else (2, 3)
    plain = normalise(b_hat, z_hat, statistics)
    scaled = normalise(factor * b_hat, z_hat, statistics)
    mean = b_hat.mean(dims, keepdim=True)
    torch.testing.assert_close(scaled - factor * mean, plain - mean, rtol=0, atol=1e-10)


@pytest.mark.parametrize("statistics", ["image", "channel"])
def test_deviation_is_that_of_z_hat_and_mean_that_of_the_network(statistics):
    scale = torch.tensor([0.1, 1.0, 3.0], dtype=torch.float64).view(1, 3, 1, 1)
    b_hat, z_hat = 0.2 * pictures(0) + scale, scale * pictures(1) - 0.3
    dims = (1, 2, 3) if statistics == "image" else (2, 3)
    b = normalise(b_hat, z_hat, statistics)
    for correction in (0, 1):  # whichever convention: the ratio is the same
        wanted = z_hat.std(dims, correction=correction)
        torch.testing.assert_close(b.std(dims, correction=correction), wanted, rtol=1e-10, atol=0)
    torch.testing.assert_close(b.mean(dims), b_hat.mean(dims), rtol=0, atol=1e-12)


def test_statistics_are_per_image_by_default_and_of_each_image_alone():
    b_hat, z_hat = pictures(0), 2 * pictures(1)
    whole = normalise(b_hat, z_hat)
    assert torch.equal(whole, normalise(b_hat, z_hat, "image"))
    for i in range(4):
        alone = normalise(b_hat[i : i + 1], z_hat[i : i + 1])
        torch.testing.assert_close(alone, whole[i : i + 1], rtol=0, atol=1e-12)
    assert not torch.allclose(whole, normalise(b_hat, z_hat, "channel"))


@pytest.mark.parametrize("statistics", ["image", "channel"])
@pytest.mark.parametrize("spread", [0.0, 1e-30, 1e-12, 1e-7])
def test_a_flat_output_gives_finite_values_and_gradients(statistics, spread):
    b_hat = (spread * pictures(0, torch.float32) + 0.25).requires_grad_()
    b = normalise(b_hat, pictures(1, torch.float32), statistics)
    corrector_loss(b, pictures(1, torch.float32)).sum().backward()
    assert b.isfinite().all() and b_hat.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("level", [0.1, 0.3, 0.7])
def test_a_flat_output_is_kept_as_its_mean(level, dtype):
    """The mean of equal numbers is rounded, too: the floor must be above that rounding.

    5e-3 is less than one of 255 grey levels over [-1, 1].
    """
    b_hat = torch.full((1, 3, 16, 16), level, dtype=dtype)
    b = normalise(b_hat, pictures(1, dtype)[:1])
    torch.testing.assert_close(b, b_hat, rtol=0, atol=5e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_outputs_are_normalised_in_full_precision(dtype):
    """Under autocast b̂ arrives in half precision; 1e-12 is 0 in float16, and σ has 8 bits in bf16.

    1e-4 is far above float32's rounding and far below bfloat16's, 4e-3.
    """
    b_hat, z_hat = (0.2 * pictures(0) + 0.1).to(dtype), 0.7 * pictures(1, torch.float32)
    b = normalise(b_hat, z_hat)
    wanted = z_hat.std((1, 2, 3), correction=0)
    torch.testing.assert_close(b.float().std((1, 2, 3), correction=0), wanted, rtol=1e-4, atol=0)
    flat = normalise(torch.full_like(b_hat, 0.25), z_hat)
    assert flat.isfinite().all()


def test_unknown_statistics_are_an_error():
    with pytest.raises(ValueError, match="pixel"):
        Corrector(3, widths=(4, 8), statistics="pixel")


def test_correct_is_the_network_in_the_normalised_space():
    torch.manual_seed(0)
    z, z_hat, t = pictures(0), pictures(1), torch.linspace(0.1, 0.9, 4, dtype=torch.float64)
    for statistics in ("image", "channel"):
        corrector = Corrector(3, widths=(4, 8), statistics=statistics).double()
        wanted = normalise(corrector(z, t), z_hat, statistics)
        torch.testing.assert_close(corrector.correct(z, t, z_hat), wanted, rtol=0, atol=1e-12)


def test_time_reaches_the_network():
    torch.manual_seed(0)
    corrector, z = Corrector(3, widths=(4, 8)), pictures(0, torch.float32)
    early, late = corrector(z, torch.full((4,), 0.1)), corrector(z, torch.full((4,), 0.9))
    assert (early - late).abs().amax((1, 2, 3)).min() > 1e-3


def test_loss_is_the_mean_square_per_image():
    b, z_hat = pictures(0), pictures(1)
    loss = corrector_loss(b, z_hat)
    for i in range(4):
        wanted = nn.functional.mse_loss(b[i], z_hat[i]).item()
        assert loss[i].item() == pytest.approx(wanted, rel=1e-12)


@pytest.mark.parametrize("network", [Corrector(), Translator(["cat"])])
def test_parameter_count_in_the_docstring_is_true(network):
    count = sum(p.numel() for p in network.parameters())
    assert f"{count:,} parameters" in type(network).__doc__


@pytest.mark.parametrize(
    ("network", "filters"),
    [
        (Corrector(), [32, 64, 128, 256, 512, 256, 128, 64, 32]),
        (Translator(["cat"]), [32, 64, 128, 256, 256, 256, 256, 256, 128, 64, 32]),
    ],
)
def test_nine_and_eleven_levels_of_two_convolutions_each(network, filters):
    """The filters of METHOD.md's lists, in the order the image meets them."""
    seen: list[tuple[int, int]] = []

    def note(module, args, output):
        seen.append((output.shape[1], output.shape[2]))

    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(note)
    condition = torch.tensor([0.5]) if isinstance(network, Corrector) else torch.tensor([0])
    with torch.no_grad():
        network(torch.zeros(1, 3, 64, 64), condition)
    depth = len(filters) // 2
    sides = [64 // 2**d for d in (*range(depth), depth, *reversed(range(depth)))]
    levels = list(zip(filters, sides, strict=True))
    assert seen == [level for level in levels for _ in range(2)] + [(3, 64)]


@pytest.mark.parametrize("identity", [{"digest": "b", "pretrained": "two"}, {}])
def test_check_prior_compares_digests(identity):
    corrector = Corrector(3, widths=(4, 8), prior={"digest": "a", "pretrained": "one"})
    corrector.check_prior({"digest": "a", "pretrained": "moved elsewhere"})
    with pytest.raises(
        ValueError, match=r"made for: +one\n(.|\n)*digest: a there, (b|not rec.*) here"
    ):
        corrector.check_prior(identity)


class LinearFilter(Corrector):
    """One circular convolution per time, as wide as the picture, the identity at first."""

    def __init__(self, times: torch.Tensor, size: int) -> None:
        super().__init__(1, widths=(1, 1))
        self.register_buffer("times", times)
        kernel = torch.zeros(len(times), 1, size, size, dtype=torch.float64)
        kernel[..., 0, 0] = 1
        self.kernel = nn.Parameter(kernel)

    def forward(self, z, t):
        kernel = self.kernel[torch.searchsorted(self.times, t)]
        return torch.fft.ifft2(torch.fft.fft2(kernel) * torch.fft.fft2(z)).real


def test_training_finds_the_blur_of_the_gaussian_prior():
    """The shape of the trained filter is that of E[z_hat | z], by bands of frequencies.

    With mean zero z_hat = alpha_t S / (alpha_t² S + sigma_t²) z_t and E[z_t | z] = alpha_t z, so

        E[z_hat | z] = gain · z,     gain_k = alpha_t² S_k / (alpha_t² S_k + sigma_t²).

    Eq. 10 leaves the scale of b free (and the mean, frequency 0, apart), and replaces the norm of b
    by that of z_hat, so that L_k asks for the largest correlation Σ gain S B / √(Σ S B²), B the
    filter's transfer: B ∝ gain if the pictures' deviation hardly varies from one to the next.
    """
    times = torch.tensor([0.3, 0.5, 0.7], dtype=torch.float64)
    size, batch = 16, 96
    zero = torch.zeros(1, size, size, dtype=torch.float64)
    prior = GaussianPrior({"": zero}, power_spectrum(size, exponent=1.0, strength=4.0))
    null = prior.embed([""]).expand(batch)
    t = times.repeat_interleave(batch // len(times))
    generator = torch.Generator().manual_seed(0)

    def triplets():
        z = prior.sample(batch, "", generator)
        eps = torch.randn(z.shape, generator=generator, dtype=torch.float64)
        return sample_triplets(prior, z, t, eps, null)

    corrector = LinearFilter(times, size)
    steps = 400
    optimizer = torch.optim.Adam(corrector.parameters(), lr=2e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        x = triplets()
        optimizer.zero_grad()
        corrector_loss(corrector.correct(x.z, x.t, x.z_hat), x.z_hat).mean().backward()
        optimizer.step()
        schedule.step()

    z = prior.sample(batch, "", generator)
    with torch.no_grad():
        spectra = [torch.fft.fft2(image) for image in (corrector(z, t), z)]
    k = torch.fft.fftfreq(size, 1 / size, dtype=torch.float64)
    radius = (k[:, None].square() + k.square()).sqrt()
    edges = [0.5, 1.6, 2.6, 4.1, 6.1, 8.1, 12]
    for i, time in enumerate(times):
        b, z = (s.view(len(times), -1, size, size)[i] for s in spectra)
        transfer = (b * z.conj()).real.mean(0) / z.abs().square().mean(0)
        alpha_t, sigma_t = prior.schedule.coefficients(time[None])
        signal = (alpha_t.square() * prior.spectrum).squeeze()
        gain = signal / (signal + sigma_t.square().squeeze())
        ratio = transfer / gain
        inside = [(radius > low) & (radius < high) for low, high in pairwise(edges)]
        found = torch.stack([ratio[band].mean() for band in inside])
        wanted = torch.stack([gain[band].mean() for band in inside])
        # Not a flat one, which the filter starts from; 5 % is five times what is measured, and
        # covers the pictures' varying deviation and the last steps' gradient noise.
        assert wanted.max() / wanted.min() > 1.4
        torch.testing.assert_close(found / found.mean(), torch.ones_like(found), rtol=0, atol=0.05)


# ---------------------------------------------------------------------------------------------
# The closed-form corrector

MEAN_Z = torch.tensor([[[0.5]], [[-0.25]]], dtype=torch.float64)
MEAN_Z_HAT = torch.tensor([[[-0.125]], [[1.0]]], dtype=torch.float64)
MIX = torch.tensor([[0.5, 0.25], [-0.25, 0.75]], dtype=torch.float64)


def known(z: torch.Tensor, t: torch.Tensor, mixed: bool) -> torch.Tensor:
    """A filter with a phase where t > 0.5, one that mixes the channels before, or scales them."""
    centred = z - MEAN_Z
    mix = MIX if mixed else MIX.diag().diag()
    early = torch.einsum("ij,bjhw->bihw", mix, centred)
    late = 0.25 * centred.roll(1, 3)
    return torch.where((t > 0.5).view(-1, 1, 1, 1), late, early) + MEAN_Z_HAT


def filtered(count: int, seed: int, mixed: bool = True, noise: float = 0.0) -> list[Triplets]:
    """Triplets whose z_hat is z through the known filter."""
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for _ in range(count):
        z = torch.randn(8, 2, 8, 8, generator=generator, dtype=torch.float64)
        z = z + MEAN_Z
        t = torch.rand(8, generator=generator, dtype=torch.float64)
        more = noise * torch.randn(z.shape, generator=generator, dtype=torch.float64)
        batches.append(Triplets(z, known(z, t, mixed) + more, t))
    return batches


@pytest.mark.parametrize("mixed", [True, False])
def test_a_filter_that_there_is_is_found_and_applied_exactly(mixed):
    """Up to the thousandth that keeps the matrices invertible, which shrinks what it finds."""
    corrector = estimate_filter(
        filtered(40, 0, mixed), {}, 2, (0, 1), mix_channels=mixed, statistics="none"
    )
    z = filtered(1, 1)[0].z
    wanted = [known(z, torch.full((8,), t), mixed) for t in (0.2, 0.8)]

    def at(t: float) -> torch.Tensor:
        return corrector(z, torch.full((8,), t, dtype=torch.float64))

    tolerance = 4e-3 if mixed else 1e-5
    for t in (0.05, 0.25):  # a bin's centre, and beyond it
        torch.testing.assert_close(at(t), wanted[0], rtol=0, atol=tolerance)
    for t in (0.75, 0.97):
        torch.testing.assert_close(at(t), wanted[1], rtol=0, atol=tolerance)
    torch.testing.assert_close(at(0.5), (at(0.25) + at(0.75)) / 2, rtol=0, atol=1e-6)


@pytest.mark.parametrize("mixed", [True, False])
def test_the_filter_is_the_least_squares_one(mixed):
    """Any other gain or offset fits the triplets it was estimated from worse: the slope is 0."""
    triplets = filtered(30, 0, noise=0.5)
    corrector = estimate_filter(triplets, {}, 1, (0, 1), mixed, "none").double()

    def error() -> float:
        with torch.no_grad():
            b = [corrector.correct(x.z, x.t, x.z_hat) for x in triplets]
        losses = [corrector_loss(one, x.z_hat) for one, x in zip(b, triplets, strict=True)]
        return torch.cat(losses).mean().item()

    least = error()
    generator = torch.Generator().manual_seed(0)
    for values in (corrector.gain, corrector.offset):
        step = 0.05 * torch.randn(values.shape, generator=generator, dtype=torch.float64)
        rise = []
        for sign in (1, -2):
            values += sign * step
            rise.append(error() - least)
        values += step
        # The ridge of a thousandth is what is left of a slope.
        assert min(rise) > 0 and max(rise) < 1.1 * min(rise)


def test_a_filter_over_channels_fits_what_one_of_each_cannot():
    triplets, heldout = filtered(40, 0), filtered(4, 1)
    errors = []
    for mixed in (True, False):
        corrector = estimate_filter(triplets, {}, 2, (0, 1), mixed, "none")
        losses = [corrector_loss(corrector.correct(x.z, x.t, x.z_hat), x.z_hat) for x in heldout]
        errors.append(torch.cat(losses).mean().item())
    # Interpolation between the two bins is what is left of the first.
    assert errors[0] < errors[1]


def test_channels_that_are_equal_are_no_difficulty():
    """Grey pictures: the covariance of their channels cannot be inverted."""
    triplets = filtered(40, 0, mixed=False)
    grey = [Triplets(x.z[:, :1].expand(-1, 2, -1, -1), x.z_hat, x.t) for x in triplets]
    corrector = estimate_filter(grey, {}, 2, (0, 1), statistics="none")
    assert corrector.gain.isfinite().all() and corrector.gain.abs().max() < 5


@pytest.mark.parametrize("mixed", [True, False])
def test_frequencies_that_no_picture_has_are_no_difficulty(mixed):
    """Enlarged pictures, all of one mean: rounding is all there is at some frequencies."""
    generator = torch.Generator().manual_seed(0)
    triplets = []
    for x in filtered(40, 0):
        z = torch.nn.functional.interpolate(x.z[:, :, :4, :4], (8, 8), mode="bilinear")
        z = z - z.mean((2, 3), keepdim=True) + 0.3
        z_hat = 0.5 * z + 0.1 * torch.randn(z.shape, generator=generator, dtype=z.dtype)
        triplets.append(Triplets(z, z_hat, x.t))
    corrector = estimate_filter(triplets, {}, 2, (0, 1), mixed, "none")
    assert corrector.gain.abs().max() < 5
    sharp = filtered(1, 1)[0]
    assert corrector(sharp.z, sharp.t).abs().max() < 10


@pytest.mark.parametrize("mixed", [True, False])
def test_on_gaussian_images_the_filter_is_the_known_one(mixed):
    """E[z_hat | z] has the gain alpha_t² S / (alpha_t² S + sigma_t²), frequency by frequency."""
    size = 8
    prior = GaussianPrior({"": torch.zeros(3, size, size).double()}, power_spectrum(size))
    generator = torch.Generator().manual_seed(0)
    null, low, high = prior.embed([""]), 0.45, 0.55
    triplets = []
    for _ in range(20):
        z = prior.sample(200, "", generator)
        t, eps = draw_t_and_eps(z, generator, (low, high))
        triplets.append(sample_triplets(prior, z, t, eps, null.expand(200)))
    corrector = estimate_filter(triplets, {}, 1, (low, high), mixed)
    alpha_t, sigma_t = prior.schedule.coefficients(torch.tensor([0.5], dtype=torch.float64))
    signal = (alpha_t.square() * prior.spectrum)[0, 0, :, : size // 2 + 1]
    wanted = signal / (signal + sigma_t.square()[0, 0])
    assert wanted.max() - wanted.min() > 0.5
    if mixed:
        wanted = torch.eye(3).double()[:, :, None, None] * wanted
    # 4,000 images: a gain's error is about sigma_t gain / (alpha_t √(2 · 4000 S)), 0.02 at most.
    assert (corrector.gain[0, ..., 0] - wanted).abs().max() < 0.08
    assert corrector.gain[0, ..., 1].abs().max() < 0.08


def test_the_filter_says_what_it_lacks():
    with pytest.raises(ValueError, match="no triplets"):
        estimate_filter([], {})
    with pytest.raises(ValueError, match=r"too few triplets: \d with t in \[0\.\d+, .*64 bins"):
        estimate_filter(filtered(1, 0), {}, bins=64, time_range=(0, 1))
    corrector = FilterCorrector(3, 8)
    with pytest.raises(ValueError, match=r"z is \(3, 16, 16\).*estimated at \(3, 8, 8\)"):
        corrector(torch.zeros(1, 3, 16, 16), torch.tensor([0.5]))
    with pytest.raises(ValueError, match="bins must be at least 1"):
        FilterCorrector(3, 8, bins=0)


def test_the_filter_is_released_and_loaded_as_the_network_is(tmp_path):
    prior = {"digest": "0123", "prediction_type": "epsilon"}
    corrector = estimate_filter(filtered(5, 0), prior, bins=2, time_range=(0, 1))
    corrector.save_pretrained(tmp_path)
    loaded = load_corrector(str(tmp_path))
    assert isinstance(loaded, FilterCorrector)
    x = filtered(1, 1)[0]
    assert torch.equal(
        loaded.correct(x.z, x.t, x.z_hat), normalise(corrector(x.z, x.t), x.z_hat, "image")
    )
    loaded.check_prior(prior)
    with pytest.raises(ValueError, match="valid for the prior"):
        loaded.check_prior({**prior, "digest": "4567"})


def test_what_is_no_corrector_is_refused_by_what_it_holds(tmp_path):
    with pytest.raises(FileNotFoundError, match=f"no released corrector at {tmp_path}"):
        load_corrector(str(tmp_path))
    file = tmp_path / "config.json"
    file.write_text('{"classes": ["dog"], "image_size": 16, "widths": [8, 16]}')
    with pytest.raises(ValueError, match=r"no Corrector or H.* has classes, image_size, widths$"):
        load_corrector(str(tmp_path))
    Corrector(widths=[8, 8]).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="names no prior"):
        load_corrector(str(tmp_path))


def test_calibrated_statistics_have_no_drift_where_eq_10_has_a_haze():
    """ẑ = g z + noise, whose mean over the noise b̂ = g z is: along z the mean of ẑ − b has to be 0.

    Eq. 10 gives b the deviation of ẑ with its noise: √(g² + s²) / g times too much.
    """
    gain, noise = 0.8, 0.4
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(400, 3, 16, 16, generator=generator, dtype=torch.float64)
    z_hat = gain * z + noise * torch.randn(z.shape, generator=generator, dtype=torch.float64)
    t = torch.rand(400, generator=generator, dtype=torch.float64)
    network = Corrector(widths=(8, 8), statistics="calibrated").double()
    for part in range(0, 400, 20):
        here = slice(part, part + 20)
        for _ in range(30):
            network.calibrate(gain * z[here], t[here], z_hat[here], torch.ones(20).bool())

    def drift(statistics) -> float:
        v = z_hat - network.normalised(gain * z, t, z_hat, statistics)
        return ((v * z).sum() / z.square().sum()).item()

    wide = (gain**2 + noise**2) ** 0.5
    assert drift("image") == pytest.approx(gain - wide, abs=5e-3)  # -0.094
    assert drift("calibrated") == pytest.approx(0, abs=5e-3)
    torch.testing.assert_close(
        network.ratio, torch.full_like(network.ratio, wide / gain), rtol=0.03, atol=0
    )


def test_the_ratio_is_that_of_each_time_and_of_those_that_count():
    network = Corrector(widths=(8, 8), statistics="calibrated").double()
    b_hat = pictures(0)
    t = torch.tensor([0.125, 0.125, 0.475, 0.475], dtype=torch.float64)  # centres of bins
    scale = torch.tensor([2.0, 2.0, 3.0, 50.0], dtype=torch.float64).view(-1, 1, 1, 1)
    among = torch.tensor([True, True, True, False])
    for _ in range(1000):
        network.calibrate(b_hat, t, scale * b_hat, among)
    expected = torch.ones(20, dtype=torch.float64)
    expected[2], expected[9] = 2, 3
    torch.testing.assert_close(network.ratio, expected, rtol=1e-6, atol=0)
    # In the middle between the centres of a bin of 2 and one of 1.
    between = torch.tensor([0.15], dtype=torch.float64)
    one = network.normalised(b_hat[:1], between, b_hat[1:2])
    expected = normalise(b_hat[:1], b_hat[1:2], "calibrated", torch.tensor([1.5]).double())
    torch.testing.assert_close(one, expected)
    whole = normalise(b_hat[:1], b_hat[1:2])
    mean = b_hat[:1].mean((1, 2, 3), keepdim=True)
    torch.testing.assert_close(one - mean, (whole - mean) / 1.5)


def test_calibrated_statistics_are_released_and_need_a_training(tmp_path):
    network = Corrector(widths=(8, 8), statistics="calibrated", prior={"digest": "0"})
    network.ratio += torch.rand(20)
    network.save_pretrained(tmp_path)
    again = load_corrector(str(tmp_path))
    assert torch.equal(again.ratio, network.ratio) and again.digest() == network.digest()
    assert "ratio" not in Corrector(widths=(8, 8)).state_dict()  # as in older releases
    b_hat = pictures(0)
    with pytest.raises(ValueError, match="need a corrector that was trained with them"):
        Corrector(widths=(8, 8)).normalised(b_hat, torch.rand(4), b_hat, "calibrated")
    with pytest.raises(ValueError, match="need a corrector that was trained with them"):
        losses.LMC(Corrector(widths=(8, 8)), statistics="calibrated")
    with pytest.raises(ValueError, match="are of correctors that are trained"):
        FilterCorrector(3, 8, statistics="calibrated")
    hybrid = HybridCorrector(3, {"size": 8}, (8, 8), statistics="calibrated")
    assert [name for name, _ in hybrid.named_buffers() if "ratio" in name] == ["ratio"]


def test_no_statistics_leave_the_output_and_others_can_be_asked_for():
    corrector = IdentityCorrector()
    z, z_hat, t = pictures(0), 0.3 * pictures(1), torch.full((4,), 0.5)
    assert torch.equal(corrector.correct(z, t, z_hat, "none"), z)
    assert torch.equal(corrector.correct(z, t, z_hat), normalise(z, z_hat, "image"))
    assert torch.equal(corrector.correct(z, t, z_hat, "channel"), normalise(z, z_hat, "channel"))


# ---------------------------------------------------------------------------------------------
# Both


def hybrid(statistics: str = "image", **options) -> tuple[HybridCorrector, FilterCorrector]:
    """Of two channels, begun with an estimated filter, and that filter."""
    found = estimate_filter(filtered(40, 0, noise=0.3), {}, 2, (0, 1), statistics=statistics)
    its = {"size": 8, "time_range": (0, 1), **options}
    network = HybridCorrector(2, its, (4, 8), statistics=statistics, prior={"digest": "0"})
    network.begin_with(found)
    return network.double(), found.double()


@pytest.mark.parametrize("statistics", ["image", "none"])
@pytest.mark.parametrize("options", [{"bins": 2}, {}])  # of the found one's shape, and another's
def test_a_hybrid_starts_as_the_closed_form_and_learns_the_rest(statistics, options):
    torch.manual_seed(0)
    network, found = hybrid(statistics, **options)
    x = filtered(1, 1)[0]
    assert torch.equal(network(x.z, x.t), found(x.z, x.t))
    wanted = found.correct(x.z, x.t, x.z_hat)
    assert torch.equal(network.correct(x.z, x.t, x.z_hat), wanted)
    optimizer = torch.optim.Adam(network.parameters(), 1e-2)
    losses = []
    for _ in range(100):
        loss = corrector_loss(network.correct(x.z, x.t, x.z_hat), x.z_hat).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    assert torch.equal(network.closed_form.gain, found.gain)  # which is no parameter


@pytest.mark.parametrize("bins", [2, 3])
def test_a_hybrid_is_released_and_loaded_as_the_others_are(tmp_path, bins):
    network, _ = hybrid(bins=bins)
    torch.manual_seed(0)
    torch.nn.init.normal_(network.unet.last.weight)
    network.float().save_pretrained(tmp_path)
    loaded = load_corrector(str(tmp_path))
    assert isinstance(loaded, HybridCorrector) and loaded.statistics == "image"
    x = filtered(1, 1)[0]
    z, t, z_hat = x.z.float(), x.t.float(), x.z_hat.float()
    assert torch.equal(loaded.correct(z, t, z_hat), network.correct(z, t, z_hat))
    assert loaded.digest() == network.digest()
    loaded.check_prior({"digest": "0"})
    with pytest.raises(ValueError, match="valid for the prior"):
        loaded.check_prior({"digest": "1"})
    before = network.digest()
    network.closed_form.offset[0, 0, 0, 0] += 1
    assert network.digest() != before


def test_a_hybrid_says_what_does_not_fit():
    with pytest.raises(ValueError, match=r"halves the image 2 times.* 18 cannot be: 16 or 20"):
        HybridCorrector(3, {"size": 18}, (8, 8, 8))
    network = HybridCorrector(2, {"size": 8}, (4, 8))
    for name, other in (
        ("size is 16, this corrector's 8", FilterCorrector(2, 16)),
        ("channels is 3, this corrector's 2", FilterCorrector(3, 8)),
        (
            r"time_range is \[0, 1\], this.* \[0.02, 0.98\]",
            FilterCorrector(2, 8, time_range=(0, 1)),
        ),
    ):
        with pytest.raises(ValueError, match=f"the closed form's {name}"):
            network.begin_with(other)
