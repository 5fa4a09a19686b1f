"""Signals during a training: to torchrun, to a process group, to all processes, to one rank, to a loader worker."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader

from misc.data.samples import TrainingSet
from misc.data.workers import outlive_signals
from misc.run.checkpoint import read_checkpoint
from misc.run.folder import LAST_CHECKPOINT
from misc.system.distributed import Ranks
from misc.system.interruption import Interrupted, Interruption
from tests.helpers.runs import EVERYTHING, assert_same_run, of_dataset
from tests.helpers.trainings import ON_TWO_RANKS, children, lines_about_steps, wait_until

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "Ctrl-C"])
def test_torchrun_is_stopped_and_the_run_is_resumed(training, resume, unstopped_on_two_ranks, tmp_path, number):
    """torchrun sends the signal to the process groups of its ranks, including loader workers."""
    arguments = (*ON_TWO_RANKS, "data.num_workers=1", "log.checkpoint_period=0")
    first = training(*arguments, ranks=2)
    wait_until(lambda: lines_about_steps(tmp_path / "run") >= 5, "5 steps")
    first.process.send_signal(number)
    assert first.wait() == 1  # torchrun's own, as docs/resume.md says
    progress = read_checkpoint(tmp_path / "run" / LAST_CHECKPOINT)["progress"]
    assert progress["step"] >= 5  # only the signal caused this checkpoint
    output = (tmp_path / "output.txt").read_text()
    assert f"stopped in epoch 1, after step {progress['step']}" in output and "Error" not in output
    assert output.count(f"stopped by {number.name}; a traceback below is torchrun's own\n") == 1
    resume(*arguments, ranks=2)
    assert_same_run(tmp_path / "run", unstopped_on_two_ranks(*ON_TWO_RANKS))


def test_ctrl_c_at_a_terminal_also_reaches_the_workers_and_the_run_is_resumed(training, resume, unstopped, tmp_path):
    first = training("data.num_workers=2", "log.print_period=1", "log.checkpoint_period=0")
    wait_until(lambda: lines_about_steps(tmp_path / "run") >= 3, "3 steps")
    os.killpg(first.process.pid, signal.SIGINT)
    assert first.wait() == 130
    assert (tmp_path / "output.txt").read_text().endswith("stopped by SIGINT\n")
    resume()
    assert_same_run(tmp_path / "run", unstopped)


def test_a_signal_to_one_rank_stops_all_at_the_same_step_and_torchrun_restarts_them(
    training, unstopped_on_two_ranks, tmp_path
):
    """As if one of several machines must be shut down: all ranks save and stop, and torchrun restarts them."""
    arguments = (*ON_TWO_RANKS, "log.checkpoint_period=0")
    both = training(*arguments, ranks=2, restarts=3)
    wait_until(lambda: lines_about_steps(tmp_path / "run") >= 4, "4 steps")
    os.kill(both.rank_processes()[1], signal.SIGTERM)
    assert both.wait() == 0
    log = (tmp_path / "run" / "train.log").read_text()
    assert log.count("continue with --resume") == log.count("resumed in epoch") == 1
    assert_same_run(tmp_path / "run", unstopped_on_two_ranks(*ON_TWO_RANKS))


def test_a_collective_that_fails_while_stopping_is_not_reported():
    """The launcher ends a rank whose partner has died. A rank only reports its own errors."""
    two, alone = (Ranks(0, count, torch.device("cpu")) for count in (2, 1))
    with pytest.raises(Interrupted, match="SIGTERM"), Interruption() as interruption, interruption.deferred(two):
        signal.raise_signal(signal.SIGTERM)
        raise RuntimeError("Connection closed by peer")
    with pytest.raises(RuntimeError, match="a bug"), Interruption() as interruption, interruption.deferred(two):
        raise RuntimeError("a bug")
    with pytest.raises(RuntimeError, match="a bug"), Interruption() as interruption, interruption.deferred(alone):
        signal.raise_signal(signal.SIGTERM)
        raise RuntimeError("a bug")


def test_a_signal_that_comes_while_ranks_agree_is_kept_for_the_next_step():
    """Python handles a signal after the collective has returned, but the ranks have agreed on the old number."""

    class SignalledRanks:
        def all_reduce_max(self, number: int) -> int:
            signal.raise_signal(signal.SIGTERM)
            return number

    with Interruption() as interruption:
        with pytest.raises(Interrupted), interruption.deferred(Ranks(0, 1, torch.device("cpu"))):
            assert not interruption.agreed(SignalledRanks())
            assert interruption.agreed(Ranks(0, 1, torch.device("cpu")))
        assert interruption.number == signal.SIGTERM


def test_a_signal_to_every_process_of_a_job_stops_the_run_after_saving(training, resume, unstopped, tmp_path):
    """As schedulers do. Loader workers get the signal too, before or after the training process."""
    first = training("data.num_workers=2", "log.print_period=1", "log.checkpoint_period=0")
    wait_until(lambda: lines_about_steps(tmp_path / "run") >= 3, "3 steps")
    workers = children(first.process.pid, "main.py")
    assert len(workers) == 2
    for process in (workers[0], first.process.pid, workers[1]):
        os.kill(process, signal.SIGTERM)
    assert first.wait() == 143
    assert read_checkpoint(tmp_path / "run" / LAST_CHECKPOINT)["progress"]["step"] >= 3
    wait_until(lambda: not any(Path(f"/proc/{worker}").exists() for worker in workers), "the workers' end")
    resume()
    assert_same_run(tmp_path / "run", unstopped)


def test_a_run_that_waits_for_its_data_in_vain_is_stopped_and_resumed(run, unstopped, data, tmp_path, monkeypatch):
    """As on a network disk whose server has gone: no step ends any more."""
    whole = TrainingSet.__getitem__
    arguments = (*EVERYTHING, *of_dataset(data), f"model.saved_path={tmp_path / 'run'}", "log.checkpoint_period=0")

    def stuck(self, draw):
        if lines_about_steps(tmp_path / "run") >= 2 and not (tmp_path / "signalled").exists():
            (tmp_path / "signalled").touch()
            os.kill(os.getppid(), signal.SIGTERM)
            time.sleep(4)
        return whole(self, draw)

    with monkeypatch.context() as patched:
        patched.setattr(TrainingSet, "__getitem__", stuck)
        outcome = run(*arguments, "data.num_workers=1", "log.print_period=1")
    assert outcome.status == 143 and "stopped in epoch 1, after step " in outcome.out
    outcome = run(*arguments, "--resume")
    assert outcome.status == 0, outcome.err
    assert_same_run(tmp_path / "run", unstopped)


@pytest.mark.parametrize("method", ["fork", "forkserver"])
def test_a_loader_worker_only_ends_when_its_training_process_signals_it(method):
    """With every start method: with forkserver, Python's default from 3.14 on, the parent is another process."""
    loader = DataLoader([1, 2, 3], num_workers=1, worker_init_fn=outlive_signals, multiprocessing_context=method)
    iterator = iter(loader)
    assert next(iterator) == 1
    (worker,) = iterator._workers
    if method == "fork":
        subprocess.run(["kill", "-TERM", str(worker.pid)], check=True)  # sent by another process
        worker.join(1)
        assert worker.is_alive()
    os.kill(worker.pid, signal.SIGTERM)
    worker.join(20)
    assert not worker.is_alive()
