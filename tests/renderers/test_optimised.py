"""Scenes and drawings through the loop that optimises them, on gaussian images."""

import pytest
import torch

from lmc.losses import SDS
from lmc.optimize import Synthesis, optimize
from lmc.renderers.cameras import SUFFIXES, Orbits
from lmc.renderers.drawing import Drawing
from lmc.renderers.orbit import OrbitedScene
from lmc.renderers.scene import Scene, vertices
from lmc.renderers.svg import SVG

from gaussian import GaussianPrior, small_prior

BRIEF = Synthesis(6, decay_steps=0)


def prior_of_views() -> GaussianPrior:
    prior = small_prior(16)
    for suffix in SUFFIXES:
        prior.means[f"cat{suffix}"] = prior.means["cat"]
    return prior


def orbited(orbits: Orbits | None = None, **options) -> OrbitedScene:
    torch.manual_seed(0)
    return OrbitedScene(Scene(8, samples=8), orbits or Orbits(), size=16, **options)


def test_a_scene_is_optimised_from_everywhere_and_becomes_finer():
    scene = orbited(views=2, ambient=0.5, weights={"orientation": 0.1}, finer={0.5: 15})
    before = scene.scene.colour.detach().clone()
    image = optimize(scene, prior_of_views(), SDS(4), ["cat"], [0], BRIEF)
    assert image.shape == (1, 3, 16, 16) and image.isfinite().all()
    assert scene.scene.resolution == 15
    assert (scene.scene.colour[..., ::2, ::2, ::2] - before).abs().max() > 0.01
    again = orbited(views=2, ambient=0.5, weights={"orientation": 0.1}, finer={0.5: 15})
    assert torch.equal(image, optimize(again, prior_of_views(), SDS(4), ["cat"], [0], BRIEF))


@pytest.mark.parametrize(
    ("finer", "found"),
    [
        ({0.01: 11}, [11, 11, 11]),
        ({0.5: 15, 0.01: 11}, [11, 15, 15, 15]),
        ({0.2: 15, 0.1: 11}, [15, 15]),
        ({1.0: 9}, [8, 8, 9]),
    ],
)
def test_voxels_become_finer_in_a_short_run_too(finer, found):
    scene, seen = orbited(finer=finer), []
    for step in range(len(found)):
        scene.after(step, len(found), torch.Generator())
        seen.append(scene.scene.resolution)
    assert seen == found


@pytest.mark.parametrize(("drawn", "shown"), [((-10, 90), 15), ((40, 60), 40), ((-60, -20), -20)])
def test_a_scene_is_shown_from_where_cameras_are_drawn(drawn, shown, tmp_path, monkeypatch):
    scene = orbited(Orbits(elevation=drawn))
    with torch.no_grad():  # another one from each elevation
        scene.scene.colour.normal_(generator=torch.Generator().manual_seed(0))
    assert torch.equal(scene(), scene.scene(scene.orbits.turntable(1, shown), 16))
    written = {}
    monkeypatch.setattr(Scene, "turntable_gif", lambda *_, **options: written.update(options))
    scene.save(tmp_path, ["it"])
    assert written["elevation"] == shown


@pytest.mark.parametrize(("inside", "meshed"), [(-2.0, True), (-1e3, False)])
def test_a_scene_is_saved_whatever_is_outside_its_ball(inside, meshed, tmp_path):
    """What is there is thin, or nothing at all; the corners of the cube are dense."""
    scene = orbited()
    far = vertices(8, 1.0).norm(dim=-1)
    with torch.no_grad():
        scene.scene.density.copy_(torch.where(far <= 0.5, inside, -1e3))
        scene.scene.density[..., far > 1] = 50.0
    scene.save(tmp_path, ["it"])
    assert (tmp_path / "it.ply").exists() == meshed
    assert (tmp_path / "it.gif").exists()
    assert torch.equal(Scene.load(tmp_path / "it").density, scene.scene.density)


def test_a_scene_s_regularisers_count():
    """Sparsity alone, weighed heavily, thins it out."""
    thin, free = orbited(weights={"sparsity": 1e5}), orbited(weights={"sparsity": 0.0})
    for scene in (thin, free):
        optimize(scene, prior_of_views(), SDS(4), ["cat"], [0], Synthesis(20, decay_steps=0))
    assert thin.scene.density.mean() < free.scene.density.mean() - 0.05


def test_a_drawing_has_rates_of_its_own_and_starts_vanished_paths_anew():
    svg = SVG.random(3, 64, torch.Generator().manual_seed(0))
    with torch.no_grad():
        svg.opacity[1] = 0.0
    points = svg.points.detach().clone()
    drawing = Drawing(svg, points_lr=0.1, colours_lr=0.01, anew=3)
    optimize(drawing, small_prior(16), SDS(4), ["cat"], [0], BRIEF)
    assert svg.opacity[1] > 0.5, "it is seen again"
    moved = (svg.points - points).abs().amax((1, 2))
    assert 0 < moved[:4].max() <= 0.1 * 6


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"views": 0}, "views must be at least 1"),
        ({"lr": 0.0}, "lr must be above 0, got 0.0"),
        ({"lr": float("nan")}, "lr must be above 0, got nan"),
        ({"ambient": 2.0}, "ambient must be a share"),
        ({"weights": {"beauty": 1.0}}, "weights must be of sparsity, opacity, orientation"),
        ({"finer": {3.0: 20}}, "finer must be by shares of the run, above 0 .*, got 3"),
        ({"finer": {0: 20}}, "finer must be by shares of the run, above 0 .*, got 0"),
        ({"finer": {0.5: 8}}, "finer must be ever finer, above 8 after 0.5 of the run, got 8"),
        ({"finer": {0.5: 20, 0.9: 10}}, "finer must be ever finer, above 20 .*, got 10"),
        ({"finer": {0.9: 20, 0.5: 30}}, "finer must be ever finer, above 30 .*, got 20"),
    ],
)
def test_a_scene_s_settings_are_checked(options, said):
    with pytest.raises(ValueError, match=said):
        orbited(**options)


@pytest.mark.parametrize("name", ["points_lr", "colours_lr", "warm_up", "anew"])
def test_a_drawing_s_settings_are_checked(name):
    svg = SVG.random(1, 8, torch.Generator())
    with pytest.raises(ValueError, match=f"{name} must be"):
        Drawing(svg, **{name: -1})


def test_a_regulariser_s_weight_may_change_in_the_first_half():
    scene = orbited(weights={"sparsity": 0.0, "opacity": (1.0, 5.0)})
    found = []
    for step in (0, 1, 2, 4, 7):
        seen = scene.see(step, 8, torch.Generator().manual_seed(0))
        found.append(seen.penalty.item())
    assert [each / found[0] for each in found] == pytest.approx([1, 2, 3, 5, 5])
