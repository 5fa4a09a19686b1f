"""Weights into the model: position embeddings are resized, towers must fit, heads may."""

import torch
import torch.nn.functional as F
from torch import Tensor

from misc.errors import UserError
from model.pretrained.names import ADAPTATIONS, HEADS, to_ours
from model.pretrained.weights import Weights, square_grid
from model.tbps_clip import TBPSCLIP


def load_weights(model: TBPSCLIP, weights: Weights) -> list[str]:
    """Puts weights into a model of their architecture, in place; all or nothing.

    Towers and temperature are filled whole. A training head is filled where the weights hold one of its shape; another
    one stays as it is.

    Args:
        model: of any resolution and text length.
        weights: as read.

    Returns: lines for the log: what was resized, and which heads of a checkpoint did not fit.
    Raises: UserError, with the model unchanged, where the position embeddings cannot be resized.
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
    if source != grid:
        notes.append("image position embeddings resized from {} × {} to {} × {} patches".format(*source, *grid))
    if len(text) != text_length:
        notes.append(f"text position embeddings resized from {len(text)} to {text_length} tokens")

    own = model.state_dict()  # these share the memory of the model's parameters
    new = to_ours(weights.state | resized)
    for head in HEADS:
        wanted = {name: value for name, value in own.items() if name.startswith(head)}
        offered = {name: value for name, value in weights.heads.items() if name.startswith(head)}
        fits = _shapes(wanted) == _shapes(offered)
        new |= offered if fits else wanted
        if wanted and weights.heads and not fits:
            notes.append(f"{head.removesuffix('.')} starts afresh: {weights.name} holds none of its shape")
        if offered and not wanted and head in ADAPTATIONS:
            notes.append(
                f"warning: {head.removesuffix('.')} of {weights.name} is left out: model.adaptation is another"
            )
    if _shapes(new) != _shapes(own):
        raise ValueError(f"{weights.name} is of another architecture than the model")
    for name, value in own.items():
        value.copy_(new[name])
    return notes


def _shapes(tensors: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def resize_image_position_embedding(
    embedding: Tensor, grid: tuple[int, int], *, source: tuple[int, int] | None
) -> Tensor:
    """Bilinear resizing on the grid of patches; the class token's row is kept.

    Args:
        embedding: (P + 1, D) float, the class token first, then the patches row by row.
        grid: (height, width) wanted, in patches.
        source: that of the embedding; None where nothing tells: it is `grid` if that fits, else a square.

    Returns: (height * width + 1, D).
    Raises: UserError if the P patches are not known to form a grid.
    """
    patches = len(embedding) - 1
    if source is None:
        source = grid if patches == grid[0] * grid[1] else square_grid(patches)
    if source is None:
        raise UserError(
            f"visual.positional_embedding {tuple(embedding.shape)} is for {patches} patches, which form no square grid "
            f"and are not the {grid[0]} × {grid[1]} of the model; set experiment.input_resolution to that of these "
            "weights"
        )
    if source == grid:
        return embedding
    image = embedding[1:].T.reshape(1, -1, *source)  # (1, D, height, width)
    image = F.interpolate(image, size=grid, mode="bilinear", align_corners=False)
    return torch.cat([embedding[:1], image[0].flatten(1).T])


def resize_text_position_embedding(embedding: Tensor, length: int) -> Tensor:
    """Linear resizing of what lies between the first and the last row; these two are kept.

    Args:
        embedding: (L, D) float.
        length: tokens wanted.

    Returns: (length, D).
    Raises: UserError if there is nothing between first and last to resize from or to.
    """
    if len(embedding) == length:
        return embedding
    if min(len(embedding), length) < 3:
        raise UserError(
            f"positional_embedding {tuple(embedding.shape)} cannot be resized to {length} tokens, both need 3 or more; "
            f"set experiment.text_length={len(embedding)}"
        )
    between = F.interpolate(embedding[1:-1].T[None], size=length - 2, mode="linear", align_corners=False)
    return torch.cat([embedding[:1], between[0].T, embedding[-1:]])
