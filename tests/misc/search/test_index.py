"""`search.py index`: the pictures that it finds, second runs, stops and crashes, and mistakes of the user."""

import io
import json
import os
import shutil
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from misc.data.images import read_image
from misc.errors import UserError
from misc.search import indexing
from misc.search.encoder import Encoder
from misc.search.gallery import default_index, held_index, open_gallery
from misc.search.pictures import PictureSet, find_pictures
from misc.terminal import prepare_streams, show
from tests.helpers.runs import Outcome, only_error
from tests.helpers.searching import GELU, NAMES, features_one_by_one, gallery_of, paths_of, save_picture, write_clip


@pytest.fixture
def encoded(monkeypatch) -> list[str]:
    """A list that collects the path of every picture that is decoded."""
    paths: list[str] = []
    decode = PictureSet.__getitem__

    def recorded(self, number):
        paths.append(self.pictures[number].path)
        return decode(self, number)

    monkeypatch.setattr(PictureSet, "__getitem__", recorded)
    return paths


def test_a_terminal_with_few_characters_shows_the_others_escaped(monkeypatch):
    """As on Windows, where Python encodes piped output in the code page of the system."""
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="cp1252", newline="\n"))
    prepare_streams()
    show("ü \u4e2d \udcff")
    assert written.getvalue().decode("cp1252") == "ü \\u4e2d \\udcff\n"


# ---- which pictures are indexed -------------------------------------------------------------------------------------


def test_pictures_at_any_depth_are_encoded(make_index, people, clip):
    outcome = make_index(people)
    assert outcome.status == 0, outcome.err
    names = ["a.jpg", "b.JPEG", "deep/d.webp", "deep/e.jpg", "deep/er/c.png", "f g.png", "ü.jpg"]
    assert paths_of(people) == names
    torch.testing.assert_close(gallery_of(people).features, features_one_by_one(people, clip, names), rtol=0, atol=1e-5)
    assert "7 pictures" in outcome.out and "7 new or changed" in outcome.out
    assert "indexing" in outcome.err and "7/7" in outcome.err
    on_disk = np.load(default_index(people) / "features_1.npy")
    assert on_disk.dtype == np.float32 and np.allclose(np.linalg.norm(on_disk, axis=1), 1)


def test_worker_processes_read_the_same(make_index, people, clip):
    make_index(people)
    features = gallery_of(people).features.clone()
    make_index(people, "--index", people.parent / "other", "--workers", 2)
    torch.testing.assert_close(open_gallery(people.parent / "other").features, features, rtol=0, atol=1e-6)


def test_each_picture_is_found_by_its_path(make_index, people):
    make_index(people)
    found = gallery_of(people)
    assert [found.row_of(path) for path in paths_of(people)] == list(range(7))
    for absent in ("", "a", "a.jpg/", "zzz", "../people/a.jpg", "deep"):
        assert found.row_of(absent) is None


