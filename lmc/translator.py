"""The translator: a feed-forward image-to-image network, one for all its target classes."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lmc.hub import HubNetwork
from lmc.unet import ENCODING, Norm, UNet, concatenate_condition, frequency_encoding


class Translator(nn.Module, HubNetwork, tags=["image-to-image"]):
    """Image and target class to image, the class id encoded onto every pixel [LMC, Sec. 5.2].

    With the default widths, the paper's eleven-level U-Net: 7,850,115 parameters.

    Args:
        classes: names of the targets; their order is the network's class id.
        image_size: the side in pixels it was trained at; kept in its config for whoever loads it.
        widths: filters per level; the last is the middle level.
        norm: see `UNet`.
        residual: the U-Net gives the difference to the image, and starts at zero; the sum is
            clipped to [-1, 1], see `clip`. Not in the paper: what is not edited keeps its detail
            from the first step on, which a short training needs.
        gated: of a residual translator: the sum is d + (1 − m) image, m one more channel of the
            U-Net's, zero at the start too. A difference alone has to draw every detail of the
            image in negative to be rid of it, and a short training leaves ghosts of ears and eyes;
            m is as smooth as the region that is to be drawn anew.

    Raises:
        ValueError: no classes, a class named twice, an image_size that the U-Net cannot halve, or
            gated without residual.
    """

    def __init__(
        self,
        classes: Sequence[str],
        image_size: int = 256,
        widths: Sequence[int] = (32, 64, 128, 256, 256, 256),
        norm: Norm = "none",
        residual: bool = False,
        gated: bool = False,
    ) -> None:
        super().__init__()
        if not classes or len(set(classes)) != len(classes):
            raise ValueError(f"classes must be distinct names, got {list(classes)}")
        self.classes = list(classes)
        self.image_size = image_size
        if gated and not residual:
            raise ValueError("gated is of a residual translator: set residual too")
        self.unet = UNet(3 + ENCODING, 3 + gated, widths, norm, bounded=not residual)
        try:
            self.unet.check_size(image_size)
        except ValueError as error:
            raise ValueError(f"image_size {image_size}: {error}") from error
        self.residual, self.gated = residual, gated
        if residual:
            for parameter in self.unet.last.parameters():
                nn.init.zeros_(parameter)

    def class_ids(self, names: Sequence[str]) -> Tensor:
        """The ids of target classes by name, int64 (len(names),).

        Raises:
            ValueError: a name it was not trained for.
        """
        for name in names:
            if name not in self.classes:
                raise ValueError(f"unknown class {name!r}; known are {', '.join(self.classes)}")
        return torch.tensor([self.classes.index(name) for name in names])

    def forward(self, image: Tensor, class_id: Tensor) -> Tensor:
        """Translate.

        Args:
            image: (B, 3, H, W) float in [-1, 1].
            class_id: int64 (B,), in [0, len(classes)).

        Returns:
            (B, 3, H, W), the same dtype, in [-1, 1].
        """
        encoding = frequency_encoding(class_id.to(torch.float32) / len(self.classes))
        output = self.unet(concatenate_condition(image, encoding))
        if self.gated:
            output = output[:, :3] - output[:, 3:] * image
        return clip(image + output) if self.residual else output


def clip(x: Tensor) -> Tensor:
    """x clipped to [-1, 1], any shape, with a gradient that leads what is outside back.

    ∂L/∂x = ∂L/∂clip(x) everywhere, a straight-through clamp. The gradient of a plain one is 0 where
    x is outside: a pixel that is out stays out, whatever L has against it.
    """
    clipped: Tensor = _Clip.apply(x)
    return clipped


class _Clip(torch.autograd.Function):
    """See `clip`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clamp(-1, 1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient
