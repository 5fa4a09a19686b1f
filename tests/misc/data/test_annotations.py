import hashlib
import json
import math
import random
import time
from pathlib import Path, PureWindowsPath

import pytest
import torch
from PIL import Image

from misc.data import annotation_files
from misc.data.annotations import read_annotations, read_captions
from misc.data.image_checks import check_images
from misc.data.split import Counts, Split, keep_images
from misc.data.statistics import PUBLISHED_COUNTS, cut_captions_note, image_notes, statistics_table
from misc.errors import UserError
from misc.system.distributed import Ranks
from text_utils.cleaning import clean_caption
from text_utils.tokenizer import Tokenizer


def write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content), encoding="utf-8")


def write_image(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 8), (200, 30, 30)).save(path)


def entry(split: str, identity: int, path: str, *captions: str, **fields) -> dict:
    """Returns an entry of a raw file, except RSTPReid's, which has `img_path`."""
    return {"split": split, "id": identity, "file_path": path, "captions": list(captions), **fields}


CUHK = [
    entry("train", 12, "cam_a/1.png", "A red shirt.", "Blue jeans!", processed_tokens=[["a"], ["blue"]]),
    entry("test", 12, "CUHK01/7.png", "Grey coat", "A grey coat"),
    entry("train", 5, "cam_b/2.png", "Green hat", "A hat"),
    entry("val", 90, "Market/3.png", "White dress", "a dress"),
    entry("train", 12, "cam_a/4.png", "Red", "Red shirt"),
]
ICFG = [
    entry("train", 3, "train/0001/a.jpg", "A man in black."),
    entry("test", 8, "test/0002/b.jpg", "A woman in white."),
]
RSTP = [
    {"split": "train", "id": 0, "img_path": "0000_c1_0001.jpg", "captions": ["One.", "Two."]},
    {"split": "val", "id": 3701, "img_path": "3701_c1_0001.jpg", "captions": ["Three.", "Four."]},
    {"split": "test", "id": 3901, "img_path": "3901_c1_0001.jpg", "captions": ["Five.", "Six."]},
]


def reid_entry(identity: int, path: str, *captions: str, **fields) -> dict:
    return {"file_path": path, "id": identity, "captions": list(captions), **fields}


def fails(anno_dir: Path, *parts: str, image_dir: Path | None = None, **arguments) -> None:
    """Checks that reading raises a UserError of one line that contains all `parts`."""
    with pytest.raises(UserError) as caught:
        read_annotations(anno_dir, image_dir or anno_dir, **arguments)
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message


# The forms


def test_cuhk_pedes(tmp_path):
    write_json(tmp_path / "reid_raw.json", CUHK)
    splits = read_annotations(tmp_path, tmp_path)
    assert list(splits) == ["train", "val", "test"]
    train = splits["train"]
    assert train.image_paths == ["cam_a/1.png", "cam_b/2.png", "cam_a/4.png"]
    assert train.image_identities == [0, 1, 0]
    assert train.captions == ["a red shirt", "blue jeans", "green hat", "a hat", "red", "red shirt"]
    assert train.back_translations == [None] * 6
    assert train.caption_images == [0, 0, 1, 1, 2, 2]
    assert train.caption_identities == [0, 0, 1, 1, 0, 0]
    assert len(train) == 6
    assert train.counts == Counts(identities=2, images=3, captions=6)
    assert splits["val"].image_identities == [90]
    assert splits["test"].image_identities == [12]
    assert splits["test"].caption_identities == [12, 12]


@pytest.mark.parametrize("name", ["ICFG-PEDES.json", "ICFG_PEDES.json"])
def test_icfg_pedes(tmp_path, name):
    write_json(tmp_path / name, ICFG)
    splits = read_annotations(tmp_path, tmp_path)
    assert list(splits) == ["train", "test"]
    assert splits["train"].image_paths == ["train/0001/a.jpg"]
    assert splits["test"].captions == ["a woman in white"]


def test_rstpreid(tmp_path):
    write_json(tmp_path / "data_captions.json", RSTP)
    splits = read_annotations(tmp_path, tmp_path)
    assert list(splits) == ["train", "val", "test"]
    assert splits["val"].image_paths == ["3701_c1_0001.jpg"]
    assert splits["test"].image_identities == [3901]
    assert splits["train"].captions == ["one", "two"]


def write_reid(folder: Path, *, val: list | None = None) -> None:
    write_json(
        folder / "train_reid.json",
        [
            reid_entry(7, "a.jpg", "One.", "Two.", captions_bt=["Un.", "DEUX!"]),
            reid_entry(-3, "b.jpg", "Three", "Four", "Five", captions_bt=["", None]),
            reid_entry(7, "c.jpg", "Six"),
            reid_entry(7, "a.jpg", "Seven", captions_bt=None),
        ],
    )
    write_json(folder / "test_reid.json", [reid_entry(-1, "d.jpg", "Eight", split="of no account")])
    if val is not None:
        write_json(folder / "val_reid.json", val)


