"""What is said about image files before they are used."""

import json
import os
import time

import pytest
import torch

from misc.data import image_checks
from misc.data.annotations import read_annotations
from misc.data.image_checks import check_images
from misc.data.split import Split
from misc.errors import UserError
from misc.system.distributed import Ranks
from tests.helpers.tiny_dataset import TinyDataset, spoil

ALONE = Ranks(0, 1, torch.device("cpu"))


def checked(dataset: TinyDataset, **options) -> tuple[dict[str, Split], list[str]]:
    return check_images(read_annotations(*dataset), dataset.image_dir, ALONE, **options)


def paths(dataset: TinyDataset) -> list[str]:
    return [path for split in read_annotations(*dataset).values() for path in split.image_paths]


@pytest.mark.parametrize("skip", [False, True])
def test_good_images_change_nothing(tiny_dataset, skip):
    spoil(tiny_dataset.image_dir / paths(tiny_dataset)[0], "cut off")  # it can be used
    assert checked(tiny_dataset, skip_unreadable=skip) == (read_annotations(*tiny_dataset), [])


def test_files_that_are_no_images_are_counted_and_the_first_five_are_named(tiny_dataset):
    names = paths(tiny_dataset)
    wrong = [names[number] for number in (1, 4, 5, 25, 33, 40)]
    for number, name in enumerate(wrong):
        spoil(tiny_dataset.image_dir / name, "no image" if number % 2 else "empty")
    with pytest.raises(UserError, match="6 of 42 annotated images cannot be read") as error:
        checked(tiny_dataset)
    message = str(error.value)
    assert [name for name in names if name in message] == wrong[:5]
    assert f"'{wrong[0]}' (the file is empty), '{wrong[1]}' (it is not a JPEG, " in message
    assert "data.skip_unreadable=true" in message and "\n" not in message


def test_missing_images_are_named_before_others(tiny_dataset):
    first, second, *_ = paths(tiny_dataset)
    spoil(tiny_dataset.image_dir / first, "empty")
    (tiny_dataset.image_dir / second).unlink()
    for skip in (False, True):
        with pytest.raises(UserError, match="1 of 42 annotated images are missing"):
            checked(tiny_dataset, skip_unreadable=skip)


def test_images_in_a_folder_without_permission_are_not_called_missing(tiny_dataset, monkeypatch):
    """Permissions would not do this if the tests run as root."""

    def refuse(path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("misc.data.images.open_regular", refuse)
    monkeypatch.setattr(image_checks, "is_file", lambda path: False)
    first = paths(tiny_dataset)[0]
    with pytest.raises(UserError, match="42 of 42 annotated images cannot be read") as error:
        checked(tiny_dataset)
    assert f"'{first}' (Permission denied)" in str(error.value)


def test_images_that_cannot_be_decoded_are_left_out_as_if_they_were_not_annotated(tiny_dataset):
    """So the training is exactly that of an annotation without them."""
    file = tiny_dataset.anno_dir / "reid_raw.json"
    entries = json.loads(file.read_text())
    of_split = {split: [entry for entry in entries if entry["split"] == split] for split in ("train", "val", "test")}
    wrong = [*of_split["train"][:3], of_split["test"][4]]  # an identity and a half; half an identity
    for entry, how in zip(wrong, ("empty", "no image", "undecodable", "undecodable"), strict=True):
        spoil(tiny_dataset.image_dir / entry["file_path"], how)
    splits, notes = checked(tiny_dataset, skip_unreadable=True)
    counted, *lost = notes
    assert counted.startswith(f"warning: 4 of 42 annotated images cannot be decoded: '{wrong[0]['file_path']}' (the ")
    assert lost == [
        "warning: train without 3 images and their 6 captions",
        "warning: test without 1 images and their 2 captions: its results cannot be compared with those of the whole "
        "split",
    ]
    file.write_text(json.dumps([entry for entry in entries if entry not in wrong]))
    expected = read_annotations(*tiny_dataset)
    assert splits == expected and splits["train"].fingerprint == expected["train"].fingerprint


def test_a_split_without_any_image_is_refused(tiny_dataset):
    for path in read_annotations(*tiny_dataset)["test"].image_paths:
        spoil(tiny_dataset.image_dir / path, "undecodable")
    with pytest.raises(UserError, match="no image of the test split"):
        checked(tiny_dataset, skip_unreadable=True)


def test_files_are_opened_for_a_limited_time_only(tiny_dataset, monkeypatch):
    """What is missing is found nevertheless."""
    first, second, *_ = paths(tiny_dataset)
    spoil(tiny_dataset.image_dir / first, "empty")
    monkeypatch.setattr(image_checks, "SECONDS", -1)
    assert checked(tiny_dataset)[1] == [
        "42 of 42 annotated images were not opened within -1 s: they are checked when they are used"
    ]
    assert len(checked(tiny_dataset, skip_unreadable=True)[1]) == 2  # takes its time
    (tiny_dataset.image_dir / second).unlink()
    with pytest.raises(UserError, match="1 of 42 annotated images are missing"):
        checked(tiny_dataset)


def test_the_ranks_of_a_machine_share_the_files_and_find_the_same(tiny_dataset, monkeypatch):
    names = paths(tiny_dataset)
    for name in names[3:6]:
        spoil(tiny_dataset.image_dir / name, "empty")
    gathered: dict[int, list[str]] = {}

    class Recorded(Ranks):
        def all_gather_list(self, items: list[str]) -> list[str]:
            gathered[self.rank] = items
            return [item for rank in sorted(gathered) for item in gathered[rank]]

    opened: list[str] = []
    check = image_checks.check_header
    monkeypatch.setattr(image_checks, "check_header", lambda path: (opened.append(str(path)), check(path)))
    for rank in range(2):
        monkeypatch.setitem(os.environ, "LOCAL_RANK", str(rank))
        monkeypatch.setitem(os.environ, "LOCAL_WORLD_SIZE", "2")
        with pytest.raises(UserError) as error:
            check_images(read_annotations(*tiny_dataset), tiny_dataset.image_dir, Recorded(rank, 2, ALONE.device))
    assert "3 of 42" in str(error.value)
    assert [name for name in names if name in str(error.value)] == names[3:6]
    assert sorted(opened) == sorted(str(tiny_dataset.image_dir / name) for name in names)


def test_a_signal_does_not_wait_for_all_files(tiny_dataset, monkeypatch):
    opened = []

    def receive(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(image_checks, "check_header", lambda path: (opened.append(path), time.sleep(0.01)))
    monkeypatch.setattr(image_checks, "THREADS", 1)
    monkeypatch.setattr(image_checks, "CHUNK", 1)
    monkeypatch.setattr(image_checks.tqdm, "update", receive)
    with pytest.raises(KeyboardInterrupt):
        checked(tiny_dataset)
    assert len(opened) < 10
