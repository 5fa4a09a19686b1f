"""Decodes image files."""

import struct
from pathlib import Path

from PIL import Image, ImageOps

from misc.errors import UserError


def read_image(path: Path, *, upright: bool = False) -> Image.Image:
    """Decodes an image file to RGB. Raises UserError with its name where that cannot be done.

    Args:
        upright: turns it as its EXIF data say, which people's own pictures need. Datasets are read as they are.
    """
    try:
        with Image.open(path) as image:
            return (ImageOps.exif_transpose(image) if upright else image).convert("RGB")
    except (OSError, ValueError, SyntaxError, struct.error, Image.DecompressionBombError) as error:
        raise UserError(f"image {path} cannot be decoded ({error}): replace it or its entry") from error
