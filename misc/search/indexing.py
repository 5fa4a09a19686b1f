"""Builds or updates the index of a folder: encodes new and changed pictures, and removes deleted ones."""

import errno
import json
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

from tqdm import tqdm

from misc.data.workers import reported_workers
from misc.errors import DISK_FULL, UserError
from misc.files import atomic_file
from misc.retrieval.metrics import check_features
from misc.search import engines
from misc.search.encoder import Encoder
from misc.search.engine import EngineChoice
from misc.search.gallery import (
    UNREADABLE,
    DamagedIndex,
    Encoded,
    Gallery,
    Info,
    held_index,
    open_gallery,
    read_info,
    remove_old,
    with_checksums,
    write_generation,
    write_info,
)
from misc.search.pictures import Picture, PictureBatch, PictureSet, Unreadable, find_pictures, picture_batches

FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS)


@dataclass(frozen=True)
class Update:
    """The result of `update_index`.

    Attributes:
        pictures: number of pictures in the index.
        encoded: number of new and changed pictures, which were encoded.
        removed: number of pictures that were removed from the index.
        unreadable: files and folders that were skipped, sorted; `unreadable.jsonl` in the index lists them too.
        notes: lines of the encoder and the engine for the user.
    """

    pictures: int
    encoded: int
    removed: int
    unreadable: list[Unreadable]
    notes: list[str]


def update_index(
    folder: Path,
    index: Path,
    load: Callable[[str, Sequence[str]], Encoder],
    *,
    checkpoint: str | None,
    overrides: Sequence[str] = (),
    engine: EngineChoice | None = None,
    overwrite: bool = False,
    batch_size: int = 64,
    workers: int = 0,
) -> Update:
    """Builds or updates an index. Until it is complete, searches use the previous one.

    If the program is stopped, the same call continues where it stopped.

    Args:
        folder: folder of pictures.
        index: folder of the index.
        load: loads an encoder from a checkpoint and overrides.
        checkpoint: source of the weights. None: the checkpoint that the index was built with.
        overrides: `key=value` of the configuration, for settings that the weights file does not record.
        engine: search engine of the index. None: the engine that it has; exact search for a new index.
        overwrite: whether to replace an index that was built with another checkpoint.
        batch_size: number of pictures that are encoded and written at a time.
        workers: number of decoding processes (0: decodes in this process).

    Raises UserError if an argument, the folder or the index is invalid, or the disk is full.
    """
    found, unreadable = find_pictures(folder, index)
    if not found:
        raise UserError(
            f"{folder} contains no images that can be read{_first(unreadable)}: "
            "give the folder that contains the pictures"
        )
    info = read_info(index)
    if checkpoint is not None:
        source, settings = checkpoint, list(overrides)
    elif info is not None:
        source, settings = info.checkpoint, info.overrides
    else:
        raise UserError(f"{index} does not exist yet: give the weights to build it with, --checkpoint CHECKPOINT")
    if engine is not None:
        engines.check(engine)
    elif info is not None and info.engine["name"] == "qdrant":
        raise engines.unconfirmed(index, info.engine["address"], "--engine qdrant --qdrant")
    elif info is not None:
        engines.check(EngineChoice.of(info.engine))
    encoder = load(source, settings)
    try:
        with held_index(index), reported_workers("--workers"):
            new = Info(source, settings, encoder.fingerprint, encoder.width)
            info, previous, damage = _begin(index, new, overwrite)
            with closing(Encoded(index, info.fingerprint, info.width)) as encoded:
                known = set(encoded.pictures).union(previous.pictures() if previous is not None else ())
                missing = [picture for picture in found if picture not in known]
                pixels = PictureSet(folder, missing, encoder.view)
                batches = picture_batches(pixels, batch_size=batch_size, workers=workers)
                undecodable = _encode(batches, encoder, encoded, done=len(found) - len(missing), total=len(found))
                skipped = [*unreadable, *undecodable]
                _write_unreadable(index, sorted(skipped))
                pictures = _pictures_to_index(found, unreadable, undecodable, previous)
                if not pictures:
                    raise UserError(
                        f"{folder}: none of its {len(found)} pictures can be read{_first(skipped)}: "
                        "give a folder of readable pictures"
                    )
                notes = _finish(index, info, pictures, previous, encoded, engine or EngineChoice.of(info.engine))
            return Update(
                pictures=len(pictures),
                encoded=len(missing) - len(undecodable),
                removed=0 if previous is None else _count_removed(previous, pictures),
                unreadable=sorted(skipped),
                notes=[*encoder.notes, *damage, *notes],
            )
    except OSError as error:
        if error.errno not in (*DISK_FULL, *FORBIDDEN):
            raise
        remedy = "free some space" if error.errno in DISK_FULL else f"check the permissions of {error.filename}"
        raise UserError(f"{index}: {error.strerror}: {remedy}, then run the same command again to continue") from error


