"""lmc synthesize and edit of what renders images: what is written, gone on with, and refused."""

import json
import os
import re
import signal
from pathlib import Path

import pytest
import torch
from PIL import Image
from test_one_image import error, read

import lmc.one_image.synthesis
from lmc.cli import main
from lmc.losses import SDS
from lmc.optimize import Optimization, Synthesis
from lmc.renderers import named
from lmc.renderers.named import Optimised, Start
from lmc.renderers.scene import Scene
from lmc.renderers.svg import SVG

import worlds
from gaussian import small_prior

# What a renderer is made with here, small; a scene of voxels that become finer in the run.
SMALL = {
    "pixels": [],
    "svg": ["--renderer.paths=3", "--renderer.anew=2"],
    "scene": [
        *("--renderer.resolution=6", "--renderer.samples=8", "--renderer.finer={0.5: 11}"),
        *("--renderer.ambient=0.3", "--renderer.orientation=[0, 10]"),
    ],
}
CAT = """<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 12 9">
<rect width="12" height="9" fill="#abc"/>
<circle cx="5" cy="5" r="3" fill="orange"/>
</svg>"""


class Field(Optimised):
    """A renderer of the user's: a colour, a row of its own for each seed."""

    batched = True

    def __init__(self, start: Start, level: float = 0.5) -> None:
        super().__init__()
        self.start = start
        self.colour = torch.nn.Parameter(torch.full((len(start.seeds), 3, 1, 1), level))

    def forward(self) -> torch.Tensor:
        return self.colour.expand(-1, -1, *self.start.size)


class Flat(Field):
    """It renders no pictures."""

    def forward(self) -> torch.Tensor:
        return self.colour[0]


class Still(Field):
    """It has nothing to optimise."""

    def __init__(self, start: Start) -> None:
        super().__init__(start)
        self.requires_grad_(False)


class Silent(Optimised):
    """It says nothing of how it renders."""

    def __init__(self, start: Start) -> None:
        super().__init__()
        self.colour = torch.nn.Parameter(torch.zeros(3))


class Lonely(Field):
    """It takes no Start."""

    def __init__(self) -> None:
        super().__init__(Start(small_prior(), [0], (8, 8)))


@pytest.fixture
def synthesize(tiny_prior_folder, tmp_path) -> list[str]:
    args = ["synthesize", "--prior=lmc.priors.DiffusersPrior", "--loss=SDS", "--prompt=a cat"]
    args += [f"--prior.pretrained={tiny_prior_folder}", "--size=16", "--settings.steps=6"]
    return [*args, "--snapshot_every=2", f"--out={tmp_path}/out"]


@pytest.fixture
def cat(tmp_path) -> Path:
    file = tmp_path / "cat.svg"
    file.write_text(CAT)
    return file


@pytest.fixture
def edit(synthesize, cat) -> list[str]:
    args = ["edit", *synthesize[1:], "--renderer=svg", f"--image={cat}", "--loss=PDS"]
    return [*args, "--source_prompt=a cat", "--prompt=a dog"]


def contents(folder: Path) -> dict[str, bytes]:
    """All files of a result, but for how long it took and where it lies."""
    files = [each for each in folder.rglob("*") if each.is_file()]
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in files
        if file.name not in ("results.json", "settings.yaml")
    }


def test_a_drawing_of_each_seed_is_written(synthesize, tmp_path):
    out = tmp_path / "out"
    main([*synthesize, "--renderer=svg", *SMALL["svg"], "--seeds=0,4"])
    for seed in (0, 4):
        drawn = SVG.read(out / f"seed-{seed}.svg", 16)
        assert len(drawn.sizes) == 3
        off = drawn().detach()[0] - read(out / f"seed-{seed}.png")
        assert off.abs().max() <= 1.01 / 255
    assert not torch.equal(read(out / "seed-0.png"), read(out / "seed-4.png"))
    assert json.loads((out / "results.json").read_text())["diversity"]["runs"] == 1
    with Image.open(out / "progression.gif") as gif:
        assert gif.n_frames == 4 and gif.size == (2 * 18 + 2, 20)  # after 0, 2, 4, 6 steps
    assert {"state.pt", "preview.png"} & {file.name for file in out.iterdir()} == set()
    # A seed is as it is alone.
    main([*synthesize, "--renderer=svg", *SMALL["svg"], "--seeds=4", f"--out={tmp_path}/alone"])
    assert (tmp_path / "alone/seed-4.svg").read_bytes() == (out / "seed-4.svg").read_bytes()