def test_reid_files(tmp_path):
    write_reid(tmp_path, val=[reid_entry(4, "e.jpg", "Nine")])
    splits = read_annotations(tmp_path, tmp_path)
    assert list(splits) == ["train", "val", "test"]
    train = splits["train"]
    assert train.image_paths == ["a.jpg", "b.jpg", "c.jpg"]
    assert train.image_identities == [0, 1, 0]
    assert train.caption_images == [0, 0, 1, 1, 1, 2, 0]
    assert train.captions == ["one", "two", "three", "four", "five", "six", "seven"]
    assert train.back_translations == ["un", "deux", None, None, None, None, None]
    assert splits["test"].image_identities == [-1]


@pytest.mark.parametrize("val", [None, []])
def test_reid_files_without_validation(tmp_path, val):
    write_reid(tmp_path, val=val)
    assert list(read_annotations(tmp_path, tmp_path)) == ["train", "test"]


def test_reid_files_come_first(tmp_path):
    write_reid(tmp_path)
    write_json(tmp_path / "reid_raw.json", CUHK)
    assert read_annotations(tmp_path, tmp_path)["test"].captions == ["eight"]


def test_captions_that_look_broken_are_data(tmp_path):
    captions = ["", "shirt", "\x00\x1b[0m", "  ..  ", "\ud800"]
    write_json(tmp_path / "reid_raw.json", [entry("train", 1, "a.jpg", *captions), entry("test", 1, "b.jpg", "")])
    splits = read_annotations(tmp_path, tmp_path)
    assert splits["train"].captions == ["", "shirt", "\x00\x1b[0m", "", "\ud800"]
    assert splits["test"].captions == [""]


def test_captions_and_back_translations_are_cut(tmp_path):
    write_json(
        tmp_path / "reid_raw.json",
        [entry("train", 1, "a.jpg", "one two three", captions_bt=["un deux trois"]), entry("test", 1, "b.jpg", "x")],
    )
    train = read_annotations(tmp_path, tmp_path, max_words=2)["train"]
    assert train.captions == ["one two"]
    assert train.back_translations == ["un deux"]


def test_the_log_says_how_many_captions_are_cut(tmp_path):
    """Each of these words has one token."""
    write_json(
        tmp_path / "reid_raw.json",
        [entry("train", 1, "a.jpg", "Red shirt. " * 4, "red " * 9, "red " * 10, ""), entry("test", 1, "b.jpg", "red")],
    )
    tokenizer = Tokenizer()
    for words in (7, 77):
        splits = read_annotations(tmp_path, tmp_path, max_words=words)
        assert cut_captions_note(splits, tokenizer, 7) == (
            "captions cut at 7 tokens: 3 of 4 in train (by 4.0 tokens on average, at most 5), 0 of 1 in test"
        )
        assert cut_captions_note(splits, tokenizer, 77).endswith(": 0 of 4 in train, 0 of 1 in test")
        assert cut_captions_note(splits, tokenizer, 7, cleaned=False) == (  # each full stop has one token too
            "captions as annotated, cut at 7 tokens: 3 of 4 in train (by 5.3 tokens on average, at most 7), "
            "0 of 1 in test"
        )


# Back-translations from a separate file


def test_back_translation_file(tmp_path):
    write_json(tmp_path / "reid_raw.json", CUHK)
    back_translations = tmp_path / "translated.json"
    write_json(
        back_translations,
        [
            {"img_path": "cam_a/4.png", "captions_bt": ["Rouge.", "Chemise rouge"]},
            {"file_path": "elsewhere.png", "captions_bt": ["ignored"]},
            {"file_path": "cam_a/1.png", "captions_bt": [None, "Jean bleu"]},
            {"file_path": "cam_b/2.png"},
        ],
    )
    splits = read_annotations(tmp_path, tmp_path, back_translation_file=back_translations)
    assert splits["train"].back_translations == [None, "jean bleu", None, None, "rouge", "chemise rouge"]
    assert splits["test"].back_translations == [None, None]


def test_a_reid_file_as_back_translation_file_replaces_those_of_the_annotation(tmp_path):
    write_reid(tmp_path)
    other = tmp_path / "other"
    other.mkdir()
    write_json(
        other / "train_reid.json",
        [reid_entry(1, "a.jpg", "One", captions_bt=["first"]), reid_entry(1, "a.jpg", "Seven", captions_bt=["second"])],
    )
    train = read_annotations(tmp_path, tmp_path, back_translation_file=other / "train_reid.json")["train"]
    assert train.back_translations == ["first", None, None, None, None, None, "second"]


