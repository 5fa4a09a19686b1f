"""Adjustments of colour and sharpness, and flips, for a batch of images on any device.

Images are (B, 3, H, W) float32 in [0, 1]. Each image has its own value. An adjustment may change its input in place.
"""

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

Adjustment = tuple[str, float]
"""A name in `ADJUSTMENTS`, and its value."""

Adjustments = list[Adjustment | None]
"""The adjustments of an image, in order; None changes nothing."""


def apply_adjustments(images: Tensor, adjustments: Sequence[Adjustments]) -> Tensor:
    """Applies to each of B images its own adjustments, equally many. May change `images` in place."""
    for place in zip(*adjustments, strict=True):
        rows: dict[str, list[int]] = {}
        for row, adjustment in enumerate(place):
            if adjustment is not None:
                rows.setdefault(adjustment[0], []).append(row)
        for name, chosen in rows.items():
            adjust, values = ADJUSTMENTS[name], [place[row][1] for row in chosen]
            if len(chosen) == len(images):
                images = adjust(images, values)
            else:
                index = _on_device(torch.tensor(chosen), images)
                images.index_copy_(0, index, adjust(images.index_select(0, index), values))
    return images


def adjust_brightness(images: Tensor, factors: list[float]) -> Tensor:
    return images.mul_(_column(factors, images)).clamp_(0, 1)


def adjust_contrast(images: Tensor, factors: list[float]) -> Tensor:
    """Blends each image with its mean grey value."""
    return _blend(images, _grey(images.mean(dim=(2, 3), keepdim=True)), factors)


def adjust_saturation(images: Tensor, factors: list[float]) -> Tensor:
    """Blends each pixel with its grey value."""
    return _blend(images, _grey(images), factors)


def adjust_hue(images: Tensor, shifts: list[float]) -> Tensor:
    """Shifts the hue, by -0.5 to 0.5 turns of the colour circle. Saturation and value in HSV stay.

    Red, green and blue have their peaks at the hues 0, 2 and 4, in sixths of a turn. A channel has its largest value up
    to a distance of 1 from its peak, and its smallest from a distance of 2. Hues and distances are multiplied by the
    chroma here, so that nothing is divided, and grey pixels need no exception.
    """
    red, green, blue = images.unbind(dim=1)
    largest = torch.maximum(torch.maximum(red, green), blue)
    smallest = torch.minimum(torch.minimum(red, green), blue)
    chroma = largest - smallest
    hue = (red - green).add_(chroma, alpha=4)
    # Where green or red is the largest: with masks of 0 and 1, which are several times as fast as torch.where.
    hue.lerp_((blue - red).add_(chroma, alpha=2), largest.clone().eq_(green))
    hue.lerp_(green - blue, largest.clone().eq_(red))
    hue.add_(chroma * _column([6 * shift for shift in shifts], images, dimensions=3))  # -4 to 8
    distances = torch.empty_like(images)
    for channel, distance in enumerate(distances.unbind(dim=1)):
        torch.sub(hue, chroma, alpha=3 - channel, out=distance)
    # To the nearest peak of red, which is 0 or 6, and of blue, -2 or 4; for green, 3 minus that to -4, 2 or 8.
    distances.abs_().sub_(chroma[:, None], alpha=3).abs_()
    distances.clamp_(chroma[:, None], 2 * chroma[:, None])
    red, green, blue = distances.unbind(dim=1)
    torch.sub(largest.add_(chroma), red, out=red)
    torch.sub(largest, blue, out=blue)
    green.add_(smallest.sub_(chroma))
    return distances


def grayscale(images: Tensor, values: list[float]) -> Tensor:
    return images.copy_(_grey(images).expand_as(images))


def gaussian_blur(images: Tensor, sigmas: list[float]) -> Tensor:
    """Blurs each image with a Gaussian of its sigma, in pixels. Kernels extend to three sigma; borders are reflected.

    The kernel is separable, and its taps are added one by one: for few channels, faster than a convolution.
    """
    kernels = [_half_kernel(sigma) for sigma in sigmas]
    reach = max(map(len, kernels)) - 1
    taps = [
        _column([kernel[tap] if tap < len(kernel) else 0.0 for kernel in kernels], images) for tap in range(reach + 1)
    ]
    for dim, padding in ((3, (reach, reach, 0, 0)), (2, (0, 0, reach, reach))):
        size, padded = images.shape[dim], F.pad(images, padding, mode="reflect")
        images = padded.narrow(dim, reach, size) * taps[0]
        for tap in range(1, reach + 1):
            pair = padded.narrow(dim, reach - tap, size) + padded.narrow(dim, reach + tap, size)
            weight = taps[tap]
            images = images.addcmul_(pair, weight) if isinstance(weight, Tensor) else images.add_(pair, alpha=weight)
    return images


def _half_kernel(sigma: float) -> list[float]:
    """Returns the weights of the centre and of the taps to one side, which are those to the other side."""
    weights = [math.exp(-0.5 * (tap / sigma) ** 2) for tap in range(math.ceil(3 * sigma) + 1)]
    total = 2 * sum(weights) - weights[0]
    return [weight / total for weight in weights]


def horizontal_flip(images: Tensor, values: list[float]) -> Tensor:
    return images.flip(-1)


ADJUSTMENTS: dict[str, Callable[[Tensor, list[float]], Tensor]] = {
    "brightness": adjust_brightness,
    "contrast": adjust_contrast,
    "saturation": adjust_saturation,
    "hue": adjust_hue,
    "grayscale": grayscale,
    "blur": gaussian_blur,
    "flip": horizontal_flip,
}
"""All adjustments by name. They take the images (B, 3, H, W) and B values; grayscale and flip do not use theirs."""


def _blend(images: Tensor, others: Tensor, factors: list[float]) -> Tensor:
    """Moves `images` away from `others` (factor above 1) or towards them."""
    rest = others.mul_(_column([1 - factor for factor in factors], images))
    return images.mul_(_column(factors, images)).add_(rest).clamp_(0, 1)


def _grey(images: Tensor) -> Tensor:
    """Returns the grey values (B, 1, H, W), with the weights that Pillow uses (ITU-R 601)."""
    red, green, blue = images.split(1, dim=1)
    return (red * 0.299).add_(green, alpha=0.587).add_(blue, alpha=0.114)


def _column(values: list[float], images: Tensor, dimensions: int = 4) -> Tensor | float:
    """Returns B values as (B, 1, ...) on the device of the images; a single one as a number, which is faster."""
    if len(values) == 1:
        return values[0]
    return _on_device(torch.tensor(values), images).view(-1, *[1] * (dimensions - 1))


def _on_device(values: Tensor, images: Tensor) -> Tensor:
    """Moves values to the device of the images without waiting for it."""
    return values.to(images.device, non_blocking=True)
