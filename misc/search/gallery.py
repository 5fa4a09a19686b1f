"""The index of a folder of pictures: the feature of each picture, its path, size and time of modification.

An index is a folder. `index.json` describes it and records the number n of the current generation. The files of a
generation never change: `features_<n>.npy` (N, D) float32, `pictures_<n>.jsonl` (a line for each row, sorted by path)
and the files that an engine has built. A new generation replaces the old one when it is complete; until then, searches
use the old one. Features that are in no generation yet are in `encoded.f32`, and their pictures in `encoded.jsonl`.

N pictures, D width of the shared space.
"""

import bisect
import io
import json
import os
import re
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from misc.errors import UserError, first_of
from misc.files import CAN_REPLACE_OPEN_FILES, atomic_file, is_file, lock_file, partial_path, resolved
from misc.retrieval.metrics import check_features
from misc.search.engine import EngineChoice
from misc.search.pictures import Picture

FORMAT = 2
"""Version of the format of an index: raised when older programs cannot read a new index. Format 1 has no checksums."""
INFO, LOCK = "index.json", "lock"
UNREADABLE, SHEETS = "unreadable.jsonl", "sheets"
"""The list of the files and folders that could not be read, and the folder of the results images."""
ENCODED_FEATURES, ENCODED_PICTURES, ENCODED_WITH = "encoded.f32", "encoded.jsonl", "encoded.with"
GENERATION_FILE = re.compile(r"(?P<kind>features|pictures|faiss)_(?P<generation>\d+)\.(npy|jsonl|index)(\.part)?")
"""Names of the files of a generation; a user may keep other files in the index."""
REMEDY = "remove it and index the folder again, or give another --index"
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
        checksums: CRC-32 of each file of the generation, by its name.
        format: version of the format, `FORMAT`.
    """

    checkpoint: str
    overrides: list[str]
    fingerprint: str
    width: int
    generation: int = 0
    pictures: int = 0
    engine: dict[str, Any] = field(default_factory=lambda: {"name": "exact"})
    checksums: dict[str, int] = field(default_factory=dict)
    format: int = FORMAT


class DamagedIndex(UserError):
    """Files of an index that are missing, or whose content has changed. `reason` says which, for a message."""

    def __init__(self, index: Path, reason: str):
        super().__init__(f"{index} is damaged ({reason}): index the folder again, which encodes its pictures again")
        self.reason = reason


def default_index(folder: Path) -> Path:
    """Returns the default index of a folder of pictures: `FOLDER_index` in its parent folder.

    Raises UserError if the folder has no parent folder.
    """
    folder = resolved(folder)
    if not folder.name:
        raise UserError(f"{folder} has no parent folder for its index: give a folder for it with --index DIR")
    return folder.with_name(f"{folder.name}_index")


def read_info(index: Path) -> Info | None:
    """Reads `index.json`. It is data: it may come from another person, and may be damaged.

    Returns: its content, or None if there is no index.

    Raises UserError if the file is unreadable, not that of an index, or in another format.
    """
    try:
        content = json.loads((index / INFO).read_bytes())
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UserError(
            f"{index / INFO} cannot be read ({error.strerror}): check its permissions, or give another --index"
        ) from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{index / INFO} cannot be read ({error}): {REMEDY}") from error
    if isinstance(content, dict) and content.get("format") == 1:
        content = content | {"checksums": {}, "format": FORMAT}
    if isinstance(content, dict) and content.get("format") not in (FORMAT, None):
        raise UserError(
            f"{index} has the format {content['format']!r}, not {FORMAT}: use the version of the program that built it"
        )
    if not isinstance(content, dict) or content.keys() != {each.name for each in fields(Info)}:
        raise UserError(f"{index / INFO} does not describe an index: {REMEDY}")
    info = Info(**content)
    if invalid := [name for name, valid in _checks(info).items() if not valid]:
        raise UserError(f"{index / INFO} has an invalid value for {first_of(invalid)}: {REMEDY}")
    return info


def _checks(info: Info) -> dict[str, bool]:
    """Returns for each value of `index.json` whether it is valid."""

    def is_count(value: Any) -> bool:
        return type(value) is int and 0 <= value < 1 << 62  # isinstance would accept true and false

    return {
        "checkpoint": isinstance(info.checkpoint, str),
        "overrides": isinstance(info.overrides, list) and all(isinstance(each, str) for each in info.overrides),
        "fingerprint": isinstance(info.fingerprint, str),
        "width": is_count(info.width) and info.width > 0,
        "generation": is_count(info.generation),
        "pictures": is_count(info.pictures),
        "engine": EngineChoice.valid(info.engine),
        "checksums": isinstance(info.checksums, dict) and all(map(is_count, info.checksums.values())),
    }


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
        own = partial | {LOCK, ENCODED_FEATURES, ENCODED_PICTURES, ENCODED_WITH, UNREADABLE, SHEETS}
        others = sorted(name for name in names - own if not GENERATION_FILE.fullmatch(name))
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

    Raises DamagedIndex if the files of the generation do not fit together, or their checksums have changed; OSError if
    one of them cannot be read.
    """

    def __init__(self, index: Path, info: Info):
        self.index, self.info = index, info
        self._features_path = features_file(index, info.generation)
        self._status = _status(self._features_path)
        self._lines = _Lines(_pictures_file(index, info.generation))
        for path in (self._features_path, self._lines.path):
            self.verify(path)
        try:
            # "c" is copy-on-write: torch warns if an array is not writable.
            array = np.lib.format.open_memmap(self._features_path, mode="c")
        except OSError:
            raise
        except Exception as error:  # numpy raises many kinds for a header that has been changed
            raise DamagedIndex(index, f"{self._features_path.name} has no valid header") from error
        if not (array.dtype == np.float32 and array.shape == (len(self._lines), info.width)):
            raise DamagedIndex(index, f"{self._features_path.name} has another size than index.json")
        self.features: Tensor = torch.from_numpy(array)
        if self._features_path.name not in info.checksums:  # of an older program
            self._check_features()

    def _check_features(self) -> None:
        """Raises DamagedIndex if a feature is not finite."""
        for start in range(0, len(self), ROWS_AT_ONCE):
            block = self.features[start : start + ROWS_AT_ONCE]
            try:
                check_features(block, [f"row {start + row}" for row in range(len(block))])
            except UserError as error:
                raise DamagedIndex(self.index, str(error).partition(":")[0]) from error

    def verify(self, path: Path) -> None:
        """Checks a file of this generation, if its checksum is recorded.

        Raises DamagedIndex if its checksum has changed.
        """
        recorded = self.info.checksums.get(path.name)
        if recorded is not None and recorded != checksum(path):
            raise DamagedIndex(self.index, f"{path.name} has changed since it was written")

    def has_changed(self) -> bool:
        """Returns whether the file of the features has changed since it was opened. Such a file must not be read: the
        system ends a process that reads beyond the end of a file that was cut. A removed file can still be read."""
        try:
            return _status(self._features_path) != self._status
        except OSError:
            return False

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
        except (FileNotFoundError, DamagedIndex) as error:  # or a new generation has just replaced it
            if isinstance(error, DamagedIndex):
                raise
            if last:
                raise DamagedIndex(index, f"{Path(error.filename).name} is missing") from error
        except OSError as error:
            raise UserError(f"{index} cannot be read ({error.strerror}): check its permissions and its disk") from error
    raise AssertionError