def _begin(index: Path, new: Info, overwrite: bool) -> tuple[Info, Gallery | None, list[str]]:
    """Checks that a locked index may be updated with an encoder.

    Args:
        new: `index.json` of a new index with this encoder.

    Returns: the content of `index.json` to continue from; the current generation, or None if it cannot be used; and a
        line for the user if it is damaged.

    Raises UserError if the index was built with another encoder and may not be replaced.
    """
    current = read_info(index)  # again, as another process may have changed it before the lock
    if current is not None and current.fingerprint != new.fingerprint and not overwrite:
        other = f"those of {new.checkpoint}" if new.checkpoint != current.checkpoint else "its present ones"
        raise UserError(
            f"{index} was built with {current.checkpoint}, and its features are not comparable with {other}: "
            "build another index with --index DIR, or replace this one with --overwrite"
        )
    if current is None or current.generation == 0:
        write_info(index, new)  # so that a search can report that the index is not complete
    if current is None:
        return new, None, []
    info = replace(new, generation=current.generation, pictures=current.pictures, engine=current.engine)
    if current.generation == 0 or current.fingerprint != new.fingerprint:
        return info, None, []
    try:
        previous = open_gallery(index)
        if not current.checksums:
            list(previous.pictures())  # checks each line
    except DamagedIndex as error:
        return info, None, [f"warning: {index} was damaged ({error.reason}): all pictures were encoded again"]
    return replace(info, checksums=previous.info.checksums), previous, []


def _encode(
    batches: Iterable[PictureBatch], encoder: Encoder, encoded: Encoded, *, done: int, total: int
) -> list[Unreadable]:
    """Encodes batches of pictures into `encoded`, with a progress bar.

    Args:
        done: pictures that need no encoding, of `total` pictures.

    Returns: the pictures that could not be decoded.

    Raises UserError if a feature is not finite.
    """
    undecodable: list[Unreadable] = []
    with tqdm(total=total, initial=done, desc="indexing", unit="picture", dynamic_ncols=True) as bar:
        for batch in batches:
            if batch.pixels is not None:
                features = encoder.encode_pictures(batch.pixels)
                check_features(features, [f"the image {picture.path}" for picture in batch.pictures])
                encoded.add(batch.pictures, features)
            undecodable += batch.unreadable
            bar.update(len(batch.pictures) + len(batch.unreadable))
    return undecodable


def _pictures_to_index(
    found: list[Picture], unreadable: list[Unreadable], undecodable: list[Unreadable], previous: Gallery | None
) -> list[Picture]:
    """Returns the pictures of the next generation, sorted by path.

    Pictures of a folder that cannot be read now stay in the index, as the folder may be readable again next time.
    """
    skipped = {path for path, _ in undecodable}
    pictures = [picture for picture in found if picture.path not in skipped]
    folders = tuple(f"{path}/" for path, _ in unreadable)
    if previous is not None and folders:
        pictures += [picture for picture in previous.pictures() if picture.path.startswith(folders)]
    return sorted(pictures)


def _finish(
    index: Path, info: Info, pictures: list[Picture], previous: Gallery | None, encoded: Encoded, engine: EngineChoice
) -> list[str]:
    """Writes a new generation if anything has changed, and builds the engine for it.

    Returns: lines of the engine for the user.
    """
    if previous is None or encoded.pictures or pictures != list(previous.pictures()):
        info = write_generation(index, info, pictures, previous, encoded)
    settings, notes = engines.build(Gallery(index, info), engine)
    info = with_checksums(index, replace(info, engine=settings))
    write_info(index, info)
    encoded.clear()
    remove_old(index, info)
    return notes


def _first(unreadable: list[Unreadable]) -> str:
    """Returns the first file that cannot be read, with the reason, in parentheses; nothing if there is none."""
    return f" ({unreadable[0].path}: {unreadable[0].reason})" if unreadable else ""


def _count_removed(previous: Gallery, pictures: list[Picture]) -> int:
    """Returns how many pictures of the previous generation are no longer in the index."""
    paths = {picture.path for picture in pictures}
    return sum(picture.path not in paths for picture in previous.pictures())


def _write_unreadable(index: Path, unreadable: list[Unreadable]) -> None:
    with atomic_file(index / UNREADABLE) as file:
        file.writelines(json.dumps(each._asdict()).encode() + b"\n" for each in unreadable)
