"""Faults during a training: killed processes, full disks, signals, two runs in one folder, NaN.

`make soak` kills processes much more often than CI: SOAK_KILLS times.
"""

import contextlib
import os
import resource
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random

import pytest
import torch
from torch.utils.data import DataLoader

from misc.data.sampler import GlobalBatchSampler
from misc.data.workers import outlive_signals
from misc.errors import UserError
from misc.run.checkpoint import read_checkpoint
from misc.run.folder import LAST_CHECKPOINT
from misc.run.progress import Progress
from misc.system.distributed import Launch, Ranks
from misc.system.interruption import Interrupted, Interruption
from misc.training.resume import CheckpointWriter, RunIdentity
from misc.training.trainer import Trainer
from tests.helpers.runs import (
    EVERYTHING,
    Outcome,
    Run,
    assert_same_run,
    at_step,
    command,
    of_dataset,
    only_error,
    start,
)
from tests.misc.run.test_log import other_run

pytestmark = pytest.mark.slow

KILLS = int(os.environ.get("SOAK_KILLS", 3))
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


@pytest.fixture
def training(data, tmp_path) -> Iterator[Callable[..., Training]]:
    """Starts trainings in `tmp_path / "run"`, and kills those that still run when the test ends."""
    started = []

    def begin(*arguments: str, **options) -> Training:
        fixed = (*EVERYTHING, *of_dataset(data), f"model.saved_path={tmp_path / 'run'}")
        started.append(Training((*fixed, *arguments), output=tmp_path / "output.txt", **options))
        return started[-1]

    yield begin
    for each in started:
        if each.process.poll() is None:
            each.kill_all()


@pytest.fixture(scope="module")
def unstopped_on_two_ranks(data, tmp_path_factory) -> Callable[..., Run]:
    """A function that returns a run of two ranks with the given arguments, which was never stopped."""
    runs = {}

    def run(*arguments: str) -> Run:
        if arguments not in runs:
            folder = tmp_path_factory.mktemp("unstopped") / "run"
            own = (*EVERYTHING, *of_dataset(data), f"model.saved_path={folder}", *arguments)
            outcome = start(*own, ranks=2, seconds=300 + 10 * KILLS)
            assert outcome.status == 0, outcome.err
            runs[arguments] = Run(folder, outcome)
        return runs[arguments]

    return run


# ---- killed processes -----------------------------------------------------------------------------------------------


def test_a_training_that_is_killed_repeatedly_has_the_same_result(training, unstopped_on_two_ranks, tmp_path):
    """SIGKILL at random moments: of one rank, and torchrun restarts both; or of torchrun and both ranks."""
    folder = tmp_path / "run"
    arguments = (*ON_TWO_RANKS, f"schedule.epoch={2 + KILLS // 2}")
    random = Random(KILLS)
    restarts = {"ranks": 0, "all": 0}
    current = training(*arguments, ranks=2, restarts=KILLS)
    for _ in range(KILLS):
        before = lines_about_steps(folder)
        if random.random() < 0.3:
            time.sleep(random.uniform(0, 6))  # while it starts
        else:
            steps = random.randint(1, 5)
            wait_until(lambda: lines_about_steps(folder) >= before + steps, f"{steps} steps")  # noqa: B023
            time.sleep(random.uniform(0, 0.2))
        assert current.process.poll() is None, (tmp_path / "output.txt").read_text()[-5000:]
        ranks = current.rank_processes()
        if ranks and random.random() < 0.7:
            kill(random.choice(ranks))
            restarts["ranks"] += 1
        else:
            current.kill_all()
            restarts["all"] += 1
            if (folder / LAST_CHECKPOINT).exists():
                assert read_checkpoint(folder / LAST_CHECKPOINT)["progress"]
            resume = ("--resume",) if (folder / LAST_CHECKPOINT).exists() else ()
            current = training(*arguments, *resume, ranks=2, restarts=KILLS)
    assert current.wait(600) == 0, (tmp_path / "output.txt").read_text()[-5000:]
    assert KILLS < 20 or min(restarts.values()) > 0
    assert_same_run(folder, unstopped_on_two_ranks(*arguments))


