"""`make gpu` on the CPU: every part runs, finds what is wrong, and is written down; a failed part stops no other."""

import importlib.util
import json
import os
import runpy
import time
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from torch import nn

from benchmarks.gpu import correctness, report, runs
from benchmarks.gpu.context import Context, check, difference, distance
from model import transformer
from tests.helpers.ranks import fork_ranks

CPU = torch.device("cpu")


def launch_forks(context: Context, count: int, rows: int) -> dict:
    """Runs the ranks in forks of a process that has imported torch, instead of under torchrun."""
    file = context.folder / "ranks.pt"
    environment = dict(os.environ)
    ended = fork_ranks(count, runs.write_rank_result, (file, rows, "cpu"), environment)
    assert not any(ended.statuses), ended.err
    return torch.load(file, weights_only=True)


@pytest.fixture
def context(tmp_path) -> Context:
    return Context(CPU, tmp_path, time.monotonic() + 600)


@pytest.mark.slow
@pytest.mark.parametrize("part", report.PARTS)
def test_each_part_runs_and_is_written_down(part, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(runs, "launch", launch_forks)
    file = tmp_path / "gpu.json"
    assert report.main(["--only", part, "--device", "cpu", "--json", str(file)]) == 0
    written = json.loads(file.read_text())[part]
    assert written["status"] == "passed" and written["rows"]
    out = capsys.readouterr().out
    assert all(row["name"] in out for row in written["rows"])


def test_a_wrong_activation_is_found(context):
    with patch.object(transformer.QuickGELU, "forward", lambda self, x: nn.functional.gelu(x)):
        rows = list(correctness._encoders(context))
    assert not any(row["passed"] for row in rows)


def test_another_dropout_in_the_second_pass_is_found(context):
    seeds = iter(range(100))
    with patch("misc.training.trainer.derive_seed", lambda *key: next(seeds)):
        rows = list(correctness._chunks_with_dropout(context, 4, 2, "fp32", compiled=False))
    assert [row["passed"] for row in rows] == [False, False]


def test_nothing_that_is_not_a_number_or_has_another_shape_passes():
    assert not check("x", float("nan"), 1)["passed"]
    assert difference(torch.zeros(2), torch.zeros(3)) == float("inf")
    assert distance({"a": None}, {"a": torch.ones(2)}) == float("inf")
    assert distance({"a": torch.zeros(2), "b": None}, {"a": torch.ones(2), "b": None}) == 1


def run_parts(parts: dict, file: Path, seconds: int = 60) -> tuple[int, dict]:
    with patch.object(report, "PARTS", parts):
        status = report.run_parts(list(parts), CPU, seconds, file)
    return status, json.loads(file.read_text())


def good(context):
    yield {"name": "good", "passed": True}


def broken(context):
    yield {"name": "before"}
    raise RuntimeError("it broke")


def wrong(context):
    yield check("wrong", 2, 1)


def endless(context):
    yield {"name": "first"}
    while True:
        time.sleep(0.01)


def test_a_part_that_fails_is_written_and_the_next_goes_on(tmp_path, capsys):
    parts = {name.__name__: report.Part(name, 10) for name in (broken, wrong, good)}
    status, written = run_parts(parts, tmp_path / "gpu.json")
    assert status == 1
    assert [part["status"] for part in written.values()] == ["failed", "failed", "passed"]
    assert written["broken"]["rows"] == [{"name": "before"}]
    assert "it broke" in written["broken"]["error"] and "in broken" in written["broken"]["traceback"]
    out, err = capsys.readouterr()
    assert "failed: broken, wrong" in out and "RuntimeError: it broke" in err


def test_the_time_ends_a_part_and_the_rest_is_named(tmp_path):
    parts = {name.__name__: report.Part(name, 10) for name in (endless, good)}
    status, written = run_parts(parts, tmp_path / "gpu.json", seconds=1)
    assert status == 0  # nothing was found to be wrong
    assert written["endless"]["status"].startswith("cut off after") and written["endless"]["rows"]
    assert written["good"]["status"] == "skipped: the time is used up"


def test_results_are_written_while_a_part_runs(tmp_path):
    seen = []

    def looks(context):
        yield {"name": "first"}
        seen.append(json.loads((tmp_path / "gpu.json").read_text())["looks"])

    run_parts({"looks": report.Part(looks, 10)}, tmp_path / "gpu.json")
    assert seen == [{"status": "running", "rows": [{"name": "first"}]}]


def test_a_part_whose_package_is_missing_is_skipped_and_names_it(tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == report.VOCABULARY else find(name))
    status, written = run_parts({"good": report.Part(good, 10, (report.VOCABULARY,))}, tmp_path / "gpu.json")
    assert status == 0 and written["good"]["status"] == "skipped: install open_clip_torch"


def test_packages_that_every_part_needs_are_named_in_one_line(monkeypatch, capfd):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in ("easydict", "PIL") else find(name))
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("benchmarks.gpu", run_name="__main__")
    assert ended.value.code == 2
    assert capfd.readouterr().err == "error: packages are missing: run `pip install easydict pillow`\n"
