"""The index of a folder of pictures: the feature of each picture, its path, size and time of modification.

An index is a folder. `index.json` describes it and records the number n of the current generation. The files of a
generation never change: `features_<n>.npy` (N, D) float32, `pictures_<n>.jsonl` (a line for each row, sorted by path)
and the files that an engine has built. A new generation replaces the old one when it is complete; until then, searches
use the old one. Features that are in no generation yet are in `encoded.f32`, and their pictures in `encoded.jsonl`.

N pictures, D width of the shared space.
"""

import bisect
import json
import mmap
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from misc.errors import UserError, first_of
from misc.files import CAN_REPLACE_OPEN_FILES, atomic_file, lock_file, partial_path
from misc.search.pictures import Picture

FORMAT = 1
"""Version of the format of an index: raised when older programs cannot read a new index."""
INFO, LOCK = "index.json", "lock"
ENCODED_FEATURES, ENCODED_PICTURES, ENCODED_WITH = "encoded.f32", "encoded.jsonl", "encoded.with"
GENERATION_FILE = re.compile(r"(?P<kind>features|pictures|faiss)_(?P<generation>\d+)\.(npy|jsonl|index)(\.part)?")
"""Names of the files of a generation; a user may keep other files in the index."""
ROWS_AT_ONCE = 1 << 14
"""Features that are copied at a time: 32 MB at a width of 512."""


@dataclass(frozen=True)
class Info:
    """The content of `index.json`.

    Attributes:
        checkpoint: source of the weights.
        overrides: `key=value` of the configuration, for settings that the weights file does not record.
        fingerprint: fingerprint of the encoder.
        width: D.
        generation: number of times that the index was completed; 0 if it was never complete.
        pictures: N.
        engine: `name` of the engine, and the settings that it needs to be opened.
        format: version of the format, `FORMAT`.
    """

    checkpoint: str
    overrides: list[str]
    fingerprint: str
    width: int
    generation: int = 0
    pictures: int = 0
    engine: dict[str, Any] = field(default_factory=lambda: {"name": "exact"})
    format: int = FORMAT


def default_index(folder: Path) -> Path:
    """Returns the default index of a folder of pictures: `FOLDER_index` in its parent folder.

    Raises UserError if the folder has no parent folder.
    """
    folder = folder.resolve()
    if not folder.name:
        raise UserError(f"{folder} has no parent folder for its index: give a folder for it with --index DIR")
    return folder.with_name(f"{folder.name}_index")


def read_info(index: Path) -> Info | None:
    """Reads `index.json`.

    Returns: its content, or None if there is no index.

    Raises UserError if the file is unreadable, not that of an index, or in another format.
    """
    try:
        content = json.loads((index / INFO).read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"{index / INFO} cannot be read ({error}): give another --index") from error
    if isinstance(content, dict) and content.get("format") not in (FORMAT, None):
        raise UserError(
            f"{index} has the format {content['format']!r}, not {FORMAT}: use the version of the program that built it"
        )
    if not isinstance(content, dict) or content.keys() != {each.name for each in fields(Info)}:
        raise UserError(f"{index / INFO} does not describe an index: give another --index")
    return Info(**content)


def write_info(index: Path, info: Info) -> None:
    """Writes `index.json` atomically: after that, its generation is the current one."""
    with atomic_file(index / INFO) as file:
        file.write(json.dumps(asdict(info), indent=1).encode() + b"\n")


@contextmanager
def held_index(index: Path) -> Iterator[None]:
    """Creates the folder of an index if necessary, and locks it: only one process may write to it.

    Raises UserError if another process has the lock, or the folder contains other files or cannot be created.
    """
    try:
        index.mkdir(parents=True, exist_ok=True)
        names = {path.name for path in index.iterdir()}
        partial = {partial_path(Path(name)).name for name in (INFO, ENCODED_WITH)}  # by a process that was killed
        others = sorted(names - partial - {LOCK, ENCODED_FEATURES, ENCODED_PICTURES, ENCODED_WITH})
        if others and INFO not in names:
            raise UserError(
                f"{index} is not an index, but contains other files ({first_of(others)}): give another --index"
            )
        file = (index / LOCK).open("ab")
    except OSError as error:
        raise UserError(f"{index} cannot be written ({error.strerror}): give another folder with --index") from error
    try:
        lock_file(file)
    except BlockingIOError as error:
        raise UserError(f"{index} is being written by another process: wait until it has ended") from error
    with file:
        yield


