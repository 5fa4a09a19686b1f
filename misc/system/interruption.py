"""SIGTERM and Ctrl-C: a training step is finished and saved before the run ends; anything else ends at once.

What a run has reached is saved before it evaluates, so outside the training steps there is nothing to save.
"""

import signal
from collections.abc import Iterator
from contextlib import contextmanager

from misc.system.distributed import Ranks

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(BaseException):
    """The run was asked to stop by the signal `number`. Like KeyboardInterrupt, it is no error that code may handle."""

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.number = number

    @property
    def status(self) -> int:
        """Exit status by the shell's convention."""
        return 128 + self.number


class Interruption:
    """Takes SIGTERM and Ctrl-C as a context. A second Ctrl-C ends the process as if nobody had taken the first.

    Attributes:
        number: of the signal that has come, else 0.
    """

    def __init__(self):
        self.number = 0
        self._deferred = False
        self._former: dict[int, object] = {}

    def __enter__(self) -> "Interruption":
        self._former = {number: signal.signal(number, self._take) for number in SIGNALS}
        return self

    def __exit__(self, *exception) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler or signal.SIG_DFL)  # None: it was not Python's

    def _take(self, number: int, frame) -> None:
        self._stop_taking()
        self.number = number
        if not self._deferred:
            raise Interrupted(number)

    def _stop_taking(self) -> None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # launchers repeat it; saving shall not be cut short

    @contextmanager
    def deferred(self, ranks: Ranks) -> Iterator[None]:
        """Within it, a signal only sets `number`: whoever goes through the steps asks `agreed` after each. Raises
        Interrupted at its end when a signal has come."""
        self._deferred = True
        try:
            yield
        except RuntimeError as error:
            if self.number and ranks.world_size > 1:
                raise Interrupted(self.number) from error  # launchers end all ranks when one dies: a collective fails
            raise
        finally:
            self._deferred = False
        if self.number:
            raise Interrupted(self.number)

    def agreed(self, ranks: Ranks) -> bool:
        """Whether any rank has been asked to stop; ask on all ranks at the same step, who get the same answer."""
        number = ranks.all_reduce_max(self.number)  # a signal that comes meanwhile sets `number`, for the next step
        if number:
            self.number = number
            self._stop_taking()
        return number != 0