def test_a_scene_is_written_as_voxels_mesh_and_turntable(synthesize, tmp_path):
    out = tmp_path / "out"
    main([*synthesize, "--renderer=scene", *SMALL["scene"], "--seeds=3"])
    assert Scene.load(out / "seed-3").resolution == 11
    assert (out / "seed-3.ply").read_bytes().startswith(b"ply\n")
    with Image.open(out / "seed-3.gif") as gif:
        assert 20 < gif.n_frames <= 60 and gif.size == (16, 16)  # equal ones are one
    assert read(out / "seed-3.png").shape == (3, 16, 16)


@pytest.mark.parametrize(("size", "side"), [(512, 16), (8, 8)])
def test_a_scene_s_views_are_no_larger_than_the_prior_s_images(size, side):
    scene = named.scene(Start(small_prior(16), [0], (size, size)), resolution=6, samples=8)
    assert scene().shape == (1, 3, side, side)
    assert scene.see(0, 6, torch.Generator()).image.shape == (1, 3, side, side)


def test_a_class_of_the_user_s_is_a_renderer(synthesize, tmp_path):
    main([*synthesize, "--renderer=test_renderers.Field", "--renderer.level=0.9", "--seeds=1,2"])
    settings = (tmp_path / "out" / "settings.yaml").read_text()
    assert "class_path: test_renderers.Field" in settings and "level: 0.9" in settings
    both = torch.stack([read(tmp_path / "out" / f"seed-{seed}.png") for seed in (1, 2)])
    assert both.std((2, 3)).max() < 1e-6 and not torch.equal(both[0], both[1])
    # And a YAML has it too.
    config = tmp_path / "more.yaml"
    config.write_text("renderer: {class_path: test_renderers.Field, init_args: {level: 0.2}}\n")
    main([*synthesize, f"--config={config}", f"--out={tmp_path}/again"])
    assert "level: 0.2" in (tmp_path / "again" / "settings.yaml").read_text()


@pytest.mark.parametrize("renderer", SMALL)
def test_a_stopped_run_goes_on_and_ends_as_one_that_was_not(
    synthesize, tmp_path, monkeypatch, renderer
):
    """Two seeds, stopped in the second: as a batch, or one after the other; bit by bit."""
    more = [f"--renderer={renderer}", *SMALL[renderer], "--seeds=0,7", "--save_every=1"]
    args = [*synthesize, *more]
    main([*args, f"--out={tmp_path}/whole"])
    step, steps = Optimization._step, []

    def stopping(self, number):
        if number == 4 and self.seeds[-1] == 7:
            raise KeyboardInterrupt
        step(self, number)

    def counted(self, number):
        steps.append((list(self.seeds), number))
        step(self, number)

    with monkeypatch.context() as patch:
        patch.setattr(Optimization, "_step", stopping)
        with pytest.raises(SystemExit) as caught:
            main(args)
    assert caught.value.code == 130
    out = tmp_path / "out"
    assert (out / "state.pt").exists() and (out / "preview.png").exists()
    said = error(*args, "--prompt=a dog")
    assert "unfinished run with other settings" in said
    assert "prompt was 'a cat' and is 'a dog'" in said
    with monkeypatch.context() as patch:
        patch.setattr(Optimization, "_step", counted)
        main(args)
    assert steps == [([0, 7] if renderer == "pixels" else [7], i) for i in range(4, 6)]
    assert contents(out) == contents(tmp_path / "whole")
    assert not (out / "state.pt").exists()


