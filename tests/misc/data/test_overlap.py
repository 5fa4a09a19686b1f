"""People and files that two splits share."""

from pathlib import Path

import pytest

from misc.data.overlap import identical_files, overlap_lines, shared_source


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


@pytest.fixture
def files(tmp_path) -> dict[str, Path]:
    """`a`, `b` and `c` have the same content; `d` has the same size; `e` is alone."""
    contents = {"a": b"same", "b": b"same", "c": b"same", "d": b"else", "e": b"longer"}
    return {name: write(tmp_path / name, content) for name, content in contents.items()}


def groups(files: dict[str, Path], **names: str) -> dict[str, list[Path]]:
    return {group: [files[name] for name in members] for group, members in names.items()}


def test_files_with_the_same_content_in_two_groups_are_found(files):
    found = identical_files(groups(files, one="ade", two="be", three="c"))
    named = sorted([(group, path.name) for group, path in same] for same in found)
    assert named == [[("one", "a"), ("two", "b"), ("three", "c")], [("one", "e"), ("two", "e")]]


def test_the_same_content_within_one_group_is_not_an_overlap(files):
    assert identical_files(groups(files, one="ab", two="de")) == []


def test_only_files_of_the_same_size_are_read(files, monkeypatch):
    read = []
    read_bytes = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: read.append(path.name) or read_bytes(path))
    identical_files(groups(files, one="ae", two="d"))
    assert sorted(read) == ["a", "d"]


def test_missing_files_are_skipped(files, tmp_path):
    one, two = groups(files, one="a", two="b").values()
    assert len(identical_files({"one": [tmp_path / "none", *one], "two": [tmp_path / "none", *two]})) == 1


def test_each_pair_of_groups_has_a_line_with_its_number_and_an_example(files):
    lines = overlap_lines(groups(files, three="e", one="ade", two="bce"))
    same = "warning: the same image files in"
    assert sorted(lines) == [
        f"{same} one and in two: 2, for example {files['e']} and {files['e']}",
        f"{same} three and in one: 1, for example {files['e']} and {files['e']}",
        f"{same} three and in two: 1, for example {files['e']} and {files['e']}",
    ]
    (line,) = overlap_lines(groups(files, one="da", two="bc"))
    assert line.endswith(f"1, for example {files['a']} and {files['b']}")


def test_datasets_that_were_cut_from_the_same_one_are_known():
    assert shared_source("ICFG-PEDES", "RSTPReid") == shared_source("RSTPReid", "ICFG-PEDES") == "MSMT17"
    for pair in (("RSTPReid", "RSTPReid"), ("CUHK-PEDES", "RSTPReid"), (None, None), ("x", "y"), (None, "RSTPReid")):
        assert shared_source(*pair) is None
