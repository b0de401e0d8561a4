"""DiffusersPrior on every family of pipelines, against the pipelines themselves. No network."""

import gc
import inspect
import json
import os
import shutil
import sys
import weakref
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import diffusers
import huggingface_hub
import pytest
import torch
import transformers
from diffusers import AutoencoderKL, AutoencoderTiny, DiffusionPipeline
from huggingface_hub.errors import GatedRepoError
from safetensors.torch import load_file, save_file

import lmc.priors.weights
import train_bias
import train_translator
from lmc.load import load_network
from lmc.priors import DiffusersPrior, Embedding, check_identity
from lmc.priors.weights import weight_files, weights_digest
from lmc.training.bias import CorrectorTraining
from lmc.training.translator import TranslatorTraining

import families
import worlds
from gaussian import small_prior
from worlds import release

TEXT = ["if", "sd15", "sd21-base", "sd21", "sdxl", "sd35"]
LATENT = ["sd15", "sd21-base", "sd21", "sdxl", "sd35", "dit"]
ALL = [*TEXT, "ddpm", "dit"]
PROMPTS = {"ddpm": "3", "dit": "lion"} | dict.fromkeys(TEXT, "a photo of a cat")
LONG = "a photo of a dog and a cat " * 5


def loaded(folder: Path, **options: Any) -> DiffusersPrior:
    prior = DiffusersPrior(str(folder), **options)
    prior.to("cpu")
    return prior


def copy(folder: Path, tmp_path: Path) -> Path:
    """A copy to be broken; files keep their times."""
    return Path(shutil.copytree(folder, tmp_path / "prior"))


def edit(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def pipeline_of(folder: Path) -> Any:
    options = {"safety_checker": None} if "if" in str(folder.name) else {}
    pipeline = DiffusionPipeline.from_pretrained(folder, **options)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def watch(module: torch.nn.Module) -> list[tuple[dict[str, Any], torch.Tensor]]:
    """Fills with the arguments by name, and the output, of each call of a denoiser."""
    calls: list[tuple[dict[str, Any], torch.Tensor]] = []
    names = inspect.signature(module.forward)

    def note(module, args, kwargs, output):
        given = names.bind(*args, **kwargs).arguments
        calls.append(({k: v for k, v in given.items() if v is not None}, output[0]))

    module.register_forward_hook(note, with_kwargs=True)
    return calls


def noisy(prior: DiffusersPrior, count: int, seed: int = 0) -> torch.Tensor:
    """Random numbers of the shape of z_t, float32."""
    side = prior.image_size // (4 if prior.latent else 1)
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, prior.channels, side, side, generator=generator)


