"""The 3D scene, against closed forms and pictures made without it."""

import json
import math
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from lmc.renderers.cameras import SUFFIXES, Cameras, Orbits
from lmc.renderers.scene import Scene, vertices

RED, GREEN, BLUE = (1.0, -1.0, -1.0), (-1.0, 1.0, -1.0), (-1.0, -1.0, 1.0)
# In front, to the right and above, as who stands in front sees it: centre, radius, colour.
SPHERES = (
    ((0.0, 0.0, 0.4), 0.3, RED),
    ((0.5, 0.0, 0.0), 0.3, GREEN),
    ((0.0, 0.5, 0.0), 0.3, BLUE),
)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def camera(azimuth: float = 0, elevation: float = 0, distance: float = 2.0, view: float = 60):
    return Cameras(*(torch.tensor([float(x)]) for x in (distance, elevation, azimuth, view)))


def painted(resolution: int = 48, samples: int = 64) -> Scene:
    """The three spheres, in voxels."""
    scene, points = Scene(resolution, samples=samples), vertices(resolution, 1.0)
    centres, radii, colours = (torch.tensor(each) for each in zip(*SPHERES, strict=True))
    inside, which = (radii - (points[..., None, :] - centres).norm(dim=-1)).max(-1)
    raw, colour = (2000 * inside).clamp(-60, 600), 8 * colours[which]
    scene.density.data, scene.colour.data = raw[None, None], colour.permute(3, 0, 1, 2)[None]
    return scene


def traced(cameras: Cameras, size: int, fine: int = 4) -> torch.Tensor:
    """The three opaque spheres before black, by intersecting rays with them; antialiased."""
    directions = cameras.rays(size * fine)
    origin = cameras.position[:, None, None]
    nearest = torch.full(directions.shape[:3], math.inf)
    image = -torch.ones_like(directions)
    for centre, radius, colour in SPHERES:
        towards = origin - torch.tensor(centre)
        along = (towards * directions).sum(-1)
        inside = along**2 - (towards.square().sum(-1) - radius**2)
        at = torch.where(inside > 0, -along - inside.clamp(min=0).sqrt(), math.inf)
        image = torch.where((at < nearest)[..., None], torch.tensor(colour), image)
        nearest = torch.minimum(nearest, at)
    return F.avg_pool2d(image.permute(0, 3, 1, 2), fine)


def psnr(one: torch.Tensor, other: torch.Tensor) -> float:
    return float(10 * (4 / (one - other).detach().square().mean()).log10())


def flat(raw: float, samples: int = 64, **options) -> Scene:
    """The same density everywhere in the ball, in float64."""
    scene = Scene(4, samples=samples, **options).double()
    scene.density.data.fill_(raw)
    return scene


def chords(cameras: Cameras, size: int, radius: float) -> torch.Tensor:
    """How far each ray goes through a ball around the origin, by the distance it passes at."""
    directions = cameras.rays(size).double()
    origin = cameras.position.double()[:, None, None].expand_as(directions)
    passes = torch.linalg.cross(origin, directions).norm(dim=-1)
    return 2 * (radius**2 - passes**2).clamp(min=0).sqrt()


@pytest.mark.parametrize("jitter", [None, 0])
@torch.no_grad()
def test_a_homogeneous_ball_lets_through_what_the_closed_form_says(jitter):
    """exp(-σ chord), at each pixel another chord; some rays miss the ball."""
    scene, cameras = flat(0.3, radius=0.8), Orbits(field_of_view=(70, 70)).draw(3, generator())
    chord = chords(cameras, 9, 0.8)
    assert chord.min() == 0 and chord.max() > 1.5
    drawn = generator(jitter) if jitter is not None else None
    opacity = scene.render(cameras, 9, generator=drawn).opacity
    expected = 1 - torch.exp(-math.log1p(math.exp(0.3)) * chord)
    torch.testing.assert_close(opacity, expected, atol=2e-5, rtol=0)


def test_a_ball_of_voxels_lets_through_about_what_the_closed_form_says():
    """Nothing outside half the radius, so that empty space is gone through as well."""
    scene, cameras = Scene(129, samples=256), Orbits(field_of_view=(40, 40)).draw(2, generator())
    far = vertices(129, 1.0).norm(dim=-1)
    sigma = math.log1p(math.exp(3))
    half = math.log(math.expm1(sigma / 2))  # the parameter where the density is half of it
    scene.density.data = (200 * (0.5 - far) + half).clamp(-20, 3)[None, None]
    opacity = scene.render(cameras, 15).opacity.detach().double()
    error = (opacity - 1 + torch.exp(-sigma * chords(cameras, 15, 0.5))).abs()
    assert error.mean() < 0.01 and opacity.max() > 0.9


@torch.no_grad()
def test_the_weights_of_a_pixel_sum_to_its_opacity():
    """White before black shows them: the image is their sum."""
    scene, cameras = painted(), Orbits().draw(2, generator())
    scene.colour.data.fill_(40)
    black = replace(cameras, background=-torch.ones(2, 3))
    out = scene.render(black, 16, generator=generator())
    shown = (out.image.mean(1) + 1) / 2
    torch.testing.assert_close(shown, out.opacity, atol=1e-3, rtol=0)
    assert float(out.weights.sum()) == pytest.approx(float(out.opacity.sum()), rel=1e-3)
    assert out.opacity.min() < 0.01 and out.opacity.max() > 0.99


class Regularised(torch.nn.Module):
    """What has a gradient through everything: the orientation holds its weights fast."""

    def __init__(self, scene: Scene) -> None:
        super().__init__()
        self.scene = scene

    def forward(self, cameras: Cameras) -> torch.Tensor:
        values = self.scene.regularisers(self.scene.render(cameras, 2))
        return torch.stack([values["sparsity"], values["opacity"]])


def tiny() -> Scene:
    """Random voxels in float64, few enough for finite differences."""
    scene = Scene(3, samples=5, radius=0.9).double()
    for parameter in scene.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator(), dtype=torch.float64)
    return scene


@pytest.mark.parametrize("shading", ["ambient", "diffuse", "textureless", None])
def test_gradients_are_those_of_finite_differences(shading):
    cameras = Orbits(field_of_view=(40, 40)).draw(2, generator(1))
    module = tiny() if shading else Regularised(tiny())
    names, values = zip(*module.named_parameters(), strict=True)
    inputs = (cameras, 2, shading) if shading else (cameras,)

    def call(*values):
        return torch.func.functional_call(module, dict(zip(names, values, strict=True)), inputs)

    assert torch.autograd.gradcheck(call, values)
    gradients = torch.autograd.grad(call(*values).square().sum(), values, allow_unused=True)
    moved = {n.split(".")[-1] for n, g in zip(names, gradients, strict=True) if g is not None}
    by_colour = {"colour"} if shading in ("ambient", "diffuse") else set()
    assert moved == {"density"} | by_colour | ({"background"} if shading else set())


def test_a_known_scene_is_recovered_from_its_pictures():
    """From random views of three spheres, coarse to fine; seen from others than those."""
    orbits, draws = Orbits(), generator()
    held_out = orbits.draw(8, generator(99))
    expected = traced(held_out, 32)
    scene = Scene(16, samples=32)
    assert psnr(scene(held_out, 32), expected) < 12
    for resolution in (16, 28):
        if resolution > scene.resolution:
            scene.upsample(resolution)
        groups = scene.parameter_groups(0.5)
        groups[1]["lr"] = 0.5  # black is far from grey
        adam = torch.optim.Adam(groups, betas=(0.9, 0.99))
        for _ in range(25):
            cameras = orbits.draw(2, draws)
            image = scene(cameras, 32, generator=draws)
            adam.zero_grad()
            (image - traced(cameras, 32, 2)).square().mean().backward()
            adam.step()
    assert psnr(scene(held_out, 32), expected) > 27


@torch.no_grad()
def test_the_rendering_is_the_traced_one():
    cameras = Orbits(elevation=(-10, 60)).draw(6, generator(3))
    black = replace(cameras, background=-torch.ones(6, 3))
    assert psnr(painted(64, 128)(black, 48), traced(cameras, 48)) > 25


def places(image: torch.Tensor) -> dict[str, tuple[float, float]]:
    """Where each colour is in a picture (3, S, S): to the right and up of the middle, -1 … 1."""
    line = torch.linspace(-1, 1, image.shape[-1])
    found = {}
    for name, colour in zip(("red", "green", "blue"), (RED, GREEN, BLUE), strict=True):
        near = (image - torch.tensor(colour)[:, None, None]).abs().amax(0) < 0.3
        up, right = near.nonzero(as_tuple=True)
        if len(up):
            found[name] = (float(line[right].mean()), -float(line[up].mean()))
    return found


