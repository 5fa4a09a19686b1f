"""Search beyond a million pictures, with faiss: inverted lists of features in eight bits a number, then exact scores.

The features are clustered, and a query is compared with those of the nearest clusters alone. What is found so is
compared again with the features themselves, so scores are exact, and a picture is missed only if nobody looked at it.

Q queries, N pictures, D width of the shared space.
"""

from pathlib import Path
from typing import Any

import faiss
import numpy as np
import torch
from torch import Tensor

from misc.errors import UserError
from misc.files import atomic_file
from misc.search.engine import Exact, ordered
from misc.search.gallery import ROWS_AT_ONCE, Gallery

PROBED = 1 / 8
"""Share of the clusters that a query is compared with. README has what other shares find of a million."""
FEWEST_PROBED = 32
CANDIDATES = 4
"""Times as many as are wanted are compared again."""
FEWEST_FOR_A_CLUSTER = 39
"""Below, faiss warns that clusters mean little."""
CHECKED_QUERIES, CHECKED_RESULTS = 100, 10


def build(gallery: Gallery) -> tuple[dict[str, Any], list[str]]:
    """Builds the lists beside the features, and measures how much they find of what exact search finds."""
    if _file(gallery).exists():  # it is whole, and of these features
        return {"name": "faiss"}, []
    lists = faiss.serialize_index(build_lists(gallery.features))  # faiss itself has no words for a full disk
    with atomic_file(_file(gallery)) as file:
        file.write(lists)
    del lists
    recall = measured_recall(gallery.features, Approximate(gallery))
    note = (
        f"recall@{CHECKED_RESULTS} against exact search, for {CHECKED_QUERIES} of the pictures as queries: {recall:.3f}"
    )
    return {"name": "faiss"}, [note]


def build_lists(features: Tensor) -> "faiss.Index":
    """The lists of features (N, D), in blocks, so that they need not fit into the memory."""
    array = features.numpy()
    clusters = max(1, min(round(4 * len(array) ** 0.5), len(array) // FEWEST_FOR_A_CLUSTER))
    index = faiss.index_factory(array.shape[1], f"IVF{clusters},SQ8", faiss.METRIC_INNER_PRODUCT)
    sample = np.random.default_rng(0).choice(len(array), min(len(array), 64 * clusters), replace=False)
    index.train(array[np.sort(sample)])
    for start in range(0, len(array), ROWS_AT_ONCE):
        index.add(array[start : start + ROWS_AT_ONCE])
    return index


def measured_recall(features: Tensor, engine: "Approximate") -> float:
    """Share of the first ten of exact search that the engine has in its first ten, for features as queries."""
    chosen = np.random.default_rng(1).choice(len(features), min(CHECKED_QUERIES, len(features)), replace=False)
    queries = features[torch.from_numpy(np.sort(chosen))]
    pairs = zip(engine.search(queries, CHECKED_RESULTS), Exact(features).search(queries, CHECKED_RESULTS), strict=True)
    found = [torch.isin(exact, ours).float().mean() for (_, ours), (_, exact) in pairs]
    return float(torch.stack(found).mean())


class Approximate:
    """`Engine` of a gallery that `build` was called for."""

    def __init__(self, gallery: Gallery):
        self.features = gallery.features
        try:
            self._index = faiss.read_index(str(_file(gallery)))
        except RuntimeError as error:
            raise UserError(f"{_file(gallery)} is missing or damaged: remove it, and index the folder again") from error
        self._index.nprobe = max(FEWEST_PROBED, round(PROBED * self._index.nlist))

    @torch.inference_mode()
    def search(self, queries: Tensor, count: int) -> list[tuple[Tensor, Tensor]]:
        """As `Engine.search`."""
        _, candidates = self._index.search(queries.numpy(), min(CANDIDATES * count, len(self.features)))
        results = []
        for query, found in zip(queries, torch.from_numpy(candidates), strict=True):
            rows = found[found >= 0].sort().values
            scores, rows = ordered(self.features[rows] @ query, rows)
            results.append((scores[:count], rows[:count]))
        return results

    def close(self) -> None:
        """As `Engine.close`."""


def _file(gallery: Gallery) -> Path:
    return gallery.index / f"faiss_{gallery.info.generation}.index"
