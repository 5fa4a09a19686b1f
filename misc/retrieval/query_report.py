"""Reports on single queries: a choice of queries to show, all results as JSON Lines, and two models compared."""

import json
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

import torch

from misc.data.split import Split
from misc.files import atomic_file, check_new_path, is_file, is_folder, resolved
from misc.retrieval.evaluation import Evaluator, Retrieval
from misc.retrieval.sheet import draw_retrieval_sheet

COMPARISON = "comparison.jsonl"
FIRST_IMAGES = 10


def choose_queries(retrieval: Retrieval, count: int, choice: str, seed: int) -> list[int]:
    """Chooses at most `count` queries to show, and returns their numbers.

    Args:
        choice: `hardest` takes those with the lowest average precision, hardest first. Any other value draws them at
            random by `seed`, and keeps their order.
    """
    precision = retrieval.results.average_precision
    count = min(count, len(precision))
    if choice == "hardest":
        return precision.argsort(stable=True)[:count].tolist()
    return sorted(Random(seed).sample(range(len(precision)), count))


def query_records(retrieval: Retrieval, split: Split) -> list[dict[str, Any]]:
    """Returns a record for each query.

    Its fields are `query` (number from 0), `caption` and `identity` (as annotated), `first_match` (rank from 1, or None
    if the person is not in the gallery), `average_precision` (percent), and `first_images`: the first ten, each with
    `path`, `identity` and `score` (cosine).
    """
    first = retrieval.results.first_match.tolist()
    precision = retrieval.results.average_precision.tolist()
    names = [split.annotated_identity(identity) for identity in split.image_identities]
    records = []
    for query, caption in enumerate(split.annotated_captions):
        scores, numbers = (values.tolist() for values in retrieval.first_images(query, FIRST_IMAGES))
        records.append(
            {
                "query": query,
                "caption": caption,
                "identity": split.annotated_identity(split.caption_identities[query]),
                "first_match": first[query] or None,
                "average_precision": 100 * precision[query],
                "first_images": [
                    {"path": split.image_paths[number], "identity": names[number], "score": score}
                    for score, number in zip(scores, numbers, strict=True)
                ],
            }
        )
    return records


def write_lines(path: Path, records: list[dict[str, Any]]) -> None:
    """Writes a JSON Lines file, completely or not at all."""
    with atomic_file(path) as file:
        for record in records:
            file.write((json.dumps(record, ensure_ascii=False) + "\n").encode(errors="replace"))


def write_queries(path: Path, retrieval: Retrieval, evaluator: Evaluator) -> None:
    """Writes the records of all queries as JSON Lines."""
    write_lines(path, query_records(retrieval, evaluator.split))


def draw_queries(path: Path, retrieval: Retrieval, evaluator: Evaluator, *, count: int, choice: str, seed: int) -> None:
    """Draws the queries that `choose_queries` chooses, if there are any."""
    if queries := choose_queries(retrieval, count, choice, seed):
        draw_retrieval_sheet(path, retrieval, evaluator.split, evaluator.image_dir, queries=queries)


def retrieval_folder(source: str) -> Path:
    """Returns the default folder for the queries of an evaluation.

    It is next to the weights, or in the current folder if the weights are given by a tag.
    """
    path = resolved(source if is_file(source) or is_folder(source) else source.replace("/", "_"))
    name = path.stem if is_file(path) else path.name
    return path.with_name(f"{name}_retrieval")


def check_new_files(folder: Path, names: Sequence[str]) -> None:
    """Checks that new files can be created in a folder, which may exist already.

    Raises UserError if one of the files exists, or cannot be created.
    """
    for name in names:
        check_new_path(folder / name, "--evaluate", "give another folder with --out FOLDER")


def compare_queries(before: Retrieval, after: Retrieval, split: Split) -> list[dict[str, Any]]:
    """Returns a record for each query, from the largest gain in average precision to the largest loss.

    Its fields are `query`, `caption` and `identity`, and as [before, after] `first_match` and `average_precision`
    (percent).
    """
    pairs = [
        torch.stack([getattr(retrieval.results, name) for retrieval in (before, after)], dim=1)
        for name in ("first_match", "average_precision")
    ]
    gain = (pairs[1][:, 1] - pairs[1][:, 0]).cpu()
    return [
        {
            "query": query,
            "caption": split.annotated_captions[query],
            "identity": split.annotated_identity(split.caption_identities[query]),
            "first_match": [rank or None for rank in pairs[0][query].tolist()],
            "average_precision": [100 * value for value in pairs[1][query].tolist()],
        }
        for query in gain.argsort(descending=True, stable=True).tolist()
    ]


def comparison_lines(compared: list[dict[str, Any]], shown: int = 5) -> list[str]:
    """Returns lines for the log: how many queries got better or worse by average precision, and the extreme ones."""

    def gain(record: dict[str, Any]) -> float:
        return record["average_precision"][1] - record["average_precision"][0]

    better, worse = [r for r in compared if gain(r) > 0], [r for r in compared if gain(r) < 0]
    lines = [
        f"{len(better)} queries got better, {len(worse)} worse, {len(compared) - len(better) - len(worse)} unchanged"
    ]
    for title, records in (("better", better[:shown]), ("worse", worse[: -shown - 1 : -1])):
        for record in records:
            ranks = " → ".join("none" if rank is None else str(rank) for rank in record["first_match"])
            lines.append(f"{title}: AP {gain(record):+.1f}, first match {ranks}: {' '.join(record['caption'].split())}")
    return lines
