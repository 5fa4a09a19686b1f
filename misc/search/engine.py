"""The interface of a search engine, and exact search, which compares a query with every picture.

Q queries, N pictures, D width of the shared space, K results.
"""

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

NAMES = ("exact", "faiss", "qdrant")
BLOCK = 1 << 16
"""Pictures that are compared at a time: their similarities to 64 queries take 17 MB."""


class Engine(Protocol):
    """Finds the rows of the gallery that are most similar to each query."""

    def search(self, queries: Tensor, count: int) -> list[tuple[Tensor, Tensor]]:
        """Searches for each of the queries (Q, D).

        Returns: for each query, scores (K,) float32 and rows (K,) int64. Scores are cosines, best first. K is `count`,
            or N if that is less; an engine that is not exact may find fewer.
        """

    def close(self) -> None:
        """Releases files and connections."""


@dataclass(frozen=True)
class EngineChoice:
    """The engine that the user chose, with its settings.

    Attributes:
        name: `exact`, `faiss` or `qdrant`.
        address: address of Qdrant: a URL, or a folder for the client's local mode.
        collection: name of the Qdrant collection.
    """

    name: str
    address: str | None = None
    collection: str | None = None

    @staticmethod
    def valid(settings: Any) -> bool:
        """Returns whether settings, which may be damaged, are those that `index.json` records for an engine."""
        if not isinstance(settings, dict) or settings.get("name") not in NAMES:
            return False
        needed = ("address", "collection") if settings["name"] == "qdrant" else ()
        return all(isinstance(settings.get(key), str) for key in needed)

    @classmethod
    def of(cls, settings: dict[str, Any]) -> "EngineChoice":
        """Returns the engine that `index.json` records."""
        return cls(settings["name"], settings.get("address"), settings.get("collection"))


class Exact:
    """Exact search: compares each query with every feature.

    Args:
        features: (N, D) float32, L2-normalised.
    """

    def __init__(self, features: Tensor):
        self.features = features

    @torch.inference_mode()
    def search(self, queries: Tensor, count: int) -> list[tuple[Tensor, Tensor]]:
        """See `Engine.search`.

        Results with equal scores are in the order of their rows. If more results share the last score than there is
        room for, it is not defined which of them are returned.
        """
        best = torch.empty(len(queries), 0)
        rows = torch.empty(len(queries), 0, dtype=torch.int64)
        for start in range(0, len(self.features), BLOCK):
            block = queries @ self.features[start : start + BLOCK].T
            scores, found = block.topk(min(count, block.shape[1]), dim=1)
            best, rows = torch.cat([best, scores], dim=1), torch.cat([rows, found + start], dim=1)
            if best.shape[1] > count:
                best, positions = best.topk(count, dim=1)
                rows = rows.gather(1, positions)
        return [ordered(*pair) for pair in zip(best, rows, strict=True)]

    def close(self) -> None:
        """See `Engine.close`; there is nothing to release."""


def ordered(scores: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Sorts results by score, best first; of equal scores, the lower row comes first."""
    rows, order = rows.sort()
    scores, best = scores[order].sort(descending=True, stable=True)
    return scores, rows[best]
