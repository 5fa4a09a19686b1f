"""Models and inputs of the reference values, created again from their names (see seeded.py)."""

from dataclasses import fields
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from model.architecture import Architecture
from model.tbps_clip import TBPSCLIP
from tests.helpers.seeded import TINY, clip_weights, weight

GOLDEN = Path(__file__).parents[1] / "golden"

CAPTIONS = [
    "a man wearing a red shirt and blue jeans",
    "the woman has long black hair and a white dress",
    "a young boy with a yellow backpack",
    "he wears grey trousers , a striped t-shirt and white shoes",
    "an older woman in a green coat carrying a brown handbag",
    "the man is riding a bike in dark shorts",
    "a girl with a ponytail and pink skirt",
    "someone in a black hooded jacket looking at a phone",
]


def load(name: str) -> dict[str, Tensor]:
    """Loads the arrays of a reference file as tensors (strings as numpy arrays)."""
    with np.load(GOLDEN / name) as arrays:
        return {k: v if v.dtype.kind == "U" else torch.from_numpy(v.copy()) for k, v in arrays.items()}


def our_name(openai_name: str) -> str:
    """Returns our name of a parameter of the encoders, the temperature or the projector."""
    if openai_name == "logit_scale":
        return openai_name
    if openai_name.startswith("visual."):
        return openai_name.replace("visual.", "image_encoder.", 1)
    if openai_name.startswith("simclr_mlp."):
        return openai_name.replace("simclr_mlp.", "simclr_projector.", 1)
    return f"text_encoder.{openai_name}"


VIT_B16 = {
    "resolution": (224, 224),
    "patch_size": 16,
    "vision_width": 768,
    "vision_layers": 12,
    "vision_heads": 12,
    "text_length": 77,
    "vocab_size": 49408,
    "text_width": 512,
    "text_layers": 12,
    "text_heads": 8,
    "embed_dim": 512,
    "activation": "quick_gelu",
}
TINY_MODEL = {
    "resolution": (64, 32),
    "patch_size": 16,
    "vision_width": 64,
    "vision_layers": 2,
    "vision_heads": 2,
    "text_length": 24,
    "vocab_size": 49408,
    "text_width": 48,
    "text_layers": 2,
    "text_heads": 3,
    "embed_dim": 32,
    "activation": "quick_gelu",
}
"""Constructor arguments of the full model, and of the one whose weights are `clip_weights(**TINY)`."""


def make_model(**arguments) -> TBPSCLIP:
    """Builds a TBPSCLIP with random weights from the sizes of its architecture and other constructor arguments."""
    sizes = {field.name: arguments.pop(field.name) for field in fields(Architecture) if field.name in arguments}
    return TBPSCLIP(Architecture(**sizes), **arguments)


def seeded_model(architecture: dict, weights: dict, **arguments) -> TBPSCLIP:
    """Builds a TBPSCLIP with seeded weights in its encoders (and projector), in evaluation mode: no dropout."""
    model = make_model(**architecture, **arguments)
    state = {our_name(name): torch.as_tensor(value) for name, value in weights.items()}
    for name, parameter in model.named_parameters():
        if name.startswith("simclr_projector."):
            published = name.replace("simclr_projector", "simclr_mlp")
            state[name] = torch.from_numpy(weight(published, tuple(parameter.shape)))
    model.load_state_dict(state, strict=True)
    return model.eval()


def tiny_model(**arguments) -> TBPSCLIP:
    return seeded_model(TINY_MODEL, clip_weights(**TINY), **arguments)


def assert_close(actual: Tensor, expected: Tensor, tolerance: float = 1e-5, name: str = "") -> None:
    """Checks that the largest difference is at most `tolerance` times the largest reference value."""
    expected = expected.to(actual.dtype)
    assert actual.shape == expected.shape, f"{name}: {tuple(actual.shape)} is not {tuple(expected.shape)}"
    scale = expected.abs().max().clamp(min=1e-12)
    difference = (actual - expected).abs().max() / scale
    assert difference <= tolerance, f"{name}: relative difference {difference:.2e} above {tolerance:.0e}"
