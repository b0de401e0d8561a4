"""Gradients of every loss against closed forms over gaussian images, written out in numpy."""

import itertools

import numpy as np
import pytest
import torch

from lmc.corrector import Corrector
from lmc.losses import DDS, LMC, SDS, Cond, LossInputs, surrogate
from lmc.translator import Translator

from gaussian import GaussianPrior, small_prior

INDICES = (30, 400, 700, 950)  # of the schedule's grid, one per sample
PROMPTS = ("cat", "dog", "bear", "dog")
NAMES = ("sds", "cond", "dds", "lmc")


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
    return small_prior()


def inputs(prior: GaussianPrior, seed: int = 0) -> LossInputs:
    generator = torch.Generator().manual_seed(seed)
    z = prior.sample(4, "dog", generator)
    return LossInputs(
        z=z,
        t=torch.tensor(INDICES, dtype=torch.float64) / 1000,
        eps=torch.randn(z.shape, generator=generator, dtype=z.dtype),
        null=prior.embed([""] * 4),
        target=prior.embed(PROMPTS),
        z_source=prior.sample(4, "cat", generator),
        source=prior.embed(["cat"] * 4),
        negative=prior.embed(["bear"] * 4),
        eps_fixed=torch.randn(z.shape, generator=generator, dtype=z.dtype),
    )


def take(x: LossInputs, rows: list[int]) -> LossInputs:
    index = torch.tensor(rows)
    return LossInputs(*(field[index] for field in vars(x).values()))


def make(name: str, prior: GaussianPrior, statistics: str = "image", **options):
    if name == "lmc":
        return LMC(BestFilter(prior, statistics), **options)
    return {"sds": SDS, "cond": Cond, "lmc": LMC, "dds": DDS}[name](**options)


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
    terms: dict[str, list[np.ndarray]] = {}
    for i, index in enumerate(INDICES):
        alpha_bar = prior.schedule.alphas_cumprod[index].item()
        a, s = alpha_bar**0.5, (1 - alpha_bar) ** 0.5
        power = a**2 * spectrum + s**2
        z, e, z_src = fourier(x.z[i]), fourier(x.eps[i]), fourier(x.z_source[i])
        null, target = fourier(prior.means[""]), fourier(prior.means[PROMPTS[i]])
        source = fourier(prior.means["cat"])
        z_t = a * z + s * e
        cond = omega * s * a * (null - target) / power
        if name == "sds":
            parts = {"cond": cond, "proj": s * (z_t - a * null) / power - e}
            if omega == 1:  # one evaluation, one term: their sum
                parts = {"guided": s * (z_t - a * target) / power - e}
        elif name == "cond":
            parts = {"cond": cond}
        elif name == "dds":
            # the same noise: it cancels between the two unconditional predictions
            parts = {"delta": (s * a * (z - z_src) + omega * s * a * (source - target)) / power}
        else:
            z_hat = pixels(null + a * spectrum / power * (z_t - a * null))
            b_hat = pixels(a**2 * spectrum / power * z)
            axes = (0, 1, 2) if statistics == "image" else (1, 2)
            mean = b_hat.mean(axes, keepdims=True)
            ratio = z_hat.std(axes, keepdims=True) / b_hat.std(axes, keepdims=True)
            parts = {"cond": cond, "lmc": fourier_of(ratio * (b_hat - mean) + mean - z_hat)}
        weight = {"one": 1, "dreamfusion": 1 - alpha_bar, "sjc": a * (1 - alpha_bar)}[weighting]
        weight *= (a if chain_alpha else 1) / (omega if rescale else 1)
        for key, part in parts.items():
            terms.setdefault(key, []).append(weight * pixels(part))
    return {key: np.stack(rows) for key, rows in terms.items()}


def fourier_of(image: np.ndarray) -> np.ndarray:
    return np.fft.fft2(image, norm="ortho")


OPTIONS = list(itertools.product(("one", "dreamfusion", "sjc"), (True, False), (True, False)))


@pytest.mark.parametrize("omega", [1, 7.5, 15])
@pytest.mark.parametrize("name", NAMES)
def test_gradient_is_the_closed_form(prior, name, omega):
    x = inputs(prior)
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
    x = inputs(prior)
    for name in NAMES:
        wanted = closed_form(name, prior, x, 15, "one", True, True)
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
    x, loss = inputs(prior), make(name, prior)
    whole = loss(prior, x).total
    order = [2, 0, 3, 1]
    torch.testing.assert_close(loss(prior, take(x, order)).total, whole[order], rtol=0, atol=1e-12)
    for i in range(4):
        alone = loss(prior, take(x, [i])).total
        torch.testing.assert_close(alone, whole[i : i + 1], rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_no_gradient_flows_through_prior_or_corrector(prior, name):
    x, loss = inputs(prior), make(name, prior)
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
    x = inputs(prior)
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


@pytest.mark.parametrize(
    ("name", "omega", "evaluations"),
    [
        ("sds", 15, 2),
        ("cond", 15, 2),
        ("lmc", 15, 2),
        ("dds", 15, 4),
        ("sds", 1, 1),
        ("cond", 1, 2),
        ("lmc", 1, 2),
        ("dds", 1, 2),
    ],
)
def test_denoiser_evaluations_per_image_are_the_fewest_in_one_call(prior, name, omega, evaluations):
    make(name, prior, guidance_scale=omega)(prior, inputs(prior))
    assert prior.evaluations == 4 * evaluations
    assert prior.calls == 1


def test_guidance_scale_zero_leaves_the_unconditional_prediction(prior):
    x = inputs(prior)
    sds = SDS(0, rescale=False)(prior, x)
    wanted = closed_form("sds", prior, x, 0, "one", True, False)
    np.testing.assert_allclose(sds.total, wanted["proj"], rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", NAMES)
def test_rescaling_at_guidance_scale_zero_is_an_error(prior, name):
    with pytest.raises(ValueError, match="rescale"):
        make(name, prior, guidance_scale=0)
    make(name, prior, guidance_scale=0, rescale=False)


@pytest.mark.parametrize("name", NAMES)
def test_unknown_weighting_names_the_known_ones(prior, name):
    with pytest.raises(ValueError, match=r"'snr'.*one, dreamfusion, sjc"):
        make(name, prior, weighting="snr")


@pytest.mark.parametrize("missing", ["z_source", "source"])
def test_dds_without_a_source_says_so(prior, missing):
    fields = {**vars(inputs(prior)), missing: None}
    with pytest.raises(ValueError, match="'dds' needs z_source and source"):
        DDS()(prior, LossInputs(**fields))
    assert prior.calls == 0


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
