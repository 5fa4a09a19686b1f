"""A run that was stopped and resumed is bit-identical to a run that was never stopped."""

import json
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from misc.config.loading import load_config, to_plain
from misc.errors import UserError
from misc.retrieval.evaluation import Evaluator
from misc.run.checkpoint import read_checkpoint, write_checkpoint
from misc.run.log import RunLog
from misc.system.distributed import Ranks
from misc.system.interruption import Interrupted, Interruption
from misc.training.resume import CheckpointWriter, RunIdentity
from tests.helpers.runs import (
    EVERYTHING,
    METRICS,
    QUICK,
    Outcome,
    Run,
    assert_same_run,
    at_step,
    finished,
    of_dataset,
    only_error,
    start_forked,
)
from tests.helpers.seeded import clip_weights
from tests.helpers.tiny_dataset import spoil, write_tiny_dataset

pytestmark = pytest.mark.slow

STEPS = 12
"""Steps per epoch: 48 samples in batches of 4."""


class Crash(BaseException):
    """Ends a run like a power cut: no code handles it."""


@pytest.fixture
def train(run, data, monkeypatch, tmp_path) -> Callable[..., Outcome]:
    """Trains two epochs of `EVERYTHING` in this process, into `tmp_path / "run"`."""
    monkeypatch.setattr(RunLog, "curve", lambda log: None)  # a quarter of the time; `unstopped` has one
    return lambda *arguments: run(*EVERYTHING, *of_dataset(data), f"model.saved_path={tmp_path / 'run'}", *arguments)


def crash() -> None:
    raise Crash


# ---- a crash --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("step", "resumed_from"),
    [(1, (0, 0)), (5, (0, 0)), (6, (0, 5)), (STEPS, (0, 10)), (STEPS + 1, (1, 0)), (STEPS + 8, (1, 5))],
)
def test_a_crash_in_any_step_only_costs_time(train, unstopped, monkeypatch, tmp_path, step, resumed_from):
    with monkeypatch.context() as patched, pytest.raises(Crash):
        at_step(patched, step, crash)
        train()
    progress = read_checkpoint(tmp_path / "run" / "checkpoint_last.pth")["progress"]
    assert (progress["epoch"], progress["step"]) == resumed_from
    outcome = train("--resume")
    assert outcome.status == 0, outcome.err
    assert f"resumed in epoch {resumed_from[0] + 1}, after step {resumed_from[1]} of 12" in outcome.out
    assert_same_run(tmp_path / "run", unstopped)


@pytest.mark.parametrize(
    "place",
    [
        "main.result_lines",
        "misc.run.log.RunLog.decoration",
        "misc.training.resume.CheckpointWriter.save_best",
        "misc.run.log.RunLog.curve",
    ],
)
def test_a_crash_after_an_epoch_only_costs_time(train, unstopped, monkeypatch, tmp_path, place):
    with monkeypatch.context() as patched, pytest.raises(Crash):
        patched.setattr(place, lambda *_, **__: crash())
        train()
    assert train("--resume").status == 0
    assert_same_run(tmp_path / "run", unstopped)


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more workers than this machine has cores
def test_the_number_of_workers_may_change(train, unstopped, monkeypatch, tmp_path):
    for step, workers in ((8, 1), (9, 3)):
        with monkeypatch.context() as patched, pytest.raises(Crash):
            at_step(patched, step, crash)
            train(f"data.num_workers={workers}", *(["--resume"] if workers == 3 else []))
    assert train("--resume").status == 0
    assert_same_run(tmp_path / "run", unstopped)


