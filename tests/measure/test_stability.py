"""The stability test and the excess over the floor, against the gaussian prior's closed form."""

import json
import re
from pathlib import Path

import pytest
import torch
import yaml

from lmc.cli import main
from lmc.corrector import BiasCorrector, Corrector, IdentityCorrector, corrector_loss
from lmc.measure.correctors import excess_over_floor, heldout_excess
from lmc.measure.stability import TIMES, drift, response, stability, verdict
from lmc.priors import DiffusersPrior
from lmc.shards.images import ImageStream
from lmc.shards.triplets import heldout_triplets

import worlds
from gaussian import GaussianPrior, power_spectrum


@pytest.fixture
def prior() -> GaussianPrior:
    """Of pictures well within [-1, 1]."""
    mean = torch.zeros(3, 16, 16, dtype=torch.float64)
    return GaussianPrior({"": mean}, 0.05 * power_spectrum(16))


class Filtering(BiasCorrector):
    """b̂ of the gaussian prior, J_ẑ z, and more or less than it: by frequency, `more` z besides."""

    def __init__(self, prior: GaussianPrior, more: torch.Tensor | float) -> None:
        super().__init__("none", prior.identity)
        self.of, self.more = prior, more

    def forward(self, z, t):
        alpha_t, sigma_t = self.of.schedule.coefficients(t, z.dtype)
        power = alpha_t.square() * self.of.spectrum
        gain = power / (power + sigma_t.square()) + self.more
        return torch.fft.ifft2(gain * torch.fft.fft2(z)).real


def pictures(prior: GaussianPrior, count: int = 6) -> torch.Tensor:
    return prior.sample(count, "", torch.Generator().manual_seed(1))


def responses(corrector, prior, z) -> dict[str, list[float]]:
    generator = torch.Generator().manual_seed(0)
    return response(corrector, prior, z, prior.embed([""]), generator)


@pytest.mark.parametrize("more", [0.3, 0.0, -0.2])
def test_the_response_is_that_of_theory(prior, more):
    """(J_b − J_ẑ) δ = more δ for every δ and t, in float64 to rounding."""
    found = responses(Filtering(prior, more), prior, pictures(prior))
    assert {"cast", "smooth cast", "fine stripes", "contrast", "blur", "mix"} < set(found)
    for values in found.values():
        assert values == pytest.approx([more] * len(TIMES), abs=1e-9)
    generator = torch.Generator().manual_seed(0)
    z = pictures(prior)
    haze = drift(Filtering(prior, more), prior, z, prior.embed([""]), generator)
    assert haze == pytest.approx([-more] * len(TIMES), abs=1e-9)


def test_noise_is_answered_by_its_frequencies(prior):
    """J of another sign above 4 cycles than below."""
    k = torch.fft.fftfreq(16, 1 / 16, dtype=torch.float64)
    radius = (k[:, None].square() + k.square()).sqrt()
    more = torch.where(radius < 4, 0.2, -0.1)
    found = responses(Filtering(prior, more), prior, 0.2 * pictures(prior))
    for name, wanted in (("cast", 0.2), ("noise 1–2", 0.2), ("noise 2–4", 0.2), ("noise 4–", -0.1)):
        assert found[name] == pytest.approx([wanted] * len(TIMES), abs=1e-6), name


def test_sds_pulls_back_by_what_the_denoiser_leaves(prior):
    """Of b = z the response to a cast is 1 − J_ẑ at frequency 0, known at each t."""
    found = responses(IdentityCorrector("none"), prior, 0.2 * pictures(prior))
    for time, value in zip(TIMES, found["cast"], strict=True):
        t = torch.tensor([time], dtype=torch.float64)
        alpha_t, sigma_t = (x.item() for x in prior.schedule.coefficients(t))
        power = alpha_t**2 * prior.spectrum[0, 0].item()
        assert value == pytest.approx(1 - power / (power + sigma_t**2), rel=1e-9)


def test_what_runs_away_is_told_from_what_holds(prior):
    z = pictures(prior)
    k = torch.fft.fftfreq(16, 1 / 16, dtype=torch.float64).abs()
    fine = torch.maximum(k[:, None], k) > 4
    wild = Filtering(prior, torch.where(fine, -0.5, 0.0))
    away = stability(wild, prior, z, quiet=True)
    assert not away["holds"] and away["verdict"].startswith("runs away: in ")
    assert "noise 4– (r = -0.4" in away["verdict"] and "wide stripes" not in away["verdict"]
    assert "at t = 0.1, 0.3, 0.5, 0.7, 0.9" in away["verdict"] and "restoring" in away["verdict"]
    assert "of power" in away["verdict"]
    assert away["free_run"]["rmse"][-1] > 0.5
    for corrector in (IdentityCorrector("none"), Filtering(prior, 0.2), Filtering(prior, 0.0)):
        held = stability(corrector, prior, z, quiet=True)
        assert held["holds"] and held["verdict"].startswith("holds: "), held["verdict"]
    # Without a pull in any direction, pictures stay where they are.
    assert held["free_run"]["rmse"][-1] < 1e-3
    assert json.dumps({k: v for k, v in held.items() if k not in ("start", "end")})
    again = stability(wild, prior, z, quiet=True)
    assert again["response"] == away["response"] and torch.equal(again["end"], away["end"])
    with pytest.raises(ValueError, match="valid for the prior"):
        stability(Corrector(3, (8, 8), prior={"digest": "1"}), prior, z)
    with pytest.raises(ValueError, match="images must be at least 1"):
        stability(wild, prior, z[:0])


