"""Back-translation of an annotation's captions, English to French to English, for `data.back_translation_file`.

python -m misc.data.back_translation ANNOTATION OUT [--device {auto,cpu,cuda,cuda:N}] [--batch-size N]
                                      [--to-french MODEL] [--to-english MODEL]
"""

import argparse
import importlib.util
import json
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, NamedTuple

import torch
from tqdm import tqdm

from misc.data.annotations import read_captions
from misc.errors import DISK_FULL, UserError
from misc.files import CAN_REPLACE_OPEN_FILES, atomic_file, check_new_path, is_folder, lock_file, path_argument
from misc.system.distributed import choose_device
from misc.terminal import prepare_streams, report

PACKAGES = ("transformers", "sentencepiece")
MAX_TOKENS = 512
"""Maximum length of an input and of an output text: the number of positions of Marian's models."""

START = b'{"to_french": "'
"""The start of the first line of a progress file."""

Translator = Callable[[list[str]], list[str]]
"""A function from texts to their translations, one for each text."""


class Models(NamedTuple):
    """The two translation models: names on the Hugging Face hub, or folders."""

    to_french: str = "Helsinki-NLP/opus-mt-en-fr"
    to_english: str = "Helsinki-NLP/opus-mt-fr-en"


def main(arguments: Sequence[str] | None = None) -> int:
    """Back-translates the file that the arguments name.

    Returns: the exit status: 2 for a mistake of the user, printed as one line, and 130 for Ctrl-C.
    """
    prepare_streams()
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
        report(f"error: {error}")
        return 2
    except KeyboardInterrupt:
        report("stopped: run the same command again to continue")
        return 130
    return 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "python -m misc.data.back_translation",
        description="Translate the captions of an annotation to French and back.",
    )
    parser.add_argument("annotation", type=_path, metavar="ANNOTATION", help="a JSON or CSV file that training reads")
    parser.add_argument("out", type=_path, metavar="OUT", help="JSON file to create, for data.back_translation_file")
    parser.add_argument("--device", default="auto", help="auto (a GPU if there is one) | cpu | cuda | cuda:N")
    parser.add_argument("--batch-size", type=int, default=32, metavar="N", help="captions per batch (default: 32)")
    for option, default in Models._field_defaults.items():
        name = f"--{option.replace('_', '-')}"
        described = f"hub name or folder (default: {default})"
        parser.add_argument(name, type=path_argument, default=default, metavar="MODEL", help=described)
    return parser.parse_args(arguments)


def _path(text: str) -> Path:
    return Path(path_argument(text))


def back_translate(
    annotation: Path, out: Path, models: Models, load: Callable[[], Translator], *, batch_size: int = 32
) -> None:
    """Writes `[{"file_path": ..., "captions_bt": [...]}, ...]`: an entry per entry of `annotation`, a text per caption.

    A caption is translated as annotated, without the white space around it. Equal captions are translated once, empty
    ones are not. Each batch is saved in `OUT.partial` until all are done, so the same call continues after a stop.

    Args:
        annotation: file of any form that `misc.data.annotations.read_annotations` reads.
        out: new file; it is written completely or not at all.
        models: the models that `load` loads. Saved translations of other models are refused.
        load: returns the translator, English to English. It is called only if needed, after all checks.
        batch_size: number of captions that the translator gets at a time, the longest first.

    Raises UserError if the arguments, `annotation` or `OUT.partial` are wrong, if a package is missing, or if a file
    cannot be written. Exceptions of `load` and of the translator pass through.
    """
    if batch_size < 1:
        raise UserError(f"--batch-size {batch_size}: give 1 or more")
    _check_new(out)
    entries = [(path, [caption.strip() for caption in captions]) for path, captions in read_captions(annotation)]
    if not entries:
        raise UserError(f"{annotation} is an empty list, with nothing to translate: give the complete file")
    partial = out.with_name(out.name + ".partial")
    try:
        with _saved_translations(partial, models) as (translations, save):
            _translate_all(entries, translations, save, load, batch_size)
            _check_new(out)
            with atomic_file(out) as file:
                file.write(_line([_output_entry(path, captions, translations) for path, captions in entries]))
        partial.unlink(missing_ok=True)
    except OSError as error:
        if error.errno not in DISK_FULL:
            raise
        raise UserError(
            f"{out}: {error.strerror}: free some space, then run the same command again to continue"
        ) from error


def _check_new(out: Path) -> None:
    check_new_path(out, "OUT", "give another OUT")
    if not is_folder(out.parent):
        raise UserError(f"OUT: {out.parent} is not a folder: create it, or give another OUT")


def _translate_all(
    entries: list[tuple[str, list[str]]],
    translations: dict[str, str],
    save: Callable[[dict[str, str]], None],
    load: Callable[[], Translator],
    batch_size: int,
) -> None:
    """Translates the missing captions and saves them, batch by batch."""
    unique = dict.fromkeys(caption for _, captions in entries for caption in captions if caption)
    # Captions of similar length need little padding. After a stop, the rest falls into the same batches.
    missing = sorted((caption for caption in unique if caption not in translations), key=len, reverse=True)
    if not missing:
        return
    translate = load()
    done = len(unique) - len(missing)
    with tqdm(total=len(unique), initial=done, desc="back-translating", unit="caption", dynamic_ncols=True) as bar:
        for start in range(0, len(missing), batch_size):
            batch = missing[start : start + batch_size]
            save(dict(zip(batch, translate(batch), strict=True)))
            bar.update(len(batch))


