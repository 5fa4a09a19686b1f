"""The table of training set × test set, and the published results in it."""

import pytest

from misc.study.across import (
    Result,
    markdown_table,
    matrix_table,
    published_results,
    result_table,
    text_table,
    with_sum,
)
from misc.study.rows import read_study

ROWS = read_study()
DATASETS = {"C": "CUHK-PEDES", "I": "ICFG-PEDES", "R": "RSTPReid"}


def result(trained_on: str | None, tested_on: str, r1: float = 50, method: str = "w.pth") -> Result:
    return Result(method, trained_on, tested_on, with_sum({"r1": r1, "r5": 60, "r10": 70, "mAP": 40, "mINP": 10}))


def published(trained_on: str | None, tested_on: str) -> dict[str, dict[str, float]]:
    found = published_results([result(trained_on, tested_on)], ROWS)
    assert {(each.trained_on, each.tested_on) for each in found} <= {(trained_on, tested_on)}
    return {each.method.removesuffix(" (published)"): each.metrics for each in found}


@pytest.mark.parametrize(
    ("pair", "expected"),
    [
        ("CI", {"IRRA": (42.41, 21.77), "CLIP": (43.04, 22.45), "RDE": (48.18, 25.00), "ITSELF": (50.58, 27.32)}),
        ("IC", {"IRRA": (33.48, 31.56), "CLIP": (33.90, 31.65), "RDE": (38.11, 34.16), "ITSELF": (41.05, 37.79)}),
        ("CR", {"IRRA": (53.25, 39.63), "CLIP": (52.55, 39.97), "RDE": (54.90, 41.27), "ITSELF": (58.05, 43.72)}),
        ("RC", {"IRRA": (32.80, 30.29), "CLIP": (35.25, 32.35)}),
        ("IR", {"IRRA": (45.30, 36.82), "CLIP": (47.45, 36.83), "RDE": (49.25, 38.46), "ITSELF": (51.30, 41.07)}),
        ("RI", {"IRRA": (32.30, 20.54), "CLIP": (33.58, 19.58), "RDE": (42.17, 26.37), "ITSELF": (43.32, 27.57)}),
    ],
)
def test_other_methods_across_datasets_have_their_published_figures(pair, expected):
    """R@1 and mAP, as ITSELF (WACV 2026) prints them."""
    found = published(*(DATASETS[letter] for letter in pair))
    assert {method: tuple(metrics.values()) for method, metrics in found.items()} == expected


@pytest.mark.parametrize(
    ("dataset", "r1"),
    [
        ("CUHK-PEDES", (73.54, 72.66, 73.38, 75.94, 76.95, 77.99, 79.43)),
        ("ICFG-PEDES", (65.05, 64.52, 63.46, 67.68, 69.23, 69.95, 70.36)),
        ("RSTPReid", (61.95, 62.10, 60.20, 65.35, 67.30, 72.50, 72.50)),
    ],
)
def test_methods_that_are_tested_where_they_were_trained_have_their_published_figures(dataset, r1):
    found = published(dataset, dataset)
    assert list(found) == ["TBPS-CLIP", "TBPS-CLIP, simplified", "IRRA", "RDE", "ITSELF", "HAM+RDE", "Bi-IRRA"]
    assert tuple(metrics["r1"] for metrics in found.values()) == r1


def test_a_sum_of_recalls_needs_all_three():
    paper = published("CUHK-PEDES", "CUHK-PEDES")
    assert paper["TBPS-CLIP"]["rSum"] == pytest.approx(73.54 + 88.19 + 92.35)
    assert "rSum" not in paper["RDE"]


