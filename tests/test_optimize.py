"""One image as the parameters, against gaussian images where a closed form is known."""

import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lmc.losses import DDS, LMC, MSSDS, SDS, Cond, LossInputs
from lmc.optimize import (
    Comparison,
    Editing,
    Latents,
    Pixels,
    Synthesis,
    grey,
    optimize,
)
from lmc.patches import draw_window
from lmc.priors import DiffusersPrior
from lmc.renderers.protocol import Seen
from lmc.schedule import FallingTime, UniformTime
from lmc.specs import LOSSES

from gaussian import GaussianPrior, power_spectrum, small_prior

ROOT = Path(__file__).parents[1]


class Recorder(SDS):
    """SDS that keeps what it was given."""

    name = "recorder"
    fixed_noise = True

    def terms(self, prior, x: LossInputs):
        self.seen = [*getattr(self, "seen", []), replace(x, z=x.z.clone())]
        return super().terms(prior, x)


def brief(steps: int = 4, **options) -> Synthesis:
    return Synthesis(**{"steps": steps, "whole_steps": 2, "decay_steps": 2, **options})


def start(count: int, height: int = 16, width: int = 16, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    image = torch.rand(count, 3, height, width, generator=generator, dtype=torch.float64)
    return image - 0.5


def faint_prior() -> GaussianPrior:
    """Means well inside [-1, 1]."""
    prior = small_prior()
    means = {name: 0.4 * mean for name, mean in prior.means.items()}
    return GaussianPrior(means, power_spectrum(8))


def test_the_defaults_are_the_papers():
    """METHOD.md section 6."""
    synthesis, editing, comparison = Synthesis(), Editing(), Comparison()
    assert [s.steps for s in (synthesis, editing, comparison)] == [500] * 3
    assert [s.whole_steps for s in (synthesis, editing, comparison)] == [150, 200, 200]
    assert [s.l2_weight for s in (synthesis, editing, comparison)] == [0, 0.1, 0]
    rates = [synthesis.learning_rate(step) for step in (0, 200, 350, 500)]
    assert rates == pytest.approx([0.1, 0.1, 0.1 * 1.03 / 2, 0.003])
    assert synthesis.learning_rate(201) < 0.1 and synthesis.patches == 2
    rates = [editing.learning_rate(step) for step in (0, 250, 500)]
    assert rates == pytest.approx([0.02, 0.018, 0.016])
    assert comparison.learning_rate(0) == 5e-3
    assert Synthesis(decay_steps=0).learning_rate(499) == 0.1


def test_fewer_steps_shorten_the_phases():
    settings = Editing(steps=100)
    assert (settings.whole_steps, settings.decay_steps) == (100, 100)
    assert settings.learning_rate(0) == 0.02 and settings.learning_rate(100) == 0.02 * 0.8
    assert Synthesis(steps=200) == Synthesis(steps=200, whole_steps=150, decay_steps=200)


@pytest.mark.parametrize("patches", [1, 3])
def test_the_parts_of_a_step_are_what_is_evaluated(patches):
    prior, settings = small_prior(), brief(patches=patches)
    done: list[int] = []

    def watch(step: int) -> None:
        done.append(prior.evaluations)

    optimize(Pixels(start(2)), prior, Cond(), ["dog"] * 2, [0, 1], settings, watch=watch)
    assert done == [2 * 2 * settings.parts(step) for step in (1, 2, 3, 4)]


def test_sds_without_guidance_finds_the_mean():
    """E[eps_cond − eps] = 0 at z = mu_y only: around it the seeds' images end."""
    prior, seeds = faint_prior(), range(20)
    settings = Synthesis(300, whole_steps=300, lr=0.05, lr_end=0.02, decay_steps=200)
    pixels = Pixels(torch.zeros(20, 3, 8, 8, dtype=torch.float64))
    images = optimize(pixels, prior, SDS(1), ["cat", "dog"] * 10, seeds, settings)
    for i, prompt in enumerate(("cat", "dog")):
        mean = prior.means[prompt]
        off = (images[i::2].mean(0) - mean).square().mean().sqrt()
        assert off < 0.25 * mean.square().mean().sqrt()


@pytest.mark.parametrize("l2_weight", [0.0, 0.7])
def test_the_gradient_of_a_step(l2_weight):
    """The whole image at the prior's size: the loss's own, plus 2 w (image − source)."""
    prior, loss = small_prior(), SDS(4)
    pixels, source = Pixels(start(2, 8, 8)), start(2, 8, 8, seed=1)
    before = pixels.image.detach().clone()
    settings = Synthesis(1, whole_steps=1, decay_steps=0, l2_weight=l2_weight, lr=0.01)
    optimize(pixels, prior, loss, ["cat", "dog"], [5, 6], settings, source)
    generators = [torch.Generator().manual_seed(seed) for seed in (5, 6)]
    t = torch.cat([UniformTime().draw(1, 0, g, torch.float64) for g in generators])
    eps = torch.stack([torch.randn(3, 8, 8, generator=g, dtype=torch.float64) for g in generators])
    inputs = LossInputs(before, t, eps, prior.embed(["", ""]), prior.embed(["cat", "dog"]))
    expected = loss(prior, inputs).total + 2 * l2_weight * (before - source)
    torch.testing.assert_close(pixels.image.grad, expected)
    # Adam's first step has the length of the learning rate.
    moved = (pixels.image - before).abs()
    torch.testing.assert_close(moved, torch.full_like(moved, 0.01), rtol=1e-4, atol=0)


def test_the_size_of_the_gradient_depends_on_no_size():
    """Twice the side: four pixels share what one had, and each is as many times as heavy."""
    sums = []
    for side in (8, 16):
        pixels = Pixels(torch.full((1, 3, side, side), 0.25, dtype=torch.float64))
        settings = Synthesis(1, whole_steps=1, decay_steps=0, lr=1e-6)
        optimize(pixels, small_prior(), SDS(4), ["cat"], [0], settings)
        sums.append(pixels.image.grad.sum() / side**2)
    torch.testing.assert_close(*sums)


def test_l2_keeps_the_image_at_its_source():
    prior, source = small_prior(), start(1)
    off = []
    for l2_weight in (0.0, 10.0):
        settings = brief(60, lr=0.02, l2_weight=l2_weight)
        image = optimize(Pixels(source), prior, SDS(4), ["cat"], [0], settings, source)
        off.append((image - source).square().mean().sqrt().item())
    assert off[1] < off[0] / 3


def test_windows_lie_in_the_image_and_reach_its_borders():
    generator = torch.Generator().manual_seed(0)
    windows = [draw_window(generator, 20, 30, 5, 20) for _ in range(3000)]
    assert {side for *_, side in windows} == set(range(5, 21))
    assert all(0 <= y <= 20 - side and 0 <= x <= 30 - side for y, x, side in windows)
    assert min(y for y, _, _ in windows) == min(x for _, x, _ in windows) == 0
    assert max(y + side for y, _, side in windows) == 20
    assert max(x + side for _, x, side in windows) == 30


def test_a_patch_moves_its_own_pixels_only():
    pixels = Pixels(start(1, 20, 30))
    before = pixels.image.detach().clone()
    settings = Synthesis(1, whole_steps=0, patches=1, decay_steps=0, patch_range=(6, 12))
    optimize(pixels, small_prior(), SDS(4), ["cat"], [3], settings)
    y, x, side = draw_window(torch.Generator().manual_seed(3), 20, 30, 6, 12)
    inside = torch.zeros(20, 30, dtype=torch.bool)
    inside[y : y + side, x : x + side] = True
    moved = (pixels.image.detach() != before)[0].any(0)
    assert not moved[~inside].any() and moved[inside].all()


def test_the_whole_of_an_oblong_image_is_its_centred_square():
    pixels = Pixels(start(1, 10, 30))
    before = pixels.image.detach().clone()
    settings = Synthesis(1, whole_steps=1, decay_steps=0)
    optimize(pixels, small_prior(), SDS(4), ["cat"], [3], settings)
    moved = (pixels.image.detach() != before)[0].any(0)
    assert moved[:, 10:20].all() and moved.sum() == 100


@pytest.mark.parametrize(
    "loss",
    [SDS(4), DDS(4), LMC("identity", 4), LMC("identity", 4, fixed_noise=True), MSSDS(4, steps=2)],
    ids=["sds", "dds", "lmc", "lmc fixed_noise", "ms_sds"],
)
def test_a_seed_alone_gives_what_it_gives_among_others(loss):
    prior, source = small_prior(), start(3, 16, 20)
    prompts, seeds = ["dog", "cat", "bear"], [4, 9, 2]

    def run(rows: list[int]) -> torch.Tensor:
        return optimize(
            Pixels(source[rows]), prior, loss, [prompts[i] for i in rows],
            [seeds[i] for i in rows], brief(6), source[rows], ["cat"] * len(rows),
        )  # fmt: skip

    together = run([0, 1, 2])
    for i in range(3):
        torch.testing.assert_close(run([i])[0], together[i], rtol=0, atol=1e-9)
    assert (run([0]) - optimize(
        Pixels(source[:1]), prior, loss, ["dog"], [5], brief(6), source[:1], ["cat"]
    )).abs().max() > 1e-3  # fmt: skip


def test_fixed_noise_is_a_seeds_own_and_stays():
    loss = Recorder(4)
    optimize(Pixels(start(2)), small_prior(), loss, ["cat", "cat"], [0, 1], brief(4))
    first, *others = loss.seen
    assert not torch.equal(first.eps_fixed[0], first.eps_fixed[1])
    for x in others:
        repeats = len(x.z) // 2
        assert torch.equal(x.eps_fixed, first.eps_fixed.repeat_interleave(repeats, 0))
        assert not torch.equal(x.eps[0], first.eps[0])
    assert [len(x.z) for x in loss.seen] == [2, 2, 4, 4]


def test_patches_have_times_of_their_own_but_a_falling_time_is_one_for_all():
    uniform, falling = Recorder(4), Recorder(4)
    for loss, time in ((uniform, None), (falling, FallingTime(jitter=0.01))):
        optimize(Pixels(start(2)), small_prior(), loss, ["cat"] * 2, [0, 1], brief(), time=time)
    assert all(x.t.unique().numel() == len(x.z) for x in uniform.seen)
    times = [x.t.unique() for x in falling.seen]
    assert all(len(t) == 1 for t in times)
    for t, at in zip(times, (1, 0.75, 0.5, 0.25), strict=True):
        assert min(at, 0.98) <= t.item() <= min(at + 0.01, 0.98) + 1e-12


def test_sources_are_seen_where_the_image_is():
    """Image and source alike, dds of an image with itself and equal prompts is 0: no step moves."""
    source = start(2, 16, 24)
    pixels = Pixels(source)
    optimize(pixels, small_prior(), DDS(4), ["cat", "dog"], [0, 1], brief(), source, ["cat", "dog"])
    torch.testing.assert_close(pixels.image.detach(), source, rtol=0, atol=1e-6)


@pytest.fixture(scope="module")
def network(tiny_prior_folder):
    return DiffusersPrior(str(tiny_prior_folder))


@pytest.mark.parametrize("loss_class", LOSSES.values(), ids=lambda each: each.name)
def test_every_loss_moves_an_image(network, loss_class):
    source = start(2, 24, 24).float()
    loss = loss_class("identity") if loss_class is LMC else loss_class()
    image = optimize(
        Pixels(source), network, loss, ["a cat", "a dog"], [0, 1], brief(3, l2_weight=0.1), source,
        ["a photo", "a photo"],
    )  # fmt: skip
    moved = (image - source).abs().amax((1, 2, 3))
    assert image.isfinite().all() and (moved > 0.01).all() and image.abs().max() <= 1


def test_fixed_noise_gives_more_diverse_images(network):
    """[LMC, Sec. 4]; fresh noise averages out, fixed noise does not."""
    spread = []
    for fixed_noise in (False, True):
        loss = LMC("identity", 30, fixed_noise=fixed_noise)
        settings = Synthesis(40, whole_steps=40, decay_steps=0, lr=0.01)
        images = optimize(Pixels(grey(4, 16)), network, loss, ["a cat"] * 4, [0, 1, 2, 3], settings)
        spread.append(images.std(0).mean().item())
    assert spread[1] > 1.2 * spread[0]


def test_latents_are_decoded_and_never_encoded_again(family_folder):
    prior = DiffusersPrior(str(family_folder("sd15")))
    encoded: list[int] = []
    encode = prior.encode
    prior.encode = lambda image: encoded.append(len(image)) or encode(image)  # type: ignore
    size = prior.image_size
    source = start(2, size, size).float()
    loss, latents = Recorder(4), Latents(prior, source)
    settings = Synthesis(3, whole_steps=3, decay_steps=0, l2_weight=0.1)
    image = optimize(latents, prior, loss, ["a cat"] * 2, [0, 1], settings, source)
    assert image.shape == source.shape and encoded == [2, 2]  # the beginning, and the source
    torch.testing.assert_close(loss.seen[0].z, encode(source))
    assert not torch.equal(loss.seen[2].z, loss.seen[0].z)
    with torch.no_grad():
        torch.testing.assert_close(image, prior.decode(latents.z))
    # Whole images at every step, without being asked.
    optimize(Latents(prior, source), prior, loss, ["a cat"] * 2, [0, 1], brief(3), source)
    assert [len(x.z) for x in loss.seen] == [2] * 6
    with pytest.raises(ValueError, match=f"{size} x {size} pixels, not of 20 x 10"):
        Latents(prior, start(1, 10, 20))


def test_bad_input_is_refused_before_the_prior_is_loaded():
    class Unloaded(GaussianPrior):
        def to(self, device):
            raise AssertionError("the prior is loaded")

    small = small_prior()
    prior = Unloaded(small.means, small.spectrum)
    source = start(2)

    def refused(match, loss=SDS(4), settings=brief(), **options):  # noqa: B008
        given = {"prompts": ["cat", "dog"], "seeds": [0, 1], **options}
        with pytest.raises(ValueError, match=match):
            optimize(Pixels(source), prior, loss, settings=settings, **given)

    refused("1 prompts and 2 seeds for 2 images", prompts=["cat"])
    refused("'dds' needs a source image", DDS(4))
    refused("'dds' needs a source prompt", DDS(4), source=source)
    refused("l2_weight needs a source image", settings=brief(l2_weight=1.0))
    refused(re.escape("source is (1, 3, 16, 16)"), source=source[:1])
    refused("patches of 17 pixels are larger", settings=brief(patch_range=(8, 17)))
    for name, value in (("steps", 0), ("patches", 0), ("patch_range", (5, 4)), ("lr", 0.0)):
        with pytest.raises(ValueError, match=name):
            brief(**{name: value})


def test_an_unknown_class_is_refused_before_the_prior_is_loaded(family_folder):
    prior = DiffusersPrior(str(family_folder("ddpm")))
    size = prior.image_size
    settings = Synthesis(1, whole_steps=1, decay_steps=0)
    with pytest.raises(ValueError, match="no class 'unicorn'"):
        optimize(Pixels(grey(1, size)), prior, SDS(4), ["unicorn"], [0], settings)
    with pytest.raises(RuntimeError, match="call prior"):
        prior.predict(grey(1, size), torch.tensor([0.5]), prior.embed([""]))


def test_a_gradient_that_is_not_finite_stops_with_where_it_was():
    class Breaking(Recorder):
        def terms(self, prior, x):
            terms = super().terms(prior, x)
            if len(self.seen) == 3:
                terms["cond"][2] = math.nan  # of four patches: the second image's first
            return terms

    loss = Breaking(4)
    with pytest.raises(FloatingPointError) as caught:
        optimize(Pixels(start(2)), small_prior(), loss, ["cat", "cat"], [70, 71], brief())
    t = loss.seen[2].t[2].item()
    for part in ("step 2", "'recorder'", f"t = {t:.4f}", "seed 71"):
        assert part in str(caught.value)


def test_the_watcher_sees_every_step():
    done: list[int] = []
    optimize(Pixels(start(1)), small_prior(), SDS(4), ["cat"], [0], brief(), watch=done.append)
    assert done == [1, 2, 3, 4]


def test_the_documented_network_is_optimised(network):
    """The Python of docs/one_image.md, as it stands there."""
    code = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "one_image.md").read_text(), re.S)
    names = {"prior": network}
    exec("\n".join(code), names)
    image = names["image"]
    assert image.shape == (2, 3, 64, 64) and image.abs().max() <= 1
    assert image.std((2, 3)).min() > 0.01


