"""Checks of the options that the benchmarks share."""

from pathlib import Path

from misc.errors import UserError
from misc.files import is_folder


def check_positive(option: str, value: int) -> None:
    """Raises UserError if the value of an option is below 1."""
    if value < 1:
        raise UserError(f"{option} {value}: give 1 or more")


def check_output_file(option: str, path: Path | None) -> None:
    """Raises UserError if the file cannot be written, because its folder does not exist or it is a folder itself."""
    if path is None:
        return
    if is_folder(path):
        raise UserError(f"{option} {path}: it is a folder: give the name of a file")
    if not is_folder(path.absolute().parent):
        raise UserError(f"{option} {path}: the folder {path.parent} does not exist: create it, or give another file")
