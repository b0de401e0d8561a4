"""The translator: a feed-forward image-to-image network, one for all its target classes."""

from collections.abc import Sequence
from typing import Any, overload

import torch
from PIL import Image
from torch import Tensor, nn

from lmc.errors import require
from lmc.hub import HubNetwork
from lmc.shards.encoded import upright
from lmc.shards.images import as_floats, pixels_of, resize, to_uint8
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

    @overload
    def translate(self, image: Image.Image, to: str, batch_size: int = ...) -> Image.Image: ...
    @overload
    def translate(
        self, image: Sequence[Image.Image], to: str, batch_size: int = ...
    ) -> list[Image.Image]: ...

    @torch.no_grad()
    def translate(
        self, image: Image.Image | Sequence[Image.Image], to: str, batch_size: int = 16
    ) -> Image.Image | list[Image.Image]:
        """Translate pictures of any size and mode, to pictures of the same sizes.

        The network works at the size it was trained at: a picture is scaled so that its shorter
        side is `image_size` (the longer one to a multiple of what the U-Net halves), and its
        translation is scaled back to the picture's own size, without detail that was not there.
        (`lmc translate` takes the middle square in place of the whole.)

        Args:
            image: a PIL picture, or several of any sizes. Its EXIF orientation is applied; what is
                transparent is seen on white.
            to: the name of the target class.
            batch_size: pictures of one shape at a time.

        Returns:
            RGB, or RGBA with the alpha channel of a picture that has one; of several pictures a
            list, in their order.

        Raises:
            ValueError: a class it was not trained for, or batch_size below 1.
            TypeError: something else than PIL pictures.
        """
        (class_id,) = self.class_ids([to])
        require(batch_size >= 1, "batch_size", "at least 1", batch_size)
        several = [image] if isinstance(image, Image.Image) else list(image)
        for each in several:
            if not isinstance(each, Image.Image):
                raise TypeError(f"translate takes PIL pictures, got a {type(each).__name__}")
        shown = [upright(each) for each in several]
        by_shape: dict[tuple[int, int], list[int]] = {}
        for number, (picture, _) in enumerate(shown):
            by_shape.setdefault(self._sides(*picture.size), []).append(number)
        found = dict[int, Image.Image]()
        device = next(self.parameters()).device
        for sides, numbers in by_shape.items():
            for first in range(0, len(numbers), batch_size):
                some = numbers[first : first + batch_size]
                sources = (as_floats(pixels_of(shown[i][0])).to(device)[None] for i in some)
                batch = torch.cat([resize(source, sides) for source in sources])
                outputs = self(batch, class_id.to(device).expand(len(batch)))
                for i, output in zip(some, outputs, strict=True):
                    (width, height), alpha = shown[i][0].size, shown[i][1]
                    pixels = to_uint8(resize(output[None], (height, width)))[0].cpu()
                    found[i] = picture_of(pixels, alpha)
        translated = [found[i] for i in range(len(several))]
        return translated[0] if isinstance(image, Image.Image) else translated

    def _sides(self, width: int, height: int) -> tuple[int, int]:
        """The height and width at which a picture goes through the network."""
        scale, factor = self.image_size / min(width, height), self.unet.factor
        return (
            max(factor, round(height * scale / factor) * factor),
            max(factor, round(width * scale / factor) * factor),
        )


def picture_of(pixels: Tensor, alpha: Image.Image | None = None) -> Image.Image:
    """uint8 (3, H, W) as a PIL picture, with an alpha channel of its size (mode L) if given."""
    picture = Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())
    if alpha is not None:
        picture.putalpha(alpha)
    return picture


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