@torch.no_grad()
def test_a_view_shows_what_its_camera_says():
    scene = painted()

    def seen(*place):
        return places(scene(camera(*place), 40)[0])

    front, right, back, above = seen(0), seen(90), seen(180), seen(0, 90)
    assert front["red"] == pytest.approx((0, 0), abs=0.06)
    assert front["green"][0] > 0.3 and front["green"][1] == pytest.approx(0, abs=0.06)
    assert front["blue"][1] > 0.3 and front["blue"][0] == pytest.approx(0, abs=0.06)
    assert right["green"] == pytest.approx((0, 0), abs=0.06)
    assert right["red"][0] < -0.25 and right["blue"][1] > 0.3
    assert back["green"][0] < -0.3 and back["blue"][1] > 0.3
    assert above["blue"] == pytest.approx((0, 0), abs=0.06)
    assert above["red"][1] < -0.25 and above["green"][0] > 0.3


def test_cameras_look_at_the_origin_from_where_they_are():
    cameras = Orbits(elevation=(-90, 90)).draw(20, generator())
    middle = cameras.rays(5)[:, 2, 2]
    torch.testing.assert_close(
        cameras.position + cameras.distance[:, None] * middle, torch.zeros(20, 3)
    )
    torch.testing.assert_close(cameras.rays(4).norm(dim=-1), torch.ones(20, 4, 4))
    assert camera(distance=2).position[0].tolist() == pytest.approx([0, 0, 2], abs=1e-6)
    assert camera(90, distance=2).position[0].tolist() == pytest.approx([2, 0, 0], abs=1e-6)
    assert camera(30, 90, 2).position[0].tolist() == pytest.approx([0, 2, 0], abs=1e-6)
    # The field of view is the angle between the outer edges of the picture.
    rays = camera(view=70).rays(1001)[0]
    angle = torch.acos((rays[500, 0] * rays[500, -1]).sum()).rad2deg()
    assert float(angle) == pytest.approx(70, abs=0.2)


@pytest.mark.parametrize(
    ("azimuth", "elevation", "expected"),
    [
        *((0, 0, "front"), (45, 0, "front"), (-45, 60, "front"), (360, 0, "front")),
        *((46, 0, "side"), (-90, 0, "side"), (135, 0, "side"), (270, 0, "side")),
        *((136, 0, "back"), (180, 10, "back"), (-180, 0, "back"), (200, 0, "back")),
        *((0, 61, "overhead"), (180, 90, "overhead")),
    ],
)
def test_the_suffix_follows_from_the_place(azimuth, elevation, expected):
    [number] = camera(azimuth, elevation).suffix
    assert SUFFIXES[number] == f", {expected} view"


def test_views_follow_from_the_generator():
    orbits = Orbits(random_background=0.5)
    one, same, other = (orbits.draw(4, generator(seed)) for seed in (1, 1, 2))
    for name, value in vars(one).items():
        torch.testing.assert_close(vars(same)[name], value, rtol=0, atol=0)
    assert not torch.equal(one.azimuth, other.azimuth)
    scene = painted(16, 16)
    image = scene(one, 8, generator=generator(5))
    assert torch.equal(image, scene(one, 8, generator=generator(5)))
    assert not torch.equal(image, scene(one, 8, generator=generator(6)))
    assert torch.equal(scene(one, 8), scene(one, 8))


def test_views_fill_their_ranges_and_keep_to_them():
    orbits = Orbits((2.0, 3.0), (30, 40), (0, 20), (-30, 30), random_background=0.3)
    draws = generator()
    cameras = orbits.draw(2000, draws)
    for name in ("distance", "field_of_view", "elevation", "azimuth"):
        (low, high), values = getattr(orbits, name), getattr(cameras, name)
        assert low <= values.min() < low + 0.01 * (high - low)
        assert high - 0.01 * (high - low) < values.max() <= high
    torch.testing.assert_close(cameras.light.norm(dim=1), torch.ones(2000))
    # On average towards the camera.
    assert (cameras.light * cameras.axes[:, 2]).sum(1).mean() > 0.6
    drawn = [orbits.draw(1, draws).background is not None for _ in range(500)]
    assert 0.24 < np.mean(drawn) < 0.36
    assert not any(Orbits().draw(1, draws).background is not None for _ in range(20))


