"""The U-Net: shapes, errors, encodings, options."""

from itertools import pairwise

import pytest
import torch
from torch import nn

from lmc.unet import UNet, concatenate_condition, frequency_encoding


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("norm", ["none", "group"])
@pytest.mark.parametrize("widths", [(8, 16), (8, 8, 16), (8, 16, 16, 8, 24)])
def test_any_widths_keep_the_image_size(widths, norm):
    unet = UNet(5, 2, widths, norm)
    factor = 2 ** (len(widths) - 1)
    for height, width in ((factor, factor), (2 * factor, 3 * factor)):
        assert unet(noise(2, 5, height, width)).shape == (2, 2, height, width)


@pytest.mark.parametrize(("height", "width"), [(20, 24), (24, 20), (4, 8), (9, 8)])
def test_sizes_that_cannot_be_halved_name_the_factor(height, width):
    with pytest.raises(ValueError, match=f"{width} x {height} pixels: 8 must divide"):
        UNet(3, 3, (4, 4, 4, 4))(noise(1, 3, height, width))


@pytest.mark.parametrize("widths", [(), (8,), (8, 0), (8, -8)])
def test_too_few_or_empty_levels_are_an_error(widths):
    with pytest.raises(ValueError, match="widths"):
        UNet(3, 3, widths)


def test_group_norm_refuses_widths_it_cannot_split():
    with pytest.raises(ValueError, match=r"8 divides.*\[8, 12\]"):
        UNet(3, 3, (8, 12), "group")
    UNet(3, 3, (8, 12), "none")


def test_unknown_norm_is_an_error():
    with pytest.raises(ValueError, match="batch"):
        UNet(3, 3, (8, 8), "batch")


@pytest.mark.parametrize(("norm", "count"), [("none", 0), ("group", 10)])
def test_norm_sits_before_every_relu_or_nowhere(norm, count):
    unet = UNet(3, 3, (8, 16, 24), norm)  # five levels of two
    layers = [m for m in unet.modules() if isinstance(m, nn.Conv2d | nn.GroupNorm | nn.ReLU)]
    kinds = [type(layer) for layer in layers]
    assert kinds.count(nn.GroupNorm) == count
    groups = [layer for layer in layers if isinstance(layer, nn.GroupNorm)]
    assert all(layer.num_channels == 8 * layer.num_groups for layer in groups)
    for before, kind in pairwise(kinds):
        if kind is nn.ReLU:
            assert before is (nn.GroupNorm if norm == "group" else nn.Conv2d)


def test_tanh_bounds_the_output_and_only_where_asked():
    torch.manual_seed(0)
    bounded, free = UNet(3, 3, (8, 16)), UNet(3, 3, (8, 16), bounded=False)
    free.load_state_dict(bounded.state_dict())
    x = 20 * noise(2, 3, 16, 16)
    with torch.no_grad():
        assert free(x).abs().max() > 1
        assert bounded(x).abs().max() <= 1
        torch.testing.assert_close(bounded(x), free(x).tanh())


def test_skips_carry_detail_past_the_middle():
    """With the middle level silenced, a change of one pixel still moves that pixel's output."""
    torch.manual_seed(0)
    unet = UNet(1, 1, (8, 8, 8), bounded=False)
    unet.middle[-2].weight.data.zero_()
    unet.middle[-2].bias.data.zero_()
    x, other = noise(1, 1, 32, 32), noise(1, 1, 32, 32)
    other[0, 0, 5, 7] += 1
    with torch.no_grad():
        change = (unet(other) - unet(x)).abs()[0, 0]
    assert change[5, 7] > 1e-4
    # Without the middle no path is wider than four convolutions at half size and four at whole:
    # the far corner does not notice.
    assert change[31, 31] == 0


def test_middle_sees_further_than_the_skips():
    torch.manual_seed(0)
    unet = UNet(1, 1, (8, 8, 8), bounded=False).double()
    x = noise(1, 1, 32, 32).double().requires_grad_()
    unet(x)[0, 0, 16, 16].backward()
    reached = x.grad[0, 0].nonzero()
    assert reached.min() < 8 and reached.max() > 24


def test_every_parameter_is_used():
    unet = UNet(3, 2, (8, 16, 8), "group")
    unet(noise(2, 3, 16, 16)).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in unet.parameters())


def test_frequency_encoding_is_sines_and_cosines_of_doubling_frequency():
    x = torch.tensor([0.0, 0.3, 0.98], dtype=torch.float64)
    encoding = frequency_encoding(x)
    assert encoding.shape == (3, 10) and encoding.dtype == torch.float64
    for k in range(5):
        angle = 2**k * torch.pi * x
        torch.testing.assert_close(encoding[:, k], angle.sin(), rtol=0, atol=1e-12)
        torch.testing.assert_close(encoding[:, 5 + k], angle.cos(), rtol=0, atol=1e-12)
    assert frequency_encoding(x, 4).shape == (3, 4)


@pytest.mark.parametrize("count", [1, 2, 4, 8, 100])
def test_classes_are_encoded_distinctly(count):
    """Also the first and the last, which a full turn would make one."""
    encoding = frequency_encoding(torch.arange(count) / count)
    distance = torch.cdist(encoding, encoding) + 10 * torch.eye(count)
    assert distance.min() > 0.1


def test_times_are_encoded_distinctly():
    # Neighbours of DDPM's grid, 0.001 apart, differ by at least π/1000 · 2^4 = 0.05.
    encoding = frequency_encoding(torch.arange(20, 981) / 1000)
    distance = torch.cdist(encoding, encoding) + 10 * torch.eye(961)
    assert distance.min() > 0.04


def test_condition_is_appended_to_every_pixel():
    image, condition = noise(2, 3, 4, 6).double(), noise(2, 5, seed=1)
    joined = concatenate_condition(image, condition)
    assert joined.shape == (2, 8, 4, 6) and joined.dtype == image.dtype
    assert torch.equal(joined[:, :3], image)
    for row in range(4):
        for column in range(6):
            assert torch.equal(joined[:, 3:, row, column], condition.double())