class Gallery:
    """One generation of an index, for reading. Its features stay on the disk and are read when they are needed.

    Attributes:
        index: folder of the index.
        info: content of `index.json`.
        features: (N, D) float32, L2-normalised.

    Raises UserError if the files of the generation do not fit together.
    """

    def __init__(self, index: Path, info: Info):
        self.index, self.info = index, info
        # "c" is copy-on-write: torch warns if an array is not writable.
        array = np.load(features_file(index, info.generation), mmap_mode="c")
        self.features: Tensor = torch.from_numpy(array)
        self._lines = _Lines(_pictures_file(index, info.generation))
        if not (array.dtype == np.float32 and array.shape == (len(self._lines), info.width)):
            raise UserError(f"{index} is damaged: remove it and index the folder again")

    def __len__(self) -> int:
        return len(self._lines)

    def picture(self, row: int) -> Picture:
        """Returns the picture of a row."""
        return self._lines[row]

    def row_of(self, path: str) -> int | None:
        """Returns the row of a path, or None if the path is not in the index."""
        row = bisect.bisect_left(self._lines, path, key=lambda picture: picture.path)
        return row if row < len(self) and self._lines[row].path == path else None

    def pictures(self) -> Iterator[Picture]:
        """Returns all pictures in the order of their rows, which are sorted by path."""
        return iter(self._lines)


def open_gallery(index: Path) -> Gallery:
    """Opens the current generation of an index.

    Raises UserError if there is none, or it is damaged.
    """
    for last in (False, True):
        info = read_info(index)
        if info is None:
            raise UserError(f"{index} does not exist: run `python search.py index` for the folder first")
        if info.generation == 0:
            raise UserError(
                f"{index} is not complete: run `python search.py index` again, it continues from where it stopped"
            )
        try:
            return Gallery(index, info)
        except UserError:
            raise
        except (OSError, ValueError, EOFError) as error:  # truncated, or a new generation has just replaced it
            if last:
                raise UserError(f"{index} is damaged ({error}): remove it and index the folder again") from error
    raise AssertionError


class Encoded:
    """Features that are in no generation yet, appended batch by batch: a stopped program loses at most one batch.

    Attributes:
        width: D.
        pictures: the picture of each row.
    """

    def __init__(self, index: Path, fingerprint: str, width: int):
        self.width = width
        self._features_path = index / ENCODED_FEATURES
        self._features: BinaryIO = self._features_path.open("a+b")
        self._pictures: BinaryIO = (index / ENCODED_PICTURES).open("a+b")
        encoder = index / ENCODED_WITH
        if (
            not encoder.exists() or encoder.read_text(encoding="utf-8") != fingerprint
        ):  # features of another encoder are useless
            self._pictures.truncate(0)
            with atomic_file(encoder) as file:
                file.write(fingerprint.encode())
        self._pictures.seek(0)
        lines = self._pictures.read().split(b"\n")[:-1]  # the last item is empty or a line that was not completed
        complete = self._features.seek(0, os.SEEK_END) // (4 * width)
        lines = lines[:complete]
        self.pictures = [_parse(line) for line in lines]
        self._pictures.truncate(sum(len(line) + 1 for line in lines))
        self._features.truncate(4 * width * len(lines))

    def add(self, pictures: Sequence[Picture], features: Tensor) -> None:
        """Appends B pictures and their features (B, D) float32."""
        for file, content in (
            (self._features, features.numpy().tobytes()),
            (self._pictures, b"".join(_line(picture) for picture in pictures)),  # last: a line must have its feature
        ):
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        self.pictures.extend(pictures)

    def features(self) -> np.ndarray:
        """Returns the features (rows, D) float32, one row for each of `pictures`."""
        shape = (len(self.pictures), self.width)
        return np.memmap(self._features_path, np.float32, "r", shape=shape) if self.pictures else np.empty(shape)

    def clear(self) -> None:
        """Deletes all features, once they are in a generation."""
        for file in (self._pictures, self._features):
            file.truncate(0)
        self.pictures.clear()

    def close(self) -> None:
        """Closes the files."""
        self._pictures.close()
        self._features.close()


