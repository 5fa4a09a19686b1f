"""Damaged indexes, and those of other people: right results or one line, and `index` repairs what is damaged."""

import json
import os
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from misc.errors import UserError
from misc.search.engine import Exact
from misc.search.gallery import DamagedIndex, Encoded, Gallery, default_index, open_gallery
from misc.search.pictures import Picture
from misc.search.searcher import Query, Searcher
from tests.helpers.mutations import mutated
from tests.helpers.runs import only_error
from tests.helpers.searching import GELU, encoder_of, features_one_by_one, gallery_of, paths_of, write_clip

FEATURES, PICTURES = "features_1.npy", "pictures_1.jsonl"


@pytest.fixture(scope="module")
def indexed(tmp_path_factory, clip) -> Path:
    """A folder of pictures with its index, which tests copy."""
    import search
    from tests.helpers.searching import write_people

    folder = write_people(tmp_path_factory.mktemp("indexed") / "people")
    assert search.main(["index", str(folder), "--checkpoint", str(clip), "--set", GELU, "--workers", "0"]) == 0
    return folder


@pytest.fixture
def people(indexed, tmp_path) -> Path:
    """A copy of the folder and its index that a test may change."""
    for source in (indexed, default_index(indexed)):
        shutil.copytree(source, tmp_path / source.name)
    return tmp_path / indexed.name


def change_info(index: Path, **values) -> None:
    content = json.loads((index / "index.json").read_text())
    (index / "index.json").write_text(json.dumps(content | values))


def make_old(index: Path) -> None:
    """Turns an index into one of format 1, which has no checksums."""
    content = json.loads((index / "index.json").read_text())
    del content["checksums"]
    (index / "index.json").write_text(json.dumps(content | {"format": 1}))


def flip_bit(file: Path, position: int) -> None:
    content = bytearray(file.read_bytes())
    content[position] ^= 1
    file.write_bytes(content)


DAMAGES = {
    "a bit of a feature": lambda index: flip_bit(index / FEATURES, -100),
    "a bit of the header": lambda index: flip_bit(index / FEATURES, 12),
    "a bit of a path": lambda index: flip_bit(index / PICTURES, 3),
    "a bit of the JSON": lambda index: flip_bit(index / PICTURES, 0),
    "a list that is empty": lambda index: (index / PICTURES).write_bytes(b""),
    "features that are missing": lambda index: (index / FEATURES).unlink(),
    "a list that is missing": lambda index: (index / PICTURES).unlink(),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_an_index_that_is_damaged_is_reported_and_repaired(people, call_search, clip, damage):
    DAMAGES[damage](default_index(people))
    assert "is damaged (" in only_error(call_search("query", people, "red"))
    outcome = call_search("index", people, "--workers", "0")
    assert outcome.status == 0 and "7 new or changed" in outcome.out, outcome.err
    assert f"warning: {default_index(people)} was damaged (" in outcome.out
    assert "all pictures were encoded again" in outcome.out and "index the folder again" not in outcome.out
    expected = features_one_by_one(people, clip, paths_of(people))
    torch.testing.assert_close(gallery_of(people).features, expected, rtol=0, atol=1e-5)
    assert "0 new or changed" in call_search("index", people, "--workers", "0").out


@pytest.mark.parametrize(
    ("field", "value"),
    [("engine", value) for value in (None, {}, [], {"name": "other"}, {"name": []}, {"name": "qdrant"})]
    + [("width", value) for value in (None, "4", True, 0, -1, 1.0, 1 << 70)]
    + [("generation", "1"), ("pictures", None), ("checkpoint", 3), ("overrides", "a"), ("overrides", [1])]
    + [("fingerprint", None), ("checksums", []), ("checksums", {FEATURES: "1"})],
)
def test_values_of_a_wrong_type_are_one_line(people, call_search, field, value):
    change_info(default_index(people), **{field: value})
    for command in (("query", people, "red"), ("index", people)):
        assert f"index.json has an invalid value for {field}" in only_error(call_search(*command))


@pytest.mark.parametrize("content", ["[" * 100_000, '{"format": []}', '{"format": {}, "width": 1}', "\ud800"])
def test_content_that_is_no_index_is_one_line(people, call_search, content):
    (default_index(people) / "index.json").write_bytes(content.encode("utf-8", "surrogatepass"))
    assert "index.json" in only_error(call_search("query", people, "red")) or "format" in content


def test_after_the_advice_for_damaged_content_the_folder_is_indexed_again(people, call_search, clip):
    """`index.json` is never replaced if it is not known to be ours; the other files of an index do not matter."""
    index = default_index(people)
    (people / "text.jpg").write_text("no image")
    for command in (("index", people, "--workers", "0"), ("query", people, "red")):
        assert call_search(*command).status == 0
    assert {"unreadable.jsonl", "sheets"} < {path.name for path in index.iterdir()}
    (index / "index.json").write_text("{")
    anew = ("index", people, "--checkpoint", clip, "--set", GELU, "--workers", "0")
    assert "remove it and index the folder again" in only_error(call_search(*anew))
    (index / "index.json").unlink()
    assert call_search(*anew).status == 0
    assert "7 pictures" in call_search("index", people, "--workers", "0").out
    (index / "index.json").unlink()
    (index / "mine.txt").touch()
    assert "contains other files (mine.txt)" in only_error(call_search(*anew))


def test_an_index_without_checksums_is_searched_and_gets_them(people, call_search):
    expected = call_search("query", people, "red").out
    make_old(default_index(people))
    assert call_search("query", people, "red").out == expected
    assert "0 new or changed" in call_search("index", people, "--workers", "0").out
    assert open_gallery(default_index(people)).info.checksums.keys() == {FEATURES, PICTURES}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0, 100.0])