@pytest.mark.parametrize("name", ["mine.json", "mine.csv"])
def test_back_translations_by_image_for_an_annotation_by_caption(tmp_path, name):
    rows = [("a.jpg", "One"), ("b.jpg", "Two"), ("a.jpg", "Three"), ("a.jpg", "Four")]
    if name == "mine.csv":
        text = "split,id,file_path,caption\n" + "".join(f"train,1,{path},{caption}\n" for path, caption in rows)
        (tmp_path / name).write_text(text)
    else:
        write_json(tmp_path / name, [entry("train", 1, path, caption) for path, caption in rows])
    content = [{"file_path": "a.jpg", "captions_bt": ["Un", "Trois"]}, {"file_path": "b.jpg", "captions_bt": ["Deux"]}]
    write_json(tmp_path / "translated.json", content)
    options = {"required": ("train",), "back_translation_file": tmp_path / "translated.json"}
    train = read_annotations(tmp_path / name, tmp_path, **options)["train"]
    assert dict(zip(train.captions, train.back_translations, strict=True)) == {
        "one": "un",
        "two": "deux",
        "three": "trois",
        "four": None,
    }


def test_back_translations_of_another_dataset(tmp_path):
    write_json(tmp_path / "reid_raw.json", CUHK)
    for content in ([{"file_path": "elsewhere.png", "captions_bt": ["x"]}], [{"file_path": "cam_a/1.png"}], []):
        write_json(tmp_path / "translated.json", content)
        fails(tmp_path, "translated.json", "'cam_a/1.png'", back_translation_file=tmp_path / "translated.json")


def test_bad_back_translation_files(tmp_path):
    write_json(tmp_path / "reid_raw.json", CUHK)
    path = tmp_path / "translated.json"
    fails(tmp_path, "translated.json is not a file", back_translation_file=path)
    for content, parts in [
        ({"a": 1}, ["translated.json", "list"]),
        ([3], ["entry 1 (counted from 1) is 3,"]),
        ([{"captions_bt": ["x"]}], ["entry 1", "no `file_path`"]),
        ([{"file_path": "x.jpg"}, {"file_path": "y.jpg", "captions_bt": "text"}], ["entry 2", "`captions_bt: 'text'`"]),
        ([{"file_path": "cam_a/1.png", "captions_bt": [4]}], ["entry 1", "`captions_bt: [4]`"]),
    ]:
        write_json(path, content)
        fails(tmp_path, *parts, back_translation_file=path)


# The choice of the file


def test_no_annotation(tmp_path):
    (tmp_path / "other.json").write_text("[]")
    expected = ["train_reid.json", "reid_raw.json", "ICFG-PEDES.json", "data_captions.json"]
    fails(tmp_path, str(tmp_path), *expected, "set anno_dir to it", "JSON and CSV files there: other.json")
    for number in range(40):
        (tmp_path / f"{number:02}.csv").touch()
    fails(tmp_path, "JSON and CSV files there: 00.csv, 01.csv, 02.csv and 38 more")


def test_no_file_at_all(tmp_path):
    fails(tmp_path, "JSON and CSV files there: none")


def test_caption_all_cannot_be_used(tmp_path):
    write_json(tmp_path / "caption_all.json", [{"id": 1, "file_path": "a.jpg", "captions": ["a"]}])
    fails(tmp_path, "caption_all.json", "split", "reid_raw.json")
    write_json(tmp_path / "reid_raw.json", CUHK)
    assert len(read_annotations(tmp_path, tmp_path)["train"]) == 6


def test_caption_all_under_another_name_is_recognised(tmp_path):
    write_json(tmp_path / "reid_raw.json", [{"id": 1, "file_path": "a.jpg", "captions": ["a"]}])
    fails(tmp_path, "no `split` in any entry", "caption_all.json", "get reid_raw.json")


@pytest.mark.parametrize("folder", ["", "imgs"])
def test_backslashes_are_separators_where_that_finds_the_image(tmp_path, folder):
    """Except in the name of an image that contains one."""
    for name in ("cam_a/1.png", "odd\\name.png"):
        path = tmp_path / folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    names = {"cam_a\\1.png": "cam_a/1.png", "odd\\name.png": "odd\\name.png", "cam_b\\2.png": "cam_b\\2.png"}
    write_json(
        tmp_path / "reid_raw.json",
        [entry("test" if "odd" in name else "train", number, name, "a") for number, name in enumerate(names)],
    )
    write_json(tmp_path / "translated.json", [{"file_path": "cam_a/1.png", "captions_bt": ["b"]}])
    splits = read_annotations(tmp_path, tmp_path, back_translation_file=tmp_path / "translated.json")
    prefix = f"{folder}/".lstrip("/")
    assert splits["train"].image_paths == [prefix + names[r"cam_a\1.png"], prefix + names[r"cam_b\2.png"]]
    assert splits["test"].image_paths == [prefix + r"odd\name.png"]
    assert splits["train"].back_translations == ["b", None]


