"""From images to normalised tensors: training view, SimCLR view, evaluation view, MixGen.

Tensors are (3, H, W) float32; before normalisation their values are in [0, 1]. All random numbers come from torch's
default CPU generator, which the caller seeds for each sample.
"""

import math
from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor

from misc.data.image_operations import Operation
from misc.data.transforms import InterpolationMode, v2
from misc.data.transforms import functional as F
from model.preprocessing import IMAGENET_DEVIATION, IMAGENET_MEAN


def to_tensor(image: Image.Image) -> Tensor:
    """Converts an RGB image to (3, H, W) float32 in [0, 1]."""
    return F.to_dtype(F.pil_to_tensor(image), torch.float32, scale=True)


def normalise(
    image: Tensor, mean: Sequence[float] = IMAGENET_MEAN, deviation: Sequence[float] = IMAGENET_DEVIATION
) -> Tensor:
    """Subtracts the mean of each channel and divides by its deviation. The defaults are ImageNet's, not CLIP's."""
    return F.normalize(image, list(mean), list(deviation))


class EvaluationView:
    """The view for evaluation and search: resized (bicubic, antialiased) and normalised.

    Args:
        resolution: (height, width) in pixels.
        mean, deviation: values of each channel. The defaults are those of training; other weights may need their own.
    """

    def __init__(
        self,
        resolution: tuple[int, int],
        mean: Sequence[float] = IMAGENET_MEAN,
        deviation: Sequence[float] = IMAGENET_DEVIATION,
    ):
        self.resolution = list(resolution)
        self.mean, self.deviation = tuple(mean), tuple(deviation)

    def __call__(self, image: Image.Image) -> Tensor:
        resized = to_tensor(F.resize(image, self.resolution, InterpolationMode.BICUBIC))
        return normalise(resized, self.mean, self.deviation)


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
        self.resolution = list(resolution)
        self.operations = operations
        self.drawn = drawn

    def resize(self, image: Image.Image) -> Tensor:
        """Resizes an RGB image to (3, H, W) in [0, 1], bilinear and antialiased."""
        return to_tensor(F.resize(image, self.resolution, InterpolationMode.BILINEAR))

    def __call__(self, resized: Tensor) -> Tensor:
        """Augments and normalises the (3, H, W) image of `resize`."""
        chosen = self.operations
        if self.operations and self.drawn is not None:
            chosen = [chosen[index] for index in torch.randint(len(chosen), (self.drawn,)).tolist()]
        for operation in chosen:
            resized = operation(resized)
        return normalise(resized)


class SimCLRView:
    """SimCLR's strong augmentation of the decoded image, for SS-I."""

    def __init__(self, resolution: tuple[int, int]):
        self.transforms = v2.Compose(
            [
                v2.RandomResizedCrop(list(resolution), scale=(0.2, 1.0)),
                v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8),
                v2.RandomGrayscale(p=0.2),
                v2.RandomApply([GaussianBlur(0.1, 2.0)], p=0.5),
                v2.RandomHorizontalFlip(p=0.5),
            ]
        )

    def __call__(self, image: Tensor) -> Tensor:
        """Augments an image (3, H', W') in [0, 1] of any size. Returns: (3, H, W), normalised."""
        return normalise(self.transforms(image))


class GaussianBlur(torch.nn.Module):
    """Gaussian blur. Sigma in pixels is drawn uniformly; the kernel extends to three sigma."""

    def __init__(self, low: float, high: float):
        super().__init__()
        self.low, self.high = low, high

    def forward(self, image: Tensor) -> Tensor:
        sigma = torch.empty(1).uniform_(self.low, self.high).item()
        size = 2 * math.ceil(3 * sigma) + 1
        return F.gaussian_blur(image, [size, size], [sigma, sigma])


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
