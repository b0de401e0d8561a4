"""What a loss sees of images larger than its prior's."""

import pytest
import torch

import train_translator
from lmc import losses
from lmc.losses import SDS, surrogate
from lmc.patches import crop
from lmc.shards.images import resize
from lmc.training.translator import Patches, TranslatorTraining

import worlds
from gaussian import small_prior


def training(patches: Patches | None = None) -> TranslatorTraining:
    """Of images of 32 pixels, on a prior of 16."""
    return TranslatorTraining(
        small_prior(16), SDS(4), ["dog"], "cat", "{}", 32, (8, 8), patches=patches
    )


def gradient(module: TranslatorTraining) -> torch.Tensor:
    """What reaches images (8, 3, 32, 32) of a white gradient of z."""
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(8, 3, 32, 32, generator=generator, dtype=torch.float64).requires_grad_()
    z = module.view(image, module.windows(len(image), 1, module.generator()))
    white = torch.randn(z.shape, generator=generator)
    surrogate(z, white).sum().backward()
    return image.grad


def test_patches_alone_send_gradients_above_the_priors_frequencies():
    """The prior's Nyquist frequency is 0.25 cycles a pixel of the image."""
    f = torch.fft.fftfreq(32).abs()
    above = torch.maximum(f[:, None], f) > 0.375
    ratio = {}
    for name, patches in (("whole", None), ("patches", Patches(1.0, (16, 16)))):
        power = torch.fft.fft2(gradient(training(patches))).abs().square().mean((0, 1))
        ratio[name] = (power[above].mean() / power[~above].mean()).item()
    assert ratio["whole"] < 0.02 and 0.7 < ratio["patches"] < 1.3


def test_a_crop_is_the_part_at_the_priors_size():
    image = torch.rand(3, 3, 20, 30)
    found = crop(image, [2, 0, 0], [(4, 7, 8), (0, 0, 16), (3, 5, 6)], 8)
    assert torch.equal(found[0], image[2, :, 4:12, 7:15])
    torch.testing.assert_close(found[1:2], resize(image[:1, :, :16, :16], 8))
    torch.testing.assert_close(found[2:], resize(image[:1, :, 3:9, 5:11], 8))


def test_a_crop_is_differentiated_as_its_part_is():
    """Against torch's own interpolation of each part by itself, larger and smaller."""
    generator = torch.Generator().manual_seed(0)
    image = torch.rand(2, 3, 40, 30, generator=generator, dtype=torch.float64)
    windows = [(0, 0, 30), (3, 4, 25), (31, 20, 9), (1, 2, 3), (39, 29, 1), (5, 5, 8)]
    rows = [0, 1, 1, 0, 1, 0]
    white = torch.randn(6, 3, 8, 8, generator=generator, dtype=torch.float64)
    ours, one_by_one = (image.clone().requires_grad_() for _ in range(2))
    crop(ours, rows, windows, 8).mul(white).sum().backward()
    for i, (row, (y, x, side)) in enumerate(zip(rows, windows, strict=True)):
        part = resize(one_by_one[row : row + 1, :, y : y + side, x : x + side], 8)
        part.mul(white[i]).sum().backward()
    torch.testing.assert_close(ours.grad, one_by_one.grad)


def test_a_crop_is_not_rounded_where_training_rounds():
    image = torch.rand(1, 3, 20, 20)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = crop(image, [0], [(2, 3, 11)], 8)
    assert torch.equal(found, crop(image, [0], [(2, 3, 11)], 8))


def test_what_is_seen_of_a_batch():
    module = training(Patches(0.25, (5, 20), from_step=0))
    windows = module.windows(4000, 1, module.generator())
    parts = [window for window in windows if window != (0, 0, 32)]
    assert len(parts) / len(windows) == pytest.approx(0.25, abs=0.03)
    assert {side for *_, side in parts} == set(range(5, 21))
    assert all(0 <= y <= 32 - side and 0 <= x <= 32 - side for y, x, side in parts)
    for share, count in ((0.0, 0), (1.0, 50)):
        drawn = Patches(share, (5, 5)).draw(50, 32, 16, torch.Generator())
        assert sum(window[2] == 5 for window in drawn) == count
    sides = {side for *_, side in Patches(1.0).draw(900, 32, 16, torch.Generator())}
    assert sides == set(range(16, 33)), "from the prior's size to the image's"


def test_patches_follow_from_the_step_and_change_no_other_randomness():
    patches, others = Patches(0.5, (4, 32)), []
    for step in (0, 1, 0):
        module = training(patches)
        module.batches_done = step
        generator = module.generator()
        before = generator.get_state()
        generator_used = module.generator()
        torch.randn(7, generator=generator_used)  # however much of it was drawn before
        windows = module.windows(6, 2, generator)
        assert windows == module.windows(6, 2, generator_used)
        assert windows[0::2] == windows[1::2], "all classes of an image"
        assert torch.equal(generator.get_state(), before), "t and eps are as without patches"
        others.append(windows)
    assert others[0] == others[2] != others[1]
    later = training(Patches(1.0, from_step=1))
    assert later.windows(6, 1, later.generator()) is None


def test_output_and_source_are_seen_in_the_same_part(tiny_prior_folder, tmp_path, monkeypatch):
    """A residual translator begins as the identity: where both are seen alike, they are equal."""
    right, seen = losses.DDS.terms, []

    def terms(self, prior, x):
        seen.append(x)
        return right(self, prior, x)

    monkeypatch.setattr(losses.DDS, "terms", terms)
    data = worlds.write_world(tmp_path / "world", 32)
    args = worlds.translator_args(tiny_prior_folder, data, tmp_path / "run", "DDS")
    args += ["--model.image_size=32", "--data.image_size=32", "--model.residual=true"]
    args += ["--model.every_class=true", "--model.patches={share: 1.0, range: [4, 12]}"]
    module = train_translator.main([*args, "--trainer.max_steps=1"]).model
    assert module.patches == Patches(1.0, (4, 12))
    (x,) = seen
    assert x.z.shape == (8, 3, 16, 16), "each image to two classes, and no more evaluations"
    assert torch.equal(x.z, x.z_source) and torch.equal(x.z[0::2], x.z[1::2])
    # Smooth pictures: a part of them, enlarged, is smoother than the whole.
    roughness = (x.z[..., 1:] - x.z[..., :-1]).square().mean() / x.z.var((2, 3)).mean()
    assert roughness < 0.1


def test_a_run_with_patches_goes_on_to_the_same_weights(tiny_prior_folder, tmp_path):
    data = worlds.write_world(tmp_path / "world")

    def weights(name: str, *steps: int, patches: str = "{share: 0.5, range: [4, 12]}") -> dict:
        for end in steps:
            args = worlds.translator_args(tiny_prior_folder, data, tmp_path / name, "SDS")
            args += [f"--model.patches={patches}", f"--trainer.max_steps={end}"]
            train_translator.main(args)
        file = tmp_path / name / "checkpoints" / "last.ckpt"
        return torch.load(file, weights_only=True)["state_dict"]

    straight, resumed = weights("straight", 4), weights("resumed", 2, 4)
    assert all(torch.equal(value, resumed[name]) for name, value in straight.items())
    whole = weights("whole", 4, patches="null")
    assert not all(torch.equal(value, whole[name]) for name, value in straight.items())