def test_a_free_run_that_diverges_or_saturates_is_no_hold():
    mean, still = {"cast": 0.1}, {"step": [0.0, 30, 60], "power_gained": [0.0, 0, 0]}
    common = {"mean": mean, "response": {"cast": [0.1]}, "times": [0.5], "statistics": "none"}
    for rmse, more, words in (
        ([0, 0.1, 0.13], {}, None),
        ([0, 0.1, 0.2], {}, r"move on and on \(RMSE 0.10, then 0.20\)"),
        ([0, 0.1, float("inf")], {}, "infinity"),
        ([0, 0.1, 0.13], {"saturation": [0.1, 0.2, 0.4]}, "saturate in 30%"),
        ([0, 0.1, 0.13], {"power_gained": [0, 0.3, 0.7]}, "gain 0.70 decades"),
    ):
        holds, said = verdict({**common, "free_run": {**still, "rmse": rmse, **more}})
        assert holds == (words is None)
        if words:
            assert re.search(words, said), said
    # At its beginning everything moves on.
    short = {**still, "step": [0.0, 10, 20], "rmse": [0, 0.08, 0.14]}
    assert verdict({**common, "free_run": short})[0]
    # In Eq. 10's normalised space b has the contrast of z_hat, whatever z's.
    common |= {"mean": {"cast": 0.1, "contrast": -0.03}, "free_run": {}}
    common["response"] = {"cast": [0.1], "contrast": [-0.03]}
    assert not verdict(common)[0] and verdict({**common, "statistics": "image"})[0]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> str:
    return worlds.write_world(tmp_path_factory.mktemp("world"))


def config(folder: Path, prior: Path, heldout: str) -> str:
    file = folder / "bias.yaml"
    given = {
        "model": {
            "prior": {
                "class_path": "lmc.priors.DiffusersPrior",
                "init_args": {"pretrained": str(prior)},
            }
        },
        "data": {"train": "none", "heldout": heldout},
    }
    file.write_text(yaml.safe_dump(given))
    return str(file)


def test_the_command_tests_a_release(world, tiny_prior_folder, tmp_path, capsys):
    file = config(tmp_path, tiny_prior_folder, f"{world}/heldout-*.tar")
    prior = DiffusersPrior(str(tiny_prior_folder))
    corrector = Corrector(3, (8, 8), prior=prior.identity)
    corrector.save_pretrained(tmp_path / "corrector")
    args = ["stability", file, "--images=3", "--steps=2", f"--out={tmp_path / 'out'}"]
    main([*args, f"--corrector={tmp_path / 'corrector'}"])
    said = capsys.readouterr().out
    result = json.loads((tmp_path / "out" / "stability.json").read_text())
    assert (tmp_path / "out" / "stability.png").exists()
    assert result["verdict"] in said and "t = 0.9" in said
    prior.to("cpu")
    images = next(iter(ImageStream(f"{world}/heldout-*.tar", 16, 3, training=False))).image
    wanted = stability(corrector, prior, images, steps=2, quiet=True)
    for name, values in wanted["response"].items():
        assert result["response"][name] == pytest.approx(values, rel=1e-4, abs=1e-5)
    main([*args, "--corrector=identity", "--steps=0"])
    capsys.readouterr()
    with pytest.raises(SystemExit, match="no released corrector at nowhere"):
        main([*args, "--corrector=nowhere"])


# ---------------------------------------------------------------------------------------------
# The excess over the floor


def test_the_excess_is_the_mean_over_pairs():
    residuals = torch.randn(4, 5, 3, 8, 8, generator=torch.Generator().manual_seed(0)).double()
    pairs = [(i, j) for i in range(4) for j in range(4) if i != j]
    wanted = sum((residuals[i] * residuals[j]).mean((1, 2, 3)) for i, j in pairs) / len(pairs)
    torch.testing.assert_close(excess_over_floor(list(residuals)), wanted)


def test_excess_and_floor_are_the_gaussian_priors(prior):
    """Var(ẑ | z) = (gain sigma_t)² and E ẑ = alpha_t gain z, frequency by frequency."""
    z, corrector = pictures(prior, 300), IdentityCorrector("none")
    keys = [str(i) for i in range(len(z))]
    x = heldout_triplets(prior, z, keys, prior.embed([""]))
    excess = heldout_excess(corrector, prior, x, keys, prior.embed([""]), 4)
    loss = corrector_loss(x.z, x.z_hat)
    alpha_t, sigma_t = prior.schedule.coefficients(x.t.double())
    gain = alpha_t * prior.spectrum / (alpha_t.square() * prior.spectrum + sigma_t.square())
    floor = (gain * sigma_t).square().mean((1, 2, 3))
    wanted = torch.fft.ifft2((1 - alpha_t * gain) * torch.fft.fft2(x.z.double())).real
    wanted = wanted.square().mean((1, 2, 3))
    # Four sigma of the means over 300 pictures.
    for found, true in ((excess, wanted), (loss - excess, floor)):
        error = (found - true).std() / len(z) ** 0.5
        assert (found - true).mean().abs() < 4 * error
        assert error < 0.1 * true.mean()
