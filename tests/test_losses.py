"""Gradients of every loss against closed forms over gaussian images, written out in numpy."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch

from lmc import losses
from lmc.corrector import Corrector
from lmc.losses import (
    ASD,
    CSD,
    DDS,
    DMD,
    DVRF,
    LMC,
    MSSDS,
    NFSD,
    PDS,
    SDI,
    SDS,
    VSD,
    Bridge,
    Cond,
    LossInputs,
    ScoreDistillation,
    surrogate,
)
from lmc.schedule import FallingTime, FlowSchedule, UniformTime
from lmc.specs import LOSSES, defaults, denoiser_evaluations
from lmc.training.dry_run import per_image
from lmc.translator import Translator

from gaussian import GaussianPrior, small_prior

INDICES = (30, 400, 700, 950)  # of the schedule's grid, one per sample
SHARED = 700  # the same for all samples, for SDI
PROMPTS = ("cat", "dog", "bear", "dog")
KINDS = (SDS, Cond, DDS, LMC, NFSD, MSSDS, PDS, VSD, SDI, CSD, ASD, Bridge, DVRF, DMD)
CLASSES = {loss.name: loss for loss in KINDS}
NAMES = (*CLASSES, "lmc_fixed", "bridge_first")
LORA = 0.3  # what a trained LoRA has come to
GOOD, BAD = " good", " bad"  # suffixes of the prompts that have a mean of their own


class BestFilter(Corrector):
    """A corrector that is known: E[z_hat | z], frequency by frequency.

    z_hat's gain on z_t is alpha_t S / (alpha_t² S + sigma_t²) and E[z_t | z] = alpha_t z.
    """

    def __init__(self, prior: GaussianPrior, statistics: str = "image") -> None:
        super().__init__(prior.channels, widths=(1, 1), statistics=statistics, prior=prior.identity)
        self.spectrum, self.schedule = prior.spectrum, prior.schedule

    def forward(self, z, t):
        alpha_t, sigma_t = self.schedule.coefficients(t, z.dtype)
        signal = alpha_t.square() * self.spectrum
        return torch.fft.ifft2(signal / (signal + sigma_t.square()) * torch.fft.fft2(z)).real


@pytest.fixture
def prior() -> GaussianPrior:
    prior = small_prior()
    generator = torch.Generator().manual_seed(1)
    for prompt in [*prior.means]:
        for suffix in (GOOD, BAD):
            mean = torch.randn(prior.means[prompt].shape, generator=generator, dtype=torch.float64)
            prior.means[prompt + suffix] = prior.means[prompt] + 0.3 * mean
    return prior


def inputs(prior: GaussianPrior, seed: int = 0, shared: bool = False) -> LossInputs:
    """Four samples at INDICES, or with `shared` all at SHARED."""
    generator = torch.Generator().manual_seed(seed)
    z = prior.sample(4, "dog", generator)
    return LossInputs(
        z=z,
        t=torch.tensor([SHARED] * 4 if shared else INDICES, dtype=torch.float64) / 1000,
        eps=torch.randn(z.shape, generator=generator, dtype=z.dtype),
        null=prior.embed([""] * 4),
        target=prior.embed(PROMPTS),
        z_source=prior.sample(4, "cat", generator),
        source=prior.embed(["cat"] * 4),
        negative=prior.embed(["bear"] * 4),
        eps_fixed=torch.randn(z.shape, generator=generator, dtype=z.dtype),
        described=[prior.embed([prompt + suffix for prompt in PROMPTS]) for suffix in (GOOD, BAD)],
        progress=0.5,
    )


def take(x: LossInputs, rows: list[int]) -> LossInputs:
    index = torch.tensor(rows)
    whole = {"t_host": None, "repeats": 1, "progress": x.progress}
    fields = {name: field for name, field in vars(x).items() if name not in whole}
    described = [each[index] for each in fields.pop("described")]
    rows = {name: field[index] for name, field in fields.items()}
    return LossInputs(**rows, **whole, described=described)


def make(name, prior, statistics="image", **options) -> ScoreDistillation:
    if name.startswith("lmc"):
        if name == "lmc_first":
            options["first_stage"] = 0.5
        return LMC(BestFilter(prior, statistics), fixed_noise=name == "lmc_fixed", **options)
    if name == "nfsd":
        return NFSD(negative_prompt="bear", **options)
    if name.startswith("bridge"):
        options |= {"target_suffix": GOOD, "source_suffix": BAD}
        options["first_stage"] = 0.6 if name == "bridge_first" else 0.5
    loss = CLASSES[name.removesuffix("_first")](**options)
    loss.prepare(prior, "cpu")
    if loss.learns:
        prior.lora.data.fill_(LORA)
    return loss


def inputs_for(name: str, prior: GaussianPrior) -> LossInputs:
    return inputs(prior, shared=name == "sdi")


def fourier(image: torch.Tensor) -> np.ndarray:
    return np.fft.fft2(image.numpy(), norm="ortho")


def pixels(spectrum: np.ndarray) -> np.ndarray:
    return np.fft.ifft2(spectrum, norm="ortho").real


def closed_form(name, prior, x, omega, weighting, chain_alpha, rescale, statistics="image"):
    """The gradients by term, in numpy, sample by sample, without any of lmc's formulas.

    With A = alpha_t² S + sigma_t², E[eps | z_t] = sigma_t (z_t − alpha_t mu) / A: what is left of
    z_t − alpha_t z_hat, since 1 − alpha_t² S / A = sigma_t² / A.
    """
    spectrum = prior.spectrum.numpy()
    bars = prior.schedule.alphas_cumprod.numpy()

    def at(index: float) -> tuple[float, float]:
        """(alpha, sigma) at an index of the grid; below it the image is clean."""
        bar = bars[round(index)] if index > 0 else 1.0
        return bar**0.5, (1 - bar) ** 0.5

    def predicted(z_t, index: float, mean):
        # At index 0 the network is asked at the grid's first, a little noisy.
        a, s = bars[round(index)] ** 0.5, (1 - bars[round(index)]) ** 0.5
        return s * (z_t - a * mean) / (a**2 * spectrum + s**2)

    def ddim(z_s, here: float, there: float, scale: float):
        (a, s), (a_there, s_there) = at(here), at(there)
        eps = (1 - scale) * predicted(z_s, here, null) + scale * predicted(z_s, here, target)
        return a_there * (z_s - s * eps) / a + s_there * eps

    terms: dict[str, list[np.ndarray]] = {}
    for i, index in enumerate((x.t * 1000).round().long().tolist()):
        a, s = at(index)
        power = a**2 * spectrum + s**2
        z, e, z_src = fourier(x.z[i]), fourier(x.eps[i]), fourier(x.z_source[i])
        null, target = fourier(prior.means[""]), fourier(prior.means[PROMPTS[i]])
        source, negative = fourier(prior.means["cat"]), fourier(prior.means["bear"])
        good, bad = (fourier(prior.means[PROMPTS[i] + suffix]) for suffix in (GOOD, BAD))
        z_t = a * z + s * e
        # eps_cond − eps_uncond does not depend on z_t, nor on the noise.
        cond = omega * s * a * (null - target) / power
        proj = predicted(z_t, index, null) - e
        if name in ("sds", "bridge_first"):
            parts = {"cond": cond, "proj": proj}
            if omega == 1:  # one evaluation, one term: their sum
                parts = {"guided": s * (z_t - a * target) / power - e}
        elif name in ("cond", "csd"):
            parts = {"cond": cond}
        elif name == "dds":
            # the same noise: it cancels between the two unconditional predictions
            parts = {"delta": (s * a * (z - z_src) + omega * s * a * (source - target)) / power}
        elif name == "nfsd":
            domain = s * (z_t - a * null) / power
            if index >= 200:
                domain = s * a * (negative - null) / power
            parts = {"cond": cond, "domain": domain}
            if omega == 1:
                parts = {"guided": cond + domain}
        elif name == "ms_sds":
            sample = z_t
            for k in range(5, 0, -1):
                sample = ddim(sample, index * k / 5, index * (k - 1) / 5, omega)
            parts = {"multi_step": a / s * (z - sample)}
        elif name == "pds":
            # q(z_s | z_t, z_hat) by Bayes' rule from q(z_s | z_hat) and q(z_t | z_s).
            a_s, s_s = at(index - 1)
            ratio = a / a_s
            precision = 1 / s_s**2 + ratio**2 / (1 - ratio**2)
            latents = []
            for image, prompt in ((z, target), (z_src, source)):
                noisy = a * image + s * e
                eps = (1 - omega) * predicted(noisy, index, null)
                eps = eps + omega * predicted(noisy, index, prompt)
                z_hat = (noisy - s * eps) / a
                mean = (a_s * z_hat / s_s**2 + ratio * noisy / (1 - ratio**2)) / precision
                latents.append((a_s * image - mean) * precision**0.5)
            parts = {"delta": latents[0] - latents[1]}
        elif name == "vsd":
            variational = s * a * (target - null) / power - LORA * z_t
            parts = {"cond": cond, "variational": variational}
            if omega == 1:
                parts = {"guided": cond + variational}
        elif name == "asd":
            later = round(min(index + 0.1 * (index - 20), 999))
            a_later, s_later = at(later)
            eps_later = predicted(a_later * z + s_later * e, later, target)
            parts = {"cond": cond, "asynchronous": predicted(z_t, index, null) - eps_later}
            if omega == 1:
                parts = {"guided": sum(parts.values())}
        elif name == "bridge":
            parts = {"cond": omega * s * a * (bad - good) / power}
        elif name == "dvrf":
            # v = E[eps − z | z_t]; η is half of its 1, half way through the run.
            velocities, moved = [], z_t + 0.5 * s * (z - z_src)
            for noisy, prompt in ((moved, target), (a * z_src + s * e, source)):
                eps = (1 - omega) * predicted(noisy, index, null)
                eps = eps + omega * predicted(noisy, index, prompt)
                velocities.append(eps - (noisy - s * eps) / a)
            parts = {"delta": velocities[0] - velocities[1], "apart": 0.5 * (z - z_src)}
        elif name == "dmd":
            eps = (1 - omega) * predicted(z_t, index, null)
            eps = eps + omega * predicted(z_t, index, target)
            fake = predicted(z_t, index, target) + LORA * z_t
            z_hat = pixels((z_t - s * eps) / a)
            weight = np.abs(pixels(z) - z_hat).mean()
            parts = {"matching": s / a * (eps - fake) / weight}
        elif name == "sdi":
            steps, inverted = int(10 * index / 1000), z
            for k in range(steps):
                inverted = ddim(inverted, index * k / steps, index * (k + 1) / steps, -omega)
            parts = {"inverted": z - ddim(inverted, index, 0, omega)}
        else:
            z_hat = pixels(null + a * spectrum / power * (z_t - a * null))
            b_hat = pixels(a**2 * spectrum / power * z)
            axes = (0, 1, 2) if statistics == "image" else (1, 2)
            mean = b_hat.mean(axes, keepdims=True)
            ratio = z_hat.std(axes, keepdims=True) / b_hat.std(axes, keepdims=True)
            parts = {"cond": cond, "lmc": fourier_of(ratio * (b_hat - mean) + mean - z_hat)}
        weight = {"one": 1, "dreamfusion": s**2, "fantasia3d": a * s**2}[weighting]
        weight *= (a if chain_alpha else 1) / (omega if rescale else 1)
        for key, part in parts.items():
            terms.setdefault(key, []).append(weight * pixels(part))
    return {key: np.stack(rows) for key, rows in terms.items()}


def fourier_of(image: np.ndarray) -> np.ndarray:
    return np.fft.fft2(image, norm="ortho")


OPTIONS = list(
    itertools.product(("one", "dreamfusion", "fantasia3d"), (True, False), (True, False))
)


@pytest.mark.parametrize("omega", [1, 7.5, 15])
@pytest.mark.parametrize("name", NAMES)
def test_gradient_is_the_closed_form(prior, name, omega):
    x = inputs_for(name, prior)
    for weighting, chain_alpha, rescale in OPTIONS:
        loss = make(
            name,
            prior,
            guidance_scale=omega,
            weighting=weighting,
            chain_alpha=chain_alpha,
            rescale=rescale,
        )
        gradient = loss(prior, x)
        wanted = closed_form(name, prior, x, omega, weighting, chain_alpha, rescale)
        assert gradient.terms.keys() == wanted.keys()
        for key, term in wanted.items():
            np.testing.assert_allclose(gradient.terms[key].numpy(), term, rtol=0, atol=1e-10)
        np.testing.assert_allclose(gradient.total, sum(wanted.values()), rtol=0, atol=1e-10)


def test_lmc_gradient_with_statistics_per_channel(prior):
    x = inputs(prior)
    gradient = make("lmc", prior, "channel")(prior, x)
    wanted = closed_form("lmc", prior, x, 15, "one", True, True, "channel")
    np.testing.assert_allclose(gradient.terms["lmc"], wanted["lmc"], rtol=0, atol=1e-10)
    assert not np.allclose(wanted["lmc"], closed_form("lmc", prior, x, 15, "one", 1, 1)["lmc"])


def test_defaults_are_the_papers(prior):
    for name in NAMES:
        x = inputs_for(name, prior)
        ours = (15, "one", True, True)
        ours = {"sdi": (7.5, "one", False, True), "dmd": (15, "one", False, False)}.get(name, ours)
        wanted = closed_form(name, prior, x, *ours)
        total = make(name, prior)(prior, x).total
        np.testing.assert_allclose(total, sum(wanted.values()), rtol=0, atol=1e-10)


def test_sds_is_cond_and_proj_and_proj_pulls_towards_z_hat(prior):
    """g_SDS = g_cond + g_proj [LMC, Eq. 6], g_proj = alpha_t/sigma_t (z − z_hat) [LMC, Eq. 7]."""
    x = inputs(prior)
    plain = {"chain_alpha": False, "rescale": False, "guidance_scale": 7.5}
    sds = SDS(**plain)(prior, x)
    torch.testing.assert_close(sds.total, sds.terms["cond"] + sds.terms["proj"], rtol=0, atol=0)
    assert torch.equal(sds.terms["cond"], Cond(**plain)(prior, x).total)
    alpha_bar = prior.schedule.alphas_cumprod[list(INDICES)].view(-1, 1, 1, 1)
    ratio = (alpha_bar / (1 - alpha_bar)).sqrt()
    z_t = alpha_bar.sqrt() * x.z + (1 - alpha_bar).sqrt() * x.eps
    _, z_hat = prior.predict(z_t, x.t, x.null)
    torch.testing.assert_close(sds.terms["proj"], ratio * (x.z - z_hat), rtol=0, atol=1e-10)


def test_expected_proj_term_is_the_closed_form(prior):
    """E over eps of proj = sigma_t alpha_t (z − mu) / A, with a spread of (alpha_t² S / A)².

    proj = sigma_t alpha_t (z − mu)/A + (sigma_t²/A − 1) eps. The mean of N draws is off by
    alpha_t² S / A / √N, one standard deviation: no pixel may be off by 5.5 (192 of them, so that
    one in 10^5 seeds would be), and the squares average to 1 within 5 times √(2/192).
    """
    index, draws = 600, 2000
    generator = torch.Generator().manual_seed(1)
    z = prior.sample(1, "bear", generator)
    x = LossInputs(
        z=z.expand(draws, -1, -1, -1),
        t=torch.full((draws,), index / 1000, dtype=torch.float64),
        eps=torch.randn(draws, *z.shape[1:], generator=generator, dtype=torch.float64),
        null=prior.embed([""]).expand(draws),
        target=prior.embed(["dog"]).expand(draws),
    )
    proj = SDS(7.5, chain_alpha=False, rescale=False)(prior, x).terms["proj"]
    a2 = prior.schedule.alphas_cumprod[index].item()
    power = a2 * prior.spectrum.numpy() + 1 - a2
    expected = (a2 * (1 - a2)) ** 0.5 * fourier(z[0]) / power
    deviation = a2 * prior.spectrum.numpy() / power / draws**0.5
    # Scaled to unit variance in the Fourier domain and brought back, the error is white noise.
    score = pixels((fourier(proj).mean(0) - expected) / deviation)
    assert np.abs(score).max() < 5.5
    assert np.mean(score**2) == pytest.approx(1, abs=5 * (2 / score.size) ** 0.5)


@pytest.mark.parametrize("name", NAMES)
def test_a_samples_gradient_does_not_depend_on_its_batch(prior, name):
    x, loss = inputs_for(name, prior), make(name, prior)
    whole = loss(prior, x).total
    order = [2, 0, 3, 1]
    torch.testing.assert_close(loss(prior, take(x, order)).total, whole[order], rtol=0, atol=1e-12)
    for i in range(4):
        alone = loss(prior, take(x, [i])).total
        torch.testing.assert_close(alone, whole[i : i + 1], rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_no_gradient_flows_through_prior_or_corrector(prior, name):
    x, loss = inputs_for(name, prior), make(name, prior)
    for field in (x.z, x.eps, x.z_source, *x.target.tensors.values()):
        field.requires_grad_()
    gradient = loss(prior, x)
    assert not gradient.total.requires_grad
    assert not any(term.requires_grad for term in gradient.terms.values())
    (autograd,) = torch.autograd.grad(surrogate(x.z, gradient.total).sum(), x.z)
    assert torch.equal(autograd, gradient.total)


def test_a_trained_corrector_stays_out_of_the_graph(prior):
    """A real network, not yet frozen by `prepare`: nothing arrives at its weights."""
    x = inputs(prior)
    corrector = Corrector(3, widths=(4, 8), prior=prior.identity).double()
    translator = Translator(["cat", "dog"], widths=(4, 8)).double()
    z = translator(x.z, torch.tensor([0, 1, 1, 0]))
    gradient = LMC(corrector)(prior, LossInputs(z, *list(vars(x).values())[1:]))
    surrogate(z, gradient.total).sum().backward()
    assert all(p.grad is None for p in corrector.parameters())
    assert any(p.grad.abs().max() > 0 for p in translator.parameters())


def test_surrogates_gradient_is_the_given_one_exactly():
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(3, 2, 4, 5, generator=generator).requires_grad_()
    gradient = torch.randn(3, 2, 4, 5, generator=generator).requires_grad_()
    per_image = surrogate(z, gradient)
    assert per_image.shape == (3,)
    per_image.sum().backward()
    assert torch.equal(z.grad, gradient.detach())
    assert gradient.grad is None
    (only_second,) = torch.autograd.grad(surrogate(z, gradient)[1], z)
    assert torch.equal(only_second[1], gradient[1].detach())
    assert not only_second[[0, 2]].any()


@pytest.mark.parametrize("name", NAMES)
def test_translators_parameters_get_the_vector_jacobian_product(prior, name):
    """d surrogate / d parameter = gᵀ ∂z/∂parameter: autograd's, and finite differences with g held.

    Central differences over h = 1e-6 along a unit direction: the rounding error is about
    1e-16 / 1e-6 of the surrogate, which is of the order of 10, so that 1e-7 is safe; no ReLU of
    this network switches inside h at this seed.
    """
    x = inputs_for(name, prior)
    torch.manual_seed(0)
    translator = Translator(["cat", "dog"], image_size=8, widths=(4, 8)).double()
    ids = torch.tensor([0, 1, 1, 0])
    parameters = list(translator.parameters())
    z = translator(x.z_source, ids)
    held = make(name, prior)(prior, LossInputs(z, *list(vars(x).values())[1:])).total
    product = torch.autograd.grad(z, parameters, grad_outputs=held, retain_graph=True)
    found = torch.autograd.grad(surrogate(z, held).sum(), parameters)
    torch.testing.assert_close(found, product, rtol=0, atol=1e-12)

    h = 1e-6
    for seed in range(3):
        torch.manual_seed(seed)
        direction = [torch.randn_like(p) for p in parameters]
        norm = sum(d.square().sum() for d in direction).sqrt()
        values = []
        with torch.no_grad():
            for sign in (1, -2, 1):  # to + h, to − h, and back
                for p, d in zip(parameters, direction, strict=True):
                    p.add_(d / norm, alpha=sign * h)
                values.append((held * translator(x.z_source, ids)).sum().item())
        slope = (
            sum((f * d).sum().item() for f, d in zip(found, direction, strict=True)) / norm.item()
        )
        assert (values[0] - values[1]) / (2 * h) == pytest.approx(slope, rel=1e-5, abs=1e-7)


# SDI at t = 0.7 inverts in seven steps. NFSD: one of the four samples is at t < 0.2.
EVALUATIONS = {
    ("sds", 15): (8, 1),
    ("cond", 15): (8, 1),
    ("lmc", 15): (8, 1),
    ("lmc_fixed", 15): (12, 1),
    ("dds", 15): (16, 1),
    ("pds", 15): (16, 1),
    ("nfsd", 15): (11, 1),
    ("ms_sds", 15): (40, 5),
    ("vsd", 15): (12, 2),
    ("sdi", 15): (64, 8),
    ("csd", 15): (8, 1),
    ("asd", 15): (12, 1),
    ("bridge", 15): (8, 1),
    ("dvrf", 15): (16, 1),
    ("dmd", 15): (12, 2),
    ("sds", 1): (4, 1),
    ("cond", 1): (8, 1),
    ("lmc", 1): (8, 1),
    ("lmc_fixed", 1): (12, 1),
    ("dds", 1): (8, 1),
    ("pds", 1): (8, 1),
    ("nfsd", 1): (7, 1),
    ("ms_sds", 1): (20, 5),
    ("vsd", 1): (8, 2),
    ("sdi", 1): (60, 8),
    ("csd", 1): (8, 1),
    ("asd", 1): (8, 1),
    ("bridge", 1): (8, 1),
    ("dvrf", 1): (8, 1),
    ("dmd", 1): (8, 2),
}


@pytest.mark.parametrize(("name", "omega"), EVALUATIONS)
def test_denoiser_evaluations_and_calls_are_the_fewest(prior, name, omega):
    make(name, prior, guidance_scale=omega)(prior, inputs_for(name, prior))
    assert (prior.evaluations, prior.calls) == EVALUATIONS[name, omega]


def test_guidance_scale_zero_leaves_the_unconditional_prediction(prior):
    x = inputs(prior)
    sds = SDS(0, rescale=False)(prior, x)
    wanted = closed_form("sds", prior, x, 0, "one", True, False)
    np.testing.assert_allclose(sds.total, wanted["proj"], rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", NAMES)
def test_rescaling_at_guidance_scale_zero_is_an_error(prior, name):
    with pytest.raises(ValueError, match="rescale"):
        make(name, prior, guidance_scale=0, rescale=True)
    make(name, prior, guidance_scale=0, rescale=False)


@pytest.mark.parametrize("name", NAMES)
def test_unknown_weighting_names_the_known_ones(prior, name):
    with pytest.raises(ValueError, match=r"'snr'.*one, dreamfusion, fantasia3d"):
        make(name, prior, weighting="snr")


@pytest.mark.parametrize("name", NAMES)
def test_a_negative_guidance_scale_is_refused(prior, name):
    with pytest.raises(ValueError, match="guidance_scale must not be negative, got -3"):
        make(name, prior, guidance_scale=-3)


@pytest.mark.parametrize(
    ("name", "missing", "said"),
    [
        ("dds", "z_source", "z_source and source"),
        ("dds", "source", "z_source and source"),
        ("pds", "z_source", "z_source and source"),
        ("pds", "source", "z_source and source"),
        ("nfsd", "negative", "negative"),
        ("lmc_fixed", "eps_fixed", "eps_fixed"),
        ("bridge", "described", "described"),
        ("bridge", "progress", "progress"),
        ("lmc_first", "progress", "progress"),
        ("dvrf", "progress", "progress"),
        ("dvrf", "z_source", "z_source and source"),
    ],
)
def test_a_loss_without_what_it_needs_says_so(prior, name, missing, said):
    loss = make(name, prior)
    fields = {**vars(inputs(prior)), missing: () if missing == "described" else None}
    with pytest.raises(ValueError, match=f"'{loss.name}' needs {said}"):
        loss(prior, LossInputs(**fields))
    assert prior.calls == 0


def test_nfsd_takes_an_empty_negative_prompt_but_not_none():
    assert NFSD(negative_prompt="").negative_prompt == ""
    with pytest.raises(ValueError, match="needs a negative_prompt; an empty one"):
        NFSD(negative_prompt=None)


def test_sdi_refuses_a_time_for_each_sample(prior):
    with pytest.raises(ValueError, match=r"one t for the whole batch, got \[0\.03, 0\.4, "):
        SDI()(prior, inputs(prior))
    assert prior.calls == 0
    with pytest.raises(ValueError, match="shared: true, not UniformTime as given"):
        SDI().choose_time(UniformTime())
    assert isinstance(SDI().choose_time(None), FallingTime)
    assert isinstance(SDS().choose_time(None), UniformTime)
    for given in (FallingTime(), UniformTime(shared=True)):
        assert SDI().choose_time(given) is given and SDS().choose_time(given) is given


@pytest.mark.parametrize("name", ["dds", "pds", "dvrf"])
@pytest.mark.parametrize("scale", [1, 15])
def test_a_source_is_predicted_once_for_all_targets(prior, name, scale):
    """Two images to two targets each: the same gradient, with fewer evaluations."""
    loss = make(name, prior, guidance_scale=scale)
    x = inputs(prior)
    pairs = {field: getattr(x, field)[torch.tensor([0, 0, 1, 1])] for field in ("t", "eps")}
    pairs |= {"z_source": x.z_source[[0, 0, 1, 1]], "target": prior.embed(["cat", "dog"] * 2)}
    apart = replace(x, **pairs)
    before = prior.evaluations
    expected = loss(prior, apart).total
    between = prior.evaluations
    found = loss(prior, replace(apart, repeats=2)).total
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    branches = 1 if scale == 1 else 2
    assert between - before == 8 * branches
    assert prior.evaluations - between == 6 * branches


def test_pds_refuses_a_flow_prior_by_name(prior):
    prior.schedule = FlowSchedule()
    with pytest.raises(ValueError, match="variance-preserving"):
        PDS().prepare(prior, "cpu")
    with pytest.raises(ValueError, match="variance-preserving"):
        PDS()(prior, inputs(prior))


def test_pds_refuses_the_grids_first_index(prior):
    x = inputs(prior)
    with pytest.raises(ValueError, match="first index"):
        PDS()(prior, LossInputs(**{**vars(x), "t": torch.zeros_like(x.t)}))


@pytest.mark.parametrize("loss", [VSD, DMD])
def test_a_prior_without_a_lora_is_refused(prior, loss):
    class Plain:
        """The protocol and no more."""

        def __init__(self):
            for name in ("to", "encode", "decode", "embed", "predict", "schedule", "identity"):
                setattr(self, name, getattr(prior, name))
            self.image_size, self.channels, self.latent = 8, 3, False

    words = f"the loss '{loss.name}' needs a prior with add_lora.*Plain has not"
    with pytest.raises(ValueError, match=words):
        loss().prepare(Plain(), "cpu")


@pytest.mark.parametrize(
    ("loss", "option"),
    [(MSSDS, "steps"), (SDI, "inversion_steps"), (VSD, "lora_rank"), (DMD, "updates")],
)
def test_what_must_be_at_least_one_says_so(loss, option):
    with pytest.raises(ValueError, match=f"{option} must be at least 1.*, got 0"):
        loss(**{option: 0})


def test_lmc_refuses_unknown_statistics(prior):
    with pytest.raises(ValueError, match=r"'pixel'.*image, channel, none"):
        LMC("identity", statistics="pixel")


# ---------------------------------------------------------------------------------------------
# Identities between the losses

PLAIN = {"chain_alpha": False, "rescale": False, "guidance_scale": 7.5}


def equal(one: torch.Tensor, other: torch.Tensor) -> None:
    assert one.abs().max() > 1e-3, "nothing is compared"
    torch.testing.assert_close(one, other, rtol=0, atol=1e-10)


def test_lmc_without_a_correction_and_with_the_ratio_is_sds(prior):
    x = inputs(prior)
    lmc = LMC("identity", statistics="none", keep_ratio=True, **PLAIN)
    lmc.prepare(prior, "cpu")
    equal(lmc(prior, x).total, SDS(**PLAIN)(prior, x).total)
    assert not torch.allclose(
        LMC("identity", **PLAIN)(prior, x).total, SDS(**PLAIN)(prior, x).total
    )


@pytest.mark.parametrize("name", ["lmc", "lmc_fixed"])
def test_lmc_with_a_first_stage_is_sds_and_then_lmc(prior, name):
    x = inputs(prior)
    x = replace(x, eps_fixed=x.eps) if name == "lmc_fixed" else x
    first = make(name, prior, guidance_scale=3.0, first_stage=0.6)
    then = make(name, prior, guidance_scale=3.0, first_stage=0.5)
    assert x.progress == 0.5
    sds, lmc = (make(each, prior, guidance_scale=3.0)(prior, x) for each in ("sds", name))
    equal(first(prior, x).total, sds.total)
    equal(then(prior, x).total, lmc.total)
    assert first(prior, x).terms.keys() == sds.terms.keys()
    with pytest.raises(ValueError, match="first_stage must be a share of the run"):
        make(name, prior, first_stage=-0.1)


def test_lmc_with_its_one_noise_fixed_is_lmc(prior):
    x = inputs(prior)
    same = LossInputs(**{**vars(x), "eps_fixed": x.eps})
    fixed = make("lmc_fixed", prior, **PLAIN)
    equal(fixed(prior, same).total, make("lmc", prior, **PLAIN)(prior, x).total)


def test_dds_of_the_image_itself_without_a_source_prompt_is_cond(prior):
    x = inputs(prior)
    x = LossInputs(**{**vars(x), "z_source": x.z, "source": x.null})
    equal(DDS(**PLAIN)(prior, x).total, Cond(**PLAIN)(prior, x).total)


def test_cond_is_sds_less_its_projection(prior):
    x = inputs(prior)
    sds = SDS(**PLAIN)(prior, x)
    equal(Cond(**PLAIN)(prior, x).total, sds.total - sds.terms["proj"])


@pytest.mark.parametrize("name", ["dds", "pds"])
def test_an_image_against_itself_with_equal_prompts_is_nothing(prior, name):
    x = inputs(prior)
    x = LossInputs(**{**vars(x), "z_source": x.z, "source": x.target})
    assert make(name, prior, **PLAIN)(prior, x).total.abs().max() < 1e-10


def test_nfsd_with_an_empty_negative_prompt_is_cond_at_late_times(prior):
    x = inputs(prior)
    x = LossInputs(**{**vars(x), "negative": x.null})
    nfsd, cond = (
        loss(prior, x).total for loss in (NFSD(negative_prompt="", **PLAIN), Cond(**PLAIN))
    )
    late = x.t >= 0.2
    equal(nfsd[late], cond[late])
    assert (nfsd[~late] - cond[~late]).abs().max() > 1e-3
    assert prior.evaluations == 2 * 2 * len(x.t), "the null prompt is not asked for twice"
    said = denoiser_evaluations(NFSD, defaults(NFSD) | {"negative_prompt": ""})
    assert said[0] == 2


def test_nfsd_with_an_empty_negative_prompt_is_its_formula(prior):
    x = inputs(prior)
    x = replace(x, negative=x.null)
    both = [NFSD(negative_prompt=each, **PLAIN)(prior, x).total for each in ("", "said")]
    equal(*both)


def test_multi_step_sds_in_one_step_is_sds(prior):
    x = inputs(prior)
    equal(MSSDS(steps=1, **PLAIN)(prior, x).total, SDS(**PLAIN)(prior, x).total)


def test_pds_of_a_consistent_pair_is_dds_reweighted(prior):
    """By √ᾱ_s β / (1 − ᾱ_t), of z_hat in the posterior's mean, sigma_t / alpha_t and 1 / σ_post."""
    x = inputs(prior)
    index = torch.tensor(INDICES)
    bar = prior.schedule.alphas_cumprod
    bar_t, bar_s = bar[index].view(-1, 1, 1, 1), bar[index - 1].view(-1, 1, 1, 1)
    beta = 1 - bar_t / bar_s
    post = ((1 - bar_s) / (1 - bar_t) * beta).sqrt()
    weight = bar_s.sqrt() * beta / (1 - bar_t) / post * ((1 - bar_t) / bar_t).sqrt()
    equal(PDS(**PLAIN)(prior, x).total, weight * DDS(**PLAIN)(prior, x).total)