def _output_entry(path: str, captions: list[str], translations: dict[str, str]) -> dict[str, str | list[str]]:
    return {"file_path": path, "captions_bt": [translations[caption] if caption else "" for caption in captions]}


# ---- progress -------------------------------------------------------------------------------------------------------


@contextmanager
def _saved_translations(
    path: Path, models: Models
) -> Iterator[tuple[dict[str, str], Callable[[dict[str, str]], None]]]:
    """Opens a progress file.

    The file has a line with the names of the models, then one line for each batch. Without a batch it is removed.

    Yields: the saved translations by caption, and a function that adds a batch to them and to the file.
    """
    with _open_locked(path) as file:
        translations, size = _read_partial(file, path, models)
        file.truncate(size)  # a half-written line
        if not translations:
            file.truncate(0)
            _append(file, models._asdict())

        def save(batch: dict[str, str]) -> None:
            _append(file, batch)
            translations.update(batch)

        try:
            yield translations, save
        finally:
            if not translations:
                with suppress(*(() if CAN_REPLACE_OPEN_FILES else (PermissionError,))):
                    path.unlink(missing_ok=True)


def _open_locked(path: Path) -> BinaryIO:
    """Opens a file to read and append, and locks it for this process."""
    try:
        file = path.open("a+b")
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror}): give another OUT") from error
    try:
        unlocked = lock_file(file)
    except BlockingIOError as error:
        raise UserError(f"{path}: another process is writing to it: wait for it, or give another OUT") from error
    if unlocked:
        tqdm.write(f"warning: {path} cannot be locked ({unlocked}): start this command only once")
    return file


def _read_partial(file: BinaryIO, path: Path, models: Models) -> tuple[dict[str, str], int]:
    """Reads the translations by caption, and the size in bytes of all complete lines."""
    file.seek(0)
    content = file.read()
    size = content.rfind(b"\n") + 1
    first, *batches = content[:size].split(b"\n")[:-1] or [b""]
    found = _parse_line(first) or {}
    ours = set(found) == set(Models._fields) if first else START.startswith(content[: len(START)])
    if not ours:
        raise UserError(f"{path} is damaged or was not written by this command: move it away, or give another OUT")
    if batches and Models(**found) != models:
        raise UserError(
            f"{path} contains translations of --to-french {found['to_french']} --to-english {found['to_english']}: "
            "continue with these models, or remove it to start again"
        )
    translations: dict[str, str] = {}
    for number, line in enumerate(batches, start=2):
        batch = _parse_line(line)
        if batch is None:
            raise UserError(f"{path} line {number} is damaged: remove this line to translate its captions again")
        translations |= batch
    return translations, size


def _parse_line(line: bytes) -> dict[str, str] | None:
    """Returns an object of texts by name, or None for any other line."""
    try:
        content = json.loads(line)
    except (ValueError, RecursionError):
        return None
    valid = isinstance(content, dict) and all(isinstance(value, str) for value in content.values())
    return content if valid else None


def _append(file: BinaryIO, content: dict[str, str]) -> None:
    file.write(_line(content))
    file.flush()
    os.fsync(file.fileno())


def _line(content: object) -> bytes:
    return json.dumps(content).encode() + b"\n"  # in ASCII: UTF-8 cannot encode lone surrogates in captions


# ---- Marian ---------------------------------------------------------------------------------------------------------


def load_translator(models: Models, device: torch.device) -> Translator:
    """Loads a translator from English to French and back.

    Raises UserError if a model cannot be loaded or a package is missing.
    """
    missing = [package for package in PACKAGES if importlib.util.find_spec(package) is None]
    if missing:
        raise UserError(f"{' and '.join(missing)} must be installed: pip install {' '.join(PACKAGES)}")
    to_french = _load_model("--to-french", models.to_french, device)
    to_english = _load_model("--to-english", models.to_english, device)
    return lambda captions: to_english(to_french(captions))


def _load_model(option: str, name: str, device: torch.device) -> Translator:
    from transformers import AutoModelForSeq2SeqLM, AutoTokenizer  # only needed here, and takes seconds to import

    try:
        # The model first: without a network, the tokenizer would retry for twice as long.
        model = AutoModelForSeq2SeqLM.from_pretrained(name, dtype=torch.float32)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Recommended: pip install sacremoses")  # not needed for this use
            tokenizer = AutoTokenizer.from_pretrained(name)
    except Exception as error:  # a damaged folder can raise any exception
        reason = str(error).partition("\n")[0] or type(error).__name__
        if is_folder(name):
            remedy = "the folder must contain a Marian model and its tokenizer, get it again"
        else:
            remedy = (
                f"on a machine with a network, run `hf download {name} --local-dir FOLDER`, "
                f"then give {option} FOLDER here"
            )
        raise UserError(f"{option} {name} cannot be loaded ({reason}): {remedy}") from error
    model.to(device).eval()

    def translate(texts: list[str]) -> list[str]:
        encodable = [text.encode(errors="replace").decode() for text in texts]  # JSON may contain lone surrogates
        tokens = tokenizer(encodable, return_tensors="pt", padding=True, truncation=True, max_length=MAX_TOKENS)
        with torch.no_grad():
            ids = model.generate(**tokens.to(device), max_length=MAX_TOKENS)
        return [text.strip() for text in tokenizer.batch_decode(ids, skip_special_tokens=True)]

    return translate


if __name__ == "__main__":
    sys.exit(main())
