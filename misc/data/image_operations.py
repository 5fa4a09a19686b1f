"""The image augmentations of the paper's study by name, each with one strength.

They map (3, H, W) float32 in [0, 1] to the same shape, and draw from torch's default CPU generator.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from misc.data.adjustments import ADJUSTMENTS
from misc.data.transforms import draw_parameters, v2
from misc.errors import shown

Operation = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class ImageOperation:
    """An operation: its accepted strengths, and how it is built.

    Attributes:
        description: the accepted strengths in words, for messages.
        accepts: whether a value is an accepted strength.
        build: builds the operation from its strength and (height, width) in pixels.
    """

    description: str
    accepts: Callable[[Any], bool]
    build: Callable[[Any, tuple[int, int]], Operation]


def _number(low: float, high: float) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _odd(value: Any) -> bool:
    return _is_integer(value) and value > 0 and value % 2 == 1


def _pair(accepts: Callable[[Any, Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and len(value) == 2 and accepts(*value)


def _ascending_shares(low: Any, high: Any) -> bool:
    is_share = _number(0, 1)
    return is_share(low) and is_share(high) and low <= high


def _counts(number: Any, magnitude: Any) -> bool:
    return _is_integer(number) and _is_integer(magnitude) and number > 0 and 0 <= magnitude <= 30


def _crop(smallest: float, resolution: tuple[int, int]) -> Operation:
    # The paper's aspect ratios are meant for a square input. No such crop of a tall input is large enough, and
    # torchvision would always return the same square from its middle, without head and legs.
    aspect = resolution[1] / resolution[0]
    return RandomResizedCrop(list(resolution), scale=(smallest, 1.0), ratio=(3 / 4 * aspect, 4 / 3 * aspect))


class ColorJitter(v2.ColorJitter):
    """torchvision's colour jitter, with faster adjustments of the same result."""

    def forward(self, image: Tensor) -> Tensor:
        drawn = draw_parameters(self, [])
        images = image[None].clone()
        for number in drawn["fn_idx"].tolist():
            name = ("brightness", "contrast", "saturation", "hue")[number]
            value = drawn[f"{name}_factor"]
            if value is not None:
                images = ADJUSTMENTS[name](images, [value])
        return images[0]


class RandomResizedCrop(v2.RandomResizedCrop):
    """torchvision's crop of an image that has the output size already, so that it is only enlarged."""

    def forward(self, image: Tensor) -> Tensor:
        box = draw_parameters(self, [image])
        top, left = box["top"], box["left"]
        cropped = image[None, :, top : top + box["height"], left : left + box["width"]]
        return F.interpolate(cropped, self.size, mode="bilinear")[0]


class RandomRotation(v2.RandomRotation):
    """torchvision's rotation, with a faster lookup of the nearest pixels."""

    def forward(self, image: Tensor) -> Tensor:
        return rotate(image, draw_parameters(self, [image])["angle"])


def rotate(image: Tensor, degrees: float) -> Tensor:
    """Rotates an image (3, H, W) counter-clockwise around its centre: nearest pixels, and 0 outside of the image."""
    height, width = image.shape[-2:]
    cosine, sine = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    middle_row, middle_column = (height - 1) / 2, (width - 1) / 2
    row = torch.arange(height, dtype=torch.float32).sub_(middle_row)[:, None]
    column = torch.arange(width, dtype=torch.float32).sub_(middle_column)
    # Where each pixel comes from. Everything outside is looked up in a border of zeros.
    source_row = torch.add(column * sine + middle_row, row * cosine).round_().clamp_(-1, height)
    source_column = torch.add(column * cosine + middle_column, row * -sine).round_().clamp_(-1, width)
    source = (source_row + 1).mul_(width + 2).add_(source_column + 1).long().flatten()
    bordered = F.pad(image, (1, 1, 1, 1)).flatten(1)
    return bordered.gather(1, source.expand(len(bordered), -1)).view(image.shape)


IMAGE_OPERATIONS: dict[str, ImageOperation] = {
    "color_jitter_bcs": ImageOperation(
        "strength of the jitter in brightness, contrast and saturation, 0 to 1",
        _number(0, 1),
        lambda strength, _: ColorJitter(brightness=strength, contrast=strength, saturation=strength, hue=0),
    ),
    "random_rotation": ImageOperation(
        "largest angle in degrees, 0 to 180", _number(0, 180), lambda degrees, _: RandomRotation(degrees)
    ),
    "random_resized_crop": ImageOperation(
        "smallest share of the image that the crop keeps, 0.01 to 1", _number(0.01, 1), _crop
    ),
    "random_grayscale": ImageOperation("probability, 0 to 1", _number(0, 1), lambda p, _: v2.RandomGrayscale(p=p)),
    "random_horizontal_flip": ImageOperation(
        "probability, 0 to 1", _number(0, 1), lambda p, _: v2.RandomHorizontalFlip(p=p)
    ),
    "random_erasing": ImageOperation(
        "[smallest, largest] share of the image that is erased with probability 0.5, each 0 to 1",
        _pair(_ascending_shares),
        lambda scale, _: v2.RandomErasing(p=0.5, scale=tuple(scale), ratio=(0.3, 3.3), value=0),
    ),
    "gaussian_blur": ImageOperation(
        "odd side of the kernel in pixels, with a sigma of 0.1 to 2",
        _odd,
        lambda kernel, _: v2.GaussianBlur(kernel, (0.1, 2.0)),
    ),
    "color_jitter_hue": ImageOperation(
        "strength, 0 to 0.5", _number(0, 0.5), lambda strength, _: ColorJitter(hue=strength)
    ),
    "random_vertical_flip": ImageOperation(
        "probability, 0 to 1", _number(0, 1), lambda p, _: v2.RandomVerticalFlip(p=p)
    ),
    "auto_augment": ImageOperation(
        "the policy, one of imagenet, cifar10, svhn",
        lambda value: value in [policy.value for policy in v2.AutoAugmentPolicy],
        lambda policy, _: v2.AutoAugment(v2.AutoAugmentPolicy(policy)),
    ),
    "rand_augment": ImageOperation(
        "[number of operations, their magnitude from 0 to 30]",
        _pair(_counts),
        lambda values, _: v2.RandAugment(num_ops=values[0], magnitude=values[1]),
    ),
    "trivial_augment": ImageOperation(
        "number of magnitudes, at least 2",
        lambda value: _is_integer(value) and value >= 2,
        lambda bins, _: v2.TrivialAugmentWide(num_magnitude_bins=bins),
    ),
}
"""All operations by name. Without a pool they are applied in this order; a pool draws from them in this order."""


def build_operations(strengths: Mapping[str, Any], resolution: tuple[int, int]) -> list[Operation]:
    """Builds the named operations, in the order of `IMAGE_OPERATIONS`."""
    return [
        operation.build(strengths[name], resolution)
        for name, operation in IMAGE_OPERATIONS.items()
        if name in strengths
    ]


def wrong_operations(strengths: Any) -> list[str]:
    """Lists the errors in a mapping from names to strengths, in words."""
    if not isinstance(strengths, dict):
        return ["should be a mapping from operations to strengths"]
    problems = []
    for name, strength in strengths.items():
        if name not in IMAGE_OPERATIONS:
            problems.append(f"has {shown(name)}, which is not one of {', '.join(IMAGE_OPERATIONS)}")
        elif not IMAGE_OPERATIONS[name].accepts(strength):
            problems.append(f"has {name}: {shown(strength)}, which should be the {IMAGE_OPERATIONS[name].description}")
    return problems
