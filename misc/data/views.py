"""From images to normalised tensors: training view, SimCLR view, evaluation view, MixGen.

Tensors are (3, H, W) float32; before normalisation their values are in [0, 1]. The random numbers of a training view
come from torch's default CPU generator, those of a SimCLR view from a `Random`. The caller seeds them for each sample.
"""

import functools
import math
from collections.abc import Sequence
from random import Random

import torch
from PIL import Image
from torch import Tensor

from misc.data.adjustments import Adjustments, apply_adjustments
from misc.data.image_operations import Operation
from misc.data.transforms import InterpolationMode
from misc.data.transforms import functional as F
from model.preprocessing import IMAGENET_DEVIATION, IMAGENET_MEAN, TBPS_PREPROCESSING, Preprocessing


def to_tensor(image: Image.Image) -> Tensor:
    """Converts an RGB image to (3, H, W) float32 in [0, 1]."""
    return F.to_dtype(F.pil_to_tensor(image), torch.float32, scale=True)


def normalise(
    images: Tensor, mean: Sequence[float] = IMAGENET_MEAN, deviation: Sequence[float] = IMAGENET_DEVIATION
) -> Tensor:
    """Subtracts the mean of each channel and divides by its deviation. The defaults are ImageNet's, not CLIP's.

    Args:
        images: (..., 3, H, W) on any device.
    """
    centre, scale = (
        _channel_values(tuple(values)).to(images.device, non_blocking=True) for values in (mean, deviation)
    )
    return images.sub(centre).div_(scale)


@functools.cache
def _channel_values(values: tuple[float, ...]) -> Tensor:
    return torch.tensor(values).view(3, 1, 1)


class EvaluationView:
    """The view for evaluation and search: resized (antialiased) and normalised.

    Height and width are resized independently, also for weights that were trained on crops (`Preprocessing.squash`):
    a square cut out of an image of a standing person has neither head nor legs.

    Args:
        resolution: (height, width) in pixels.
        preprocessing: interpolation, and values of each channel. The default is that of the recipe.
    """

    def __init__(self, resolution: tuple[int, int], preprocessing: Preprocessing = TBPS_PREPROCESSING):
        self.resolution = list(resolution)
        self.preprocessing = preprocessing

    def __call__(self, image: Image.Image) -> Tensor:
        resized = to_tensor(F.resize(image, self.resolution, InterpolationMode(self.preprocessing.interpolation)))
        return normalise(resized, self.preprocessing.mean, self.preprocessing.deviation)


def _resize(pixels: Tensor, resolution: tuple[int, int]) -> Tensor:
    """Resizes an image (3, H', W') uint8 to (3, H, W) uint8. Twice as fast as Pillow, and at most one level off."""
    return torch.nn.functional.interpolate(pixels[None], resolution, mode="bilinear", antialias=True)[0]


class PoolView:
    """The training view: resized, augmented and normalised.

    With `drawn`, each view draws that many operations independently with replacement, and applies them in the order
    drawn (the paper's augmentation pool: two of six). Without it, each view applies all operations in order.

    `resize` is a separate step, so that two views of an image can share it.

    Args:
        resolution: (height, width) in pixels.
        operations: functions of an image (3, H, W) in [0, 1].
        drawn: number of operations drawn for a view; None applies all.
    """

    def __init__(self, resolution: tuple[int, int], operations: list[Operation], drawn: int | None):
        self.resolution = resolution
        self.operations = operations
        self.drawn = drawn

    def resize(self, pixels: Tensor) -> Tensor:
        """Resizes an image (3, H', W') uint8 to (3, H, W) float32 in [0, 1], bilinear and antialiased."""
        return _resize(pixels, self.resolution).to(torch.float32).div_(255)

    def __call__(self, resized: Tensor) -> Tensor:
        """Augments and normalises the (3, H, W) image of `resize`."""
        chosen = self.operations
        if self.operations and self.drawn is not None:
            chosen = [chosen[index] for index in torch.randint(len(chosen), (self.drawn,)).tolist()]
        for operation in chosen:
            resized = operation(resized)
        return normalise(resized)


