"""Faults during a training: killed processes, full disks, two runs in one folder, NaN.

`make soak` kills processes much more often than CI: SOAK_KILLS times.
"""

import os
import shutil
import time
from random import Random

import pytest
import torch

from misc.data.sampler import GlobalBatchSampler
from misc.errors import UserError
from misc.run.checkpoint import read_checkpoint
from misc.run.folder import LAST_CHECKPOINT
from misc.run.progress import Progress
from misc.system.distributed import Launch, Ranks
from misc.training.resume import CheckpointWriter, RunIdentity
from misc.training.trainer import Trainer
from tests.helpers.fork_server import ROOT, Call
from tests.helpers.ranks import fork_server
from tests.helpers.runs import (
    EVERYTHING,
    Outcome,
    Run,
    assert_same_run,
    at_step,
    environment,
    of_dataset,
    only_error,
    run_main,
    start_forked,
)
from tests.helpers.streams import closed_pipe
from tests.helpers.trainings import ON_TWO_RANKS, kill, lines_about_steps, wait_until
from tests.misc.run.test_log import install, other_run

pytestmark = pytest.mark.slow

KILLS = int(os.environ.get("SOAK_KILLS", 3))


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
    assert_same_run(folder, unstopped_on_two_ranks(*arguments, seconds=300 + 10 * KILLS))


# ---- two runs in one folder -----------------------------------------------------------------------------------------


def test_one_of_two_runs_started_in_one_folder_is_refused(data, tmp_path):
    words = ["main.py", *EVERYTHING, *of_dataset(data), f"model.saved_path={tmp_path / 'run'}", "schedule.epoch=1"]
    both = fork_server()([Call(run_main, (words,), environment(), ROOT)] * 2, together=False)
    assert sorted(both.statuses) == [0, 2]
    output = both.out + both.err
    assert output.count("error: ") == 1
    assert "another run is writing to" in output or "already contains a run" in output
    assert Run(tmp_path / "run", Outcome(0, "", "")).records[0]["epoch"] == 1


def test_a_folder_that_a_run_is_writing_to_is_refused(run, data, training, tmp_path):
    folder = tmp_path / "run"
    first = training("log.print_period=1", "schedule.epoch=50")
    wait_until(lambda: lines_about_steps(folder) >= 3, "3 steps")
    own = (*EVERYTHING, "schedule.epoch=50", *of_dataset(data), f"model.saved_path={folder}")
    for flag in ("--resume", "--overwrite"):
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
    resumed = run(*own, "--resume")
    assert resumed.status == 0 and "the run is finished: all 1 epochs are trained" in resumed.out
    assert "resumed in epoch" not in resumed.out
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
    full_disk()
    assert run(*own, "--resume").status == 0
    assert_same_run(folder, unstopped)


def test_a_log_that_cannot_be_written_also_stops_the_run(run, data, unstopped, monkeypatch, tmp_path, full_disk):
    folder = tmp_path / "run"
    own = (*EVERYTHING, *of_dataset(data), f"model.saved_path={folder}")
    with monkeypatch.context() as patched:
        at_step(patched, 8, lambda: full_disk((folder / "train.log").stat().st_size + 20))
        assert f"{folder}: File too large: free some space, then continue with --resume" in only_error(run(*own))
    full_disk()
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


# ---- what a run can do without ---------------------------------------------------------------------------------------


def fail(*arguments, **options) -> None:
    raise RuntimeError("broken\nin many lines")


class FailingLogger:
    """Replaces TensorBoard's writer and wandb's run."""

    def __init__(self, *arguments, **options):
        self.add_scalar = self.log = self.close = self.finish = fail


def test_pictures_and_loggers_that_fail_cost_a_warning_each(run, data, unstopped, monkeypatch, tmp_path):
    folder = tmp_path / "run"
    for module, name in (("log", "draw_curve"), ("profiling", "atomic_file")):
        monkeypatch.setattr(f"misc.run.{module}.{name}", fail)
    for name in ("draw_sheet", "write_lines"):
        module = "sheet" if name == "draw_sheet" else "query_report"
        monkeypatch.setattr(f"misc.retrieval.{module}.{name}", fail)
    install(monkeypatch, "tensorboard")
    install(monkeypatch, "torch.utils.tensorboard", SummaryWriter=FailingLogger)
    install(monkeypatch, "wandb", init=FailingLogger)
    own = (f"model.saved_path={folder}", "log.tensorboard=true", "log.wandb=true", "log.profile=true")
    with closed_pipe() as out:
        monkeypatch.setattr("sys.stdout", out)
        assert run(*EVERYTHING, *of_dataset(data), *own).status == 0
    warnings = [line for line in (folder / "train.log").read_text().splitlines() if line.startswith("warning: ")]
    reason = " (RuntimeError: broken)"
    without = ("TensorBoard", "wandb", "trace.json", "curve.png", "queries.jsonl", "retrieval.png")
    assert sorted(line for line in warnings if "without" in line) == sorted(
        f"warning: the run continues without {name}{reason}" for name in without
    )
    assert len([line for line in warnings if "standard output cannot be written to (Broken pipe)" in line]) == 1
    assert not list(folder.glob("*.part"))
    for name in ("checkpoint_last.pth", "checkpoint_best.pth"):
        assert read_checkpoint(folder / name)["metrics"] == read_checkpoint(unstopped.folder / name)["metrics"]
    assert len(Run(folder, Outcome(0, "", "")).records) == 2


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
    outcome = start_forked(*own, "schedule.lr=1e38", "schedule.lr_start=1e38", "log.print_period=1", ranks=2)
    assert outcome.status == 1  # as torchrun's own
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
