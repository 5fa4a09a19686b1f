"""The files of a run, the ranks that write them, and the folders that a run accepts."""

import errno
import importlib.util
import json
import os
import random
import re
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from PIL import Image

from misc.errors import UserError
from misc.run.folder import LOCK, RUN_FILES, check_run_folder, read_records
from misc.run.log import RunLog, wandb_project
from misc.run.profiling import peak_memory_gigabytes
from misc.run.progress import Progress
from tests.helpers.fork_server import ROOT, Call
from tests.helpers.mutations import mutated
from tests.helpers.ranks import fork_server


def record(epoch: int) -> dict[str, float]:
    """An epoch as `main.py` logs it, with a different number in each field."""
    names = ("loss_nitc", "loss_ritc", "loss", "seconds", "r1", "r5", "r10", "mAP", "mINP")
    return {"epoch": epoch} | {name: 10.0 * epoch + number for number, name in enumerate(names)}


def content(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# ---- the folder of a run ------------------------------------------------------------------------------------------


def test_a_new_or_empty_folder_or_one_with_other_files_is_free(tmp_path):
    check_run_folder(tmp_path, overwrite=False)
    check_run_folder(tmp_path / "new" / "below", overwrite=False)
    (tmp_path / "notes.txt").write_text("mine")
    check_run_folder(tmp_path, overwrite=False)
    assert content(tmp_path) == ["notes.txt"]


def test_a_folder_without_permission_to_write_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("os.access", lambda path, mode: Path(path) != tmp_path)  # tests may run as root
    with pytest.raises(UserError, match="saved_path.*no permission to write to"):
        check_run_folder(tmp_path / "new", overwrite=False)


@pytest.mark.parametrize("name", RUN_FILES)
def test_a_folder_that_contains_a_file_of_a_run_is_refused(tmp_path, name):
    (tmp_path / name).write_text("old")
    with pytest.raises(UserError) as caught:
        check_run_folder(tmp_path, overwrite=False)
    assert all(part in str(caught.value) for part in ("model.saved_path", str(tmp_path), name, "--overwrite"))
    check_run_folder(tmp_path, overwrite=True)
    assert content(tmp_path) == [name]  # the check changes nothing


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_that_cannot_be_created_is_refused(tmp_path, overwrite):
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(UserError, match=r"model\.saved_path.*is a file"):
            check_run_folder(folder, overwrite=overwrite)


def test_the_empty_log_of_a_run_that_never_started_is_not_a_run(tmp_path):
    (tmp_path / "train.log").touch()
    check_run_folder(tmp_path, overwrite=False)


def test_a_new_run_replaces_only_the_files_of_the_old_run(tmp_path):
    others = ("ViT-B-16.pt.part", "notes.txt")
    for name in (*RUN_FILES, "checkpoint_last.pth.part", *others):
        (tmp_path / name).write_text("old")
    with pytest.raises(UserError, match="already contains a run"):  # another run wrote it meanwhile
        RunLog(tmp_path)
    assert content(tmp_path) == sorted((*RUN_FILES, LOCK, "checkpoint_last.pth.part", *others))
    with RunLog(tmp_path, overwrite=True) as log:
        log.line("new")
    assert content(tmp_path) == ["ViT-B-16.pt.part", LOCK, "notes.txt", "train.log"]
    assert all((tmp_path / name).read_text() == "old" for name in others)
    assert (tmp_path / "train.log").read_text() == "new\n"


def test_a_resumed_run_keeps_its_log_and_the_epochs_before_its_checkpoint(tmp_path):
    with RunLog(tmp_path) as log:
        log.line("first")
        for epoch in (1, 2, 3):
            log.epoch(record(epoch), 10 * epoch)
    for name in ("checkpoint_best.pth", "config.yaml"):
        (tmp_path / name).write_text("kept")
    (tmp_path / "checkpoint_last.pth.part").write_text("half a checkpoint")
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"epoch": 4, "r1": 1')  # the machine went down
    with RunLog(tmp_path, resume=Progress(epoch=2)) as log:
        log.line("second")
        log.epoch(record(3), 30)
    assert content(tmp_path) == ["checkpoint_best.pth", "config.yaml", LOCK, "metrics.jsonl", "train.log"]
    assert (tmp_path / "train.log").read_text() == "first\nsecond\n"
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [record(1), record(2), record(3)]


DAMAGES = {
    "changed": (2, lambda line: line[:10] + b"#" + line[10:]),
    "cut": (2, lambda line: line[:20] + b"\n"),
    "cut at the end": (4, lambda line: line[:20]),
    "without its line break": (4, lambda line: line.rstrip()),
    "after an empty line": (2, lambda line: b"\n" + line),
    "a number": (2, lambda _: b"5\n"),
    "nested": (2, lambda _: b"[" * 100_000 + b"\n"),
    "not UTF-8": (2, lambda line: line.replace(b"epoch", b"epo\xff", 1)),
    "a text instead of a number": (2, lambda line: line.replace(b'"r1": ', b'"r1": "high", "x": ')),
    "a list instead of an epoch": (2, lambda line: line.replace(b'"epoch": 2', b'"epoch": [2]')),
    "a number of 400 digits": (2, lambda line: line.replace(b'"r1": ', b'"r1": ' + b"9" * 400)),
}
"""For each damage, the line that it changes, and how."""


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_resumed_run_keeps_damaged_lines_and_all_others(tmp_path, damage, capsys):
    with RunLog(tmp_path) as log:
        for epoch in (1, 2, 3, 4):
            log.epoch(record(epoch), epoch)
    metrics, (number, change) = tmp_path / "metrics.jsonl", DAMAGES[damage]
    lines = metrics.read_bytes().splitlines(keepends=True)
    lines[number - 1] = change(lines[number - 1])
    metrics.write_bytes(b"".join(lines))
    with RunLog(tmp_path, resume=Progress(epoch=4)) as log:
        log.epoch(record(5), 5)
        log.curve()
    assert metrics.read_bytes() == b"".join(lines).rstrip() + b"\n" + json.dumps(record(5)).encode() + b"\n"
    assert (tmp_path / "curve.png").stat().st_size > 0
    harmless = damage in ("after an empty line", "without its line break")
    assert (f"warning: {metrics} is damaged in line {number}" in capsys.readouterr().out) != harmless


def test_a_damaged_line_does_not_keep_epochs_that_are_trained_again(tmp_path):
    metrics, lines = tmp_path / "metrics.jsonl", [json.dumps(record(epoch)) + "\n" for epoch in (1, 2, 3)]
    with RunLog(tmp_path):
        metrics.write_text("".join([*lines, "damaged\n"]))
    with RunLog(tmp_path, resume=Progress(epoch=1)):
        assert metrics.read_text() == lines[0] + "damaged\n"


def test_a_mutated_metrics_file_loses_no_line(tmp_path):
    draw, whole = random.Random(0), [json.dumps(record(epoch)).encode() + b"\n" for epoch in range(1, 7)]
    with RunLog(tmp_path):
        pass
    for _ in range(400):
        content = mutated(b"".join(whole), draw)
        (tmp_path / "metrics.jsonl").write_bytes(content)
        with RunLog(tmp_path, resume=Progress(epoch=4)):
            kept = (tmp_path / "metrics.jsonl").read_bytes()
        assert all(line in kept for line in whole[:4] if line in content)
        assert all(isinstance(each["r1"], int | float) for each in read_records(tmp_path / "metrics.jsonl"))


def test_metrics_that_cannot_be_read_are_one_clear_line(tmp_path, monkeypatch):
    (tmp_path / "metrics.jsonl").touch()
    monkeypatch.setattr(
        Path, "open", lambda *_: (_ for _ in ()).throw(PermissionError(errno.EACCES, "Permission denied"))
    )
    with pytest.raises(UserError, match=r"metrics\.jsonl cannot be read .Permission denied"):
        read_records(tmp_path / "metrics.jsonl")


def begin_run(folder: Path) -> None:
    try:
        RunLog(folder, overwrite=True)
    except UserError as error:
        print(error)


def other_run(folder: Path) -> str:
    """Starts a run in the folder from another process, and returns its error message."""
    ended = fork_server()([Call(begin_run, (folder,), dict(os.environ), ROOT)])
    assert ended.statuses == [0], ended.err
    return ended.out


def test_two_runs_do_not_write_into_one_folder(tmp_path):
    with RunLog(tmp_path) as log:
        log.line("mine")
        assert "another run is writing to" in other_run(tmp_path)
        assert (tmp_path / "train.log").read_text() == "mine\n"
    assert other_run(tmp_path) == ""  # the lock ended with its run


def test_a_warning_on_a_file_system_without_locks(tmp_path, monkeypatch, capsys):
    def without(*_, **__) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("misc.files.lock_descriptor", without)
    with RunLog(tmp_path) as log:
        log.line("written")
    assert (tmp_path / "train.log").read_text() == "written\n"
    assert re.search("warning: .* cannot be locked .No locks available", capsys.readouterr().out)


# ---- lines, numbers, curve ----------------------------------------------------------------------------------------


def test_lines_go_to_the_screen_and_to_the_log_immediately(tmp_path, capsys):
    with RunLog(tmp_path / "runs" / "one") as log:
        log.line("first")
        log.line("ε = 0.01\ntwo lines")
        written = (tmp_path / "runs" / "one" / "train.log").read_text(encoding="utf-8")
    assert written == capsys.readouterr().out == "first\nε = 0.01\ntwo lines\n"


def test_each_epoch_is_one_json_line(tmp_path):
    with RunLog(tmp_path) as log:
        for epoch in (1, 2):
            log.epoch(record(epoch), iteration=10 * epoch)
            lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
            assert len(lines) == epoch  # on the disk before the next epoch begins
    assert [json.loads(line) for line in lines] == [record(1), record(2)]


def test_an_epoch_that_cannot_be_recorded_stops_the_run(tmp_path):
    with RunLog(tmp_path) as log:
        (tmp_path / "metrics.jsonl").mkdir()
        with pytest.raises(OSError):
            log.epoch(record(1), 1)


def test_the_curve_shows_the_epochs_of_metrics_jsonl(tmp_path, monkeypatch):
    drawn = {}
    plot = Axes.plot

    def remember(axes, epochs, values, **options):
        drawn[options["label"]] = (list(epochs), list(values))
        return plot(axes, epochs, values, **options)

    monkeypatch.setattr(Axes, "plot", remember)
    with RunLog(tmp_path) as log:
        (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(record(epoch)) + "\n" for epoch in (1, 2, 3)))
        log.curve()
    epochs = [1, 2, 3]
    assert drawn == {
        "nitc": (epochs, [10.0, 20.0, 30.0]),
        "ritc": (epochs, [11.0, 21.0, 31.0]),
        "sum": (epochs, [12.0, 22.0, 32.0]),
        "R@1": (epochs, [14.0, 24.0, 34.0]),
        "R@5": (epochs, [15.0, 25.0, 35.0]),
        "R@10": (epochs, [16.0, 26.0, 36.0]),
        "mAP": (epochs, [17.0, 27.0, 37.0]),
        "mINP": (epochs, [18.0, 28.0, 38.0]),
    }
    with Image.open(tmp_path / "curve.png") as image:
        assert image.format == "PNG" and np.asarray(image.convert("L")).std() > 0


