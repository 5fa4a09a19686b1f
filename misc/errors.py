"""The exception for mistakes that the user can fix, and helpers for messages."""

import errno
import re
import reprlib

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Error numbers of a full disk, an exceeded quota and an exceeded limit on file size."""

LONGEST_MESSAGE = 1500
"""Characters of an error message that are shown."""

_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""Control characters except tab and line feed, other line breaks, marks of text direction, and halves of surrogate
pairs."""


_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxlong = _REPR.maxother = 100


class UserError(ValueError):
    """A mistake of the user. Its message is one line with the wrong value and the remedy.

    `main.py` prints the line without a traceback and exits with status 2. Every other exception is a bug and keeps its
    traceback.
    """

    def __init__(self, message: str):
        line = printable(" ".join(message.splitlines()))  # names read from files may contain anything
        if len(line) > LONGEST_MESSAGE:  # and be of any length; the remedy is at the end
            line = line[: LONGEST_MESSAGE - 503] + " … " + line[-500:]
        super().__init__(line)


def first_of(items: list[str], shown: int = 3) -> str:
    """Returns the first few items of a list, and the number of the others, as text."""
    return ", ".join(items[:shown]) + (f" and {len(items) - shown} more" if len(items) > shown else "")


def shown(value: object) -> str:
    """Returns `repr(value)` for a message. Of a long list or text, and of a deep one, it has only a part."""
    try:
        return _REPR.repr(value)
    except ValueError:  # Python does not print it
        return "an integer of thousands of digits"


def printable(text: str) -> str:
    """Returns the text with an escape such as `\\x1b` for each character that could change or break a terminal."""
    return _CONTROLS.sub(lambda found: found.group().encode("unicode_escape").decode(), text)
