"""Trainings in real processes, which tests signal and kill."""

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from tests.helpers.runs import command

ON_TWO_RANKS = ("data.batch_size=2", "log.checkpoint_period=2", "log.print_period=1", "log.sheet=2")


class Training:
    """Runs `main.py` in its own processes, under torchrun if there are several ranks.

    Args:
        arguments: the arguments of main.py.
        ranks: number of training processes.
        restarts: how often torchrun restarts them.
        output: a file; their output is appended to it.
    """

    def __init__(self, arguments: tuple[str, ...], *, ranks: int = 1, restarts: int = 0, output: Path):
        whole = command(arguments, ranks, f"--max-restarts={restarts}", "--monitor-interval=0.1")
        self.ranks = ranks
        with output.open("a") as file:
            self.process = subprocess.Popen(**whole, stdout=file, stderr=file, start_new_session=True)

    def rank_processes(self) -> list[int]:
        """Returns the living training processes, in the order in which they were started."""
        return [self.process.pid] if self.ranks == 1 else children(self.process.pid, "main.py")

    def kill_all(self) -> None:
        for process in (self.process.pid, *children(self.process.pid, "")):
            kill(process)
        self.process.wait()

    def wait(self, seconds: float = 240) -> int:
        return self.process.wait(seconds)


def children(parent: int, name: str) -> list[int]:
    """Returns the processes that `parent` started and whose command line contains `name`."""
    found = []
    for child in Path(f"/proc/{parent}/task/{parent}/children").read_text().split():
        try:
            if name in Path(f"/proc/{child}/cmdline").read_text():
                found.append(int(child))
        except FileNotFoundError:  # it has just ended
            continue
    return found


def kill(process: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(process, signal.SIGKILL)


def wait_until(condition: Callable[[], bool], what: str, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited for {what} in vain"
        time.sleep(0.02)


def lines_about_steps(folder: Path) -> int:
    log = folder / "train.log"
    return log.read_text().count(" step ") if log.exists() else 0
