"""The training losses, one pure function each: tensors in, a 0-dim float32 tensor out.

N-ITC, R-ITC, C-ITC, SS-I and MVS-I are the names in the paper (Cao et al., "An Empirical Study of CLIP for Text-Based
Person Search", AAAI 2024).

B rows of this rank, G rows of all ranks (the columns), D width, M tokens picked for masked language modelling.
Features and logits are float32. A loss is the mean over this rank's rows; its mean over ranks is the mean over all G
samples. MLM and ID compare no samples, so they can be computed for parts of the rows: the results add up.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def matching_distribution(
    row_identities: Tensor, column_identities: Tensor, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Computes q̂ of N-ITC and R-ITC. It spreads each row evenly over the columns with the same identity.

    Args:
        row_identities: (B,) int64.
        column_identities: (G,) int64; every row's identity is among them.

    Returns: (B, G) of `dtype`.
    """
    matches = (row_identities[:, None] == column_identities[None, :]).to(dtype)
    return matches / matches.sum(dim=1, keepdim=True)


def pair_distribution(rows: int, columns: int, offset: int, like: Tensor) -> Tensor:
    """Returns the one-hot labels of ITC (CLIP, Radford et al., 2021): each row matches only its own pair.

    Args:
        rows, columns: B and G.
        offset: column of the first row's pair.
        like: tensor that specifies dtype and device.

    Returns: (B, G).
    """
    return torch.eye(columns, dtype=like.dtype, device=like.device)[offset : offset + rows]


def normalised_contrastive(
    logits: Tensor, targets: Tensor, soft_label_ratio: float, predicting: Tensor | None = None
) -> Tensor:
    """Computes N-ITC in one direction: the cross-entropy with q̂, softened by the model's own prediction.

    MVS-I is the mean of N-ITC over two views of the image.

    Args:
        logits: (B, G) scaled cosines.
        targets: (B, G) q̂ of `matching_distribution`.
        soft_label_ratio: α in [0, 1], weight of the model's own softmax, which passes no gradient.
        predicting: (B, G) the scaled cosines of that softmax, or None if they are `logits`.
    """
    prediction = (logits if predicting is None else predicting).detach().softmax(dim=1)
    labels = soft_label_ratio * prediction + (1 - soft_label_ratio) * targets
    return -(labels * logits.log_softmax(dim=1)).sum(dim=1).mean()


def reversed_contrastive(logits: Tensor, targets: Tensor, epsilon: float) -> Tensor:
    """Computes R-ITC in one direction: KL(softmax(logits) ‖ q̂ + ε).

    SDM of IRRA (Jiang & Ye, CVPR 2023) is the same with another scale and ε.

    Args:
        logits: (B, G) scaled cosines.
        targets: (B, G) q̂ of `matching_distribution`.
        epsilon: ε > 0, keeps the logarithm finite if a column does not match.
    """
    log_probabilities = logits.log_softmax(dim=1)
    divergence = log_probabilities.exp() * (log_probabilities - (targets + epsilon).log())
    return divergence.sum(dim=1).mean()


def cyclic_contrastive(images: Tensor, texts: Tensor, in_modal_weight: float, cross_modal_weight: float) -> Tensor:
    """Computes C-ITC: image-image and text-text similarities should agree, and image-text ones should be symmetric.

    The paper writes 1/N · Σ; here it is the mean over all G² entries, as in the published code.

    Args:
        images, texts: (G, D) L2-normalised features of all ranks.
        in_modal_weight: λ1, weight of mean((I·Iᵀ − T·Tᵀ)²).
        cross_modal_weight: λ2, weight of mean((I·Tᵀ − T·Iᵀ)²).
    """
    in_modal = (images @ images.T - texts @ texts.T).square().mean()
    cross = images @ texts.T
    cross_modal = (cross - cross.T).square().mean()
    return in_modal_weight * in_modal + cross_modal_weight * cross_modal


def nt_xent(
    first: Tensor, second: Tensor, all_first: Tensor, all_second: Tensor, offset: int, temperature: float
) -> Tensor:
    """Computes SS-I and SS-T: NT-Xent (SimCLR, Chen et al., 2020) between two views of the images or captions.

    The negatives are all other samples of both views on all ranks.

    Args:
        first, second: (B, D) L2-normalised features of this rank's two views.
        all_first, all_second: (G, D), these features of all ranks.
        offset: row of `all_first` at which this rank's rows begin.
        temperature: divides the cosines.

    Returns: 0-dim, mean of both directions.
    """
    partner = torch.arange(offset, offset + len(first), device=first.device)

    def direction(rows: Tensor, all_own: Tensor, all_other: Tensor) -> Tensor:
        own = rows @ all_own.T
        own = own.scatter(1, partner[:, None], -torch.inf)  # a sample is not its own negative
        logits = torch.cat([rows @ all_other.T, own], dim=1) / temperature
        return F.cross_entropy(logits, partner)

    return (direction(first, all_first, all_second) + direction(second, all_second, all_first)) / 2


def masked_language(logits: Tensor, labels: Tensor, picked: Tensor) -> Tensor:
    """Computes MLM: the cross-entropy of the picked tokens of some rows. The results of all parts of a batch add up.

    Args:
        logits: (M, vocabulary); labels: (M,) int64.
        picked: 0-dim float32, number of picked tokens in a rank's whole batch, as a mean over all ranks. Ranks pick
            different numbers. Dividing by the mean makes the mean over ranks the mean over all picked tokens.
    """
    return F.cross_entropy(logits, labels, reduction="sum") / picked.clamp(min=1)


def identity(image_logits: Tensor, text_logits: Tensor, identities: Tensor, rows: int) -> Tensor:
    """Computes ID: the mean cross-entropy of image and text for some rows. The results of all parts of a batch add up.

    Args:
        image_logits, text_logits: (n, identities), for n of the B rows.
        identities: (n,) int64.
        rows: B, the divisor of the sum over these rows.
    """
    image, text = (F.cross_entropy(logits, identities, reduction="sum") for logits in (image_logits, text_logits))
    return (image + text) / 2 / rows