def test_vsd_with_an_untrained_lora_is_cond_but_for_a_factor(prior):
    x, vsd = inputs(prior), VSD(**PLAIN)
    vsd.prepare(prior, "cpu")
    equal(vsd(prior, x).total, (1 - 1 / 7.5) * Cond(**PLAIN)(prior, x).total)


def test_csd_is_cond(prior):
    x = inputs(prior)
    equal(CSD(**PLAIN)(prior, x).total, Cond(**PLAIN)(prior, x).total)


def test_asd_without_a_shift_is_cond_but_for_a_factor(prior):
    """(ω − 1) (eps_c − eps_u)."""
    x = inputs(prior)
    equal(ASD(shift=0, **PLAIN)(prior, x).total, (1 - 1 / 7.5) * Cond(**PLAIN)(prior, x).total)


def test_bridge_with_nothing_to_describe_is_sds_and_then_cond(prior):
    x = inputs(prior)
    bridge = Bridge(target_suffix="", source_suffix=None, **PLAIN)
    assert bridge.further_prompts(["cat", "dog"]) == ["cat", "dog"]
    x = replace(x, described=[x.target])
    equal(bridge(prior, x).total, Cond(**PLAIN)(prior, x).total)
    equal(bridge(prior, replace(x, progress=0.49)).total, SDS(**PLAIN)(prior, x).total)
    with pytest.raises(ValueError, match="first_stage must be a share of the run"):
        Bridge(first_stage=1.5)


