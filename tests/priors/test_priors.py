"""DiffusersPrior against the pipeline it reads, on a tiny random IFPipeline. No network needed."""

import json
import os
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from diffusers import DDPMScheduler, IFPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file

from lmc.priors import DiffusersPrior, Embedding
from lmc.priors.prompts import TextPrompts, unknown_words
from lmc.priors.weights import weights_digest

import families

PROMPTS = ["a photo of a cat", "", "  A Photo of a DOG "]
WEIGHTS = "diffusion_pytorch_model.safetensors"
TIMES = (0.02, 0.3, 0.7, 0.98)


@pytest.fixture
def folder(tiny_prior_folder: Path, tmp_path: Path) -> Path:
    """A copy of the pipeline folder, to be broken."""
    return Path(shutil.copytree(tiny_prior_folder, tmp_path / "prior"))


def edit(file: Path, **changes) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def loaded(folder: Path, **options) -> DiffusersPrior:
    prior = DiffusersPrior(str(folder), **options)
    prior.to("cpu")
    return prior


def noisy(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("prompt", PROMPTS)
def test_predictions_are_what_the_pipelines_scheduler_computes(any_prior_folder, prompt):
    """Also that nothing is clipped, and that the variance half of the output is split off.

    Both sides convert in float32; at t = 0.98 z_hat is a difference of numbers of the order of
    4 / alpha_t with alpha_t = 0.03, whose roundings are 1e-5 each: a few of them make 1e-4.
    """
    prior = loaded(any_prior_folder)
    pipeline = IFPipeline.from_pretrained(any_prior_folder, safety_checker=None)
    scheduler = DDPMScheduler.from_config(pipeline.scheduler.config, clip_sample=False)
    z_t = noisy(len(TIMES))
    embedding = prior.embed([prompt]).expand(len(TIMES))
    eps, z_hat = prior.predict(z_t, torch.tensor(TIMES), embedding)
    assert eps.shape == z_hat.shape == z_t.shape and eps.dtype == z_hat.dtype == torch.float32
    hidden, _ = pipeline.encode_prompt(prompt, do_classifier_free_guidance=False)
    largest = 0.0
    for i, time in enumerate(TIMES):
        index = round(1000 * time)
        with torch.no_grad():
            raw = pipeline.unet(z_t[i : i + 1], index, encoder_hidden_states=hidden).sample
        assert raw.shape[1] == 6
        wanted = scheduler.step(raw, index, z_t[i : i + 1]).pred_original_sample
        torch.testing.assert_close(z_hat[i : i + 1], wanted, rtol=1e-5, atol=1e-4)
        again = scheduler.add_noise(wanted, eps[i : i + 1], torch.tensor([index]))
        torch.testing.assert_close(again, z_t[i : i + 1], rtol=1e-5, atol=1e-5)
        largest = max(largest, wanted.abs().max().item())
    assert largest > 1.5  # or the test could not tell whether anything was clipped


def test_learned_variance_changes_nothing(folder):
    weights = load_file(folder / "unet" / WEIGHTS)
    before = loaded(folder)
    rows, t = before.embed(["a cat"]).expand(4), torch.tensor(TIMES)
    for name in ("conv_out.weight", "conv_out.bias"):
        weights[name][3:] += 1
    save_file(weights, folder / "unet" / WEIGHTS)
    after = loaded(folder)
    for mine, theirs in zip(
        before.predict(noisy(4), t, rows), after.predict(noisy(4), t, rows), strict=True
    ):
        assert torch.equal(mine, theirs)


def test_prompt_and_time_reach_the_denoiser(tiny_prior_folder):
    prior = loaded(tiny_prior_folder)
    z_t, t = noisy(1).expand(3, -1, -1, -1), torch.tensor([0.5, 0.5, 0.8])
    eps, _ = prior.predict(z_t, t, prior.embed(["cat", "dog", "cat"]))
    assert (eps[0] - eps[1]).abs().max() > 1e-4
    assert (eps[0] - eps[2]).abs().max() > 1e-4


def test_half_precision_denoiser_converts_in_float32_and_ignores_autocast(any_prior_folder):
    full = loaded(any_prior_folder)
    half = loaded(any_prior_folder, dtype="bfloat16")
    z_t, t, rows = noisy(4), torch.tensor(TIMES), full.embed(["cat"]).expand(4)
    eps, z_hat = half.predict(z_t, t, rows)
    assert eps.dtype == z_hat.dtype == torch.float32
    alpha_t, sigma_t = half.schedule.coefficients(t)
    # Not what bfloat16's 8 bits would give, 4e-3.
    torch.testing.assert_close(alpha_t * z_hat + sigma_t * eps, z_t, rtol=0, atol=1e-5)
    wanted = full.predict(z_t, t, rows)
    assert not torch.equal(eps, wanted[0])
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(full.predict(z_t, t, rows)[0], wanted[0])


def test_the_denoiser_is_frozen_and_gives_no_gradient(tiny_prior_folder):
    prior = loaded(tiny_prior_folder)
    assert not any(module.training for module in prior._denoiser.modules())
    assert not any(p.requires_grad for p in prior._denoiser.parameters())
    assert not isinstance(prior, torch.nn.Module)  # so that no module that has one registers it
    z_t = noisy(1).requires_grad_()
    eps, z_hat = prior.predict(z_t, torch.tensor([0.5]), prior.embed([""]))
    assert not eps.requires_grad and not z_hat.requires_grad


def test_predict_before_to_says_what_to_call(tiny_prior_folder):
    prior = DiffusersPrior(str(tiny_prior_folder))
    with pytest.raises(RuntimeError, match=r"prior\.to"):
        prior.predict(noisy(1), torch.tensor([0.5]), prior.embed([""]))


def test_a_pixel_priors_space_is_the_pixels_own(tiny_prior_folder):
    prior = DiffusersPrior(str(tiny_prior_folder))
    assert (prior.image_size, prior.channels) == (16, 3)
    image = noisy(1)
    assert torch.equal(prior.encode(image), image) and torch.equal(prior.decode(image), image)


def test_embeddings_are_the_pipelines(tiny_prior_folder):
    prior = DiffusersPrior(str(tiny_prior_folder))
    pipeline = IFPipeline.from_pretrained(tiny_prior_folder, safety_checker=None)
    rows = prior.embed(PROMPTS).tensors["encoder_hidden_states"]
    assert rows.shape == (3, 77, 16) and not rows.requires_grad
    for row, prompt in zip(rows, PROMPTS, strict=True):
        wanted, negative = pipeline.encode_prompt(prompt)
        torch.testing.assert_close(row, wanted[0], rtol=0, atol=1e-6)
        torch.testing.assert_close(rows[1], negative[0], rtol=0, atol=1e-6)
    assert not torch.equal(rows[0], rows[2])


def test_rows_of_an_embedding_are_picked_repeated_and_joined():
    one = Embedding({"a": torch.arange(3.0)[:, None], "b": torch.arange(3.0)[:, None, None] + 5})
    assert one[torch.tensor([2, 0, 2])].tensors["b"].flatten().tolist() == [7, 5, 7]
    assert one[torch.tensor([1])].expand(3).tensors["a"].tolist() == [[1], [1], [1]]
    assert Embedding.cat([one, one]).tensors["a"].flatten().tolist() == [0, 1, 2, 0, 1, 2]


def test_with_a_warm_cache_the_text_encoder_is_never_opened(folder, tmp_path, monkeypatch):
    cache = str(tmp_path / "cache")
    first = DiffusersPrior(str(folder), cache_dir=cache).embed(PROMPTS)
    for part in ("text_encoder", "tokenizer"):
        for file in (folder / part).iterdir():  # spoiled, with its size and time as before
            stat = file.stat()
            file.write_bytes(b"\xff" * stat.st_size)
            os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))

    def refuse(self, prompts):
        raise AssertionError(f"the text encoder was asked for {prompts}")

    monkeypatch.setattr(TextPrompts, "encode", refuse)
    prior = DiffusersPrior(str(folder), cache_dir=cache)
    again = prior.embed(PROMPTS[::-1])
    for name, value in first.tensors.items():
        assert torch.equal(again.tensors[name].flip(0), value)
    with pytest.raises(AssertionError, match=r"\['a bird'\]"):
        prior.embed(["", "a bird"])


