"""The one exception that means: the user can mend this."""


class UserError(ValueError):
    """A mistake of the user, told in one line: the offending value and the remedy.

    `main.py` prints the line without a traceback and ends with status 2. Every other exception is a bug of ours and
    keeps its traceback.
    """