# ---------------------------------------------------------------------------------------------
# Views


FRONT, BACK = ", front view", ", back view"


class Panorama(torch.nn.Module):
    """Two pictures side by side: one is seen from the front, the other from behind."""

    suffixes = (FRONT, BACK)

    def __init__(self, penalty: float = 0.0, rates: tuple[float, float] = (0.05, 0.05)) -> None:
        super().__init__()
        self.sides = torch.nn.ParameterList(torch.zeros(1, 3, 16, 16).double() for _ in range(2))
        self.penalty, self.rates, self.seen = penalty, rates, []

    def forward(self) -> torch.Tensor:
        return self.sides[0]

    def see(self, step: int, steps: int, generator: torch.Generator) -> Seen:
        which = torch.randint(2, (3,), generator=generator).tolist()
        self.seen.append((step, steps, which))
        penalty = self.penalty * sum(side.square().sum() for side in self.sides)
        return Seen(torch.cat([self.sides[i] for i in which]), which, penalty)

    def after(self, step: int, steps: int, generator: torch.Generator) -> None:
        self.done = step

    def groups(self, step: int, steps: int) -> list[dict]:
        share = 1 - step / steps
        return [
            {"params": [side], "lr": rate * share, "betas": (0.9, 0.99)}
            for side, rate in zip(self.sides, self.rates, strict=True)
        ]


