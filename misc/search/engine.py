"""What every search engine can do, and the exact one, which compares a query with every picture.

Q queries, N pictures, D width of the shared space, K results.
"""

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

BLOCK = 1 << 16
"""Pictures that are compared at once: their similarities to 64 queries take 17 MB."""


class Engine(Protocol):
    """Finds, for each query, the rows of the gallery that are most similar."""

    def search(self, queries: Tensor, count: int) -> list[tuple[Tensor, Tensor]]:
        """Scores (K,) float32, cosines, best first, and rows (K,) int64, for each of the queries (Q, D).

        K is `count`, or N if that is less; an engine that is not exact may find fewer.
        """

    def close(self) -> None:
        """Gives back what it holds."""


@dataclass(frozen=True)
class EngineChoice:
    """An engine by name, with what it is told.

    Attributes:
        name: `exact`, `faiss` or `qdrant`.
        address: of Qdrant: a URL, or a folder for its local mode.
        collection: of Qdrant.
    """

    name: str
    address: str | None = None
    collection: str | None = None

    @classmethod
    def of(cls, settings: dict[str, Any]) -> "EngineChoice":
        """What `index.json` says of the engine."""
        return cls(settings["name"], settings.get("address"), settings.get("collection"))


class Exact:
    """Compares each query with every feature.

    Args:
        features: (N, D) float32, L2-normalised.
    """

    def __init__(self, features: Tensor):
        self.features = features

    @torch.inference_mode()
    def search(self, queries: Tensor, count: int) -> list[tuple[Tensor, Tensor]]:
        """As `Engine.search`. Of equal results the lower row is first; which of equals are the last results is open."""
        best = torch.empty(len(queries), 0)
        rows = torch.empty(len(queries), 0, dtype=torch.int64)
        for start in range(0, len(self.features), BLOCK):
            block = queries @ self.features[start : start + BLOCK].T
            scores, found = block.topk(min(count, block.shape[1]), dim=1)
            best, rows = torch.cat([best, scores], dim=1), torch.cat([rows, found + start], dim=1)
            if best.shape[1] > count:
                best, kept = best.topk(count, dim=1)
                rows = rows.gather(1, kept)
        return [ordered(*pair) for pair in zip(best, rows, strict=True)]

    def close(self) -> None:
        """As `Engine.close`."""


def ordered(scores: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Best first; of equal scores the lower row."""
    rows, order = rows.sort()
    scores, best = scores[order].sort(descending=True, stable=True)
    return scores, rows[best]