def checksum(path: Path) -> int:
    """Returns the CRC-32 of a file, which changes with every damage of a few bits."""
    found = 0
    with path.open("rb") as file:
        while block := file.read(1 << 24):
            found = zlib.crc32(block, found)
    return found


def _status(path: Path) -> tuple[int, int, int]:
    """Returns what changes when a file is written."""
    status = path.stat()
    return status.st_size, status.st_mtime_ns, status.st_ino


class Encoded:
    """Features that are in no generation yet, appended batch by batch: a stopped program loses at most one batch.

    Attributes:
        width: D.
        pictures: the picture of each row. Its line in the file also has the CRC-32 of both.
    """

    def __init__(self, index: Path, fingerprint: str, width: int):
        self.width = width
        self._features_path = index / ENCODED_FEATURES
        self._features: BinaryIO = self._features_path.open("a+b")
        self._pictures: BinaryIO = (index / ENCODED_PICTURES).open("a+b")
        encoder = index / ENCODED_WITH
        # Features of another encoder are useless.
        if not is_file(encoder) or encoder.read_bytes() != fingerprint.encode():
            self._pictures.truncate(0)
            with atomic_file(encoder) as file:
                file.write(fingerprint.encode())
        self._pictures.seek(0)
        lines = self._pictures.read().split(b"\n")[:-1]  # the last item is empty or a line that was not completed
        self.pictures: list[Picture] = []
        self._features.seek(0)
        for line in lines:
            feature = self._features.read(4 * width)
            try:
                *values, recorded = json.loads(line)
                picture = _checked(values)
            except (ValueError, TypeError, RecursionError):
                break
            if len(feature) < 4 * width or _line_checksum(picture, feature) != recorded:
                break  # this and what follows is encoded again
            self.pictures.append(picture)
        self._pictures.truncate(sum(len(line) + 1 for line in lines[: len(self.pictures)]))
        self._features.truncate(4 * width * len(self.pictures))

    def add(self, pictures: Sequence[Picture], features: Tensor) -> None:
        """Appends B pictures and their features (B, D) float32."""
        rows = [row.tobytes() for row in features.numpy()]
        lines = [_line((*picture, _line_checksum(picture, row))) for picture, row in zip(pictures, rows, strict=True)]
        for file, content in (
            (self._features, b"".join(rows)),
            (self._pictures, b"".join(lines)),  # last: a line must have its feature
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
        header = io.BytesIO()
        description = {"descr": "<f4", "fortran_order": False, "shape": (len(pictures), info.width)}
        np.lib.format.write_array_header_1_0(header, description)
        file.write(header.getvalue())
        of_features = zlib.crc32(header.getvalue())
        for start in range(0, len(pictures), ROWS_AT_ONCE):
            block = np.empty((min(ROWS_AT_ONCE, len(pictures) - start), info.width), np.float32)
            for rows, features in sources:
                part = rows[start : start + ROWS_AT_ONCE]
                if (part >= 0).any():
                    block[part >= 0] = features[part[part >= 0]]
            file.write(block.tobytes())
            of_features = zlib.crc32(block.tobytes(), of_features)
    of_pictures = 0
    with atomic_file(_pictures_file(index, generation)) as file:
        for line in map(_line, pictures):
            file.write(line)
            of_pictures = zlib.crc32(line, of_pictures)
    names = (features_file(index, generation).name, _pictures_file(index, generation).name)
    checksums = dict(zip(names, (of_features, of_pictures), strict=True))
    return replace(info, generation=generation, pictures=len(pictures), checksums=checksums)


def with_checksums(index: Path, info: Info) -> Info:
    """Returns the content of `index.json` with the checksums of all files of its generation.

    Those that are recorded stay, except that of faiss, whose lists may have been built again for the same features.
    """
    kinds = _current_kinds(info)
    files = {path.name: kind for path, kind, n in _generation_files(index) if n == info.generation and kind in kinds}
    known = {name: found for name, found in info.checksums.items() if files.get(name) in ("features", "pictures")}
    return replace(info, checksums={name: checksum(index / name) for name in files if name not in known} | known)


def remove_old(index: Path, info: Info) -> None:
    """Removes the files of other generations and engines. A process that has them open can still read them.

    Windows cannot remove an open file, so it stays there until a later update.
    """
    for path, kind, generation in _generation_files(index):
        if generation != info.generation or kind not in _current_kinds(info):
            with suppress(*(() if CAN_REPLACE_OPEN_FILES else (PermissionError,))):
                path.unlink(missing_ok=True)


def _current_kinds(info: Info) -> tuple[str, ...]:
    return "features", "pictures", info.engine["name"]


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
        self.path = path
        self._content = path.read_bytes()
        self._ends = np.flatnonzero(np.frombuffer(self._content, np.uint8) == ord("\n"))

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, row: int) -> Picture:
        end = self._ends[row]  # iteration ends with an IndexError
        try:
            return _checked(json.loads(self._content[self._ends[row - 1] + 1 if row else 0 : end]))
        except (ValueError, TypeError, RecursionError) as error:
            raise DamagedIndex(self.path.parent, f"line {row + 1} of {self.path.name} is invalid") from error


def _line(values: Sequence[str | int]) -> bytes:
    return json.dumps(values).encode() + b"\n"


def _line_checksum(picture: Picture, feature: bytes) -> int:
    return zlib.crc32(_line(picture), zlib.crc32(feature))


def _checked(values: Any) -> Picture:
    """Returns the picture of a line. Raises ValueError or TypeError if it is invalid, or its path leads elsewhere."""
    path, size, modified = values
    if not (type(path) is str and type(size) is type(modified) is int):
        raise TypeError
    parts = path.replace(os.sep, "/").split("/")
    if not parts[0] or ".." in parts or os.path.splitdrive(path)[0] or "\0" in path:
        raise ValueError
    path.encode()  # half of a surrogate pair cannot be printed or sent
    return Picture(path, size, modified)
