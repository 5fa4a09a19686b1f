"""Results across datasets: a table of training set × test set, with the published figures of other methods."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from misc.study.rows import COLUMNS, Row

ACROSS_JSON, ACROSS_MARKDOWN = "across_datasets.json", "across_datasets.md"
METRICS = ("r1", "r5", "r10", "mAP", "mINP", "rSum")
SAME_DATASET = {
    "benchmarks/{}/tbps_clip_vitb16": "TBPS-CLIP",
    "benchmarks/{}/simplified_vitb16": "TBPS-CLIP, simplified",
    "irra_on_tbps_clip/{}/irra": "IRRA",
}
"""Rows of the paper with the figures of a method that was trained and tested on one dataset, and the method's name."""


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
    """Returns the published results for the training sets and test sets of the results, from the rows of the study."""
    found = []
    for trained_on, tested_on in dict.fromkeys((result.trained_on, result.tested_on) for result in results):
        if trained_on == tested_on:
            named = {name.format(tested_on): method for name, method in SAME_DATASET.items()}
            prefix = f"same_dataset/{tested_on}/"
        else:
            named, prefix = {}, f"across_datasets/{trained_on}/{tested_on}/"
        named |= {name: name.removeprefix(prefix) for name in rows if name.startswith(prefix)}
        for name, method in named.items():
            if name in rows:
                figures = dict(zip(rows[name].columns, rows[name].published, strict=True))
                found.append(Result(f"{method} (published)", trained_on, tested_on, with_sum(figures)))
    return found


def result_table(results: Sequence[Result]) -> list[list[str]]:
    """Returns the cells of a table, heads first: a row for each result, grouped by training set and test set."""
    pairs = dict.fromkeys((result.trained_on, result.tested_on) for result in results)
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
            for trained_on, tested_on in pairs
            for result in results
            if (result.trained_on, result.tested_on) == (trained_on, tested_on)
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
