"""Vector graphics: rasters beside resvg's, gradients, files."""

import io
import math
from pathlib import Path

import numpy as np
import pytest
import resvg_py
import torch
from PIL import Image
from torch.nn.functional import mse_loss

from lmc.losses import SDS
from lmc.optimize import Synthesis, optimize
from lmc.renderers import svg_file
from lmc.renderers.svg import SVG, learning_rate

from gaussian import small_prior

HEAD = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 100 100">'
DRAWN = {
    "curves": f"""{HEAD}
        <path fill="#c33" d="M10 80C20 5 60 5 90 60S50 100 10 80z"/>
        <path fill="teal" fill-opacity=".6" d="M20 20Q60 0 80 40T30 70z m9 9l1-1v5h-5"/></svg>""",
    "holes": f"""{HEAD}
        <path fill="navy" d="M10 10H90V90H10ZM30.3 30.3V70.2H70.7V30.3Z"/>
        <path fill="gold" d="M40 40h40v40h-40zM50 50h20v20h-20z"/>
        <path fill="green" opacity=".5" d="M50 2 L70 60 L15 22 H85 L30 60z"/></svg>""",
    "overlap": """<svg xmlns="http://www.w3.org/2000/svg" viewBox="-10 -10 120 120">
        <title>of <tspan>circles</tspan></title><defs><linearGradient id="unused"/></defs>
        <rect width="100%" x="-10" y="-10" height="120" fill="#def"/>
        <g opacity=".7"><circle cx="40" cy="40" r="35" fill="red"/></g>
        <circle cx="70" cy="55" r="30" fill="rgb(0, 0, 255)" fill-opacity="0.5"/>
        <ellipse cx="50px" cy="80" rx="45" ry="12.5" style="fill:#0f08;opacity:.8"/>
        <circle cx="5" cy="5" r="9" fill="none"/><g display="none"><text>x</text></g></svg>""",
    "arcs": """<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 24 24">
        <path d="M12 2a10 10 0 1010 10A10 10 0 0012 2zm0 4a6 6 0 016 6 6 6 0 01-6 6z"/>
        <path fill="purple" d="M3 20a5 2 30 0 1 8-1a3 1.2-20 1,0 4 0l2 4z"/>
        <path fill="green" d="M18 2a1 1 0 0 0 5 2A0 3 0 0 0 21 6 z"/>
        <rect x="1" y="1" width="7" height="5" rx="2" fill="orange"/></svg>""",
    "transforms": """<svg xmlns="http://www.w3.org/2000/svg" width="200" height="200px">
        <g transform="translate(100,100) rotate(30)" fill="blue">
          <rect x="-50" y="-20" width="100" height="40" fill="crimson"/>
          <g transform="scale(1 -1.5) skewX(20)"><polygon points="0,0 40,10 20,50"/></g></g>
        <polyline transform="matrix(.5 .1 -.2 .8 20 10)" points="10 10 60 20 30 90" fill="#0a0"/>
        <path transform="rotate(45 150 50)skewY(10)" d="M130 40h40v20h-40z" fill="#888"/></svg>""",
    "outside and thin": f"""{HEAD}
        <path d="M10 10 L90 13 L90 14.4 L10 12.3z"/>
        <path d="M-50 50 L150 40 L150 60z" fill="brown" opacity=".4"/>
        <path d="M30 -20 L70 -20 L60 130 L40 130z" fill="olive" opacity=".4"/></svg>""",
}


def svg_of(text: str, folder: Path, size: int | tuple[int, int]) -> SVG:
    file = folder / "a.svg"
    file.write_text(text, encoding="utf-8")
    return SVG.read(file, size)


def raster(svg: SVG) -> np.ndarray:
    """(H, W, 3) in [0, 255]."""
    return ((svg().detach()[0] + 1) * 127.5).permute(1, 2, 0).numpy()


