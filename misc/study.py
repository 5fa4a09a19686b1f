"""The paper's study: every published row as a configuration of one run, read from `config/study.yaml`."""

import difflib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from misc.config import CONFIG_FOLDER, RULES, read_yaml
from misc.errors import UserError
from misc.resume import BEST

STUDY = CONFIG_FOLDER / "study.yaml"
STUDY_FOLDER = "runs/study"
"""Where the runs of rows go, each into a folder of its row and seed."""


@dataclass(frozen=True)
class Column:
    """One figure of a row.

    Attributes:
        title: over the column.
        digits: behind the point.
    """

    title: str
    digits: int = 2


COLUMNS = {
    "r1": Column("R@1"),
    "r5": Column("R@5"),
    "r10": Column("R@10"),
    "mAP": Column("mAP"),
    "mINP": Column("mINP"),
    "parameters": Column("M parameters", 1),
    "epochs": Column("epochs", 0),
    "train_seconds": Column("s to train", 1),
    "test_seconds": Column("s to test", 1),
}


@dataclass(frozen=True)
class Row:
    """One published row.

    Attributes:
        name: table and row, as in `losses/ss_i`.
        columns: keys of `COLUMNS`, and published: their figures.
        settings: of the configuration, as `section.key` → value.
        run: name of the row whose run this is, mostly its own.
        start: name of the row whose best checkpoint the run begins with, or None.
        reference: why there is nothing to run, or None.
    """

    name: str
    columns: tuple[str, ...]
    published: tuple[float, ...]
    settings: dict[str, Any] = field(default_factory=dict)
    run: str = ""
    start: str | None = None
    reference: str | None = None

    @property
    def table(self) -> str:
        return self.name.partition("/")[0]

    def settings_over(self, default: dict[str, Any], file: dict[str, Any]) -> dict[str, Any]:
        """What the row sets over a configuration file: all that it studies, and of data, weights, seed, schedule and
        sizes what the file leaves as in `config/config.yaml`.

        Args:
            default: of `config/config.yaml`; file: merged with it, both as `section.key` → value.
        """
        return {
            key: value
            for key, value in self.settings.items()
            if not key.startswith(OF_THE_PLACE) or file[key] == default[key]
        }


OF_THE_PLACE = (
    "anno_dir",
    "image_dir",
    "data.dataset",
    "data.batch_size",
    "model.checkpoint",
    "misc.",
    "schedule.",
    "experiment.input_resolution",
    "experiment.text_length",
)
"""Beginnings of the keys in which a configuration file counts more than a row: where and how long it trains."""

_KEYS = {"base", "set", "published", "same", "start", "reference"}


def read_study(path: Path = STUDY) -> dict[str, Row]:
    """All rows by name, in the order of the file. Raises UserError for whatever does not fit together in it."""
    content = read_yaml(path)
    bases, rows = content.get("bases", {}), {}
    for title, table in content.get("tables", {}).items():
        for key, entry in table["rows"].items():
            name = f"{title}/{key}".rstrip("/")
            if unknown := entry.keys() - _KEYS:
                raise UserError(f"{path}: {name} has {min(unknown)!r}, which is none of {', '.join(sorted(_KEYS))}")
            settings: dict[str, Any] = {}
            for base in [*table.get("base", []), *entry.get("base", [])]:
                if base not in bases:
                    raise UserError(f"{path}: {name}: there is no base {base!r}: it has {', '.join(bases)}")
                settings |= bases[base]
            settings |= entry.get("set", {})
            rows[name] = Row(
                name=name,
                columns=tuple(table["columns"]),
                published=tuple(entry.get("published", ())),
                settings=settings,
                run=entry.get("same", name),
                start=entry.get("start"),
                reference=entry.get("reference"),
            )
    for row in rows.values():
        _check(row, rows, path)
    return rows


def _check(row: Row, rows: dict[str, Row], path: Path) -> None:
    if wrong := [key for key in row.settings if key not in RULES]:
        raise UserError(f"{path}: {row.name} sets {wrong[0]!r}, which is no key of config.yaml")
    if wrong := [column for column in row.columns if column not in COLUMNS]:
        raise UserError(f"{path}: {row.name} has the column {wrong[0]!r}, which is none of {', '.join(COLUMNS)}")
    if len(row.published) not in (0, len(row.columns)):
        raise UserError(f"{path}: {row.name} has {len(row.published)} figures for {len(row.columns)} columns")
    for other in (row.run, row.start):
        if other is not None and other not in rows:
            raise UserError(f"{path}: {row.name} refers to {other!r}, which is no row")
    if rows[row.run].run != row.run:
        raise UserError(f"{path}: {row.name} is the same as {row.run}, which is the same as another: name that one")


def find_row(rows: dict[str, Row], name: str) -> Row:
    """The row to run for a name: itself, or the one that it is the same as. Raises UserError where there is none."""
    if name not in rows:
        near = difflib.get_close_matches(name, rows, n=1, cutoff=0.4)
        hint = f", did you mean {near[0]}?" if near else ""
        raise UserError(f"--study: there is no row {name!r}{hint} (main.py --study list shows all)")
    row = rows[rows[name].run]
    if row.reference:
        raise UserError(f"--study {name}: {row.reference}, of which only the published figures are here")
    return row


def row_folder(root: Path, name: str, seed: int) -> Path:
    """Where the run of a row goes."""
    return root / name / f"seed_{seed}"


def starting_checkpoint(root: Path, row: Row, seed: int) -> Path:
    """The best checkpoint of the row that this one starts from, of the same seed if there is one.

    Raises UserError where there is none.
    """
    own = row_folder(root, row.start, seed) / BEST
    found = [own] if own.is_file() else sorted((root / row.start).glob(f"seed_*/{BEST}"))
    if not found:
        raise UserError(
            f"--study {row.name} starts from the checkpoint of {row.start}, and there is none in {root / row.start}: "
            f"run --study {row.start} first, or set model.checkpoint"
        )
    return found[0]


def study_list(rows: dict[str, Row]) -> str:
    """A line for each row: its name, its published figures, and what it is the same as or starts from."""
    lines, width = [], max(map(len, rows))
    previous = None
    for row in rows.values():
        if row.table != previous:
            heads = "".join(f"{COLUMNS[column].title:>14}" for column in row.columns)
            lines += [f"{'':<{width}}{heads}"]
            previous = row.table
        figures = "".join(
            f"{figure:>14.{COLUMNS[column].digits}f}"
            for column, figure in zip(row.columns, row.published, strict=False)
        )
        notes = [f"as {row.run}" if row.run != row.name else "", f"from {row.start}" if row.start else ""]
        notes.append(f"not run: {row.reference}" if row.reference else "")
        lines.append(f"{row.name:<{width}}{figures}  {', '.join(filter(None, notes))}".rstrip())
    return "\n".join(lines)
