"""The exception for mistakes that the user can fix, and helpers for messages."""

import errno
import re

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Error numbers of a full disk, an exceeded quota and an exceeded limit on file size."""

_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""Control characters except tab and line feed, other line breaks, marks of text direction, and halves of surrogate
pairs."""


class UserError(ValueError):
    """A mistake of the user. Its message is one line with the wrong value and the remedy.

    `main.py` prints the line without a traceback and exits with status 2. Every other exception is a bug and keeps its
    traceback.
    """

    def __init__(self, message: str):
        super().__init__(printable(" ".join(message.splitlines())))  # names read from files may contain anything


def first_of(items: list[str], shown: int = 3) -> str:
    """Returns the first few items of a list, and the number of the others, as text."""
    return ", ".join(items[:shown]) + (f" and {len(items) - shown} more" if len(items) > shown else "")


def printable(text: str) -> str:
    """Returns the text with an escape such as `\\x1b` for each character that could change or break a terminal."""
    return _CONTROLS.sub(lambda found: found.group().encode("unicode_escape").decode(), text)