def resvg(text: str, height: int, width: int, finer: int = 1) -> np.ndarray:
    """The same by resvg, drawn `finer` times as large and averaged."""
    size = {"width": width * finer, "height": height * finer}
    png = resvg_py.svg_to_bytes(svg_string=text, background="#fff", **size)
    pixels = np.asarray(Image.open(io.BytesIO(bytes(png))).convert("RGB"), dtype=float)
    return pixels.reshape(height, finer, width, finer, 3).mean((1, 3))


def circle(x: float, y: float, radius: float, clockwise: bool = True) -> torch.Tensor:
    """Four quarters as a contour (4, 3, 2)."""
    k = 4 / 3 * math.tan(math.pi / 8)
    quarter = torch.tensor([1, 1 + k * 1j, 1j + k])
    turned = torch.cat([quarter * 1j**i for i in range(4)])
    turned = turned if clockwise else turned.conj()
    return torch.view_as_real(turned * radius + complex(x, y)).view(4, 3, 2)


def one(*contours: torch.Tensor, size: int = 32, opacity: float = 1.0) -> SVG:
    """A black path on white."""
    box = (0.0, 0.0, float(size), float(size))
    return SVG([contours], torch.zeros(1, 3), torch.tensor([opacity]), size, box)


def polygon(*corners: tuple[float, float]) -> torch.Tensor:
    a = torch.tensor(corners)
    b = a.roll(-1, 0)
    return torch.stack([a, a + (b - a) / 3, b - (b - a) / 3], 1)


@pytest.mark.parametrize("name", DRAWN)
def test_a_raster_is_resvgs(name, tmp_path):
    ours, theirs = raster(svg_of(DRAWN[name], tmp_path, 128)), resvg(DRAWN[name], 128, 128)
    assert theirs.std() > 20  # something is drawn
    assert np.abs(ours - theirs).mean() < 2
    near = np.stack([np.roll(theirs, (i, j), (0, 1)) for i in (-1, 0, 1) for j in (-1, 0, 1)])
    inner = np.s_[1:-1, 1:-1]
    assert (ours > near.min(0) - 12)[inner].all() and (ours < near.max(0) + 12)[inner].all()


@pytest.mark.parametrize("name", DRAWN)
def test_edges_are_averages_over_pixels(name, tmp_path):
    ours, theirs = raster(svg_of(DRAWN[name], tmp_path, 48)), resvg(DRAWN[name], 48, 48, 16)
    assert np.abs(ours - theirs).mean() < 0.5


@pytest.mark.parametrize(
    ("short", "long"),
    [
        (
            '<polygon points="10-10 20,30 5.5.5 1 1"/>',
            '<polygon points="10 -10 20 30 5.5 .5 1 1"/>',
        ),
        ('<polygon points="1e1-1e1+20+30,4px 5px"/>', '<polygon points="10 -10 20 30 4 5"/>'),
        (
            '<g transform="translate(10-20)scale(.5.25)"><path d="M1 1h9v9z"/></g>',
            '<g transform="translate(10,-20) scale(0.5, 0.25)"><path d="M1 1h9v9z"/></g>',
        ),
    ],
)
def test_numbers_need_nothing_between_them(short, long, tmp_path):
    first, same = (svg_of(f"{HEAD}{text}</svg>", tmp_path, 16) for text in (short, long))
    assert torch.equal(first.points, same.points)


@pytest.mark.parametrize(
    ("fill", "opacity"),
    [
        ("rgba(255,0,0,1)", 1),
        ("rgba(255, 0, 0, 0.5)", 0.5),
        ("rgba(100%, 0%, 0%, 25%)", 0.25),
        ("RGBA(255,0,0,.5)", 0.5),
        ("rgb(255 0 0 0.5)", 0.5),
        ("rgba(255,0,0,7)", 1),
        ("rgba(255,0,0)", 1),
        ("rgb(255,0,0)", 1),
        ("#ff000080", 128 / 255),
    ],
)
def test_a_colour_s_opacity_is_a_share(fill, opacity, tmp_path):
    svg = svg_of(f'{HEAD}<path fill="{fill}" d="M1 1h9v9z"/></svg>', tmp_path, 16)
    assert svg.colours.tolist() == [[1, 0, 0]]
    assert svg.opacity.item() == pytest.approx(opacity)