def test_dvrf_at_eta_zero_is_dds_over_alpha_and_at_one_flowedit(prior):
    prior.schedule = FlowSchedule()
    x = replace(inputs(prior), t=torch.tensor([0.1, 0.4, 0.7, 0.95], dtype=torch.float64))
    alpha_t = 1 - x.t.view(-1, 1, 1, 1)
    equal(alpha_t * DVRF(eta=0, **PLAIN)(prior, x).total, DDS(**PLAIN)(prior, x).total)

    def velocity(z_t, embedding):
        (eps, z_hat), (eps_u, z_hat_u) = (prior.predict(z_t, x.t, e) for e in (embedding, x.null))
        return eps_u - z_hat_u + 7.5 * ((eps - z_hat) - (eps_u - z_hat_u))

    # FlowEdit's steps add to the source; its z_t of the target is z + z_src_t − z_src.
    noisy = alpha_t * x.z_source + x.t.view(-1, 1, 1, 1) * x.eps
    wanted = velocity(x.z + noisy - x.z_source, x.target) - velocity(noisy, x.source)
    equal(DVRF(progressive=False, **PLAIN)(prior, x).total, wanted)
    equal(DVRF(**PLAIN)(prior, replace(x, progress=1.0)).total, wanted)


def test_dvrf_drives_from_the_source_what_the_denoiser_lets_through(prior):
    x = replace(inputs(prior), target=prior.embed(["cat"] * 4))
    prior.spectrum = prior.spectrum * 1e12
    alpha_t, sigma_t = prior.schedule.coefficients(x.t)
    wanted = -0.8 * (alpha_t + sigma_t) / alpha_t * (x.z - x.z_source)
    options = {"eta": 0.8, "progressive": False, "chain_alpha": False, "rescale": False}
    found = DVRF(guidance_scale=1, **options)(prior, x).total
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)


