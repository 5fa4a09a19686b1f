"""Output streams that fail."""

import contextlib
import os
from collections.abc import Iterator
from typing import TextIO


@contextlib.contextmanager
def closed_pipe() -> Iterator[TextIO]:
    """A pipe whose reader has ended, such as `head -1` after its line."""
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as stream:
        yield stream


@contextlib.contextmanager
def full_device() -> Iterator[TextIO]:
    """A file on a full disk."""
    with open("/dev/full", "w") as stream:  # noqa: PTH123  # a device
        yield stream