def test_a_run_is_resumed_without_its_initial_weights(run, data, tmp_path, monkeypatch):
    """The configuration does not contain their sizes either: they come from the checkpoint."""
    sizes = {"embed": 32, "resolution": (32, 32), "patch": 16, "vision_width": 32, "vision_layers": 1}
    weights = clip_weights(**sizes, text_width=32, text_layers=1)
    torch.save({name: torch.as_tensor(value) for name, value in weights.items()}, tmp_path / "clip.pt")
    own = ("experiment.input_resolution=[32, 16]", f"model.checkpoint={tmp_path / 'clip.pt'}", "model.activation=gelu")
    arguments = (
        *QUICK,
        *of_dataset(data),
        *own,
        "schedule.epoch=1",
        "log.sheet=0",
        f"model.saved_path={tmp_path / 'run'}",
    )
    with monkeypatch.context() as patched, pytest.raises(Crash):
        at_step(patched, 3, crash)
        run(*arguments)
    (tmp_path / "clip.pt").unlink()
    outcome = run(*arguments, "--resume")
    assert outcome.status == 0 and "resumed" in outcome.out, outcome
    config = read_checkpoint(tmp_path / "run" / "checkpoint_last.pth")["config"]
    assert (config["model"]["vision_layers"], config["model"]["activation"]) == (1, "gelu")
    assert config["experiment"]["simclr_mlp"] == [32, 128, 32]


def copy_without(run: Run, folder: Path, key: str) -> None:
    """Copies a run and removes model.`key` from its checkpoint."""
    shutil.copytree(run.folder, folder)
    content = read_checkpoint(folder / "checkpoint_last.pth")
    del content["config"]["model"][key]
    write_checkpoint(folder / "checkpoint_last.pth", content)


def test_an_old_run_that_does_not_record_its_activation_uses_quick_gelu(train, unstopped, tmp_path):
    copy_without(unstopped, tmp_path / "run", "activation")
    refused = only_error(train("--resume", "model.activation=gelu"))
    assert "model.activation is gelu now and quick_gelu in the checkpoint" in refused
    assert train("--resume").status == 0


def test_a_checkpoint_without_sizes_is_refused(train, unstopped, tmp_path):
    copy_without(unstopped, tmp_path / "run", "vision_width")
    assert "model.vision_width" in only_error(train("--resume"))


def test_a_complete_run_does_not_change(train, unstopped, tmp_path):
    shutil.copytree(unstopped.folder, tmp_path / "run")
    outcome = train("--resume")
    assert outcome.status == 0 and "epoch 1 step" not in outcome.out
    assert_same_run(tmp_path / "run", unstopped)


def test_the_log_is_continued(train, monkeypatch, tmp_path):
    with monkeypatch.context() as patched, pytest.raises(Crash):
        at_step(patched, 8, crash)
        train()
    before = finished(tmp_path / "run").log
    assert "epoch 1 step 6/12" in before
    train("--resume")
    after = finished(tmp_path / "run").log
    assert after.startswith(before) and after.count("epoch 1 step 6/12") == 2  # the last checkpoint is of step 5


# ---- a signal -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)], ids=["SIGTERM", "Ctrl-C"])
def test_after_a_signal_the_step_is_finished_and_saved(train, unstopped, monkeypatch, tmp_path, number, status):
    before = signal.getsignal(number)
    with monkeypatch.context() as patched:
        at_step(patched, 8, lambda: signal.raise_signal(number))
        outcome = train("data.num_workers=1")
    assert signal.getsignal(number) == before
    assert outcome.status == status
    assert outcome.err == f"stopped by {number.name}\n"
    progress = read_checkpoint(tmp_path / "run" / "checkpoint_last.pth")["progress"]
    assert (progress["epoch"], progress["step"], progress["record"]["steps"]) == (0, 8, 8)
    assert "stopped in epoch 1, after step 8: continue with --resume" in outcome.out
    assert train("--resume").status == 0
    assert_same_run(tmp_path / "run", unstopped)


def test_a_signal_during_the_evaluation_ends_the_run_immediately(train, unstopped, monkeypatch, tmp_path):
    with monkeypatch.context() as patched:
        patched.setattr(Evaluator, "__call__", lambda *_: signal.raise_signal(signal.SIGTERM))
        assert train().status == 143
    progress = read_checkpoint(tmp_path / "run" / "checkpoint_last.pth")["progress"]
    assert (progress["epoch"], progress["step"]) == (0, STEPS)
    assert train("--resume").status == 0
    assert_same_run(tmp_path / "run", unstopped)


def test_the_second_ctrl_c_is_not_handled():
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    alone = Ranks(0, 1, torch.device("cpu"))
    with Interruption() as interruption, pytest.raises(Interrupted, match="SIGINT"), interruption.deferred(alone):
        signal.raise_signal(signal.SIGINT)
        assert interruption.number == signal.SIGINT
        signal.raise_signal(signal.SIGTERM)  # sent by a launcher, while the run saves
        assert signal.getsignal(signal.SIGINT) == signal.SIG_DFL
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


