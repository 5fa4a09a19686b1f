"""R@k, mAP and mINP of text-to-image retrieval from similarities, in bounded memory.

Q queries, N gallery images.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from misc.errors import UserError

MAXIMUM_BLOCK = 1 << 23
"""Maximum number of similarities in memory. With their intermediate results they take about 0.1 GB."""


NORM_TOLERANCE = 0.01
"""Largest deviation of the norm of an L2-normalised feature from 1."""


@dataclass(frozen=True)
class QueryResults:
    """The results of each query.

    Attributes:
        first_match: (Q,) int64, rank of the first match, counted from 1; 0 if the person is not in the gallery.
        average_precision: (Q,) float64 in [0, 1].
        inverse_negative_penalty: (Q,) float64 in [0, 1].
    """

    first_match: Tensor
    average_precision: Tensor
    inverse_negative_penalty: Tensor


def check_features(features: Tensor, names: Sequence[str], remedy: str = "use other weights") -> None:
    """Checks that features (B, D) are L2-normalised, so that their cosines are numbers from -1 to 1.

    Args:
        names: what each feature describes, for the message.
        remedy: what the user can do, for the message.

    Raises UserError if a feature contains NaN or infinity, or is zero because its norm has overflowed.
    """
    valid = (features.norm(dim=1) - 1).abs() < NORM_TOLERANCE  # False for NaN
    if not valid.all():
        raise UserError(
            f"{names[int(valid.int().argmin())]} has an invalid feature (NaN, infinite or zero): its values are "
            f"too large for its number format, or the weights are damaged: {remedy}"
        )


def rank_queries(
    queries: Tensor, gallery: Tensor, query_identities: Tensor, gallery_identities: Tensor
) -> QueryResults:
    """Ranks the gallery for each query by cosine similarity. The memory does not grow with Q · N.

    Args:
        queries: (Q, D) and gallery: (N, D), L2-normalised.
        query_identities: (Q,) and gallery_identities: (N,) int64.
    """
    rows = max(1, MAXIMUM_BLOCK // max(1, len(gallery)))
    blocks = [
        rank_similarities(block @ gallery.T, identities, gallery_identities)
        for block, identities in zip(queries.split(rows), query_identities.split(rows), strict=True)
    ]
    return QueryResults(
        torch.cat([block.first_match for block in blocks]),
        torch.cat([block.average_precision for block in blocks]),
        torch.cat([block.inverse_negative_penalty for block in blocks]),
    )


def rank_similarities(similarity: Tensor, query_identities: Tensor, gallery_identities: Tensor) -> QueryResults:
    """Ranks the gallery for each query by a (Q, N) similarity matrix. Among equal similarities, the first image wins.

    Only the similarities are sorted, without the numbers of their images. The metrics depend only on the ranks of the
    matches, which are looked up in the sorted similarities.
    """
    queries, gallery = similarity.shape
    query, image = (gallery_identities == query_identities[:, None]).nonzero(as_tuple=True)  # the M matches, by query
    matches = query.bincount(minlength=queries)  # per query
    end = matches.cumsum(dim=0)
    ranks = _ranks(similarity, query, image)
    ranks = ranks[(query * (gallery + 1) + ranks).argsort()]  # best first within each query

    found = torch.arange(1, len(query) + 1, device=query.device) - (end - matches)[query]
    precision = torch.zeros(queries, dtype=torch.float64, device=query.device)
    precision.index_add_(0, query, found.double() / ranks)
    # A query without a match counts as a miss with AP 0 and INP 0; the values looked up for it are not used.
    ranks = torch.cat([ranks, ranks.new_ones(1)])
    matched = matches > 0
    return QueryResults(
        first_match=torch.where(matched, ranks[end - matches], 0),
        average_precision=precision / matches.clamp(min=1),
        inverse_negative_penalty=torch.where(matched, matches.double() / ranks[end - 1], 0.0),
    )


def _ranks(similarity: Tensor, query: Tensor, image: Tensor) -> Tensor:
    """Returns the ranks of M matches, counted from 1.

    Args:
        similarity: (Q, N).
        query: (M,) the query of each match, in ascending order.
        image: (M,) the gallery image of each match.
    """
    gallery = similarity.shape[1]
    matches = query.bincount(minlength=len(similarity))  # per query
    column = torch.arange(len(query), device=query.device) - (matches.cumsum(dim=0) - matches)[query]
    own = similarity.new_zeros(len(similarity), int(matches.amax()) if len(matches) else 0)
    own[query, column] = similarity[query, image]
    ascending = _sorted(similarity)
    assert not ascending[:, -1:].isnan().any(), "a similarity is NaN"  # NaN is sorted to the end
    below, not_above = (torch.searchsorted(ascending, own, right=right)[query, column] for right in (False, True))
    ranks = 1 + gallery - not_above
    tied = (not_above - below > 1).nonzero()[:, 0]  # rare, so a loop is fast enough
    for match in tied.tolist():
        equals = similarity[query[match], : image[match]] == similarity[query[match], image[match]]
        ranks[match] += equals.sum()
    return ranks


def _sorted(similarity: Tensor) -> Tensor:
    """Sorts each row in ascending order."""
    if similarity.device.type != "cpu":
        return similarity.sort(dim=1).values
    # On a CPU, numpy is several times faster than torch, which also sorts the indices.
    return torch.from_numpy(np.sort(similarity.numpy(), axis=1))


def summarise(results: QueryResults) -> dict[str, float]:
    """Returns the means over queries in percent: `r1`, `r5`, `r10`, `mAP`, `mINP`."""
    first = results.first_match
    recall = {f"r{k}": _percent((first > 0) & (first <= k)) for k in (1, 5, 10)}
    return recall | {"mAP": _percent(results.average_precision), "mINP": _percent(results.inverse_negative_penalty)}


def queries_without_match(results: QueryResults) -> int:
    """Returns the number of queries whose person is not in the gallery."""
    return int((results.first_match == 0).sum())


def _percent(values: Tensor) -> float:
    return 100 * values.double().mean().item()
