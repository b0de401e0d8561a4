"""What tells one prior from another, on tiny pipelines that differ in a single thing."""

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import lmc.priors.weights
from lmc.corrector import Corrector, IdentityCorrector
from lmc.filter import FilterCorrector
from lmc.load import load_corrector
from lmc.priors import DiffusersPrior, check_identity
from lmc.priors.identity import schedule_identity
from lmc.priors.weights import weight_files, weights_digest
from lmc.schedule import FlowSchedule, Schedule
from lmc.shards.triplets import check_origin

from gaussian import small_prior

TIME_RANGE = (0.02, 0.98)


def edit(name: str, **changes: Any) -> Callable[[Path], None]:
    """What changes keys of a JSON file of a pipeline's folder."""

    def change(folder: Path) -> None:
        file = folder / name
        file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))

    return change


def rewrite(part: str, how: Callable[[dict], dict]) -> Callable[[Path], None]:
    """What changes a part's weights."""

    def change(folder: Path) -> None:
        (file,) = weight_files(folder / part)
        save_file(how(load_file(file)), file, {"format": "pt"})

    return change


def nudge(weights: dict) -> dict:
    name = sorted(weights)[0]
    return {**weights, name: weights[name] + 0.01}


def halve(weights: dict) -> dict:
    return {name: value.half() for name, value in weights.items()}


def old_names(weights: dict) -> dict:
    """As the first releases of Stable Diffusion name the attention of their VAE."""
    for new, old in (("to_q", "query"), ("to_k", "key"), ("to_v", "value")):
        weights = {n.replace(f".{new}.", f".{old}."): value for n, value in weights.items()}
    return {n.replace(".to_out.0.", ".proj_attn."): value for n, value in weights.items()}


def several(*changes: Callable[[Path], None]) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        for one in changes:
            one(folder)

    return change


def changed(family_folder, tmp_path: Path, name: str, change: Callable) -> tuple[dict, dict]:
    """The identities of a prior and of its copy with a change."""
    folder = Path(shutil.copytree(family_folder(name), tmp_path / "changed"))
    change(folder)
    return DiffusersPrior(str(family_folder(name))).identity, DiffusersPrior(str(folder)).identity


SCHEDULER, VAE = "scheduler/scheduler_config.json", "vae/config.json"
CHANGES = {
    "betas": ("sd15", "schedule", edit(SCHEDULER, beta_end=0.0121)),
    "kind of betas": ("sd15", "schedule", edit(SCHEDULER, beta_schedule="linear")),
    "steps": ("sd15", "schedule", edit(SCHEDULER, num_train_timesteps=500)),
    "zero terminal SNR": ("sd21", "schedule", edit(SCHEDULER, rescale_betas_zero_snr=True)),
    "steps of a flow": ("sd35", "schedule", edit(SCHEDULER, num_train_timesteps=500)),
    "prediction": ("sd15", "prediction_type", edit(SCHEDULER, prediction_type="sample")),
    "scale": ("sd15", "latent_scale", edit(VAE, scaling_factor=0.18)),
    "shift": ("sd35", "latent_shift", edit(VAE, shift_factor=0.06)),
    "vae": ("sd15", "vae", rewrite("vae", nudge)),
    "denoiser": ("sd15", "digest", rewrite("unet", nudge)),
    "size": ("sd15", "image_size", edit("unet/config.json", sample_size=16)),
    "size in pixels": ("if", "image_size", edit("unet/config.json", sample_size=32)),
    "channels": (
        "sd15",
        "channels",
        several(
            edit("unet/config.json", in_channels=8, out_channels=8), edit(VAE, latent_channels=8)
        ),
    ),
}


