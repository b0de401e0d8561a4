"""The translator as a residual of its input; the U-Net is tested in test_unet."""

import pytest
import torch

from lmc.translator import Translator, clip


def residual(**more) -> Translator:
    torch.manual_seed(0)
    return Translator(["dog", "bear"], image_size=16, widths=(8, 16), residual=True, **more)


def test_residual_starts_at_the_source():
    image = torch.rand(2, 3, 16, 16) * 2 - 1
    assert torch.equal(residual()(image, torch.tensor([0, 1])), image)


def test_residual_is_added_and_clipped():
    translator = residual()
    with torch.no_grad():
        translator.unet.last.bias.copy_(torch.tensor([0.25, -0.5, 3.0]))
    image = torch.rand(1, 3, 16, 16) * 2 - 1
    output = translator(image, torch.tensor([0]))
    shift = torch.tensor([0.25, -0.5, 3.0])[:, None, None]
    torch.testing.assert_close(output, torch.clip(image + shift, -1, 1))
    assert output.max() == 1  # or nothing was clipped


def test_gated_drops_the_source_where_the_gate_is_open():
    """d + (1 − m) image, and at the start the image."""
    translator = residual(gated=True)
    image, classes = torch.rand(2, 3, 16, 16) - 0.5, torch.tensor([0, 1])
    assert torch.equal(translator(image, classes), image)
    d = torch.tensor([0.1, -0.2, 0.3])
    for m in (0.25, 1.0):
        with torch.no_grad():
            translator.unet.last.bias.copy_(torch.tensor([*d, m]))
        expected = d[:, None, None] + (1 - m) * image
        torch.testing.assert_close(translator(image, classes), expected)
    with pytest.raises(ValueError, match="gated is of a residual translator: set residual too"):
        Translator(["dog"], image_size=16, widths=(8, 16), gated=True)


@pytest.mark.parametrize("gated", [False, True])
def test_residual_learns_from_its_start(gated):
    """The last level starts at zero and keeps the first gradient from the others; the second
    reaches all of them."""
    translator = residual(gated=gated)
    optimizer = torch.optim.SGD(translator.parameters(), lr=0.1)
    image = torch.rand(4, 3, 16, 16) - 0.5
    for _ in range(2):
        optimizer.zero_grad()
        translator(image, torch.tensor([0, 1, 0, 1])).square().mean().backward()
        optimizer.step()
    assert all(p.grad.abs().max() > 0 for p in translator.parameters())


@pytest.mark.parametrize("gated", [False, True])
def test_residual_survives_a_release(tmp_path, gated):
    translator = residual(norm="group", gated=gated)
    torch.nn.init.normal_(translator.unet.last.weight)
    translator.save_pretrained(tmp_path)
    image = torch.rand(1, 3, 16, 16)
    again = Translator.from_pretrained(tmp_path)
    torch.testing.assert_close(
        again(image, torch.tensor([1])), translator(image, torch.tensor([1]))
    )
    assert not torch.equal(again(image, torch.tensor([1])), image)


@pytest.mark.parametrize("x", [-7.0, -1.0001, -1.0, -0.3, 0.0, 0.9999, 1.0, 1.0001, 7.0])
@pytest.mark.parametrize("target", [-0.6, 0.0, 0.6])
def test_clip_s_gradient_is_never_lost_and_leads_to_where_the_loss_wants_it(x, target):
    """A plain clamp's inside the range; outside, where that has none, towards the target."""
    value = torch.tensor([x], dtype=torch.float64, requires_grad=True)
    clipped = clip(value)
    assert clipped.item() == min(max(x, -1), 1)
    (gradient,) = torch.autograd.grad((clipped - target).square().sum(), value)
    assert gradient.item() == pytest.approx(2 * (clipped.item() - target))
    assert gradient.item() * (x - target) >= 0 and (gradient.item() != 0 or x == target)
    if abs(x) < 1:
        (plain,) = torch.autograd.grad((value.clamp(-1, 1) - target).square().sum(), value)
        assert torch.equal(gradient, plain)


@pytest.mark.parametrize("target", [-0.5, 0.0, 0.5])
def test_a_pixel_that_is_out_comes_back(target):
    """Where a plain clamp leaves it for ever: descent on the distance of what is seen of it."""
    torch.manual_seed(0)
    x = (3 * torch.randn(64)).requires_grad_()
    assert (x.abs() > 1).sum() > 32
    for _ in range(400):
        (gradient,) = torch.autograd.grad((clip(x) - target).square().sum(), x)
        x.data -= 0.05 * gradient
    torch.testing.assert_close(x.detach(), torch.full((64,), target), rtol=0, atol=1e-4)


def test_a_translator_that_is_out_comes_back():
    """All of its pixels are: L2 to the source alone has to move the weights."""
    translator = residual()
    with torch.no_grad():
        translator.unet.last.bias.fill_(3.0)
    image = torch.rand(2, 3, 16, 16) * 1.8 - 0.9
    before = (translator(image, torch.tensor([0, 1])) - image).square().mean()
    optimizer = torch.optim.Adam(translator.parameters(), lr=0.1)
    for _ in range(60):
        optimizer.zero_grad()
        output = translator(image, torch.tensor([0, 1]))
        assert output.abs().max() <= 1
        (output - image).square().mean().backward()
        optimizer.step()
    assert (output - image).square().mean() < before / 10


def test_clip_is_exactly_a_clamp_on_the_way_there():
    """Older releases give what they gave, bit for bit, in half precision too."""
    x = 3 * torch.randn(1000)
    for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
        assert torch.equal(clip(x.to(dtype)), x.to(dtype).clamp(-1, 1))
        assert clip(x.to(dtype)).dtype == dtype
    assert clip(torch.tensor([float("nan")])).isnan().all(), "not hidden"


def test_a_size_that_cannot_be_halved_is_refused_with_those_that_can():
    with pytest.raises(ValueError, match=r"image_size 50: .*4 widths.* 3 times.*48 or 56 would do"):
        Translator(["dog"], image_size=50, widths=(8, 8, 8, 8))
    with pytest.raises(ValueError, match="a side of 4 cannot be: 8 would do"):
        Translator(["dog"], image_size=4, widths=(8, 8, 8, 8))
    Translator(["dog"], image_size=48, widths=(8, 8, 8, 8))