def sided_prior() -> GaussianPrior:
    prior = small_prior(16)
    for suffix, level in ((FRONT, 0.8), (BACK, -0.8)):
        prior.means[f"cat{suffix}"] = torch.full((3, 16, 16), level, dtype=torch.float64)
    return prior


def test_each_view_has_its_own_prompt():
    panorama, loss = Panorama(), Recorder(4)
    prior = sided_prior()
    optimize(panorama, prior, loss, ["cat"], [0], Synthesis(60, decay_steps=0))
    assert panorama.sides[0].mean() > 0.4 and panorama.sides[1].mean() < -0.4
    assert [(step, steps) for step, steps, _ in panorama.seen] == [(i, 60) for i in range(60)]
    for (_, _, which), x in zip(panorama.seen, loss.seen, strict=True):
        prompts = [f"cat{panorama.suffixes[i]}" for i in which]
        assert torch.equal(x.target.tensors["mean"], prior.embed(prompts).tensors["mean"])
        assert len(x.z) == 3 and len(set(x.t.tolist())) == 3
    one, again, other = Panorama(), Panorama(), Panorama()
    for renderer, seed in ((one, 0), (again, 0), (other, 1)):
        optimize(renderer, prior, SDS(4), ["cat"], [seed], Synthesis(3, decay_steps=0))
    assert one.seen == again.seen != other.seen
    assert torch.equal(one.sides[0], again.sides[0])


