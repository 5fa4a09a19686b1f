"""What is kept of a folder of pictures: a feature of each, its path, and what tells whether it has changed.

An index is a folder. `index.json` says what it holds and names the files of the current generation, which are never
changed: `features_<n>.npy` (N, D) float32, `pictures_<n>.jsonl` (a line for each row, by path) and what an engine has
built of them. A new generation takes the place of the old one when it is whole, so whoever searches meanwhile goes on
with the old one. What is encoded and in no generation yet lies in `encoded.f32` and `encoded.jsonl`.

N pictures, D width of the shared space.
"""

import bisect
import fcntl
import json
import mmap
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from misc.errors import UserError, first_of
from misc.files import atomic_file, lock_file, partial_path
from misc.search.pictures import Picture

FORMAT = 1
"""Of an index: raised when an older program could not read it."""
INFO, LOCK = "index.json", "lock"
ENCODED_FEATURES, ENCODED_PICTURES, ENCODED_WITH = "encoded.f32", "encoded.jsonl", "encoded.with"
MADE = re.compile(r"(?P<kind>features|pictures|faiss)_(?P<generation>\d+)\.(npy|jsonl|index)(\.part)?")
"""Names of the files of a generation; what else lies in an index is somebody's."""
ROWS_AT_ONCE = 1 << 14
"""Of features that are copied: at 512 numbers each, 32 MB."""


