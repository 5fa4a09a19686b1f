"""Writes the dataset: images and annotations in the raw form of CUHK-PEDES."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from random import Random

from tqdm import tqdm

from misc.errors import UserError
from misc.files import check_new_path, is_file, is_folder
from misc.pedestrians.captions import describe
from misc.pedestrians.people import Person, Shot, imagine_person, see, take_shot
from misc.pedestrians.scene import CAMERAS, draw_pedestrian
from misc.terminal import show

VERSION = 1  # of the drawings: increase it if the same arguments produce other files than before
CAPTIONS_PER_IMAGE = 2


@dataclass(frozen=True)
class Portrait:
    """One image of the dataset before it is drawn, and its captions."""

    file_path: str
    shot: Shot
    captions: list[str]
    paraphrases: list[str]


def imagine_identity(identity: int, images: int, seed: int) -> tuple[Person, list[Portrait]]:
    """Returns a person and their portraits. Each identity has its own random generator."""
    rng = Random(f"{seed}/{identity}")
    person = imagine_person(rng)
    cameras = rng.sample(list(CAMERAS), len(CAMERAS))
    portraits = []
    for index in range(images):
        shot = take_shot(rng, cameras[index % len(cameras)])
        sight = see(person, shot)
        texts: dict[str, str] = {}
        while len(texts) < CAPTIONS_PER_IMAGE:
            caption, paraphrase = describe(sight, rng)
            texts[caption] = paraphrase
        file_path = f"{shot.camera}/{identity:04d}_{index}.jpg"
        portraits.append(Portrait(file_path, shot, list(texts), list(texts.values())))
    return person, portraits


def draw_dataset(
    folder: Path,
    *,
    train_identities: int = 1500,
    val_identities: int = 100,
    test_identities: int = 250,
    images_per_identity: int = 4,
    height: int = 96,
    width: int = 48,
    seed: int = 0,
    workers: int | None = None,
) -> None:
    """Draws a dataset into `folder`: `reid_raw.json`, `back_translation.json` and the JPEG files under `imgs/`.

    The same arguments produce the same bytes for any number of `workers` (default: one per core). The folder appears
    when it is complete. A folder that already contains this dataset is not changed.

    Raises UserError if a size is not positive, or the folder contains something else or cannot be created.
    """
    identities = {"train": train_identities, "val": val_identities, "test": test_identities}
    workers = (os.cpu_count() or 1) if workers is None else workers
    arguments = {f"{split}_identities": count for split, count in identities.items()}
    arguments |= {"images_per_identity": images_per_identity, "height": height, "width": width}
    for name, value in {**arguments, "workers": workers}.items():
        if value < 1:
            raise UserError(f"{name} is {value}: give 1 or more")
    drawn_with = json.dumps({**arguments, "seed": seed, "version": VERSION})
    folder = Path(folder).absolute()
    if _is_drawn(folder, drawn_with):
        show(f"{folder} already contains these pedestrians")
        return

    unfinished = folder.with_name(f".{folder.name}.{os.getpid()}.unfinished")
    try:
        for camera in CAMERAS:
            (unfinished / "imgs" / camera).mkdir(parents=True)
        draw = partial(_draw_identity, unfinished, images_per_identity, (height, width), seed)
        portraits = _draw_identities(draw, sum(identities.values()), workers)
        splits = [split for split, count in identities.items() for _ in range(count)]
        _write_annotations(unfinished, splits, portraits)
        (unfinished / "drawn_with.json").write_text(drawn_with, encoding="utf-8")
        unfinished.rename(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _is_drawn(folder: Path, drawn_with: str) -> bool:
    """Returns True if the folder contains this dataset, False if it is empty or does not exist.

    Raises UserError if it contains anything else, or cannot be created.
    """
    if not os.path.lexists(folder):
        check_new_path(folder, "FOLDER", "give another folder")
        return False
    if is_folder(folder) and not any(folder.iterdir()):
        return False
    record = folder / "drawn_with.json"
    if not is_file(record):
        raise UserError(f"{folder} contains something other than these pedestrians: give a new folder, or remove it")
    found = record.read_text(encoding="utf-8")
    if found != drawn_with:
        raise UserError(f"{folder} was drawn with {found}, not with {drawn_with}: give a new folder, or remove it")
    return True


def _draw_identities(draw: Callable[[int], list[Portrait]], count: int, workers: int) -> list[list[Portrait]]:
    """Draws identities 1 to `count` in order, and shows the progress."""
    with ExitStack() as stack:
        drawn: Iterator[list[Portrait]] = map(draw, range(1, count + 1))
        if workers > 1:
            # Not forked: if the parent has loaded torch, a fork could copy a lock that one of its threads has taken.
            pool = stack.enter_context(ProcessPoolExecutor(workers, mp_context=get_context("spawn")))
            drawn = pool.map(draw, range(1, count + 1), chunksize=8)
        return list(tqdm(drawn, total=count, desc="drawing pedestrians", unit="person"))


def _draw_identity(folder: Path, images: int, size: tuple[int, int], seed: int, identity: int) -> list[Portrait]:
    person, portraits = imagine_identity(identity, images, seed)
    for portrait in portraits:
        image = draw_pedestrian(person, portrait.shot, *size)
        image.save(folder / "imgs" / portrait.file_path, quality=90)
    return portraits


def _write_annotations(folder: Path, splits: list[str], drawn: list[list[Portrait]]) -> None:
    """Writes the two JSON files; `splits` and `drawn` list the identities in order."""
    raw, translated = [], []
    for identity, (split, portraits) in enumerate(zip(splits, drawn, strict=True), start=1):
        for portrait in portraits:
            raw.append(
                {
                    "split": split,
                    "id": identity,
                    "file_path": portrait.file_path,
                    "captions": portrait.captions,
                    "processed_tokens": [_tokens(caption) for caption in portrait.captions],
                }
            )
            translated.append({"file_path": portrait.file_path, "captions_bt": portrait.paraphrases})
    for name, entries in (("reid_raw.json", raw), ("back_translation.json", translated)):
        (folder / name).write_text(json.dumps(entries, indent=1), encoding="utf-8")


def _tokens(caption: str) -> list[str]:
    """Returns the lower-case words of a caption, as CUHK-PEDES lists them."""
    return caption.lower().replace(",", " ").replace(".", " ").split()
