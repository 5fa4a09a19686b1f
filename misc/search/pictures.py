"""The pictures of a folder: which there are, and how they become batches of pixels."""

import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from misc.data.images import read_image
from misc.data.views import EvaluationView
from misc.data.workers import outlive_signals
from misc.errors import UserError
from misc.files import is_folder

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")


class Picture(NamedTuple):
    """A file, and what tells whether it has changed.

    Attributes:
        path: below the folder, with "/" between its parts.
        size: in bytes.
        modified: in nanoseconds since 1970.
    """

    path: str
    size: int
    modified: int


class Unreadable(NamedTuple):
    """A file or folder that cannot be read, and why."""

    path: str
    reason: str


def find_pictures(folder: Path, index: Path | None = None) -> tuple[list[Picture], list[Unreadable]]:
    """All JPEG, PNG and WebP files in a folder at any depth, by path, and what could not be looked at.

    Suffixes count, in any case. Names that begin with a dot are left out, and so is the folder `index`, which holds
    sheets. Links are followed, but not to a folder that they lie in.

    Raises UserError where there is no such folder.
    """
    if not is_folder(folder):
        raise UserError(f"{folder} is not a folder: give the folder that holds the pictures")
    pictures: list[Picture] = []
    unreadable: list[Unreadable] = []
    left_out = frozenset() if index is None or not is_folder(index) else frozenset([_identity(index)])
    waiting = [("", left_out)]  # folders, each with those that it lies in
    while waiting:
        path, above = waiting.pop()
        try:
            identity = _identity(folder / path)
            if identity in above:
                continue
            with os.scandir(folder / path) as entries:
                for entry in entries:
                    below = f"{path}/{entry.name}" if path else entry.name
                    if entry.name.startswith("."):
                        continue
                    try:
                        if entry.is_dir():
                            waiting.append((below, above | {identity}))
                        elif entry.name.lower().endswith(SUFFIXES):
                            below.encode()
                            status = entry.stat()
                            if entry.is_file():
                                pictures.append(Picture(below, status.st_size, status.st_mtime_ns))
                    except UnicodeEncodeError:  # a page and a database have no way to say such a name
                        unreadable.append(Unreadable(below, "its name is no UTF-8: rename it"))
                    except OSError as error:  # a link that leads nowhere, or in a circle
                        unreadable.append(Unreadable(below, error.strerror))
        except OSError as error:
            if not path:
                raise UserError(f"{folder} cannot be read ({error.strerror}): see to it") from error
            unreadable.append(Unreadable(path, error.strerror))
    return sorted(pictures), sorted(unreadable)


def _identity(folder: Path) -> tuple[int, int]:
    """The same whatever path leads to it."""
    status = folder.stat()
    return status.st_dev, status.st_ino


class PictureSet(Dataset):
    """Pictures by number, as (3, H, W) normalised tensors; or why one cannot be read."""

    def __init__(self, folder: Path, pictures: list[Picture], view: EvaluationView):
        self.folder, self.pictures, self.view = folder, pictures, view

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, number: int) -> "tuple[Picture, Tensor] | Unreadable":
        picture = self.pictures[number]
        try:
            return picture, self.view(read_image(self.folder / picture.path, upright=True))
        except UserError as error:
            cause = error.__cause__
            unavailable = isinstance(cause, OSError) and cause.errno in (errno.EACCES, errno.ENOENT)
            return Unreadable(picture.path, cause.strerror if unavailable else "it cannot be decoded")


class PictureBatch(NamedTuple):
    """Some pictures, decoded.

    Attributes:
        pictures: B of them, and pixels: (B, 3, H, W), None where B is 0.
        unreadable: those that have no pixels.
    """

    pictures: list[Picture]
    pixels: Tensor | None
    unreadable: list[Unreadable]


def picture_batches(pictures: PictureSet, *, batch_size: int, workers: int) -> Iterator[PictureBatch]:
    """All pictures, in their order, decoded by `workers` processes (0: by this one)."""
    yield from DataLoader(
        pictures, batch_size=batch_size, collate_fn=_collate, num_workers=workers, worker_init_fn=outlive_signals
    )


def _collate(items: "list[tuple[Picture, Tensor] | Unreadable]") -> PictureBatch:
    read = [item for item in items if not isinstance(item, Unreadable)]
    return PictureBatch(
        [picture for picture, _ in read],
        torch.stack([pixels for _, pixels in read]) if read else None,
        [item for item in items if isinstance(item, Unreadable)],
    )
