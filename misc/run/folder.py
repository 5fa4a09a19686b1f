"""The folder of a run: the name of every file in it, and the lock that keeps a second run out."""

import json
import os
import sys
from pathlib import Path
from typing import IO, Any

from misc.errors import UserError
from misc.files import check_possible, exists, is_file, is_folder, lock_file, partial_path
from misc.terminal import try_to_print

CONFIG = "config.yaml"
METRICS = "metrics.jsonl"
LOG = "train.log"
CURVE = "curve.png"
RETRIEVAL_SHEET = "retrieval.png"
QUERIES = "queries.jsonl"
TRACE = "trace.json"
LAST_CHECKPOINT = "checkpoint_last.pth"
BEST_CHECKPOINT = "checkpoint_best.pth"
RUN_FILES = (CONFIG, METRICS, LOG, CURVE, RETRIEVAL_SHEET, QUERIES, TRACE, LAST_CHECKPOINT, BEST_CHECKPOINT)
"""All files that a run writes, except TensorBoard's event files."""
LOCK = "lock"
"""An empty file that is locked as long as a run writes to the folder. It stays there, and means nothing by itself."""


def check_run_folder(folder: Path, *, overwrite: bool) -> None:
    """Checks that a new run can be written to a folder.

    Raises UserError if the folder already contains a run and `overwrite` is false, or if it cannot be created or
    written to.
    """
    check_possible(partial_path(folder / LAST_CHECKPOINT), "model.saved_path", "choose another folder")
    existing = next((parent for parent in (folder, *folder.parents) if exists(parent)), folder)
    if not is_folder(existing):
        raise UserError(
            f"model.saved_path: {folder} cannot be created because {existing} is a file: choose another folder"
        )
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(f"model.saved_path: no permission to write to {existing}: choose another folder")
    found = [name for name in RUN_FILES if exists(folder / name) and not _is_empty_log(folder / name)]
    if found and not overwrite:
        raise UserError(
            f"model.saved_path: {folder} already contains a run ({', '.join(found)}): choose another model.saved_path, "
            "continue the run with --resume, or replace it with --overwrite"
        )


def _is_empty_log(path: Path) -> bool:
    """Whether the file is the empty log of a run that was stopped before it started."""
    return path.name == LOG and is_file(path) and path.stat().st_size == 0


def lock_run(folder: Path) -> IO | None:
    """Locks the run in a folder before it is read, so that nobody changes it meanwhile.

    Returns: the lock for `RunLog`, or None if the folder contains no run.
    Raises UserError if another run is writing to the folder, or if it cannot be written to.
    """
    return lock_folder(folder) if is_file(folder / LOG) else None


def lock_folder(folder: Path) -> IO:
    """Locks the folder of a run.

    The lock lasts until the returned file is closed or this process ends, however it ends. Child processes do not
    inherit it.

    Raises UserError if another run is writing to the folder, or if it cannot be written to.
    """
    try:
        file = (folder / LOCK).open("ab")
    except OSError as error:
        raise UserError(
            f"model.saved_path: {folder} cannot be written to ({error.strerror}): choose another folder"
        ) from error
    try:
        unlocked = lock_file(file)
    except BlockingIOError as error:
        raise UserError(
            f"model.saved_path: another run is writing to {folder}: stop it, or choose another folder"
        ) from error
    if unlocked:
        try_to_print(f"warning: {folder} cannot be locked ({unlocked}): do not start a second run in it", sys.stdout)
    return file


def read_records(path: Path) -> list[dict[str, Any]]:
    """Reads the epochs in a metrics.jsonl. A damaged line is skipped; a missing file has no epochs."""
    return [record for _, record in read_lines(path) if record is not None]


def read_lines(path: Path) -> list[tuple[bytes, dict[str, Any] | None]]:
    """Reads a metrics.jsonl.

    Returns: each line with its line break, and its epoch. None: the line is damaged.
    Raises UserError if the file cannot be read.
    """
    if not is_file(path):
        return []
    try:
        with path.open("rb") as file:
            return [(line, _parse_record(line)) for line in file]
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): check its permissions") from error


def _parse_record(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    valid = (
        isinstance(record, dict)
        and {"epoch", "r1", "seconds"} <= record.keys()
        and all(type(value) in (int, float) and not abs(value) > sys.float_info.max for value in record.values())
        and type(record["epoch"]) is int
        and record["epoch"] > 0
    )
    return record if valid else None
