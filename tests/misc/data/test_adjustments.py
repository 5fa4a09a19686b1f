"""Adjustments against torchvision, a formula written out, and each other: one image at a time and a batch."""

import math
from random import Random

import numpy as np
import pytest
import torch
from torchvision.transforms.v2 import functional as F

from misc.data.adjustments import ADJUSTMENTS, apply_adjustments, gaussian_blur
from misc.data.views import SimCLRView, finish_simclr_views
from tests.helpers.golden_models import assert_close
from tests.helpers.seeded import normal


def images(count: int = 3) -> torch.Tensor:
    """Returns images with black, white and grey areas."""
    found = torch.from_numpy(normal("adjustments", count, 3, 20, 17)).sigmoid()
    found[:, :, :2], found[:, :, 2:4], found[:, :, 4:6] = 0, 1, found[:, :1, 4:6]
    return found


@pytest.mark.parametrize(
    ("name", "values", "expected"),
    [
        ("brightness", (0.0, 0.6, 1.4), F.adjust_brightness),
        ("contrast", (0.0, 0.6, 1.4), F.adjust_contrast),
        ("saturation", (0.0, 0.6, 1.4), F.adjust_saturation),
        ("hue", (-0.5, -0.37, -0.1, -0.02, 0.0, 0.06, 0.1, 0.24, 0.5), F.adjust_hue),
        ("grayscale", (1.0,), lambda image, _: F.rgb_to_grayscale(image, num_output_channels=3)),
        ("flip", (1.0,), lambda image, _: image.flip(-1)),
    ],
)
def test_an_adjustment_is_torchvision_s(name, values, expected):
    # torchvision's weights of a grey value have four digits, and their sum is 0.9999.
    tolerance = 5e-4 if name in ("contrast", "saturation", "grayscale") else 1e-5
    for value in values:
        found = ADJUSTMENTS[name](images(), [value] * 3)
        assert_close(found, expected(images(), value), tolerance)


@pytest.mark.parametrize("sigma", [0.1, 0.4, 1.3, 2.0])
def test_gaussian_blur_is_a_convolution_with_a_gaussian(sigma):
    image = torch.from_numpy(normal("blur", 3, 15, 12))
    reach = math.ceil(3 * sigma)
    offsets = np.arange(-reach, reach + 1)
    kernel = np.exp(-(offsets**2) / (2 * sigma**2))
    kernel = np.outer(kernel, kernel) / kernel.sum() ** 2
    padded = np.pad(image.numpy(), ((0, 0), (reach, reach), (reach, reach)), mode="reflect")
    expected = np.zeros(image.shape)
    for channel, row, column in np.ndindex(*image.shape):
        window = padded[channel, row : row + 2 * reach + 1, column : column + 2 * reach + 1]
        expected[channel, row, column] = (window * kernel).sum()
    assert_close(gaussian_blur(image[None], [sigma])[0], torch.from_numpy(expected), 1e-5)


def test_adjustments_are_applied_in_their_order():
    brighter_first = apply_adjustments(
        torch.full((1, 3, 2, 2), 0.8), [[("brightness", 1.4), None, ("brightness", 0.5)]]
    )
    darker_first = apply_adjustments(torch.full((1, 3, 2, 2), 0.8), [[("brightness", 0.5), None, ("brightness", 1.4)]])
    assert_close(brighter_first, torch.full((1, 3, 2, 2), 0.5))  # cut off at 1
    assert_close(darker_first, torch.full((1, 3, 2, 2), 0.56))


def test_a_batch_of_simclr_views_equals_its_views_one_by_one():
    view, random = SimCLRView((40, 24)), Random(0)
    crops = (images(60).repeat(1, 1, 2, 2)[:, :, :40, :24] * 255).to(torch.uint8)
    adjustments = [view.draw(random) for _ in crops]
    one_by_one = [finish_simclr_views(crop[None], [row]) for crop, row in zip(crops, adjustments, strict=True)]
    together = finish_simclr_views(crops, adjustments)
    assert together.dtype == torch.float32
    assert (together - torch.cat(one_by_one)).abs().max() < 1e-5