def test_unreadable_files_are_listed_and_skipped(make_index, people):
    (people / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 no more")
    (people / "empty.png").write_bytes(b"")
    (people / "lost.jpg").symlink_to("nowhere.jpg")
    (people / "round").symlink_to("round")
    outcome = make_index(people)
    assert outcome.status == 0
    assert len(paths_of(people)) == 7
    skipped = [line for line in outcome.out.splitlines() if line.startswith("skipped: ")]
    assert [line.split(": ")[1] for line in skipped] == ["broken.jpg", "empty.png", "lost.jpg", "round"]
    assert "No such file" in skipped[2]
    listed = [json.loads(line)["path"] for line in (default_index(people) / "unreadable.jsonl").open()]
    assert listed == ["broken.jpg", "empty.png", "lost.jpg", "round"]


def test_only_a_few_of_many_unreadable_files_are_listed_on_the_terminal(make_index, people):
    for number in range(15):
        (people / f"broken{number:02}.jpg").write_bytes(b"")
    outcome = make_index(people)
    assert outcome.out.count("skipped: broken") == 10
    assert "skipped: 5 more; the complete list is" in outcome.out and "15 skipped" in outcome.out


def test_a_repaired_file_is_indexed(make_index, people):
    content = (people / "a.jpg").read_bytes()
    times = (1_600_000_000, 1_600_000_000)
    (people / "a.jpg").write_bytes(b"x" * len(content))
    os.utime(people / "a.jpg", times)
    make_index(people)
    assert "a.jpg" not in paths_of(people)
    (people / "a.jpg").write_bytes(content)
    os.utime(people / "a.jpg", times)  # only its content has changed
    make_index(people)
    assert "a.jpg" in paths_of(people)


def test_links_are_followed_but_not_in_circles(make_index, people, tmp_path):
    save_picture(tmp_path / "elsewhere" / "h.jpg", "yellow")
    (people / "linked").symlink_to(tmp_path / "elsewhere")
    (people / "deep" / "again").symlink_to(people)
    make_index(people)
    assert "linked/h.jpg" in paths_of(people)
    assert not any("again" in path for path in paths_of(people))


def test_sheets_in_an_index_inside_the_folder_are_not_indexed(make_index, call_search, people):
    place = ("--index", people / "deep" / "index")
    make_index(people, *place)
    assert call_search("query", people, "red", *place).status == 0
    assert list((people / "deep" / "index" / "sheets").iterdir())
    assert "7 pictures" in make_index(people, *place).out


def test_folders_that_link_to_each_other_are_read_once(people):
    folders = [people / f"folder{number}" for number in range(8)]
    for number, folder in enumerate(folders):
        save_picture(folder / f"{number}.jpg", "red")
        for other in folders:
            (folder / f"to_{other.name}").symlink_to(other)
    pictures, unreadable = find_pictures(people)
    assert {picture.path for picture in pictures} == {*NAMES, *(f"folder{n}/{n}.jpg" for n in range(8))}
    assert len(pictures) == 7 + 8 and unreadable == []


def test_images_of_every_format_are_indexed_or_named(make_index, tmp_path):
    folder = tmp_path / "people"
    read = ["a.bmp", "b.tif", "c.TIFF", "d.gif", "e.jfif", "f.JPE", "g.ppm", "h.png"]
    for name in read:
        save_picture(folder / name, "red")
    for name in ("i.heic", "j.CR2", "k.psd", "notes.txt"):
        (folder / name).write_bytes(b"something")
    os.mkfifo(folder / "pipe.jpg")
    outcome = make_index(folder)
    assert paths_of(folder) == sorted(read) and "8 pictures" in outcome.out and "4 skipped" in outcome.out
    assert "skipped: i.heic: its format is not read: convert it to JPEG" in outcome.out
    assert "skipped: pipe.jpg: it is not a regular file" in outcome.out
    for name in read:
        (folder / name).unlink()
    assert "(i.heic: its format is not read" in only_error(make_index(folder))


def test_a_name_that_is_not_utf8_is_skipped(make_index, people):
    shutil.copy(people / "a.jpg", os.fsencode(people) + b"/\xff.jpg")
    outcome = make_index(people)
    assert outcome.status == 0 and "skipped: \\udcff.jpg: its name is not valid UTF-8: rename it" in outcome.out
    assert len(paths_of(people)) == 7


def test_pictures_are_rotated_according_to_exif(people):
    sideways = Image.new("RGB", (40, 20), "white")
    sideways.paste("red", (0, 0, 20, 20))  # the left side, which becomes the top
    exif = Image.Exif()
    exif[0x0112] = 6
    sideways.save(people / "turned.png", exif=exif)
    upright = read_image(people / "turned.png", upright=True)
    assert upright.size == (20, 40)
    assert (upright.getpixel((10, 5)), upright.getpixel((10, 35))) == ((255, 0, 0), (255, 255, 255))
    assert read_image(people / "turned.png").size == (40, 20)  # without rotation, as datasets are read


# ---- second runs ----------------------------------------------------------------------------------------------------


def test_a_second_run_encodes_only_new_and_changed_pictures(make_index, people, clip, encoded):
    make_index(people)
    assert len(encoded) == 7
    encoded.clear()
    assert "0 new or changed, 0 removed" in make_index(people).out
    assert encoded == []

    save_picture(people / "new.jpg", "yellow")
    save_picture(people / "a.jpg", "cyan")
    os.utime(people / "a.jpg", (1, 1))
    (people / "b.JPEG").unlink()
    outcome = make_index(people)
    assert sorted(encoded) == ["a.jpg", "new.jpg"]
    assert "2 new or changed, 1 removed" in outcome.out
    names = ["a.jpg", "deep/d.webp", "deep/e.jpg", "deep/er/c.png", "f g.png", "new.jpg", "ü.jpg"]
    assert paths_of(people) == names
    torch.testing.assert_close(gallery_of(people).features, features_one_by_one(people, clip, names), rtol=0, atol=1e-5)


def test_a_second_run_does_not_need_the_checkpoint(make_index, call_search, people):
    make_index(people)
    save_picture(people / "new.jpg", "yellow")
    assert call_search("index", people, "--workers", 0).status == 0
    assert len(paths_of(people)) == 8


def test_a_folder_may_be_moved_with_its_index(make_index, call_search, people, encoded):
    make_index(people)
    moved = people.with_name("moved")
    people.rename(moved)
    default_index(people).rename(default_index(moved))
    encoded.clear()
    assert call_search("index", moved, "--workers", 0).status == 0 and encoded == []
    assert call_search("query", moved, "red").status == 0


def test_only_the_files_of_the_newest_generation_are_left(make_index, people):
    make_index(people)
    save_picture(people / "new.jpg", "yellow")
    make_index(people)
    mine = default_index(people) / "red_1.png"  # a user's own file
    mine.write_bytes(b"mine")
    save_picture(people / "newer.jpg", "yellow")
    make_index(people)
    names = {path.name for path in default_index(people).iterdir()}
    own = {"lock", "index.json", "unreadable.jsonl", "encoded.f32", "encoded.jsonl", "encoded.with"}
    assert names == own | {"features_3.npy", "pictures_3.jsonl", "red_1.png"}


def test_an_open_gallery_keeps_its_generation(make_index, people):
    make_index(people)
    old = gallery_of(people)
    before = old.features.clone()
    save_picture(people / "a.jpg", "yellow")
    save_picture(people / "0.jpg", "cyan")
    make_index(people)
    assert torch.equal(old.features, before) and old.picture(0).path == "a.jpg"
    assert gallery_of(people).picture(0).path == "0.jpg"


# ---- stops and crashes ----------------------------------------------------------------------------------------------


def stop_after(monkeypatch, batches: int, error: BaseException) -> None:
    encode, count = Encoder.encode_pictures, 0

    def counted(self, pixels):
        nonlocal count
        count += 1
        if count > batches:
            raise error
        return encode(self, pixels)

    monkeypatch.setattr(Encoder, "encode_pictures", counted)


def test_a_stopped_index_continues_where_it_stopped(make_index, call_search, people, clip, encoded, monkeypatch):
    with monkeypatch.context() as patched:
        stop_after(patched, 2, KeyboardInterrupt())
        outcome = make_index(people)
    assert outcome.status == 130 and outcome.err.splitlines()[-1] == "stopped: run the same command again to continue"
    assert "is not complete: run `python search.py index` again" in only_error(call_search("query", people, "red"))
    encoded.clear()
    outcome = make_index(people)
    assert encoded == ["deep/er/c.png", "f g.png", "ü.jpg"]  # two batches of two were done
    assert "4/7" in outcome.err or "57%" in outcome.err
    torch.testing.assert_close(
        gallery_of(people).features, features_one_by_one(people, clip, paths_of(people)), rtol=0, atol=1e-5
    )


def test_truncated_features_are_encoded_again(make_index, people, clip, encoded, monkeypatch):
    with monkeypatch.context() as patched:
        stop_after(patched, 2, KeyboardInterrupt())
        make_index(people)
    place = default_index(people)
    os.truncate(place / "encoded.jsonl", (place / "encoded.jsonl").stat().st_size - 3)  # the fourth line
    os.truncate(place / "encoded.f32", 2 * 4 * 32 + 5)  # in the third feature
    encoded.clear()
    make_index(people)
    assert encoded == ["deep/d.webp", "deep/e.jpg", "deep/er/c.png", "f g.png", "ü.jpg"]
    torch.testing.assert_close(
        gallery_of(people).features, features_one_by_one(people, clip, paths_of(people)), rtol=0, atol=1e-5
    )


def test_a_damaged_feature_of_a_stopped_index_is_encoded_again(make_index, people, clip, monkeypatch):
    with monkeypatch.context() as patched:
        stop_after(patched, 2, KeyboardInterrupt())
        make_index(people)
    file = default_index(people) / "encoded.f32"
    content = bytearray(file.read_bytes())
    content[2 * 4 * 32] ^= 1  # the third feature
    file.write_bytes(content)
    assert make_index(people).status == 0
    torch.testing.assert_close(
        gallery_of(people).features, features_one_by_one(people, clip, paths_of(people)), rtol=0, atol=1e-7
    )


@pytest.mark.parametrize("place", ["write_generation", "Gallery", "write_info", "remove_old", "_write_unreadable"])
def test_a_crash_while_the_index_is_written_loses_nothing(make_index, people, encoded, monkeypatch, place):
    make_index(people)
    save_picture(people / "new.jpg", "yellow")

    class Crash(BaseException):
        """A crash that no code handles, like a power cut."""

    def crash(*_):
        raise Crash

    with monkeypatch.context() as patched, pytest.raises(Crash):
        patched.setattr(indexing, place, crash)
        make_index(people)
    # The old generation is searched until the new one is complete.
    assert len(paths_of(people)) == (8 if place == "remove_old" else 7)
    encoded.clear()
    assert make_index(people).status == 0
    assert encoded == []
    assert len(paths_of(people)) == 8


def test_a_full_disk_is_reported_and_nothing_is_lost(make_index, people, monkeypatch, full_disk):
    make_index(people)
    for number in range(400):
        save_picture(people / f"new{number}.jpg", "yellow")
    with monkeypatch.context() as patched:
        patched.setattr("signal.signal", lambda *_: None)
        full_disk(30_000)
        outcome = make_index(people)
    assert outcome.status == 2 and "free some space, then run the same command again to continue" in outcome.err
    assert len(paths_of(people)) == 7


# ---- mistakes -------------------------------------------------------------------------------------------------------


def test_an_overwritten_index_keeps_its_engine(make_index, people, tmp_path):
    pytest.importorskip("faiss", reason="needs requirements-search.txt")
    make_index(people, "--engine", "faiss")
    other = write_clip(tmp_path / "other.pt", seed=1)
    assert make_index(people, "--checkpoint", other, "--set", GELU, "--overwrite").status == 0
    assert gallery_of(people).info.engine["name"] == "faiss"


def test_features_of_another_checkpoint_are_not_mixed(make_index, people, tmp_path, encoded, monkeypatch):
    make_index(people)
    other = write_clip(tmp_path / "other.pt", seed=1)
    given = ("--checkpoint", other, "--set", GELU)
    refused = make_index(people, *given)
    assert "not comparable" in only_error(refused) and "--overwrite" in refused.err
    before = gallery_of(people).features.clone()
    with monkeypatch.context() as patched:
        stop_after(patched, 2, KeyboardInterrupt())
        assert make_index(people, *given, "--overwrite").status == 130
    assert torch.equal(gallery_of(people).features, before)  # until the new index is complete
    encoded.clear()
    assert make_index(people, *given, "--overwrite").status == 0
    assert len(encoded) == 3
    torch.testing.assert_close(
        gallery_of(people).features, features_one_by_one(people, other, paths_of(people)), rtol=0, atol=1e-5
    )
    assert not torch.allclose(gallery_of(people).features, before, atol=0.05)


def test_the_same_weights_in_another_file_are_the_same(make_index, people, clip, tmp_path, encoded):
    make_index(people)
    shutil.copy(clip, tmp_path / "copy.pt")
    encoded.clear()
    assert make_index(people, "--checkpoint", tmp_path / "copy.pt", "--set", GELU).status == 0
    assert encoded == [] and gallery_of(people).info.checkpoint == str(tmp_path / "copy.pt")


def test_another_activation_is_another_encoder(make_index, people, clip):
    make_index(people)
    refused = make_index(people, "--checkpoint", clip, "--set", "model.activation=quick_gelu")
    assert "not comparable" in only_error(refused)


def test_two_processes_do_not_write_one_index(make_index, people):
    make_index(people)
    with held_index(default_index(people)):
        refused: list[Outcome] = []
        thread = threading.Thread(target=lambda: refused.append(make_index(people)))
        thread.start()
        thread.join()
    assert "another process" in only_error(refused[0])


def test_a_folder_with_other_files_is_not_used_as_an_index(make_index, people):
    default_index(people).mkdir()
    (default_index(people) / "thesis.tex").write_text("all of it")
    assert "thesis.tex" in only_error(make_index(people))
    assert [path.name for path in default_index(people).iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize("content", ["", "[]", '{"format": 1}', "\x00", '"index"'])
def test_a_damaged_index_is_reported(make_index, call_search, people, content):
    make_index(people)
    (default_index(people) / "index.json").write_text(content)
    assert "index.json" in only_error(make_index(people))
    assert "index.json" in only_error(call_search("query", people, "red"))


def test_an_index_of_a_newer_program_is_reported(make_index, people):
    make_index(people)
    file = default_index(people) / "index.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"format": 3, "more": 1}))
    assert "format 3" in only_error(make_index(people))


def test_a_feature_file_of_another_size_is_reported(make_index, call_search, people):
    make_index(people)
    np.save(default_index(people) / "features_1.npy", np.zeros((6, 32), np.float32))
    assert "is damaged" in only_error(call_search("query", people, "red"))
    for size in (1000, 200, 3, 0):
        os.truncate(default_index(people) / "features_1.npy", size)
        assert "is damaged" in only_error(call_search("query", people, "red"))
    (default_index(people) / "features_1.npy").unlink()
    assert "is damaged" in only_error(call_search("query", people, "red"))


def test_mistakes_are_reported_before_anything_is_created(make_index, call_search, people, tmp_path):
    nowhere = tmp_path / "nowhere"
    assert "is not a folder" in only_error(make_index(nowhere))
    (tmp_path / "round").symlink_to("round")
    for folder in (tmp_path / "round", tmp_path / ("x" * 300), people / "a.jpg" / "b"):
        assert "is not a folder" in only_error(make_index(folder))
        assert "is not a folder" in only_error(call_search("query", folder, "red"))
        assert "--index" in only_error(make_index(people, "--index", folder))
    (tmp_path / "bare").mkdir()
    assert "contains no images that can be read" in only_error(make_index(tmp_path / "bare"))
    assert "--checkpoint" in only_error(call_search("index", people))
    assert "lost.pt" in only_error(make_index(people, "--checkpoint", tmp_path / "lost.pt"))
    given = ("--checkpoint", tmp_path / "lost.pt", "--set")
    assert "schedule.epoch=3" in only_error(make_index(people, *given, "schedule.epoch=3"))
    assert "--device tpu" in only_error(make_index(people, "--device", "tpu"))
    assert "--qdrant" in only_error(make_index(people, "--qdrant", "http://localhost"))
    assert "--set" in only_error(call_search("index", people, "--set", GELU))
    assert "does not exist" in only_error(call_search("query", people, "red"))
    assert not default_index(people).exists() and not default_index(tmp_path / "bare").exists()


def test_weights_whose_features_overflow_are_not_indexed(make_index, call_search, people, clip, tmp_path):
    state = torch.load(clip)
    torch.save(state | {"visual.proj": 1e20 * state["visual.proj"]}, tmp_path / "images.pt")
    torch.save(state | {"text_projection": 1e20 * state["text_projection"]}, tmp_path / "texts.pt")
    outcome = make_index(people, "--checkpoint", tmp_path / "images.pt", "--set", GELU)
    assert outcome.status == 2 and "error: the image a.jpg has an invalid feature" in outcome.err
    assert make_index(people, "--checkpoint", tmp_path / "texts.pt", "--set", GELU, "--overwrite").status == 0
    assert "the description 'red' has an invalid feature" in only_error(call_search("query", people, "red"))
    assert call_search("query", people, "--image", people / "a.jpg").status == 0


def test_weights_without_an_activation_need_the_setting(make_index, people, clip):
    assert GELU in only_error(make_index(people, "--checkpoint", clip))


def test_a_folder_with_only_unreadable_pictures(make_index, tmp_path):
    (tmp_path / "people").mkdir()
    (tmp_path / "people" / "a.jpg").write_bytes(b"")
    outcome = make_index(tmp_path / "people")
    assert outcome.status == 2
    assert "none of its 1 pictures can be read (a.jpg" in outcome.err.splitlines()[-1]  # after the progress bar


def test_a_folder_that_cannot_be_written(make_index, people, monkeypatch):
    assert "--index" in only_error(make_index(people, "--index", people / "a.jpg" / "index"))

    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", refuse)
    assert "Permission denied" in only_error(make_index(people))


def test_an_index_that_may_not_be_read_is_not_to_be_removed(make_index, call_search, people, monkeypatch):
    make_index(people)
    read_bytes = Path.read_bytes

    def refusing(path):
        if path.name == "index.json":
            raise PermissionError(13, "Permission denied")
        return read_bytes(path)

    monkeypatch.setattr(Path, "read_bytes", refusing)
    for command in (("query", people, "red"), ("index", people)):
        message = only_error(call_search(*command))
        assert "index.json cannot be read (Permission denied): check its permissions" in message


def test_unreadable_folders_are_listed(people, monkeypatch):
    scandir = os.scandir

    def refusing(path):
        if Path(path).name == "deep":
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    pictures, unreadable = find_pictures(people)
    assert len(pictures) == 4 and unreadable == [("deep", "Permission denied")]
    with pytest.raises(UserError):
        find_pictures(people / "a.jpg")


def test_pictures_of_an_unreadable_folder_stay_in_the_index(make_index, people, encoded, monkeypatch):
    make_index(people)
    scandir = os.scandir

    def refusing(path):
        if Path(path).name == "deep":
            raise OSError(5, "Input/output error")
        return scandir(path)

    with monkeypatch.context() as patched:
        patched.setattr(os, "scandir", refusing)
        outcome = make_index(people)
    assert "skipped: deep: Input/output error" in outcome.out and "7 pictures" in outcome.out
    encoded.clear()
    make_index(people)
    assert encoded == []