def use(log: RunLog) -> None:
    """Calls every method that a run calls."""
    log.line("a line")
    with log.progress(2, 0, "epoch 1") as bar:
        bar.update()
    log.scalars({"loss": 1.0}, 1)
    log.epoch(record(1), 2)
    log.curve()


def test_other_ranks_write_nothing(tmp_path, capfd):
    with RunLog(tmp_path / "run", is_main=False) as log:
        use(log)
    assert content(tmp_path) == [] and capfd.readouterr() == ("", "")


def test_without_a_folder_lines_go_to_the_screen_only(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with RunLog(None) as log:
        use(log)
    assert content(tmp_path) == [] and capsys.readouterr().out == "a line\n"


# ---- TensorBoard and wandb ----------------------------------------------------------------------------------------


class Recorder:
    """Replaces TensorBoard's writer and wandb's run, and records their calls."""

    def __init__(self):
        self.calls = []

    def __getattr__(self, name):
        return lambda *arguments, **options: self.calls.append((name, *arguments, *options.values()))


def install(monkeypatch, name: str, **content) -> None:
    """Makes `import name` return a module with this content."""
    module = ModuleType(name)
    module.__spec__ = ModuleSpec(name, None)
    vars(module).update(content)
    monkeypatch.setitem(sys.modules, name, module)


def test_tensorboard_gets_every_number_on_rank_0(tmp_path, monkeypatch):
    writer, folders = Recorder(), []
    install(monkeypatch, "tensorboard")
    install(monkeypatch, "torch.utils.tensorboard", SummaryWriter=lambda folder: (folders.append(folder), writer)[1])
    for is_main in (True, False):
        with RunLog(tmp_path, is_main=is_main, tensorboard=True) as log:
            log.scalars({"loss": 1.5, "loss_nitc": 0.5}, 7)
    assert folders == [str(tmp_path)]
    assert writer.calls == [("add_scalar", "loss", 1.5, 7), ("add_scalar", "loss_nitc", 0.5, 7), ("close",)]


def test_wandb_gets_the_configuration_and_every_number_on_rank_0(tmp_path, monkeypatch):
    run, started = Recorder(), []
    install(monkeypatch, "wandb", init=lambda **options: (started.append(options), run)[1])
    for is_main in (True, False):
        with RunLog(tmp_path, is_main=is_main, wandb_project="mine", run_id="abc", config={"device": "cpu"}) as log:
            log.epoch({"r1": 50.0}, 9)
    same_run = {"id": "abc", "resume": "allow"}
    assert started == [{"project": "mine", "dir": str(tmp_path), "config": {"device": "cpu"}, **same_run}]
    assert run.calls == [("log", {"epoch/r1": 50.0}, 9), ("finish", 0)]


@pytest.mark.parametrize("wanted", [{"tensorboard": True}, {"wandb_project": "mine"}], ids=["tensorboard", "wandb"])
def test_a_logger_that_is_not_installed_is_refused_before_anything_is_written(tmp_path, monkeypatch, wanted):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    name = next(iter(wanted)).removesuffix("_project")
    with pytest.raises(UserError, match=rf"log\.{name}.*pip install {name}"):
        RunLog(tmp_path / "run", **wanted)
    assert content(tmp_path) == []


def test_the_environment_names_the_wandb_project(monkeypatch):
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    assert wandb_project(False) is None and wandb_project(True)
    monkeypatch.setenv("WANDB_PROJECT", "people")
    assert wandb_project(False) == wandb_project(True) == "people"


def test_peak_memory_is_in_gigabytes():
    block = np.ones(50_000_000)  # 0.4 · 10⁹ bytes
    assert block.nbytes / 1e9 < peak_memory_gigabytes(torch.device("cpu")) < 100