def test_an_index_without_checksums_has_only_finite_features(people, call_search, value):
    make_old(default_index(people))
    features = np.load(default_index(people) / FEATURES)
    features[3] = value
    np.save(default_index(people) / FEATURES, features)
    assert "row 3 has an invalid feature" in only_error(call_search("query", people, "red"))
    assert "7 new or changed" in call_search("index", people, "--workers", "0").out


@pytest.mark.parametrize(
    "line", ['["../a.jpg", 1, 1]', '["/etc/passwd", 1, 1]', '["a/../../b", 1, 1]', '["", 1, 1]', '["a.jpg", 1, null]']
)
def test_a_path_that_leads_out_of_the_folder_is_refused(people, line):
    make_old(default_index(people))
    lines = (default_index(people) / PICTURES).read_text().splitlines()
    (default_index(people) / PICTURES).write_text("\n".join([line, *lines[1:]]) + "\n")
    with pytest.raises(DamagedIndex, match=f"line 1 of {PICTURES} is invalid"):
        list(open_gallery(default_index(people)).pictures())


def test_features_that_are_cut_while_they_are_searched_are_reported(people, clip):
    """The system would end a process that reads beyond the end of a mapped file."""
    searcher = Searcher(people, default_index(people), encoder_of(clip))
    content = (default_index(people) / FEATURES).read_bytes()
    os.truncate(default_index(people) / FEATURES, 0)
    with pytest.raises(DamagedIndex):
        searcher.search([Query("red")])
    (default_index(people) / FEATURES).write_bytes(content)
    (found,) = searcher.search([Query("red")])
    assert len(found) == 7


def test_a_checkpoint_that_was_replaced_is_named(people, call_search, tmp_path):
    weights = write_clip(tmp_path / "best.pt", seed=1)
    given = ("--checkpoint", weights, "--set", "model.activation=gelu")
    assert call_search("index", people, *given, "--workers", "0", "--overwrite").status == 0
    write_clip(weights, seed=2)
    assert f"{weights} has changed since" in only_error(call_search("query", people, "red"))
    assert "--overwrite" in only_error(call_search("index", people, "--workers", "0"))
    assert call_search("index", people, "--workers", "0", "--overwrite").status == 0
    assert call_search("query", people, "red").status == 0


# ---- mutations ------------------------------------------------------------------------------------------------------


def read(index: Path) -> tuple:
    """Reads everything in an index."""
    gallery: Gallery = open_gallery(index)
    pictures = list(gallery.pictures())
    rows = [gallery.row_of(picture.path) for picture in pictures]
    ((scores, found),) = Exact(gallery.features).search(torch.full((1, gallery.info.width), 0.1), 7)
    return pictures, rows, gallery.features.tolist(), scores.tolist(), found.tolist()


@pytest.mark.parametrize("name", ["index.json", FEATURES, PICTURES])
def test_a_mutated_index_gives_right_results_or_one_line(people, name):
    index, draw = default_index(people), random.Random(name)
    expected, content, refused = read(index), (index / name).read_bytes(), 0
    for _ in range(150):
        (index / name).write_bytes(mutated(content, draw))
        try:
            assert read(index) == expected
        except UserError:
            refused += 1
    assert refused > 30


@pytest.mark.parametrize("name", ["index.json", FEATURES, PICTURES])
def test_a_mutated_index_without_checksums_has_no_traceback(people, name):
    index, draw = default_index(people), random.Random(name)
    make_old(index)
    content, refused = (index / name).read_bytes(), 0
    for _ in range(150):
        (index / name).write_bytes(mutated(content, draw))
        try:
            read(index)
        except UserError:
            refused += 1
    assert refused > 30


@pytest.mark.parametrize("name", ["encoded.f32", "encoded.jsonl", "encoded.with"])
def test_mutated_features_of_a_stopped_index_are_right_or_encoded_again(tmp_path, name):
    pictures = [Picture(f"{number}.jpg", number, number) for number in range(6)]
    features = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
    encoded = Encoded(tmp_path, "f" * 64, 8)
    encoded.add(pictures, features)
    encoded.close()
    contents = {each: (tmp_path / each).read_bytes() for each in ("encoded.f32", "encoded.jsonl", "encoded.with")}
    draw, kept = random.Random(name), []
    for _ in range(150):
        for each, content in contents.items():
            (tmp_path / each).write_bytes(mutated(content, draw) if each == name else content)
        encoded = Encoded(tmp_path, "f" * 64, 8)
        kept.append(len(encoded.pictures))
        assert encoded.pictures == pictures[: kept[-1]]
        assert (encoded.features() == features[: kept[-1]].numpy()).all()
        encoded.close()
    assert min(kept) == 0 and len(set(kept)) > 1
