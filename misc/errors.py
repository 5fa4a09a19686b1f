"""The exception for mistakes that the user can fix, and helpers for messages."""

import errno

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Error numbers of a full disk, an exceeded quota and an exceeded limit on file size."""


class UserError(ValueError):
    """A mistake of the user. Its message is one line with the wrong value and the remedy.

    `main.py` prints the line without a traceback and exits with status 2. Every other exception is a bug and keeps its
    traceback.
    """

    def __init__(self, message: str):
        super().__init__(" ".join(message.splitlines()))  # names read from files may contain line breaks


def first_of(items: list[str], shown: int = 3) -> str:
    """Returns the first few items of a list, and the number of the others, as text."""
    return ", ".join(items[:shown]) + (f" and {len(items) - shown} more" if len(items) > shown else "")
