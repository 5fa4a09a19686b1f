"""Decodes image files."""

import struct
from pathlib import Path

from PIL import Image, ImageOps

from misc.errors import UserError


def read_image(path: Path, *, upright: bool = False) -> Image.Image:
    """Decodes an image file to RGB.

    Args:
        upright: rotates the image according to its EXIF orientation. Photos of users need this; datasets do not.

    Raises UserError if the file cannot be decoded. The message contains its path.
    """
    try:
        with Image.open(path) as image:
            return (ImageOps.exif_transpose(image) if upright else image).convert("RGB")
    except (OSError, ValueError, SyntaxError, struct.error, Image.DecompressionBombError) as error:
        raise UserError(f"image {path} cannot be decoded ({error}): replace it or its entry") from error