def test_a_renderer_s_own_rates_and_penalty_count():
    still = Panorama(rates=(0.05, 0.0))
    optimize(still, sided_prior(), SDS(4), ["cat"], [0], Synthesis(5, decay_steps=0))
    assert still.sides[0].abs().max() > 0 and not still.sides[1].any()
    held = Panorama(penalty=1e9)
    optimize(held, sided_prior(), SDS(4), ["cat"], [0], Synthesis(60, decay_steps=0))
    assert max(side.abs().max() for side in held.sides) < 0.1


def test_adam_begins_anew_with_other_parameters():
    class Growing(Panorama):
        def after(self, step, steps, generator):
            if step == 1:
                self.sides[0] = torch.nn.Parameter(self.sides[0].detach() + 1)

    growing = Growing()
    optimize(growing, sided_prior(), SDS(4), ["cat"], [0], Synthesis(2, decay_steps=0))
    before = growing.sides[0].detach().clone()
    growing = Growing()
    optimize(growing, sided_prior(), SDS(4), ["cat"], [0], Synthesis(4, decay_steps=0))
    assert (growing.sides[0] - before).abs().max() > 0.01, "what is new is moved"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"loss": DDS(4)}, "the loss 'dds' is of pictures"),
        ({"settings": brief(l2_weight=1.0)}, "a source or l2_weight is of pictures"),
        ({"prompts": ["cat", "dog"], "seeds": [0, 1]}, "2 prompts and 2 seeds for 1 images"),
    ],
)
def test_what_is_of_one_picture_is_refused_of_views(options, said):
    given = {"loss": SDS(4), "prompts": ["cat"], "seeds": [0], "settings": brief(), **options}
    with pytest.raises(ValueError, match=said):
        optimize(Panorama(), sided_prior(), **given)