def test_a_killed_command_goes_on(synthesize, tmp_path, monkeypatch):
    """By kill -9 in a step; a loss that learns keeps what it has learned."""
    args = [*synthesize, "--loss=VSD", "--loss.guidance_scale=2", "--loss.lora_rank=2"]
    args += ["--save_every=2"]
    main([*args, f"--out={tmp_path}/whole"])
    out, state, step = tmp_path / "out", tmp_path / "out" / "state.pt", Optimization._step

    def dying(self, number):
        if number == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        step(self, number)

    with monkeypatch.context() as patch:
        patch.setattr(Optimization, "_step", dying)
        child = os.fork()
        if child == 0:
            try:
                main(args)
            finally:
                os._exit(1)  # it must not come here
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert torch.load(state, weights_only=True)["optimization"]["done"] == 2
    main(args)
    assert contents(out) == contents(tmp_path / "whole")


def test_a_state_that_cannot_be_gone_on_from_is_refused(synthesize, tmp_path, monkeypatch):
    def stopping(self, number):
        if number == 4:
            raise KeyboardInterrupt
        return step(self, number)

    step = Optimization._step
    with monkeypatch.context() as patch:
        patch.setattr(Optimization, "_step", stopping)
        with pytest.raises(SystemExit):
            main([*synthesize, "--save_every=1"])
    state = tmp_path / "out" / "state.pt"
    kept = torch.load(state, weights_only=True)
    for what, other in (("kind of device", "cuda"), ("prior", "another")):
        made_with = {**kept["made_with"], what: other}
        torch.save({**kept, "made_with": made_with}, state)
        assert f"was begun with another {what}" in error(*synthesize, "--save_every=1")
    content = state.read_bytes()
    for damaged in (content[:1000], b"", b"text"):
        state.write_bytes(damaged)
        assert "state.pt cannot be gone on from" in error(*synthesize, "--save_every=1")


def test_a_preview_is_refreshed_while_it_runs(synthesize, tmp_path, monkeypatch):
    seen = []
    write = lmc.one_image.synthesis._write_preview

    def noting(out, thumbnails):
        write(out, thumbnails)
        seen.append((out / "preview.png").read_bytes())

    monkeypatch.setattr(lmc.one_image.synthesis, "_write_preview", noting)
    main(synthesize)
    assert len({*seen}) == 2  # after two and four of six steps
    assert not (tmp_path / "out" / "preview.png").exists()


@pytest.mark.parametrize("loss", ["PDS", "DDS", "LMC"])
def test_an_svg_is_edited_as_paths(edit, cat, tmp_path, loss):
    more = ["--loss.corrector=identity"] if loss == "LMC" else []
    main([*edit, f"--loss={loss}", *more])
    out = tmp_path / "out"
    before, after = SVG.read(cat, 16), SVG.read(out / "seed-0.svg", (16, 21))
    assert after.viewbox == before.viewbox and after.sizes == before.sizes
    assert 0 < (after.points - before.points).abs().max() < 1.5
    assert torch.equal(after.background, before.background)
    assert read(out / "seed-0.png").shape == (3, 16, 21)  # the shorter side is --size


def test_an_svg_is_rastered_at_the_prior_s_size_and_for_pixels_too(edit, tmp_path):
    args = [arg for arg in edit if not arg.startswith("--size")]
    main([*args, "--renderer=pixels", "--settings.lr=1e-4"])
    image = read(tmp_path / "out" / "seed-0.png")
    assert image.shape == (3, 16, 21)
    sky = torch.tensor([0xAA, 0xBB, 0xCC]) / 127.5 - 1
    torch.testing.assert_close(image[:, 0, 0], sky, atol=0.02, rtol=0)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("<svg", r"cat.svg is no XML"),
        (CAT.replace("circle", "text"), r"cat.svg, line 3: <text> cannot be drawn"),
        (re.sub("<circle.*/>", '<path d="M0 0LNaN 1Z"/>', CAT), "line 3: <path> has a d that"),
        (re.sub("<circle.*/>", "", CAT), "cat.svg draws no filled path"),
    ],
    ids=["unreadable", "element", "nan", "empty"],
)
def test_an_svg_that_cannot_be_edited(edit, cat, tmp_path, content, said):
    cat.write_text(content)
    assert said in error(*edit)
    assert not (tmp_path / "out").exists()


