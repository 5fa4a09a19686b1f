"""The paper's study: every published row as a configuration of one run, read from `config/study.yaml`."""

import dataclasses
import difflib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from misc.config.loading import CONFIG_FOLDER, read_yaml
from misc.config.rules import RULES
from misc.errors import UserError
from misc.run.folder import BEST_CHECKPOINT

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
            key: value for key, value in self.settings.items() if not RULES[key].file_wins or file[key] == default[key]
        }


_KEYS = {"base", "set", "published", "same", "start", "reference"}


def read_study(path: Path = STUDY) -> dict[str, Row]:
    """All rows by name, in the order of the file. Raises UserError for whatever does not fit together in it."""
    content = read_yaml(path)
    bases = _typed(content, "bases", dict, path)
    rows: dict[str, Row] = {}
    for title, table in _typed(content, "tables", dict, path).items():
        where = f"{path}: {title}"
        _known(table, {"base", "columns", "rows"}, where)
        columns = tuple(_typed(table, "columns", list, where))
        if wrong := [column for column in columns if column not in COLUMNS]:
            raise UserError(f"{where} has the column {wrong[0]!r}, which is none of {', '.join(COLUMNS)}")
        for key, entry in _typed(table, "rows", dict, where).items():
            name = f"{title}/{key}".rstrip("/")
            rows[name] = _read_row(name, entry, columns, [bases, table], f"{path}: {name}")
    return {name: _linked(row, rows, f"{path}: {name}") for name, row in rows.items()}


def _read_row(name: str, entry: Any, columns: tuple[str, ...], around: list[dict], where: str) -> Row:
    bases, table = around
    _known(entry, _KEYS, where)
    settings: dict[str, Any] = {}
    for base in [*_typed(table, "base", list, where), *_typed(entry, "base", list, where)]:
        if not isinstance(base, str) or base not in bases:
            raise UserError(f"{where}: there is no base {base!r}: it has {', '.join(bases)}")
        settings |= _typed(bases, base, dict, where)
    settings |= _typed(entry, "set", dict, where)
    if wrong := [key for key in settings if key not in RULES]:
        raise UserError(f"{where} sets {wrong[0]!r}, which is no key of config.yaml")
    for key in ("same", "start", "reference"):
        if not isinstance(entry.get(key), str | None):
            raise UserError(f"{where}: {key} is {entry[key]!r} and should be a text")
    published = tuple(_typed(entry, "published", list, where))
    if len(published) not in (0, len(columns)) or not all(isinstance(figure, int | float) for figure in published):
        raise UserError(
            f"{where} has the published figures {list(published)}: give a number for each of {list(columns)}"
        )
    return Row(
        name=name,
        columns=columns,
        published=published,
        settings=settings,
        run=entry.get("same") or name,
        start=entry.get("start"),
        reference=entry.get("reference"),
    )


def _linked(row: Row, rows: dict[str, Row], where: str) -> Row:
    """The row with the names of rows that have runs of their own in place of those that are the same as these."""
    for other in (row.run, row.start):
        if other is not None and other not in rows:
            raise UserError(f"{where} refers to {other!r}, which is no row")
    if rows[row.run].run != row.run:
        raise UserError(f"{where} is the same as {row.run}, which is the same as another: name that one")
    if row.start is not None and rows[row.start].reference:
        raise UserError(f"{where} starts from {row.start}, of which there are only figures")
    return row if row.start is None else dataclasses.replace(row, start=rows[row.start].run)


def _known(section: Any, keys: set[str], where: str) -> None:
    if not isinstance(section, dict):
        raise UserError(f"{where} should hold keys and values, not {section!r}")
    if unknown := section.keys() - keys:
        raise UserError(f"{where} has {min(unknown, key=str)!r}, which is none of {', '.join(sorted(keys))}")


def _typed(section: dict, key: str, kind: type, where: object) -> Any:
    """What a section holds under a key: a dict or a list, empty where it holds nothing."""
    value = section.get(key)
    if value is not None and not isinstance(value, kind):
        what = "a list, as in [one, two]" if kind is list else "keys with values"
        raise UserError(f"{where}: {key} is {value!r} and should be {what}")
    return kind() if value is None else value


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
    own = row_folder(root, row.start, seed) / BEST_CHECKPOINT
    found = [own] if own.is_file() else sorted((root / row.start).glob(f"seed_*/{BEST_CHECKPOINT}"))
    if not found:
        raise UserError(
            f"--study {row.name} starts from the checkpoint of {row.start}, and there is none in {root / row.start}: "
            f"run --study {row.start} first, or give model.checkpoint=… on the command line"
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
