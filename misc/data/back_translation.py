"""Back-translation of an annotation's captions, English to French to English, for `data.back_translation_file`.

python -m misc.data.back_translation ANNOTATION OUT [--device {auto,cpu,cuda,cuda:N}] [--batch-size N]
                                      [--to-french MODEL] [--to-english MODEL]
"""

import argparse
import fcntl
import importlib.util
import json
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, NamedTuple

import torch
from tqdm import tqdm

from misc.data.annotations import read_captions
from misc.errors import DISK_FULL, UserError
from misc.files import atomic_file, check_new_path, is_folder, lock_file
from misc.system.distributed import choose_device

PACKAGES = ("transformers", "sentencepiece")
MAX_TOKENS = 512
"""Of a text that is read or written: as many as Marian's models have positions for."""

START = b'{"to_french": "'
"""Of the first line of a file of translations."""

Translator = Callable[[list[str]], list[str]]
"""Texts of one language to as many texts of a language."""


class Models(NamedTuple):
    """Names on the Hugging Face hub, or folders."""

    to_french: str = "Helsinki-NLP/opus-mt-en-fr"
    to_english: str = "Helsinki-NLP/opus-mt-fr-en"


def main(arguments: Sequence[str] | None = None) -> int:
    """Back-translates the file that the arguments name. Returns the exit status: 2 for a mistake of the user, told in
    one line, and 130 for Ctrl-C."""
    options = _parse(arguments)
    models = Models(options.to_french, options.to_english)
    try:
        device = choose_device(options.device)
        back_translate(
            options.annotation,
            options.out,
            models,
            lambda: load_translator(models, device),
            batch_size=options.batch_size,
        )
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped: the same command goes on from here", file=sys.stderr)
        return 130
    return 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "python -m misc.data.back_translation",
        description="Translate the captions of an annotation to French and back.",
    )
    parser.add_argument("annotation", type=Path, metavar="ANNOTATION", help="a raw annotation file or a *_reid.json")
    parser.add_argument("out", type=Path, metavar="OUT", help="new JSON file, for data.back_translation_file")
    parser.add_argument("--device", default="auto", help="auto (a GPU where there is one) | cpu | cuda | cuda:N")
    parser.add_argument("--batch-size", type=int, default=32, metavar="N", help="captions at a time (default: 32)")
    for option, default in Models._field_defaults.items():
        name = f"--{option.replace('_', '-')}"
        parser.add_argument(name, default=default, metavar="MODEL", help=f"name or folder (default: {default})")
    return parser.parse_args(arguments)


def back_translate(
    annotation: Path, out: Path, models: Models, load: Callable[[], Translator], *, batch_size: int = 32
) -> None:
    """Writes `[{"file_path": ..., "captions_bt": [...]}, ...]`: an entry per entry of `annotation`, a text per caption.

    A caption is translated as annotated, without the white space around it; equal ones once, empty ones not at all.
    Each batch is kept in `OUT.partial` until all are done, so whoever is stopped goes on with the same call.

    Args:
        annotation: file of any form that `misc.datasets.read_annotations` reads.
        out: does not exist yet; is written whole or not at all.
        models: what `load` loads; translations of others are not gone on with.
        load: gives the translator, English to English. It is called when all else is checked, and only if needed.
        batch_size: captions that the translator gets at a time, the longest first.

    Raises UserError for what is wrong with the arguments, `annotation` and `OUT.partial`, for packages that are not
    installed, and for a place that cannot be written; and whatever `load` and the translator raise.
    """
    if batch_size < 1:
        raise UserError(f"--batch-size {batch_size}: give 1 or more")
    _check_new(out)
    entries = [(path, [caption.strip() for caption in captions]) for path, captions in read_captions(annotation)]
    if not entries:
        raise UserError(f"{annotation} is an empty list: there is nothing to translate, give the complete file")
    partial = out.with_name(out.name + ".partial")
    try:
        with _kept(partial, models) as (translations, keep):
            _translate_all(entries, translations, keep, load, batch_size)
            _check_new(out)
            with atomic_file(out) as file:
                file.write(_line([_translated(path, captions, translations) for path, captions in entries]))
        partial.unlink(missing_ok=True)
    except OSError as error:
        if error.errno not in DISK_FULL:
            raise
        raise UserError(f"{out}: {error.strerror}: free some space, then the same command goes on from here") from error


def _check_new(out: Path) -> None:
    check_new_path(out, "OUT", "give another OUT")
    if not is_folder(out.parent):
        raise UserError(f"OUT: {out.parent} is not a folder: create it, or give another OUT")


def _translate_all(
    entries: list[tuple[str, list[str]]],
    translations: dict[str, str],
    keep: Callable[[dict[str, str]], None],
    load: Callable[[], Translator],
    batch_size: int,
) -> None:
    """Gives `keep` the translations that are missing, batch by batch."""
    different = dict.fromkeys(caption for _, captions in entries for caption in captions if caption)
    # Neighbours of like length need little padding. What is left after a stop falls into the same batches.
    missing = sorted((caption for caption in different if caption not in translations), key=len, reverse=True)
    if not missing:
        return
    translate = load()
    done = len(different) - len(missing)
    with tqdm(total=len(different), initial=done, desc="back-translating", unit="caption", dynamic_ncols=True) as bar:
        for start in range(0, len(missing), batch_size):
            batch = missing[start : start + batch_size]
            keep(dict(zip(batch, translate(batch), strict=True)))
            bar.update(len(batch))