def test_the_turntable_goes_around_once_or_to_and_fro():
    full = Orbits().turntable(8, 20)
    assert full.azimuth.tolist() == [0, 45, 90, 135, 180, 225, 270, 315]
    assert full.elevation.tolist() == [20] * 8 and full.distance.tolist() == [1.75] * 8
    for azimuth in ((0, 360), (-360, 0), (-90, 300)):
        assert Orbits(azimuth=azimuth).turntable(8).azimuth.tolist() == full.azimuth.tolist()
    part = Orbits(azimuth=(-30, 30)).turntable(4)
    assert part.azimuth.tolist() == pytest.approx([0, 30, 0, -30], abs=1e-4)


def test_it_begins_as_a_blob():
    density = F.softplus(Scene(33).density.detach()[0, 0])
    assert float(density[16, 16, 16]) == pytest.approx(10, abs=1e-3)
    assert float(density[16, 16, 24]) == pytest.approx(math.log(2))  # at half the radius
    assert float(density[16, 16, 32]) == pytest.approx(math.exp(-10), rel=1e-3)


def test_normals_point_outwards():
    scene, points = Scene(33), torch.randn(500, 3, generator=generator())
    outwards = F.normalize(points, dim=1)
    points = outwards * torch.linspace(0.2, 0.8, 500)[:, None]
    normals = scene.normals(points)
    assert (normals * outwards).sum(1).min() > 0.98
    torch.testing.assert_close(normals.norm(dim=1), torch.ones(500), atol=1e-3, rtol=0)
    assert not flat(1.0).normals(points.double()).any()


def ball(raw: float = 600.0) -> Scene:
    """Opaque, of radius 0.5, black before its light."""
    scene = Scene(65, samples=128)
    far = vertices(65, 1.0).norm(dim=-1)
    scene.density.data = (2000 * (0.5 - far)).clamp(-60, raw)[None, None]
    return scene


@torch.no_grad()
def test_a_lit_ball_is_lamberts():
    """0.1 + 0.9 max(0, normal · light) where rays hit the ball, for lights from two sides."""
    light = F.normalize(torch.tensor([[1.0, 0.5, 0.5]]), dim=1)
    view = camera(20, 10, view=30)
    for cameras in (replace(view, light=light), view):
        towards = view.axes[:, 2] if cameras.light is None else light
        directions, origin = view.rays(24)[0], view.position[0]
        along = (directions * origin).sum(-1)
        inside = along**2 - (origin.square().sum() - 0.25)
        hit = inside > 0.05  # not at the rim
        normal = 2 * (origin - (along + inside.clamp(min=0).sqrt())[..., None] * directions)
        expected = 0.1 + 0.9 * (normal @ towards[0]).clamp(min=0)
        shown = (ball()(cameras, 24, "textureless")[0, 0] + 1) / 2
        assert hit.sum() > 200 and (shown - expected)[hit].abs().mean() < 0.03
        # The colour, grey here, times the same.
        lit = (ball()(cameras, 24, "diffuse")[0, 0] + 1) / 2
        torch.testing.assert_close(lit[hit], shown[hit] / 2, atol=2e-3, rtol=0)


@torch.no_grad()
def test_regularisers_say_what_they_are_for():
    cameras = replace(camera(view=40), background=torch.ones(1, 3))

    def of(scene):
        out = scene.render(cameras, 24)
        return {name: float(value) for name, value in scene.regularisers(out).items()}, out

    solid, out = of(ball())
    opacity = out.opacity
    assert solid["sparsity"] == pytest.approx(float((opacity**2 + 0.01).sqrt().mean()), rel=1e-4)
    empty, _ = of(ball(-60.0))
    thin, _ = of(ball(0.0))  # neither here nor there
    assert empty["sparsity"] == pytest.approx(0.1, abs=1e-3) and empty["orientation"] == 0
    assert empty["opacity"] < 0.01 and thin["opacity"] > 5 * solid["opacity"]
    hollow = Scene(65, samples=128)  # a shell, denser outwards: its normals look inwards
    far = vertices(65, 1.0).norm(dim=-1)
    hollow.density.data = torch.where(far < 0.5, 100 * far - 40, -20)[None, None]
    assert solid["orientation"] < 0.02 and of(hollow)[0]["orientation"] > 0.1


