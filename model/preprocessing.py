"""How images become pixels: statistics of the channels, and which preparation belongs to which weights."""

import math
from dataclasses import dataclass

from misc.errors import UserError

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_DEVIATION = (0.229, 0.224, 0.225)
INTERPOLATIONS = {"bicubic": 3, "bilinear": 2}
"""Interpolations by open_clip's name, each with the number that Pillow and Hugging Face use for it."""


@dataclass(frozen=True)
class Preprocessing:
    """How an image becomes pixels of the size that a model wants.

    Attributes:
        mean, deviation: of the three channels of images with values 0 … 1.
        squash: height and width are resized each for itself; otherwise the shorter side is resized and the middle cut
            out.
        interpolation: a key of `INTERPOLATIONS`.
    """

    mean: tuple[float, ...]
    deviation: tuple[float, ...]
    squash: bool
    interpolation: str = "bicubic"

    def __post_init__(self) -> None:
        """Raises UserError for values that cannot be: they come from files of others."""
        for name, values in (("mean", self.mean), ("std", self.deviation)):
            if len(values) != 3 or not all(isinstance(value, int | float) and math.isfinite(value) for value in values):
                raise UserError(f"its settings have {list(values)!r} for the {name} of an image, not three numbers")
        if min(self.deviation) <= 0:
            raise UserError(f"its settings have {list(self.deviation)} for the std of an image, not above 0")
        if self.interpolation not in INTERPOLATIONS:
            raise UserError(
                f"its settings resize images by {self.interpolation!r}, not by {' or '.join(INTERPOLATIONS)}"
            )


CLIP_PREPROCESSING = Preprocessing(
    (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711), squash=False
)
"""OpenAI's and open_clip's."""
TBPS_PREPROCESSING = Preprocessing(IMAGENET_MEAN, IMAGENET_DEVIATION, squash=True)
"""What TBPS-CLIP is trained with, here and in the published code."""
