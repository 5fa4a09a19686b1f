"""Forked processes are like new ones, and one that crashes or hangs fails its test with a message."""

import os
import signal
import sys
import time
from pathlib import Path

import pytest

from misc.system.distributed import Ranks
from tests.helpers.fork_server import Call
from tests.helpers.ranks import fork_server, run_on_ranks

pytestmark = pytest.mark.slow


def show_process(word: str) -> int:
    print(word, dict(os.environ) == {"ONLY": "this"}, Path.cwd(), sys.stdin.read() == "")
    print("to stderr", file=sys.stderr)
    return 3


def end_by(way: str) -> None:
    if way == "exception":
        raise ValueError("a bug")
    if way == "exit":
        sys.exit("no such file")
    os.kill(os.getpid(), signal.SIGKILL)


def hang() -> None:
    print("hanging", flush=True)
    time.sleep(60)


def fail_on_rank_1(ranks: Ranks) -> None:
    if ranks.rank == 1:
        raise ValueError("a bug on rank 1")
    time.sleep(60)


def test_a_forked_process_has_its_own_environment_folder_and_outputs(tmp_path):
    ended = fork_server()([Call(show_process, ("word",), {"ONLY": "this"}, tmp_path)])
    assert ended == ([3], f"word True {tmp_path} True\n", "to stderr\n")


@pytest.mark.parametrize(
    ("way", "status", "message"),
    [("exception", 1, "ValueError: a bug\n"), ("exit", 1, "no such file\n"), ("SIGKILL", -9, "")],
)
def test_a_crash_has_a_status_and_a_message(tmp_path, way, status, message):
    ended = fork_server()([Call(end_by, (way,), {}, tmp_path)])
    assert ended.statuses == [status] and ended.err.endswith(message)


def test_a_process_that_hangs_is_ended(tmp_path):
    begun = time.monotonic()
    with pytest.raises(TimeoutError, match="1 seconds:\nhanging"):
        fork_server()([Call(hang, (), {}, tmp_path)] * 2, seconds=1)
    assert time.monotonic() - begun < 50
    assert fork_server()([Call(show_process, ("word",), {}, tmp_path)]).statuses == [3]


def test_a_rank_that_fails_ends_the_others_and_its_error_is_shown(tmp_path):
    begun = time.monotonic()
    with pytest.raises(AssertionError, match="a bug on rank 1"):
        run_on_ranks(2, fail_on_rank_1, tmp_path)
    assert time.monotonic() - begun < 50