@pytest.mark.parametrize("tolerance", [1e-3, 0.05])
@torch.no_grad()
def test_skipping_changes_no_pixel_by_more_than_the_tolerance(tolerance):
    cameras = replace(Orbits().draw(3, generator()), background=torch.ones(3, 3))
    noise = Scene(12)
    noise.density.data = 8 * torch.randn(1, 1, 12, 12, 12, generator=generator())
    for scene, share in ((painted(), 0.5), (Scene(24), 1), (noise, 1)):
        scene.colour.data = 3 * torch.randn(scene.colour.shape, generator=generator(1))
        scene.tolerance = 0.0
        whole = scene.render(cameras, 24)
        scene.tolerance = tolerance
        part = scene.render(cameras, 24)
        assert len(part.points) < share * len(whole.points)
        assert 0 < (part.image - whole.image).abs().max() <= tolerance


@torch.no_grad()
def test_upsampling_keeps_the_pictures():
    cameras = Orbits().draw(3, generator())
    scene = painted(17)
    before = scene(cameras, 24)
    scene.upsample(33)
    assert scene.resolution == 33 and scene.density.requires_grad
    torch.testing.assert_close(scene(cameras, 24), before, atol=2e-3, rtol=0)
    scene.upsample(50)
    assert psnr(scene(cameras, 24), before) > 25
    with pytest.raises(ValueError, match="resolution must be above the scene's 50, got 50"):
        scene.upsample(50)


def test_all_parameters_learn_the_background_slowly():
    scene = Scene(4)
    field, background = scene.parameter_groups(0.01)
    assert [field["lr"], background["lr"]] == pytest.approx([0.01, 0.001])
    both = [*field["params"], *background["params"]]
    assert {id(p) for p in both} == {id(p) for p in scene.parameters()} and len(both) == 3
    assert background["params"] == [scene.background]


@torch.no_grad()
def test_what_is_saved_is_loaded(tmp_path):
    scene = Scene(8, radius=0.9, samples=12, tolerance=0.01).double()
    scene.background += torch.tensor([0.5, -1, 2])
    scene.upsample(11)
    scene.save(tmp_path / "new" / "scene")
    loaded = Scene.load(tmp_path / "new" / "scene")
    assert (loaded.resolution, loaded.radius, loaded.samples) == (11, 0.9, 12)
    cameras = Orbits().draw(2, generator())
    assert torch.equal(loaded(cameras, 9), scene(cameras, 9))
    assert [file.suffix for file in sorted((tmp_path / "new" / "scene").iterdir())] == [
        *(".json", ".safetensors")
    ]


def spoiled(folder, what):
    """A saved scene, and one thing done to it."""
    Scene(4).save(folder)
    tensors, config = folder / "scene.safetensors", folder / "config.json"
    options = json.loads(config.read_text())
    if what == "no folder":
        shutil.rmtree(folder)
    elif what == "no tensors":
        tensors.unlink()
    elif what == "half the tensors":
        tensors.write_bytes(tensors.read_bytes()[:500])
    elif what == "other tensors":
        from safetensors.torch import save_file

        save_file({"density": torch.zeros(1, 1, 4, 4, 5)}, tensors)
    else:
        config.write_text(json.dumps({**options, **what}))


@pytest.mark.parametrize(
    ("what", "error", "said"),
    [
        ("no folder", FileNotFoundError, "config.json"),
        ("no tensors", FileNotFoundError, "scene.safetensors"),
        ("half the tensors", ValueError, "holds no scene"),
        ("other tensors", ValueError, "holds no scene"),
        ({"radius": -1}, ValueError, "holds no scene: radius must be above 0, got -1"),
        ({"samples": "many"}, ValueError, "holds no scene"),
        ({"run": "me"}, ValueError, "holds no scene: .*'run'"),
    ],
)
def test_what_is_no_scene_is_refused(tmp_path, what, error, said):
    spoiled(tmp_path / "it", what)
    with pytest.raises(error, match=said) as raised:
        Scene.load(tmp_path / "it")
    assert str(tmp_path / "it") in str(raised.value)


def test_the_turntable_is_a_gif_that_repeats(tmp_path):
    scene, orbits = painted(24, 32), Orbits((2, 2), (60, 60), azimuth=(-30, 30))
    scene.turntable_gif(tmp_path / "new" / "turn.gif", 5, 32, orbits, elevation=0)
    with Image.open(tmp_path / "new" / "turn.gif") as gif:
        assert (gif.n_frames, gif.size, gif.info["loop"]) == (5, (32, 32), 0)
        frames = []
        for i in range(5):
            gif.seek(i)
            frames.append(torch.from_numpy(np.array(gif.convert("RGB"))).permute(2, 0, 1))
    expected = scene(orbits.turntable(5, 0), 32)
    for frame, view in zip(frames, expected, strict=True):
        assert psnr(frame / 127.5 - 1, view) > 25


