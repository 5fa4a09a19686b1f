"""The rows of the paper's study: the configuration and the published figures of each, from `config/study.yaml`."""

import dataclasses
import difflib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from misc.config.loading import CONFIG_FOLDER, read_yaml
from misc.config.rules import RULES
from misc.errors import UserError
from misc.files import find_files, is_file
from misc.run.folder import BEST_CHECKPOINT

STUDY = CONFIG_FOLDER / "study.yaml"
STUDY_FOLDER = "runs/study"
"""The folder of the study's runs; each run has a folder of its row and seed in it."""


@dataclass(frozen=True)
class Column:
    """A column of figures.

    Attributes:
        title: its heading.
        digits: number of decimals.
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
        name: table and row, for example `losses/ss_i`.
        columns: keys of `COLUMNS`; published: the figures of these columns.
        settings: its configuration, as `section.key` → value.
        run: name of the row whose run it shares; usually its own name.
        start: name of the row whose best checkpoint the run starts from, or None.
        reference: the reason why it cannot be run, or None.
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
        """Returns the settings of the row that override a configuration file.

        These are all settings that the row studies. Settings of data, weights, seed, schedule and sizes (`file_wins` in
        `RULES`) only override the file if it keeps the value of `config/config.yaml`.

        Args:
            default: the values of `config/config.yaml`, as `section.key` → value.
            file: those of the user's file, merged with `default`.
        """
        return {
            key: value for key, value in self.settings.items() if not RULES[key].file_wins or file[key] == default[key]
        }


_ROW_KEYS = {"base", "set", "published", "same", "start", "reference"}


def read_study(path: Path = STUDY) -> dict[str, Row]:
    """Reads all rows, by name, in the order of the file.

    Raises UserError if the file contains a mistake.
    """
    content = read_yaml(path)
    bases = _get(content, "bases", dict, path)
    rows: dict[str, Row] = {}
    for title, table in _get(content, "tables", dict, path).items():
        place = f"{path}: {title}"
        _check_keys(table, {"base", "columns", "rows"}, place)
        columns = tuple(_get(table, "columns", list, place))
        if wrong := [column for column in columns if column not in COLUMNS]:
            raise UserError(f"{place}: unknown column {wrong[0]!r}: use {', '.join(COLUMNS)}")
        for key, entry in _get(table, "rows", dict, place).items():
            name = f"{title}/{key}".rstrip("/")
            rows[name] = _read_row(name, entry, columns, bases, table, f"{path}: {name}")
    return {name: _resolve_references(row, rows, f"{path}: {name}") for name, row in rows.items()}


def _read_row(name: str, entry: Any, columns: tuple[str, ...], bases: dict, table: dict, place: str) -> Row:
    """Reads one row.

    Args:
        entry: the row in the file.
        columns, table: the columns of its table, and the table.
        bases: all bases by name.
        place: the file and the row, for messages.
    """
    _check_keys(entry, _ROW_KEYS, place)
    settings: dict[str, Any] = {}
    for base in [*_get(table, "base", list, place), *_get(entry, "base", list, place)]:
        if not isinstance(base, str) or base not in bases:
            raise UserError(f"{place}: there is no base {base!r}: use one of {', '.join(bases)}")
        settings |= _get(bases, base, dict, place)
    settings |= _get(entry, "set", dict, place)
    if wrong := [key for key in settings if key not in RULES]:
        raise UserError(f"{place} sets {wrong[0]!r}, which is not a key of config.yaml: correct it")
    for key in ("same", "start", "reference"):
        if not isinstance(entry.get(key), str | None):
            raise UserError(f"{place}: {key} is {entry[key]!r}, but should be a text")
    published = tuple(_get(entry, "published", list, place))
    if len(published) not in (0, len(columns)) or not all(isinstance(figure, int | float) for figure in published):
        raise UserError(
            f"{place} has the published figures {list(published)}: give a number for each of {list(columns)}"
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


def _resolve_references(row: Row, rows: dict[str, Row], place: str) -> Row:
    """Checks the references to other rows, and resolves `start` to the row that is run for it."""
    for other in (row.run, row.start):
        if other is not None and other not in rows:
            raise UserError(f"{place} refers to {other!r}, which is not a row: correct the name")
    if rows[row.run].run != row.run:
        raise UserError(f"{place} is the same as {row.run}, which is the same as {rows[row.run].run}: name that one")
    if row.start is not None and rows[row.start].reference:
        raise UserError(f"{place} starts from {row.start}, which has only figures and no run: name another row")
    return row if row.start is None else dataclasses.replace(row, start=rows[row.start].run)


def _check_keys(section: Any, keys: set[str], place: str) -> None:
    if not isinstance(section, dict):
        raise UserError(f"{place} should contain keys and values, not {section!r}")
    if unknown := section.keys() - keys:
        raise UserError(f"{place}: unknown key {min(unknown, key=str)!r}: use {', '.join(sorted(keys))}")


def _get(section: dict, key: str, kind: type, place: object) -> Any:
    """Returns the dict or list under a key of a section; an empty one if the key is missing or null."""
    value = section.get(key)
    if value is not None and not isinstance(value, kind):
        expected = "a list, for example [one, two]" if kind is list else "keys with values"
        raise UserError(f"{place}: {key} is {value!r}, but should be {expected}")
    return kind() if value is None else value


def find_row(rows: dict[str, Row], name: str) -> Row:
    """Returns the row to run for a name: the row itself, or the row whose run it shares.

    Raises UserError if there is no such row, or it cannot be run.
    """
    if name not in rows:
        near = difflib.get_close_matches(name, rows, n=1, cutoff=0.4)
        hint = f", did you mean {near[0]}?" if near else ""
        raise UserError(f"--study: there is no row {name!r}{hint} (main.py --study list shows all)")
    row = rows[rows[name].run]
    if row.reference:
        raise UserError(f"--study {name}: {row.reference}, so there are only the published figures: run another row")
    return row


def row_folder(root: Path, name: str, seed: int) -> Path:
    """Returns the folder of a row's run."""
    return root / name / f"seed_{seed}"


def starting_checkpoint(root: Path, row: Row, seed: int) -> Path:
    """Returns the best checkpoint of the row that `row` starts from, of the same seed if possible.

    Raises UserError if there is no such checkpoint.
    """
    assert row.start is not None
    own = row_folder(root, row.start, seed) / BEST_CHECKPOINT
    found = [own] if is_file(own) else find_files(root / row.start, f"seed_*/{BEST_CHECKPOINT}")
    if not found:
        raise UserError(
            f"--study {row.name} starts from the checkpoint of {row.start}, but {root / row.start} contains none: run "
            f"--study {row.start} first, or set model.checkpoint=… on the command line"
        )
    return found[0]


def study_list(rows: dict[str, Row]) -> str:
    """Returns a line for each row: its name, its published figures, and the rows whose run it shares or starts from."""
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
        notes = [f"same as {row.run}" if row.run != row.name else "", f"starts from {row.start}" if row.start else ""]
        notes.append(f"not run: {row.reference}" if row.reference else "")
        lines.append(f"{row.name:<{width}}{figures}  {', '.join(filter(None, notes))}".rstrip())
    return "\n".join(lines)
