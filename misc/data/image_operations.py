"""The image augmentations of the paper's study by name, each with one strength (SPEC section 3 and 7).

They take and give (3, H, W) float32 in [0, 1] at the input's resolution, and draw from torch's default CPU generator.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torchvision.transforms import v2

Operation = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class ImageOperation:
    """How an operation is made, and which strengths it has.

    Attributes:
        says: what its strength is, in words.
        accepts: whether a value is one.
        build: from the strength and (height, width) in pixels.
    """

    says: str
    accepts: Callable[[Any], bool]
    build: Callable[[Any, tuple[int, int]], Operation]


def _number(low: float, high: float) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high


def _odd(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0 and value % 2 == 1


def _two(accepts: Callable[[Any, Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and len(value) == 2 and accepts(*value)


def _share(low: Any, high: Any) -> bool:
    inside = _number(0, 1)
    return inside(low) and inside(high) and low <= high


def _counts(number: Any, magnitude: Any) -> bool:
    return all(isinstance(value, int) and not isinstance(value, bool) for value in (number, magnitude)) and (
        number > 0 and 0 <= magnitude <= 30
    )


def _crop(smallest: float, resolution: tuple[int, int]) -> Operation:
    # The paper's aspect ratios are for its square input. Taken literally, no such crop of a tall input exists, and
    # torchvision would always cut the same square out of its middle, without head and legs.
    aspect = resolution[1] / resolution[0]
    return v2.RandomResizedCrop(list(resolution), scale=(smallest, 1.0), ratio=(3 / 4 * aspect, 4 / 3 * aspect))


IMAGE_OPERATIONS: dict[str, ImageOperation] = {
    "color_jitter_bcs": ImageOperation(
        "strength of the jitter in brightness, contrast and saturation, 0 to 1",
        _number(0, 1),
        lambda strength, _: v2.ColorJitter(brightness=strength, contrast=strength, saturation=strength, hue=0),
    ),
    "random_rotation": ImageOperation(
        "largest angle in degrees, 0 to 180", _number(0, 180), lambda degrees, _: v2.RandomRotation(degrees)
    ),
    "random_resized_crop": ImageOperation(
        "smallest share of the image that is kept, 0.01 to 1", _number(0.01, 1), _crop
    ),
    "random_grayscale": ImageOperation("probability, 0 to 1", _number(0, 1), lambda p, _: v2.RandomGrayscale(p=p)),
    "random_horizontal_flip": ImageOperation(
        "probability, 0 to 1", _number(0, 1), lambda p, _: v2.RandomHorizontalFlip(p=p)
    ),
    "random_erasing": ImageOperation(
        "[least, largest] share of the image that is erased, with probability 0.5",
        _two(_share),
        lambda scale, _: v2.RandomErasing(p=0.5, scale=tuple(scale), ratio=(0.3, 3.3), value=0),
    ),
    "gaussian_blur": ImageOperation(
        "odd side of the kernel in pixels; sigma 0.1 to 2", _odd, lambda kernel, _: v2.GaussianBlur(kernel, (0.1, 2.0))
    ),
    "color_jitter_hue": ImageOperation(
        "strength, 0 to 0.5", _number(0, 0.5), lambda strength, _: v2.ColorJitter(hue=strength)
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
        "[number of operations, their magnitude 0 to 30]",
        _two(_counts),
        lambda values, _: v2.RandAugment(num_ops=values[0], magnitude=values[1]),
    ),
    "trivial_augment": ImageOperation(
        "number of magnitudes, at least 2",
        lambda value: isinstance(value, int) and not isinstance(value, bool) and value >= 2,
        lambda bins, _: v2.TrivialAugmentWide(num_magnitude_bins=bins),
    ),
}
"""By name. Their order is that in which they are stacked, and in which a pool draws from them."""


def build_operations(strengths: Mapping[str, Any], resolution: tuple[int, int]) -> list[Operation]:
    """The named operations, in the order of `KINDS`."""
    return [kind.build(strengths[name], resolution) for name, kind in IMAGE_OPERATIONS.items() if name in strengths]


def wrong_operations(strengths: Any) -> list[str]:
    """What is wrong with a mapping from names to strengths, in words; empty where nothing is."""
    if not isinstance(strengths, dict):
        return ["should be a mapping from operations to strengths"]
    problems = []
    for name, strength in strengths.items():
        if name not in IMAGE_OPERATIONS:
            problems.append(f"has {name!r}, which is none of {', '.join(IMAGE_OPERATIONS)}")
        elif not IMAGE_OPERATIONS[name].accepts(strength):
            problems.append(f"has {name}: {strength!r}, which should be the {IMAGE_OPERATIONS[name].says}")
    return problems