def read_ply(file):
    """Points, faces and colours of a binary mesh, by the header it has."""
    head, _, body = file.read_bytes().partition(b"end_header\n")
    lines = head.decode().splitlines()
    assert lines[:2] == ["ply", "format binary_little_endian 1.0"]
    counts = {x.split()[1]: int(x.split()[2]) for x in lines if x.startswith("element")}
    vertex = np.dtype("<f4,<f4,<f4,u1,u1,u1")
    points = np.frombuffer(body, vertex, counts["vertex"])
    face = np.dtype([("count", "u1"), ("points", "<i4", 3)])
    faces = np.frombuffer(body[points.nbytes :], face)
    assert len(faces) == counts["face"] and (faces["count"] == 3).all()
    columns = [points[f"f{i}"].astype(float) for i in range(6)]
    return np.stack(columns[:3], 1), faces["points"], np.stack(columns[3:], 1)


def test_the_mesh_is_the_closed_surface_of_what_is_there(tmp_path):
    painted(64).export_ply(tmp_path / "scene.ply")
    points, faces, colours = read_ply(tmp_path / "scene.ply")
    far = [np.linalg.norm(points - centre, axis=1) - radius for centre, radius, _ in SPHERES]
    assert np.abs(far).min(0).max() < 1 / 32  # a voxel
    owner = np.abs(far).argmin(0)
    assert np.abs(colours / 127.5 - 1 - np.array([c for *_, c in SPHERES])[owner]).max() < 0.1
    edges = np.concatenate([faces[:, [i, (i + 1) % 3]] for i in range(3)])
    once = {tuple(edge) for edge in edges}
    assert len(once) == len(edges) and {(b, a) for a, b in once} == once
    a, b, c = (points[faces[:, i]] for i in range(3))
    volume = (a * np.cross(b, c)).sum() / 6  # above 0: the faces look outwards
    assert volume == pytest.approx(sum(4 / 3 * math.pi * r**3 for _, r, _ in SPHERES), rel=0.05)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: Orbits(distance=(2, 1)), r"distance must be .*, got \[2, 1\]"),
        (lambda: Orbits(distance=(0, 1)), "distance must be"),
        (lambda: Orbits(field_of_view=(40, 180)), "field_of_view must be .* 170"),
        (lambda: Orbits(elevation=(0, 91)), "elevation must be .* 90"),
        (lambda: Orbits(azimuth=(30, -30)), "azimuth must be"),
        (lambda: Orbits(azimuth=(math.nan, 30)), "azimuth must be"),
        (lambda: Orbits(random_background=2), "random_background must be a share"),
        (lambda: Orbits().draw(0, generator()), "count must be at least 1, got 0"),
        (lambda: Orbits().turntable(0), "count must be at least 1, got 0"),
        (lambda: Orbits().turntable(3, 100), "elevation must be within"),
        (lambda: Scene(1), "resolution must be at least 2, got 1"),
        (lambda: Scene(4, radius=0), "radius must be above 0, got 0"),
        (lambda: Scene(4, samples=0), "samples must be at least 1, got 0"),
        (lambda: Scene(4, blob_radius=0), "blob_radius must be above 0, got 0"),
        (lambda: Scene(4, tolerance=1), "tolerance must be at least 0 and below 1, got 1"),
        (lambda: Scene(4).check(1.0), "distance must be .* camera is inside the scene, got 1.0"),
        (lambda: Scene(4)(camera(distance=0.5), 4), "camera is inside the scene, got 0.5"),
        (lambda: Scene(4)(camera(), 4, "neon"), "shading must be one of ambient, .* 'neon'"),
        (lambda: Scene(4)(camera(), 0), "size must be at least 1, got 0"),
        (
            lambda: Scene(4).export_ply(None, density=50),
            "density must be below the scene's most, .*, got 50",
        ),
    ],
)
def test_bad_input_is_refused_in_one_line(call, said):
    with pytest.raises(ValueError, match=said) as raised:
        call()
    assert "\n" not in str(raised.value)
