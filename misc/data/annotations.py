"""Reads the annotation of a dataset: raw files of its authors, `{train,val,test}_reid.json`, or any JSON or CSV file.

One entry of a file describes one image: its path, the person's id and the captions. A raw file contains all splits, and
each entry names its split. The `*_reid.json` files contain one split each; a `split` in their entries is ignored. A CSV
file has a row per caption.
"""

import csv
import hashlib
import io
import itertools
import json
import posixpath
import re
import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from random import Random
from reprlib import repr as shortened
from typing import NamedTuple

from misc.errors import UserError, first_of
from misc.files import is_file, is_folder
from text_utils.cleaning import MAX_WORDS, clean_caption
from text_utils.tokenizer import Tokenizer

SPLITS = ("train", "val", "test")
RAW_FILES = ("reid_raw.json", "ICFG-PEDES.json", "ICFG_PEDES.json", "data_captions.json")
IMAGE_SUBFOLDER = "imgs"
CSV_SUFFIXES = (".csv", ".tsv")
"""Suffixes of the files that are read as CSV; all others are read as JSON."""

Identity = int | str
"""The annotated id of a person."""


class Counts(NamedTuple):
    """Size of a split. The number of identities is None if it is not published."""

    identities: int | None
    images: int
    captions: int


PUBLISHED_COUNTS = {
    "CUHK-PEDES": {
        "train": Counts(11_003, 34_054, 68_126),
        "val": Counts(1_000, 3_078, 6_158),
        "test": Counts(1_000, 3_074, 6_156),
    },
    "ICFG-PEDES": {
        "train": Counts(3_102, 34_674, 34_674),
        "test": Counts(1_000, 19_848, 19_848),
    },
    "RSTPReid": {
        "train": Counts(3_701, 18_505, 37_010),
        "val": Counts(200, 1_000, 2_000),
        "test": Counts(200, 1_000, 2_000),
    },
    "UFine6926": {
        "train": Counts(None, 18_577, 37_154),
        "test": Counts(None, 7_629, 15_258),
    },
    "UFine3C": {
        "test": Counts(2_250, 7_446, 37_939),
    },
}
PUBLISHED_IDENTITIES = {"UFine6926": 6_926}
"""The number of identities of all splits together, where it is only published so."""


@dataclass(frozen=True)
class Split:
    """One split. A training sample is one (image, caption) pair, so the length of a split is its number of captions.

    Attributes:
        image_paths: per image, relative to the image folder. Each image is listed once.
        image_identities: per image. Training identities are renumbered 0..n-1 in order of first appearance. Those of
            other splits stay as annotated, or are renumbered too if one of them is not an integer of 64 bits.
        captions: cleaned, in the order of the annotation.
        back_translations: per caption, cleaned; None if it has no back-translation.
        caption_images: per caption, the index of its image.
        annotated_captions: the captions as annotated, for people to read.
        identity_names: for identities that are renumbered, except those of the training split, the annotated one.
        caption_entries: per caption, the index of its entry in the annotation; None if each image has one entry.
    """

    image_paths: list[str]
    image_identities: list[int]
    captions: list[str]
    back_translations: list[str | None]
    caption_images: list[int]
    annotated_captions: list[str]
    identity_names: dict[int, Identity] = field(default_factory=dict)
    caption_entries: list[int] | None = None

    def __len__(self) -> int:
        return len(self.captions)

    @cached_property
    def caption_identities(self) -> list[int]:
        """Per caption, the identity of its image."""
        return [self.image_identities[image] for image in self.caption_images]

    @cached_property
    def fingerprint(self) -> str:
        """A hash of identities, captions, back-translations and their order.

        The image paths do not change it. It is a hash of the entries as annotated, so merging them changes nothing.
        """
        identities, entries = self.image_identities, self.caption_images
        if self.caption_entries is not None:
            entries = self.caption_entries
            identities = list(dict(zip(entries, self.caption_identities, strict=True)).values())
        content = [identities, self.captions, self.back_translations, entries]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    def annotated_identity(self, identity: int) -> Identity:
        """Returns the id of a person as annotated, for people to read. Not for the training split."""
        return self.identity_names.get(identity, identity)

    @cached_property
    def counts(self) -> Counts:
        """The numbers of identities, images and captions."""
        return Counts(len(set(self.image_identities)), len(self.image_paths), len(self.captions))


