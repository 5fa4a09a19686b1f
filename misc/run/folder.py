"""The folder of a run: the name of every file in it, and the lock that keeps a second run out."""

import json
import os
import sys
from pathlib import Path
from typing import IO, Any

from misc.errors import UserError
from misc.files import lock_file
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
    existing = next((parent for parent in (folder, *folder.parents) if parent.exists()), folder)
    if not existing.is_dir():
        raise UserError(
            f"model.saved_path: {folder} cannot be created because {existing} is a file: choose another folder"
        )
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(f"model.saved_path: no permission to write to {existing}: choose another folder")
    found = [name for name in RUN_FILES if (folder / name).exists() and not _is_empty_log(folder / name)]
    if found and not overwrite:
        raise UserError(
            f"model.saved_path: {folder} already contains a run ({', '.join(found)}): choose another model.saved_path, "
            "continue the run with --resume, or replace it with --overwrite"
        )


def _is_empty_log(path: Path) -> bool:
    """Whether the file is the empty log of a run that was stopped before it started."""
    return path.name == LOG and path.stat().st_size == 0


def lock_run(folder: Path) -> IO | None:
    """Locks the run in a folder before it is read, so that nobody changes it meanwhile.

    Returns: the lock for `RunLog`, or None if the folder contains no run.
    Raises UserError if another run is writing to the folder, or if it cannot be written to.
    """
    return lock_folder(folder) if (folder / LOG).is_file() else None


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
    """Reads the epochs in a metrics.jsonl. A cut-off last line is skipped; a missing file has no epochs."""
    records = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            records.append(json.loads(line))
        except ValueError:  # the line that was being written when the machine went down
            break
    return records