# ---- signals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "Ctrl-C"])
def test_torchrun_is_stopped_and_the_run_is_resumed(training, unstopped_on_two_ranks, tmp_path, number):
    """torchrun sends the signal to the process groups of its ranks, including loader workers."""
    arguments = (*ON_TWO_RANKS, "data.num_workers=1", "log.checkpoint_period=0")
    first = training(*arguments, ranks=2)
    wait_until(lambda: lines_about_steps(tmp_path / "run") >= 5, "5 steps")
    first.process.send_signal(number)
    assert first.wait() != 0
    progress = read_checkpoint(tmp_path / "run" / LAST_CHECKPOINT)["progress"]
    assert progress["step"] >= 5  # only the signal caused this checkpoint
    output = (tmp_path / "output.txt").read_text()
    assert f"stopped in epoch 1, after step {progress['step']}" in output and "Error" not in output
    assert training(*arguments, "--resume", ranks=2).wait() == 0
    assert_same_run(tmp_path / "run", unstopped_on_two_ranks(*ON_TWO_RANKS))


def test_ctrl_c_at_a_terminal_also_reaches_the_workers_and_the_run_is_resumed(training, unstopped, tmp_path):
    first = training("data.num_workers=2", "log.print_period=1", "log.checkpoint_period=0")
    wait_until(lambda: lines_about_steps(tmp_path / "run") >= 3, "3 steps")
    os.killpg(first.process.pid, signal.SIGINT)
    assert first.wait() == 130
    assert (tmp_path / "output.txt").read_text().endswith("stopped by SIGINT\n")
    assert training("--resume").wait() == 0
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


def test_a_signal_to_every_process_of_a_job_stops_the_run_after_saving(training, unstopped, tmp_path):
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
    assert training("--resume").wait() == 0
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


# ---- two runs in one folder -----------------------------------------------------------------------------------------


def test_one_of_two_runs_started_in_one_folder_is_refused(training, tmp_path):
    both = [training("schedule.epoch=1"), training("schedule.epoch=1")]
    assert sorted(each.wait() for each in both) == [0, 2]
    output = (tmp_path / "output.txt").read_text()
    assert output.count("error: ") == 1
    assert "another run is writing to" in output or "already contains a run" in output
    assert Run(tmp_path / "run", Outcome(0, "", "")).records[0]["epoch"] == 1


@pytest.mark.parametrize("flag", ["--resume", "--overwrite"])
def test_a_folder_that_a_run_is_writing_to_is_refused(run, data, training, tmp_path, flag):
    folder = tmp_path / "run"
    first = training("log.print_period=1", "schedule.epoch=50")
    wait_until(lambda: lines_about_steps(folder) >= 3, "3 steps")
    own = (*EVERYTHING, "schedule.epoch=50", *of_dataset(data), f"model.saved_path={folder}")
    message = only_error(run(*own, flag))
    assert "another run is writing to" in message and str(folder) in message
    assert first.process.poll() is None
    first.kill_all()


def test_a_run_is_locked_before_its_checkpoint_is_read(run, data, monkeypatch, tmp_path):
    """Otherwise the other run could still save, and the resumed run would overwrite that checkpoint."""
    from misc.builders import run as run_builder

    own = (*EVERYTHING, *of_dataset(data), f"model.saved_path={tmp_path / 'run'}", "schedule.epoch=1")
    assert run(*own).status == 0
    found = []
    find_start = run_builder.find_start

    def try_second_run(*arguments, **options):
        found.append(other_run(tmp_path / "run"))
        return find_start(*arguments, **options)

    monkeypatch.setattr(run_builder, "find_start", try_second_run)
    assert run(*own, "--resume").status == 0
    assert len(found) == 1 and "another run is writing to" in found[0]


# ---- full disks -----------------------------------------------------------------------------------------------------


def test_a_full_disk_stops_the_run_and_loses_nothing(run, data, unstopped, monkeypatch, tmp_path, full_disk):
    folder = tmp_path / "run"
    own = (*EVERYTHING, *of_dataset(data), f"model.saved_path={folder}")
    with monkeypatch.context() as patched:
        at_step(patched, 8, lambda: full_disk(1_000_000))
        message = only_error(run(*own))
    assert str(folder / LAST_CHECKPOINT) in message and "File too large" in message and "--resume" in message
    assert read_checkpoint(folder / LAST_CHECKPOINT)["progress"]["step"] == 5
    assert not list(folder.glob("*.part"))
    full_disk(resource.RLIM_INFINITY)
    assert run(*own, "--resume").status == 0
    assert_same_run(folder, unstopped)


