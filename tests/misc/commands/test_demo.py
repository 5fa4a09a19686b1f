"""`make demo`: what a newcomer sees while its phases run, with quick commands in place of the real ones."""

import ast
import importlib.util
import json
import shutil
import subprocess
import sys

import pytest

from misc.commands import demo
from misc.commands.demo import Phase, phases, run_demo
from tests.helpers.runs import ROOT

RECORDS = [
    {"initial_r1": 0.5, "initial_r5": 2.0, "initial_r10": 4.0, "initial_mAP": 1.0, "initial_mINP": 0.25, "r1": 40.0},
    {"r1": 55.0, "r5": 80.0, "r10": 88.0, "mAP": 54.0, "mINP": 39.0},
    {"r1": 54.0, "r5": 81.0, "r10": 89.0, "mAP": 55.0, "mINP": 40.0},
]


@pytest.fixture
def finished_run(tmp_path):
    """The metrics that a training has left."""
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    return tmp_path


def python(code: str, name: str = "train", seconds: int = 60) -> Phase:
    return Phase(name, f"pretends to {name}", seconds, (sys.executable, "-c", code))


def test_the_result_stands_beside_the_untrained_model_with_the_time_of_each_phase(finished_run, capfd):
    assert run_demo([python("print('drawing')", "draw"), python("print('epoch 1')")], finished_run) == 0
    out = capfd.readouterr().out
    assert out.index("about 2.0 minutes") < out.index("[1/2] draw") < out.index("drawing") < out.index("epoch 1")
    rows = {line.split()[0]: line.split()[1:] for line in out.splitlines() if line.startswith(("untrained", "trained"))}
    assert rows == {
        "untrained": ["0.50", "2.00", "4.00", "1.00", "0.25"],
        "trained": ["55.00", "80.00", "88.00", "54.00", "39.00"],  # the epoch of the best R@1
    }
    assert "Time: draw 0 s, train 0 s" in out
    assert str(finished_run / "retrieval.png") in out and "search.py serve data/pedestrians/imgs" in out


def test_a_phase_that_fails_ends_the_demo(finished_run, capfd):
    plan = [
        python("import sys; print('error: no room', file=sys.stderr); sys.exit(2)", "draw"),
        python("print('never')"),
    ]
    assert run_demo(plan, finished_run) == 2
    out = capfd.readouterr().out
    assert "error: no room" in out and "error: the phase draw ended with status 2" in out and "never" not in out


def test_a_silent_phase_is_reported_as_running(finished_run, capfd, monkeypatch):
    monkeypatch.setattr(demo, "SILENCE", 1)
    assert run_demo([python("import time; time.sleep(3.5)")], finished_run) == 0
    assert capfd.readouterr().out.count("... train: ") >= 2


def test_the_forecast_follows_the_speed_of_drawing(finished_run):
    plan = [python("", "install", 75), python("", "draw", 50), python("", "train", 150)]
    assert demo._forecast(plan, {"install": 20}) == ""
    assert demo._forecast(plan, {"install": 20, "draw": 100}) == " (about 300 s here)"
    assert demo._forecast(plan, {"install": 20, "draw": 1}) == " (about 150 s here)"  # the people were drawn before


def test_it_runs_before_anything_is_installed():
    """The command, the packages that it is in, and the two modules that it imports need nothing but Python."""
    own = ("misc.terminal", "misc.errors")
    files = (
        "misc/__init__.py",
        "misc/commands/__init__.py",
        "misc/commands/demo.py",
        "misc/terminal.py",
        "misc/errors.py",
    )
    for node in [node for file in files for node in ast.walk(ast.parse((ROOT / file).read_text(encoding="utf-8")))]:
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module] if isinstance(node, ast.ImportFrom) else []
        assert all(name in own or name.partition(".")[0] in sys.stdlib_module_names for name in names), names


def test_its_commands_exist():
    install, draw, train = phases("python3.12", make=True)
    assert ".venv/installed:" in (ROOT / "Makefile").read_text() and install.command[-1] == "PYTHON=python3.12"
    assert importlib.util.find_spec(draw.command[2]) is not None
    assert all((ROOT / name).is_file() for name in train.command if name.endswith((".py", ".yaml")))


def test_it_needs_neither_make_nor_torchrun(monkeypatch):
    """As on Windows. What is trained is the same."""
    create, install, draw, train = phases("py", make=False, windows=True)
    assert create.command == ("py", "-m", "venv", ".venv")
    assert all((ROOT / name).is_file() for name in install.command if name.endswith(".txt"))
    with_torchrun = phases("py", make=True, windows=False)[-1].command
    assert train.command[train.command.index("main.py") :] == with_torchrun[with_torchrun.index("main.py") :]
    assert all("make" not in phase.command and "torchrun" not in phase.command[0] for phase in (install, draw, train))


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_a_python_that_is_too_old_is_one_clear_line(tmp_path):
    """Its syntax may be unknown to that Python, so it is refused before the demo starts."""
    old = tmp_path / "python3.8"
    old.write_text(
        '#!/bin/sh\n[ "$1" = --version ] && echo Python 3.8.0 && exit 0\n[ "$1" = -c ] && exit 1\necho started\n'
    )
    old.chmod(0o755)
    ended = subprocess.run(["make", "demo", f"PYTHON={old}"], cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 2
    assert ended.stdout.splitlines() == [
        "error: Python 3.8.0 is too old, 3.10 or newer is needed: make PYTHON=python3.12 ..."
    ]