class _Entry(NamedTuple):
    """One checked entry of an annotation file, captions as annotated."""

    split: str
    image_path: str
    identity: Identity
    captions: list[str]
    back_translations: list[str | None]


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
    entries: list[_Entry] = []
    present = dict.fromkeys(SPLITS, False)
    for path, split in _annotation_files(anno_dir, splits, required):
        named = _read_entries(path)
        if split is None and named and not any("split" in entry for _, entry in named):
            raise UserError(
                f"{path} has no `split` in any entry: add train, val or test to each, or get a file with splits; "
                "caption_all.json of CUHK-PEDES has none and cannot be used under any name, get reid_raw.json"
            )
        for entry_name, entry in named:
            own_split = split or _split_of(entry, entry_name)
            present[own_split] = True
            if own_split in splits:
                entries.append(_parse_entry(entry, entry_name, own_split))
    for name in required:
        if not present[name]:
            others = [other for other in SPLITS if present[other]]
            only = f", only {' and '.join(others)}" if others else ""
            raise UserError(f"the annotation in {anno_dir} has no {name} entries{only}: {_remedy(name, others)}")
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
        (_image_path(entry, entry_name), _captions(entry, entry_name))
        for entry_name, entry in _read_entries(Path(path))
    ]


def image_notes(splits: dict[str, Split]) -> list[str]:
    """Returns lines for the log: images that have several entries, and warnings of images in two splits."""
    notes = []
    for name, split in splits.items():
        if split.caption_entries is not None:
            entries, images = len(set(split.caption_entries)), len(split.image_paths)
            notes.append(f"{name}: {entries:,} entries describe {images:,} images, so entries of an image are merged")
    for (name, split), (other_name, other) in itertools.combinations(splits.items(), 2):
        paths = set(split.image_paths)
        if shared := [path for path in other.image_paths if path in paths]:
            notes.append(
                f"warning: images in both {name} and {other_name}: {first_of(shared)}: remove them from one of the two"
            )
    return notes


def data_title(dataset: str | None, split: str, anno_dir: str) -> str:
    """Returns the dataset, the split and the folder of an evaluation, to name its results by."""
    return f"{dataset} {split} in {anno_dir}" if dataset else f"{split} in {anno_dir}"


def cut_captions_note(splits: dict[str, Split], tokenizer: Tokenizer, text_length: int, *, cleaned: bool = True) -> str:
    """Returns a line for the log: how many captions exceed `text_length` tokens, and how many tokens they lose.

    Args:
        cleaned: whether the model takes cleaned captions. False: those as annotated.

    This takes about a second of processor time for 80,000 captions.
    """
    parts = []
    for name, split in splits.items():
        lost = []
        captions = split.captions if cleaned else split.annotated_captions
        for caption, annotated in zip(captions, split.annotated_captions, strict=True):
            if tokenizer.count(caption) > text_length:  # then a cleaned one may have lost words already
                whole = clean_caption(annotated, sys.maxsize) if cleaned else annotated
                lost.append(tokenizer.count(whole) - text_length)
        many = f" (by {sum(lost) / len(lost):.1f} tokens on average, at most {max(lost)})" if lost else ""
        parts.append(f"{len(lost):,} of {len(split):,} in {name}{many}")
    return f"captions{'' if cleaned else ' as annotated,'} cut at {text_length} tokens: {', '.join(parts)}"


def few_shot(split: Split, share: float, seed: int) -> Split:
    """Draws a share of the images, at least one, with all their captions. Identities are renumbered."""
    images = len(split.image_paths)
    drawn = sorted(Random(f"few-shot {seed}").sample(range(images), max(1, round(share * images))))
    return keep_images(split, drawn, renumber=True)


def keep_images(split: Split, images: Sequence[int], *, renumber: bool) -> Split:
    """Returns a split with only these images, and all their captions.

    Args:
        images: their indices, in ascending order.
        renumber: whether identities are renumbered, as in a training split.
    """
    new_index = {image: index for index, image in enumerate(images)}
    identities = [split.image_identities[image] for image in images]
    captions = [number for number, image in enumerate(split.caption_images) if image in new_index]
    entries = split.caption_entries
    return Split(
        image_paths=[split.image_paths[image] for image in images],
        image_identities=_numbered(identities) if renumber else identities,
        captions=[split.captions[number] for number in captions],
        back_translations=[split.back_translations[number] for number in captions],
        caption_images=[new_index[split.caption_images[number]] for number in captions],
        annotated_captions=[split.annotated_captions[number] for number in captions],
        identity_names=split.identity_names,
        caption_entries=None if entries is None else _numbered(entries[number] for number in captions),
    )


