"""Reads the sizes of a CLIP from the shapes of its tensors, and checks all shapes."""

import re

import torch

from misc.errors import UserError, first_of
from model.architecture import Architecture, Sizes
from model.pretrained.names import from_ours
from model.tbps_clip import TBPSCLIP
from text_utils.tokenizer import VOCABULARY_SIZE

Shapes = dict[str, tuple[int, ...]]

# For each size, the tensors and dimensions that have it.
DIMENSIONS = {
    "patch_size": (("visual.conv1.weight", 2), ("visual.conv1.weight", 3)),
    "vision_width": (("visual.conv1.weight", 0), ("visual.proj", 0), ("visual.positional_embedding", 1)),
    "text_width": (("token_embedding.weight", 1), ("text_projection", 0), ("positional_embedding", 1)),
    "embed_dim": (("visual.proj", 1), ("text_projection", 1)),
    "vocab_size": (("token_embedding.weight", 0),),
}
LAYERS = {
    "vision_layers": re.compile(r"visual\.transformer\.resblocks\.(\d{1,4})\."),
    "text_layers": re.compile(r"transformer\.resblocks\.(\d{1,4})\."),
}
ONLY_CLIP = ": use the weights of a CLIP with a vision transformer and CLIP's own text encoder and vocabulary"

# The tensors do not show the number of heads. In CLIP a head has 64 channels, but 80 in ViT-H/14, which has this width.
_WIDTH_OF_H14 = 1280


def read_sizes(shapes: Shapes) -> Sizes:
    """Returns the sizes of the encoders.

    Args:
        shapes: shapes of the tensors, by OpenAI's names.

    Raises UserError, without the path, if a tensor is missing, unknown or of the wrong shape, or contradicts another.
    """
    if empty := [f"{name} is {shape}" for name, shape in shapes.items() if 0 in shape]:
        raise UserError(f"{first_of(empty)}, so the tensor is empty and the file damaged: get it again")
    sizes = Sizes(**_read_dimensions(shapes), **{key: _count_layers(shapes, key) for key in LAYERS})
    if sizes.vocab_size != VOCABULARY_SIZE:
        raise UserError(
            f"its vocabulary has {sizes.vocab_size} tokens (token_embedding.weight), CLIP's has {VOCABULARY_SIZE}"
            + ONLY_CLIP
        )
    shortest = {"visual.positional_embedding": 2, "positional_embedding": 3}  # class and a patch; start, a word, end
    if short := [f"{name} is {shapes[name]}" for name, least in shortest.items() if shapes[name][0] < least]:
        raise UserError(f"{first_of(short)}, too few positions for an image or a caption" + ONLY_CLIP)
    if problems := shape_problems(shapes, _expected_shapes(sizes, shapes)):
        raise UserError(f"{first_of(problems)}" + ONLY_CLIP)
    return sizes


def _read_dimensions(shapes: Shapes) -> dict[str, int]:
    """Reads the sizes in `DIMENSIONS`."""
    dimensions: dict[str, int] = {}
    for places in DIMENSIONS.values():
        for name, dim in places:
            dimensions[name] = max(dimensions.get(name, 0), dim + 1)
    if missing := [name for name in dimensions if name not in shapes]:
        raise UserError(f"{first_of(missing)} missing" + ONLY_CLIP)
    if misshapen := [f"{name} is {shapes[name]}" for name in dimensions if len(shapes[name]) != dimensions[name]]:
        raise UserError(f"{first_of(misshapen)}, which is another number of dimensions than in CLIP" + ONLY_CLIP)
    sizes = {}
    for key, places in DIMENSIONS.items():
        values = {shapes[name][dim] for name, dim in places}
        if len(values) > 1:
            problem = (
                "the two encoders end in different widths" if key == "embed_dim" else f"tensors disagree on the {key}"
            )
            found = ", ".join(dict.fromkeys(f"{name} {shapes[name]}" for name, _ in places))
            raise UserError(f"{problem} ({found}), so the file mixes models or is damaged: get it again")
        sizes[key] = values.pop()
    return sizes


def _count_layers(shapes: Shapes, key: str) -> int:
    numbers = {int(block[1]) for name in shapes if (block := LAYERS[key].match(name))}
    absent = sorted(set(range(len(numbers))) - numbers)
    if absent or not numbers:
        raise UserError(f"{key}: block {absent[0] if absent else 0} is missing" + ONLY_CLIP)
    return len(numbers)


def _expected_shapes(sizes: Sizes, shapes: Shapes) -> Shapes:
    """Returns the shapes of a model of these sizes. Its position embeddings have the lengths in `shapes`."""
    with torch.device("meta"):
        architecture = Architecture(
            resolution=(sizes.patch_size, sizes.patch_size * (shapes["visual.positional_embedding"][0] - 1)),
            text_length=shapes["positional_embedding"][0],
            vision_heads=1,  # the shapes do not show heads
            text_heads=1,
            **sizes._asdict(),
        )
        model = TBPSCLIP(architecture)
    return {name: tuple(tensor.shape) for name, tensor in from_ours(model.state_dict()).items()}


def shape_problems(found: Shapes, expected: Shapes) -> list[str]:
    """Describes the tensors that have a wrong shape, are missing or are unknown."""
    misshapen = [
        f"{name} is {found[name]} and should be {shape}"
        for name, shape in expected.items()
        if name in found and found[name] != shape
    ]
    missing = [f"{name} is missing" for name in expected if name not in found]
    return misshapen + missing + [f"{name} is unknown" for name in found if name not in expected]


def usual_heads(width: int) -> int:
    """Returns the number of attention heads of a CLIP encoder of this width."""
    return max(1, width // (80 if width == _WIDTH_OF_H14 else 64))
