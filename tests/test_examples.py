"""The examples run, on tiny random models; threestudio's base classes are stand-ins."""

import importlib.util
import json
import runpy
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
import yaml
from PIL import Image
from torch.nn import functional as F

from lmc.configs import build
from lmc.corrector import BiasCorrector, Corrector
from lmc.load import load_network
from lmc.losses import LMC, SDS, VSD, LossInputs, Weighting
from lmc.priors import DiffusersPrior, Embedding, Prior
from lmc.specs import denoiser_evaluations
from lmc.translator import Translator

from gaussian import GaussianPrior, power_spectrum

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
RELEASES = sorted(file.parent for file in ROOT.glob("tests/releases/*/*/config.json"))


def test_lmc_sds_in_a_loop_of_one_s_own(tiny_prior_folder, tmp_path):
    """As its docstring says; towards the prompt, from grey, with a released corrector."""
    identity = DiffusersPrior(str(tiny_prior_folder)).identity
    Corrector(3, [8, 8], prior=identity).save_pretrained(tmp_path / "corrector")
    args = [tiny_prior_folder, tmp_path / "corrector", "a photo of a dog", tmp_path / "a.png", 3]
    command = [sys.executable, EXAMPLES / "own_loop.py", *args]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    made = Image.open(tmp_path / "a.png")
    assert made.size == (16, 16) and len(set(made.convert("L").tobytes())) > 10
    lines = (EXAMPLES / "own_loop.py").read_text()
    assert "lightning" not in lines.lower()


