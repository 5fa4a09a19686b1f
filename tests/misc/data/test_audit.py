"""The audit of a dataset: each kind of fault is found, and nothing else."""

import json
import shutil
from pathlib import Path

import pytest
from PIL import Image

from misc.data.annotations import read_annotations
from misc.data.audit import audit_captions, audit_images, audit_lengths, audit_line, main
from misc.data.split import Split
from text_utils.cleaning import clean_caption

CLEAN = "A woman (about 30) in a red/white, knee-long dress & boots; she's carrying a \"Nike\" bag, isn't she?"


def split_of(*captions: str, people: list[int] | None = None, images: list[int] | None = None, **fields) -> Split:
    """Returns a split with one caption for each image, and two images for each person, unless others are given."""
    images = images or list(range(len(captions)))
    people = people or [image // 2 for image in range(max(images) + 1)]
    return Split(
        image_paths=[f"{image}.jpg" for image in range(max(images) + 1)],
        image_identities=people,
        captions=[clean_caption(caption) for caption in captions],
        back_translations=[None] * len(captions),
        caption_images=images,
        annotated_captions=list(captions),
        **fields,
    )


def found(title: str, **splits: Split) -> list[tuple[str, str]]:
    """Returns the split and the image of each case of a finding."""
    (finding,) = [finding for finding in audit_captions(splits) if finding.title == title]
    return [(item["split"], item["image"]) for item in finding.items]


@pytest.mark.parametrize(
    "caption", ["一个穿红衣服的女人", "A woman in a красном coat", "A man in a red coat 包", "ผู้หญิง", "αλφα"]
)
def test_captions_in_other_scripts_are_found(caption):
    assert found("captions with letters of other scripts", train=split_of(CLEAN, caption)) == [("train", "1.jpg")]


@pytest.mark.parametrize(
    "caption",
    [
        "for i in range(10):\n    print(i)",
        "import os\nos.remove",
        "from os import path",
        "A man in a red coat.</s>",
        "{'caption': 'A man'}",
        "captions[0] of a man",
        "self.caption()",
        "A man, see https://example.org",
        "a_man in a coat",
        "x = 5",
        "C:\\images\\man",
    ],
)
def test_captions_with_code_are_found(caption):
    assert found("captions with code", train=split_of(CLEAN, caption)) == [("train", "1.jpg")]


@pytest.mark.parametrize(
    "caption",
    [
        CLEAN,
        "A man with a café-au-lait jacket and a façade bag",
        "A floral print (blue) on an imported coat; the print is white.",
        "For the most part black; from behind, he imports style. 100% cotton + a #7 shirt at 5:30 @ night $",
        "She's 1.70 m, i.e. tall…",
        "",
    ],
)
def test_ordinary_captions_are_not_found(caption):
    for title in ("captions with code", "captions with letters of other scripts"):
        assert found(title, train=split_of(caption)) == []


def test_captions_of_several_people_are_found():
    """Captions are compared after cleaning. The same id in two splits is two people."""
    train = split_of("A man.", "a man", "A woman.", "A WOMAN", "A child.", people=[0, 1, 2, 2, 3])
    test = split_of("A child.", "A dog.", people=[3, 3])
    title = "captions that describe several people"
    assert found(title, train=train, test=test) == [
        ("train", "0.jpg"),
        ("train", "1.jpg"),
        ("train", "4.jpg"),
        ("test", "0.jpg"),
    ]
    (finding,) = [each for each in audit_captions({"train": train, "test": test}) if each.title == title]
    assert finding.detail == "2 different texts"
    long = "red " * 80  # a split has its first 77 words
    train = split_of(long + "coat", long + "hat", long + "Coat!", long, people=[0, 1, 2, 3])
    assert found(title, train=train) == [("train", "0.jpg"), ("train", "2.jpg")]


def test_captions_that_an_image_has_twice_are_found():
    train = split_of("A man.", "A man.", "A woman.", "A man.", images=[0, 0, 0, 1], people=[0, 0])
    assert found("captions that an image has twice", train=train) == [("train", "0.jpg")]


def test_people_with_one_image_and_images_with_several_entries_are_found():
    train = split_of("a", "b", "c", "d", people=[5, 6, 5], images=[0, 1, 2, 0], caption_entries=[0, 1, 2, 3])
    assert found("people with one image", train=train, test=split_of("e")) == [("train", "1.jpg"), ("test", "0.jpg")]
    assert found("images with several entries", train=train) == [("train", "0.jpg")]


def test_long_captions_are_found_with_what_is_cut():
    """Start and end count, and so do the words that cleaning has cut: each of these words is one token."""
    train = split_of("red " * 8, "red " * 9, "red " * 100)
    finding = audit_lengths({"train": train}, 10)
    assert [(item["image"], item["detail"]) for item in finding.items] == [
        ("1.jpg", "11 tokens"),
        ("2.jpg", "102 tokens"),
    ]
    assert finding.detail == f"93 of 123 tokens are cut, {93 / 123:.1%}"


def test_a_line_counts_what_is_found():
    line = audit_line({"train": split_of("A man.", "A man.", "x = 5", people=[0, 1, 1])}, "data/x")
    assert line == (
        "audit: 1 captions with code, 2 captions that describe several people, 1 people with one image; to list them: "
        "python -m misc.data.audit data/x"
    )
    assert audit_line({"train": split_of("A man.", "A woman.")}, "x").endswith("nothing unusual")


@pytest.fixture
def faulty(tiny_dataset) -> Path:
    """The folder of a dataset with one fault of each kind; its images are 24 pixels wide and 40 high."""
    images = tiny_dataset.image_dir / "tiny"
    Image.new("L", (40, 60)).save(images / "0001_0.jpg")
    Image.new("RGB", (60, 40)).save(images / "0002_0.jpg")
    Image.new("RGB", (160, 200)).save(images / "0003_0.jpg")
    (images / "0004_0.jpg").write_bytes(b"not an image")
    (images / "0005_0.jpg").unlink()
    shutil.copy(images / "0006_0.jpg", images / "0020_0.jpg")
    path = tiny_dataset.anno_dir / "reid_raw.json"
    entries = json.loads(path.read_text())
    entries[0]["captions"] = ["一个人", "red " * 90]
    path.write_text(json.dumps(entries))
    return tiny_dataset.anno_dir


def test_unusual_images_are_found(faulty):
    splits = read_annotations(faulty, faulty, required=())
    findings = {finding.title: finding for finding in audit_images(splits, faulty)}
    cases = {
        title: {item["image"].removeprefix("imgs/tiny/"): item.get("detail") for item in finding.items}
        for title, finding in findings.items()
    }
    assert cases["images that are missing"] == {"0005_0.jpg": None}
    assert list(cases["images that cannot be read"]) == ["0004_0.jpg"]
    assert cases["images of another mode than RGB"] == {"0001_0.jpg": "L"}
    assert findings["images of another mode than RGB"].detail == "1 L"
    sizes = cases["images of unusual size"]
    assert sizes["0002_0.jpg"] == "60 × 40: wider than high"
    assert sizes["0003_0.jpg"] == "160 × 200: more than 10 times the usual area"
    assert sizes["0001_1.jpg"] == "24 × 40: a side below 32 pixels" and "0001_0.jpg" not in sizes
    same = cases["images whose file has the content of another one"]
    assert same == {"0020_0.jpg": "the same as imgs/tiny/0006_0.jpg (train)"}


def test_the_command_prints_the_audit_and_writes_all_cases(faulty, tmp_path, capsys):
    before = {path: path.read_bytes() for path in faulty.rglob("*") if path.is_file()}
    assert main([str(faulty), "--out", str(tmp_path / "new" / "audit.jsonl")]) == 0
    out = capsys.readouterr().out
    assert 'captions with letters of other scripts: 1\n    train: imgs/tiny/0001_0.jpg: "一个人"' in out
    assert "captions of more than 77 tokens: 1 (15 of " in out  # 90 words, start and end
    lines = [json.loads(line) for line in (tmp_path / "new" / "audit.jsonl").read_text().splitlines()]
    missing = {"finding": "images that are missing", "split": "train", "image": "imgs/tiny/0005_0.jpg"}
    assert missing in lines and {line["finding"] for line in lines} > {"images of unusual size"}
    small = [line for line in lines if line["finding"] == "images of unusual size"]
    assert f"images of unusual size: {len(small)}\n" in out and out.count("a side below 32 pixels") <= 3 < len(small)
    assert {path: path.read_bytes() for path in faulty.rglob("*") if path.is_file()} == before


def test_one_file_and_another_folder_of_images(faulty, tmp_path, capsys):
    (tmp_path / "elsewhere").mkdir()
    shutil.copy(faulty / "reid_raw.json", tmp_path / "elsewhere" / "mine.json")
    assert main([str(tmp_path / "elsewhere" / "mine.json"), "--image_dir", str(faulty), "--text_length", "92"]) == 0
    out = capsys.readouterr().out
    assert "images that are missing: 1\n" in out and "captions of more than 92 tokens: 0\n" in out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["{folder}/none"], "none does not exist"),
        (["{folder}", "--text_length", "2"], "--text_length 2"),
        (["{folder}", "--image_dir", "{folder}/none"], "image_dir"),
        (["{folder}", "--out", "{folder}/reid_raw.json"], "already exists"),
        (["{folder}", "--out", "{folder}/reid_raw.json/new"], "--out"),
        (["{folder}/imgs"], "no annotation in"),
    ],
)
def test_a_mistake_is_one_line(tiny_dataset, capsys, arguments, words):
    assert main([text.format(folder=tiny_dataset.anno_dir) for text in arguments]) == 2
    out, err = capsys.readouterr()
    (line,) = err.splitlines()
    assert out == "" and line.startswith("error: ") and words in line