# ---- torchrun restarts the processes --------------------------------------------------------------------------------


@pytest.fixture
def attempt(monkeypatch) -> Callable[[str, int], None]:
    """A function that sets the name of the launch of this process, and how often torchrun restarted it."""

    def pretend(launch: str, number: int) -> None:
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", launch)
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", str(number))

    return pretend


@pytest.mark.parametrize("flags", [(), ("--overwrite",)])
def test_a_restart_resumes_by_itself(train, unstopped, monkeypatch, tmp_path, attempt, flags):
    if flags:
        shutil.copytree(unstopped.folder, tmp_path / "run")
    attempt("one", 0)
    with monkeypatch.context() as patched, pytest.raises(Crash):
        at_step(patched, 9, crash)
        train(*flags)
    attempt("one", 1)
    outcome = train(*flags)
    assert outcome.status == 0 and "resumed in epoch 1, after step 5" in outcome.out
    assert_same_run(tmp_path / "run", unstopped)


def test_a_restart_does_not_resume_a_run_of_another_launch(train, unstopped, tmp_path, attempt):
    """A run is refused because the folder contains another run: its restart must not continue that run."""
    shutil.copytree(unstopped.folder, tmp_path / "run")
    for number in (0, 1):
        attempt("another", number)
        assert "already contains a run" in only_error(train())
    attempt("yet another", 1)
    outcome = train("--overwrite")
    assert outcome.status == 0 and "resumed" not in outcome.out


def test_a_restart_before_the_first_checkpoint_starts_again(train, unstopped, monkeypatch, tmp_path, attempt):
    attempt("one", 0)
    with monkeypatch.context() as patched, pytest.raises(Crash):
        patched.setattr(CheckpointWriter, "save_last", lambda checkpoints: crash())
        train()
    attempt("one", 1)
    assert train().status == 0
    assert_same_run(tmp_path / "run", unstopped)


# ---- what may change, and what may not ------------------------------------------------------------------------------


@pytest.fixture
def stopped(train, monkeypatch, tmp_path) -> Path:
    """The folder of a run that was stopped after 8 steps."""
    with monkeypatch.context() as patched, pytest.raises(Crash):
        at_step(patched, 8, crash)
        train()
    return tmp_path / "run"


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("schedule.lr=2e-3", "schedule.lr is 0.002 now and 0.001 in the checkpoint"),
        ("schedule.epoch=3", "schedule.epoch is 3 now and 2 in the checkpoint"),
        ("misc.seed=5", "misc.seed is 5 now and 1 in the checkpoint"),
        ("experiment.id=false", "experiment.id is False now and True in the checkpoint"),
        (
            "data.batch_size=8",
            "processes × data.batch_size is 8 now and 4 in the checkpoint (data.batch_size=4 makes them equal)",
        ),
        ("data.noise=0.2", "data.noise is 0.2 now and 0 in the checkpoint"),
        ("misc.precision=bf16", "misc.precision is bf16 now and fp32 in the checkpoint"),
    ],
)
def test_other_settings_are_refused(train, stopped, argument, words):
    before = content(stopped)
    message = only_error(train("--resume", argument))
    assert words in message and f"--config {stopped / 'config.yaml'}" in message
    assert content(stopped) == before


def test_without_gathering_the_batch_of_a_rank_must_be_the_same():
    identity = RunIdentity(to_plain(load_config(overrides=("model.use_gather=false",))), 40, "fp32", "same")
    saved = {"config": identity.config, **identity.state(), "batch": 80}
    with pytest.raises(UserError, match=r"cannot be resumed: data\.batch_size is 40 now and 80 in the checkpoint"):
        identity.check(saved, Path("runs/x/checkpoint_last.pth"))
    identity.check(saved | {"batch": 40}, Path("runs/x/checkpoint_last.pth"))