def test_a_viewbox_of_another_shape_is_in_the_middle(tmp_path):
    text = (
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="10 20 60 30">'
        '<circle cx="40" cy="35" r="14"/></svg>'
    )
    ours = raster(svg_of(text, tmp_path, (64, 48)))
    padded = text.replace("10 20 60 30", "10 -5 60 80")
    assert np.abs(ours - resvg(padded, 64, 48, 8)).mean() < 0.3


def test_a_file_is_read_as_it_was_written(tmp_path):
    generator = torch.Generator().manual_seed(0)
    hole = [circle(15, 15, 9.1), circle(15, 14, 4.7, clockwise=False)]
    colours, opacity = torch.rand(2, 3, generator=generator), torch.tensor([0.3, 1.0])
    box = (-3.3, 0.1, 31.7, 41.0)
    svg = SVG(
        [hole, [polygon((1, 2), (9, 3), (4.7, 30))]], colours, opacity, 40, box, (0.1, 0.7, 1)
    )
    svg.save(tmp_path / "a" / "out.svg")
    again = SVG.read(tmp_path / "a" / "out.svg", 40)
    for name, value in svg.named_parameters():
        assert torch.equal(value, dict(again.named_parameters())[name]), name
    assert torch.equal(svg(), again()) and again.sizes == svg.sizes == [[4, 4], [3]]
    text = (tmp_path / "a" / "out.svg").read_text()
    assert np.abs(raster(svg)[:, 5:35] - resvg(text, 40, 40, 16)[:, 5:35]).mean() < 0.5


