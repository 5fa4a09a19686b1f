"""Reproducible weights and inputs, from which the reference values in tests/golden were computed.

The stream of `numpy.random.RandomState` is frozen: the same name gives the same array on every machine and with every
version of numpy.
"""

import math
import zlib

import numpy as np


def normal(name: str, *shape: int) -> np.ndarray:
    """Returns a standard normal float32 array that depends only on `name` and `shape`."""
    return np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape).astype(np.float32)


def weight(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Returns a plausible value for the CLIP parameter `name` (OpenAI's key, for example `visual.conv1.weight`).

    Norm gains are 1 + 0.1 n, vectors 0.05 n, embeddings 0.05 n, matrices n / sqrt(fan in), with n = normal(name).
    """
    noise = normal(name, *shape)
    if name == "logit_scale":
        return np.float32(math.log(1 / 0.07))
    if len(shape) == 1:
        return 1 + 0.1 * noise if ".ln_" in f".{name}" and name.endswith("weight") else 0.05 * noise
    if "embedding" in name:
        return 0.05 * noise
    fan_in = shape[0] if name.endswith(("proj", "text_projection")) else math.prod(shape[1:])
    return noise / np.float32(math.sqrt(fan_in))


def clip_shapes(
    *,
    embed=512,
    resolution=(224, 224),
    patch=16,
    vision_width=768,
    vision_layers=12,
    text_width=512,
    text_layers=12,
    context=77,
    vocab=49408,
) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of a CLIP ViT under OpenAI's names, ViT-B/16 by default."""
    patches = (resolution[0] // patch) * (resolution[1] // patch)
    shapes = {
        "logit_scale": (),
        "positional_embedding": (context, text_width),
        "text_projection": (text_width, embed),
        "token_embedding.weight": (vocab, text_width),
        "ln_final.weight": (text_width,),
        "ln_final.bias": (text_width,),
        "visual.class_embedding": (vision_width,),
        "visual.positional_embedding": (patches + 1, vision_width),
        "visual.proj": (vision_width, embed),
        "visual.conv1.weight": (vision_width, 3, patch, patch),
    }
    for ln in ("ln_pre", "ln_post"):
        shapes |= {f"visual.{ln}.weight": (vision_width,), f"visual.{ln}.bias": (vision_width,)}
    for prefix, width, layers in (("visual.", vision_width, vision_layers), ("", text_width, text_layers)):
        for i in range(layers):
            block = f"{prefix}transformer.resblocks.{i}."
            shapes |= {
                block + "attn.in_proj_weight": (3 * width, width),
                block + "attn.in_proj_bias": (3 * width,),
                block + "attn.out_proj.weight": (width, width),
                block + "attn.out_proj.bias": (width,),
                block + "ln_1.weight": (width,),
                block + "ln_1.bias": (width,),
                block + "mlp.c_fc.weight": (4 * width, width),
                block + "mlp.c_fc.bias": (4 * width,),
                block + "mlp.c_proj.weight": (width, 4 * width),
                block + "mlp.c_proj.bias": (width,),
                block + "ln_2.weight": (width,),
                block + "ln_2.bias": (width,),
            }
    return shapes


TINY = {
    "embed": 32,
    "resolution": (64, 32),
    "patch": 16,
    "vision_width": 64,
    "vision_layers": 2,
    "text_width": 48,
    "text_layers": 2,
    "context": 24,
}
"""The tiny model of `step.npz` and `towers.npz`: 4 x 2 patches; 2 vision heads, 3 text heads."""


def clip_weights(**shape_arguments) -> dict[str, np.ndarray]:
    """Returns a state dict of seeded arrays under OpenAI's names."""
    return {name: weight(name, shape) for name, shape in clip_shapes(**shape_arguments).items()}
