"""`main.py --study`: the configuration of a row of the paper, the list of all rows, the report, and acceptance."""

from collections.abc import Callable, Sequence
from pathlib import Path

from easydict import EasyDict

from misc.config.loading import load_config
from misc.errors import UserError
from misc.files import expanded, is_file
from misc.run.folder import LAST_CHECKPOINT
from misc.study.acceptance import acceptance
from misc.study.report import write_report
from misc.study.rows import STUDY_FOLDER, Row, find_row, read_study, row_folder, starting_checkpoint, study_list
from misc.system.distributed import Launch, local_rank
from misc.terminal import report, show

STUDY_TABLES: dict[str, Callable[[dict[str, Row], Path], str]] = {
    "list": lambda rows, root: study_list(rows),
    "report": write_report,
    "acceptance": acceptance,
}
"""Arguments of `--study` that train nothing."""


def print_study(table: str, overrides: Sequence[str]) -> None:
    """Prints a key of `STUDY_TABLES`, for example the list of the rows."""
    others = [override for override in overrides if not override.startswith("model.saved_path=")]
    if others:
        raise UserError(f"--study {table}: {others[0]} has no effect: only model.saved_path can be set")
    show(STUDY_TABLES[table](read_study(), study_root(overrides)))


def study_root(overrides: Sequence[str]) -> Path:
    """Returns the folder of the study's runs: `model.saved_path`, if the command line sets it."""
    paths = [override.partition("=")[2] for override in overrides if override.startswith("model.saved_path=")]
    return Path(expanded(paths[-1]) if paths else STUDY_FOLDER)


def configure_row(name: str, path: str | Path, overrides: Sequence[str], *, resume: bool) -> EasyDict:
    """Returns the configuration that trains a row.

    Args:
        name: the row's name.
        path: the configuration file that the row is applied to.
        overrides: `key=value` arguments; `model.saved_path` is the root of the study's runs.
        resume: whether the row's run is continued.
    """
    row, root = find_row(read_study(), name), study_root(overrides)
    config = load_config(path, row=row, overrides=tuple(overrides))
    config.model.saved_path = str(row_folder(root, row.name, config.misc.seed))
    if row.name != name and local_rank() == 0:
        report(f"note: {name} is the same as {row.name}, so they share the run in {config.model.saved_path}")
    exists = is_file(Path(config.model.saved_path) / LAST_CHECKPOINT)
    continues = exists and (resume or Launch.current().attempt > 0)
    given = any(override.startswith("model.checkpoint=") for override in overrides)
    if row.start and not continues and not given:
        config.model.checkpoint = str(starting_checkpoint(root, row, config.misc.seed))
    return config
