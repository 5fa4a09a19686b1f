"""Files and folders that are written whole or not at all."""

import errno
import fcntl
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, BinaryIO

from misc.errors import UserError


def is_file(path: str | Path) -> bool:
    """As `Path.is_file`, and False for a path that may not be looked at or cannot exist."""
    return _holds(path, Path.is_file)


def is_folder(path: str | Path) -> bool:
    """As `Path.is_dir`, and False for a path that may not be looked at or cannot exist."""
    return _holds(path, Path.is_dir)


def _holds(path: str | Path, test: Callable[[Path], bool]) -> bool:
    try:
        return test(Path(path))
    except (OSError, ValueError):
        return False


def check_new_path(path: Path, option: str, remedy: str) -> Path:
    """Checks that a new file or folder can be created, and returns its path.

    Args:
        option: the command-line option that it is for, for messages.
        remedy: what the user can do instead, for messages.

    Raises UserError if the path exists, or the folder that it goes into cannot be written to.
    """
    if os.path.lexists(path):
        raise UserError(f"{option}: {path} already exists: remove it, or {remedy}")
    existing = next(parent for parent in path.absolute().parents if os.path.lexists(parent))
    if not is_folder(existing):
        raise UserError(f"{option}: {existing} is not a folder: {remedy}")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(f"{option}: no permission to write to {existing}: {remedy}")
    return path


def lock_file(file: IO, lock: Callable[[IO, int], None]) -> str | None:
    """Locks an open file without waiting; where that fails, the file is closed.

    Args:
        lock: `fcntl.lockf`, for this process and not its children, or `fcntl.flock`, for whoever has this opened file.

    Returns: None, or why files cannot be locked where it lies; it stays open then.
    Raises: BlockingIOError where somebody else holds the lock.
    """
    try:
        lock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP):
            return error.strerror
        file.close()
        if error.errno not in (errno.EACCES, errno.EAGAIN):
            raise
        raise BlockingIOError(error.errno, error.strerror) from error
    return None


def partial_path(path: Path) -> Path:
    """Where a new `path` is written until it is whole; what a crash leaves there is of no use."""
    return path.with_name(path.name + ".part")


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write to, which takes the name `path` when the context ends well and is on the disk by then.

    Whatever happens, `path` is the file that was there before or the whole new one.
    """
    part = partial_path(path)
    try:
        with part.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """A new folder to write files into, which takes the name `path` when the context ends well; else nothing is left.

    Missing parents are made. Only a process that is killed leaves something: a folder of another name, ending in .part.
    Raises FileExistsError where there is something of that name, before and after the writing.
    """
    if os.path.lexists(path):
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path))
    missing = [parent for parent in path.absolute().parents if not os.path.lexists(parent)]
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.part")
    try:
        part.mkdir()
        yield part
        for file in part.iterdir():
            with file.open("rb") as written:
                os.fsync(written.fileno())
        _sync_folder(part)
        if os.path.lexists(path):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path))
        part.rename(path)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        for parent in missing:
            with suppress(OSError):  # somebody else has put something into it
                parent.rmdir()
        raise
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    """Brings a changed name to the disk, which a power cut could otherwise undo."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
