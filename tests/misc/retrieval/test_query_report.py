"""Reports on single queries, tested with retrievals made by hand and with whole runs."""

import dataclasses
import json

import pytest
import torch

from misc.data.split import Split
from misc.retrieval.evaluation import Retrieval
from misc.retrieval.metrics import rank_queries, summarise
from misc.retrieval.query_report import choose_queries, compare_queries, comparison_lines, query_records, write_lines
from tests.helpers.runs import ARCHITECTURE, QUICK, of_dataset, only_error

SPLIT = Split(
    image_paths=["a.jpg", "b.jpg", "c.jpg"],
    image_identities=[7, 8, 9],
    captions=["of seven", "of eight", "of nine", "of nobody"],
    back_translations=[None] * 4,
    caption_images=[0, 1, 2, 0],
    annotated_captions=["Of seven.", "Of eight.", "Of nine.", "Of nobody."],
)
SPLIT.caption_identities[3] = 99  # a person who is in no image


def retrieval(*scores: tuple[float, float, float]) -> Retrieval:
    """Returns a retrieval with these cosines of each query and the three images."""
    gallery, queries = torch.eye(3), torch.tensor(scores)
    identities = torch.tensor(SPLIT.caption_identities)
    results = rank_queries(queries, gallery, identities, torch.tensor(SPLIT.image_identities))
    return Retrieval(summarise(results), 1, results, queries, gallery)


FIRST = retrieval((0.9, 0.5, 0.1), (0.8, 0.6, 0.4), (0.9, 0.8, 0.2), (0.3, 0.2, 0.1))
"""The matches are at ranks 1, 2 and 3, the last query has none: average precision 1, 1/2, 1/3 and 0."""
SECOND = retrieval((0.5, 0.9, 0.1), (0.5, 0.6, 0.4), (0.9, 0.1, 0.2), (0.3, 0.2, 0.1))
"""The matches are at ranks 2, 1 and 2."""


def test_a_record_contains_the_results_of_a_query():
    records = query_records(FIRST, SPLIT)
    assert records[1] | {"first_images": None} == {
        "query": 1,
        "caption": "Of eight.",
        "identity": 8,
        "first_match": 2,
        "average_precision": 50.0,
        "first_images": None,
    }
    assert [image["path"] for image in records[1]["first_images"]] == ["a.jpg", "b.jpg", "c.jpg"]
    assert [image["score"] for image in records[1]["first_images"]] == pytest.approx([0.8, 0.6, 0.4])
    assert [image["identity"] for image in records[2]["first_images"]] == [7, 8, 9]
    assert records[3]["first_match"] is None and records[3]["average_precision"] == 0


def test_reports_contain_the_annotated_identities():
    split = dataclasses.replace(SPLIT, identity_names={7: "Anna", 8: 10**20})
    records = query_records(FIRST, split)
    assert [record["identity"] for record in records] == ["Anna", 10**20, 9, "Anna"]
    assert [image["identity"] for image in records[0]["first_images"]] == ["Anna", 10**20, 9]
    assert {record["query"]: record["identity"] for record in compare_queries(FIRST, SECOND, split)}[1] == 10**20


def test_the_hardest_queries_have_the_least_average_precision():
    assert choose_queries(FIRST, 3, "hardest", seed=0) == [3, 2, 1]
    assert choose_queries(FIRST, 99, "hardest", seed=0) == [3, 2, 1, 0]


def test_random_queries_depend_on_the_seed():
    drawn = {tuple(choose_queries(FIRST, 2, "random", seed)) for seed in range(30)}
    assert len(drawn) == 6 and all(a < b for a, b in drawn)  # all pairs of four
    assert choose_queries(FIRST, 2, "random", 5) == choose_queries(FIRST, 2, "random", 5)
    assert choose_queries(FIRST, 99, "random", 0) == [0, 1, 2, 3]


def test_two_models_are_compared_query_by_query():
    compared = compare_queries(FIRST, SECOND, SPLIT)
    assert [record["query"] for record in compared] == [1, 2, 3, 0]  # +1/2, +1/6, 0, -1/2
    assert compared[0]["first_match"] == [2, 1] and compared[0]["average_precision"] == [50, 100]
    assert compared[2]["first_match"] == [None, None]
    lines = comparison_lines(compared, shown=1)
    assert lines == [
        "2 queries got better, 1 worse, 1 unchanged",
        "better: AP +50.0, first match 2 → 1: Of eight.",
        "worse: AP -50.0, first match 1 → 2: Of seven.",
    ]


