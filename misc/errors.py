"""The one exception that means: the user can mend this."""

import errno

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""What a full disk, a quota and a limit for the size of files say."""


class UserError(ValueError):
    """A mistake of the user, told in one line: the offending value and the remedy.

    `main.py` prints the line without a traceback and ends with status 2. Every other exception is a bug of ours and
    keeps its traceback.
    """

    def __init__(self, message: str):
        super().__init__(" ".join(message.splitlines()))  # names out of others' files may hold anything


def first_of(items: list[str], shown: int = 3) -> str:
    """The first few of a list, and how many more there are."""
    return ", ".join(items[:shown]) + (f" and {len(items) - shown} more" if len(items) > shown else "")