@pytest.mark.parametrize("name", [*TEXT, "ddpm", "dit"])
def test_predictions_are_the_pipelines_own_schedulers_on_its_whole_grid(family_folder, name):
    """In float64, given the same raw output; each scheduler in its own space and at each stop."""
    prior = loaded(family_folder(name))
    calls = watch(prior._denoiser)
    scheduler_class = getattr(diffusers, prior.index["scheduler"][1])
    if name == "sd15":  # PNDM's own step mixes several outputs; DDIM reads the same config
        scheduler_class = diffusers.DDIMScheduler
    scheduler = scheduler_class.from_pretrained(
        prior.folder, subfolder="scheduler", clip_sample=False, timestep_spacing="linspace"
    )
    x = noisy(prior, 1000).double()  # float32 numbers: schedulers that round to that change none
    flow, euler = name == "sd35", name == "sdxl"
    if flow:
        # Its own shifted sigmas; continuous times, no index.
        times = scheduler.timesteps.double() / 1000
        assert (times.diff() < 0).all() and times[500] > 0.7
        torch.testing.assert_close(
            prior.schedule.timestep(times).float(), scheduler.timesteps, rtol=1e-6, atol=0
        )
        z_t, sigmas = x, torch.cat([times, torch.zeros(1)])
    else:
        scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
        scheduler.set_timesteps(1000)
        order = scheduler.timesteps.long()
        assert order.tolist() == list(range(999, -1, -1))
        times, z_t = order.double() / 1000, x
        if euler:  # its space: z + sigma eps
            alpha_bar = scheduler.alphas_cumprod[order]
            sigmas = torch.cat([((1 - alpha_bar) / alpha_bar).sqrt(), torch.zeros(1)])
            z_t = x / (sigmas[:-1].view(-1, 1, 1, 1).square() + 1).sqrt()
    rows = prior.embed([PROMPTS[name]]).expand(1000)
    eps, z_hat = prior.predict(z_t, times, rows)
    assert eps.dtype == z_hat.dtype == torch.float64
    raw = calls[0][1][:, : prior.channels].double()
    exact = {"rtol": 1e-10, "atol": 1e-10}
    if flow:
        scheduler.sigmas = sigmas
        stepped = []
        for i in range(1000):
            scheduler._step_index = i
            stepped.append(scheduler.step(raw[i], scheduler.timesteps[i], x[i]).prev_sample)
        for sigma, wanted in ((sigmas[:-1], x), (sigmas[1:], torch.stack(stepped))):
            sigma = sigma.view(-1, 1, 1, 1)
            torch.testing.assert_close((1 - sigma) * z_hat + sigma * eps, wanted, **exact)
        return
    if euler:
        scheduler.sigmas = sigmas
    alpha_bar = scheduler.alphas_cumprod[order].view(-1, 1, 1, 1)
    # In z_t there is nothing but z_hat and eps.
    again = alpha_bar.sqrt() * z_hat + (1 - alpha_bar).sqrt() * eps
    torch.testing.assert_close(again, z_t, **exact)
    if prior.prediction_type == "v_prediction":
        torch.testing.assert_close(scheduler.get_velocity(z_hat, eps, order), raw, **exact)
    if name == "if":  # its step splits the variance off itself
        raw = calls[0][1].double()
    wanted = [
        scheduler.step(raw[i : i + 1], index, x[i : i + 1]).pred_original_sample
        for i, index in enumerate(scheduler.timesteps)
    ]
    torch.testing.assert_close(z_hat, torch.cat(wanted), **exact)