@pytest.fixture
def examples(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    for name in ("own_loop", "own_loss", "own_prior"):
        monkeypatch.delitem(sys.modules, name, raising=False)


def test_a_loop_of_one_s_own_trains_a_loss_s_lora(examples, monkeypatch, tiny_prior_folder):
    import own_loop

    class Watched(VSD):
        def terms(self, prior, x):
            seen.append((x.progress, *(float(w.detach().abs().sum()) for w in self.lora.values())))
            return super().terms(prior, x)

    seen = []
    own_loop.optimise(DiffusersPrior(str(tiny_prior_folder)), Watched(), "a photo of a dog", 2)
    (began, *first), (goes_on, *second) = seen
    assert (began, goes_on) == (0, 0.5) and first != second


@pytest.mark.parametrize("name", ["red", "blue"])
def test_a_prior_of_one_s_own(examples, monkeypatch, capsys, name):
    """A training takes it, by its import path; it leads where its closed form says."""
    import own_prior

    prior = build(Prior, {"class_path": "own_prior.Colours"})
    torch.manual_seed(0)
    # The mean over draws of z_hat, of pure noise, is the colour.
    t = torch.full((64,), 0.97)
    _, z_hat = prior.predict(torch.randn(64, 3, 16, 16), t, prior.embed([name] * 64))
    colour = torch.tensor(own_prior.COLOURS[name])
    torch.testing.assert_close(z_hat.mean((0, 2, 3)), colour, atol=0.02, rtol=0)
    monkeypatch.setattr(sys, "argv", ["own_prior.py", name])
    runpy.run_path(str(EXAMPLES / "own_prior.py"), run_name="__main__")
    made = torch.tensor(json.loads(capsys.readouterr().out.removeprefix(f"{name}: ")))
    torch.testing.assert_close(made, colour, atol=0.15, rtol=0)


def test_a_loss_of_one_s_own(examples):
    """SDS where that is small; bounded, in its own direction, where it is not."""
    from own_loss import BoundedSDS

    torch.manual_seed(0)
    means = {name: torch.randn(3, 8, 8, dtype=torch.float64) for name in ("", "dog")}
    prior = GaussianPrior(means, power_spectrum(8))
    z, eps = torch.randn(2, 4, 3, 8, 8, dtype=torch.float64)
    t = torch.tensor([0.1, 0.3, 0.5, 0.9], dtype=torch.float64)
    x = LossInputs(z, t, eps, prior.embed([""] * 4), prior.embed(["dog"] * 4))
    plain = sum(SDS().terms(prior, x).values())
    size = plain.square().mean((1, 2, 3)).sqrt()
    bound = float(size.median())
    found = sum(BoundedSDS(bound=bound).terms(prior, x).values())
    sizes = found.square().mean((1, 2, 3)).sqrt()
    torch.testing.assert_close(sizes, size.clamp(max=bound))
    assert (size > bound * 1.01).any() and (size <= bound).any()
    torch.testing.assert_close(
        F.cosine_similarity(found.flatten(1), plain.flatten(1)).min(), size.new_tensor(1.0)
    )
    assert denoiser_evaluations(BoundedSDS, {"guidance_scale": 15.0})[0] == 2
    with pytest.raises(ValueError, match="bound must be above 0, got 0"):
        BoundedSDS(bound=0)


# ---------------------------------------------------------------------------------------------
# threestudio


class BaseGuidance:
    """What `DeepFloydGuidance` is to its heirs: it loads, and runs the U-Net."""

    @dataclass
    class Config:
        pretrained_model_name_or_path: str = "DeepFloyd/IF-I-XL-v1.0"
        guidance_scale: float = 20.0
        weighting_strategy: str = "sds"
        view_dependent_prompting: bool = True
        min_step_percent: float = 0.02
        max_step_percent: float = 0.98

    def __init__(self, prior: GaussianPrior, **options):
        self.cfg, self.prior, self.device = self.Config(**options), prior, "cpu"
        self.configure()

    def configure(self) -> None:
        self.alphas = self.prior.schedule.alphas_cumprod.float()
        config = SimpleNamespace(prediction_type="epsilon", num_train_timesteps=len(self.alphas))
        self.scheduler, self.num_train_timesteps = SimpleNamespace(config=config), len(self.alphas)
        self.min_step, self.max_step, self.grad_clip_val = 20, 980, None

    def forward_unet(self, latents, t, encoder_hidden_states):
        embedding = Embedding({"mean": encoder_hidden_states})
        eps, _ = self.prior.predict(latents, t / self.num_train_timesteps, embedding)
        return torch.cat([eps, torch.full_like(eps, 9.0)], 1)  # and a variance, which is not used


@pytest.fixture
def extension(monkeypatch):
    """The extension, imported as threestudio does; what it registers, and what it warns of."""
    found = SimpleNamespace(registered={}, warned=[])
    path = "threestudio.models.guidance.deep_floyd_guidance"
    for i in range(1, path.count(".") + 2):
        name = ".".join(path.split(".")[:i])
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    sys.modules[path].DeepFloydGuidance = BaseGuidance
    studio = sys.modules["threestudio"]
    studio.register = lambda name: lambda cls: found.registered.setdefault(name, cls)
    studio.warn = found.warned.append
    folder = EXAMPLES / "threestudio/custom/threestudio-lmc"
    name = "threestudio_lmc"
    places = {"submodule_search_locations": [str(folder)]}
    spec = importlib.util.spec_from_file_location(name, folder / "__init__.py", **places)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    found.corrector = sys.modules[f"{name}.corrector"].Corrector
    yield found
    for each in [each for each in sys.modules if each.startswith(f"{name}.")]:
        del sys.modules[each]


@pytest.fixture(scope="module")
def prior() -> GaussianPrior:
    generator = torch.Generator().manual_seed(1)
    means = {name: torch.randn(3, 64, 64, generator=generator) for name in ("", "dog")}
    return GaussianPrior(means, power_spectrum(64))


def of_prior(prior: GaussianPrior) -> dict:
    index = prior.schedule.timestep(torch.linspace(0, 1, 11, dtype=torch.float64))
    alphas = [float(f"{x:.6g}") for x in prior.schedule.alphas_cumprod[index].tolist()]
    schedule = {"kind": "ddpm", "steps": 1000, "alphas_cumprod": alphas}
    return {"pretrained": "some/prior", "prediction_type": "epsilon", "schedule": schedule}


@pytest.mark.parametrize("folder", RELEASES, ids=lambda x: f"{x.parent.name} {x.name}")
def test_threestudio_s_corrector_is_ours(extension, folder):
    """Every kind and format of release, without lmc."""
    network = load_network(str(folder))
    if isinstance(network, Translator):
        with pytest.raises(ValueError, match="is no released corrector"):
            extension.corrector(folder)
        return
    assert isinstance(network, BiasCorrector)
    z, z_hat = torch.randn(2, 3, network.arguments["channels"], 8, 8)
    t = torch.tensor([0.03, 0.4, 0.99])
    with torch.no_grad():
        torch.testing.assert_close(
            extension.corrector(folder)(z, t, z_hat), network.correct(z, t, z_hat)
        )


@pytest.mark.parametrize(
    ("strategy", "weighting"),
    [("uniform", "one"), ("sds", "dreamfusion"), ("fantasia3d", "fantasia3d")],
)
@pytest.mark.parametrize("chain_alpha", [True, False])
def test_threestudio_s_gradient_is_ours(
    extension, prior, tmp_path, strategy: str, weighting: Weighting, chain_alpha
):
    torch.manual_seed(0)
    network = Corrector(3, [8, 8], prior=of_prior(prior))
    network.save_pretrained(tmp_path / "corrector")
    guidance = extension.registered["lmc-guidance"](
        prior,
        corrector=str(tmp_path / "corrector"),
        pretrained_model_name_or_path="some/prior",
        guidance_scale=7.0,
        weighting_strategy=strategy,
        chain_alpha=chain_alpha,
    )
    assert not extension.warned
    rgb = torch.rand(2, 80, 96, 3, requires_grad=True)
    means = torch.stack([prior.means["dog"]] * 2 + [prior.means[""]] * 2)
    prompts = SimpleNamespace(use_perp_neg=False, get_text_embeddings=lambda *_: means)
    torch.manual_seed(3)
    result = guidance(rgb, prompts, torch.zeros(2), torch.zeros(2), torch.ones(2))
    (found,) = torch.autograd.grad(result["loss_sds"], rgb)
    # The same draws, through lmc.
    torch.manual_seed(3)
    t = torch.randint(20, 981, [2]) / 1000
    z = F.interpolate(rgb.permute(0, 3, 1, 2) * 2 - 1, (64, 64), mode="bilinear")
    loss = LMC(network, 7.0, weighting, chain_alpha, rescale=False)
    inputs = LossInputs(
        z.detach(), t, torch.randn_like(z), prior.embed([""] * 2), prior.embed(["dog"] * 2)
    )
    gradient = loss(prior, inputs).total
    (expected,) = torch.autograd.grad((gradient * z).sum() / 2, rgb)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))
    torch.testing.assert_close(result["grad_norm"], gradient.norm(), rtol=1e-4, atol=0)


