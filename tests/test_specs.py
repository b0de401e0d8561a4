"""Losses named on the command line, built: their options have the types of a configuration's."""

import pytest

from lmc.losses import LMC, NFSD, VSD
from lmc.specs import parse_spec, parse_specs


def test_options_have_their_types():
    specs = parse_specs(
        "lmc:corrector=identity:fixed_noise=true,nfsd:negative_prompt=no,vsd:lora_lr=1e-4,"
        "nfsd:negative_prompt=a: b,nfsd:negative_prompt="
    )
    lmc_loss, nfsd, vsd, colon, empty = (spec.build(guidance_scale=3) for spec in specs)
    assert isinstance(lmc_loss, LMC) and lmc_loss.fixed_noise is True
    assert isinstance(nfsd, NFSD) and nfsd.negative_prompt == "no"
    assert isinstance(vsd, VSD) and vsd.lora_lr == 1e-4
    assert isinstance(colon, NFSD) and colon.negative_prompt == "a: b"
    assert isinstance(empty, NFSD) and empty.negative_prompt == ""
    assert {each.guidance_scale for each in (lmc_loss, nfsd, vsd)} == {3}


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
