"""A process that has imported `main.py` once, and forks a process for each call: an import costs seconds of CPU time.

`ForkServer` is the tests' side of it. As a script, this file is the server: it only imports the project and forks. It
must stay without threads, as a forked process does not get them. Forked processes are like new ones otherwise: they
have their own environment, current folder, standard output and standard error, and no standard input.
"""

import atexit
import contextlib
import os
import pickle
import select
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple

ROOT = Path(__file__).parents[2]
GRACE = 30
"""Seconds between the signals SIGTERM and SIGKILL to processes whose partner has failed, as in torchrun."""


@dataclass(frozen=True)
class Call:
    """A function to be called in a process of its own. What it returns becomes the exit status.

    Attributes:
        function: defined at the top level of a module, so that it can be sent to another process.
        environment: all environment variables of the process.
        folder: the current folder of the process.
    """

    function: Callable[..., int | None]
    arguments: tuple
    environment: dict[str, str]
    folder: Path


class Ended(NamedTuple):
    """How calls ended: their exit statuses (negative: the signal), and the outputs of all of them together."""

    statuses: list[int]
    out: str
    err: str


class ForkServer:
    """Starts the server of the project in `root`, which contains this file. It ends with this process, or `close`."""

    def __init__(self, root: Path):
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115  # open as long as the server
        self._process = subprocess.Popen(
            [sys.executable, root / "tests" / "helpers" / "fork_server.py"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            cwd=root,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )

    def __call__(self, calls: list[Call], *, together: bool = True, seconds: float = 300) -> Ended:
        """Runs the calls at the same time, each in its own process, and waits for all of them.

        Args:
            together: if one of them fails, the others are ended, as a launcher does.

        Raises TimeoutError if they need more time than `seconds`, with their outputs.
        """
        with tempfile.TemporaryDirectory() as folder:
            out, err = Path(folder, "out"), Path(folder, "err")
            out.touch()
            err.touch()
            request = pickle.dumps((calls, str(out), str(err), together, seconds))
            statuses = self._answer(request, seconds + 120)  # more than the server needs to import and to end them
            ended = Ended(statuses or [], *(path.read_text(encoding="utf-8") for path in (out, err)))
        if statuses is None:
            raise TimeoutError(f"still running after {seconds} seconds:\n{ended.out}\n{ended.err}")
        return ended

    def close(self) -> None:
        with contextlib.suppress(BrokenPipeError):  # it has already ended
            self._process.stdin.close()
        self._process.wait(10)
        self._process.stdout.close()
        self._errors.close()

    def _answer(self, request: bytes, seconds: float) -> list[int] | None:
        try:
            self._process.stdin.write(request)
            self._process.stdin.flush()
            if select.select([self._process.stdout], [], [], seconds)[0]:
                return pickle.load(self._process.stdout)
            why = "does not answer"
        except (BrokenPipeError, EOFError):
            why = "has ended"
        self._process.kill()
        self._errors.seek(0)
        raise RuntimeError(f"the fork server {why}:\n{self._errors.read().decode()}")


def serve(requests: BinaryIO, answers: BinaryIO) -> None:
    """Answers requests until the tests' process ends."""
    import main  # noqa: F401  # the one import of it

    while True:
        try:
            # This also imports the modules of the functions.
            calls, out, err, together, seconds = pickle.load(requests)
        except EOFError:
            return
        threads = list(Path("/proc/self/task").iterdir())
        assert len(threads) == 1, f"there are {len(threads)} threads, which a forked process would not have"
        processes = [fork(call, out, err, (requests.fileno(), answers.fileno())) for call in calls]
        pickle.dump(wait_for(processes, together, seconds), answers)
        answers.flush()


def fork(call: Call, out: str, err: str, pipes: tuple[int, int]) -> int:
    """Starts a process for the call. Returns its id."""
    process = os.fork()
    if process:
        return process
    status = 1
    try:
        for pipe in pipes:
            os.close(pipe)
        for number, file in ((0, os.devnull), (1, out), (2, err)):
            opened = os.open(file, os.O_RDWR | os.O_APPEND)
            os.dup2(opened, number)
            os.close(opened)
        os.chdir(call.folder)
        os.environ.clear()
        os.environ.update(call.environment)
        status = call.function(*call.arguments) or 0
    except SystemExit as ended:
        if ended.code is not None and not isinstance(ended.code, int):
            print(ended.code, file=sys.stderr)
        else:
            status = ended.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(BaseException):
            atexit._run_exitfuncs()
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)


def wait_for(processes: list[int], together: bool, seconds: float) -> list[int] | None:
    """Returns the statuses of the processes, or None if they need more time. At the end there are none left."""
    end = time.monotonic() + seconds
    statuses: dict[int, int] = {}
    ending = False
    while len(statuses) < len(processes):
        for process in (each for each in processes if each not in statuses):
            found, status = os.waitpid(process, os.WNOHANG)
            if found:
                statuses[process] = os.waitstatus_to_exitcode(status)
        living = [process for process in processes if process not in statuses]
        if together and living and any(statuses.values()) and not ending:
            ending, end = True, min(end, time.monotonic() + GRACE)
            for process in living:
                os.kill(process, signal.SIGTERM)
        if living and time.monotonic() > end:
            for process in living:
                os.kill(process, signal.SIGKILL)
            if not ending:
                for process in living:
                    os.waitpid(process, 0)
                return None
        time.sleep(0.005)
    return [statuses[process] for process in processes]


if __name__ == "__main__":
    sys.path[0] = str(ROOT)  # instead of the folder of this file
    private = os.dup(0), os.dup(1)
    # Nothing that an import prints may get between the answers.
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)
    serve(os.fdopen(private[0], "rb"), os.fdopen(private[1], "wb"))
