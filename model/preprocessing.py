"""Preprocessing of images and captions: channel statistics, and the preprocessing that each kind of weights needs."""

import sys
from dataclasses import dataclass

from misc.errors import UserError, shown

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_DEVIATION = (0.229, 0.224, 0.225)
INTERPOLATIONS = {"bicubic": 3, "bilinear": 2}
"""Interpolations: open_clip's name, and the number that Pillow and Hugging Face use."""


@dataclass(frozen=True)
class Preprocessing:
    """The steps that turn an image and a caption into the inputs of a model.

    Attributes:
        mean, deviation: mean and standard deviation of the three channels, for values from 0 to 1.
        squash: True: resize height and width independently. False: resize the shorter side and crop the centre.
        interpolation: a key of `INTERPOLATIONS`.
        clean_captions: True: captions are cleaned by `text_utils.cleaning`. False: they are tokenized as they are.
    """

    mean: tuple[float, ...]
    deviation: tuple[float, ...]
    squash: bool
    interpolation: str = "bicubic"
    clean_captions: bool = False

    def __post_init__(self) -> None:
        """Checks the values, because they can come from a file.

        Raises UserError if a value is invalid.
        """
        for name, values in (("mean", self.mean), ("std", self.deviation)):
            finite = [isinstance(value, int | float) and abs(value) <= sys.float_info.max for value in values]
            if len(values) != 3 or not all(finite):
                found = f"{shown(list(values))} for the {name} of an image"
                raise UserError(f"its settings have {found}, instead of three finite numbers")
        if min(self.deviation) <= 0:
            raise UserError(
                f"its settings have {list(self.deviation)} for the std of an image; all values should be above 0"
            )
        if not (isinstance(self.interpolation, str) and self.interpolation in INTERPOLATIONS):
            raise UserError(
                f"its settings resize images with {shown(self.interpolation)} interpolation; it should be "
                f"{' or '.join(INTERPOLATIONS)}"
            )
        if not isinstance(self.clean_captions, bool):
            raise UserError(
                f"its settings have {shown(self.clean_captions)} for clean_captions, instead of true or false"
            )


CLIP_PREPROCESSING = Preprocessing(
    (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711), squash=False
)
"""The preprocessing of OpenAI's CLIP, and open_clip's default."""
TBPS_PREPROCESSING = Preprocessing(IMAGENET_MEAN, IMAGENET_DEVIATION, squash=True, clean_captions=True)
"""The preprocessing of TBPS-CLIP, here and in the published code."""
IRRA_PREPROCESSING = Preprocessing(
    CLIP_PREPROCESSING.mean, CLIP_PREPROCESSING.deviation, squash=True, interpolation="bilinear"
)
"""The preprocessing of IRRA and of its family."""
PREPROCESSINGS = {"tbps_clip": TBPS_PREPROCESSING, "clip": CLIP_PREPROCESSING, "irra": IRRA_PREPROCESSING}
"""The preprocessing of each kind of weights, by its name in the configuration."""
