"""The report: compares the runs of the paper's rows with the published results."""

import statistics
from dataclasses import dataclass
from pathlib import Path

from misc.config.loading import flatten, read_yaml
from misc.data.statistics import data_title
from misc.errors import UserError, first_of
from misc.files import atomic_file, find_files, is_file
from misc.run.folder import CONFIG, METRICS, read_records
from misc.study.rows import COLUMNS, Row

PUBLISHED_ON = "CUHK-PEDES"
"""The dataset of the published figures, unless the row sets another."""
PUBLISHED, MEASURED = "#9aa5b1", "#1a9641"


@dataclass(frozen=True)
class Measured:
    """The runs of a row.

    Attributes:
        figures: for each column, one figure per seed whose run is finished and recorded it.
        data: the data of each finished run that recorded it: a title, and the name of the dataset or None.
        unfinished: folders of the seeds whose run has not reached its last epoch; they are ignored.
    """

    figures: dict[str, list[float]]
    data: tuple[tuple[str, str | None], ...] = ()
    unfinished: tuple[str, ...] = ()

    def mean(self, column: str) -> float:
        return statistics.mean(self.figures[column])


def measured(root: Path, row: Row) -> Measured | None:
    """Reads the results of a row's runs; None if it has no run. The retrieval metrics are those of the epoch with the
    best R@1."""
    figures: dict[str, list[float]] = {column: [] for column in row.columns}
    unfinished, data = [], []
    for folder in find_files(root / row.run, "seed_*"):
        records = read_records(folder / METRICS)
        if not records:
            continue
        last = records[-1]
        if len(records) < last.get("epochs", 0):
            unfinished.append(folder.name)
            continue
        if is_file(folder / CONFIG):
            defaults = {"data.dataset": None, "data.evaluate_on": "test", "anno_dir": "?"}
            config = defaults | flatten(read_yaml(folder / CONFIG))
            dataset = config["data.dataset"]
            data.append((data_title(dataset, config["data.evaluate_on"], config["anno_dir"]), dataset))
        best = max(records, key=lambda record: record["r1"])
        results = best | {
            "epochs": len(records),
            "train_seconds": sum(record["seconds"] for record in records),
        }
        if "evaluation_seconds" in last:
            results["test_seconds"] = last["evaluation_seconds"]
        if "parameters" in last:  # older runs did not record them
            results["parameters"] = last["parameters"] / 1e6
        for column in row.columns:
            if column in results:
                figures[column].append(results[column])
    return Measured(figures, tuple(data), tuple(unfinished)) if unfinished or any(figures.values()) else None


def write_report(rows: dict[str, Row], root: Path) -> str:
    """Compares all tables that have a run. Writes `report.md`, and a bar chart of the first columns as `report.png`.

    Returns: the text of `report.md`.

    Raises UserError if no row has a run, or the folder cannot be written to.
    """
    found = {name: runs for name, row in rows.items() if (runs := measured(root, row)) is not None}
    if not found:
        raise UserError(f"--study report: {root} contains no runs: run one first, for example --study losses/ss_i")
    tables = {row.table: None for name, row in rows.items() if name in found}
    parts = []
    for table in tables:
        table_rows = [row for row in rows.values() if row.table == table]
        parts.append(f"### {table}\n\n{_table(table_rows, found)}")
        parts += _data_lines(table_rows, found)
    text = "\n\n".join(parts)
    drawn = [row for row in rows.values() if row.name in found and found[row.name].figures[row.columns[0]]]
    try:
        with atomic_file(root / "report.md") as file:
            file.write((text + "\n").encode())
        if drawn:
            _draw(drawn, found, root / "report.png")
    except OSError as error:
        raise UserError(
            f"--study report: {root} cannot be written to ({error.strerror}): set model.saved_path to a copy of it"
        ) from error
    return text


def _data_lines(rows: list[Row], found: dict[str, Measured]) -> list[str]:
    """Returns a paragraph on the data of a table's runs, with a warning if the published figures are of other data."""
    measured_on: dict[str, None] = {}
    other: dict[str, None] = {}
    for row in rows:
        published_on = row.settings.get("data.dataset", PUBLISHED_ON)
        for title, dataset in found[row.name].data if row.name in found else ():
            measured_on[title] = None
            if dataset != published_on and row.published:
                other[f"{row.name} ({published_on} published, {title} measured)"] = None
    lines = [f"Measured on: {', '.join(measured_on)}."] if measured_on else []
    if other:
        lines.append(f"**The published figures are of other data**: {first_of(list(other))}.")
    return lines


def _table(rows: list[Row], found: dict[str, Measured]) -> str:
    columns = [COLUMNS[column] for column in rows[0].columns]
    lines = [
        "| row | "
        + " | ".join(f"{column.title} published | measured | difference" for column in columns)
        + " | seeds |",
        "|---" * (3 * len(columns) + 2) + "|",
    ]
    for row in rows:
        runs = found.get(row.name)
        cells = []
        for number, key in enumerate(row.columns):
            digits = COLUMNS[key].digits
            published = row.published[number] if row.published else None
            cells.append("–" if published is None else f"{published:.{digits}f}")
            if runs is None or not runs.figures[key]:
                cells += ["–", "–"]
                continue
            mean, values = runs.mean(key), runs.figures[key]
            spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
            cells += [
                f"{mean:.{digits}f}{spread}",
                "–" if published is None else f"{mean - published:+.{digits}f}",
            ]
        seeds = "–" if runs is None else str(len(runs.figures[row.columns[0]]))
        if runs is not None and runs.unfinished:
            seeds += f" (unfinished: {', '.join(runs.unfinished)})"
        lines.append(f"| {row.name.partition('/')[2] or row.name} | " + " | ".join([*cells, seeds]) + " |")
    return "\n".join(lines)


def _draw(rows: list[Row], found: dict[str, Measured], path: Path) -> None:
    """Draws a bar chart for each table: the first column, published and measured, with the spread over the seeds."""
    from matplotlib.figure import Figure  # the import takes half a second

    tables = {row.table: [other for other in rows if other.table == row.table] for row in rows}
    heights = [0.9 + 0.45 * len(table_rows) for table_rows in tables.values()]
    figure = Figure(figsize=(9, sum(heights)), layout="constrained")
    grid = figure.subplots(len(tables), 1, squeeze=False, height_ratios=heights)
    for axes, (title, table_rows) in zip(grid[:, 0], tables.items(), strict=True):
        places, column = range(len(table_rows)), table_rows[0].columns[0]
        values = [found[row.name].figures[column] for row in table_rows]
        means = [statistics.mean(value) for value in values]
        spread = [statistics.stdev(value) if len(value) > 1 else 0 for value in values]
        published = [row.published[0] if row.published else 0 for row in table_rows]
        axes.barh([place - 0.2 for place in places], published, 0.38, color=PUBLISHED, label="published")
        axes.barh([place + 0.2 for place in places], means, 0.38, xerr=spread, color=MEASURED, label="measured")
        axes.set_yticks(places, [row.name.partition("/")[2] or row.name for row in table_rows])
        axes.invert_yaxis()
        axes.set_xlabel(COLUMNS[column].title)
        axes.set_title(title, loc="left")
        axes.legend(fontsize="small", loc="lower right")
    with atomic_file(path) as file:
        figure.savefig(file, format="png", dpi=100)
