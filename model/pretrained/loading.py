"""Copies weights into a model. Position embeddings are resized, encoders must fit, and heads are copied if they fit."""

import torch
import torch.nn.functional as F
from torch import Tensor

from misc.errors import UserError
from model.pretrained.names import ADAPTATIONS, HEADS, to_ours
from model.pretrained.weights import Weights, square_grid
from model.tbps_clip import TBPSCLIP


def load_weights(model: TBPSCLIP, weights: Weights) -> list[str]:
    """Copies weights into a model of their architecture, in place.

    Encoders and temperature are copied completely. A training head is copied if the weights contain one of the same
    shape, otherwise it stays as it is.

    Args:
        model: a model with the architecture of the weights, but any resolution and text length.
        weights: result of `read_weights`.

    Returns: lines for the log: which position embeddings were resized, and which heads of a checkpoint did not fit.

    Raises UserError if the position embeddings cannot be resized; the model is unchanged then.
    """
    grid = model.image_encoder.grid
    text_length = len(model.text_encoder.positional_embedding)
    image, text = weights.state["visual.positional_embedding"], weights.state["positional_embedding"]
    try:
        resized = {
            "visual.positional_embedding": resize_image_position_embedding(image, grid, source=weights.grid),
            "positional_embedding": resize_text_position_embedding(text, text_length),
        }
    except UserError as error:
        raise UserError(f"{weights.name}: {error}") from error
    notes = []
    source = weights.grid or (grid if weights.patches == grid[0] * grid[1] else square_grid(weights.patches))
    if source is not None and source != grid:
        notes.append("image position embeddings resized from {} × {} to {} × {} patches".format(*source, *grid))
    if len(text) != text_length:
        notes.append(f"text position embeddings resized from {len(text)} to {text_length} tokens")

    own = model.state_dict()  # shares the memory of the model's parameters
    new = to_ours(weights.state | resized)
    for head in HEADS:
        wanted = {name: value for name, value in own.items() if name.startswith(head)}
        offered = {name: value for name, value in weights.heads.items() if name.startswith(head)}
        fits = _shapes(wanted) == _shapes(offered)
        new |= offered if fits else wanted
        if wanted and weights.heads and not fits:
            notes.append(f"{head.removesuffix('.')} is not loaded: {weights.name} contains none of its shape")
        if offered and not wanted and head in ADAPTATIONS:
            notes.append(
                f"warning: {head.removesuffix('.')} of {weights.name} is not used: model.adaptation has another value"
            )
    if _shapes(new) != _shapes(own):
        raise ValueError(f"{weights.name} has another architecture than the model")
    for name, value in own.items():
        value.copy_(new[name])
    return notes


def _shapes(tensors: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def resize_image_position_embedding(
    embedding: Tensor, grid: tuple[int, int], *, source: tuple[int, int] | None
) -> Tensor:
    """Resizes position embeddings bilinearly on the grid of patches. The row of the class token stays as it is.

    Args:
        embedding: (P + 1, D) float, the class token first, then the patches row by row.
        grid: (height, width) of the result in patches.
        source: (height, width) of `embedding` in patches. None if unknown: `grid` if that fits, else a square.

    Returns: (height * width + 1, D).

    Raises UserError if the P patches are not known to form a grid.
    """
    patches = len(embedding) - 1
    if source is None:
        source = grid if patches == grid[0] * grid[1] else square_grid(patches)
    if source is None:
        raise UserError(
            f"visual.positional_embedding {tuple(embedding.shape)} is for {patches} patches, which form no square grid "
            f"and are not the {grid[0]} × {grid[1]} of the model: set experiment.input_resolution to the resolution "
            "of these weights"
        )
    if source == grid:
        return embedding
    image = embedding[1:].T.reshape(1, -1, *source)  # (1, D, height, width)
    image = F.interpolate(image, size=grid, mode="bilinear", align_corners=False)
    return torch.cat([embedding[:1], image[0].flatten(1).T])


def resize_text_position_embedding(embedding: Tensor, length: int) -> Tensor:
    """Resizes position embeddings linearly. The first and the last row stay as they are.

    Args:
        embedding: (L, D) float.
        length: number of tokens of the result.

    Returns: (length, D).

    Raises UserError if there is no row between the first and the last, before or after resizing.
    """
    if len(embedding) == length:
        return embedding
    if min(len(embedding), length) < 3:
        raise UserError(
            f"positional_embedding {tuple(embedding.shape)} cannot be resized to {length} tokens; both need 3 or more: "
            f"set experiment.text_length={len(embedding)}"
        )
    between = F.interpolate(embedding[1:-1].T[None], size=length - 2, mode="linear", align_corners=False)
    return torch.cat([embedding[:1], between[0].T, embedding[-1:]])
