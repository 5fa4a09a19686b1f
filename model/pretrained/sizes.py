"""The sizes of a CLIP, read from its tensors and checked against all of them."""

import re

import torch

from misc.errors import UserError, first_of
from model.architecture import Architecture
from model.pretrained.names import from_ours
from model.tbps_clip import TBPSCLIP
from text_utils.tokenizer import VOCABULARY_SIZE

Shapes = dict[str, tuple[int, ...]]

# The dimensions of OpenAI's tensors that each size of the configuration's section `model` decides.
SIZES = {
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
NO_CLIP = "; only CLIP with a vision transformer and CLIP's own text encoder and vocabulary can be used"

# Heads leave no trace in the tensors: in CLIP each has 64 channels. In ViT-H/14, whose width this is, it has 80.
_WIDTH_OF_H14 = 1280


def read_sizes(shapes: Shapes) -> dict[str, int]:
    """Sizes of the towers, named as in the configuration's section `model`; all tensors agree with them.

    Args:
        shapes: of tensors under OpenAI's names.

    Raises: UserError, without the path, for tensors that are missing, unknown, misshapen or contradict each other.
    """
    if empty := [f"{name} is {shape}" for name, shape in shapes.items() if 0 in shape]:
        raise UserError(f"{first_of(empty)}, which holds nothing; the file is damaged")
    sizes = _witnessed_sizes(shapes) | {key: _count_layers(shapes, key) for key in LAYERS}
    if sizes["vocab_size"] != VOCABULARY_SIZE:
        raise UserError(
            f"its vocabulary has {sizes['vocab_size']} tokens (token_embedding.weight), CLIP's has {VOCABULARY_SIZE}"
            + NO_CLIP
        )
    shortest = {"visual.positional_embedding": 2, "positional_embedding": 3}  # class and a patch; start, a word, end
    if short := [f"{name} is {shapes[name]}" for name, least in shortest.items() if shapes[name][0] < least]:
        raise UserError(f"{first_of(short)}, too few positions for an image or a caption" + NO_CLIP)
    if problems := misfits(shapes, _expected_shapes(sizes, shapes)):
        raise UserError(f"{first_of(problems)}" + NO_CLIP)
    return sizes


def _witnessed_sizes(shapes: Shapes) -> dict[str, int]:
    dimensions = {name: 1 + max(dim for w in SIZES.values() for n, dim in w if n == name) for name in _witnesses()}
    if missing := [name for name in dimensions if name not in shapes]:
        raise UserError(f"{first_of(missing)} missing" + NO_CLIP)
    if misshapen := [f"{name} is {shapes[name]}" for name in dimensions if len(shapes[name]) != dimensions[name]]:
        raise UserError(f"{first_of(misshapen)}, which is another number of dimensions than CLIP's" + NO_CLIP)
    sizes = {}
    for key, witnesses in SIZES.items():
        recorded = {shapes[name][dim] for name, dim in witnesses}
        if len(recorded) > 1:
            what = "the two towers end in different widths" if key == "embed_dim" else f"tensors disagree on the {key}"
            found = ", ".join(dict.fromkeys(f"{name} {shapes[name]}" for name, _ in witnesses))
            raise UserError(f"{what}: {found}; the file mixes models or is damaged")
        sizes[key] = recorded.pop()
    return sizes


def _witnesses() -> list[str]:
    return list(dict.fromkeys(name for witnesses in SIZES.values() for name, _ in witnesses))


def _count_layers(shapes: Shapes, key: str) -> int:
    numbers = {int(block[1]) for name in shapes if (block := LAYERS[key].match(name))}
    absent = sorted(set(range(len(numbers))) - numbers)
    if absent or not numbers:
        raise UserError(f"{key}: block {absent[0] if absent else 0} is missing" + NO_CLIP)
    return len(numbers)


def _expected_shapes(sizes: dict[str, int], shapes: Shapes) -> Shapes:
    """The shapes of a model of these sizes, position embeddings as long as those that were found."""
    with torch.device("meta"):
        architecture = Architecture(
            resolution=(sizes["patch_size"], sizes["patch_size"] * (shapes["visual.positional_embedding"][0] - 1)),
            text_length=shapes["positional_embedding"][0],
            vision_heads=1,  # the shapes do not show heads
            text_heads=1,
            **sizes,
        )
        model = TBPSCLIP(architecture)
    return {name: tuple(tensor.shape) for name, tensor in from_ours(model.state_dict()).items()}


def misfits(found: Shapes, wanted: Shapes) -> list[str]:
    """What is wrong with the shapes found, by name: misshapen, missing and unknown tensors, in words."""
    misshapen = [
        f"{name} is {found[name]} and should be {shape}"
        for name, shape in wanted.items()
        if name in found and found[name] != shape
    ]
    missing = [f"{name} is missing" for name in wanted if name not in found]
    return misshapen + missing + [f"{name} is unknown" for name in found if name not in wanted]


def usual_heads(width: int) -> int:
    """How many attention heads a tower of CLIP has at this width."""
    return max(1, width // (80 if width == _WIDTH_OF_H14 else 64))