def test_a_log_that_cannot_be_written_also_stops_the_run(run, data, unstopped, monkeypatch, tmp_path, full_disk):
    folder = tmp_path / "run"
    own = (*EVERYTHING, *of_dataset(data), f"model.saved_path={folder}")
    with monkeypatch.context() as patched:
        at_step(patched, 8, lambda: full_disk((folder / "train.log").stat().st_size + 20))
        assert f"{folder}: File too large: free some space, then continue with --resume" in only_error(run(*own))
    full_disk(resource.RLIM_INFINITY)
    assert run(*own, "--resume").status == 0
    assert_same_run(folder, unstopped)


def test_a_disk_without_room_is_found_before_anything_is_trained(run, data, monkeypatch, tmp_path):
    """A checkpoint of this model with the optimizer state has about 80 MB, and two exist while one is written."""
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(10**9, 10**9, 90_000_000))
    own = (*EVERYTHING, *of_dataset(data), f"model.saved_path={tmp_path / 'run'}")
    message = only_error(run(*own))
    assert "0.1 GB free" in message and "model.saved_path" in message
    assert not (tmp_path / "run").exists()
    (tmp_path / "run").mkdir()
    # Left by a run that was killed; it will be deleted.
    (tmp_path / "run" / f"{LAST_CHECKPOINT}.part").write_bytes(bytes(120_000_000))
    assert run(*own, "schedule.epoch=1").status == 0


# ---- NaN and infinity -----------------------------------------------------------------------------------------------


def break_a_weight(trainer_class, monkeypatch, step: int) -> None:
    """Sets one weight to NaN before this step."""
    original, count = trainer_class.step, 0

    def broken(trainer, *arguments):
        nonlocal count
        count += 1
        if count == step:
            with torch.no_grad():
                trainer.bare_model.image_encoder.proj[0, 0] = torch.nan
        return original(trainer, *arguments)

    monkeypatch.setattr(trainer_class, "step", broken)


def test_a_loss_that_is_not_finite_names_its_step_its_losses_and_its_files(run, data, monkeypatch, tmp_path):
    """Losses are only read for log lines and before saving, but the reported step is exact."""
    break_a_weight(Trainer, monkeypatch, step=8)
    folder = tmp_path / "run"
    own = (*EVERYTHING, "log.print_period=50", *of_dataset(data), f"model.saved_path={folder}")
    message = only_error(run(*own))
    assert "not finite at epoch 1, step 8 (" in message and "nitc nan" in message and "mlm nan" in message
    draws = list(GlobalBatchSampler(48, 4, seed=1))[7]
    images = [draw.index // 2 for draw in draws]  # two captions per image
    files = [f"tiny/{image // 2 + 1:04}_{image % 2}.jpg" for image in images]
    assert all(file in message for file in files)
    assert f"images of the batch: {', '.join(files)}\n" in (folder / "train.log").read_text()
    saved = read_checkpoint(folder / LAST_CHECKPOINT)
    assert saved["progress"]["step"] == 5 and all(tensor.isfinite().all() for tensor in saved["model"].values())


def test_the_files_of_all_ranks_are_named(data, tmp_path):
    """A huge learning rate breaks the weights in the first step."""
    own = (*EVERYTHING, *of_dataset(data), f"model.saved_path={tmp_path / 'run'}", "data.batch_size=3")
    outcome = start(*own, "schedule.lr=1e38", "schedule.lr_start=1e38", "log.print_period=1", ranks=2)
    assert outcome.status == 1  # torchrun's own
    (line,) = [line for line in outcome.err.splitlines() if line.startswith("error: ")]
    assert "not finite at epoch 1, step 2 (" in line and "and 1 more, all of them in train.log" in line
    (files,) = [line for line in (tmp_path / "run" / "train.log").read_text().splitlines() if "images of" in line]
    assert files.count(".jpg") == 6


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    """For example after a step whose loss is finite but whose gradient is not."""

    class StubTrainer:
        def state(self) -> dict:
            return {"model": {"proj": torch.tensor([1.0, torch.inf])}, "optimizer": {}, "scaler": {}}

    alone = Ranks(0, 1, torch.device("cpu"))
    identity = RunIdentity({}, 4, "fp32", "")
    checkpoints = CheckpointWriter(tmp_path, StubTrainer(), Progress(1, 7), identity, Launch("one", 0), "id", alone)
    for save in (checkpoints.save_last, checkpoints.save_best):
        with pytest.raises(UserError, match=r"not finite after epoch 2, step 7 \(proj\)"):
            save()
    assert list(tmp_path.iterdir()) == []