def test_only_the_asked_splits_are_read(tmp_path):
    write_json(tmp_path / "test_reid.json", [reid_entry(1, "a.jpg", "x")])
    assert list(read_annotations(tmp_path, tmp_path, splits=("test",), required=())) == ["test"]
    fails(tmp_path, "test_reid.json", "no train_reid.json")
    (tmp_path / "train_reid.json").write_text("broken")
    assert list(read_annotations(tmp_path, tmp_path, splits=("test",), required=())) == ["test"]
    other = tmp_path / "raw"
    other.mkdir()
    write_json(other / "reid_raw.json", [{"split": "train"}, entry("test", 1, "a.jpg", "x")])
    assert list(read_annotations(other, other, splits=("test",), required=())) == ["test"]


def test_captions_stay_as_annotated_for_people_to_read(tmp_path):
    write_json(tmp_path / "reid_raw.json", [entry("train", 1, "a.jpg", "A (red) Coat."), entry("test", 2, "b.jpg", "")])
    train = read_annotations(tmp_path, tmp_path)["train"]
    assert (train.captions, train.annotated_captions) == (["a red coat"], ["A (red) Coat."])


def test_several_raw_files(tmp_path):
    write_json(tmp_path / "reid_raw.json", CUHK)
    write_json(tmp_path / "data_captions.json", RSTP)
    fails(tmp_path, "reid_raw.json", "data_captions.json", "several")


def test_no_test_file(tmp_path):
    write_json(tmp_path / "train_reid.json", [reid_entry(1, "a.jpg", "x")])
    fails(tmp_path, "no test_reid.json")


def test_missing_folders(tmp_path):
    write_json(tmp_path / "reid_raw.json", CUHK)
    fails(tmp_path / "nowhere", "anno_dir", "nowhere", image_dir=tmp_path)
    fails(tmp_path, "image_dir", "nowhere", image_dir=tmp_path / "nowhere")


# One file


PEOPLE = [
    entry("train", 1, "a.jpg", "A red coat, long.", "Red"),
    entry("test", 2, "b.jpg", "Blue"),
    entry("train", 1, "c.jpg", "Grey"),
]
CSV = """split,id,file_path,caption
train,1,a.jpg,"A red coat, long."
test,2,b.jpg,Blue
train,1,a.jpg,Red
train,1,c.jpg,Grey
"""


def as_file(folder: Path, name: str, content: str | bytes) -> Path:
    (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
    return folder / name


@pytest.mark.parametrize("name", ["mine.json", "mine", "mine.txt", "caption_all.json", "reid_raw.json"])
def test_a_json_list_under_any_name(tmp_path, name):
    write_json(tmp_path / "reid_raw.json", PEOPLE)
    expected = read_annotations(tmp_path, tmp_path)
    assert read_annotations(as_file(tmp_path, name, json.dumps(PEOPLE)), tmp_path) == expected


@pytest.mark.parametrize("name", ["mine.csv", "MINE.CSV", "mine.tsv"])
@pytest.mark.parametrize(
    "text",
    [
        CSV,
        CSV.replace("\n", "\r\n"),
        "\ufeff" + CSV.replace(",", ", ").replace(",  ", ", "),
        CSV.replace("coat, long", "coat; long").replace(",", ";").replace("coat; long", "coat, long"),
        CSV.replace("coat, long", "coat@ long").replace(",", "\t").replace("@", ","),
        "".join(f"{number},{line}\n" for number, line in enumerate(CSV.splitlines())),  # with an index, as by pandas
        CSV.replace("file_path", "img_path") + "\n\n",
    ],
)
def test_csv_has_a_row_per_caption(tmp_path, name, text):
    """It is read like a JSON list of the same images."""
    expected = read_annotations(as_file(tmp_path, "mine.json", json.dumps(PEOPLE)), tmp_path)
    splits = read_annotations(as_file(tmp_path, name, text), tmp_path)
    assert splits == expected and image_notes(splits) == []


def test_captions_of_csv_are_read_for_back_translation(tmp_path):
    rows = "file_path,caption\na.jpg,One\nb.jpg,Two\na.jpg,Three\n"
    assert read_captions(as_file(tmp_path, "mine.csv", rows)) == [("a.jpg", ["One", "Three"]), ("b.jpg", ["Two"])]


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("", ["first line", "split,id,file_path,caption"]),
        ("a.jpg,A man\n", ["first line", "'a.jpg,A man'", "split,id,file_path,caption"]),
        ("a.jpg,A man\r\nb.jpg,A man\r\n", ["first line", "'a.jpg,A man'"]),
        (CSV + "train,1,d.jpg,A man, walking\n", ["line 6 has more values", "double quotes"]),
        (CSV + "train,1,d.jpg\n", ["line 6 has fewer values"]),
        (CSV + 'train,1,d.jpg,"A" man\n', ["line 6 cannot be read as CSV"]),
        (CSV + 'train,1,d.jpg,"A man\n', ["cannot be read as CSV", "fix its quotes"]),
        (CSV + "dev,1,d.jpg,A man\n", ["line 6 has `split: 'dev'`", "train, val, test"]),
        (CSV + "train,,d.jpg,A man\n", ["line 6 has `id: ''`"]),
        (CSV + "train,1,../d.jpg,A man\n", ["line 6 has `file_path: '../d.jpg'`"]),
        ("id,file_path,caption\n1,a.jpg,A man\n", ["no `split` in any entry"]),
        (CSV.replace("Blue", "蓝").encode("gbk"), ["cannot be read as CSV", "GBK", "iconv"]),
    ],
)
def test_csv_with_mistakes(tmp_path, text, parts):
    fails(as_file(tmp_path, "mine.csv", text), "mine.csv", *parts, image_dir=tmp_path)


