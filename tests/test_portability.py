"""Windows and macOS: nothing that only Unix has is needed, and every text file is read and written as UTF-8."""

import ast
import os
import pickle
import re
import signal
import sys
from pathlib import Path

import pytest
import torch

from tests.helpers.elsewhere import MODULES, NAMES, without_unix
from tests.helpers.fork_server import ROOT, Call
from tests.helpers.ranks import fork_server
from tests.helpers.runs import EVERYTHING, environment, of_dataset
from tests.helpers.searching import GELU
from tests.helpers.tiny_dataset import TinyDataset
from tests.test_imports import imported_modules, module_name, product_files, room_of

UNIX_ONLY = {f"{module.__name__}.{name}" for module, names in NAMES.items() for name in names.split()}
IF_THERE = {
    ("misc/data/workers.py", "os.setpgrp"),
    ("misc/data/workers.py", "signal.pthread_sigmask"),
    ("misc/data/workers.py", "signal.SIGCHLD"),
    ("misc/data/workers.py", "signal.sigwaitinfo"),
    ("misc/files.py", "os.register_at_fork"),
    ("misc/run/profiling.py", "resource"),
    ("misc/search/connections.py", "resource"),
}
"""Names of Unix in the product. Each is only used where it exists."""
PACKAGES = {"PIL": "pillow", "open_clip": "open_clip_torch", "yaml": "pyyaml"}
"""Packages whose modules have another name."""


def unix_names(text: str) -> set[str]:
    """Modules and names in a program that only Unix has."""
    found = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names} & set(MODULES)
        elif isinstance(node, ast.ImportFrom):
            found |= {str(node.module)} & set(MODULES)
            found |= {f"{node.module}.{alias.name}" for alias in node.names} & UNIX_ONLY
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            found |= {f"{node.value.id}.{node.attr}"} & UNIX_ONLY
    return found


def without_encoding(text: str) -> list[int]:
    """Lines of a program that open a text file in the encoding of the system."""
    lines = []
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, ast.Call):
            continue
        method = node.func.attr if isinstance(node.func, ast.Attribute) else None
        builtin = isinstance(node.func, ast.Name) and node.func.id == "open"
        if not builtin and method not in ("open", "read_text", "write_text"):
            continue
        owner = node.func.value.id if method and isinstance(node.func.value, ast.Name) else None
        if owner in ("Image", "os"):
            continue
        named = {keyword.arg: keyword.value for keyword in node.keywords}
        values = [*node.args[int(builtin) :], *([named["mode"]] if "mode" in named else [])]
        modes = {value.value for value in values if isinstance(value, ast.Constant) and isinstance(value.value, str)}
        binary = method in (None, "open") and any("b" in mode and len(mode) <= 3 for mode in modes)
        if "encoding" not in named and not binary:
            lines.append(node.lineno)
    return lines


def test_names_of_unix_are_only_used_where_they_exist():
    files = [path for path in product_files(ROOT) if path.parts[0] != "benchmarks"]
    found = {(path.as_posix(), name) for path in files for name in unix_names((ROOT / path).read_text("utf-8"))}
    assert found == IF_THERE


def test_text_files_are_in_utf_8():
    found = {path.as_posix(): without_encoding((ROOT / path).read_text("utf-8")) for path in product_files(ROOT)}
    assert {path: lines for path, lines in found.items() if lines} == {}


@pytest.mark.parametrize(
    ("find", "text", "found"),
    [
        (unix_names, "import fcntl\nimport os\n", {"fcntl"}),
        (unix_names, "from resource import getrusage\n", {"resource"}),
        (unix_names, "from os import fork\n", {"os.fork"}),
        (unix_names, "import signal\ndef f():\n    signal.sigwaitinfo({1})\n", {"signal.sigwaitinfo"}),
        (without_encoding, "open(path)\n", [1]),
        (without_encoding, "open(path, mode='w')\n", [1]),
        (without_encoding, "path.open('a', buffering=1)\n", [1]),
        (without_encoding, "path.read_text()\npath.write_text('b')\n", [1, 2]),
        (
            without_encoding,
            "path.open('rb')\nopen(path, 'r+b')\nImage.open(path)\npath.read_text(encoding='utf-8')",
            [],
        ),
    ],
)
def test_a_fault_is_found(find, text, found):
    assert find(text) == found