@pytest.mark.parametrize("case", CHANGES)
def test_each_difference_is_refused_and_named_with_both_values(family_folder, tmp_path, case):
    """By the check itself, by a corrector and by triplets."""
    name, field, change = CHANGES[case]
    mine, other = changed(family_folder, tmp_path, name, change)
    assert {key for key in mine if mine[key] != other[key]} == {"pretrained", field}
    with pytest.raises(ValueError) as caught:
        check_identity(mine, other)
    *names, difference = str(caught.value).splitlines()
    assert difference == f"  {field}: {mine[field]} there, {other[field]} here"
    assert [line.split()[-1] for line in names] == [mine["pretrained"], other["pretrained"]]
    with pytest.raises(ValueError, match=f"valid for the prior (.|\n)*  {field}: "):
        Corrector(3, [8, 8], prior=mine).check_prior(other)
    with pytest.raises(ValueError, match=f"another prior(.|\n)*  {field}: "):
        check_origin({"prior": mine, "time_range": [*TIME_RANGE]}, other, TIME_RANGE)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("sd15", lambda folder: None),
        ("if", lambda folder: None),
        ("dit", lambda folder: None),
        ("sd15", edit("model_index.json", scheduler=["diffusers", "DDIMScheduler"])),
        ("sd35", edit(SCHEDULER, shift=1.0)),
        ("sd15", edit(VAE, force_upcast=False)),
        ("sd15", several(rewrite("unet", halve), rewrite("vae", halve))),
        ("sd15", rewrite("vae", old_names)),
    ],
    ids=["copy", "pixels", "classes", "sampler", "sampler's shift", "dtype", "fp16", "old names"],
)
def test_the_same_prior_elsewhere_is_the_same(family_folder, tmp_path, name, change):
    """Whatever it is sampled with, its precision, and how its files are called."""
    mine, other = changed(family_folder, tmp_path, name, change)
    assert mine["pretrained"] != other["pretrained"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert check_identity(mine, {**other, "revision": "v2"}) == []
        Corrector(3, [8, 8], prior=mine).check_prior(other)
        check_origin({"prior": mine, "time_range": [*TIME_RANGE]}, other, TIME_RANGE)


def test_old_names_are_indeed_read_as_the_new_ones(family_folder, tmp_path):
    folder = Path(shutil.copytree(family_folder("sd15"), tmp_path / "old"))
    rewrite("vae", old_names)(folder)
    assert any(".query." in name for name in load_file(weight_files(folder / "vae")[0]))
    image, found = torch.rand(1, 3, 32, 32) * 2 - 1, []
    for each in (folder, family_folder("sd15")):
        prior = DiffusersPrior(str(each))
        prior.to("cpu")
        found.append(prior.encode(image))
    assert torch.equal(*found)


@pytest.mark.parametrize(("name", "unsaid"), [("sd15", "schedule, vae"), ("if", "schedule")])
def test_what_earlier_versions_recorded_still_loads(family_folder, tmp_path, name, unsaid):
    """With one line on what could not be checked, and what can be is."""
    identity = DiffusersPrior(str(family_folder(name))).identity
    first = {key: value for key, value in identity.items() if key not in ("schedule", "vae")}
    assert check_identity(first, identity) == unsaid.split(", ")
    FilterCorrector(3, 8, bins=2, prior=first).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["prior"] == first
    corrector = load_corrector(str(tmp_path))
    origin = {"prior": first, "time_range": [*TIME_RANGE]}
    for check, what in (
        (corrector.check_prior, "the corrector: "),
        (lambda identity: check_origin(origin, identity, TIME_RANGE), "the triplets: "),
    ):
        with pytest.warns(
            UserWarning, match=rf"^{what}the prior's {unsaid} could not be checked"
        ) as said:
            check(identity)
        assert len(said) == 1 and "\n" not in str(said[0].message)
        for change in ({"image_size": 8}, {"channels": 5}, {"digest": "0"}):
            with pytest.raises(ValueError, match=f"  {next(iter(change))}: "):
                check({**identity, **change})


def test_it_is_said_once(family_folder):
    identity = DiffusersPrior(str(family_folder("if"))).identity
    recorded = {key: value for key, value in identity.items() if key != "schedule"}
    corrector = Corrector(3, [8, 8], prior=recorded)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("default")
        for _ in range(3):
            corrector.check_prior(identity)
    assert len(said) == 1


def test_a_prior_of_ones_own_need_not_say_all():
    """What neither side says is unchecked, of latents only if one has them."""
    identity = small_prior().identity
    assert set(identity) == {"pretrained", "digest"}
    unchecked = check_identity(identity, identity)
    assert unchecked == ["prediction_type", "schedule", "image_size", "channels"]
    assert "latent_scale" in check_identity(identity, identity | {"latent_scale": 0.2})
    for one, other in (({}, identity), (identity, {}), (identity, {"digest": "gaussian-1"})):
        with pytest.raises(ValueError, match=r"  digest: (gaussian-0|not recorded) there, "):
            check_identity(one, other)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        IdentityCorrector().check_prior(identity)


def test_a_schedule_is_compared_by_value(family_folder):
    """The last digit, in which machines differ, is no other schedule; nor is half the precision."""
    schedule = DiffusersPrior(str(family_folder("if"))).schedule
    assert isinstance(schedule, Schedule)
    mine = {"digest": "1", "prediction_type": "sample", "schedule": schedule_identity(schedule)}
    assert json.loads(json.dumps(mine)) == mine
    at = [0, *range(100, 1000, 100), 999]
    wanted = schedule.alphas_cumprod[at].tolist()
    assert mine["schedule"]["alphas_cumprod"] == pytest.approx(wanted, rel=1e-5)
    for factor, same in ((1 + 2e-6, True), (1 - 2e-6, True), (1 - 1e-3, False)):
        other = mine | {"schedule": schedule_identity(Schedule(schedule.alphas_cumprod * factor))}
        if same:
            assert "schedule" not in check_identity(mine, other)
        else:
            with pytest.raises(ValueError, match="  schedule: "):
                check_identity(mine, other)
    with pytest.raises(ValueError, match=r"  schedule: .*'ddpm'.* there, .*'flow'.* here"):
        check_identity(mine, mine | {"schedule": schedule_identity(FlowSchedule())})


def test_weights_are_read_when_asked_and_once_a_process(family_folder, tmp_path, monkeypatch):
    folder = Path(shutil.copytree(family_folder("sd15"), tmp_path / "prior"))
    opened: list[str] = []
    right = lmc.priors.weights.safe_open

    def note(file: Path, *args: Any) -> Any:
        opened.append(Path(file).parent.name)
        return right(file, *args)

    monkeypatch.setattr(lmc.priors.weights, "safe_open", note)
    first, second = (DiffusersPrior(str(folder)) for _ in range(2))
    assert opened == []
    assert first.identity == first.identity == second.identity
    assert sorted(opened) == ["unet", "vae"]
    rewrite("vae", nudge)(folder)
    assert DiffusersPrior(str(folder)).identity["vae"] != first.identity["vae"]
    assert sorted(opened) == ["unet", "vae", "vae"]


def test_the_vaes_weights_are_asked_for_by_name(family_folder, tmp_path):
    folder = Path(shutil.copytree(family_folder("sd15"), tmp_path / "prior"))
    weight_files(folder / "vae")[0].unlink()
    with pytest.raises(FileNotFoundError, match=r"vae/\*\.safetensors"):
        _ = DiffusersPrior(str(folder)).identity


def test_a_denoisers_digest_is_by_the_names_in_its_file(family_folder, tmp_path):
    """Those of earlier releases do not change; only a VAE's old names are read as the new ones."""
    folder = Path(shutil.copytree(family_folder("ddpm"), tmp_path / "prior"))
    digest = weights_digest(folder / "unet")
    rewrite("unet", old_names)(folder)
    assert weights_digest(folder / "unet") != digest


def test_a_record_that_somebody_wrote_by_hand_is_another_and_no_crash():
    mine = {"digest": "1", "prediction_type": "sample", "schedule": {"kind": "ddpm", "steps": 9}}
    for schedule in (None, "cosine", ["a", 1], {"kind": "ddpm", "steps": ["9"]}):
        with pytest.raises(ValueError, match="  schedule: "):
            check_identity({**mine, "schedule": schedule}, mine)
