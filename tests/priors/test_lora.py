"""The LoRA that VSD trains: on real denoisers, and in a run that is stopped and gone on with."""

import warnings
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DModel
from peft.tuners.tuners_utils import BaseTunerLayer

import train_translator
from lmc.losses import DMD, VSD, LossInputs
from lmc.priors import DiffusersPrior

import worlds

FAMILIES = ["if", "sd15", "sdxl", "sd35", "dit"]


def inputs(prior: DiffusersPrior, prompts: list[str], seed: int = 0) -> LossInputs:
    generator = torch.Generator().manual_seed(seed)
    side = prior.image_size // (4 if prior.latent else 1)
    z, eps = torch.randn(2, 2, prior.channels, side, side, generator=generator)
    null, target = prior.embed(["", ""]), prior.embed(prompts)
    return LossInputs(z, torch.tensor([0.3, 0.7]), eps, null, target)


def loaded(folder: Path, **options) -> DiffusersPrior:
    prior = DiffusersPrior(str(folder), **options)
    prior.to("cpu")
    return prior


@pytest.mark.parametrize("name", FAMILIES)
def test_a_lora_learns_and_the_prior_stays_as_it_was(family_folder, name):
    """Untrained it changes nothing, trained it does; `predict` never sees it; no second copy."""
    prior = loaded(family_folder(name))
    x = inputs(prior, ["lion", "tabby"] if name == "dit" else ["a photo of a cat", "a dog"])
    before = prior.predict(x.z, x.t, x.target)[0]
    count = sum(p.numel() for p in prior._denoiser.parameters())
    vsd = VSD(lora_lr=1e-2)
    vsd.prepare(prior, "cpu")
    added = sum(p.numel() for p in vsd.lora.values())
    assert sum(p.numel() for p in prior._denoiser.parameters()) == count + added
    assert {p.dtype for p in vsd.lora.values()} == {torch.float32}
    trainable = {id(p) for p in prior._denoiser.parameters() if p.requires_grad}
    assert trainable == {id(p) for p in vsd.lora.values()}
    with torch.no_grad():
        torch.testing.assert_close(prior.predict_lora(x.z, x.t, x.target)[0], before)

    def error() -> float:
        with torch.no_grad():
            alpha_t, sigma_t = prior.schedule.coefficients(x.t)
            z_t = alpha_t * x.z + sigma_t * x.eps
            return (prior.predict_lora(z_t, x.t, x.target)[0] - x.eps).square().mean().item()

    start = error()
    for _ in range(10):
        vsd.learn(prior, x)
    assert error() < 0.999 * start
    assert torch.equal(prior.predict(x.z, x.t, x.target)[0], before)


@pytest.mark.parametrize("name", ["if", "sd35"])
def test_a_copy_of_the_denoiser_learns_in_the_place_of_a_lora(family_folder, name):
    """In float32, beside a prior in bfloat16 that stays as it was."""
    prior = loaded(family_folder(name), dtype="bfloat16")
    x = inputs(prior, ["a photo of a cat", "a dog"])
    before = prior.predict(x.z, x.t, x.target)[0]
    dmd = DMD(lora_rank=None, lora_lr=1e-3)
    dmd.prepare(prior, "cpu")
    assert {weight.dtype for weight in dmd.lora.values()} == {torch.float32}
    assert not any(weight.requires_grad for weight in prior._denoiser.parameters())

    def error() -> float:
        alpha_t, sigma_t = prior.schedule.coefficients(x.t)
        with torch.no_grad():
            eps, _ = prior.predict_lora(alpha_t * x.z + sigma_t * x.eps, x.t, x.target)
        return (eps - x.eps).square().mean().item()

    start = error()
    for _ in range(5):
        dmd.learn(prior, x)
    assert error() < 0.99 * start
    assert torch.equal(prior.predict(x.z, x.t, x.target)[0], before)
    assert dmd(prior, x).total.isfinite().all()
    vsd = VSD()
    vsd.prepare(prior, "cpu")  # a LoRA takes the copy's place
    assert len(vsd.lora) != len(dmd.lora)
    torch.testing.assert_close(prior.predict_lora(x.z, x.t, x.target)[0], before)


def test_a_denoiser_without_attention_takes_no_lora(family_folder):
    prior = loaded(family_folder("ddpm"))
    prior._denoiser = UNet2DModel(
        sample_size=16,
        block_out_channels=(8, 8),
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
        add_attention=False,
    )
    with pytest.raises(ValueError, match="no LoRA fits the denoiser"):
        VSD().prepare(prior, "cpu")


