"""Tiny releases of this version, with what they give: tests/releases/VERSION/.

    python tests/releases/make.py

Run once a version, when it is released: later ones must load them, to the same outputs.
"""

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from lmc import __version__
from lmc.corrector import BiasCorrector, Corrector
from lmc.filter import FilterCorrector, HybridCorrector
from lmc.load import Network
from lmc.translator import Translator

HERE = Path(__file__).parent
PRIOR = {"pretrained": "some/prior", "digest": "0123", "prediction_type": "epsilon"}


def networks() -> dict[str, Network]:
    """One of each kind, and of each way that its config has to be one."""
    return {
        "translator": Translator(["dog", "bear"], 16, [2, 3]),
        "gated": Translator(["dog", "bear", "lion"], 16, [8, 8], "group", True, True),
        "corrector": Corrector(3, [2, 2], prior=PRIOR),
        "latent": Corrector(4, [2, 2], bounded=False, statistics="channel", prior=PRIOR),
        "closed_form": FilterCorrector(3, 8, bins=2, prior=PRIOR),
        "by_channel": FilterCorrector(4, 8, 2, (0.1, 0.9), False, "none", PRIOR),
        "hybrid": HybridCorrector(
            3, {"size": 8, "bins": 2}, [2, 2], statistics="calibrated", prior=PRIOR
        ),
    }


@torch.no_grad()
def make(network: Network, folder: Path) -> None:
    """Write a release with random weights, and some inputs with their outputs beside it."""
    for value in (*network.parameters(), *network.buffers()):
        value.normal_(std=0.3)
    if isinstance(ratio := getattr(network, "ratio", None), torch.Tensor):
        ratio.uniform_(0.8, 1.2)
    network.eval().save_pretrained(folder)
    (folder / "README.md").unlink()
    about = None
    if isinstance(network, BiasCorrector):
        channels = int(network.arguments["channels"])
        z, z_hat = torch.rand(2, 3, channels, 8, 8) * 2 - 1
        t = torch.tensor([0.05, 0.5, 0.97])
        expected = {"z": z, "t": t, "z_hat": z_hat, "b": network.correct(z, t, z_hat)}
        about = {"digest": network.digest()}
    else:
        image = torch.rand(2, 3, 16, 16) * 2 - 1
        class_id = torch.tensor([1, 0])
        output = network(image, class_id)
        expected = {"image": image, "class_id": class_id, "output": output}
    save_file({k: v.contiguous() for k, v in expected.items()}, folder / "expected.st", about)


if __name__ == "__main__":
    out = HERE / __version__
    if out.exists():
        sys.exit(f"{out} is there: what a version has released stays as it is")
    torch.manual_seed(0)
    for name, network in networks().items():
        make(network, out / name)
