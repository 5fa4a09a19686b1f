"""Every command prints one line for a mistake of the user, and exits with status 2."""

import runpy
import sys

import pytest

import main
import search
from misc.data import back_translation
from tests.helpers.runs import ROOT, Outcome, only_error
from tests.test_imports import module_name, product_files

MISTAKES = (
    ("main.py", ["data.batch_size=0"], "data.batch_size: 0"),
    ("main.py", ["batch=4"], "'batch'"),
    ("main.py", ["--config", "missing.yaml"], "missing.yaml"),
    ("search.py", ["index", "missing", "--checkpoint", "clip.pt"], "missing"),
    ("search.py", ["query", "missing", "a woman in a red coat"], "missing"),
    ("search.py", ["serve", "missing"], "missing"),
    ("misc.data.audit", ["missing"], "missing"),
    ("misc.data.audit", [str(ROOT / "misc"), "--text_length", "0"], "--text_length 0"),
    ("misc.data.back_translation", ["missing.json", "new.json"], "missing.json"),
    ("misc.data.back_translation", ["raw.json", "new.json", "--batch-size", "0"], "--batch-size 0"),
    ("text_utils.back_translation", ["missing.json", "new.json"], "missing.json"),
    ("misc.pedestrians", ["new", "--height", "0"], "height is 0"),
    ("misc.pedestrians", [str(ROOT)], "contains something other"),
    ("misc.pedestrians", [str(ROOT / "main.py" / "new")], "main.py is not a folder"),
    ("benchmarks", ["--batch", "0"], "--batch 0"),
    ("benchmarks", ["--rounds", "0"], "--rounds 0"),
    ("benchmarks", ["--device", "abacus"], "--device abacus"),
    ("benchmarks", ["--device", "cpu", "--precision", "fp16"], "--precision fp16"),
    ("benchmarks", ["--json", "missing/benchmarks.json"], "missing/benchmarks.json"),
    ("benchmarks", ["batch=4"], "'batch'"),
    ("benchmarks.chunks", ["--chunks", "8", "0"], "--chunks 0"),
    ("benchmarks.chunks", ["--steps", "0"], "--steps 0"),
    ("benchmarks.chunks", ["--json", "."], "--json ."),
    ("benchmarks.chunks", ["batch=4"], "'batch'"),
    ("benchmarks.gpu", ["--seconds", "0"], "--seconds 0"),
    ("benchmarks.gpu", ["--device", "abacus"], "--device abacus"),
    ("benchmarks.gpu", ["--json", "missing/gpu.json"], "missing/gpu.json"),
    ("benchmarks.search", ["--pictures", "0"], "--pictures 0"),
    ("benchmarks.search", ["--width", "0"], "--width 0"),
    ("benchmarks.search", ["--folder", "missing"], "missing"),
    ("benchmarks.search", ["--json", "missing/search.json"], "missing/search.json"),
)
"""Commands, arguments with a mistake, and the part of the message that names it."""
WITHOUT_ARGUMENTS = {"image/draw_method.py", "misc.commands.demo"}


@pytest.mark.parametrize(
    ("parse", "words"),
    [
        (main.parse_arguments, ["--config", "~/a", "--evaluate", "~/a", "--against", "~/a", "--out", "~/a"]),
        (main.parse_arguments, ["--contribution", "~/a"]),
        (main.parse_arguments, ["--export", "onnx", "~/a"]),
        (search.parse, ["index", "~/a", "--index", "~/a", "--checkpoint", "~/a", "--qdrant", "~/a"]),
        (search.parse, ["query", "~/a", "--image", "~/a", "--sheet", "~/a", "--qdrant", "~/a"]),
        (back_translation._parse, ["~/a", "~/a", "--to-french", "~/a", "--to-english", "~/a"]),
    ],
)
def test_the_home_folder_is_expanded_in_every_path(parse, words, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["command", *words])
    options = parse() if parse is main.parse_arguments else parse(None)
    assert str(vars(options)).count(f"{tmp_path}/a'") == words.count("~/a")


def test_an_empty_path_is_refused(monkeypatch, capsys):
    """Of a variable of the shell that is not set. Without --evaluate, a training would start."""
    monkeypatch.setattr(sys, "argv", ["main.py", "--evaluate", ""])
    with pytest.raises(SystemExit) as stopped:
        main.parse_arguments()
    assert stopped.value.code == 2 and "--evaluate: the path is empty" in capsys.readouterr().err


def run_command(command: str) -> int:
    """Runs a script or a module in this process, and returns its exit status."""
    with pytest.raises(SystemExit) as stopped:
        if command.endswith(".py"):
            runpy.run_path(str(ROOT / command), run_name="__main__")
        else:
            runpy.run_module(command, run_name="__main__")
    return stopped.value.code


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")  # another test has imported the module
@pytest.mark.parametrize(("command", "arguments", "mistake"), MISTAKES)
def test_a_mistake_is_one_line_and_status_2(command, arguments, mistake, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [command, *arguments])
    line = only_error(Outcome(run_command(command), *capfd.readouterr()))
    assert mistake in line
    assert list(tmp_path.iterdir()) == []


def test_every_command_is_tried():
    commands = set()
    for path in product_files(ROOT):
        if path.name == "__main__.py":
            commands.add(module_name(path.parent))
        elif 'if __name__ == "__main__":' in (ROOT / path).read_text(encoding="utf-8"):
            is_script = len(path.parts) == 1 or not (ROOT / path.parent / "__init__.py").exists()
            commands.add(str(path) if is_script else module_name(path))
    assert commands == {command for command, _, _ in MISTAKES} | WITHOUT_ARGUMENTS
