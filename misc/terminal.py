"""Prints to the terminal: any text from files, and to streams that are closed, full or not UTF-8."""

import io
import os
import sys
from pathlib import Path
from typing import TextIO

from misc.errors import UserError, printable


def prepare_streams() -> None:
    """Makes standard output and standard error accept every character; a closed one discards its text.

    Every command calls it first.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed by the shell; the next file would get its number, and with it the output of C code
            setattr(sys, name, Path(os.devnull).open("w", encoding="utf-8"))  # noqa: SIM115  # until the process ends
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def try_to_print(text: str, stream: TextIO) -> OSError | None:
    """Prints text and a line break, above the progress bar if there is one.

    Returns: None, or why the stream cannot be written to. From then on it discards its text.
    """
    try:
        tqdm = sys.modules.get("tqdm")  # there is no bar unless another module has imported it
        (print if tqdm is None else tqdm.tqdm.write)(printable(text), file=stream)
        stream.flush()
    except OSError as error:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())  # so that the rest of the buffer cannot fail when the process ends
        os.close(null)
        return error
    return None


def show(text: str) -> None:
    """Prints a result on standard output. A pipe whose reader has ended discards it silently.

    Raises UserError if standard output cannot be written to for another reason.
    """
    error = try_to_print(text, sys.stdout)
    if error is not None and not isinstance(error, BrokenPipeError):
        raise UserError(f"standard output cannot be written to ({error.strerror}): send it to another file") from error


def report(text: str) -> None:
    """Prints a message on standard error, or nowhere if that is closed or full."""
    try_to_print(text, sys.stderr)