class SimCLRView:
    """SimCLR's strong augmentation of the decoded image, for SS-I: crop, colour jitter, grayscale, blur and flip.

    A view is made in two steps: `crop` for a single image, then `finish_simclr_views` with the adjustments of `draw`,
    which can run on a GPU for a whole batch.
    """

    def __init__(self, resolution: tuple[int, int]):
        self.resolution = resolution

    def __call__(self, image: Tensor, random: Random) -> Tensor:
        """Makes a view (3, H, W) float32, normalised, of an image (3, H', W') uint8 of any size."""
        crop = self.crop(image, random)
        return finish_simclr_views(crop[None], [self.draw(random)])[0]

    def crop(self, image: Tensor, random: Random) -> Tensor:
        """Resizes a random crop of an image (3, H', W') uint8, with 0.2 to 1 of its area, to (3, H, W) uint8."""
        top, left, height, width = draw_crop(image.shape[1], image.shape[2], random)
        return _resize(image[:, top : top + height, left : left + width], self.resolution)

    def draw(self, random: Random) -> Adjustments:
        """Draws the adjustments of a view: four of the colour jitter in random order, then grayscale, blur and flip."""
        jitter: Adjustments = [None] * 4
        if random.random() < 0.8:
            jitter = [(name, random.uniform(0.6, 1.4)) for name in ("brightness", "contrast", "saturation")]
            jitter.append(("hue", random.uniform(-0.1, 0.1)))
            random.shuffle(jitter)
        return [
            *jitter,
            ("grayscale", 1.0) if random.random() < 0.2 else None,
            ("blur", random.uniform(0.1, 2.0)) if random.random() < 0.5 else None,
            ("flip", 1.0) if random.random() < 0.5 else None,
        ]


def draw_crop(height: int, width: int, random: Random) -> tuple[int, int, int, int]:
    """Draws the top, left, height and width of SimCLR's crop, in pixels.

    As in torchvision, its share of the area is uniform in (0.2, 1) and its aspect ratio log-uniform in (3/4, 4/3). If
    ten such crops do not fit, the result is the largest one in the middle with an allowed ratio.
    """
    narrowest, widest = 3 / 4, 4 / 3
    for _ in range(10):
        area = height * width * random.uniform(0.2, 1.0)
        ratio = math.exp(random.uniform(math.log(narrowest), math.log(widest)))
        crop_width, crop_height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < crop_width <= width and 0 < crop_height <= height:
            break
    else:
        crop_height, crop_width = min(height, round(width / narrowest)), min(width, round(height * widest))
        return (height - crop_height) // 2, (width - crop_width) // 2, crop_height, crop_width
    return random.randint(0, height - crop_height), random.randint(0, width - crop_width), crop_height, crop_width


def finish_simclr_views(crops: Tensor, adjustments: Sequence[Adjustments]) -> Tensor:
    """Adjusts and normalises the crops (B, 3, H, W) uint8 of SimCLR views, on their device.

    Args:
        adjustments: a result of `SimCLRView.draw` for each crop.
    """
    return normalise(apply_adjustments(crops.to(torch.float32).div_(255), adjustments))


def mix_images(image: Tensor, partner: Tensor, kind: str) -> Tensor:
    """Mixes two views (3, H, W) as MixGen: their mean (`ori`), or side by side at half the width each (`cat`).

    The views are normalised, and so is the result. The published code normalises the result of `cat` a second time.
    """
    if kind == "ori":
        return 0.5 * image + 0.5 * partner
    height, width = image.shape[-2:]
    left, right = (F.resize(half, [height, w]) for half, w in ((image, width // 2), (partner, width - width // 2)))
    return torch.cat([left, right], dim=-1)


def mix_captions(caption: str, partner: str) -> str:
    """Concatenates two captions, as MixGen does."""
    return f"{caption} {partner}"