def test_predict_lora_says_what_to_call_first(tiny_prior_folder):
    prior = loaded(tiny_prior_folder)
    x = inputs(prior, ["a cat", "a dog"])
    with pytest.raises(RuntimeError, match="add_lora"):
        prior.predict_lora(x.z, x.t, x.target)


def test_a_lora_begins_the_same_whatever_was_drawn_before(tiny_prior_folder):
    starts = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        starts.append(loaded(tiny_prior_folder).add_lora(4))
    for name, weight in starts[0].items():
        assert torch.equal(weight, starts[1][name])
    assert any(weight.abs().max() > 0 for weight in starts[0].values())


def test_the_text_has_its_lora_too(tiny_prior_folder):
    """DeepFloyd's attention takes the text through projections of other names."""
    names = loaded(tiny_prior_folder).add_lora(4)
    assert any("add_k_proj" in name for name in names)


def test_a_lora_beside_a_bfloat16_prior_learns_in_float32(tiny_prior_folder):
    prior = loaded(tiny_prior_folder, dtype="bfloat16")
    x = inputs(prior, ["a cat", "a dog"])
    vsd = VSD(lora_lr=0.01)
    vsd.prepare(prior, "cpu")
    vsd.learn(prior, x)
    assert {weight.dtype for weight in vsd.lora.values()} == {torch.float32}
    total = vsd(prior, x).total
    assert total.dtype == torch.float32 and total.isfinite().all()


@pytest.mark.parametrize("name", FAMILIES)
def test_a_second_lora_takes_the_place_of_the_first(family_folder, name):
    """As on a prior that never had another; peft, which warns of two on one model, has no cause."""
    alone, prior = loaded(family_folder(name)), loaded(family_folder(name))
    x = inputs(prior, ["lion", "tabby"] if name == "dit" else ["a cat", "a dog"])
    before = prior.predict(x.z, x.t, x.target)[0]
    learned = {}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for rank in (4, 2):
            vsd = VSD(lora_rank=rank, lora_lr=0.1)
            vsd.prepare(prior, "cpu")
            torch.testing.assert_close(prior.predict_lora(x.z, x.t, x.target)[0], before)
            vsd.learn(prior, x)
            learned[rank] = prior.predict_lora(x.z, x.t, x.target)[0]
            assert torch.equal(prior.predict(x.z, x.t, x.target)[0], before)
    second = VSD(lora_rank=2, lora_lr=0.1)
    second.prepare(alone, "cpu")
    second.learn(alone, x)
    assert torch.equal(alone.predict_lora(x.z, x.t, x.target)[0], learned[2])
    there = {name: tuple(weight.shape) for name, weight in prior._denoiser.named_parameters()}
    assert there == {n: tuple(weight.shape) for n, weight in alone._denoiser.named_parameters()}
    layers = [each for each in prior._denoiser.modules() if isinstance(each, BaseTunerLayer)]
    assert layers and all([*each.lora_A] == ["lora"] for each in layers)
    assert not torch.equal(learned[2], before) and not torch.equal(learned[2], learned[4])


def test_a_run_with_vsd_goes_on_with_its_lora(tiny_prior_folder, tmp_path):
    """Four steps at once and two times two end with the same weights, the LoRA's and Adam's too."""
    data = worlds.write_world(tmp_path / "data")

    def train(run: str, steps: int) -> dict:
        args = worlds.translator_args(tiny_prior_folder, data, tmp_path / run, "VSD")
        args += ["--model.loss.init_args.lora_lr=0.01", f"--trainer.max_steps={steps}"]
        train_translator.main(args)
        file = tmp_path / run / "checkpoints" / "last.ckpt"
        return torch.load(file, weights_only=True)

    straight = train("straight", 4)
    half = train("halves", 2)
    whole = train("halves", 4)
    assert straight["loss"]["name"] == "vsd"
    for name, weight in straight["loss"]["state"]["lora"].items():
        assert torch.equal(weight, whole["loss"]["state"]["lora"][name])
        assert "lora_B" not in name or not torch.equal(weight, half["loss"]["state"]["lora"][name])
    for name, weight in straight["state_dict"].items():
        assert torch.equal(weight, whole["state_dict"][name]), name
    assert not any("lora" in name for name in straight["state_dict"])
    other = worlds.translator_args(tiny_prior_folder, data, tmp_path / "halves", "SDS")
    other += ["--trainer.max_steps=6"]
    with pytest.raises(SystemExit, match=r"model\.loss\.class_path was 'lmc.VSD' and is 'lmc.SDS'"):
        train_translator.main(other)
