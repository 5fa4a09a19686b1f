"""Brings the index of a folder up to date: what is new or changed is encoded, what is gone is left out."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from tqdm import tqdm

from misc.errors import DISK_FULL, UserError
from misc.files import atomic_file
from misc.search import engines
from misc.search.encoder import Encoder
from misc.search.engine import EngineChoice
from misc.search.gallery import (
    Encoded,
    Gallery,
    Info,
    held_index,
    open_gallery,
    read_info,
    remove_old,
    write_generation,
    write_info,
)
from misc.search.pictures import Picture, PictureSet, Unreadable, find_pictures, picture_batches

UNREADABLE = "unreadable.jsonl"


@dataclass(frozen=True)
class Update:
    """What was done.

    Attributes:
        pictures: in the index now.
        encoded, removed: of them new or changed, and former ones that are gone.
        unreadable: files and folders that were skipped; `unreadable.jsonl` in the index lists them too.
        notes: of the engine.
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
    """Makes or updates an index. Whoever is stopped goes on with the same call; until it is done, searches find what
    was there before.

    Args:
        load: an encoder from a checkpoint and overrides.
        checkpoint: None for the one that the index was made with.
        engine: that searches it; None for the one that it has, exact search at first.
        overwrite: takes the place of an index that was made with another checkpoint, when it is done.
        batch_size: pictures that are encoded, and kept, at a time.
        workers: processes that decode.

    Raises UserError for what is wrong with the arguments, the folder or the index, and for a full disk.
    """
    pictures, unreadable = find_pictures(folder, index)
    if not pictures:
        raise UserError(f"{folder} holds no JPEG, PNG or WebP files: give the folder that holds the pictures")
    info = read_info(index)
    if checkpoint is None and info is None:
        raise UserError(f"{index} is not there yet: give the weights to make it with, --checkpoint CHECKPOINT")
    chosen = (checkpoint, list(overrides)) if checkpoint is not None else (info.checkpoint, info.overrides)
    if engine is not None or info is not None:
        engines.check(engine or EngineChoice.of(info.engine))
    encoder = load(*chosen)
    try:
        with held_index(index):
            info = read_info(index)  # nobody else can write it now
            fresh = Info(*chosen, encoder.fingerprint, encoder.width)
            if info is not None and info.fingerprint != encoder.fingerprint and not overwrite:
                raise UserError(
                    f"{index} was made with {info.checkpoint}, and features of {chosen[0]} are not comparable with it: "
                    "make another index with --index DIR, or replace it with --overwrite"
                )
            if info is None or info.generation == 0:
                write_info(index, fresh)  # so that a search can say that it is not finished
            former = None
            if info is not None:
                fresh = replace(fresh, generation=info.generation, pictures=info.pictures, engine=info.engine)
                if info.generation and info.fingerprint == encoder.fingerprint:
                    former = open_gallery(index)
            return _update(folder, index, fresh, former, encoder, pictures, unreadable, engine, batch_size, workers)
    except OSError as error:
        if error.errno not in DISK_FULL:
            raise
        raise UserError(
            f"{index}: {error.strerror}: free some space, then the same command goes on from here"
        ) from error


def _update(
    folder: Path,
    index: Path,
    info: Info,
    former: Gallery | None,
    encoder: Encoder,
    found: list[Picture],
    unreadable: list[Unreadable],
    engine: EngineChoice | None,
    batch_size: int,
    workers: int,
) -> Update:
    encoded = Encoded(index, info.fingerprint, info.width)
    out_of_sight = tuple(f"{path}/" for path, _ in unreadable)
    try:
        known = set(encoded.pictures).union(former.pictures() if former is not None else ())
        missing = [picture for picture in found if picture not in known]
        done = len(found) - len(missing)
        with tqdm(total=len(found), initial=done, desc="indexing", unit="picture", dynamic_ncols=True) as bar:
            pictures = PictureSet(folder, missing, encoder.view)
            for batch in picture_batches(pictures, batch_size=batch_size, workers=workers):
                if batch.pictures:
                    encoded.add(batch.pictures, encoder.encode_pictures(batch.pixels))
                unreadable += batch.unreadable
                bar.update(len(batch.pictures) + len(batch.unreadable))
        _write_unreadable(index, sorted(unreadable))
        skipped = {path for path, _ in unreadable}
        kept = [picture for picture in found if picture.path not in skipped]
        if former is not None and out_of_sight:  # a folder that cannot be read now may be there again next time
            kept = sorted([*kept, *(each for each in former.pictures() if each.path.startswith(out_of_sight))])
        if not kept:
            raise UserError(f"{folder}: none of its {len(found)} pictures can be read ({_reason(unreadable)})")
        notes = _finish(index, info, kept, former, encoded, engine or EngineChoice.of(info.engine))
        return Update(
            pictures=len(kept),
            encoded=len(missing) - sum(picture.path in skipped for picture in missing),
            removed=0 if former is None else _gone(former, kept),
            unreadable=sorted(unreadable),
            notes=notes,
        )
    finally:
        encoded.close()


def _finish(
    index: Path, info: Info, kept: list[Picture], former: Gallery | None, encoded: Encoded, engine: EngineChoice
) -> list[str]:
    """Writes what has changed, and lets the engine follow. Returns what the engine has to say."""
    if former is None or encoded.pictures or kept != list(former.pictures()):
        info = write_generation(index, info, kept, former, encoded)
    settings, notes = engines.build(Gallery(index, info), engine)
    info = replace(info, engine=settings)
    write_info(index, info)
    encoded.clear()
    remove_old(index, info)
    return notes


def _gone(former: Gallery, kept: list[Picture]) -> int:
    paths = {picture.path for picture in kept}
    return sum(picture.path not in paths for picture in former.pictures())


def _reason(unreadable: list[Unreadable]) -> str:
    return f"{unreadable[0].path}: {unreadable[0].reason}"


def _write_unreadable(index: Path, unreadable: list[Unreadable]) -> None:
    with atomic_file(index / UNREADABLE) as file:
        file.writelines(json.dumps(each._asdict()).encode() + b"\n" for each in unreadable)
