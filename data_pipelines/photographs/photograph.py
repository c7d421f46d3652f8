"""What is in the bytes of an image file: looked at and not trusted, as RGB pixels that torchvision would show too."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from ghostmask.engine.errors import InputError

LONGEST_SIDE = 65_500
"""Of a JPEG, by libjpeg; FFCV keeps sides in 16 bits."""


class BadImage(InputError):
    """One image cannot be used; the message names it."""


def read_rgb(data: bytes, name: str, *, exif: bool = False) -> Image.Image:
    """The image in RGB: gray of 8 and 16 bits, palette and CMYK files too; of a moving one its first picture.

    exif: turned as its EXIF data say; else as it is stored, as torchvision reads it. Raises BadImage.
    """
    with _bad_if_unreadable(name, data), Image.open(io.BytesIO(data)) as file:
        image = _eight_bits(ImageOps.exif_transpose(file) if exif else file).convert("RGB")
    if max(image.size) > LONGEST_SIDE:
        raise BadImage(f"{name} has {image.width} x {image.height} pixels, more than {LONGEST_SIDE:,}; shrink it")
    return image


def shrunk(image: Image.Image, max_resolution: int) -> Image.Image:
    """The image with its shorter side at most max_resolution."""
    ratio = max_resolution / min(image.size)
    if ratio >= 1:
        return image
    width, height = (max(max_resolution, round(side * ratio)) for side in image.size)
    return image.resize((width, height), Image.Resampling.BICUBIC)


@contextmanager
def _bad_if_unreadable(name: str, data: bytes) -> Iterator[None]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's do not name the file
            yield
    except Exception as error:  # Pillow's readers raise what the bytes lead them to: struct.error, KeyError, ...
        known = "it is empty" if not data else "its content is of no known kind"
        reason = known if isinstance(error, UnidentifiedImageError) else error
        raise BadImage(f"{name} is not a readable image ({reason}); remove or replace it") from error


def _eight_bits(image: Image.Image) -> Image.Image:
    """Gray of 16 bits as gray of 8: Pillow's own conversion cuts all that is above 255 to white."""
    if image.mode.startswith("I"):
        values: NDArray[np.int64] = np.asarray(image).astype(np.int64)
        if image.mode == "I" and not 0 <= values.min() <= values.max() <= 65_535:
            raise ValueError("gray of 32 bits")
        return Image.fromarray((values >> 8).astype(np.uint8))
    if image.mode == "F":
        raise ValueError("gray of floating-point numbers")
    return image
