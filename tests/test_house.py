"""What is written once stays written once, and code cites only documents that exist."""

import ast
import re

import pytest

from misc.run.folder import RUN_FILES
from tests.helpers.runs import ROOT
from tests.test_imports import product_files

PRODUCT = [path for path in product_files(ROOT) if path.parts[0] not in ("benchmarks", "image")]
"""The files of the project itself, relative to its root."""


def strings(text: str) -> set[str]:
    """The string constants of a program, without docstrings and comments."""
    tree = ast.parse(text)
    documents = {
        id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    }
    constants = [node for node in ast.walk(tree) if isinstance(node, ast.Constant) and id(node) not in documents]
    return {node.value for node in constants if isinstance(node.value, str)}


def repeated_run_files(text: str) -> set[str]:
    # Configuration files have the name of a run's own copy, and the demo reads a run before anything is installed.
    return strings(text) & (set(RUN_FILES) - {"config.yaml"})


def path_questions(text: str) -> set[str]:
    """Calls in a program that raise an error for a path that cannot be accessed, or cannot exist."""
    asked = {"exists", "expanduser", "glob", "is_dir", "is_file", "is_symlink", "resolve", "rglob"}
    calls = [node.func for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Call)]
    return {call.attr for call in calls if isinstance(call, ast.Attribute) and call.attr in asked}


def cited_documents(text: str) -> set[str]:
    """Names of documents in a program: Markdown files, and specifications by their name."""
    return set(re.findall(r"[\w./-]+\.md\b|\bSPEC\b", text))


def test_names_of_run_files_are_only_in_one_place():
    allowed = {"misc/run/folder.py", "misc/commands/demo.py"}
    found = {str(path): repeated_run_files((ROOT / path).read_text(encoding="utf-8")) for path in PRODUCT}
    assert {path for path, names in found.items() if names} == allowed


def test_existing_paths_are_refused_in_only_one_place():
    found = {str(path) for path in PRODUCT if "already exists:" in (ROOT / path).read_text(encoding="utf-8")}
    assert found == {"misc/files.py"}


def test_paths_on_a_command_line_may_begin_with_the_home_folder():
    """`type=Path` would make a folder named ~."""
    assert [str(path) for path in PRODUCT if "type=Path" in (ROOT / path).read_text(encoding="utf-8")] == []


def test_only_one_file_asks_about_paths():
    """`Path.is_file` and others raise an error for a name that is too long, a link in a circle, a closed folder."""
    found = {str(path): path_questions((ROOT / path).read_text(encoding="utf-8")) for path in PRODUCT}
    entries = "misc/search/pictures.py"  # entries of a folder, within one handler of errors
    assert {path for path, names in found.items() if names} <= {"misc/files.py", entries}


def test_code_cites_only_documents_that_exist():
    files = [ROOT / path for path in product_files(ROOT)] + sorted((ROOT / "tests").rglob("*.py"))
    files = [path for path in files if path.name not in ("test_house.py", "test_documents.py")]
    cited = {(path.name, name) for path in files for name in cited_documents(path.read_text(encoding="utf-8"))}
    missing = {pair for pair in cited if not (ROOT / pair[1]).is_file() and not (ROOT / "docs" / pair[1]).is_file()}
    written = {"report.md", "across_datasets.md"}  # by the study, and by an evaluation
    assert {pair for pair in missing if pair[1] not in written} == set()


@pytest.mark.parametrize(
    ("find", "text", "found"),
    [
        (repeated_run_files, '"""Writes train.log."""\nname = "train.log"\n', {"train.log"}),
        (path_questions, "if path.parent.is_file() and exists(path):\n    pass\n", {"is_file"}),
        (cited_documents, "# as SPEC section 5 and docs/nothing.md say", {"SPEC", "docs/nothing.md"}),
    ],
)
def test_a_fault_is_found(find, text, found):
    assert find(text) == found
