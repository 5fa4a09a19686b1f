"""Locks on files: one holder, until it ends, without its children."""

import os
import signal
import time
from pathlib import Path

import pytest

from misc.errors import UserError
from misc.files import lock_file
from misc.run.folder import lock_folder
from misc.search.gallery import held_index
from tests.helpers.fork_server import ROOT, Call
from tests.helpers.ranks import fork_server


def lock_and_leave_a_child(path: Path) -> None:
    """Locks a file and ends, like a training that is killed while its loader workers are still there."""
    file = path.open("ab")
    assert lock_file(file) is None
    child = os.fork()
    if child == 0:
        time.sleep(60)
        os._exit(0)
    path.with_name("child").write_text(str(child))
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.slow
def test_a_lock_ends_with_its_process_even_if_its_children_live_on(tmp_path):
    (ended,) = fork_server()([Call(lock_and_leave_a_child, (tmp_path / "lock",), dict(os.environ), ROOT)]).statuses
    assert ended == -signal.SIGKILL
    child = int((tmp_path / "child").read_text())
    os.kill(child, 0)  # it lives
    with (tmp_path / "lock").open("ab") as file:
        assert lock_file(file) is None
    os.kill(child, signal.SIGKILL)


def test_a_locked_file_is_refused_until_it_is_closed(tmp_path):
    first, second, third = ((tmp_path / "lock").open("ab") for _ in range(3))
    assert lock_file(first) is None
    with pytest.raises(BlockingIOError):
        lock_file(second)
    assert second.closed
    first.close()
    assert lock_file(third) is None
    third.close()


def test_a_lock_file_that_was_left_behind_is_no_lock(tmp_path):
    for _ in range(2):
        lock_folder(tmp_path).close()
        with held_index(tmp_path / "index"):
            pass
    assert [path.name for path in tmp_path.rglob("*")].count("lock") == 2


def test_a_folder_where_no_lock_file_can_be_made_is_one_clear_line(tmp_path):
    (tmp_path / "lock").mkdir()
    with pytest.raises(UserError, match=r"model\.saved_path: .* cannot be written to .*choose another folder"):
        lock_folder(tmp_path)
    with pytest.raises(UserError, match="cannot be written .*--index"), held_index(tmp_path):
        pass