def test_gradients_are_the_finite_differences():
    generator = torch.Generator().manual_seed(1)
    contours = [[circle(5.3, 4.1, 3.3), circle(5.1, 4.4, 1.2, False)], [circle(2.7, 6.2, 2.9)]]
    svg = SVG(contours, torch.full((2, 3), 0.4), torch.tensor([0.6, 0.9]), 9, (0, 0, 8, 8))
    with torch.no_grad():
        svg.points.add_(torch.randn(svg.points.shape, generator=generator), alpha=0.3)
    svg.double().background.requires_grad_()
    weights = torch.randn(3 * 9 * 9, 4, generator=generator, dtype=torch.float64)
    names, values = zip(*svg.named_parameters(), strict=True)

    def render(*values: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(svg, dict(zip(names, values, strict=True))).flatten()

    with torch.no_grad():
        svg.background.fill_(0.8)
    inputs = [value.detach().clone().requires_grad_() for value in values]
    assert torch.autograd.gradcheck(lambda *x: render(*x) @ weights, inputs, atol=1e-6)


@pytest.mark.parametrize("clockwise", [True, False])
@pytest.mark.parametrize("whole", [True, False], ids=["on whole pixels", "between them"])
def test_the_pixels_together_are_the_area(clockwise, whole):
    """And so are gradients, where edges lie between two pixels too: none is dead."""
    corners = [(4.0, 5.0), (20.0, 5.0), (20.0, 17.0), (4.0, 17.0)]
    if not whole:
        corners = [(x + 0.37 * y, y + 0.21) for x, y in corners]
    svg = one(polygon(*(corners if clockwise else corners[::-1])))
    ((1 - svg()) / 2).mean(1).sum().backward()  # black on white: the pixels covered
    ends = torch.tensor(corners if clockwise else corners[::-1], requires_grad=True)
    x, y = ends.unbind(-1)
    area = ((x * y.roll(-1) - x.roll(-1) * y).sum() / 2).abs()
    area.backward()
    torch.testing.assert_close(svg.areas()[0], area.detach())
    # a corner moves with the control points beside it: lines stay lines
    found = svg.points.grad
    a, b = found[:, 1].roll(1, 0), found[:, 2].roll(1, 0)
    moved = found[:, 0] + found[:, 1] * 2 / 3 + found[:, 2] / 3 + a / 3 + b * 2 / 3
    torch.testing.assert_close(moved, ends.grad, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize(
    "contour",
    [
        torch.full((4, 3, 2), 7.0),
        torch.full((1, 3, 2), 7.3),
        polygon((3, 4), (20, 9)),
        polygon((3, 4), (20, 4), (7, 4)),
        polygon((3, 4), (3, 4), (7, 9), (7, 9)),
        polygon((5, 5), (9, 5 + 1e-7), (12, 5 - 1e-7), (20, 12)),
        polygon((-1e9, 3), (1e9, 4), (3e8, 1e9)),
        polygon((-40, -40), (-30, -30), (-40, -20)),
    ],
    ids=["a point", "one segment", "a line", "level", "twice", "nearly level", "huge", "unseen"],
)
def test_gradients_of_a_degenerate_path_are_finite(contour):
    svg = one(contour)
    generator = torch.Generator().manual_seed(0)
    (svg() * torch.randn(svg().shape, generator=generator)).sum().backward()
    assert svg().isfinite().all()
    for value in (svg.points, svg.colours, svg.opacity):
        assert value.grad.isfinite().all() and value.grad.abs().max() < 1e4


def test_points_that_are_none_are_no_crash():
    """The optimisation finds out by itself, by the gradients that led there."""
    svg = one(circle(9, 9, 5))
    with torch.no_grad():
        svg.points[1, 1, 0] = math.nan
    assert svg().shape == (1, 3, 32, 32)


def test_colours_are_put_back_and_never_dead():
    svg = one(circle(16, 16, 9), opacity=0.5)
    with torch.no_grad():
        svg.colours.fill_(1.5)
        svg.opacity.fill_(-0.5)
    svg().sum().backward()
    assert (svg.colours == 1).all() and (svg.opacity == 0).all()
    with torch.no_grad():
        svg.opacity.fill_(3)
        svg.colours.fill_(-1)
    svg().sum().backward()
    assert (svg.colours.grad > 100).all() and (svg.opacity.grad < -100).all()


def test_two_pictures_have_their_gradients():
    svg = one(circle(16, 16, 9), opacity=0.5)
    svg.background.requires_grad_()
    first, second = svg(), svg()
    (first + second).sum().backward()
    both = [value.grad.clone() for value in svg.parameters()]
    svg.zero_grad()
    svg().sum().backward()
    for value, twice in zip(svg.parameters(), both, strict=True):
        torch.testing.assert_close(twice, 2 * value.grad)


def test_of_each_path_one_picture_is_kept_for_the_gradient():
    svg = SVG.random(16, 64, torch.Generator().manual_seed(0))
    with torch.profiler.profile(profile_memory=True) as profile:
        image = svg()
    kept = sum(event.self_cpu_memory_usage for event in profile.key_averages())
    assert image.numel() * 4 < kept < 1.3 * 17 * image.numel() * 4


def test_a_circle_is_moved_onto_another():
    target = one(circle(19, 14, 8), size=32)
    with torch.no_grad():
        target.colours.copy_(torch.tensor([[0.9, 0.2, 0.4]]))
        picture = target()
    svg = one(circle(13, 17, 5), size=32)
    groups = svg.parameter_groups(0.3, 0.05)
    adam = torch.optim.Adam(groups)
    rates = [group["lr"] for group in groups]
    for step in range(150):
        for group, rate in zip(adam.param_groups, rates, strict=True):
            group["lr"] = rate * learning_rate(step, 150, 10)
        loss = mse_loss(svg(), picture)
        adam.zero_grad()
        loss.backward()
        adam.step()
    assert 10 * math.log10(4 / loss.item()) > 35
    assert svg.areas().item() == pytest.approx(math.pi * 64, rel=0.02)
    seen = 1 - svg.opacity * (1 - svg.colours)  # over white
    assert (seen - target.colours).abs().max() < 0.01


def test_rates_are_by_the_pixel():
    box = (0.0, 0.0, 8.0, 8.0)
    svg = SVG([[circle(4, 4, 2)]], torch.zeros(1, 3), torch.ones(1), 64, box)
    points, fills = svg.parameter_groups(1.0, 0.1)
    assert points["params"] == [svg.points] and points["lr"] == 1 / 8 and fills["lr"] == 0.1
    assert len(fills["params"]) == 2
    svg.background.requires_grad_()
    assert svg.parameter_groups(1.0, 0.1)[1]["params"][2] is svg.background


def test_the_rate_warms_up_and_falls():
    rates = [learning_rate(step, 100, 20) for step in range(101)]
    assert (
        rates[19] == pytest.approx(20 / 21) and rates[20] == 1 and rates[60] == pytest.approx(0.5)
    )
    assert np.allclose(np.diff(rates[:21]), 1 / 21) and rates[100] == pytest.approx(0)
    assert (np.diff(rates[20:]) < 0).all() and learning_rate(0, 1, 0) == 1


def test_random_paths_follow_the_seed():
    first, same, other = (
        SVG.random(16, 64, torch.Generator().manual_seed(i), 5) for i in (0, 0, 1)
    )
    assert torch.equal(first(), same()) and not torch.equal(first(), other())
    assert first.points.shape == (80, 3, 2) and first.sizes == [[5]] * 16
    areas = first.areas()
    assert areas.max() < 0.04 * 64**2 and areas.median() > 4 and first.opacity.min() >= 0.7


def test_paths_that_vanished_start_anew():
    svg = SVG.random(6, 64, torch.Generator().manual_seed(0))
    with torch.no_grad():
        svg.points.copy_(torch.cat([circle(10 + 9 * i, 20, 4) for i in range(6)]))
        svg.opacity[1] = 0.01
        svg.points[8:12] = 30  # without area
        svg.points[12:16] -= 500  # unseen
    before = svg.points.clone()
    begun = svg.reinitialise(torch.Generator().manual_seed(1), 0.05, 3.0)
    assert len(begun[svg.colours]) == len(begun[svg.opacity]) == 3
    same = [torch.equal(a, b) for a, b in zip(before.split(4), svg.points.split(4), strict=True)]
    assert same == [True, False, False, False, True, True]
    assert svg.opacity.min() >= 0.7 and (svg.areas() > 0.3).all()
    hole = one(circle(16, 16, 9), circle(16, 16, 4, False)[:3], opacity=0.0)
    begun = hole.reinitialise(torch.Generator(), 0.05, 3.0)
    assert [*begun.values()] == [[*range(7)], [0], [0]] and hole.points.shape == (7, 3, 2)


def test_a_loss_moves_all_of_it():
    svg = SVG.random(4, 16, torch.Generator().manual_seed(0))
    before = [value.clone() for value in (svg.points, svg.colours, svg.opacity)]
    image = optimize(svg, small_prior(16), SDS(4), ["dog"], [0], Synthesis(steps=2))
    assert image.shape == (1, 3, 16, 16) and image.isfinite().all()
    for old, new in zip(before, (svg.points, svg.colours, svg.opacity), strict=True):
        assert not torch.equal(old, new)


INSIDE = '<path d="M1 1h9v9z"/>'
REFUSED = {
    '<path stroke="#000" d="M1 1h9v9z"/>': ("line 3: <path>", "stroke"),
    '<g style="stroke: red"><path d="M1 1h9v9z"/></g>': ("line 3: <g>", "stroke"),
    '<path fill="url(#a)" d="M1 1h9v9z"/>': ("line 3: <path>", "url(#a)"),
    '<path fill="colourful" d="M1 1h9v9z"/>': ("line 3: <path>", "colourful"),
    '<path fill="rgb(1,2)" d="M1 1h9v9z"/>': ("line 3: <path>", "three numbers"),
    '<path fill="rgba(1,2,3,4,5)" d="M1 1h9v9z"/>': ("line 3: <path>", "three numbers"),
    '<path fill="rgba(1,2,3,x)" d="M1 1h9v9z"/>': ("line 3: <path>", "'x', which is no number"),
    '<path fill-rule="evenodd" d="M1 1h9v9z"/>': ("line 3: <path>", "evenodd"),
    '<path style="filter:url(#f)" d="M1 1h9v9z"/>': ("line 3: <path>", "filter"),
    '<path clip-path="url(#f)" d="M1 1h9v9z"/>': ("line 3: <path>", "clip-path"),
    "<text>a</text>": ("line 3: <text>", "path"),
    '<image href="a.png"/>': ("line 3: <image>", "cannot be drawn"),
    '<use href="#a"/>': ("line 3: <use>", "cannot be drawn"),
    "<linearGradient/>": ("line 3: <linearGradient>", "cannot be drawn"),
    "<clipPath/>": ("line 3: <clipPath>", "cannot be drawn"),
    "<style>path {fill: red}</style>": ("line 3: <style>", "cannot be drawn"),
    "<defs><style>.a {fill: red}</style></defs>": ("line 3: <style>", "write it as attributes"),
    '<g transform="rotate(9)" transform-origin="5 5"/>': ("line 3: <g>", "transform-origin '5 5'"),
    '<g style="transform-origin:center"/>': ("line 3: <g>", "transform-origin 'center'"),
    "<svg/>": ("line 3: <svg>", "cannot be drawn"),
    f'<g opacity=".5">{INSIDE}{INSIDE}</g>': ("line 3: the opacity of a group",),
    '<path d="M1 1L nan 4z"/>': ("line 3: <path>", "nan"),
    '<path d="M1 1L 1e999 4z"/>': ("line 3: <path>", "1e999"),
    '<path d="M1 1L 3"/>': ("line 3: <path>", "cannot be read from ''"),
    '<path d="L1 1 4 4"/>': ("line 3: <path>", "begin with M"),
    '<path d="5 5"/>': ("line 3: <path>", "from '5 5'"),
    '<path d="M1 1z5 5"/>': ("line 3: <path>", "from '5 5'"),
    '<path d="M1 1a1 1 0 2 0 5 5"/>': ("line 3: <path>", "from ' 2 0"),
    '<path d="M1 1 B 5 5"/>': ("line 3: <path>", "from ' B 5 5'"),
    '<circle r="inf"/>': ("line 3: <circle>", "has r 'inf'"),
    '<circle r="-1"/>': ("line 3: <circle>", "negative"),
    '<rect width="-1" height="3"/>': ("line 3: <rect>", "negative"),
    '<rect width="3mm" height="3"/>': ("line 3: <rect>", "'3mm'"),
    '<polygon points="1 2 3"/>': ("line 3: <polygon>", "pairs"),
    '<polygon points="1 2 3 --4"/>': ("line 3: <polygon>", "points '--4', which is no number"),
    '<polygon points="1 2 3 4e"/>': ("line 3: <polygon>", "points 'e', which is no number"),
    '<polygon points="1 2 3, 1e999"/>': ("line 3: <polygon>", "points '1e999'"),
    '<path opacity="x" d="M1 1h9v9z"/>': ("line 3: <path>", "opacity 'x'"),
    '<g transform="rotate(1 2)"/>': ("line 3: <g>", "rotate of 2"),
    '<g transform="turn(1)"/>': ("line 3: <g>", "turn"),
    '<g transform="scale(2"/>': ("line 3: <g>", "cannot be read"),
}


@pytest.mark.parametrize("text", REFUSED)
def test_what_cannot_be_drawn_is_named_with_its_line(text, tmp_path):
    with pytest.raises(ValueError, match=r"a\.svg") as caught:
        svg_of(f"{HEAD}\n{INSIDE}\n{text}</svg>", tmp_path, 16)
    assert all(part in str(caught.value) for part in REFUSED[text]), caught.value


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (f"{HEAD}<path", "no XML"),
        ("", "no XML"),
        ('<?xml version="1.0" encoding="none such"?><svg/>', "no XML"),
        ("<html/>", "must be <svg>"),
        (f"{HEAD}</svg>", "draws no filled path"),
        (f'{HEAD}<path fill="none" d="M1 1h9v9z"/><circle/></svg>', "draws no filled path"),
        (f"<svg>{INSIDE}</svg>", "no number"),
        (f'<svg viewBox="0 0 1">{INSIDE}</svg>', "four numbers"),
        (f'<svg viewBox="0 0 0 9">{INSIDE}</svg>', "above 0"),
        (f'<svg viewBox="0 0 nan 9">{INSIDE}</svg>', "no number"),
        (f'<svg viewBox="0 0 9 9" preserveAspectRatio="none">{INSIDE}</svg>', "preserveAspect"),
        (f'<!DOCTYPE svg [<!ENTITY a "b">]>\n{HEAD}&a;{INSIDE}</svg>', "line 1: the entity 'a'"),
        (f'<!DOCTYPE svg [<!ENTITY a SYSTEM "/x">]>{HEAD}&a;{INSIDE}</svg>', "the entity 'a'"),
    ],
)
def test_a_file_that_is_no_drawing_is_refused(text, said, tmp_path):
    with pytest.raises(ValueError, match=r"a\.svg") as caught:
        svg_of(text, tmp_path, 16)
    assert said in str(caught.value), caught.value


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.svg"):
        svg_file.read(tmp_path / "none.svg")


