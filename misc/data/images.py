"""Decodes image files."""

import os
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageFile, UnidentifiedImageError

from misc.errors import UserError, first_of
from misc.files import open_regular

FORMATS = {
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif", ".mpo"),
    "PNG": (".png", ".apng"),
    "WEBP": (".webp",),
    "BMP": (".bmp", ".dib"),
    "GIF": (".gif",),
    "TIFF": (".tif", ".tiff"),
    "AVIF": (".avif",),
    "PPM": (".ppm", ".pgm", ".pbm", ".pnm"),
}
"""The formats that are read, by Pillow's names, with the suffixes of their files. The suffix of a file does not decide
how it is read: Pillow reads more formats, and starts another program for one of them."""
MAX_PIXELS = 50_000_000
"""Largest number of pixels that are decoded; they take 200 MB."""
MAX_SIDE = 65_535
"""Largest width or height in pixels: resizing first makes an image that is still as high."""
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What makes an image upright, by its EXIF orientation."""
EXIF_ORIENTATION = 0x0112

Image.init()
_FORMATS = [name for name in FORMATS if name in Image.OPEN]  # not all versions of Pillow read AVIF
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # such an image is reduced or refused


class ImageError(UserError):
    """An image that cannot be read.

    Attributes:
        path: its path.
        reason: why it cannot be read.
    """

    def __init__(self, path: Path, reason: str):
        super().__init__(
            f"image {path} cannot be decoded ({reason}): replace the file, or leave such images out of a new run with "
            "data.skip_unreadable=true"
        )
        self.path, self.reason = path, " ".join(reason.split())

    def __reduce__(self) -> tuple:  # loader workers send it
        return type(self), (self.path, self.reason)


def read_image(path: Path, *, upright: bool = False) -> Image.Image:
    """Decodes an image file to RGB. Values of 16 bits are scaled to 8; of several frames, the first one is decoded.

    A JPEG file of more than `MAX_PIXELS` is decoded at a half, a quarter or an eighth of its size.

    Args:
        upright: rotates the image according to its EXIF orientation. Photos of users need this; datasets do not.

    Raises ImageError if the file is not a regular file of one of the `FORMATS`, is too large, or cannot be decoded.
    """
    with _opened(path) as file:
        return decode_image(file, path, upright=upright)[0]


_PARTIAL = threading.Lock()
"""Held while Pillow accepts damaged files, which is a setting of the whole process."""


def read_dataset_image(path: Path) -> tuple[Image.Image, bool]:
    """Decodes an image of a dataset like `read_image`. Of a damaged file, it decodes as much as Pillow can.

    The published code uses such files in the same way, for example the first rows of a truncated one.

    Returns: the image, and whether its file is damaged.
    Raises ImageError if nothing can be decoded.
    """
    try:
        return read_image(path), False
    except ImageError:
        with _PARTIAL:
            ImageFile.LOAD_TRUNCATED_IMAGES = True
            try:
                return read_image(path), True
            finally:
                ImageFile.LOAD_TRUNCATED_IMAGES = False


def damaged_warning(paths: list[str]) -> str:
    """Returns a line for the log about files that are damaged."""
    return f"warning: only a part of {len(paths):,} damaged image(s) can be decoded: {first_of(paths, 20)}"


def check_header(path: Path) -> None:
    """Checks an image file as far as its header shows, without decoding it.

    Raises ImageError like `read_image`.
    """
    with _opened(path) as file, _reported(path), Image.open(file, formats=_FORMATS) as image:
        _check_values(image)
        _limit_pixels(image)


def read_header(path: Path) -> tuple[tuple[int, int], str]:
    """Reads the (width, height) and Pillow's mode of an image file, without decoding it.

    Raises ImageError if the file is not a regular file of one of the `FORMATS`.
    """
    with _opened(path) as file, _reported(path), Image.open(file, formats=_FORMATS) as image:
        return image.size, image.mode


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    try:
        file = open_regular(path)
    except OSError as error:
        raise ImageError(path, _reason(error)) from error
    with file:
        if os.fstat(file.fileno()).st_size == 0:
            raise ImageError(path, "the file is empty")
        yield file


@contextmanager
def _reported(path: Path) -> Iterator[None]:
    """Raises every exception as an ImageError of this file."""
    try:
        yield
    except Exception as error:  # decoders raise many kinds, for example NotImplementedError
        raise ImageError(path, _reason(error)) from error


def decode_image(file: BinaryIO, path: Path, *, upright: bool = False) -> tuple[Image.Image, str]:
    """Decodes an open image file like `read_image`.

    Returns: the image, and Pillow's name of its format.
    """
    with _reported(path):
        with Image.open(file, formats=_FORMATS) as image:
            _check_values(image)
            _limit_pixels(image)
            image.load()
            rgb = _to_rgb(image)
            orientation = image.getexif().get(EXIF_ORIENTATION) if upright else None
            form = image.format or ""
        return (rgb.transpose(UPRIGHT[orientation]) if orientation in UPRIGHT else rgb), form


def _limit_pixels(image: Image.Image) -> None:
    """Makes the decoder reduce a large image. Raises ValueError if it cannot, before any memory is allocated for it."""
    width, height = image.size
    if image.format in ("JPEG", "MPO") and not image.info.get("progressive"):  # a progressive one is held as a whole
        for factor in (1, 2, 4, 8):
            if width * height <= factor**2 * MAX_PIXELS:
                if factor > 1:
                    image.draft(None, (width // factor, height // factor))
                return
    if width * height > MAX_PIXELS or max(width, height) > MAX_SIDE:
        raise ValueError(
            f"it has {width:,} × {height:,} pixels; at most {MAX_PIXELS:,}, and {MAX_SIDE:,} on a side, are read"
        )


def _has_16_bits(image: Image.Image) -> bool:
    # With the mode I, Pillow reads PNG (old versions) and PPM from 16 bits, and other formats from 32.
    return image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM"))


def _check_values(image: Image.Image) -> None:
    """Raises ValueError if the range of its values is not known."""
    if image.mode in ("I", "F") and not _has_16_bits(image):
        raise ValueError("its values have 32 bits, and their range is not known: convert it to 8 or 16 bits")


def _to_rgb(image: Image.Image) -> Image.Image:
    """Converts a decoded image to RGB."""
    if image.mode == "RGB":
        return image
    if _has_16_bits(image):  # Pillow would clip values above 255
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    return image.convert("RGB")


def _reason(error: Exception) -> str:
    """Returns in words why an image cannot be read."""
    if isinstance(error, Image.DecompressionBombError):
        return f"it has more than {2 * (Image.MAX_IMAGE_PIXELS or 0):,} pixels; at most {MAX_PIXELS:,} are read"
    if isinstance(error, UnidentifiedImageError):
        return f"it is not a {', '.join(_FORMATS[:-1])} or {_FORMATS[-1]} file"
    if isinstance(error, OSError) and error.errno is not None:
        return os.strerror(error.errno)
    if isinstance(error, OSError | ValueError | SyntaxError):
        return str(error) or type(error).__name__
    return f"{type(error).__name__}: {error}"