@pytest.mark.parametrize("trained_on", [None, "campus"])
def test_unknown_training_sets_are_compared_with_all_published_ones(trained_on):
    """Weights of other code, for example IRRA's, do not record what they were trained on."""
    found = published_results([result(trained_on, "RSTPReid")], ROWS)
    by_training_set = {
        name: [each.metrics["r1"] for each in found if each.trained_on == name] for name in DATASETS.values()
    }
    assert by_training_set == {
        "CUHK-PEDES": [53.25, 52.55, 54.90, 58.05],
        "ICFG-PEDES": [45.30, 47.45, 49.25, 51.30],
        "RSTPReid": [61.95, 62.10, 60.20, 65.35, 67.30, 72.50, 72.50],
    }
    assert {each.tested_on for each in found} == {"RSTPReid"}


def test_own_datasets_have_no_published_figures():
    assert published("campus", "campus") == published("CUHK-PEDES", "campus") == published(None, "campus") == {}


def test_published_results_stand_beside_the_measured_ones():
    measured = [result(None, "RSTPReid"), result(None, "CUHK-PEDES"), result("CUHK-PEDES", "RSTPReid", method="b.pth")]
    found = published_results(measured, ROWS)
    table = result_table(measured, found)[1:]
    assert len(table) == len(measured) + len(found) == 3 + 15 + 13
    own = [number for number, line in enumerate(table) if "published" not in line[2]]
    tested_on = [line[1] for line in table]
    assert own == [0, 12, 26]
    assert tested_on == ["RSTPReid"] * 12 + ["CUHK-PEDES"] * 14 + ["RSTPReid"] * 5
    assert {line[0] for line in table[27:]} == {"CUHK-PEDES"}
    assert "CUHK-PEDES" not in {line[0] for line in table[:12]}  # they are beside the weights that record it
    assert [line[0] for line in table[1:12]] == ["RSTPReid"] * 7 + ["ICFG-PEDES"] * 4


def test_a_table_groups_results_by_training_set_and_test_set():
    measured = [result("A", "A", 51), result("A", "B", 52), result(None, "A", 53), result("A", "A", 54, "other.pth")]
    table = result_table(measured, [Result("IRRA (published)", "A", "B", {"r1": 42.41, "mAP": 21.77})])
    assert table[0] == ["trained on", "tested on", "weights or method", "R@1", "R@5", "R@10", "mAP", "mINP", "rSum"]
    assert [line[:4] for line in table[1:]] == [
        ["A", "A", "w.pth", "51.00"],
        ["A", "A", "other.pth", "54.00"],
        ["A", "B", "w.pth", "52.00"],
        ["A", "B", "IRRA (published)", "42.41"],
        ["not recorded", "A", "w.pth", "53.00"],
    ]
    assert table[1][4:] == ["60.00", "70.00", "40.00", "10.00", "181.00"]
    assert table[4][4:] == ["–", "–", "21.77", "–", "–"]


def test_a_matrix_has_a_row_for_each_of_the_weights_and_a_column_for_each_test_set():
    weights = (("A", "a.pth"), ("A", "b.pth"), (None, "c.pth"))
    measured = [
        result(trained_on, tested_on, 10 * row + column, method)
        for row, (trained_on, method) in enumerate(weights, start=1)
        for column, tested_on in enumerate(("A", "B"), start=1)
    ]
    assert matrix_table(measured) == [
        ["trained on", "weights", "R@1 / mAP on A", "R@1 / mAP on B"],
        ["A", "a.pth", "11.00 / 40.00", "12.00 / 40.00"],
        ["A", "b.pth", "21.00 / 40.00", "22.00 / 40.00"],
        ["not recorded", "c.pth", "31.00 / 40.00", "32.00 / 40.00"],
    ]


def test_a_table_is_aligned_as_text_and_escaped_in_markdown():
    cells = [["name", "R@1"], ["a|b", "5.00"], ["longer", "15.00"]]
    assert text_table(cells) == "name      R@1\na|b      5.00\nlonger  15.00"
    assert markdown_table(cells) == "| name | R@1 |\n| --- | --- |\n| a\\|b | 5.00 |\n| longer | 15.00 |"