def test_the_batch_that_fits_the_number_of_processes_is_named():
    """The configuration of the run itself is refused with another number of processes."""
    identity = RunIdentity(to_plain(load_config(overrides=("data.batch_size=20",))), 60, "fp32", "same")  # 3 processes
    for batch, remedy in ((120, "data.batch_size=40 makes"), (80, "another number of processes")):
        with pytest.raises(UserError, match=remedy):
            identity.check(
                {"config": identity.config, **identity.state(), "batch": batch}, Path("x/checkpoint_last.pth")
            )


def test_other_captions_are_refused(run, data, stopped, tmp_path):
    other = write_tiny_dataset(tmp_path / "other")
    entries = json.loads((other.anno_dir / "reid_raw.json").read_text())
    entries[0]["captions"][0] += " Mended."
    (other.anno_dir / "reid_raw.json").write_text(json.dumps(entries))
    saved_path = f"model.saved_path={stopped}"
    assert "captions" in only_error(run(*EVERYTHING, *of_dataset(other), saved_path, "--resume"))
    # the same annotation has other captions too, if images are left out
    entries[0]["captions"][0] = entries[0]["captions"][0].removesuffix(" Mended.")
    (other.anno_dir / "reid_raw.json").write_text(json.dumps(entries))
    spoil(other.image_dir / entries[0]["file_path"], "undecodable")
    message = only_error(run(*EVERYTHING, *of_dataset(other), saved_path, "--resume", "data.skip_unreadable=true"))
    assert "captions" in message and "data.skip_unreadable" in message


def test_a_run_is_resumed_with_its_saved_configuration_and_in_another_folder(run, stopped, unstopped, tmp_path):
    moved = tmp_path / "moved"
    stopped.rename(moved)
    own = (
        "--config",
        moved / "config.yaml",
        f"model.saved_path={moved}",
        "log.print_period=1",
        "data.test_batch_size=3",
    )
    assert run(*own, "--resume").status == 0
    assert_same_run(moved, unstopped)


def test_resume_without_a_run_is_refused(train, tmp_path):
    message = only_error(train("--resume"))
    assert "--resume: there is no" in message and str(tmp_path / "run" / "checkpoint_last.pth") in message
    assert not (tmp_path / "run").exists()


def test_weights_without_training_state_are_not_resumed(train, unstopped, tmp_path):
    (tmp_path / "run").mkdir()
    shutil.copy(unstopped.folder / "checkpoint_best.pth", tmp_path / "run" / "checkpoint_last.pth")
    assert f"model.checkpoint={tmp_path / 'run' / 'checkpoint_last.pth'}" in only_error(train("--resume"))


def test_a_broken_checkpoint_is_named_and_not_changed(train, stopped):
    path = stopped / "checkpoint_last.pth"
    path.write_bytes(path.read_bytes()[:-100])
    before = content(stopped)
    assert str(path) in only_error(train("--resume"))
    assert content(stopped) == before


def test_resume_and_overwrite_exclude_each_other(monkeypatch, capsys):
    import main

    monkeypatch.setattr(sys, "argv", ["main.py", "--resume", "--overwrite"])
    with pytest.raises(SystemExit) as ended:
        main.main()
    assert ended.value.code == 2 and "not allowed with" in capsys.readouterr().err


# ---- ranks ----------------------------------------------------------------------------------------------------------


def test_a_run_is_resumed_with_another_number_of_ranks(run, data, tmp_path, monkeypatch):
    """Four samples on one rank, then two on each of two ranks: the same except for rounding, with dropout off."""
    own = [*EVERYTHING, *of_dataset(data), "experiment.dropout=0", "log.sheet=0"]
    whole, changed = tmp_path / "whole", tmp_path / "changed"
    assert run(*own, f"model.saved_path={whole}").status == 0
    with monkeypatch.context() as patched, pytest.raises(Crash):
        at_step(patched, 8, crash)
        run(*own, f"model.saved_path={changed}")
    outcome = start_forked(*own, f"model.saved_path={changed}", "data.batch_size=2", "--resume", ranks=2)
    assert outcome.status == 0, outcome.err
    assert "resumed in epoch 1, after step 5 of 12" in outcome.out
    for record, expected in zip(finished(changed).records, finished(whole).records, strict=True):
        assert record["loss"] == pytest.approx(expected["loss"], rel=1e-4)
        assert [record[name] for name in METRICS] == pytest.approx([expected[name] for name in METRICS])
