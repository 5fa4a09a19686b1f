"""torchvision's transforms. A torchvision that does not fit torch is one clear line, whatever command imports it."""

import re
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor

from misc.errors import UserError
from misc.system.distributed import refuse

try:
    from torchvision.transforms import InterpolationMode as InterpolationMode
    from torchvision.transforms import v2 as v2
    from torchvision.transforms.v2 import functional as functional
except (AttributeError, ImportError, OSError, RuntimeError) as error:
    # Compiled parts of torchvision only work with the torch that they were compiled for.
    try:
        installed = version("torchvision")
    except PackageNotFoundError:
        installed = "(not installed)"
    minor = re.match(r"2\.(\d+)", torch.__version__)
    fitting = f"torchvision==0.{int(minor[1]) + 15}.*" if minor else "the torchvision of this torch"  # since torch 2.0
    message = (
        f"torch {torch.__version__} and torchvision {installed} do not fit together ({error}): install {fitting} from "
        "where this torch came from (docs/training.md#install)"
    )
    sys.exit(refuse(UserError(message)))


def draw_parameters(transform: v2.Transform, images: list[Tensor]) -> dict[str, Any]:
    """Draws the random parameters of a transform for these images. torchvision before 0.21 has another name for it."""
    draw = transform.make_params if hasattr(transform, "make_params") else transform._get_params
    return draw(images)