def test_a_file_needs_only_the_splits_that_are_used(tmp_path):
    for split in ("test", "val"):
        file = as_file(tmp_path, "mine.csv", f"split,id,file_path,caption\n{split},1,a.jpg,A man\n")
        assert list(read_annotations(file, tmp_path, splits=(split,), required=(split,))) == [split]
        other = "val" if split == "test" else "test"
        only = f"no {other} entries, only {split}: "
        options = {"image_dir": tmp_path, "splits": (other,), "required": (other,)}
        fails(file, only, f"set data.evaluate_on={split}", **options)
        fails(file, f"no train entries, only {split}: ", "--evaluate", image_dir=tmp_path)
    write_json(tmp_path / "test_reid.json", [reid_entry(1, "a.jpg", "One")])  # its entries have no split
    assert read_annotations(tmp_path / "test_reid.json", tmp_path, required=("test",))["test"].captions == ["one"]


# Ids


@pytest.mark.parametrize(
    "same",
    [[1, 1.0, "1", "1.0", "00001", " 1", "1."], [-3, "-3"], ["a-1", " a-1 "], [10**19 + 7, str(10**19 + 7)], ["٣"]],
)
def test_spellings_of_an_id(tmp_path, same):
    others = [2, "a-2", 10**19 + 8, 10**19, "A-1", "1a", "0"]
    identities = [*same, *others]
    write_json(
        tmp_path / "reid_raw.json",
        [entry(split, each, f"{i}.jpg", "x") for split in ("train", "test") for i, each in enumerate(identities)],
    )
    for split in read_annotations(tmp_path, tmp_path).values():
        own = split.image_identities[: len(same)]
        assert len(set(own)) == 1 and split.counts.identities == 1 + len(others)
        assert torch.tensor(split.image_identities).dtype == torch.int64


@pytest.mark.parametrize("identities", [[5, 3, 5], ["00005", "3", 5.0], [2**63 - 1, -(2**63), 2**63 - 1]])
def test_ids_that_are_integers_stay(tmp_path, identities):
    identities = [1, *identities]
    entries = [entry("test" if i else "train", each, f"{i}.jpg", "x") for i, each in enumerate(identities)]
    write_json(tmp_path / "reid_raw.json", entries)
    test = read_annotations(tmp_path, tmp_path)["test"]
    assert test.image_identities == [int(each) for each in identities[1:]] and test.identity_names == {}


@pytest.mark.parametrize("identities", [[12345678901234567890, 3], ["Anna", 3], [2**63, -1], [-(2**63) - 1, "x"]])
def test_other_ids_are_numbered_and_shown_as_annotated(tmp_path, identities):
    entries = [entry("test" if i else "train", each, f"{i}.jpg", "x") for i, each in enumerate([1, *identities])]
    write_json(tmp_path / "reid_raw.json", entries)
    test = read_annotations(tmp_path, tmp_path)["test"]
    assert test.image_identities == [0, 1]
    assert [test.annotated_identity(each) for each in test.image_identities] == identities


# Images with several entries


def per_caption(entries: list[dict]) -> list[dict]:
    """An entry for each caption, all first captions before the second ones."""
    longest = max(len(one["captions"]) for one in entries)
    return [
        one | {"captions": [one["captions"][i]]} for i in range(longest) for one in entries if i < len(one["captions"])
    ]


def test_entries_of_the_same_image_are_merged(tmp_path):
    write_json(tmp_path / "reid_raw.json", CUHK)
    expected = read_annotations(tmp_path, tmp_path)
    entries = per_caption(CUHK)
    entries[0]["file_path"] = "./cam_a//1.png"
    write_json(tmp_path / "reid_raw.json", entries)
    splits = read_annotations(tmp_path, tmp_path)
    for name, split in expected.items():
        merged = splits[name]
        assert merged.counts == split.counts
        assert merged.image_identities == split.image_identities
        assert sorted(zip(merged.caption_images, merged.captions, strict=True)) == sorted(
            zip(split.caption_images, split.captions, strict=True)
        )
    assert image_notes(splits) == [
        "train: 6 entries describe 3 images, so entries of an image are merged",
        "val: 2 entries describe 1 images, so entries of an image are merged",
        "test: 2 entries describe 1 images, so entries of an image are merged",
    ]
    assert image_notes(expected) == []


