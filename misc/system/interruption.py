"""SIGTERM and Ctrl-C: a run finishes and saves its training step before it ends. Elsewhere it ends immediately.

A run saves its progress before it evaluates, so outside the training steps there is nothing to save.
"""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from misc.system.distributed import Ranks

SIGNALS = (signal.SIGINT, signal.SIGTERM)

Handler = Callable[[int, FrameType | None], object] | int | signal.Handlers | None
"""A previous handler, as `signal.signal` returns it. None means that it was not set from Python."""


class Interrupted(BaseException):
    """The signal `number` asked the run to stop. Like KeyboardInterrupt, this is not an error that code may handle."""

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.number = number

    @property
    def status(self) -> int:
        """The exit status by the shell's convention."""
        return 128 + self.number


class Interruption:
    """A context that handles SIGTERM and Ctrl-C. A second Ctrl-C ends the process immediately.

    Attributes:
        number: number of the received signal, or 0.
    """

    def __init__(self) -> None:
        self.number = 0
        self._deferred = False
        self._previous: dict[signal.Signals, Handler] = {}

    def __enter__(self) -> "Interruption":
        self._previous = {number: signal.signal(number, self._receive) for number in SIGNALS}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler or signal.SIG_DFL)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self._stop_handling()
        self.number = number
        if not self._deferred:
            raise Interrupted(number)

    def _stop_handling(self) -> None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # launchers repeat it, which must not stop the saving

    @contextmanager
    def deferred(self, ranks: Ranks) -> Iterator[None]:
        """Makes a signal only set `number` within this context. The training loop must call `agreed` after each step.

        Raises Interrupted at the end if a signal was received.
        """
        self._deferred = True
        try:
            yield
        except RuntimeError as error:
            if self.number and ranks.world_size > 1:
                # Launchers end all ranks when one ends, so a collective failed because of the signal.
                raise Interrupted(self.number) from error
            raise
        finally:
            self._deferred = False
        if self.number:
            raise Interrupted(self.number)

    def agreed(self, ranks: Ranks) -> bool:
        """Returns whether any rank was asked to stop, the same on all ranks. All must call it at the same step."""
        number = ranks.all_reduce_max(self.number)  # a signal received meanwhile counts at the next step
        if number:
            self.number = number
            self._stop_handling()
        return number != 0