@dataclass(frozen=True)
class Info:
    """What `index.json` says.

    Attributes:
        checkpoint: where the weights came from, and overrides: what was said of them besides.
        fingerprint: of the encoder.
        width: D.
        generation: number of times that the index was finished; 0 where it never was.
        pictures: N.
        engine: `name`, and what it needs to be opened.
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
    """Where the index of a folder of pictures lies: beside it."""
    folder = folder.resolve()
    if not folder.name:
        raise UserError(f"{folder} has no place beside it: say where the index goes, --index DIR")
    return folder.with_name(f"{folder.name}_index")


def read_info(index: Path) -> Info | None:
    """None where there is no index. Raises UserError where there is something else, or one of a newer program."""
    try:
        content = json.loads((index / INFO).read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"{index / INFO} cannot be read ({error}): give another --index") from error
    if isinstance(content, dict) and content.get("format") not in (FORMAT, None):
        raise UserError(f"{index} has the format {content['format']!r}, not {FORMAT}: use the version that made it")
    if not isinstance(content, dict) or content.keys() != {each.name for each in fields(Info)}:
        raise UserError(f"{index / INFO} is not that of an index: give another --index")
    return Info(**content)


def write_info(index: Path, info: Info) -> None:
    """Writes `index.json`, whole or not at all: from here on, its generation is the current one."""
    with atomic_file(index / INFO) as file:
        file.write(json.dumps(asdict(info), indent=1).encode() + b"\n")


@contextmanager
def held_index(index: Path) -> Iterator[None]:
    """The folder of an index, made if there is none, for one process that writes.

    Raises UserError where another one writes, where the folder holds other things, or cannot be made.
    """
    try:
        index.mkdir(parents=True, exist_ok=True)
        names = {path.name for path in index.iterdir()}
        begun = {partial_path(Path(name)).name for name in (INFO, ENCODED_WITH)}  # by a process that was killed
        others = sorted(names - begun - {LOCK, ENCODED_FEATURES, ENCODED_PICTURES, ENCODED_WITH})
        if others and INFO not in names:
            raise UserError(f"{index} holds other things than an index ({first_of(others)}): give another --index")
        file = (index / LOCK).open("a")
    except OSError as error:
        raise UserError(f"{index} cannot be written ({error.strerror}): give another place with --index") from error
    try:
        lock_file(file, fcntl.flock)
    except BlockingIOError as error:
        raise UserError(f"{index} is being written by another process: wait until it has ended") from error
    with file:
        yield


class Gallery:
    """One generation of an index, read only; its features stay on the disk and are read as they are needed.

    Attributes:
        features: (N, D) float32, L2-normalised.
    """

    def __init__(self, index: Path, info: Info):
        self.index, self.info = index, info
        array = np.load(features_file(index, info.generation), mmap_mode="c")  # "c": torch wants it to be writable
        self.features: Tensor = torch.from_numpy(array)
        self._lines = _Lines(_pictures_file(index, info.generation))
        if not (array.dtype == np.float32 and array.shape == (len(self._lines), info.width)):
            raise UserError(f"{index} is damaged: remove it, and index the folder anew")

    def __len__(self) -> int:
        return len(self._lines)

    def picture(self, row: int) -> Picture:
        """What a row is the feature of."""
        return self._lines[row]

    def row_of(self, path: str) -> int | None:
        """The row of a path; None for one that is not in the index."""
        row = bisect.bisect_left(self._lines, path, key=lambda picture: picture.path)
        return row if row < len(self) and self._lines[row].path == path else None

    def pictures(self) -> Iterator[Picture]:
        """All, in the order of their rows, which is that of their paths."""
        return iter(self._lines)


def open_gallery(index: Path) -> Gallery:
    """The current generation. Raises UserError where there is none."""
    for last in (False, True):
        info = read_info(index)
        if info is None:
            raise UserError(f"{index} is not there: run `python search.py index` for the folder first")
        if info.generation == 0:
            raise UserError(f"{index} is not finished: run `python search.py index` again, it goes on where it stopped")
        try:
            return Gallery(index, info)
        except UserError:
            raise
        except (OSError, ValueError, EOFError) as error:  # cut off; or a new generation has just taken its place
            if last:
                raise UserError(f"{index} is damaged ({error}): remove it, and index the folder anew") from error
    raise AssertionError


class Encoded:
    """Features that are in no generation yet, appended batch by batch: whoever is stopped loses one batch at most.

    Attributes:
        pictures: what the rows are the features of.
    """

    def __init__(self, index: Path, fingerprint: str, width: int):
        self.width = width
        self._features_path = index / ENCODED_FEATURES
        self._features: BinaryIO = self._features_path.open("a+b")
        self._pictures: BinaryIO = (index / ENCODED_PICTURES).open("a+b")
        encoder = index / ENCODED_WITH
        if not encoder.exists() or encoder.read_text() != fingerprint:  # another one's are of no use
            self._pictures.truncate(0)
            with atomic_file(encoder) as file:
                file.write(fingerprint.encode())
        self._pictures.seek(0)
        lines = self._pictures.read().split(b"\n")[:-1]  # without one that was begun
        whole = self._features.seek(0, os.SEEK_END) // (4 * width)
        lines = lines[:whole]
        self.pictures = [_parse(line) for line in lines]
        self._pictures.truncate(sum(len(line) + 1 for line in lines))
        self._features.truncate(4 * width * len(lines))

    def add(self, pictures: Sequence[Picture], features: Tensor) -> None:
        """Keeps B pictures and their features (B, D) float32."""
        for file, content in (
            (self._features, features.numpy().tobytes()),
            (self._pictures, b"".join(_line(picture) for picture in pictures)),  # last: a line counts with its feature
        ):
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        self.pictures.extend(pictures)

    def features(self) -> np.ndarray:
        """(rows, D) float32."""
        shape = (len(self.pictures), self.width)
        return np.memmap(self._features_path, np.float32, "r", shape=shape) if self.pictures else np.empty(shape)

    def clear(self) -> None:
        """Forgets all, when they are in a generation."""
        for file in (self._pictures, self._features):
            file.truncate(0)
        self.pictures.clear()

    def close(self) -> None:
        self._pictures.close()
        self._features.close()


def write_generation(
    index: Path, info: Info, pictures: Sequence[Picture], former: Gallery | None, encoded: Encoded
) -> Info:
    """Writes the next generation of these pictures; it is not the current one before `write_info`.

    Args:
        pictures: by path; each is in `former` or, where the file has changed since, in `encoded`.
    """
    generation = info.generation + 1
    for path, _, number in _made(index):
        if number == generation:  # a crash has left it, and it may be of other pictures
            path.unlink()
    fresh = {picture: row for row, picture in enumerate(encoded.pictures)}
    old = {} if former is None else {picture: row for row, picture in enumerate(former.pictures())}
    kept = np.array([old.get(picture, -1) if picture not in fresh else -1 for picture in pictures], dtype=np.int64)
    added = np.array([fresh.get(picture, -1) for picture in pictures], dtype=np.int64)
    sources = [(kept, former.features.numpy() if former is not None else None), (added, encoded.features())]
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
    """Removes what other generations and engines have left. Who has it open keeps it."""
    kept = ("features", "pictures", info.engine["name"])
    for path, kind, generation in _made(index):
        if generation != info.generation or kind not in kept:
            path.unlink(missing_ok=True)


def _made(index: Path) -> list[tuple[Path, str, int]]:
    """The files of all generations, each with what it holds and its number."""
    names = [(path, MADE.fullmatch(path.name)) for path in index.iterdir()]
    return [(path, made["kind"], int(made["generation"])) for path, made in names if made]


def features_file(index: Path, generation: int) -> Path:
    return index / f"features_{generation}.npy"


def _pictures_file(index: Path, generation: int) -> Path:
    return index / f"pictures_{generation}.jsonl"


class _Lines(Sequence):
    """The pictures of a file, of which only those are read that are asked for: a million as objects take a quarter of a
    gigabyte and seconds."""

    def __init__(self, path: Path):
        with path.open("rb") as file:
            self._content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if path.stat().st_size else b""
        self._ends = np.flatnonzero(np.frombuffer(self._content, np.uint8) == ord("\n"))

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, row: int) -> Picture:
        end = self._ends[row]  # an IndexError ends an iteration
        return _parse(self._content[self._ends[row - 1] + 1 if row else 0 : end])


def _line(picture: Picture) -> bytes:
    return json.dumps(picture).encode() + b"\n"


def _parse(line: bytes) -> Picture:
    return Picture(*json.loads(line))
