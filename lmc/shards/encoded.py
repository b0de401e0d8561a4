"""Encoded images, opened by Pillow. No torch: processes that only prepare data start without it."""

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from PIL import Image, ImageOps, UnidentifiedImageError


@contextmanager
def opened(data: bytes) -> Iterator[Image.Image]:
    """An encoded image, opened. Whatever Pillow raises of it is one error, so that it is caught.

    Only what Pillow does belongs into the block: there a fault of ours would look like one of the
    image. Pixels are read when they are first used; of an image that is cut off, never some.

    Args:
        data: the file's content.

    Raises:
        ValueError: it is no whole image, or has more pixels than Pillow takes for safe
            (`PIL.Image.MAX_IMAGE_PIXELS`, 89 million).
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd metadata, once an image: nobody can use that
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(data)) as image:
                yield image
    except UnidentifiedImageError as error:
        raise ValueError("in no known format") from error
    except Exception as error:  # of damaged data anything: struct.error, IndexError, zlib.error …
        raise ValueError(" ".join(str(error).split()) or repr(error)) from error


def upright(image: Image.Image) -> tuple[Image.Image, Image.Image | None]:
    """An image as it is meant to be seen, and its alpha channel, mode L, if it has one.

    Turned as its EXIF orientation says. What is transparent is shown on white, since any colour may
    be stored there; an alpha channel that is opaque everywhere is none.
    """
    turned = ImageOps.exif_transpose(image)
    if not turned.has_transparency_data:
        return turned, None
    layers = turned.convert("RGBA")
    alpha = layers.getchannel("A")
    shown = Image.alpha_composite(Image.new("RGBA", layers.size, "white"), layers).convert("RGB")
    return shown, None if alpha.getextrema() == (255, 255) else alpha
