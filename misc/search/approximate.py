"""Approximate search with faiss, for more than a million pictures: inverted lists with eight bits per number.

The features are clustered, and a query is compared only with the features of the nearest clusters. The candidates
that this finds are compared again in float32. So all scores are exact, but a picture that is no candidate is missed.

Q queries, N pictures, D width of the shared space.
"""

from contextlib import suppress
from pathlib import Path
from typing import Any, cast

import faiss
import numpy as np
import torch
from torch import Tensor

from misc.errors import UserError
from misc.files import atomic_file
from misc.search.engine import Exact, ordered
from misc.search.gallery import ROWS_AT_ONCE, DamagedIndex, Gallery

PROBED_SHARE = 1 / 8
"""Share of the clusters that a query is compared with. `docs/search.md` has the recall for other shares."""
MIN_PROBED = 32
"""Smallest number of clusters that a query is compared with."""
CANDIDATES_PER_RESULT = 4
"""Number of candidates that are compared again, for each wanted result."""
MIN_FEATURES_PER_CLUSTER = 39
"""With fewer features per cluster, faiss warns that there is too little data to train on."""
CHECKED_QUERIES, CHECKED_RESULTS = 100, 10
"""Number of queries, and of results of each, for which the recall is measured."""


def build(gallery: Gallery) -> tuple[dict[str, Any], list[str]]:
    """Builds the inverted lists in the index, unless they exist, and measures their recall against exact search.

    Returns: the settings of the engine, and lines for the user.
    """
    with suppress(UserError):  # they are missing or damaged
        Approximate(gallery)
        return {"name": "faiss"}, []
    lists = faiss.serialize_index(build_lists(gallery.features))  # faiss's own writer does not explain a full disk
    with atomic_file(_file(gallery)) as file:
        file.write(lists.data)
    del lists
    recall = measured_recall(gallery.features, Approximate(gallery, verify=False))
    note = f"recall@{CHECKED_RESULTS} against exact search, with {CHECKED_QUERIES} pictures as queries: {recall:.3f}"
    return {"name": "faiss"}, [note]


def build_lists(features: Tensor) -> "faiss.Index":
    """Builds the inverted lists of features (N, D), block by block, as the features may not fit into memory."""
    array = features.numpy()
    clusters = max(1, min(round(4 * len(array) ** 0.5), len(array) // MIN_FEATURES_PER_CLUSTER))
    index = faiss.index_factory(array.shape[1], f"IVF{clusters},SQ8", faiss.METRIC_INNER_PRODUCT)
    sample = np.random.default_rng(0).choice(len(array), min(len(array), 64 * clusters), replace=False)
    index.train(array[np.sort(sample)])
    for start in range(0, len(array), ROWS_AT_ONCE):
        index.add(array[start : start + ROWS_AT_ONCE])
    return index


def measured_recall(features: Tensor, engine: "Approximate") -> float:
    """Returns the engine's recall of exact search's first ten results, with some of the features as queries."""
    chosen = np.random.default_rng(1).choice(len(features), min(CHECKED_QUERIES, len(features)), replace=False)
    queries = features[torch.from_numpy(np.sort(chosen))]
    pairs = zip(engine.search(queries, CHECKED_RESULTS), Exact(features).search(queries, CHECKED_RESULTS), strict=True)
    found = [torch.isin(exact, ours).float().mean() for (_, ours), (_, exact) in pairs]
    return float(torch.stack(found).mean())


class Approximate:
    """An `Engine` that searches the inverted lists that `build` wrote.

    Args:
        verify: whether to check the lists with the checksum that the index records.

    Raises UserError if the lists are missing or damaged.
    """

    def __init__(self, gallery: Gallery, *, verify: bool = True):
        self.features = gallery.features
        try:
            if verify:
                gallery.verify(_file(gallery))
            self._index = cast(faiss.IndexIVF, faiss.read_index(str(_file(gallery))))
        except (OSError, DamagedIndex, RuntimeError) as error:
            raise UserError(f"{_file(gallery)} is missing or damaged: index the folder again") from error
        self._index.nprobe = max(MIN_PROBED, round(PROBED_SHARE * self._index.nlist))

    @torch.inference_mode()
    def search(self, queries: Tensor, count: int) -> list[tuple[Tensor, Tensor]]:
        """See `Engine.search`."""
        _, candidates = self._index.search(queries.numpy(), min(CANDIDATES_PER_RESULT * count, len(self.features)))
        results = []
        for query, found in zip(queries, torch.from_numpy(candidates), strict=True):
            rows = found[found >= 0].sort().values
            scores, rows = ordered(self.features[rows] @ query, rows)
            results.append((scores[:count], rows[:count]))
        return results

    def close(self) -> None:
        """See `Engine.close`."""


def _file(gallery: Gallery) -> Path:
    return gallery.index / f"faiss_{gallery.info.generation}.index"