def write_generation(
    index: Path, info: Info, pictures: Sequence[Picture], previous: Gallery | None, encoded: Encoded
) -> Info:
    """Writes the next generation of the index; `write_info` then makes it the current one.

    Args:
        info: content of `index.json`; its generation is the current one.
        pictures: pictures of the next generation, sorted by path. Each has its feature in `previous` or `encoded`.
        previous: current generation. None: all features are in `encoded`.
        encoded: features of new and changed pictures.

    Returns: the content of `index.json` for the next generation.
    """
    generation = info.generation + 1
    for path, _, number in _generation_files(index):
        if number == generation:  # left by a crash, and perhaps with other pictures
            path.unlink()
    row_new = {picture: row for row, picture in enumerate(encoded.pictures)}
    new_rows = np.array([row_new.get(each, -1) for each in pictures], dtype=np.int64)
    sources = [(new_rows, encoded.features())]
    if previous is not None:
        row_old = {picture: row for row, picture in enumerate(previous.pictures())}
        old_rows = np.array([row_old.get(each, -1) if each not in row_new else -1 for each in pictures], dtype=np.int64)
        sources.append((old_rows, previous.features.numpy()))
    with atomic_file(features_file(index, generation)) as file:
        header = {"descr": "<f4", "fortran_order": False, "shape": (len(pictures), info.width)}
        np.lib.format.write_array_header_1_0(file, header)
        for start in range(0, len(pictures), ROWS_AT_ONCE):
            block = np.empty((min(ROWS_AT_ONCE, len(pictures) - start), info.width), np.float32)
            for rows, features in sources:
                part = rows[start : start + ROWS_AT_ONCE]
                if (part >= 0).any():
                    block[part >= 0] = features[part[part >= 0]]
            file.write(block.tobytes())
    with atomic_file(_pictures_file(index, generation)) as file:
        file.writelines(_line(picture) for picture in pictures)
    return replace(info, generation=generation, pictures=len(pictures))


def remove_old(index: Path, info: Info) -> None:
    """Removes the files of other generations and engines. A process that has them open can still read them.

    Windows cannot remove an open file, so it stays there until a later update.
    """
    current_kinds = ("features", "pictures", info.engine["name"])
    for path, kind, generation in _generation_files(index):
        if generation != info.generation or kind not in current_kinds:
            with suppress(*(() if CAN_REPLACE_OPEN_FILES else (PermissionError,))):
                path.unlink(missing_ok=True)


def _generation_files(index: Path) -> list[tuple[Path, str, int]]:
    """Returns the files of all generations, each with its kind and the number of its generation."""
    matches = [(path, GENERATION_FILE.fullmatch(path.name)) for path in index.iterdir()]
    return [(path, match["kind"], int(match["generation"])) for path, match in matches if match]


def features_file(index: Path, generation: int) -> Path:
    """Returns the path of the features of a generation."""
    return index / f"features_{generation}.npy"


def _pictures_file(index: Path, generation: int) -> Path:
    return index / f"pictures_{generation}.jsonl"


class _Lines:
    """The pictures of a file, each parsed only on access: a million objects would take 250 MB and several seconds."""

    def __init__(self, path: Path):
        with path.open("rb") as file:
            self._content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if path.stat().st_size else b""
        self._ends = np.flatnonzero(np.frombuffer(self._content, np.uint8) == ord("\n"))

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, row: int) -> Picture:
        end = self._ends[row]  # iteration ends with an IndexError
        return _parse(self._content[self._ends[row - 1] + 1 if row else 0 : end])


def _line(picture: Picture) -> bytes:
    return json.dumps(picture).encode() + b"\n"


def _parse(line: bytes) -> Picture:
    return Picture(*json.loads(line))
