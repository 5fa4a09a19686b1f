"""Reads a dataset: joins the entries of its annotation files to splits."""

import posixpath
from collections import defaultdict
from pathlib import Path

from misc.data.annotation_files import (
    Entry,
    annotation_files,
    back_translations_of,
    captions_of,
    image_path_of,
    missing_split_remedy,
    parse_entry,
    read_entries,
    read_json_list,
    split_of,
)
from misc.data.split import SPLITS, Identity, Split, numbered
from misc.errors import UserError, first_of
from misc.files import is_file, is_folder
from text_utils.cleaning import MAX_WORDS, clean_caption

IMAGE_SUBFOLDER = "imgs"


def read_annotations(
    anno_dir: str | Path,
    image_dir: str | Path,
    *,
    splits: tuple[str, ...] = SPLITS,
    required: tuple[str, ...] = ("train", "test"),
    back_translation_file: str | Path | None = None,
    max_words: int = MAX_WORDS,
) -> dict[str, Split]:
    """Reads a dataset.

    Args:
        anno_dir: folder with `{train,val,test}_reid.json`, or with one raw file: `reid_raw.json` (CUHK-PEDES),
            `ICFG-PEDES.json` or `ICFG_PEDES.json`, or `data_captions.json` (RSTPReid). If it has both, a
            `train_reid.json` decides for the first. Or one file: a JSON list like the raw files, under any name, or a
            CSV file with a row per caption and the columns `split`, `id`, `file_path` and `caption`.
        image_dir: folder that the annotated paths start from, or its parent if that folder is named `imgs`.
        splits: the splits to read; entries of others are not checked.
        required: those that must have entries.
        back_translation_file: JSON list of `{file_path, captions_bt}`, joined by path. It replaces the `captions_bt` of
            the annotation. If a path is listed several times, its entries are joined in order.
        max_words: captions are cut to this length.

    Backslashes in a path are separators if there is such an image, for annotations written on Windows. Entries of the
    same image in a split are merged.

    Returns: the splits that have entries.
    Raises UserError if a folder, a file or a required split is missing, if an entry is wrong, or if an image has two
        identities in a split.
    """
    anno_dir, image_dir = Path(anno_dir), _existing_folder("image_dir", image_dir)
    entries: list[Entry] = []
    present = dict.fromkeys(SPLITS, False)
    for path, split in annotation_files(anno_dir, splits, required):
        named = read_entries(path)
        if split is None and named and not any("split" in entry for _, entry in named):
            raise UserError(
                f"{path} has no `split` in any entry: add train, val or test to each, or get a file with splits; "
                "caption_all.json of CUHK-PEDES has none and cannot be used under any name, get reid_raw.json"
            )
        for entry_name, entry in named:
            own_split = split or split_of(entry, entry_name)
            present[own_split] = True
            if own_split in splits:
                entries.append(parse_entry(entry, entry_name, own_split))
    for name in required:
        if not present[name]:
            others = [other for other in SPLITS if present[other]]
            only = f", only {' and '.join(others)}" if others else ""
            raise UserError(
                f"the annotation in {anno_dir} has no {name} entries{only}: {missing_split_remedy(name, others)}"
            )
    if back_translation_file is not None:
        entries = _join_back_translations(entries, Path(back_translation_file))
    entries = [_with_separators(entry, image_dir) for entry in entries]
    folder = _image_folder(entries, image_dir)
    by_split = {name: [entry for entry in entries if entry.split == name] for name in SPLITS}
    return {
        name: _build_split(split_entries, folder, max_words, renumber=name == "train")
        for name, split_entries in by_split.items()
        if split_entries
    }


def read_captions(path: str | Path) -> list[tuple[str, list[str]]]:
    """Reads the image path and the captions of each entry of one annotation file, as annotated.

    The file is a raw one of any dataset, or a `*_reid.json`.

    Raises UserError if the file is missing, or if a path or the captions of an entry are wrong.
    """
    return [
        (image_path_of(entry, entry_name), captions_of(entry, entry_name))
        for entry_name, entry in read_entries(Path(path))
    ]