@pytest.mark.parametrize("entries", [CUHK, per_caption(CUHK)])
def test_the_fingerprint_is_that_of_the_entries_as_annotated(tmp_path, entries):
    """So runs resume that were started before entries were merged."""
    write_json(tmp_path / "reid_raw.json", entries)
    own = [one for one in entries if one["split"] == "train"]
    identities = [{12: 0, 5: 1}[one["id"]] for one in own]
    captions = [clean_caption(caption) for one in own for caption in one["captions"]]
    images = [i for i, one in enumerate(own) for _ in one["captions"]]
    content = json.dumps([identities, captions, [None] * len(captions), images])
    train = read_annotations(tmp_path, tmp_path)["train"]
    assert train.fingerprint == hashlib.sha256(content.encode()).hexdigest()
    assert keep_images(train, [0, 1, 2], renumber=True).fingerprint == train.fingerprint


def test_an_image_with_two_ids_is_refused(tmp_path):
    wrong = entry("train", 7, "cam_a/1.png", "A coat.")
    write_json(tmp_path / "reid_raw.json", [*CUHK, wrong, wrong])
    fails(tmp_path, "images with two ids in the train entries", ": 'cam_a/1.png' (12 and 7): correct")


def test_an_image_in_two_splits_causes_a_warning(tmp_path):
    write_json(tmp_path / "reid_raw.json", [*CUHK, entry("test", 12, "cam_a/1.png", "A coat.")])
    (note,) = image_notes(read_annotations(tmp_path, tmp_path))
    assert note.startswith("warning: images in both train and test: cam_a/1.png: remove")


# The content of the file


@pytest.mark.parametrize("content", [b"{]", b"", b"\xff\xfe\xff", b"version https://git-lfs.github.com/spec/v1"])
def test_not_json(tmp_path, content):
    (tmp_path / "reid_raw.json").write_bytes(content)
    fails(tmp_path, "reid_raw.json cannot be read as JSON")


def test_other_encodings_and_json_lines_are_named(tmp_path):
    text = json.dumps(CUHK, ensure_ascii=False).replace("cam_a", "相机")
    (tmp_path / "reid_raw.json").write_bytes(text.encode("gbk"))
    fails(tmp_path, "cannot be read as JSON", "GBK", "iconv")
    (tmp_path / "reid_raw.json").write_text("".join(json.dumps(entry) + "\n" for entry in CUHK))
    fails(tmp_path, "cannot be read as JSON", "JSON Lines", "one JSON list")


@pytest.mark.parametrize("content", [{"annotations": []}, "text", None, 3])
def test_not_a_list(tmp_path, content):
    write_json(tmp_path / "reid_raw.json", content)
    fails(tmp_path, "reid_raw.json", "list")


def test_json_with_a_byte_order_mark(tmp_path):
    (tmp_path / "reid_raw.json").write_bytes(b"\xef\xbb\xbf" + json.dumps(CUHK).encode())
    assert len(read_annotations(tmp_path, tmp_path)["train"]) == 6


MISSING = object()


@pytest.mark.parametrize(
    "field, value",
    [
        ("split", MISSING),
        ("split", "training"),
        ("split", ["train"]),
        ("id", MISSING),
        ("id", ""),
        ("id", " "),
        ("id", 1.5),
        ("id", 1e20),
        ("id", math.nan),
        ("id", math.inf),
        ("id", True),
        ("id", None),
        ("file_path", MISSING),
        ("file_path", ""),
        ("file_path", 3),
        ("file_path", "/etc/a.jpg"),
        ("file_path", "../a.jpg"),
        ("file_path", "a/../../b.jpg"),
        ("captions", MISSING),
        ("captions", []),
        ("captions", "a man"),
        ("captions", ["a man", None]),
        ("captions", [["a"]]),
        ("captions_bt", "un"),
        ("captions_bt", [1]),
    ],
)
def test_wrong_fields(tmp_path, field, value):
    wrong = entry("train", 1, "a.jpg", "x")
    if value is MISSING:
        del wrong[field]
    else:
        wrong[field] = value
    write_json(tmp_path / "reid_raw.json", [*CUHK, wrong])
    found = f"no `{field}`" if value is MISSING else f"`{field}: {value!r}`"
    fails(tmp_path, f"reid_raw.json entry 6 (counted from 1) has {found}, expected ", "fix or remove")


def test_errors_in_rstpreid_name_its_own_fields(tmp_path):
    write_json(tmp_path / "data_captions.json", [*RSTP, RSTP[0] | {"img_path": "../a.jpg"}])
    fails(tmp_path, "data_captions.json entry 4", "`img_path: '../a.jpg'`")


