"""The translator as a residual of its input; the U-Net is tested in test_unet."""

import torch

from lmc.translator import Translator


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


def test_residual_learns_from_its_start():
    """The last level starts at zero and keeps the first gradient from the others; the second
    reaches all of them."""
    translator = residual()
    optimizer = torch.optim.SGD(translator.parameters(), lr=0.1)
    image = torch.rand(4, 3, 16, 16) - 0.5
    for _ in range(2):
        optimizer.zero_grad()
        translator(image, torch.tensor([0, 1, 0, 1])).square().mean().backward()
        optimizer.step()
    assert all(p.grad.abs().max() > 0 for p in translator.parameters())


def test_residual_survives_a_release(tmp_path):
    translator = residual(norm="group")
    torch.nn.init.normal_(translator.unet.last.weight)
    translator.save_pretrained(tmp_path)
    image = torch.rand(1, 3, 16, 16)
    again = Translator.from_pretrained(tmp_path)
    torch.testing.assert_close(
        again(image, torch.tensor([1])), translator(image, torch.tensor([1]))
    )
    assert not torch.equal(again(image, torch.tensor([1])), image)
