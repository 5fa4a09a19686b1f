"""The pictures of a folder: finds them, and decodes them into batches of pixels."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from misc.data.images import ImageError, read_image
from misc.data.views import EvaluationView
from misc.data.workers import build_loader, received
from misc.errors import UserError
from misc.files import is_folder

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")


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


def find_pictures(folder: Path, index: Path | None = None) -> tuple[list[Picture], list[Unreadable]]:
    """Finds all JPEG, PNG and WebP files in a folder and its subfolders, by their suffixes in any case.

    Names that begin with a dot are skipped. So is the folder `index`, which contains results images. Links are
    followed, unless they lead to a folder that contains them.

    Returns: the pictures, and the files and folders that cannot be read, both sorted by path.

    Raises UserError if the folder does not exist or cannot be read.
    """
    if not is_folder(folder):
        raise UserError(f"{folder} is not a folder: give the folder that contains the pictures")
    pictures: list[Picture] = []
    unreadable: list[Unreadable] = []
    excluded = frozenset() if index is None or not is_folder(index) else frozenset([_identity(index)])
    pending = [("", excluded)]  # folders, each with the folders that contain it
    while pending:
        path, ancestors = pending.pop()
        try:
            identity = _identity(folder / path)
            if identity in ancestors:
                continue
            with os.scandir(folder / path) as entries:
                for entry in entries:
                    entry_path = f"{path}/{entry.name}" if path else entry.name
                    if entry.name.startswith("."):
                        continue
                    try:
                        if entry.is_dir():
                            pending.append((entry_path, ancestors | {identity}))
                        elif entry.name.lower().endswith(SUFFIXES):
                            entry_path.encode()
                            status = entry.stat()
                            if entry.is_file():
                                pictures.append(Picture(entry_path, status.st_size, status.st_mtime_ns))
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