@pytest.mark.parametrize("eta", [0.0, 0.6, 1.0])
def test_dvrf_of_a_ddpm_prior_is_that_of_the_flow_prior_it_is(prior, eta):
    x = inputs(prior)
    alpha_t, sigma_t = prior.schedule.coefficients(x.t)
    gradient = DVRF(eta=eta, chain_alpha=False)(prior, x).total
    prior.schedule = FlowSchedule()
    x = replace(x, t=(sigma_t / (alpha_t + sigma_t)).flatten())
    equal(gradient, DVRF(eta=eta, chain_alpha=False)(prior, x).total)


def test_dmd_without_its_weight_is_vsd_in_estimates_of_the_image(prior):
    x, found = inputs(prior), {}
    for name, loss in (("vsd", VSD(**PLAIN)), ("dmd", DMD(normalise=False, **PLAIN))):
        loss.prepare(prior, "cpu")
        prior.lora.data.fill_(LORA)
        found[name] = loss(prior, x).total
    alpha_t, sigma_t = prior.schedule.coefficients(x.t, torch.float64)
    equal(found["dmd"], sigma_t / alpha_t * found["vsd"])


def test_sdi_is_the_image_less_its_guided_estimate(prior):
    """g = z − z_hat at the inverted z_t, so that a step of one along −g ends at z_hat."""
    x = inputs(prior, shared=True)
    seen = []
    predict = prior.predict

    def spy(z_t, t, embedding):
        found = predict(z_t, t, embedding)
        seen.append((z_t[:4], t[:4], found[1]))
        return found

    prior.predict = spy
    total = SDI(rescale=False)(prior, x).total
    _, t, z_hat = seen[-1]
    assert torch.equal(t, x.t)
    uncond, cond = z_hat.chunk(2)
    equal(total, x.z - (uncond + 7.5 * (cond - uncond)))


