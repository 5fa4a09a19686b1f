"""Pictures that the page shows: only those of the index, and only what is a picture."""

import io
import os
from pathlib import Path

import pytest
from PIL import Image

from misc.errors import UserError
from misc.search.pictures import Picture, find_pictures, picture_to_show
from tests.helpers.searching import save_picture


@pytest.fixture
def people(tmp_path) -> Path:
    """A folder with a picture, and with a link to a folder of pictures elsewhere."""
    save_picture(tmp_path / "people" / "a.jpg", "red")
    save_picture(tmp_path / "elsewhere" / "b.jpg", "green")
    (tmp_path / "people" / "linked").symlink_to(tmp_path / "elsewhere")
    return tmp_path / "people"


def found(folder: Path, path: str) -> Picture:
    """Returns a picture as the index lists it."""
    (picture,) = [picture for picture in find_pictures(folder)[0] if picture.path == path]
    return picture


@pytest.mark.parametrize("path", ["a.jpg", "linked/b.jpg"])
def test_a_picture_is_shown_as_it_is(people, path):
    assert picture_to_show(people, found(people, path)) == ((people / path).read_bytes(), "image/jpeg")


def replace_by_link(file: Path, target: Path) -> None:
    file.unlink()
    file.symlink_to(target)


REPLACEMENTS = {
    "a link to a text": lambda file: replace_by_link(file, Path("/etc/passwd")),
    "a link to a picture elsewhere": lambda file: replace_by_link(file, file.parents[1] / "elsewhere" / "b.jpg"),
    "a link to a text in the folder": lambda file: replace_by_link(file, text_beside(file)),
    "a text": lambda file: file.write_text("root:x:0:0"),
    "a folder": lambda file: (file.unlink(), file.mkdir()),
    "a pipe": lambda file: (file.unlink(), os.mkfifo(file)),
    "a circle": lambda file: replace_by_link(file, file),
    "nothing": Path.unlink,
}


def text_beside(file: Path) -> Path:
    (file.parent / "notes.txt").write_text("something private")
    return file.parent / "notes.txt"


@pytest.mark.parametrize("kind", REPLACEMENTS)
def test_what_has_replaced_a_picture_is_not_shown(people, kind):
    picture = found(people, "a.jpg")
    REPLACEMENTS[kind](people / "a.jpg")
    with pytest.raises(UserError, match=r"^a\.jpg .*: index the folder again$"):
        picture_to_show(people, picture)


def test_a_picture_behind_a_link_is_only_shown_as_it_was_indexed(people):
    picture = found(people, "linked/b.jpg")
    save_picture(people / "linked" / "b.jpg", "blue")
    os.utime(people / "linked" / "b.jpg", (1, 1))
    with pytest.raises(UserError, match="has been replaced"):
        picture_to_show(people, picture)


@pytest.mark.parametrize("suffix", [".tif", ".ppm"])
def test_a_format_that_browsers_do_not_show_is_converted(people, suffix):
    save_picture(people / f"c{suffix}", "red")
    content, media_type = picture_to_show(people, found(people, f"c{suffix}"))
    image = Image.open(io.BytesIO(content))
    assert (image.format, media_type, image.size) == ("JPEG", "image/jpeg", (20, 40))


@pytest.mark.parametrize("suffix", [".png", ".gif", ".bmp", ".webp"])
def test_the_content_decides_the_media_type(people, suffix):
    save_picture(people / f"c{suffix}", "red")
    (people / f"c{suffix}").rename(people / "c.jpg")
    assert picture_to_show(people, found(people, "c.jpg"))[1] == f"image/{suffix[1:]}"