@pytest.mark.parametrize("name", [*TEXT, "dit"])
def test_the_denoiser_is_asked_what_the_pipeline_asks_it(family_folder, name):
    """The pipeline generates, with guidance; the prior is given its z_t, times and prompts."""
    pipeline = pipeline_of(family_folder(name))
    theirs = watch(pipeline.transformer if name in ("sd35", "dit") else pipeline.unet)
    torch.manual_seed(0)
    options = {"num_inference_steps": 3, "guidance_scale": 5.0}
    if name == "dit":
        pipeline(class_labels=pipeline.get_label_ids(["lion"]), output_type="pt", **options)
    else:
        output = "pt" if name == "if" else "latent"
        pipeline(PROMPTS[name], output_type=output, **options)
    prior = loaded(family_folder(name))
    mine = watch(prior._denoiser)
    null, prompt = prior.embed(["", PROMPTS[name]])[torch.tensor([0])], prior.embed([PROMPTS[name]])
    rows = Embedding.cat([prompt, null] if name == "dit" else [null, prompt])
    assert len(theirs) >= 3
    for asked, answer in theirs:
        z_t = asked.get("sample", asked.get("hidden_states"))
        timestep = asked["timestep"].double().expand(2)
        prior.predict(z_t, timestep / 1000, rows)
        given, output = mine[-1]
        assert torch.allclose(given["timestep"].double(), timestep, rtol=1e-6)
        wanted = {"encoder_hidden_states", "pooled_projections", "added_cond_kwargs"}
        wanted = (wanted | {"class_labels", "sample", "hidden_states"}) & set(asked)
        assert wanted | {"timestep", "return_dict"} == set(given) | {"return_dict"}
        for key in wanted:
            torch.testing.assert_close(given[key], asked[key], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(output, answer, rtol=1e-4, atol=1e-4)
    halves = theirs[0][1].chunk(2)
    assert (halves[0] - halves[1]).abs().max() > 1e-3  # or the test could not tell prompts apart


def test_a_unets_classes_reach_it_as_numbers(family_folder):
    """DDPMPipeline itself gives none."""
    prior = loaded(family_folder("ddpm"))
    z_t, t = noisy(prior, 3), torch.tensor([0.2, 0.5, 0.8])
    unet = diffusers.UNet2DModel.from_pretrained(family_folder("ddpm"), subfolder="unet")
    with torch.no_grad():
        raw = unet(z_t, torch.tensor([200, 500, 800]), class_labels=torch.tensor([5, 0, 4])).sample
    scheduler = diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2")
    alpha_t = scheduler.alphas_cumprod[[200, 500, 800]].sqrt().view(-1, 1, 1, 1)
    wanted = alpha_t * z_t - (1 - alpha_t.square()).sqrt() * raw
    _, z_hat = prior.predict(z_t, t, prior.embed(["", "0", "4"]))
    torch.testing.assert_close(z_hat, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", TEXT)
def test_embeddings_are_those_of_the_pipelines_encode_prompt(family_folder, name):
    prompts = ["a photo of a cat", "  A Dog", LONG]
    pipeline = pipeline_of(family_folder(name))
    more = {"prompt_2": None, "prompt_3": None} if name == "sd35" else {}
    with torch.no_grad():
        found = pipeline.encode_prompt(
            prompts,
            device="cpu",
            num_images_per_prompt=1,
            do_classifier_free_guidance=True,
            **more,
        )
    rows = DiffusersPrior(str(family_folder(name))).embed([*prompts, ""]).tensors
    pooled = {"sdxl": "text_embeds", "sd35": "pooled_projections"}.get(name)
    names = ["encoder_hidden_states", *([pooled] if pooled else [])]
    assert set(rows) == {*names, *(["time_ids"] if name == "sdxl" else [])}
    for given, (wanted, negative) in zip(
        map(rows.get, names), zip(found[::2], found[1::2], strict=True), strict=True
    ):
        assert given.dtype == torch.float32 and not given.requires_grad
        torch.testing.assert_close(given, torch.cat([wanted, negative[:1]]), rtol=1e-5, atol=1e-5)
        assert not torch.equal(given[0], given[1])


def test_sdxls_empty_prompt_is_zeros_only_where_its_index_says_so(family_folder, tmp_path):
    def hidden_and_pooled(folder):
        rows = DiffusersPrior(str(folder)).embed([""]).tensors
        return rows["encoder_hidden_states"], rows["text_embeds"]

    assert not any(value.any() for value in hidden_and_pooled(family_folder("sdxl")))
    folder = copy(family_folder("sdxl"), tmp_path)
    hidden_and_pooled(folder)
    edit(folder / "model_index.json", force_zeros_for_empty_prompt=False)
    assert all(value.any() for value in hidden_and_pooled(folder))


@pytest.mark.parametrize("name", ["sd15", "sdxl", "sd35"])
def test_with_a_warm_cache_no_text_encoder_is_opened(family_folder, tmp_path, name):
    folder = copy(family_folder(name), tmp_path)
    prior = DiffusersPrior(str(folder), cache_dir=str(tmp_path / "cache"))
    first = prior.embed(["", "a cat"])
    for part in prior.family.text_parts:
        for file in (folder / part).iterdir():  # spoiled, with its size and time as before
            stat = file.stat()
            file.write_bytes(b"\xff" * stat.st_size)
            os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    again = DiffusersPrior(str(folder), cache_dir=str(tmp_path / "cache"))
    for key, value in again.embed(["a cat", ""]).tensors.items():
        assert torch.equal(value.flip(0), first.tensors[key])
    with pytest.raises(Exception, match=r"."):
        again.embed(["a dog"])


def test_text_encoders_are_freed(family_folder, tmp_path, monkeypatch):
    alive = []
    for encoder in (transformers.CLIPTextModelWithProjection, transformers.T5EncoderModel):
        right = encoder.from_pretrained

        def load(*args, right=right, **options):
            model = right(*args, **options)
            alive.append(weakref.ref(model))
            return model

        monkeypatch.setattr(encoder, "from_pretrained", load)
    prior = DiffusersPrior(str(family_folder("sd35")), cache_dir=str(tmp_path))
    prior.embed(["", "a cat"])
    gc.collect()
    assert [ref() for ref in alive] == [None] * 3


@pytest.mark.parametrize("name", LATENT)
def test_z_is_the_scaled_mode_of_the_vaes_latents(family_folder, name):
    prior = loaded(family_folder(name))
    vae = AutoencoderKL.from_pretrained(family_folder(name), subfolder="vae").eval()
    image = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        moments = vae.encoder(image)
        moments = vae.quant_conv(moments) if vae.quant_conv is not None else moments
        mean = moments[:, : prior.channels]
        scale, shift = {"sdxl": (0.13025, 0), "sd35": (1.5305, 0.0609)}.get(name, (0.18215, 0))
        z = prior.encode(image)
        torch.testing.assert_close(z, (mean - shift) * scale, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(prior.decode(z), vae.decode(mean).sample, rtol=1e-4, atol=1e-5)
    assert z.shape == (2, prior.channels, 8, 8) and z.dtype == torch.float32
    assert prior.latent and prior.image_size == 32
    identity = json.loads(json.dumps(prior.identity))
    assert (identity["latent_scale"], identity["latent_shift"]) == (scale, shift)


@pytest.mark.parametrize("name", ["sd15", "sd35"])
def test_a_gradient_reaches_the_pixels_through_the_vae(family_folder, name):
    """The same as without checkpointing; and the encoder's blocks are indeed run twice."""
    prior = loaded(family_folder(name))
    vae = AutoencoderKL.from_pretrained(family_folder(name), subfolder="vae").eval()
    image = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    image.requires_grad_()
    runs = []
    block = prior._vae.encoder.down_blocks[0]
    block.register_forward_pre_hook(lambda *_: runs.append(torch.is_grad_enabled()))
    with torch.autocast("cpu", torch.bfloat16):  # as in training; the VAE keeps its precision
        z = prior.encode(image)
    gradient = torch.randn(z.shape, generator=torch.Generator().manual_seed(1))
    forwards = len(runs)
    (mine,) = torch.autograd.grad((gradient * z).sum(), image)
    assert len(runs) == 2 * forwards
    wanted_z = (vae.encode(image).latent_dist.mode() - prior.latent_shift) * prior.latent_scale
    (wanted,) = torch.autograd.grad((gradient * wanted_z).sum(), image)
    largest = wanted.abs().max().item()
    assert largest > 1e-4
    torch.testing.assert_close(mine, wanted, rtol=0, atol=1e-4 * largest)
    assert not prior.encode(image.detach()).requires_grad  # stage one keeps no graph


@pytest.mark.parametrize(("upcast", "dtype"), [(True, torch.float32), (False, torch.bfloat16)])
def test_a_vae_that_asks_for_float32_gets_it(family_folder, tmp_path, upcast, dtype):
    folder = copy(family_folder("sdxl"), tmp_path)
    edit(folder / "vae" / "config.json", force_upcast=upcast)
    prior = loaded(folder, dtype="bfloat16")
    assert {p.dtype for p in prior._denoiser.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in prior._vae.parameters()} == {dtype}
    image = torch.rand(1, 3, 32, 32) * 2 - 1
    z = prior.encode(image)
    assert z.dtype == prior.decode(z).dtype == torch.float32
    eps, z_hat = prior.predict(z, torch.tensor([0.5]), prior.embed([""]))
    assert eps.dtype == z_hat.dtype == torch.float32
    wanted = loaded(family_folder("sdxl")).encode(image)
    assert torch.equal(z, wanted) == upcast


@pytest.fixture(scope="module")
def tiny_vae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An AutoencoderTiny in a folder of its own, of four times as many pixels a side as latents."""
    folder = tmp_path_factory.mktemp("vae")
    with torch.random.fork_rng():
        torch.manual_seed(3)
        blocks = {"num_encoder_blocks": (1, 1, 1), "num_decoder_blocks": (1, 1, 1)}
        widths = {f"{x}coder_block_out_channels": (8, 8, 8) for x in ("en", "de")}
        AutoencoderTiny(**blocks, **widths).save_pretrained(folder)
    return folder


def test_another_vae_in_place_of_the_pipelines(family_folder, tiny_vae):
    """Its latents are z, as they are; with a gradient; and it makes another prior."""
    folder = family_folder("sd15")
    prior, own = loaded(folder, vae=str(tiny_vae)), loaded(folder)
    vae = AutoencoderTiny.from_pretrained(tiny_vae).eval()
    image = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    image.requires_grad_()
    z = prior.encode(image)
    wanted = vae.encode(image).latents
    torch.testing.assert_close(z, wanted)
    torch.testing.assert_close(prior.decode(z), vae.decode(wanted).sample)
    gradient = torch.randn(z.shape, generator=torch.Generator().manual_seed(1))
    mine, expected = (torch.autograd.grad((gradient * x).sum(), image)[0] for x in (z, wanted))
    assert expected.abs().max() > 1e-4
    torch.testing.assert_close(mine, expected)
    assert prior.image_size == own.image_size == 32
    with pytest.raises(ValueError, match="vae"):
        check_identity(own.identity, prior.identity)
    # The denoiser is the same.
    t, text = torch.tensor([0.3, 0.6]), prior.embed(["", "a cat"])
    z = z.detach()
    torch.testing.assert_close(prior.predict(z, t, text), own.predict(z, t, text))


def test_a_vae_that_does_not_fit_is_refused(family_folder, tiny_vae, tmp_path):
    with pytest.raises(ValueError, match="a prior of pixels, without a VAE"):
        DiffusersPrior(str(family_folder("if")), vae=str(tiny_vae))
    with pytest.raises(FileNotFoundError, match="no such folder: /no/vae"):
        DiffusersPrior(str(family_folder("sd15")), vae="/no/vae")
    with pytest.raises(ValueError, match="latents have 4 channels, the denoiser takes 16"):
        DiffusersPrior(str(family_folder("sd35")), vae=str(tiny_vae))
    folder = copy(tiny_vae, tmp_path)
    (folder / "diffusion_pytorch_model.safetensors").unlink()
    prior = DiffusersPrior(str(family_folder("sd15")), vae=str(folder))
    with pytest.raises(FileNotFoundError, match=r"no \*\.safetensors"):
        prior.to("cpu")


def test_what_the_vae_costs_is_the_users_choice(family_folder):
    """In one piece, without a third pass, in another dtype: the same z."""
    folder = family_folder("sd15")
    image = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    wanted = loaded(folder).encode(image)
    prior = loaded(folder, vae_slicing=False, vae_checkpointing=False)
    runs = []
    block = prior._vae.encoder.down_blocks[0]
    block.register_forward_pre_hook(lambda module, inputs: runs.append(len(inputs[0])))
    z = prior.encode(image.clone().requires_grad_())
    z.sum().backward()
    assert runs == [2]
    torch.testing.assert_close(z.detach(), wanted, rtol=1e-4, atol=1e-5)
    half = loaded(folder, dtype="bfloat16", vae_dtype="bfloat16")
    assert {p.dtype for p in half._vae.parameters()} == {torch.bfloat16}
    assert (half.encode(image) - wanted).abs().max() < 0.05 * wanted.abs().max()
    with pytest.raises(ValueError, match="unknown vae_dtype 'int8'"):
        DiffusersPrior(str(folder), vae_dtype="int8")


def test_the_vae_and_the_denoiser_are_frozen_and_in_eval_mode(family_folder):
    prior = loaded(family_folder("dit"))
    for model in (prior._denoiser, prior._vae):
        assert not any(module.training for module in model.modules())
        assert not any(parameter.requires_grad for parameter in model.parameters())


def test_latent_priors_say_what_to_call_first(family_folder):
    prior = DiffusersPrior(str(family_folder("sd15")))
    for use in (prior.encode, prior.decode):
        with pytest.raises(RuntimeError, match=r"prior\.to"):
            use(torch.zeros(1, 3, 32, 32))


@pytest.mark.parametrize("channels_last", [True, False])
def test_memory_format_and_compilation_are_options(family_folder, monkeypatch, channels_last):
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, mode: compiled.append(self))
    prior = loaded(family_folder("sd15"), channels_last=channels_last)
    assert not compiled
    for weight in (prior._denoiser.conv_in.weight, prior._vae.encoder.conv_in.weight):
        assert weight.is_contiguous(memory_format=torch.channels_last) == channels_last
    prior = loaded(family_folder("sd15"), compile=True)
    prior.to("cpu")
    assert compiled == [prior._denoiser]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return worlds.write_world(tmp_path_factory.mktemp("world"))


@pytest.mark.parametrize("name", ALL)
def test_both_stages_train_with_every_family(family_folder, data, tmp_path, name):
    once = ["--trainer.max_steps=1", "--trainer.val_check_interval=1", "--save_every=1"]
    prior, bias = family_folder(name), tmp_path / "bias"
    train_bias.main(worlds.bias_args(prior, data, bias, *once))
    release(bias, tmp_path / "corrector")
    corrector = load_network(str(tmp_path / "corrector"))
    latent = name in LATENT
    assert corrector.unet.bounded is not latent
    assert corrector.unet.last.out_channels == {"sd35": 16}.get(name, 4 if latent else 3)

    more = [f"--model.loss.init_args.corrector={tmp_path}/corrector"]
    if name == "dit":
        more += ["--model.prompt={}", "--model.source=tabby", "--model.classes=[lion,bruin]"]
    elif name == "ddpm":
        more += ["--model.prompt={}", "--model.source=0", "--model.classes=['1','2']"]
    args = worlds.translator_args(prior, data, tmp_path / "run", "LMC", *more, *once)
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        right = TranslatorTraining.training_step

        def step(self, batch, index):
            before = [p.detach().clone() for p in self.network.parameters()]
            loss = right(self, batch, index)
            seen.append((self, before, loss))
            return loss

        patch.setattr(TranslatorTraining, "training_step", step)
        train_translator.main(args)
    ((module, before, loss),) = seen
    assert loss.isfinite()
    after = list(module.network.parameters())
    assert all(p.isfinite().all() for p in after)
    assert any(not torch.equal(p, q) for p, q in zip(after, before, strict=True))


def test_whether_the_corrector_is_bounded_can_be_said(family_folder):
    prior = small_prior()
    assert CorrectorTraining(prior, widths=(4, 4)).corrector.unet.bounded
    assert not CorrectorTraining(prior, widths=(4, 4), bounded=False).corrector.unet.bounded
    latent = DiffusersPrior(str(family_folder("dit")))
    assert not CorrectorTraining(latent, widths=(4, 4)).corrector.unet.bounded
    assert CorrectorTraining(latent, widths=(4, 4), bounded=True).corrector.unet.bounded


def test_classes_are_named_by_label_number_or_the_caller(family_folder):
    def ids(prior, *prompts):
        return prior.embed(prompts).tensors["class_labels"].tolist()

    names = {"cat": 281, "hen": 8, "goose": 99}
    dit = DiffusersPrior(str(family_folder("dit")), classes=names)
    assert ids(dit, "", "tabby", "tabby cat", "bruin", "3", "cat", "1000") == [
        *(1000, 0, 0, 1, 3, 281, 1000)
    ]
    ddpm = DiffusersPrior(str(family_folder("ddpm")), classes={"cat": 0, "": 4})
    assert ids(ddpm, "", "cat", "5", "0") == [4, 0, 5, 0]
    assert ids(DiffusersPrior(str(family_folder("ddpm"))), "") == [5]
    with pytest.raises(ValueError, match=r"'dog'; known are 'cat', the numbers 0 to 5, and ''"):
        ddpm.embed(["dog"])
    with pytest.raises(ValueError, match=r"'tabby'.*'…', the numbers 0 to 1000"):
        dit.embed(["a photo of a tabby"])
    with pytest.raises(ValueError, match="'cat' is 6"):
        DiffusersPrior(str(family_folder("ddpm")), classes={"cat": 6})
    with pytest.raises(ValueError, match="prompts are texts"):
        DiffusersPrior(str(family_folder("sd15")), classes={"cat": 1})


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("sd15", "vae/config.json"),
        ("dit", "transformer/config.json"),
        ("sd35", "model_index.json"),
    ],
)
def test_a_missing_configuration_is_named_at_once(family_folder, tmp_path, name, file):
    folder = copy(family_folder(name), tmp_path)
    (folder / file).unlink()
    with pytest.raises(FileNotFoundError, match=f"prior has no {file}"):
        DiffusersPrior(str(folder))


@pytest.mark.parametrize(("name", "part"), [("sd15", "vae"), ("sd35", "transformer")])
def test_missing_weights_are_named_before_any_are_loaded(
    family_folder, tmp_path, monkeypatch, name, part
):
    folder = copy(family_folder(name), tmp_path)
    for file in weight_files(folder / part):
        file.rename(file.with_name("diffusion_pytorch_model.fp16.safetensors"))
    monkeypatch.setattr(DiffusersPrior, "_load", lambda *_: pytest.fail("weights were loaded"))
    with pytest.raises(FileNotFoundError, match=rf"prior has no {part}/\*\.safetensors"):
        loaded(folder)


def test_a_missing_shard_is_named(family_folder, tmp_path):
    folder = copy(family_folder("dit"), tmp_path)
    model = diffusers.DiTTransformer2DModel.from_pretrained(folder, subfolder="transformer")
    weight_files(folder / "transformer")[0].unlink()
    model.save_pretrained(folder / "transformer", max_shard_size="40KB")
    wanted = weights_digest(family_folder("dit") / "transformer")
    assert DiffusersPrior(str(folder)).identity["digest"] == wanted
    first, *_ = weight_files(folder / "transformer")
    first.unlink()
    with pytest.raises(FileNotFoundError, match=f"transformer/{first.name}"):
        loaded(folder)


def test_the_second_text_encoder_is_missed_by_name(family_folder, tmp_path):
    folder = copy(family_folder("sdxl"), tmp_path)
    for file in weight_files(folder / "text_encoder_2"):
        file.unlink()
    prior = loaded(folder, cache_dir=str(tmp_path / "cache"))
    with pytest.raises(FileNotFoundError, match=r"text_encoder_2/\*\.safetensors"):
        prior.embed(["a cat"])


def test_a_tokenizer_that_needs_sentencepiece_says_so(family_folder, tmp_path, monkeypatch):
    folder = copy(family_folder("if"), tmp_path)
    (folder / "tokenizer" / "tokenizer.json").rename(folder / "tokenizer" / "spiece.model")
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(ImportError, match=r"prior/tokenizer .*pip install sentencepiece"):
        DiffusersPrior(str(folder)).embed(["a cat"])


def test_old_weights_without_safetensors_do(family_folder, tmp_path):
    """facebook/DiT-XL-2-256 has .bin files only."""
    folder = copy(family_folder("dit"), tmp_path)
    for part in ("transformer", "vae"):
        (file,) = weight_files(folder / part)
        torch.save(load_file(file), file.with_suffix(".bin"))
        file.unlink()
    prior, wanted = loaded(folder), loaded(family_folder("dit"))
    assert prior.identity["digest"] == wanted.identity["digest"]
    z_t, t = noisy(prior, 2), torch.tensor([0.3, 0.6])
    for one, other in zip(
        *(p.predict(z_t, t, p.embed(["", "lion"])) for p in (prior, wanted)), strict=True
    ):
        assert torch.equal(one, other)


def test_a_variant_beside_the_weights_plays_no_part(family_folder, tmp_path):
    folder = copy(family_folder("sd15"), tmp_path)
    digest = weights_digest(folder / "unet")
    (file,) = weight_files(folder / "unet")
    other = {name: value + 1 for name, value in load_file(file).items()}
    for variant in ("diffusion_pytorch_model.non_ema", "diffusion_pytorch_model.fp16"):
        save_file(other, folder / "unet" / f"{variant}.safetensors")
    assert weights_digest(folder / "unet") == digest


def test_the_digest_is_the_denoisers(family_folder):
    for name, part in (("sd15", "unet"), ("sd35", "transformer")):
        folder = family_folder(name)
        digest = DiffusersPrior(str(folder)).identity["digest"]
        assert digest == weights_digest(folder / part) != weights_digest(folder / "vae")


@pytest.mark.parametrize(
    ("name", "file", "changes", "message"),
    [
        ("sd35", "model_index.json", {"text_encoder_3": [None, None]}, "without 'text_encoder_3'"),
        ("sd15", "model_index.json", {"vae": ["diffusers", "VQModel"]}, "a VQModel is not"),
        ("sd15", "vae/config.json", {"latent_channels": 8}, "8 channels, the denoiser takes 4"),
        ("sd15", "vae/config.json", {"latents_mean": [0, 0, 0, 0]}, "latents_mean"),
        ("sd15", "unet/config.json", {"in_channels": 9}, "out_channels 4 is neither in_channels 9"),
        ("sd15", "unet/config.json", {"sample_size": [8, 8]}, "no number for 'sample_size'"),
        ("ddpm", "unet/config.json", {"num_class_embeds": None}, "no number for 'num_class_embeds"),
        ("dit", "model_index.json", {"_class_name": "FluxPipeline"}, "FluxPipeline is not supp"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(
    family_folder, tmp_path, name, file, changes, message
):
    folder = copy(family_folder(name), tmp_path)
    edit(folder / file, **changes)
    with pytest.raises(ValueError, match=message):
        DiffusersPrior(str(folder))


@pytest.fixture
def hub_cache(family_folder, tmp_path, monkeypatch) -> Path:
    """The hub's cache with a tiny 'some/prior' in it, as downloaded; and no way to the hub."""
    cache = tmp_path / "hub"
    model, commit = cache / "models--some--prior", "0123456789abcdef" * 2 + "01234567"
    shutil.copytree(family_folder("sd15"), model / "snapshots" / commit)
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text(commit)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return model / "snapshots" / commit


def test_offline_a_hub_id_is_what_was_downloaded(family_folder, hub_cache):
    prior, wanted = loaded("some/prior"), loaded(family_folder("sd15"))
    assert prior.folder == hub_cache
    assert prior.identity["digest"] == wanted.identity["digest"]
    for key, value in prior.embed(["a cat", ""]).tensors.items():
        assert torch.equal(value, wanted.embed(["a cat", ""]).tensors[key])


def test_offline_what_was_not_downloaded_is_named_with_the_command(hub_cache):
    with pytest.raises(FileNotFoundError) as caught:
        DiffusersPrior("some/other", revision="v2")
    command = (
        "hf download {} --include '*.json' --include '*/*.safetensors' --include 'tokenizer*/*'"
    )
    assert command.format("some/other --revision v2") in str(caught.value)
    assert "HF_HUB_OFFLINE" in str(caught.value)
    for file in weight_files(hub_cache / "vae"):
        file.unlink()
    prior = DiffusersPrior("some/prior")
    with pytest.raises(FileNotFoundError, match=r"vae/\*\.safetensors not downloaded") as caught:
        prior.to("cpu")
    assert command.format("some/prior") in str(caught.value)


def test_all_parts_are_fetched_from_one_commit_and_no_more_than_is_needed(hub_cache, monkeypatch):
    asked = []

    def download(repo, revision, allow_patterns, ignore_patterns, local_files_only):
        asked.append((revision, allow_patterns))
        assert ignore_patterns == ["*fp16*", "*non_ema*"]
        return str(hub_cache)

    monkeypatch.setattr(lmc.priors.weights, "snapshot_download", download)
    prior = DiffusersPrior("some/prior", revision="main")
    assert asked == [("main", ["model_index.json", "*/*config.json"])]
    prior.to("cpu")
    wanted = ["unet/*.json", "unet/*.safetensors", "vae/*.json", "vae/*.safetensors"]
    assert asked[1:] == [(hub_cache.name, wanted)]
    prior.embed(["a photo of a cat"])
    assert [patterns[0] for _, patterns in asked[2:]] == ["tokenizer/*", "text_encoder/*.json"]


@pytest.mark.parametrize("status", [401, 403])
def test_a_gated_model_says_how_to_get_it(monkeypatch, status):
    def refuse(*args, **options):
        raise GatedRepoError("gated", response=MagicMock(status_code=status))

    monkeypatch.setattr(lmc.priors.weights, "snapshot_download", refuse)
    with pytest.raises(PermissionError) as caught:
        DiffusersPrior("DeepFloyd/IF-I-M-v1.0")
    message = str(caught.value)
    assert "https://huggingface.co/DeepFloyd/IF-I-M-v1.0" in message
    assert "accept its licence" in message and "hf auth login" in message


def test_the_builders_are_all_tested():
    assert set(ALL) == {"if", *families.BUILDERS}
