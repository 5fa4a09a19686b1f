"""Linux without what Windows and macOS lack, for tests: modules and names of Unix, `fork`, replacing open files.

A loader's worker is a new interpreter then. It imports this file first, as the main module, and so lacks the same.
"""

import errno
import multiprocessing
import os
import shutil
import signal
import stat
import sys
from collections.abc import Callable
from multiprocessing import resource_tracker
from pathlib import Path

# These have their own ways on Windows.
import filelock  # noqa: F401
import torchvision  # noqa: F401

MODULES = ("fcntl", "grp", "pty", "pwd", "resource", "syslog", "termios", "tty")
"""Modules that Python has on Unix only."""
NAMES = {
    os: "O_DIRECTORY O_NOFOLLOW fchmod fork forkpty getegid geteuid getgid getpgid getpgrp getsid getuid killpg "
    "posix_fallocate register_at_fork sched_getaffinity setpgid setpgrp setsid statvfs sync uname",
    signal: "SIGALRM SIGCHLD SIGHUP SIGKILL SIGQUIT SIGUSR1 SIGUSR2 alarm pthread_kill pthread_sigmask setitimer "
    "sigpending sigtimedwait sigwait sigwaitinfo",
}
"""Names of modules that Windows, macOS or both lack."""
NEEDED = ("SIGCHLD", "statvfs", "uname")
"""Names that torch and Python's own modules use on Linux."""
PROJECT = ("main", "search", "misc", "model", "text_utils")


def hide() -> None:
    """Takes the modules and names away from everything that is imported from now on."""
    for module in MODULES:
        sys.modules[module] = None
    for module, names in NAMES.items():
        for name in names.split():
            if hasattr(module, name) and name not in NEEDED:
                delattr(module, name)
    resource_tracker._HAVE_SIGMASK = shutil._use_fd_functions = False
    multiprocessing.set_start_method("spawn", force=True)
    os.open, os.fsync = refusing_folders(os.open), refusing_readers(os.fsync)
    for name in ("remove", "rename", "replace", "unlink"):
        setattr(os, name, refusing_open_files(getattr(os, name)))


def refusing_folders(function: Callable) -> Callable:
    def call(path, *arguments, **options):
        if isinstance(path, str | Path) and Path(path).is_dir():
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return function(path, *arguments, **options)

    return call


def refusing_readers(function: Callable) -> Callable:
    def call(descriptor: int) -> None:
        flags = next(
            line.split()[1]
            for line in Path(f"/proc/self/fdinfo/{descriptor}").read_text().splitlines()
            if line.startswith("flags:")
        )
        if int(flags, 8) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        function(descriptor)

    return call


def refusing_open_files(function: Callable) -> Callable:
    def call(*paths, **options):
        for path in paths:
            if "dir_fd" not in options and is_open(path):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return function(*paths, **options)

    return call


def is_open(path: str | Path) -> bool:
    """Whether this process has a file open, or mapped into memory."""
    try:
        found = Path(path).stat()
    except OSError:
        return False
    if not stat.S_ISREG(found.st_mode):
        return False
    opened = []
    for link in Path("/proc/self/fd").iterdir():
        try:
            opened.append(os.path.samestat(link.stat(), found))
        except OSError:  # the descriptor that lists the folder
            continue
    mapped = {line.split(maxsplit=5)[5] for line in Path("/proc/self/maps").read_text().splitlines() if "/" in line}
    return any(opened) or os.path.realpath(path) in mapped


def without_unix(function: Callable[..., int | None], *arguments) -> int | None:
    """Imports the project anew without Unix, in a forked process that ends afterwards, and calls the function."""
    import __main__

    __main__.__file__, __main__.__spec__ = __file__, None  # what a worker imports first
    hide()
    for name in list(sys.modules):
        if name.partition(".")[0] in PROJECT:
            del sys.modules[name]
    import misc.files

    misc.files.CAN_REPLACE_OPEN_FILES = False
    return function(*arguments)


if __name__ == "__mp_main__":
    hide()
