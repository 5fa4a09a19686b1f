"""Checks the image files of a dataset before they are used."""

import json
import math
import os
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from misc.data.images import ImageError, check_header, read_dataset_image
from misc.data.split import Split, keep_images
from misc.errors import UserError
from misc.files import is_file
from misc.system.distributed import Ranks, local_rank

SECONDS = 60
"""Headers are read for at most this long."""
THREADS = 16
CHUNK = 32
"""Number of files that a thread takes at a time."""


class _Found(NamedTuple):
    """A file that is missing, cannot be read, or was not checked."""

    what: str
    path: str
    reason: str = ""


MISSING, UNREADABLE, UNCHECKED = "missing", "unreadable", "unchecked"


def check_images(
    splits: dict[str, Split], image_dir: str | Path, ranks: Ranks, *, skip_unreadable: bool = False
) -> tuple[dict[str, Split], list[str]]:
    """Checks that all annotated images exist, are not empty, and begin like an image that can be read.

    The ranks of a machine share the files, and each rank has several threads. After `SECONDS`, the remaining files are
    only checked for existence.

    Args:
        skip_unreadable: decode all images, however long it takes, and leave out those that cannot be decoded, with
            their captions. This depends only on the files, so it is the same on all ranks and after a restart.

    Returns: the splits, and lines for the log.
    Raises UserError if images are missing, if a split has none left, or if some cannot be read and `skip_unreadable` is
        false. The message contains their number and the first five paths.
    """
    image_dir = Path(image_dir)
    paths = list(dict.fromkeys(path for split in splits.values() for path in split.image_paths))
    found = _examine(paths, image_dir, ranks, decode=skip_unreadable)
    of_all = f"of {len(paths):,} annotated images"
    if missing := [repr(each.path) for each in found if each.what == MISSING]:
        raise UserError(
            f"{len(missing):,} {of_all} are missing under {image_dir}: {_first_five(missing)}; set `image_dir` to the "
            "folder that these paths start from, or unpack the images again"
        )
    unreadable = [f"{each.path!r} ({each.reason})" for each in found if each.what == UNREADABLE]
    if unreadable and not skip_unreadable:
        raise UserError(
            f"{len(unreadable):,} {of_all} cannot be read under {image_dir}: {_first_five(unreadable)}; unpack them "
            "again, or leave them out with data.skip_unreadable=true"
        )
    notes = []
    if unchecked := sum(each.what == UNCHECKED for each in found):
        notes.append(f"{unchecked:,} {of_all} were not opened within {SECONDS} s: they are checked when they are used")
    if unreadable:
        notes.append(f"warning: {len(unreadable):,} {of_all} cannot be decoded: {_first_five(unreadable)}")
        left_out = {each.path for each in found}
        splits = {name: _without(name, split, left_out, notes) for name, split in splits.items()}
    return splits, notes


def _examine(paths: list[str], image_dir: Path, ranks: Ranks, *, decode: bool) -> list[_Found]:
    """Examines the files. Returns those with a problem, in the order of `paths`, the same on every rank."""
    check: Callable[[Path], object] = read_dataset_image if decode else check_header
    end = math.inf if decode else time.monotonic() + SECONDS

    def examine(path: str) -> _Found | None:
        file = image_dir / path
        if time.monotonic() > end:
            return _Found(UNCHECKED if is_file(file) else MISSING, path)
        try:
            check(file)
        except ImageError as error:
            forbidden = isinstance(error.__cause__, PermissionError)  # then nobody knows whether it exists
            return _Found(UNREADABLE, path, error.reason) if forbidden or is_file(file) else _Found(MISSING, path)
        return None

    local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if ranks.world_size > 1 else 1
    own = paths[local_rank() % local_ranks :: local_ranks]
    chunks = [own[start : start + CHUNK] for start in range(0, len(own), CHUNK)]
    hidden = None if ranks.is_main else True  # None: tqdm checks whether stderr is a terminal
    found = []
    with (
        ThreadPoolExecutor(THREADS) as pool,
        tqdm(total=len(own), desc="checking images", disable=hidden, leave=False, dynamic_ncols=True) as bar,
    ):
        for examined in pool.map(lambda chunk: list(map(examine, chunk)), chunks):
            found += [json.dumps(each) for each in examined if each is not None]
            bar.update(len(examined))
    of_all_ranks = [_Found(*json.loads(each)) for each in dict.fromkeys(ranks.all_gather_list(found))]
    order = {path: number for number, path in enumerate(paths)}
    return sorted(of_all_ranks, key=lambda each: order[each.path])


def _first_five(items: list[str]) -> str:
    return ", ".join(items[:5]) + (", ..." if len(items) > 5 else "")


def _without(name: str, split: Split, left_out: Iterable[str], notes: list[str]) -> Split:
    """Returns a split without some images, and notes what it has lost.

    Raises UserError if it has no image left.
    """
    kept = [number for number, path in enumerate(split.image_paths) if path not in left_out]
    if len(kept) == len(split.image_paths):
        return split
    if not kept:
        raise UserError(f"no image of the {name} split can be decoded: unpack the images again")
    smaller = keep_images(split, kept, renumber=name == "train")
    notes.append(
        f"warning: {name} without {len(split.image_paths) - len(kept):,} images and their "
        f"{len(split) - len(smaller):,} captions"
        + ("" if name == "train" else ": its results cannot be compared with those of the whole split")
    )
    return smaller