# ---------------------------------------------------------------------------------------------
# VSD's LoRA


def test_vsd_learns_by_the_gradient_of_the_diffusion_loss(prior):
    """Against finite differences of ‖eps_LoRA − eps‖²; AdamW's first step is lr · sign."""
    x, vsd = inputs(prior), VSD(lora_lr=1e-3)
    vsd.prepare(prior, "cpu")
    prior.lora.data.copy_(torch.tensor([0.5, -0.5, 0.1]).view(3, 1, 1))
    alpha_t, sigma_t = prior.schedule.coefficients(x.t)
    z_t = alpha_t * x.z + sigma_t * x.eps

    def loss(w):
        prior.lora.data.copy_(w)
        return (prior.predict_lora(z_t, x.t, x.target)[0] - x.eps).square().mean().item()

    start = prior.lora.data.clone()
    slopes = []
    for channel in range(3):
        h = torch.zeros_like(start)
        h[channel] = 1e-5
        slopes.append((loss(start + h) - loss(start - h)) / 2e-5)
    prior.lora.data.copy_(start)
    vsd.learn(prior, x)
    moved = prior.lora.data - start * (1 - 1e-3 * 0.01)  # AdamW's default weight decay
    wanted = -1e-3 * torch.tensor(slopes, dtype=torch.float64).sign().view(3, 1, 1)
    torch.testing.assert_close(moved, wanted, rtol=1e-4, atol=0)
    assert not x.z.requires_grad