def _numbered(values: Iterable[Identity]) -> list[int]:
    """Replaces equal values by the same number, counted from 0 in order of first appearance."""
    numbers: dict[Identity, int] = {}
    return [numbers.setdefault(value, len(numbers)) for value in values]


def statistics_table(
    splits: dict[str, Split], dataset: str | None, compared: tuple[str, ...] = SPLITS
) -> tuple[str, list[str]]:
    """Returns a table of identities, images and captions per split, and a list of warnings.

    Args:
        dataset: a key of `PUBLISHED_COUNTS`, or None for your own data. There is one warning for each number that
            differs from the published one.
        compared: names of the splits to compare.

    Raises UserError if `dataset` is another name.
    """
    if dataset is not None and dataset not in PUBLISHED_COUNTS:
        raise UserError(f"unknown dataset {dataset!r}: expected one of {', '.join(PUBLISHED_COUNTS)}, or null")
    lines = [f"{'split':<6}" + "".join(f"{field:>12}" for field in Counts._fields)]
    lines += [f"{name:<6}" + "".join(f"{count:>12,}" for count in split.counts) for name, split in splits.items()]
    return "\n".join(lines), _differences(splits, dataset, compared) if dataset else []


def _differences(splits: dict[str, Split], dataset: str, compared: tuple[str, ...]) -> list[str]:
    """Returns one line for each number that differs from the published one. A missing split counts as zero."""
    ours = {name: split.counts for name, split in splits.items()}
    empty = Counts(0, 0, 0)
    numbers = [
        (name, field, found, published)
        for name in compared
        for field, found, published in zip(
            Counts._fields, ours.get(name, empty), PUBLISHED_COUNTS[dataset].get(name, empty), strict=True
        )
    ]
    if dataset in PUBLISHED_IDENTITIES and set(compared) == set(SPLITS):  # no person is in two splits
        together = sum(counts.identities or 0 for counts in ours.values())
        numbers.append(("all splits", "identities", together, PUBLISHED_IDENTITIES[dataset]))
    return [
        f"{dataset} {name}: {found:,} {field} here, {published:,} published"
        for name, field, found, published in numbers
        if published is not None and found != published
    ]


def _existing_folder(key: str, folder: str | Path) -> Path:
    if not is_folder(folder):
        raise UserError(f"`{key}: {folder}` is not a folder: set it to an existing folder")
    return Path(folder)


def _annotation_files(
    anno_dir: Path, splits: tuple[str, ...], required: tuple[str, ...]
) -> list[tuple[Path, str | None]]:
    """Returns the files to read, each with its split. The split is None if the entries name it."""
    if is_file(anno_dir):
        return [(anno_dir, next((split for split in SPLITS if anno_dir.name == f"{split}_reid.json"), None))]
    if not is_folder(anno_dir):
        raise UserError(
            f"`anno_dir: {anno_dir}` does not exist: set it to the folder of the annotation, or to its JSON or CSV file"
        )
    split_files = {split: anno_dir / f"{split}_reid.json" for split in SPLITS}
    split_files = {split: path for split, path in split_files.items() if is_file(path)}
    raw = [anno_dir / name for name in RAW_FILES if is_file(anno_dir / name)]
    if "train" in split_files or (split_files and not raw):
        if missing := [split for split in required if split not in split_files]:
            present = first_of([path.name for path in split_files.values()])
            remedy = _remedy(missing[0], list(split_files))
            raise UserError(f"{anno_dir} contains {present} but no {missing[0]}_reid.json: {remedy}")
        return [(path, split) for split, path in split_files.items() if split in splits]

    if len(raw) == 1:
        return [(raw[0], None)]
    if raw:
        names = ", ".join(path.name for path in raw)
        raise UserError(f"{anno_dir} contains several annotation files ({names}): keep only the one to use")
    if is_file(anno_dir / "caption_all.json"):
        raise UserError(
            f"{anno_dir} contains caption_all.json, which has no `split` and cannot be used: "
            "get reid_raw.json of CUHK-PEDES"
        )
    suffixes = (".json", *CSV_SUFFIXES)
    present = ", ".join(sorted(path.name for path in anno_dir.iterdir() if path.suffix.lower() in suffixes)) or "none"
    raise UserError(
        f"no annotation in {anno_dir}: expected train_reid.json and test_reid.json, or one of "
        f"{', '.join(RAW_FILES)}; to use another file, set anno_dir to it; JSON and CSV files there: {present}"
    )


