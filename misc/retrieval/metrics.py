"""R@k, mAP and mINP of text-to-image retrieval from similarities (SPEC section 1), in bounded memory.

Q queries, N gallery images.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

MAXIMUM_BLOCK = 1 << 23
"""Similarities that are held at once: with what is made of them, about a tenth of a gigabyte."""


@dataclass(frozen=True)
class QueryResults:
    """What each query retrieved.

    Attributes:
        first_match: (Q,) int64, rank of the first match from 1; 0 where the gallery does not show the person.
        average_precision: (Q,) float64 in [0, 1].
        inverse_negative_penalty: (Q,) float64 in [0, 1].
    """

    first_match: Tensor
    average_precision: Tensor
    inverse_negative_penalty: Tensor


def rank_queries(
    queries: Tensor, gallery: Tensor, query_identities: Tensor, gallery_identities: Tensor
) -> QueryResults:
    """Ranks the gallery for each query by cosine similarity; memory does not grow with Q · N.

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
    """The same from a (Q, N) similarity matrix. Of equal similarities the one earlier in the gallery ranks first.

    The similarities alone are sorted, without the images that they belong to: where a match stands among them is looked
    up, and all other images have no part in the measures.
    """
    queries, gallery = similarity.shape
    query, image = (gallery_identities == query_identities[:, None]).nonzero(as_tuple=True)  # the M matches, by query
    number = query.bincount(minlength=queries)
    last = number.cumsum(dim=0)
    ranks = _ranks(similarity, query, image)
    ranks = ranks[(query * (gallery + 1) + ranks).argsort()]  # best first within each query, whose place stays

    found = torch.arange(1, len(query) + 1, device=query.device) - (last - number)[query]
    precision = torch.zeros(queries, dtype=torch.float64, device=query.device)
    precision.index_add_(0, query, found.double() / ranks)
    # A query without a match counts as a miss with AP 0 and INP 0; what is looked up for it is never used.
    ranks = torch.cat([ranks, ranks.new_ones(1)])
    matched = number > 0
    return QueryResults(
        first_match=torch.where(matched, ranks[last - number], 0),
        average_precision=precision / number.clamp(min=1),
        inverse_negative_penalty=torch.where(matched, number.double() / ranks[last - 1], 0.0),
    )


def _ranks(similarity: Tensor, query: Tensor, image: Tensor) -> Tensor:
    """Ranks from 1 of M images, each among the (Q, N) similarities of its query; `query` (M,) is in ascending order."""
    gallery = similarity.shape[1]
    number = query.bincount(minlength=len(similarity))
    column = torch.arange(len(query), device=query.device) - (number.cumsum(dim=0) - number)[query]
    own = similarity.new_zeros(len(similarity), int(number.amax()) if len(number) else 0)
    own[query, column] = similarity[query, image]
    ascending = _sorted(similarity)
    below, not_above = (torch.searchsorted(ascending, own, right=right)[query, column] for right in (False, True))
    ranks = 1 + gallery - not_above
    tied = (not_above - below > 1).nonzero()[:, 0]  # rare, so one by one
    for match in tied.tolist():
        equals = similarity[query[match], : image[match]] == similarity[query[match], image[match]]
        ranks[match] += equals.sum()
    return ranks


def _sorted(similarity: Tensor) -> Tensor:
    """Each row in ascending order."""
    if similarity.device.type != "cpu":
        return similarity.sort(dim=1).values
    # On a CPU, numpy sorts numbers several times as fast as torch, which sorts their places as well.
    return torch.from_numpy(np.sort(similarity.numpy(), axis=1))


def summarise(results: QueryResults) -> dict[str, float]:
    """Means over queries in percent: `r1`, `r5`, `r10`, `mAP`, `mINP`."""
    first = results.first_match
    recall = {f"r{k}": _percent((first > 0) & (first <= k)) for k in (1, 5, 10)}
    return recall | {"mAP": _percent(results.average_precision), "mINP": _percent(results.inverse_negative_penalty)}


def queries_without_match(results: QueryResults) -> int:
    """Number of queries whose person is not in the gallery."""
    return int((results.first_match == 0).sum())


def _percent(values: Tensor) -> float:
    return 100 * values.double().mean().item()