def test_what_editors_add_is_passed_over(tmp_path):
    text = f"""<?xml version="1.0"?><!DOCTYPE svg PUBLIC "-//W3C//DTD SVG 1.1//EN" "http://x/y.dtd">
        <svg xmlns="http://www.w3.org/2000/svg" xmlns:i="http://i" viewBox="0 0 9 9" i:v="1">
        <i:view><path d="nonsense"/></i:view><i:style/><metadata><path/></metadata><!-- <text/> -->
        {INSIDE}</svg>"""
    assert svg_of(text, tmp_path, 9).sizes == [[3]]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"paths": []}, "a path"),
        ({"paths": [[]]}, "a path"),
        ({"paths": [[torch.zeros(0, 3, 2)]]}, "a segment"),
        ({"paths": [[torch.zeros(4, 2)]]}, "3 points"),
        ({"paths": [[torch.full((4, 3, 2), math.nan)]]}, "finite"),
        ({"colours": torch.zeros(2, 3)}, "1 paths"),
        ({"opacity": torch.zeros(1, 1)}, "1 paths"),
        ({"size": 0}, "size"),
        ({"viewbox": (0, 0, -1, 1)}, "viewbox"),
    ],
)
def test_a_wrong_drawing_is_refused(change, said):
    right = {
        "paths": [[circle(4, 4, 2)]],
        "colours": torch.zeros(1, 3),
        "opacity": torch.ones(1),
        "size": 8,
        "viewbox": (0, 0, 8, 8),
    }
    SVG(**right)
    with pytest.raises(ValueError, match=said):
        SVG(**{**right, **change})


@pytest.mark.parametrize("key", ["paths", "size", "segments"])
def test_random_needs_something(key):
    with pytest.raises(ValueError, match=key):
        SVG.random(**{"paths": 1, "size": 8, "generator": torch.Generator(), key: 0})
