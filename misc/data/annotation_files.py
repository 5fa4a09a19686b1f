"""Finds the annotation files of a dataset, and reads their entries.

One entry of a file describes one image: its path, the person's id and the captions. A raw file contains all splits, and
each entry names its split. The `*_reid.json` files contain one split each; a `split` in their entries is ignored. A CSV
file has a row per caption.
"""

import csv
import io
import json
import re
from pathlib import Path
from reprlib import repr as shortened
from typing import NamedTuple

from misc.data.split import SPLITS, Identity
from misc.errors import UserError, first_of
from misc.files import is_file, is_folder

RAW_FILES = ("reid_raw.json", "ICFG-PEDES.json", "ICFG_PEDES.json", "data_captions.json")
CSV_SUFFIXES = (".csv", ".tsv")
"""Suffixes of the files that are read as CSV; all others are read as JSON."""
CONVERT = "if it is in another encoding, for example GBK, convert it: iconv -f GBK -t UTF-8"


class Entry(NamedTuple):
    """One checked entry of an annotation file, captions as annotated."""

    split: str
    image_path: str
    identity: Identity
    captions: list[str]
    back_translations: list[str | None]


def annotation_files(
    anno_dir: Path, splits: tuple[str, ...], required: tuple[str, ...]
) -> list[tuple[Path, str | None]]:
    """Returns the files to read, each with its split. The split is None if the entries name it.

    Args:
        anno_dir, splits, required: as in `read_annotations`.

    Raises UserError if there is no such file, or if one of a required split is missing.
    """
    if is_file(anno_dir):
        return [(anno_dir, next((split for split in SPLITS if anno_dir.name == f"{split}_reid.json"), None))]
    if not is_folder(anno_dir):
        raise UserError(
            f"`anno_dir: {anno_dir}` does not exist: set it to the folder of the annotation, or to its JSON or CSV "
            "file, or correct config/datasets.yaml"
        )
    split_files = {split: anno_dir / f"{split}_reid.json" for split in SPLITS}
    split_files = {split: path for split, path in split_files.items() if is_file(path)}
    raw = [anno_dir / name for name in RAW_FILES if is_file(anno_dir / name)]
    if "train" in split_files or (split_files and not raw):
        if missing := [split for split in required if split not in split_files]:
            present = first_of([path.name for path in split_files.values()])
            remedy = missing_split_remedy(missing[0], list(split_files))
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
    present = first_of(sorted(path.name for path in anno_dir.iterdir() if path.suffix.lower() in suffixes)) or "none"
    raise UserError(
        f"no annotation in {anno_dir}: expected train_reid.json and test_reid.json, or one of "
        f"{', '.join(RAW_FILES)}; to use another file, set anno_dir to it; JSON and CSV files there: {present}"
    )


def missing_split_remedy(split: str, present: list[str]) -> str:
    """Returns what the user can do if a split is missing."""
    remedy = "get the complete annotation"
    if split == "train":
        return f"{remedy}, or only evaluate on it with --evaluate"
    other = "test" if split == "val" else "val"
    return f"{remedy}, or set data.evaluate_on={other}" if other in present else remedy


def read_entries(path: Path) -> list[tuple[str, dict]]:
    """Reads the entries of an annotation file, each with its name for error messages.

    Raises UserError if the file cannot be read, or is no list of entries.
    """
    return _read_csv(path) if path.suffix.lower() in CSV_SUFFIXES else read_json_list(path)


def read_json_list(path: Path) -> list[tuple[str, dict]]:
    """Reads the entries of a JSON file like `read_entries`."""
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


def _read_csv(path: Path) -> list[tuple[str, dict]]:
    """Reads a CSV file. Rows of the same image become one entry. Semicolons and tabs may separate the columns too."""
    try:
        text = _read_bytes(path).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} cannot be read as CSV ({error}): {CONVERT}") from error
    first_line = next(iter(text.splitlines()), "")
    delimiter = max(",;\t", key=first_line.count)
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=True, strict=True)
    entries: dict[tuple[str | None, ...], tuple[str, dict]] = {}
    try:
        columns = reader.fieldnames = [column.strip() for column in reader.fieldnames or ()]
        if "caption" not in columns or not {"file_path", "img_path"} & set(columns):
            raise UserError(
                f"the first line of {path} is {shortened(first_line)}, expected the names of the "
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


def _read_bytes(path: Path) -> bytes:
    if not is_file(path):
        raise UserError(f"{path} is not a file: correct the path")
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): check its permissions") from error


def _is_json_lines(content: bytes) -> bool:
    """Returns whether the first line is an object and ends with it."""
    try:
        return isinstance(json.loads(content.lstrip().partition(b"\n")[0]), dict)
    except (ValueError, RecursionError):
        return False


def parse_entry(entry: dict, entry_name: str, split: str) -> Entry:
    """Checks an entry of a split. Raises UserError if a field is wrong."""
    identity = _identity(entry, entry_name)
    captions = captions_of(entry, entry_name)
    back_translations = back_translations_of(entry, entry_name)
    return Entry(split, image_path_of(entry, entry_name), identity, captions, back_translations)


def split_of(entry: dict, entry_name: str) -> str:
    """Returns the split that an entry names. Raises UserError if it is another word."""
    split = entry.get("split")
    if split not in SPLITS:
        raise _field_error(entry, entry_name, "split", f"one of {', '.join(SPLITS)}")
    return split


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


def image_path_of(entry: dict, entry_name: str) -> str:
    """Returns the image path of an entry, as annotated. Raises UserError if it leads out of the image folder."""
    field = "img_path" if "img_path" in entry and "file_path" not in entry else "file_path"
    path = entry.get(field)
    if not (isinstance(path, str) and path):
        raise _field_error(entry, entry_name, field, "the path of an image")
    location = Path(path.replace("\\", "/"))
    if location.anchor or ".." in location.parts:  # under Windows, `/x` and `C:x` are not absolute
        raise _field_error(entry, entry_name, field, "a path inside the image folder, without `..`")
    return path


def captions_of(entry: dict, entry_name: str) -> list[str]:
    """Returns the captions of an entry, as annotated. Raises UserError if there is none."""
    captions = entry.get("captions")
    if not (isinstance(captions, list) and captions and all(isinstance(caption, str) for caption in captions)):
        raise _field_error(entry, entry_name, "captions", "a list of at least one text")
    return captions


def back_translations_of(entry: dict, entry_name: str) -> list[str | None]:
    """Returns `captions_bt` of an entry, or an empty list if it has none. Raises UserError if it is no list."""
    texts = entry.get("captions_bt")
    if texts is None:
        return []
    if not (isinstance(texts, list) and all(text is None or isinstance(text, str) for text in texts)):
        raise _field_error(entry, entry_name, "captions_bt", "a list of texts and nulls")
    return texts


def _field_error(entry: dict, entry_name: str, field: str, expected: str) -> UserError:
    found = f"`{field}: {shortened(entry[field])}`" if field in entry else f"no `{field}`"
    return UserError(f"{entry_name} has {found}, expected {expected}: fix or remove the entry")