@pytest.mark.parametrize(
    "path", ["/a.jpg", "C:a.jpg", "C:\\a.jpg", "\\\\server\\share\\a.jpg", "..\\a.jpg", "a/..\\..\\b.jpg"]
)
def test_under_windows_no_path_leads_out_of_the_image_folder(path, monkeypatch):
    monkeypatch.setattr(annotation_files, "Path", PureWindowsPath)
    with pytest.raises(UserError, match="expected a path inside the image folder"):
        annotation_files.image_path_of({"file_path": path}, "entry 1")
    assert annotation_files.image_path_of({"file_path": "cam_a/1.png"}, "entry 1") == "cam_a/1.png"


def test_entries_that_are_not_objects(tmp_path):
    write_json(tmp_path / "reid_raw.json", [*CUHK, "text\nof two lines"])
    fails(tmp_path, "entry 6 (counted from 1) is 'text\\nof two lines'")


def test_long_values_are_shortened(tmp_path):
    write_json(tmp_path / "reid_raw.json", [entry("word " * 1000, 1, "a.jpg", "x")])
    with pytest.raises(UserError) as caught:
        read_annotations(tmp_path, tmp_path)
    assert len(str(caught.value)) < 300 + len(str(tmp_path))


@pytest.mark.parametrize("name", ["train", "test"])
def test_empty_splits(tmp_path, name):
    write_json(tmp_path / "reid_raw.json", [one for one in CUHK if one["split"] != name])
    fails(tmp_path, f"no {name} entries")


def test_empty_training_file(tmp_path):
    write_reid(tmp_path)
    write_json(tmp_path / "train_reid.json", [])
    fails(tmp_path, "no train entries")


# Images


ALONE = Ranks(0, 1, torch.device("cpu"))


@pytest.fixture
def cuhk(tmp_path) -> Path:
    """CUHK-PEDES as unpacked: the annotation next to the folder `imgs`."""
    write_json(tmp_path / "reid_raw.json", CUHK)
    for one in CUHK:
        write_image(tmp_path / "imgs" / one["file_path"])
    return tmp_path


def test_image_dir_is_imgs(cuhk):
    splits = read_annotations(cuhk, cuhk / "imgs")
    assert splits["test"].image_paths == ["CUHK01/7.png"]
    check_images(splits, cuhk / "imgs", ALONE)


def test_image_dir_is_the_parent_of_imgs(cuhk):
    (cuhk / "imgs" / CUHK[0]["file_path"]).unlink()  # the first file that exists decides
    splits = read_annotations(cuhk, cuhk)
    assert splits["test"].image_paths == ["imgs/CUHK01/7.png"]
    write_image(cuhk / "imgs" / CUHK[0]["file_path"])
    check_images(splits, cuhk, ALONE)


def test_missing_images(cuhk):
    splits = read_annotations(cuhk, cuhk / "imgs")
    for one in CUHK[1:3]:
        (cuhk / "imgs" / one["file_path"]).unlink()
    with pytest.raises(UserError, match="2 of 5 annotated images") as caught:
        check_images(splits, cuhk / "imgs", ALONE)
    assert "'cam_b/2.png', 'CUHK01/7.png';" in str(caught.value)


def test_images_that_cannot_exist_or_be_accessed_are_missing(cuhk):
    (cuhk / "imgs" / "round.jpg").symlink_to("round.jpg")
    names = ["x" * 300, "round.jpg", f"{CUHK[0]['file_path']}/y.jpg", "nul\0l.jpg"]
    write_json(
        cuhk / "reid_raw.json", [one | {"file_path": name} for one, name in zip(CUHK, names, strict=False)] + CUHK
    )
    splits = read_annotations(cuhk, cuhk / "imgs")
    with pytest.raises(UserError, match="4 of 9 annotated images are missing"):
        check_images(splits, cuhk / "imgs", ALONE)