def test_vsd_goes_on_from_its_state_as_if_it_had_never_stopped(prior):
    straight, first, second = (VSD(lora_lr=1e-2) for _ in range(3))
    batches = [inputs(prior, seed) for seed in range(4)]
    straight.prepare(prior, "cpu")
    for x in batches:
        straight.learn(prior, x)
    wanted = prior.lora.data.clone()
    assert wanted.abs().min() > 1e-3
    first.prepare(prior, "cpu")
    for x in batches[:2]:
        first.learn(prior, x)
    state = first.state_dict()
    for x in batches[2:]:  # the state is a copy: going on does not change it
        first.learn(prior, x)
    second.prepare(prior, "cpu")
    second.load_state_dict(state)
    for x in batches[2:]:
        second.learn(prior, x)
    assert torch.equal(prior.lora.data, wanted)


@pytest.mark.parametrize("state", [{}, {"lora": {"w": torch.zeros(4, 1, 1)}, "optimizer": {}}])
def test_vsd_refuses_the_state_of_another_lora(prior, state):
    vsd = VSD()
    vsd.prepare(prior, "cpu")
    with pytest.raises(ValueError, match="another prior or lora_rank"):
        vsd.load_state_dict(state)


# As METHOD's table counts them, for the dry run: of SDI on average, of NFSD at most.
@pytest.mark.parametrize(("name", "omega"), EVALUATIONS)
def test_a_dry_run_says_the_same_counts(prior, name, omega):
    loss = CLASSES[name.removesuffix("_fixed")]
    options = {"guidance_scale": omega} | ({"fixed_noise": True} if "fixed" in name else {})
    config = {"class_path": f"lmc.losses.{loss.__name__}", "init_args": options}
    said, of_what = per_image({"loss": config, "classes": ["dog"]})
    built = vars(make(name, prior, guidance_scale=omega))
    assert denoiser_evaluations(loss, built) == (said, of_what)
    wanted = EVALUATIONS[name, omega][0] / 4
    if name == "sdi":  # at t = 0.7 seven steps, not 4.5 on average
        wanted -= 2 * (7 - 4.5)
    if name == "nfsd":  # one sample in four is early
        wanted += 0.25
    if name in ("vsd", "dmd"):  # and those that train the LoRA
        wanted += loss(**options).updates
    assert said == wanted


