"""Files and folders that are written completely or not at all."""

import argparse
import errno
import os
import shutil
import stat
import uuid
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, BinaryIO

from filelock import lock_descriptor

from misc.errors import UserError

CAN_REPLACE_OPEN_FILES = os.name == "posix"
"""Whether the system can replace and remove a file that is open or mapped into memory. Windows cannot."""


def is_file(path: str | Path) -> bool:
    """Like `Path.is_file`, but returns False for a path that cannot be accessed or cannot exist."""
    return _passes(path, Path.is_file)


def is_folder(path: str | Path) -> bool:
    """Like `Path.is_dir`, but returns False for a path that cannot be accessed or cannot exist."""
    return _passes(path, Path.is_dir)


def exists(path: str | Path) -> bool:
    """Like `Path.exists`, but returns False for a path that cannot be accessed or cannot exist."""
    return _passes(path, Path.exists)


def find_files(folder: Path, pattern: str) -> list[Path]:
    """Returns the paths in a folder that match a pattern of `Path.glob`, sorted. It is empty if the folder cannot be
    accessed."""
    try:
        return sorted(folder.glob(pattern))
    except (OSError, ValueError):
        return []


def resolved(path: str | Path) -> Path:
    """Like `Path.resolve`, but returns a path for links in a circle, too."""
    return Path(os.path.realpath(path))


def expanded(path: str) -> str:
    """Returns a path with the user's home folder instead of `~`. As in a shell, `~name` stays if nobody has that name.

    Raises UserError if the user has no home folder.
    """
    if not path.startswith("~"):
        return path  # unchanged: `Path` would shorten `a//b`
    try:
        return str(Path(path).expanduser())
    except RuntimeError as error:
        if path[1:2] in ("", "/", os.sep):
            raise UserError(f"{path}: this user has no home folder: set HOME, or give the whole path") from error
        return path


def path_argument(path: str) -> str:
    """Returns `expanded(path)`, for a path on a command line that is not empty: argparse prints the error."""
    if not path:
        raise argparse.ArgumentTypeError("the path is empty")
    try:
        return expanded(path)
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def open_regular(path: str | Path) -> BinaryIO:
    """Opens a file for reading. Opening a pipe would wait for its writer, and a device may never end.

    Raises OSError if the path is not a regular file (without a number), or cannot be accessed.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except ValueError as error:  # a null character
        raise OSError(errno.ENOENT, os.strerror(errno.ENOENT), str(path)) from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError("it is not a regular file")
    return os.fdopen(descriptor, "rb")


def _passes(path: str | Path, test: Callable[[Path], bool]) -> bool:
    try:
        return test(Path(path))
    except (OSError, ValueError):
        return False


def check_new_path(path: Path, option: str, remedy: str) -> Path:
    """Checks that a new file or folder can be created, and returns its path.

    Args:
        option: the command-line option that gives the path, for messages.
        remedy: what the user can do instead, for messages.

    Raises UserError if the path exists, or if its folder cannot be written to.
    """
    if os.path.lexists(path):
        raise UserError(f"{option}: {path} already exists: remove it, or {remedy}")
    check_possible(path, option, remedy)
    existing = next(parent for parent in path.absolute().parents if os.path.lexists(parent))
    if not is_folder(existing):
        raise UserError(f"{option}: {existing} is not a folder: {remedy}")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(f"{option}: no permission to write to {existing}: {remedy}")
    return path


def check_possible(path: Path, option: str, remedy: str) -> None:
    """Raises UserError if a path cannot be accessed or cannot exist, for example because a name is too long.

    Args:
        option, remedy: as in `check_new_path`.
    """
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return
    except OSError as error:
        raise UserError(f"{option}: {path} cannot be accessed ({error.strerror}): {remedy}") from error
    except ValueError as error:  # a null character
        raise UserError(f"{option}: {path} cannot be accessed ({error}): {remedy}") from error


_locked_files: "weakref.WeakSet[IO]" = weakref.WeakSet()


def lock_file(file: IO) -> str | None:
    """Locks a file that is open for writing, without waiting.

    The lock lasts until the file is closed or this process ends, however it ends. Child processes do not inherit it.
    On Windows, nobody else can read the first byte of a locked file, so lock a file of its own.

    The file stays open if its file system does not support locks. It is closed if any exception is raised.

    Returns: None, or the reason why this file system cannot lock files.
    Raises BlockingIOError if the file is locked already.
    """
    try:
        locked = lock_descriptor(file.fileno(), blocking=False)
    except OSError as error:
        if error.errno in (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP):
            return error.strerror
        file.close()
        raise
    if not locked:
        file.close()
        raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
    _locked_files.add(file)
    return None


def _leave_locks_to_the_parent() -> None:
    """Replaces the locked files of a forked process. It would hold their locks too, after its parent has ended."""
    for file in list(_locked_files):
        if not file.closed:
            nothing = os.open(os.devnull, os.O_RDWR)
            os.dup2(nothing, file.fileno(), inheritable=False)
            os.close(nothing)


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_leave_locks_to_the_parent)


def partial_path(path: Path) -> Path:
    """Returns the temporary path of a new file `path`. A file that a crash leaves there is useless."""
    return path.with_name(path.name + ".part")


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """Opens a temporary file for writing, and renames it to `path` when the context ends without an error.

    The content is on the disk before the file is renamed. So `path` is always the old file or the complete new one.
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
    """Creates a temporary folder, and renames it to `path` when the context ends without an error.

    Missing parents are created. After an error nothing is left. A killed process leaves a folder with another name,
    which ends in .part.

    Raises FileExistsError if `path` exists before or after the writing.
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
            with file.open("r+b") as written:  # Windows refuses to write a file to the disk that is open for reading
                os.fsync(written.fileno())
        _sync_folder(part)
        if os.path.lexists(path):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path))
        part.rename(path)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        for parent in missing:
            with suppress(OSError):  # another process has written into it
                parent.rmdir()
        raise
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    """Writes a changed file name to the disk. Otherwise a power failure could undo the change."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except PermissionError:  # Windows opens no folders
        return
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