def test_bad_input_of_renderers(synthesize, edit, tmp_path, family_folder):
    svg, scene = ([*synthesize, f"--renderer={name}"] for name in ("svg", "scene"))
    assert "renderer: paths must be at least 1, got 0" in error(*svg, "--renderer.paths=0")
    assert "no --renderer.pathes:" in error(*svg, "--renderer.pathes=3")
    said = error(*scene, "--renderer.distance=[0.8, 2]")
    assert "camera is inside the scene" in said and said.startswith("lmc: renderer: distance")
    assert "elevation must be [least, most]" in error(*scene, "--renderer.elevation=[9, 1]")
    for what in ("torch.nn.ReLU", "pathlib.Path", "no.such.Class"):
        assert what in error(*synthesize, f"--renderer={what}")
    for name, why in (
        ("Flat", "must render (1, 3, height, width), got (3, 1, 1)"),
        ("Still", "has no parameters to optimise"),
        ("Silent", "renders nothing"),
    ):
        assert f"test_renderers.{name} {why}" in error(
            *synthesize, f"--renderer=test_renderers.{name}"
        )
    assert "it must take a Start first" in error(*synthesize, "--renderer=test_renderers.Lonely")
    said = error(*synthesize, "--renderer=svgg")
    assert "there is no renderer svgg: lmc synthesize --help lists them" in said
    assert "there is no loss sdss" in error(*synthesize, "--loss=sdss")
    assert "save_every must be at least 1" in error(*synthesize, "--save_every=0")
    picture = tmp_path / "cat.png"
    picture.write_bytes(worlds.png(torch.zeros(3, 16, 16)))
    assert "cat.png is not" in error(*edit, f"--image={picture}")
    assert "no such image: none.svg" in error(*edit, "--image=none.svg")
    assert "begins with no image" in error(*edit, "--renderer=scene")
    classes = [*scene, f"--prior.pretrained={family_folder('ddpm')}", "--size=8"]
    assert "no class 'unicorn'" in error(*classes, "--prompt=unicorn")
    said = error(*classes, "--prompt=3")
    assert "no class '3, front view'" in said and "set suffixes to false" in said
    assert not (tmp_path / "out").exists()


def test_without_suffixes_a_prior_of_classes_makes_a_scene(synthesize, family_folder, tmp_path):
    args = [*synthesize, f"--prior.pretrained={family_folder('ddpm')}", "--prompt=3"]
    main([*args, "--renderer=scene", *SMALL["scene"], "--renderer.suffixes=false"])
    assert (tmp_path / "out" / "seed-0.gif").exists()


@pytest.mark.parametrize("kind", ["pixels", "svg", "scene"])
def test_an_optimization_goes_on_from_any_of_its_states(tmp_path, kind):
    """Also where paths start anew, and where Adam begins anew with the finer voxels."""
    options = {
        "pixels": {},
        "svg": {"paths": 2, "anew": 2},
        "scene": {"resolution": 6, "samples": 8, "finer": {0.5: 11}, "suffixes": False},
    }[kind]

    def begun(**more) -> Optimization:
        start = Start(small_prior(16), [5], (16, 16))
        renderer = getattr(named, kind)(start, **{**options, **more})
        settings = Synthesis(6, decay_steps=0, whole_steps=3)
        return Optimization(renderer, start.prior, SDS(4), ["cat"], [5], settings)

    first = begun()
    if kind == "svg":
        with torch.no_grad():
            first.renderer.svg.opacity[1] = 0.0

    def watch(done: int) -> None:
        torch.save(first.state_dict(), tmp_path / f"{done}.pt")

    image = first.run(watch)
    for done in range(1, 7):
        again = begun()
        again.load_state_dict(torch.load(tmp_path / f"{done}.pt", weights_only=True))
        assert torch.equal(again.run(), image)
    if kind == "svg":
        with pytest.raises(ValueError, match="the state is of another renderer"):
            begun(paths=3).load_state_dict(torch.load(tmp_path / "3.pt", weights_only=True))


def test_the_renderer_of_the_documentation(synthesize, tmp_path, monkeypatch):
    text = (Path(__file__).parents[2] / "docs" / "renderers.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", text, re.S)
    (tmp_path / "my_module.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    main([*synthesize, "--renderer=my_module.Waves", "--renderer.count=8", "--seeds=0,1"])
    both = [read(tmp_path / "out" / f"seed-{seed}.png") for seed in (0, 1)]
    assert both[0].std() > 0.1 and not torch.equal(*both)
