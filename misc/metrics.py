"""R@k, mAP and mINP of text-to-image retrieval from similarities (SPEC section 1), in bounded memory.

Q queries, N gallery images.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

MAXIMUM_BLOCK = 1 << 24
"""Similarities held at once: with their order and the counts along it, about half a gigabyte."""


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
    """The same from a (Q, N) similarity matrix. Of equal similarities the one earlier in the gallery ranks first."""
    order = similarity.argsort(dim=1, descending=True, stable=True)
    matches = gallery_identities[order] == query_identities[:, None]  # (Q, N), best first
    ranks = torch.arange(1, matches.shape[1] + 1, device=matches.device)
    found = matches.cumsum(dim=1)
    number = matches.sum(dim=1)
    precision_at_matches = torch.where(matches, found.double() / ranks, 0.0).sum(dim=1)
    last_match = torch.where(matches, ranks, 0).amax(dim=1)
    # A query without a match counts as a miss with AP 0 and INP 0; the clamps only keep 0 / 0 away.
    return QueryResults(
        first_match=torch.where(number > 0, matches.int().argmax(dim=1) + 1, 0),
        average_precision=precision_at_matches / number.clamp(min=1),
        inverse_negative_penalty=number.double() / last_match.clamp(min=1),
    )


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