def test_threestudio_refuses_another_prior(extension, prior, tmp_path):
    def guidance(**about):
        Corrector(3, [8, 8], prior={**of_prior(prior), **about}).save_pretrained(tmp_path)
        return extension.registered["lmc-guidance"](prior, corrector=str(tmp_path))

    guidance()
    assert "trained with some/prior, the guidance uses DeepFloyd" in extension.warned[0]
    with pytest.raises(ValueError, match="predicts v_prediction, this one predicts epsilon"):
        guidance(prediction_type="v_prediction")
    with pytest.raises(ValueError, match="another noise schedule"):
        guidance(schedule={"alphas_cumprod": [0.9 - k / 20 for k in range(11)]})
    with pytest.raises(ValueError, match=r"system\.guidance\.corrector has to name"):
        extension.registered["lmc-guidance"](prior)
    made = guidance()
    perp = SimpleNamespace(use_perp_neg=True)
    with pytest.raises(ValueError, match="no perp-neg"):
        made(torch.rand(1, 8, 8, 3), perp, None, None, None)


def test_threestudio_s_config_names_what_there_is(extension):
    file = EXAMPLES / "threestudio/custom/threestudio-lmc/configs/lmc-if.yaml"
    system = yaml.safe_load(file.read_text())["system"]
    guidance = extension.registered[system["guidance_type"]]
    assert system["guidance"].keys() <= vars(guidance.Config()).keys()
