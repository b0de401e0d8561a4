"""The translator as a residual of its input, and of pictures; test_unet has the U-Net."""

import numpy as np
import pytest
import torch
from PIL import Image

from lmc.shards.images import from_uint8, to_uint8
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


# ---------------------------------------------------------------------------------------------
# Pictures


def random_picture(width: int, height: int, mode: str = "RGB", seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def tensor_of(picture: Image.Image) -> torch.Tensor:
    return from_uint8(torch.from_numpy(np.array(picture))).permute(2, 0, 1)[None]


@pytest.fixture
def translator() -> Translator:
    """Changes what it sees, each class by another shift, and goes through all its weights."""
    torch.manual_seed(0)
    return Translator(["dog", "bear"], image_size=16, widths=(8, 8, 8)).eval()


def test_a_picture_of_its_own_size_goes_through_as_it_is(translator):
    picture = random_picture(16, 16)
    found = translator.translate(picture, to="bear")
    with torch.no_grad():
        expected = to_uint8(translator(tensor_of(picture), torch.tensor([1])))[0]
    assert found.mode == "RGB" and np.array_equal(np.array(found), expected.permute(1, 2, 0))
    assert np.array(found).std() > 0
    assert not np.array_equal(np.array(found), np.array(translator.translate(picture, to="dog")))


@pytest.mark.parametrize("size", [(16, 16), (40, 30), (30, 41), (7, 200), (1, 1), (3, 2)])
@pytest.mark.parametrize("mode", ["RGB", "L", "P", "1", "CMYK", "I;16"])
def test_a_picture_of_any_size_and_mode_keeps_its_size(translator, size, mode):
    made = translator.translate(random_picture(*size).convert("L").convert(mode), to="dog")
    assert made.size == size and made.mode == "RGB"


def test_a_picture_is_not_squeezed(translator):
    """The identity's result is the picture scaled down and up by one factor on both sides."""
    same = residual()
    wide = Image.new("RGB", (64, 32), "white")
    wide.paste("black", (0, 0, 32, 32))
    edge = np.array(same.translate(wide, to="dog"))[:, :, 0]
    assert (edge[:, :28] == 0).all() and (edge[:, 36:] == 255).all()
    assert same._sides(64, 32) == (16, 32) and same._sides(33, 50) == (24, 16)


def test_several_pictures_are_several_and_in_order(translator):
    """Of sizes that go through together and alone, in batches or not."""
    pictures = [random_picture(*size, seed=i) for i, size in enumerate([(16, 16), (9, 30)] * 3)]
    alone = [translator.translate(picture, to="bear") for picture in pictures]
    for batch_size in (1, 2, 16):
        together = translator.translate(tuple(pictures), to="bear", batch_size=batch_size)
        assert isinstance(together, list) and len(together) == 6
        for one, other in zip(alone, together, strict=True):
            assert one.size == other.size
            difference = np.array(one).astype(int) - np.array(other).astype(int)
            assert abs(difference).max() <= 1  # another batch adds up in another order
    assert translator.translate([], to="bear") == []


def test_exif_and_alpha_are_kept_sensibly(translator, tmp_path):
    picture = random_picture(20, 30)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    picture.save(tmp_path / "turned.png", exif=exif)
    turned = translator.translate(Image.open(tmp_path / "turned.png"), to="dog")
    expected = translator.translate(picture.transpose(Image.Transpose.ROTATE_270), to="dog")
    assert turned.size == (30, 20) and np.array_equal(np.array(turned), np.array(expected))
    layers = picture.convert("RGBA")
    alpha = Image.linear_gradient("L").resize((20, 30))
    layers.putalpha(alpha)
    made = translator.translate(layers, to="dog")
    assert made.mode == "RGBA" and np.array_equal(np.array(made)[:, :, 3], np.array(alpha))
    # Whatever colour is stored where nothing is seen, it is white.
    hidden = [Image.new("RGBA", (16, 16), (*color, 0)) for color in ((9, 9, 9), (200, 0, 0))]
    one, two = (np.array(translator.translate(each, to="dog")) for each in hidden)
    white = np.array(translator.translate(Image.new("RGB", (16, 16), "white"), to="dog"))
    assert np.array_equal(one, two) and np.array_equal(one[:, :, :3], white)
    assert (one[:, :, 3] == 0).all()
    assert translator.translate(picture.convert("RGBA"), to="dog").mode == "RGB"


def test_what_cannot_be_translated_is_said(translator):
    picture = random_picture(16, 16)
    with pytest.raises(ValueError, match="unknown class 'horse'; known are dog, bear"):
        translator.translate(picture, to="horse")
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        translator.translate(picture, to="dog", batch_size=0)
    for wrong in (np.zeros((4, 4, 3)), ["cat.jpg"], torch.zeros(2, 3)):
        with pytest.raises(TypeError, match="translate takes PIL pictures, got a "):
            translator.translate(wrong, to="dog")
