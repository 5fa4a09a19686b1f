"""Results across datasets: a table of training set × test set, with the published figures of other methods."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from misc.study.rows import COLUMNS, Row

ACROSS_JSON, ACROSS_MARKDOWN = "across_datasets.json", "across_datasets.md"
METRICS = ("r1", "r5", "r10", "mAP", "mINP", "rSum")
SAME_DATASET = {
    ("benchmarks", "tbps_clip_vitb16"): "TBPS-CLIP",
    ("benchmarks", "simplified_vitb16"): "TBPS-CLIP, simplified",
    ("irra_on_tbps_clip", "irra"): "IRRA",
}
"""Rows of the paper with the figures of a method that was trained and tested on one dataset, by their names without the
dataset, and the method's name."""


@dataclass(frozen=True)
class Result:
    """The result of some weights, or of a published method, on one dataset.

    Attributes:
        method: the weights, or the method.
        trained_on: the dataset that the weights were trained on; None if they do not record it.
        tested_on: the dataset of the result.
        metrics: keys of `METRICS` in percent; published results may lack some.
        details: further values of a measured result, for JSON; empty for a published one.
    """

    method: str
    trained_on: str | None
    tested_on: str
    metrics: dict[str, float]
    details: dict[str, Any] = field(default_factory=dict)

    def record(self) -> dict[str, Any]:
        """Returns the result as plain values."""
        return {
            "method": self.method,
            "trained_on": self.trained_on,
            "tested_on": self.tested_on,
            **self.details,
            **self.metrics,
        }


def with_sum(metrics: dict[str, float]) -> dict[str, float]:
    """Adds `rSum`, the sum of R@1, R@5 and R@10, if there are these three."""
    recall = [metrics[name] for name in ("r1", "r5", "r10") if name in metrics]
    return metrics | ({"rSum": sum(recall)} if len(recall) == 3 else {})


def published_results(results: Sequence[Result], rows: dict[str, Row]) -> list[Result]:
    """Returns the published results to compare with the measured ones, from the rows of the study.

    They are those with the same training set and test set. If none of the published results has this training set, for
    example because the weights do not record it, they are those of every training set.
    """
    published = [each for name, row in rows.items() if (each := _published_result(name, row))]
    known = {each.trained_on for each in published}
    pairs = {(result.trained_on, result.tested_on) for result in results}
    found: dict[tuple[str | None, str], list[Result]] = {}
    for each in published:
        if any(
            tested_on == each.tested_on and (trained_on == each.trained_on or trained_on not in known)
            for trained_on, tested_on in pairs
        ):
            found.setdefault((each.trained_on, each.tested_on), []).append(each)
    return [each for group in found.values() for each in group]


def _published_result(name: str, row: Row) -> Result | None:
    """Returns the published result of a row; None if the row does not compare methods on or across datasets."""
    match name.split("/"):
        case ["across_datasets", trained_on, tested_on, method]:
            pass
        case ["same_dataset", trained_on, method]:
            tested_on = trained_on
        case [group, trained_on, variant] if (group, variant) in SAME_DATASET:
            tested_on, method = trained_on, SAME_DATASET[group, variant]
        case _:
            return None
    figures = dict(zip(row.columns, row.published, strict=True))
    return Result(f"{method} (published)", trained_on, tested_on, with_sum(figures))


def result_table(results: Sequence[Result], published: Sequence[Result]) -> list[list[str]]:
    """Returns the cells of a table, heads first: a row for each result, grouped by training set and test set.

    A published result of a group without a measured one follows those that do not record their training set.

    Args:
        published: from `published_results(results, …)`.
    """
    groups: dict[tuple[str | None, str], list[Result]] = {}
    for result in results:
        groups.setdefault((result.trained_on, result.tested_on), []).append(result)
    known = {each.trained_on for each in published}
    for each in published:
        own = (each.trained_on, each.tested_on)
        others = (pair for pair in groups if pair[0] not in known and pair[1] == each.tested_on)
        groups[own if own in groups else next(others)].append(each)
    titles = [COLUMNS[name].title if name in COLUMNS else name for name in METRICS]
    return [
        ["trained on", "tested on", "weights or method", *titles],
        *(
            [
                result.trained_on or "not recorded",
                result.tested_on,
                result.method,
                *(f"{result.metrics[name]:.2f}" if name in result.metrics else "–" for name in METRICS),
            ]
            for group in groups.values()
            for result in group
        ),
    ]


def matrix_table(results: Sequence[Result]) -> list[list[str]]:
    """Returns the cells of a table of R@1 / mAP: a row for each of the weights, a column for each test set."""
    tests = list(dict.fromkeys(result.tested_on for result in results))
    weights = list(dict.fromkeys((result.trained_on, result.method) for result in results))
    metrics = {(result.trained_on, result.method, result.tested_on): result.metrics for result in results}
    return [
        ["trained on", "weights", *(f"R@1 / mAP on {test}" for test in tests)],
        *(
            [
                trained_on or "not recorded",
                method,
                *("{r1:.2f} / {mAP:.2f}".format(**metrics[trained_on, method, test]) for test in tests),
            ]
            for trained_on, method in weights
        ),
    ]


def text_table(cells: Sequence[Sequence[str]]) -> str:
    """Returns a table as text. Names are aligned to the left, figures to the right."""
    columns = list(zip(*cells, strict=True))
    figures = [all(re.fullmatch(r"[\d./ –-]+", cell) for cell in column[1:]) for column in columns]
    widths = [max(map(len, column)) for column in columns]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if figure else cell.ljust(width)
            for cell, width, figure in zip(line, widths, figures, strict=True)
        ).rstrip()
        for line in cells
    )


def markdown_table(cells: Sequence[Sequence[str]]) -> str:
    """Returns a table in Markdown."""
    heads, *rows = [[cell.replace("|", "\\|") for cell in line] for line in cells]
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