def test_an_annotation_that_may_not_be_read(cuhk, monkeypatch):
    def refuse(_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", refuse)
    fails(cuhk, "reid_raw.json cannot be read (Permission denied)")


def test_five_of_many_missing_images_are_named(tmp_path):
    paths = [f"{i}.jpg" for i in range(7)]
    split = Split(paths * 2, [0] * 14, ["x"] * 14, [None] * 14, list(range(14)), ["X."] * 14)
    with pytest.raises(UserError, match="7 of 7 annotated images") as caught:
        check_images({"test": split}, tmp_path, ALONE)
    assert "'4.jpg', ...;" in str(caught.value)
    assert "5.jpg" not in str(caught.value)
    assert "\n" not in str(caught.value)


# Statistics


def made_up_split(counts: Counts) -> Split:
    identities = [i % (counts.identities or 3_463) for i in range(counts.images)]  # half of UFine6926's
    caption_images = [i % counts.images for i in range(counts.captions)]
    captions = [""] * counts.captions
    return Split([""] * counts.images, identities, captions, [None] * counts.captions, caption_images, captions)


def test_table(tmp_path):
    write_json(tmp_path / "reid_raw.json", CUHK)
    table, warnings = statistics_table(read_annotations(tmp_path, tmp_path), None)
    assert [line.split() for line in table.splitlines()] == [
        ["split", "identities", "images", "captions"],
        ["train", "2", "3", "6"],
        ["val", "1", "1", "2"],
        ["test", "1", "1", "2"],
    ]
    assert len({len(line) for line in table.splitlines()}) == 1
    assert warnings == []


@pytest.mark.parametrize("dataset", PUBLISHED_COUNTS)
def test_no_warning_if_all_numbers_are_the_published_ones(dataset):
    splits = {name: made_up_split(counts) for name, counts in PUBLISHED_COUNTS[dataset].items()}
    table, warnings = statistics_table(splits, dataset)
    assert warnings == []
    assert f"{PUBLISHED_COUNTS[dataset]['test'].captions:,}" in table


def test_a_warning_shows_both_numbers():
    splits = {name: made_up_split(counts) for name, counts in PUBLISHED_COUNTS["RSTPReid"].items()}
    splits["train"] = made_up_split(Counts(3_701, 18_505, 37_009))
    assert statistics_table(splits, "RSTPReid")[1] == ["RSTPReid train: 37,009 captions here, 37,010 published"]


def test_a_split_that_is_missing_or_not_published():
    splits = {name: made_up_split(counts) for name, counts in PUBLISHED_COUNTS["RSTPReid"].items()}
    validation = splits.pop("val")
    assert statistics_table(splits, "RSTPReid")[1][0] == "RSTPReid val: 0 identities here, 200 published"
    icfg = {name: made_up_split(counts) for name, counts in PUBLISHED_COUNTS["ICFG-PEDES"].items()}
    warnings = statistics_table(icfg | {"val": validation}, "ICFG-PEDES")[1]
    assert warnings[0] == "ICFG-PEDES val: 200 identities here, 0 published"
    assert len(warnings) == 3


def test_unknown_dataset():
    with pytest.raises(UserError, match="'CUHK'.*CUHK-PEDES, ICFG-PEDES, RSTPReid"):
        statistics_table({}, "CUHK")


def test_identities_that_are_only_published_for_all_splits_together():
    splits = {name: made_up_split(counts) for name, counts in PUBLISHED_COUNTS["UFine6926"].items()}
    splits["test"].image_identities[0] = 3_463
    assert statistics_table(splits, "UFine6926")[1] == ["UFine6926 all splits: 6,927 identities here, 6,926 published"]
    assert statistics_table(splits, "UFine6926", compared=("test",))[1] == []


# Published sizes


FILES = {"CUHK-PEDES": "reid_raw.json", "ICFG-PEDES": "ICFG-PEDES.json", "RSTPReid": "data_captions.json"}


@pytest.mark.slow
@pytest.mark.parametrize("dataset", PUBLISHED_COUNTS)
def test_files_of_the_published_sizes_keep_all_their_images(tmp_path, dataset):
    """CUHK-PEDES takes about one second of processor time, so ten seconds mean that something is wrong."""
    words = random.Random(0).choices(["Red", "shirt", "black", "jeans", "a", "man,", "walking."], k=10_000)
    sentences = [" ".join(words[i : i + 25]) for i in range(1000)] if dataset == "CUHK-PEDES" else ["Red"]
    entries = []
    for split, counts in PUBLISHED_COUNTS[dataset].items():
        made_up = made_up_split(counts)
        captions = [[] for _ in made_up.image_paths]
        for number, image in enumerate(made_up.caption_images):
            captions[image].append(sentences[number % len(sentences)])
        for image, identity in enumerate(made_up.image_identities):
            entries.append(entry(split, f"{split} {identity}", f"{split}/{image}.jpg", *captions[image]))
    if dataset == "RSTPReid":
        entries = [one | {"img_path": one["file_path"]} for one in entries]
        for one in entries:
            del one["file_path"]
    write_image(tmp_path / f"{list(PUBLISHED_COUNTS[dataset])[0]}/0.jpg")  # otherwise every image is looked for
    name = FILES.get(dataset, "annotation.json")
    write_json(tmp_path / name, entries)
    start = time.process_time()
    source, splits = tmp_path if dataset in FILES else tmp_path / name, tuple(PUBLISHED_COUNTS[dataset])
    read = read_annotations(source, tmp_path, required=splits)
    assert time.process_time() - start < 10
    assert statistics_table(read, dataset)[1] == [] and image_notes(read) == []
    assert sum(len(split) for split in read.values()) == sum(len(one["captions"]) for one in entries)
