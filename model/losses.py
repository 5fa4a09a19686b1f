"""The training losses, one pure function per equation of the paper (SPEC section 5): tensors in, a scalar out.

B rows of this rank, G rows of all ranks (the columns), D width, M tokens picked for masked language modelling.
All inputs are float32. A loss is a mean over this rank's rows; the mean over ranks is the mean over all G samples.
MLM and ID compare no samples with each other, so they are sums over any part of the rows, divided by their number.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def matching_distribution(
    row_identities: Tensor, column_identities: Tensor, dtype: torch.dtype = torch.float32
) -> Tensor:
    """q̂: which columns show the person of a row, each row summing to one.

    Args:
        row_identities: (B,) int64.
        column_identities: (G,) int64; every row's identity is among them.

    Returns: (B, G) of `dtype`.
    """
    matches = (row_identities[:, None] == column_identities[None, :]).to(dtype)
    return matches / matches.sum(dim=1, keepdim=True)


def pair_distribution(rows: int, columns: int, offset: int, like: Tensor) -> Tensor:
    """One-hot labels of ITC: a row's own pair alone matches.

    Args:
        rows, columns: B and G.
        offset: column of the first row's pair.
        like: whose dtype and device are taken.

    Returns: (B, G).
    """
    return torch.eye(columns, dtype=like.dtype, device=like.device)[offset : offset + rows]


def normalised_contrastive(logits: Tensor, targets: Tensor, soft_label_ratio: float) -> Tensor:
    """N-ITC in one direction: cross-entropy against the matching distribution, softened by the model's own belief.

    Args:
        logits: (B, G) scaled cosines.
        targets: (B, G) q̂ of `matching_distribution`.
        soft_label_ratio: α, weight in [0, 1] of the model's own softmax, which carries no gradient.
    """
    belief = logits.detach().softmax(dim=1)
    labels = soft_label_ratio * belief + (1 - soft_label_ratio) * targets
    return -(labels * logits.log_softmax(dim=1)).sum(dim=1).mean()


def reversed_contrastive(logits: Tensor, targets: Tensor, epsilon: float) -> Tensor:
    """R-ITC in one direction: KL(softmax(logits) ‖ q̂ + ε). IRRA's SDM is the same with another scale and ε.

    Args:
        logits: (B, G) scaled cosines.
        targets: (B, G) q̂ of `matching_distribution`.
        epsilon: ε > 0, keeps the logarithm finite where a column does not match.
    """
    log_probabilities = logits.log_softmax(dim=1)
    divergence = log_probabilities.exp() * (log_probabilities - (targets + epsilon).log())
    return divergence.sum(dim=1).mean()


def cyclic_contrastive(images: Tensor, texts: Tensor, in_modal_weight: float, cross_modal_weight: float) -> Tensor:
    """C-ITC: the two modalities' geometries agree, and the image-text similarities are symmetric.

    The paper writes 1/N · Σ; the mean over all G² entries counts.

    Args:
        images, texts: (G, D) L2-normalised features of all ranks.
        in_modal_weight: λ1, of mean((I·Iᵀ − T·Tᵀ)²).
        cross_modal_weight: λ2, of mean((I·Tᵀ − T·Iᵀ)²).
    """
    in_modal = (images @ images.T - texts @ texts.T).square().mean()
    cross = images @ texts.T
    cross_modal = (cross - cross.T).square().mean()
    return in_modal_weight * in_modal + cross_modal_weight * cross_modal


def nt_xent(first: Tensor, second: Tensor, all_first: Tensor, all_second: Tensor, offset: int, temperature: float):
    """SS-I, SS-T: NT-Xent (SimCLR) between two views; the negatives are all other samples of both views on all ranks.

    Args:
        first, second: (B, D) L2-normalised features of this rank's two views.
        all_first, all_second: (G, D) the same of all ranks.
        offset: row of `all_first` at which this rank's rows begin.
        temperature: divides the cosines.

    Returns: scalar, mean of both directions.
    """
    partner = torch.arange(offset, offset + len(first), device=first.device)

    def direction(rows: Tensor, all_own: Tensor, all_other: Tensor) -> Tensor:
        own = rows @ all_own.T
        own = own.scatter(1, partner[:, None], -torch.inf)  # a sample is not its own negative
        logits = torch.cat([rows @ all_other.T, own], dim=1) / temperature
        return F.cross_entropy(logits, partner)

    return (direction(first, all_first, all_second) + direction(second, all_second, all_first)) / 2


def masked_language(logits: Tensor, labels: Tensor, picked: Tensor) -> Tensor:
    """MLM: cross-entropy over the picked tokens of some rows; those of all parts of a batch add up.

    Args:
        logits: (M, vocabulary); labels: (M,) int64.
        picked: 0-dim, picked tokens of a rank's whole batch, on average over all ranks. Ranks pick different numbers;
            dividing by their mean keeps the mean over ranks equal to the mean over all picked tokens.
    """
    return F.cross_entropy(logits, labels, reduction="sum") / picked.clamp(min=1)


def identity(image_logits: Tensor, text_logits: Tensor, identities: Tensor, rows: int) -> Tensor:
    """ID: mean of the cross-entropies of image and text over some rows; those of all parts of a batch add up.

    Args:
        image_logits, text_logits: (n, identities), identities: (n,) int64, n of the B rows.
        rows: B, which the sum over these rows is divided by.
    """
    image, text = (F.cross_entropy(logits, identities, reduction="sum") for logits in (image_logits, text_logits))
    return (image + text) / 2 / rows
