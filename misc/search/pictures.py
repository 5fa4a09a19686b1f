"""The pictures of a folder: finds them, and decodes them into batches of pixels."""

import heapq
import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from misc.data.images import FORMATS, ImageError, decode_image, read_image
from misc.data.views import EvaluationView
from misc.data.workers import build_loader, received
from misc.errors import UserError
from misc.files import is_folder, open_regular, resolved

SUFFIXES = tuple(suffix for suffixes in FORMATS.values() for suffix in suffixes)
"""Suffixes of the files that are indexed."""
OTHER_SUFFIXES = (
    *(".heic", ".heif", ".jxl", ".jp2", ".psd", ".tga", ".dds", ".ico", ".svg", ".eps"),
    *(".dng", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".rw2", ".raf"),  # of cameras
)
"""Suffixes of other images, so that a user knows that they are not indexed."""
MEDIA_TYPES = {
    "JPEG": "image/jpeg",
    "MPO": "image/jpeg",
    "PNG": "image/png",
    "WEBP": "image/webp",
    "GIF": "image/gif",
    "BMP": "image/bmp",
    "AVIF": "image/avif",
}
"""Media types of the formats that browsers show."""


class Picture(NamedTuple):
    """A picture file, with its size and time, which show whether it has changed.

    Attributes:
        path: path relative to the folder, with "/" between its parts.
        size: size in bytes.
        modified: time of modification, in nanoseconds since 1970.
    """

    path: str
    size: int
    modified: int


class Unreadable(NamedTuple):
    """A file or folder that cannot be read, and the reason."""

    path: str
    reason: str


def picture_to_show(folder: Path, picture: Picture) -> tuple[bytes, str]:
    """Reads an indexed picture for a browser.

    A link to a place outside the folder is only followed to the very file that was indexed: others may be able to
    replace a picture by a link to something that they cannot read themselves.

    Returns: the content of the file, or a JPEG if browsers do not show its format; and the media type.

    Raises UserError if the file does not exist any more, has been replaced, or is not a picture.
    """
    file = folder / picture.path
    try:
        with open_regular(file) as opened:
            status = os.fstat(opened.fileno())
            inside = resolved(file).is_relative_to(resolved(folder))
            if not inside and (status.st_size, status.st_mtime_ns) != (picture.size, picture.modified):
                raise UserError(f"{picture.path} has been replaced: index the folder again")
            image, form = decode_image(opened, file)
            if form in MEDIA_TYPES:
                opened.seek(0)
                return opened.read(), MEDIA_TYPES[form]
    except ImageError as error:
        raise UserError(f"{picture.path} is no picture any more ({error.reason}): index the folder again") from error
    except FileNotFoundError as error:
        raise UserError(f"{picture.path} does not exist any more: index the folder again") from error
    except OSError as error:
        raise UserError(f"{picture.path} cannot be read ({error.strerror or error}): index the folder again") from error
    converted = io.BytesIO()
    image.save(converted, "JPEG", quality=90)
    return converted.getvalue(), "image/jpeg"


def find_pictures(folder: Path, index: Path | None = None) -> tuple[list[Picture], list[Unreadable]]:
    """Finds all image files in a folder and its subfolders, by their suffixes in any case.

    Names that begin with a dot are skipped. So is the folder `index`, which contains results images. Links are
    followed, but each folder is read once: by its own path, or else by the first link to it.

    Returns: the pictures, and the files and folders that cannot be read, both sorted by path. Images of other formats
        are among the latter.

    Raises UserError if the folder does not exist or cannot be read.
    """
    if not is_folder(folder):
        raise UserError(f"{folder} is not a folder: give the folder that contains the pictures")
    pictures: list[Picture] = []
    unreadable: list[Unreadable] = []
    seen = set() if index is None or not is_folder(index) else {_identity(index)}
    folders, links = [""], list[str]()  # that are still to be read; links come last
    while folders or links:
        path = folders.pop() if folders else heapq.heappop(links)
        try:
            identity = _identity(folder / path)
            if identity in seen:
                continue
            seen.add(identity)
            with os.scandir(folder / path) as entries:
                for entry in entries:
                    entry_path = f"{path}/{entry.name}" if path else entry.name
                    if entry.name.startswith("."):
                        continue
                    try:
                        if entry.is_dir(follow_symlinks=False):
                            folders.append(entry_path)
                        elif entry.is_dir():
                            heapq.heappush(links, entry_path)
                        elif entry.name.lower().endswith(SUFFIXES):
                            entry_path.encode()
                            status = entry.stat()
                            if entry.is_file():
                                pictures.append(Picture(entry_path, status.st_size, status.st_mtime_ns))
                            else:
                                unreadable.append(Unreadable(entry_path, "it is not a regular file"))
                        elif entry.name.lower().endswith(OTHER_SUFFIXES):
                            unreadable.append(Unreadable(entry_path, "its format is not read: convert it to JPEG"))
                    except UnicodeEncodeError:  # the page and Qdrant cannot represent such a name
                        unreadable.append(Unreadable(entry_path, "its name is not valid UTF-8: rename it"))
                    except OSError as error:  # a broken link, or a link in a circle
                        unreadable.append(Unreadable(entry_path, _reason(error)))
        except OSError as error:
            if not path:
                raise UserError(
                    f"{folder} cannot be read ({error.strerror}): check the folder and its permissions"
                ) from error
            unreadable.append(Unreadable(path, _reason(error)))
    return sorted(pictures), sorted(unreadable)


def _reason(error: OSError) -> str:
    """Returns what the system says about an error."""
    return error.strerror or str(error)


def _identity(folder: Path) -> tuple[int, int]:
    """Returns the device and inode of a folder, which are the same for every path that leads to it."""
    status = folder.stat()
    return status.st_dev, status.st_ino


class PictureSet(Dataset):
    """A dataset of pictures, each with its pixels (3, H, W), normalised; or an `Unreadable` with the reason."""

    def __init__(self, folder: Path, pictures: list[Picture], view: EvaluationView):
        self.folder, self.pictures, self.view = folder, pictures, view

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, number: int) -> "tuple[Picture, Tensor] | Unreadable":
        picture = self.pictures[number]
        try:
            return picture, self.view(read_image(self.folder / picture.path, upright=True))
        except ImageError as error:
            return Unreadable(picture.path, error.reason)


class PictureBatch(NamedTuple):
    """A batch of decoded pictures.

    Attributes:
        pictures: B pictures.
        pixels: (B, 3, H, W); None if B is 0.
        unreadable: pictures that could not be decoded.
    """

    pictures: list[Picture]
    pixels: Tensor | None
    unreadable: list[Unreadable]


def picture_batches(pictures: PictureSet, *, batch_size: int, workers: int) -> Iterator[PictureBatch]:
    """Decodes all pictures, in their order, with `workers` processes (0: in this process)."""
    yield from received(build_loader(pictures, _collate, workers=workers, batch_size=batch_size))


def _collate(items: "list[tuple[Picture, Tensor] | Unreadable]") -> PictureBatch:
    read = [item for item in items if not isinstance(item, Unreadable)]
    return PictureBatch(
        [picture for picture, _ in read],
        torch.stack([pixels for _, pixels in read]) if read else None,
        [item for item in items if isinstance(item, Unreadable)],
    )