def _translated(path: str, captions: list[str], translations: dict[str, str]) -> dict[str, str | list[str]]:
    return {"file_path": path, "captions_bt": [translations[caption] if caption else "" for caption in captions]}


# ---- what is done so far --------------------------------------------------------------------------------------------


@contextmanager
def _kept(path: Path, models: Models) -> Iterator[tuple[dict[str, str], Callable[[dict[str, str]], None]]]:
    """The translations that a file holds, by caption, and a function that adds some to both.

    The file has a line with the names of the models, then one for each batch. One without a batch is of no use and not
    left behind.
    """
    with _opened(path) as file:
        translations, size = _read_partial(file, path, models)
        file.truncate(size)  # a half-written line
        if not translations:
            file.truncate(0)
            _append(file, models._asdict())

        def keep(batch: dict[str, str]) -> None:
            _append(file, batch)
            translations.update(batch)

        try:
            yield translations, keep
        finally:
            if not translations:
                path.unlink(missing_ok=True)


def _opened(path: Path) -> BinaryIO:
    """The file, to read and append to, for this process alone."""
    try:
        file = path.open("a+b")
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror}): give another OUT") from error
    try:
        unlocked = lock_file(file, fcntl.flock)
    except BlockingIOError as error:
        raise UserError(f"{path}: another process is writing it: wait for it, or give another OUT") from error
    if unlocked:
        tqdm.write(f"warning: {path} cannot be locked ({unlocked}): start this command only once")
    return file


def _read_partial(file: BinaryIO, path: Path, models: Models) -> tuple[dict[str, str], int]:
    """Translations by caption, and the size of all whole lines."""
    file.seek(0)
    content = file.read()
    size = content.rfind(b"\n") + 1
    first, *batches = content[:size].split(b"\n")[:-1] or [b""]
    found = _parse_line(first) or {}
    ours = set(found) == set(Models._fields) if first else START.startswith(content[: len(START)])
    if not ours:
        raise UserError(f"{path} is not of this command, or damaged: move it away, or give another OUT")
    if batches and Models(**found) != models:
        raise UserError(
            f"{path} holds translations of --to-french {found['to_french']} --to-english {found['to_english']}: "
            "go on with these models, or remove it to start anew"
        )
    translations: dict[str, str] = {}
    for number, line in enumerate(batches, start=2):
        batch = _parse_line(line)
        if batch is None:
            raise UserError(f"{path} line {number} is damaged: remove this line, its captions are translated anew")
        translations |= batch
    return translations, size


def _parse_line(line: bytes) -> dict[str, str] | None:
    """None for anything but texts by name."""
    try:
        content = json.loads(line)
    except ValueError:
        return None
    fits = isinstance(content, dict) and all(isinstance(value, str) for value in content.values())
    return content if fits else None


def _append(file: BinaryIO, content: dict[str, str]) -> None:
    file.write(_line(content))
    file.flush()
    os.fsync(file.fileno())


def _line(content: object) -> bytes:
    return json.dumps(content).encode() + b"\n"  # in ASCII, so that captions may hold what UTF-8 cannot


# ---- Marian ---------------------------------------------------------------------------------------------------------


def load_translator(models: Models, device: torch.device) -> Translator:
    """English to English by way of French. Raises UserError for models that cannot be loaded and missing packages."""
    missing = [package for package in PACKAGES if importlib.util.find_spec(package) is None]
    if missing:
        raise UserError(f"{' and '.join(missing)} must be installed: pip install {' '.join(PACKAGES)}")
    to_french = _load_model("--to-french", models.to_french, device)
    to_english = _load_model("--to-english", models.to_english, device)
    return lambda captions: to_english(to_french(captions))


def _load_model(option: str, name: str, device: torch.device) -> Translator:
    from transformers import AutoModelForSeq2SeqLM, AutoTokenizer  # not needed for anything else, and takes seconds

    try:
        # The model first: without a network, the tokenizer would keep on trying for twice as long.
        model = AutoModelForSeq2SeqLM.from_pretrained(name, dtype=torch.float32)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Recommended: pip install sacremoses")  # for a method that nobody calls
            tokenizer = AutoTokenizer.from_pretrained(name)
    except Exception as error:  # a damaged folder can fail in every way
        reason = str(error).partition("\n")[0] or type(error).__name__
        if is_folder(name):
            remedy = "the folder should hold a Marian model and its tokenizer, get it again"
        else:
            remedy = (
                f"where there is a network, run `hf download {name} --local-dir FOLDER`, then give {option} FOLDER here"
            )
        raise UserError(f"{option} {name} cannot be loaded ({reason}): {remedy}") from error
    model.to(device).eval()

    def translate(texts: list[str]) -> list[str]:
        encodable = [text.encode(errors="replace").decode() for text in texts]  # JSON may hold half a surrogate pair
        tokens = tokenizer(encodable, return_tensors="pt", padding=True, truncation=True, max_length=MAX_TOKENS)
        with torch.no_grad():
            ids = model.generate(**tokens.to(device), max_length=MAX_TOKENS)
        return [text.strip() for text in tokenizer.batch_decode(ids, skip_special_tokens=True)]

    return translate


if __name__ == "__main__":
    sys.exit(main())