def test_only_new_prompts_are_encoded_and_each_once(folder, tmp_path, monkeypatch):
    asked: list[str] = []
    encode = TextPrompts.encode

    def note(self, prompts):
        asked.extend(prompts)
        return encode(self, prompts)

    monkeypatch.setattr(TextPrompts, "encode", note)
    prior = DiffusersPrior(str(folder), cache_dir=str(tmp_path / "cache"))
    rows = prior.embed(["cat", "dog", "cat"]).tensors["encoder_hidden_states"]
    assert torch.equal(rows[0], rows[2]) and not torch.equal(rows[0], rows[1])
    prior.embed(["dog", "", "cat"])
    assert asked == ["cat", "dog", ""]


def test_the_cache_tells_text_encoders_apart(folder, tmp_path):
    cache = str(tmp_path / "cache")
    before = DiffusersPrior(str(folder), cache_dir=cache).embed(["cat"])
    file = folder / "text_encoder" / "model.safetensors"
    save_file({k: v + 0.1 for k, v in load_file(file).items()}, file, metadata={"format": "pt"})
    after = DiffusersPrior(str(folder), cache_dir=cache).embed(["cat"])
    assert not torch.equal(*(e.tensors["encoder_hidden_states"] for e in (before, after)))


def test_the_cache_is_where_the_environment_says(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("LMC_CACHE", str(tmp_path / "elsewhere"))
    DiffusersPrior(str(folder)).embed(["cat"])
    assert len(list((tmp_path / "elsewhere").rglob("*.safetensors"))) == 1


def test_words_that_the_tokenizer_does_not_know_are_named(folder, tmp_path):
    """With a warm cache too; the tiny vocabulary has a few words, the letters, and no digit."""
    cache = str(tmp_path / "cache")
    for _ in range(2):
        with pytest.warns(UserWarning) as said:
            DiffusersPrior(str(folder), cache_dir=cache).embed(
                ["a Photo of a CAT", "", "a zebra, 3d", "a photo of a dog", "x y of a été"]
            )
        messages = [str(each.message) for each in said]
        assert all("\n" not in each and each.startswith(f"{folder}: ") for each in messages)
        first, second = (each.partition(" does not know ")[2] for each in messages)
        assert first.startswith("'zebra', '3d' in 'a zebra, 3d': ")
        assert second.startswith("'été' in 'x y of a été': ")


def test_known_words_are_not_talked_of(folder, tmp_path, family_folder):
    """CLIP calls its end of text the unknown token, has none, and spells many a word by letters."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        for _ in range(2):
            DiffusersPrior(str(folder), cache_dir=str(tmp_path)).embed(PROMPTS)
            for name in ("sd15", "sdxl"):
                clip = DiffusersPrior(str(family_folder(name)), cache_dir=str(tmp_path))
                clip.embed(["a zebra, 3d", "", "a photo of a cat"])
            dit = DiffusersPrior(str(family_folder("dit")), cache_dir=str(tmp_path))
            dit.embed(["lion", ""])
    tokenizer = families.clip_tokenizer()
    assert tokenizer.unk_token_id in tokenizer("3d").input_ids
    assert unknown_words(tokenizer, "3d zebra") == []


def test_of_several_tokenizers_the_one_that_knows_less_is_heard(family_folder, tmp_path):
    """Stable Diffusion 3's T5, beside two CLIPs; it tells cases apart as the pipeline does."""
    prior = DiffusersPrior(str(family_folder("sd35")), cache_dir=str(tmp_path))
    with pytest.warns(UserWarning, match="does not know 'Cat' in 'a Cat': "):
        prior.embed(["a Cat"])


def test_it_is_said_of_one_process(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    for rank in (0, 1):
        monkeypatch.setattr(torch.distributed, "get_rank", lambda rank=rank: rank)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            DiffusersPrior(str(folder), cache_dir=str(tmp_path)).embed(["a zebra"])
        assert len([each for each in said if "zebra" in str(each.message)]) == 1 - rank


def test_an_embedding_cached_by_an_earlier_version_is_read(folder, tmp_path):
    prior = DiffusersPrior(str(folder), cache_dir=str(tmp_path / "cache"))
    rows = prior.embed(["a cat"]).tensors
    (file,) = (tmp_path / "cache").rglob("*.safetensors")
    save_file(load_file(file), file)  # which had no notes beside the tensors
    again = prior.embed(["a cat"]).tensors
    assert rows.keys() == again.keys() and all(torch.equal(rows[n], again[n]) for n in rows)


def test_the_demos_prior_does_not_know_a_zebra(tmp_path):
    prior = DiffusersPrior(
        str(Path(__file__).parents[2] / "data/demo/prior"), cache_dir=str(tmp_path)
    )
    known = ["a photo of a cat", "a picture of the lion", "an animal face", ""]
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        prior.embed(known)
    with pytest.warns(UserWarning, match="does not know 'zebra' in 'a photo of a zebra': "):
        prior.embed([*known, "a photo of a zebra"])


def test_identity_is_plain_and_names_the_weights(tiny_prior_folder, any_prior_folder):
    identity = DiffusersPrior(str(tiny_prior_folder)).identity
    assert json.loads(json.dumps(identity)) == identity
    assert identity["prediction_type"] == "v_prediction"
    assert identity["digest"] == weights_digest(tiny_prior_folder / "unet")
    assert (identity["image_size"], identity["channels"]) == (16, 3)


def test_digest_is_the_same_for_half_precision_and_for_shards(tiny_prior_folder, tmp_path):
    unet = UNet2DConditionModel.from_pretrained(tiny_prior_folder, subfolder="unet")
    digest = weights_digest(tiny_prior_folder / "unet")
    unet.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    assert weights_digest(tmp_path / "shards") == digest
    unet.half().save_pretrained(tmp_path / "half")
    half = load_file(tmp_path / "half" / WEIGHTS)
    assert {value.dtype for value in half.values()} == {torch.float16}
    assert weights_digest(tmp_path / "half") == digest


@pytest.mark.parametrize("change", ["value", "name", "swap"])
def test_digest_differs_for_other_weights(folder, change):
    digest = weights_digest(folder / "unet")
    weights = load_file(folder / "unet" / WEIGHTS)
    names = sorted(weights)
    if change == "value":
        weights[names[-1]].view(-1)[-1] += 0.01
    elif change == "name":
        weights["renamed"] = weights.pop(names[-1])
    else:  # two tensors of one shape trade places
        first, second = (f"mid_block.resnets.{i}.conv1.weight" for i in range(2))
        weights[first], weights[second] = weights[second], weights[first]
    save_file(weights, folder / "unet" / WEIGHTS)
    assert weights_digest(folder / "unet") != digest


def test_a_missing_folder_is_named(tmp_path):
    for missing in (str(tmp_path / "nowhere"), "nowhere", "./nowhere", "some/where/else"):
        with pytest.raises(FileNotFoundError, match=missing):
            DiffusersPrior(missing)


@pytest.mark.parametrize("part", ["model_index.json", "unet/config.json"])
def test_a_missing_configuration_is_named(folder, part):
    (folder / part).unlink()
    with pytest.raises(FileNotFoundError, match=part):
        DiffusersPrior(str(folder))


def test_missing_denoiser_weights_are_named(folder):
    (folder / "unet" / WEIGHTS).unlink()
    prior = DiffusersPrior(str(folder))
    with pytest.raises(FileNotFoundError, match=r"unet/\*\.safetensors"):
        _ = prior.identity
    with pytest.raises(FileNotFoundError, match=r"unet/\*\.safetensors"):
        prior.to("cpu")


@pytest.mark.parametrize("part", ["text_encoder", "tokenizer"])
def test_a_missing_text_encoder_is_named_when_it_is_needed(folder, part):
    shutil.rmtree(folder / part)
    prior = loaded(folder)  # a warm cache would do without
    with pytest.raises(FileNotFoundError, match=part):
        prior.embed(["cat"])


@pytest.mark.parametrize(
    "part", ["model_index.json", "unet/config.json", "scheduler/scheduler_config.json"]
)
def test_broken_json_is_named(folder, part):
    (folder / part).write_text('{"sample_size": 16,')
    with pytest.raises((ValueError, OSError), match=part):
        DiffusersPrior(str(folder))


def test_a_key_missing_from_the_configuration_is_named_with_its_file(folder):
    file = folder / "unet" / "config.json"
    config = json.loads(file.read_text())
    del config["sample_size"]
    file.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"unet/config\.json.*sample_size"):
        DiffusersPrior(str(folder))


def test_an_unknown_pipeline_is_refused_with_those_that_are_known(folder):
    edit(folder / "model_index.json", _class_name="IFSuperResolutionPipeline")
    known = r"IFPipeline, StableDiffusionPipeline, .*DiTPipeline"
    with pytest.raises(ValueError, match=f"prior: IFSuperResolutionPipeline is not.*{known}"):
        DiffusersPrior(str(folder))


def test_a_pipeline_without_a_unet_is_refused(folder):
    index = json.loads((folder / "model_index.json").read_text())
    del index["unet"]
    (folder / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="not supported"):
        DiffusersPrior(str(folder))


def test_unknown_dtype_names_the_known_ones(tiny_prior_folder):
    with pytest.raises(ValueError, match=r"'float8'.*float32, bfloat16, float16"):
        DiffusersPrior(str(tiny_prior_folder), dtype="float8")


def test_unknown_prediction_type_names_the_known_ones(folder):
    edit(folder / "scheduler" / "scheduler_config.json", prediction_type="score")
    with pytest.raises(ValueError, match=r"prior/scheduler.*'score'.*epsilon, v_prediction"):
        DiffusersPrior(str(folder))


def test_a_scheduler_without_a_ddpm_grid_is_refused_by_name(folder):
    index = folder / "model_index.json"
    edit(index, scheduler=["diffusers", "ScoreSdeVeScheduler"])
    with pytest.raises(ValueError, match="ScoreSdeVeScheduler is not supported"):
        DiffusersPrior(str(folder))


def test_an_unknown_scheduler_class_is_named(folder):
    edit(folder / "model_index.json", scheduler=["diffusers", "NoSuchScheduler"])
    with pytest.raises(ValueError, match=r"model_index\.json.*NoSuchScheduler"):
        DiffusersPrior(str(folder))


def test_odd_output_channels_are_named(folder):
    edit(folder / "unet" / "config.json", out_channels=4)
    with pytest.raises(ValueError, match=r"unet/config\.json: out_channels 4"):
        DiffusersPrior(str(folder))
