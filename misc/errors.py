"""The one exception that means: the user can mend this."""

import errno

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""What a full disk, a quota and a limit for the size of files say."""


class UserError(ValueError):
    """A mistake of the user, told in one line: the offending value and the remedy.

    `main.py` prints the line without a traceback and ends with status 2. Every other exception is a bug of ours and
    keeps its traceback.
    """