def test_lines_accept_any_caption(tmp_path):
    write_lines(tmp_path / "lines.jsonl", [{"caption": "línea \n \u2028 \ud800"}, {"caption": ""}])
    first, second = (tmp_path / "lines.jsonl").read_bytes().decode().split("\n")[:-1]
    assert json.loads(first)["caption"] == "línea \n \u2028 ?" and json.loads(second) == {"caption": ""}


# ---- whole runs -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_runs_and_evaluations_leave_their_queries(run, data, tmp_path):
    fixed = (*QUICK, *of_dataset(data))
    for name, seed in (("one", 1), ("two", 2)):
        own = ("schedule.epoch=1", f"misc.seed={seed}", f"model.saved_path={tmp_path / name}", "log.sheet=2")
        assert run(*ARCHITECTURE, *fixed, *own).status == 0
    one, two = (tmp_path / name / "checkpoint_best.pth" for name in ("one", "two"))
    of_run = (tmp_path / "one" / "queries.jsonl").read_text(encoding="utf-8")
    assert len(of_run.splitlines()) == 20

    outcome = run(*fixed, "--evaluate", one, "--sheet", "3", "log.sheet_choice=hardest", "--against", two)
    assert outcome.status == 0, outcome
    folder = tmp_path / "one" / "checkpoint_best_retrieval"
    assert {path.name for path in folder.iterdir()} == {"retrieval.png", "queries.jsonl", "comparison.jsonl"}
    assert (folder / "queries.jsonl").read_text(encoding="utf-8") == of_run
    compared = [json.loads(line) for line in (folder / "comparison.jsonl").read_text(encoding="utf-8").splitlines()]
    other = [json.loads(line) for line in (tmp_path / "two" / "queries.jsonl").read_text(encoding="utf-8").splitlines()]
    own = [json.loads(line) for line in of_run.splitlines()]
    assert sorted(record["query"] for record in compared) == list(range(20))
    for record in compared:
        pair = (other[record["query"]], own[record["query"]])
        assert record["average_precision"] == pytest.approx([query["average_precision"] for query in pair])
    assert "queries got better" in outcome.out

    evaluate_one = (*fixed, "--evaluate", one)
    for existing in (("--sheet", "3"), ("--against", two)):
        message = only_error(run(*evaluate_one, *existing))
        assert str(folder) in message and "already exists" in message and "--out" in message
    assert sorted(path.name for path in folder.iterdir()) == ["comparison.jsonl", "queries.jsonl", "retrieval.png"]
    elsewhere = tmp_path / "new" / "elsewhere"
    assert run(*evaluate_one, "--sheet", "1", "--out", elsewhere).status == 0
    assert run(*evaluate_one, "--against", two, "--out", elsewhere).status == 0  # the next line of the documents
    for name in ("comparison.jsonl", "queries.jsonl"):
        assert (elsewhere / name).read_bytes() == (folder / name).read_bytes()
    assert (elsewhere / "retrieval.png").is_file()
    assert "--out" in only_error(run(*evaluate_one, "--out", elsewhere))
    of_checkpoint = run(*QUICK, "--evaluate", one)  # the data is that of the checkpoint; it writes nothing
    assert of_checkpoint.status == 0 and f"{one}, test in {data.anno_dir}: 20 queries" in of_checkpoint.out
    assert "back_trans" not in of_checkpoint.out
    assert "--evaluate" in only_error(run(*fixed, "--against", two))
    assert run(*fixed, "--evaluate", two, "--sheet", "0").status == 0
    assert [path.name for path in (tmp_path / "two" / "checkpoint_best_retrieval").iterdir()] == ["queries.jsonl"]
    assert "--sheet 2" in only_error(run(*fixed, "--contribution", two, "--sheet", "2"))
    assert "log.sheet" in only_error(run(*fixed, "--evaluate", two, "--sheet", "many"))