def use_everything(data: TinyDataset, clip: Path, people: Path, folder: Path) -> None:
    """Trains two steps with a loader worker, resumes, evaluates, indexes and queries."""
    assert sys.modules["fcntl"] is None and not hasattr(os, "fork")
    import main
    import search
    from misc.data.workers import outlive_signals
    from misc.search.encoder import load_encoder
    from misc.search.pictures import PictureSet
    from misc.training.trainer import Trainer

    own = [*EVERYTHING, *of_dataset(data), f"model.saved_path={folder / 'run'}", "schedule.epoch=1"]

    def call(*arguments: str) -> int:
        sys.argv = ["main.py", *own, *arguments]
        return main.main()

    step, steps = Trainer.step, []

    def stopped(*arguments):
        steps.append(arguments)
        if len(steps) == 2:
            signal.raise_signal(signal.SIGTERM)
        return step(*arguments)

    Trainer.step = stopped
    assert call("data.num_workers=1") == 143 and len(steps) == 2
    Trainer.step = step
    assert call("--resume") == 0
    assert call("--evaluate", str(folder / "run" / "checkpoint_best.pth"), "--sheet", "1") == 0
    for _ in range(2):
        added = ("--checkpoint", str(clip), "--set", GELU, "--workers", "0")
        assert search.main(["index", str(people), *added]) == 0
        (people / "a.jpg").write_bytes((people / "deep" / "e.jpg").read_bytes())
    assert search.main(["query", str(people), "a woman in a red coat"]) == 0
    pickle.dumps((PictureSet(people, [], load_encoder(str(clip), [GELU], torch.device("cpu")).view), outlive_signals))


@pytest.mark.slow
def test_training_resuming_evaluating_and_searching_need_nothing_of_unix(data, clip, people, tmp_path):
    call = Call(without_unix, (use_everything, data, clip, people, tmp_path), environment(), ROOT)
    ended = fork_server()([call])
    assert ended.statuses == [0], ended.out + ended.err
    assert "cannot be locked" not in ended.out
    assert (tmp_path / "run" / "train.log").read_text("utf-8").count("resumed in epoch 1, after step 2") == 1


def requirements(name: str) -> set[str]:
    """The packages in a file of requirements, without those of files that it includes."""
    lines = (ROOT / name).read_text("utf-8").splitlines()
    return {re.split(r"[<>=~!;\[ ]", line)[0].lower() for line in lines if line and not line.startswith(("#", "-"))}


def packages_of(path: Path) -> set[str]:
    """Packages of others that a file imports when it is imported."""
    tree = ast.parse((ROOT / path).read_text("utf-8"))
    names = [alias.name for node in tree.body if isinstance(node, ast.Import) for alias in node.names]
    names += [str(node.module) for node in tree.body if isinstance(node, ast.ImportFrom)]
    tops = {name.partition(".")[0] for name in names} - sys.stdlib_module_names
    return {PACKAGES.get(top, top) for top in tops if room_of(top) is None}


def test_training_needs_only_the_packages_of_requirements_txt():
    modules, pending = set(), ["main"]
    while pending:
        name = pending.pop()
        modules.add(name)
        path = Path(*name.split("."))
        file = path.with_suffix(".py") if (ROOT / path).with_suffix(".py").is_file() else path / "__init__.py"
        pending += set(imported_modules(ROOT, file)) - modules if (ROOT / file).is_file() else ()
    files = [path for path in product_files(ROOT) if module_name(path) in modules]
    assert len(files) > 50
    assert set().union(*map(packages_of, files)) <= requirements("requirements.txt")