def _existing_folder(key: str, folder: str | Path) -> Path:
    if not is_folder(folder):
        raise UserError(f"`{key}: {folder}` is not a folder: set it, or correct config/datasets.yaml")
    return Path(folder)


def _join_back_translations(entries: list[Entry], path: Path) -> list[Entry]:
    """Returns the entries with their back-translations from the file `path`. Entries without any stay unchanged.

    If an image has several entries in the annotation and fewer in the file, the texts are dealt out in order.
    """
    available: dict[str, list[list[str | None]]] = defaultdict(list)
    for entry_name, translated in read_json_list(path):
        if texts := back_translations_of(translated, entry_name):
            available[image_path_of(translated, entry_name).replace("\\", "/")].append(texts)
    if not any(entry.image_path.replace("\\", "/") in available for entry in entries):
        raise UserError(
            f"{path} has no back-translation of any annotated image, such as {entries[0].image_path!r}: "
            "use the file of this dataset, with the same paths as the annotation"
        )
    joined = []
    for entry in entries:
        remaining = available[entry.image_path.replace("\\", "/")]
        if not remaining:
            joined.append(entry)
            continue
        texts, count = remaining.pop(0), len(entry.captions)
        if texts[count:]:
            remaining.insert(0, texts[count:])
        joined.append(entry._replace(back_translations=texts[:count]))
    return joined


def _with_separators(entry: Entry, image_dir: Path) -> Entry:
    """Returns the entry with the backslashes of its path as separators, if its image is there."""
    path = entry.image_path.replace("\\", "/")
    found = path != entry.image_path and any(is_file(image_dir / folder / path) for folder in ("", IMAGE_SUBFOLDER))
    return entry._replace(image_path=path) if found else entry


def _image_folder(entries: list[Entry], image_dir: Path) -> str:
    """Returns the prefix of annotated paths in `image_dir`: `imgs/` if the first image found is there, else empty."""
    for entry in entries:
        for folder in ("", f"{IMAGE_SUBFOLDER}/"):
            if is_file(image_dir / f"{folder}{entry.image_path}"):
                return folder
    return ""


def _build_split(entries: list[Entry], folder: str, max_words: int, *, renumber: bool) -> Split:
    """Builds a split from its entries, with each image once."""
    images: dict[str, int] = {}
    entry_images = [images.setdefault(posixpath.normpath(entry.image_path), len(images)) for entry in entries]
    first: dict[int, Entry] = {}
    contradictions: dict[int, str] = {}
    for image, entry in zip(entry_images, entries, strict=True):
        identity = first.setdefault(image, entry).identity
        if identity != entry.identity:
            contradictions[image] = f"{entry.image_path!r} ({identity!r} and {entry.identity!r})"
    if contradictions:
        raise UserError(
            f"images with two ids in the {entries[0].split} entries of the annotation: "
            f"{first_of(list(contradictions.values()))}: correct their entries"
        )
    identities, names = _integers([entry.identity for entry in first.values()], renumber=renumber)
    paths = [folder + entry.image_path for entry in first.values()]
    split = Split(paths, identities, [], [], [], [], names, [] if len(images) < len(entries) else None)
    for number, (image, entry) in enumerate(zip(entry_images, entries, strict=True)):
        for i, caption in enumerate(entry.captions):
            back_translation = entry.back_translations[i] if i < len(entry.back_translations) else None
            split.captions.append(clean_caption(caption, max_words))
            split.back_translations.append(clean_caption(back_translation or "", max_words) or None)
            split.caption_images.append(image)
            split.annotated_captions.append(caption)
            if split.caption_entries is not None:
                split.caption_entries.append(number)
    return split


def _integers(identities: list[Identity], *, renumber: bool) -> tuple[list[int], dict[int, Identity]]:
    """Returns the identities as integers of 64 bits, which tensors can contain.

    Args:
        renumber: whether they are renumbered in any case.

    Returns: the integers, and the annotated identity of those that are not the same. With `renumber`, nobody reads
        these, and there are none.
    """
    integers = [each for each in identities if isinstance(each, int) and -(2**63) <= each < 2**63]
    if len(integers) == len(identities) and not renumber:
        return integers, {}
    numbers = numbered(identities)
    return numbers, {} if renumber else dict(zip(numbers, identities, strict=True))