def variants() -> list[tuple[str, dict[str, object]]]:
    """Every loss at either kind of guidance, and with each of its own options another."""
    common, found = defaults(ScoreDistillation), []
    for name, loss in LOSSES.items():
        its = {key: value for key, value in defaults(loss).items() if key not in common}
        needed: dict[str, object] = {"corrector": "identity"} if "corrector" in its else {}
        others: list[dict[str, object]] = [{}]
        others += [{key: not value} for key, value in its.items() if isinstance(value, bool)]
        others += [{key: n} for key, value in its.items() if type(value) is int for n in (1, 7)]
        others += [{key: 1.0} for key in its if "guidance_scale" in key]
        found += [
            (name, {**needed, **other, "guidance_scale": omega})
            for other in others
            for omega in (1, 15)
        ]
    return found


@pytest.mark.parametrize(("name", "options"), variants())
def test_a_loss_says_the_evaluations_that_it_takes(prior, name, options):
    """Counted over the range of t, those of `learn` too; a new loss is counted by itself."""
    loss = LOSSES[name](**options)
    loss.prepare(prior, "cpu")
    x, times = inputs(prior), (np.arange(40) + 0.5) / 40
    counted = []
    for t in times:
        prior.evaluations = 0
        at_t = LossInputs(**{**vars(x), "t": torch.full_like(x.t, t)})
        loss(prior, at_t)
        for _ in range(loss.updates if loss.learns else 0):
            loss.learn(prior, at_t)
        counted.append(prior.evaluations / len(x.t))
    said, of_what = denoiser_evaluations(LOSSES[name], options)
    assert of_what.startswith(name)
    if loss.evaluations_note == "at most":
        assert said == max(counted)
    elif loss.evaluations_note == "about":
        assert abs(said - np.mean(counted)) <= 0.5
    else:
        assert {said} == set(counted)


