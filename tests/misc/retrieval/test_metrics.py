"""Retrieval metrics against reference values, a brute-force implementation and examples worked by hand."""

from random import Random

import pytest
import torch
from torch.overrides import TorchFunctionMode

from misc.errors import UserError
from misc.retrieval import metrics
from misc.retrieval.metrics import (
    QueryResults,
    check_features,
    queries_without_match,
    rank_queries,
    rank_similarities,
    summarise,
)
from tests.helpers.golden_models import load


@pytest.mark.parametrize("case", range(4))
def test_metrics_equal_the_reference(case):
    golden = load("metrics.npz")
    results = rank_similarities(*(golden[f"{case}.{key}"] for key in ("similarity", "query_ids", "gallery_ids")))
    found = summarise(results)
    for key in ("r1", "r5", "r10", "mAP"):
        assert found[key] == pytest.approx(float(golden[f"{case}.{key}"]), rel=1e-6), key


def brute_force(similarity: list[list], query_identities: list[int], gallery_identities: list[int]) -> list[tuple]:
    """Returns (first match, AP, INP) of each query, straight from the definitions."""
    rows = []
    for similarities, identity in zip(similarity, query_identities, strict=True):
        order = sorted(range(len(similarities)), key=lambda image: (-similarities[image], image))
        ranks = [rank for rank, image in enumerate(order, start=1) if gallery_identities[image] == identity]
        if ranks:
            precisions = [found / rank for found, rank in enumerate(ranks, start=1)]
            rows.append((ranks[0], sum(precisions) / len(ranks), len(ranks) / ranks[-1]))
        else:
            rows.append((0, 0.0, 0.0))
    return rows


def brute_force_summary(rows: list[tuple]) -> dict[str, float]:
    def percent(values):
        return 100 * sum(values) / len(rows)

    recall = {f"r{k}": percent([1 <= first <= k for first, _, _ in rows]) for k in (1, 5, 10)}
    return recall | {"mAP": percent([row[1] for row in rows]), "mINP": percent([row[2] for row in rows])}


# Few different similarities cause many ties. Few gallery identities cause several matches, and queries without one.
@pytest.mark.parametrize("values", [3, 1000])
@pytest.mark.parametrize(("queries", "gallery"), [(1, 1), (8, 1), (5, 3), (40, 30), (30, 100)])
def test_ranking_equals_brute_force(queries, gallery, values):
    random = Random(f"{queries} {gallery} {values}")
    for _ in range(5):
        similarity = [[random.randrange(values) / values for _ in range(gallery)] for _ in range(queries)]
        gallery_identities = [random.randrange(1 + gallery // 3) for _ in range(gallery)]
        query_identities = [random.randrange(3 + gallery // 3) for _ in range(queries)]
        results = rank_similarities(
            torch.tensor(similarity), torch.tensor(query_identities), torch.tensor(gallery_identities)
        )
        expected = brute_force(similarity, query_identities, gallery_identities)
        first, precision, inverse_penalty = zip(*expected, strict=True)
        assert results.first_match.tolist() == list(first)
        assert results.average_precision.tolist() == pytest.approx(precision, rel=1e-12)
        assert results.inverse_negative_penalty.tolist() == pytest.approx(inverse_penalty, rel=1e-12)
        assert summarise(results) == pytest.approx(brute_force_summary(expected), rel=1e-12)
        assert queries_without_match(results) == first.count(0)


def test_two_queries_worked_by_hand():
    # Person 7 at ranks 2, 3 and 6 of six; person 9 nowhere.
    similarity = torch.tensor([[0.9, 0.8, 0.7, 0.6, 0.5, 0.4]] * 2)
    results = rank_similarities(similarity, torch.tensor([7, 9]), torch.tensor([1, 7, 7, 2, 3, 7]))
    assert results.first_match.tolist() == [2, 0]
    assert results.average_precision.tolist() == pytest.approx([(1 / 2 + 2 / 3 + 3 / 6) / 3, 0])
    assert results.inverse_negative_penalty.tolist() == pytest.approx([3 / 6, 0])
    expected = {"r1": 0, "r5": 50, "r10": 50, "mAP": 100 * 5 / 18, "mINP": 25}
    assert summarise(results) == pytest.approx(expected)
    assert queries_without_match(results) == 1


def test_equal_similarities_rank_in_the_order_of_the_gallery():
    similarity = torch.zeros(1, 50)
    results = rank_similarities(similarity, torch.tensor([4]), torch.arange(50))
    assert results.first_match.tolist() == [5]


def integer_features(rows: int, seed: int) -> torch.Tensor:
    """Returns features of small integers: their products are exact, in blocks of any size."""
    return torch.randint(-2, 3, (rows, 4), generator=torch.Generator().manual_seed(seed)).float()


def equal(results: QueryResults, expected: QueryResults) -> bool:
    return all(torch.equal(getattr(results, name), getattr(expected, name)) for name in vars(expected))


@pytest.mark.parametrize("block", [1, 30, 31, 300, 17 * 30])
def test_blocks_change_nothing(monkeypatch, block):
    queries, gallery = integer_features(17, 0), integer_features(30, 1)
    query_identities, gallery_identities = torch.arange(17) % 8, torch.arange(30) % 7
    expected = rank_similarities(queries @ gallery.T, query_identities, gallery_identities)
    monkeypatch.setattr(metrics, "MAXIMUM_BLOCK", block)
    assert equal(rank_queries(queries, gallery, query_identities, gallery_identities), expected)


def test_no_query_gives_no_result():
    results = rank_queries(torch.zeros(0, 4), torch.ones(3, 4), torch.zeros(0, dtype=torch.long), torch.arange(3))
    assert [len(values) for values in vars(results).values()] == [0, 0, 0]


class LargestTensor(TorchFunctionMode):
    """A context that records the number of elements of the largest tensor computed in it."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_function__(self, function, types, arguments=(), keywords=None):
        output = function(*arguments, **(keywords or {}))
        if isinstance(output, torch.Tensor):
            self.elements = max(self.elements, output.numel())
        return output


def test_memory_does_not_grow_with_the_queries(monkeypatch):
    monkeypatch.setattr(metrics, "MAXIMUM_BLOCK", 1000)
    largest = []
    for number in (50, 900):
        queries, gallery = integer_features(number, 0), integer_features(40, 1)
        with LargestTensor() as computed:
            rank_queries(queries, gallery, torch.arange(number), torch.arange(40))
        largest.append(computed.elements)
    assert largest == [1000, 1000]  # and not 2,000 and 36,000


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0, 1e20])
def test_a_feature_that_is_not_normalised_is_named(value):
    features = torch.eye(4)
    check_features(features, list("abcd"))
    features[2] *= value
    with pytest.raises(UserError, match="^c has an invalid feature"):
        check_features(features, list("abcd"))


def test_a_similarity_that_is_not_a_number_gives_no_metrics():
    """NaN would be the best similarity of its query."""
    similarity = torch.tensor([[0.5, 0.1], [float("nan"), 0.2]])
    with pytest.raises(AssertionError, match="NaN"):
        rank_similarities(similarity, torch.tensor([0, 1]), torch.tensor([0, 1]))
