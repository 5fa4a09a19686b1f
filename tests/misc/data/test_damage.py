"""Damaged annotations, and those of other people: read, or refused in one short line."""

import json
import random
from pathlib import Path
from typing import Any

import pytest

from misc.data.annotations import read_annotations, read_captions
from misc.errors import UserError
from tests.helpers.mutations import mutated

ENTRIES = [
    {
        "split": split,
        "id": number,
        "file_path": f"cam_a/{number}.jpg",
        "captions": [f"A man in a red coat, number {number}.", "é & ü"],
        "captions_bt": ["A man with a red coat.", None],
    }
    for number, split in enumerate(("train", "train", "val", "test", "test"), start=1)
]
ODD = [None, True, -1, 2.5, 10**400, float("nan"), "", "..", "/x", "a\0b", "\ud800", "n" * 20_000, [], {}, [[]]]


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / "imgs").mkdir()
    return tmp_path


def read(folder: Path, content: bytes, **options: Any) -> bool:
    """Returns whether an annotation of this content is read. If not, it is refused in one line."""
    (folder / "reid_raw.json").write_bytes(content)
    try:
        read_annotations(folder, folder / "imgs", **options)
        read_captions(folder / "reid_raw.json")
    except UserError as error:
        assert len(str(error)) <= 1500 and len(str(error).splitlines()) == 1
        return False
    return True


def test_a_mutated_annotation_is_read_or_refused(folder):
    content, draw = json.dumps(ENTRIES, indent=1).encode(), random.Random(0)
    assert read(folder, content)
    found = [read(folder, mutated(content, draw)) for _ in range(300)]
    assert 50 < sum(found) < 250


def test_a_mutated_file_of_back_translations_is_read_or_refused(folder):
    entries = [{"file_path": entry["file_path"], "captions_bt": entry["captions_bt"]} for entry in ENTRIES]
    content, draw, found = json.dumps(entries).encode(), random.Random(0), []
    for _ in range(300):
        (folder / "bt.json").write_bytes(mutated(content, draw))
        found.append(read(folder, json.dumps(ENTRIES).encode(), back_translation_file=folder / "bt.json"))
    assert 50 < sum(found) < 250


@pytest.mark.parametrize("field", [*ENTRIES[0], None])
def test_a_field_of_an_odd_type_is_read_or_refused(folder, field):
    for value in ODD:
        changed = value if field is None else ENTRIES[0] | {field: value}
        read(folder, json.dumps([changed, *ENTRIES[1:]]).encode())
        if field in ("captions", "captions_bt"):
            read(folder, json.dumps([ENTRIES[0] | {field: [value]}, *ENTRIES[1:]]).encode())


@pytest.mark.parametrize("content", ["[" * 100_000, '[{"a":' * 100_000, "[" + "9" * 5000 + "]"])
def test_content_that_is_too_deep_or_too_long_is_refused(folder, content):
    assert not read(folder, content.encode())
