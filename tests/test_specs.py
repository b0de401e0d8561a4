"""Losses named on the command line, built: their options have the types of a configuration's."""

import re

import pytest

from lmc.losses import LMC, NFSD, VSD
from lmc.schedule import FallingTime, UniformTime
from lmc.specs import parse_spec, parse_specs


def test_options_have_their_types():
    specs = parse_specs(
        "lmc:corrector=identity:fixed_noise=true,nfsd:negative_prompt=no,vsd:lora_lr=1e-4,"
        "nfsd:negative_prompt=a: b,nfsd:negative_prompt=,nfsd:negative_prompt=''"
    )
    lmc_loss, nfsd, vsd, colon, *empty = (spec.build(guidance_scale=3) for spec in specs)
    assert isinstance(lmc_loss, LMC) and lmc_loss.fixed_noise is True
    assert isinstance(nfsd, NFSD) and nfsd.negative_prompt == "no"
    assert isinstance(vsd, VSD) and vsd.lora_lr == 1e-4
    assert isinstance(colon, NFSD) and colon.negative_prompt == "a: b"
    assert [each.negative_prompt for each in empty] == ["", ""]
    assert {each.guidance_scale for each in (lmc_loss, nfsd, vsd)} == {3}


def test_a_loss_may_have_a_schedule_of_its_own():
    plain, uniform, falling = parse_specs(
        "sdi,sdi:time=UniformTime:time.shared=true:guidance_scale=3,"
        '"sds:time=lmc.schedule.FallingTime:time.time_range=[0.1, 0.9]:time.jitter=0.5"'
    )
    assert plain.schedule() is None and plain.build().guidance_scale == 7.5
    time = uniform.schedule()
    assert isinstance(time, UniformTime) and time.shared is True
    assert uniform.build().guidance_scale == 3
    time = falling.schedule()
    assert isinstance(time, FallingTime)
    assert list(time.time_range) == [0.1, 0.9] and time.jitter == 0.5
    assert uniform.arguments() == [
        "--model.loss=lmc.losses.SDI",
        "--model.loss.guidance_scale=3",
        "--model.time=UniformTime",
        "--model.time.shared=true",
    ]


@pytest.mark.parametrize(
    ("label", "said"),
    [
        ("sdi:time=Sometime", "Sometime"),
        ("sdi:time=UniformTime:time.shared=ja", "shared"),
        ("sdi:time=UniformTime:time.often=1", "often"),
        ("sdi:time=UniformTime:time.time_range=[1, 0]", "time_range must be an interval"),
    ],
)
def test_a_schedule_that_is_none_is_refused_by_the_specs_name(label, said):
    with pytest.raises(ValueError, match=re.escape(f"the loss '{label}': ")) as caught:
        parse_spec(label).schedule()
    assert said in str(caught.value)


def test_options_of_no_schedule_are_refused():
    with pytest.raises(ValueError, match="name the schedule first: time=UniformTime"):
        parse_spec("sdi:time.shared=true")


@pytest.mark.parametrize(
    "label",
    [
        "sds:chain_alpha=flase",
        "lmc:corrector=identity:keep_ratio=ja",
        "ms_sds:steps=2.5",
        "ms_sds:steps=0",
        "vsd:lora_lr=small",
        "sds:weighting=snr",
        "lmc",
    ],
)
def test_an_option_of_another_type_is_refused_by_the_specs_name(label):
    with pytest.raises(ValueError, match=f"the loss '{label}'"):
        parse_spec(label).build()