def _remedy(split: str, present: list[str]) -> str:
    """Returns what the user can do if a split is missing."""
    remedy = "get the complete annotation"
    if split == "train":
        return f"{remedy}, or only evaluate on it with --evaluate"
    other = "test" if split == "val" else "val"
    return f"{remedy}, or set data.evaluate_on={other}" if other in present else remedy


def _read_entries(path: Path) -> list[tuple[str, dict]]:
    """Reads the entries of an annotation file, each with its name for error messages."""
    return _read_csv(path) if path.suffix.lower() in CSV_SUFFIXES else _read_json_list(path)


def _read_bytes(path: Path) -> bytes:
    if not is_file(path):
        raise UserError(f"{path} is not a file: correct the path")
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): check its permissions") from error


CONVERT = "if it is in another encoding, for example GBK, convert it: iconv -f GBK -t UTF-8"


def _read_csv(path: Path) -> list[tuple[str, dict]]:
    """Reads a CSV file. Rows of the same image become one entry. Semicolons and tabs may separate the columns too."""
    try:
        text = _read_bytes(path).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} cannot be read as CSV ({error}): {CONVERT}") from error
    delimiter = max(",;\t", key=text.partition("\n")[0].count)
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=True, strict=True)
    entries: dict[tuple[str | None, ...], tuple[str, dict]] = {}
    try:
        columns = reader.fieldnames = [column.strip() for column in reader.fieldnames or ()]
        if "caption" not in columns or not {"file_path", "img_path"} & set(columns):
            raise UserError(
                f"the first line of {path} is {shortened(text.partition(chr(10))[0])}, expected the names of the "
                "columns: split,id,file_path,caption"
            )
        for row in reader:
            name = f"{path} line {reader.line_num}"
            if None in row or None in row.values():
                raise UserError(
                    f"{name} has {'more' if None in row else 'fewer'} values than the first line has columns: put a "
                    f"caption that contains {delimiter!r} between double quotes"
                )
            caption = row.pop("caption")
            image = tuple(row.get(column) for column in ("split", "id", "file_path", "img_path"))
            entries.setdefault(image, (name, row | {"captions": []}))[1]["captions"].append(caption)
    except csv.Error as error:
        raise UserError(
            f"{path} line {reader.reader.line_num} cannot be read as CSV ({error}): fix its quotes"
        ) from error
    return list(entries.values())


def _read_json_list(path: Path) -> list[tuple[str, dict]]:
    """Reads the entries of a JSON file, each with its name for error messages."""
    content = _read_bytes(path)
    try:
        entries = json.loads(content)
    except (ValueError, RecursionError) as error:  # not JSON, or not text
        remedy = "get the file again"
        if isinstance(error, UnicodeDecodeError):
            remedy = f"{CONVERT}; else {remedy}"
        elif _is_json_lines(content):
            remedy = (
                "it is JSON Lines, with an object on each line: convert it to one JSON list, for example with jq -s ."
            )
        raise UserError(f"{path} cannot be read as JSON ({error}): {remedy}") from error
    if not isinstance(entries, list):
        raise UserError(f"{path} contains {shortened(entries)}, expected a JSON list with one entry per image")
    named = [(f"{path} entry {number} (counted from 1)", entry) for number, entry in enumerate(entries, start=1)]
    for entry_name, entry in named:
        if not isinstance(entry, dict):
            raise UserError(
                f"{entry_name} is {shortened(entry)}, expected an object with `file_path`: fix or remove it"
            )
    return named


def _is_json_lines(content: bytes) -> bool:
    """Returns whether the first line is an object and ends with it."""
    try:
        return isinstance(json.loads(content.lstrip().partition(b"\n")[0]), dict)
    except (ValueError, RecursionError):
        return False


def _split_of(entry: dict, entry_name: str) -> str:
    split = entry.get("split")
    if split not in SPLITS:
        raise _field_error(entry, entry_name, "split", f"one of {', '.join(SPLITS)}")
    return split


