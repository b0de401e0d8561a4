"""The translator's blend of edit and source; its U-Net is tested in test_unet and test_corrector."""

import pytest
import torch

from lmc.translator import Translator


def blending(**more) -> Translator:
    torch.manual_seed(0)
    return Translator(["dog", "bear"], image_size=16, widths=(8, 16), blend=True, **more)


def test_blend_starts_near_the_source():
    """m = sigmoid(-2) everywhere and no edit: (1 - m) times the image."""
    image = torch.rand(2, 3, 16, 16) * 2 - 1
    output = blending()(image, torch.tensor([0, 1]))
    torch.testing.assert_close(output, image * (1 - 1 / (1 + 2.718281828**2)))


@pytest.mark.parametrize(("mask", "edited"), [(-40.0, False), (40.0, True)])
def test_blend_is_the_source_or_the_edit_where_the_mask_says(mask, edited):
    translator = blending()
    with torch.no_grad():
        translator.unet.last.bias.copy_(torch.tensor([0.3, -0.2, 9.0, mask]))
    image = torch.rand(1, 3, 16, 16) * 2 - 1
    edit = torch.tensor([0.3, -0.2, 9.0]).tanh()[:, None, None].expand(1, 3, 16, 16)
    output = translator(image, torch.tensor([0]))
    torch.testing.assert_close(output, edit if edited else image, rtol=0, atol=1e-6)


def test_blend_learns_from_its_start():
    """One gradient step's direction reaches the first level although the last starts at zero: after
    one step of the last layer, all parameters have a gradient."""
    translator = blending()
    optimizer = torch.optim.SGD(translator.parameters(), lr=1.0)
    image = torch.rand(4, 3, 16, 16) * 2 - 1
    for _ in range(2):
        optimizer.zero_grad()
        translator(image, torch.tensor([0, 1, 0, 1])).square().mean().backward()
        optimizer.step()
    assert all(p.grad.abs().max() > 0 for p in translator.parameters())


def test_blend_survives_a_release(tmp_path):
    translator = blending(norm="group")
    translator.save_pretrained(tmp_path)
    image = torch.rand(1, 3, 16, 16)
    again = Translator.from_pretrained(tmp_path)
    assert again.blend
    torch.testing.assert_close(
        again(image, torch.tensor([1])), translator(image, torch.tensor([1]))
    )
