"""Shared by all tests: one thread, a private embedding cache, and a tiny pipeline folder."""

import functools
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

import families


@pytest.fixture(scope="session", autouse=True)
def _private_world(tmp_path_factory: pytest.TempPathFactory):
    """No test reads or fills the user's own cache, and none takes more than one core."""
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LMC_CACHE", str(tmp_path_factory.mktemp("lmc_cache")))
        yield


def build_prior_folder(
    folder: Path,
    prediction_type: Literal["epsilon", "v_prediction"] = "v_prediction",
    seed: int = 0,
) -> Path:
    """Write a random 16 x 16 IFPipeline, DeepFloyd IF's format at its smallest, and return it.

    Its scheduler clips, as the published ones do: a prior that took the scheduler's own estimate
    would be found out.
    """
    from diffusers import DDPMScheduler, IFPipeline, UNet2DConditionModel
    from transformers import T5Config, T5EncoderModel, T5Tokenizer

    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -4.0)]
    pieces += [(f"▁{word}", -2.0) for word in ("a", "photo", "of", "cat", "dog")]
    pieces += [(letter, -6.0) for letter in "abcdefghijklmnopqrstuvwxyz"]
    tokenizer = T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=77)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        text_encoder = T5EncoderModel(
            T5Config(
                vocab_size=len(tokenizer), d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2
            )
        )
        unet = UNet2DConditionModel(
            sample_size=16,
            in_channels=3,
            out_channels=6,
            block_out_channels=(8, 16),
            down_block_types=("DownBlock2D", "SimpleCrossAttnDownBlock2D"),
            mid_block_type="UNetMidBlock2DSimpleCrossAttn",
            up_block_types=("SimpleCrossAttnUpBlock2D", "UpBlock2D"),
            layers_per_block=1,
            attention_head_dim=8,
            norm_num_groups=4,
            cross_attention_dim=16,
            encoder_hid_dim=16,
            addition_embed_type="text",
            addition_embed_type_num_heads=2,
        )
    scheduler = DDPMScheduler(
        beta_schedule="squaredcos_cap_v2",
        prediction_type=prediction_type,
        variance_type="learned_range",
        clip_sample=True,
    )
    IFPipeline(
        tokenizer=tokenizer,
        text_encoder=text_encoder,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        watermarker=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_prior_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A v-prediction pipeline folder. Shared: copy it before changing anything in it."""
    return build_prior_folder(tmp_path_factory.mktemp("prior") / "tiny")


@pytest.fixture(scope="session")
def other_prior_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Like `tiny_prior_folder`, with other weights."""
    return build_prior_folder(tmp_path_factory.mktemp("prior") / "other", seed=1)


@pytest.fixture(scope="session", params=["epsilon", "v_prediction"])
def any_prior_folder(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The same for either prediction type."""
    return build_prior_folder(tmp_path_factory.mktemp("prior") / request.param, request.param)


@pytest.fixture(scope="session")
def family_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Pipeline folders by the name of their family, see families.BUILDERS; 'if' is DeepFloyd's.

    Shared: copy one before changing anything in it.
    """

    @functools.cache
    def folder(name: str) -> Path:
        build = build_prior_folder if name == "if" else functools.partial(families.build, name)
        return build(tmp_path_factory.mktemp("family") / name)

    return folder


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Headless Chromium, where there is one."""
    path = shutil.which("chromium") or shutil.which("google-chrome")
    if path is None:
        # Set where the test must not be passed over.
        if os.environ.get("CHROMIUM_REQUIRED"):
            pytest.fail("CHROMIUM_REQUIRED is set and there is no chromium on the path")
        pytest.skip("no chromium on the path (Debian's package chromium)")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        # A GPU for WebGPU, which the CPU plays; pages that take real ones only see none.
        gpu = ["--enable-unsafe-webgpu", "--use-webgpu-adapter=swiftshader"]
        started = playwright.chromium.launch(executable_path=path, args=["--no-sandbox", *gpu])
        yield started
        started.close()