def _parse_entry(entry: dict, entry_name: str, split: str) -> _Entry:
    """Checks an entry of a split."""
    identity = _identity(entry, entry_name)
    captions = _captions(entry, entry_name)
    back_translations = _back_translations(entry, entry_name)
    return _Entry(split, _image_path(entry, entry_name), identity, captions, back_translations)


_WHOLE_NUMBER = re.compile(r"([+-]?[0-9]{1,1000})(?:\.0*)?")


def _identity(entry: dict, entry_name: str) -> Identity:
    """Returns the id of a person: an integer of any size, or a text.

    A number is the same person in every spelling: 1, 1.0, "1", "1.0" and "00001". Programs that write JSON and CSV turn
    these into each other. Other texts are compared as they are, except for the white space around them.
    """
    value = entry.get("id")
    if type(value) is int:  # isinstance would accept true and false
        return value
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:  # others have lost their last digits
        return int(value)
    if isinstance(value, str) and (text := value.strip()):
        number = _WHOLE_NUMBER.fullmatch(text)
        return int(number[1]) if number else text
    raise _field_error(entry, entry_name, "id", "a whole number or a text")


def _image_path(entry: dict, entry_name: str) -> str:
    field = "img_path" if "img_path" in entry and "file_path" not in entry else "file_path"
    path = entry.get(field)
    if not (isinstance(path, str) and path):
        raise _field_error(entry, entry_name, field, "the path of an image")
    location = Path(path.replace("\\", "/"))
    if location.anchor or ".." in location.parts:  # under Windows, `/x` and `C:x` are not absolute
        raise _field_error(entry, entry_name, field, "a path inside the image folder, without `..`")
    return path


def _captions(entry: dict, entry_name: str) -> list[str]:
    captions = entry.get("captions")
    if not (isinstance(captions, list) and captions and all(isinstance(caption, str) for caption in captions)):
        raise _field_error(entry, entry_name, "captions", "a list of at least one text")
    return captions


def _back_translations(entry: dict, entry_name: str) -> list[str | None]:
    """Returns `captions_bt` of an entry, or an empty list if it has none."""
    texts = entry.get("captions_bt")
    if texts is None:
        return []
    if not (isinstance(texts, list) and all(text is None or isinstance(text, str) for text in texts)):
        raise _field_error(entry, entry_name, "captions_bt", "a list of texts and nulls")
    return texts


def _field_error(entry: dict, entry_name: str, field: str, expected: str) -> UserError:
    found = f"`{field}: {shortened(entry[field])}`" if field in entry else f"no `{field}`"
    return UserError(f"{entry_name} has {found}, expected {expected}: fix or remove the entry")


def _join_back_translations(entries: list[_Entry], path: Path) -> list[_Entry]:
    """Returns the entries with their back-translations from the file `path`. Entries without any stay unchanged.

    If an image has several entries in the annotation and fewer in the file, the texts are dealt out in order.
    """
    available: dict[str, list[list[str | None]]] = defaultdict(list)
    for entry_name, translated in _read_json_list(path):
        if texts := _back_translations(translated, entry_name):
            available[_image_path(translated, entry_name).replace("\\", "/")].append(texts)
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


def _with_separators(entry: _Entry, image_dir: Path) -> _Entry:
    """Returns the entry with the backslashes of its path as separators, if its image is there."""
    path = entry.image_path.replace("\\", "/")
    found = path != entry.image_path and any(is_file(image_dir / folder / path) for folder in ("", IMAGE_SUBFOLDER))
    return entry._replace(image_path=path) if found else entry


def _image_folder(entries: list[_Entry], image_dir: Path) -> str:
    """Returns the prefix of annotated paths in `image_dir`: `imgs/` if the first image found is there, else empty."""
    for entry in entries:
        for folder in ("", f"{IMAGE_SUBFOLDER}/"):
            if is_file(image_dir / f"{folder}{entry.image_path}"):
                return folder
    return ""


def _build_split(entries: list[_Entry], folder: str, max_words: int, *, renumber: bool) -> Split:
    """Builds a split from its entries, with each image once."""
    images: dict[str, int] = {}
    entry_images = [images.setdefault(posixpath.normpath(entry.image_path), len(images)) for entry in entries]
    first: dict[int, _Entry] = {}
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
    numbers = _numbered(identities)
    return numbers, {} if renumber else dict(zip(numbers, identities, strict=True))