def test_the_module_has_no_loss_that_these_tests_do_not_know():
    found = {
        value.name
        for value in vars(losses).values()
        if isinstance(value, type)
        and issubclass(value, ScoreDistillation)
        and value is not ScoreDistillation
    }
    assert found == CLASSES.keys()


def test_prepare_freezes_the_corrector_of_this_prior(prior):
    loss = LMC(Corrector(3, widths=(4, 8), prior=prior.identity).train())
    loss.prepare(prior, "cpu")
    assert not loss.corrector.training
    assert not any(p.requires_grad for p in loss.corrector.parameters())


def test_prepare_loads_a_released_corrector_with_its_prior(prior, tmp_path):
    corrector = Corrector(3, widths=(4, 8), statistics="channel", prior=prior.identity)
    corrector.save_pretrained(tmp_path)
    loss = LMC(str(tmp_path))
    loss.prepare(prior, "cpu")
    assert loss.corrector.statistics == "channel"
    for mine, loaded in zip(corrector.parameters(), loss.corrector.parameters(), strict=True):
        assert torch.equal(mine, loaded)


@pytest.mark.parametrize("recorded", [{"pretrained": "deepfloyd", "digest": "gaussian-1"}, None])
def test_a_corrector_of_another_prior_is_refused_naming_both(prior, recorded):
    loss = LMC(Corrector(3, widths=(4, 8), prior=recorded))
    with pytest.raises(ValueError, match="valid for the prior it was trained on") as error:
        loss.prepare(prior, "cpu")
    assert "gaussian-0" in str(error.value)
    assert ("gaussian-1" if recorded else "none recorded") in str(error.value)
