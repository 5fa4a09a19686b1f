"""Synonyms from WordNet 3's own database files; `man 5 wndb` describes their format."""

import functools
import re
from pathlib import Path
from typing import NamedTuple

from misc.errors import UserError

_PARTS = ("noun", "verb", "adj", "adv")
_LICENCE = "  "
# Where an adjective may stand: after a verb (p), before its noun (a), right after its noun (ip).
_ADJECTIVE_MARKER = re.compile(r"\((?:p|a|ip)\)$")


class _Part(NamedTuple):
    """One part of speech: at which bytes of `data` the synsets of a lemma begin."""

    offsets: dict[str, tuple[int, ...]]
    data: bytes


class WordNet:
    """The synonyms that a WordNet 3 database tells, read into memory once (about half a second, 50 MB)."""

    def __init__(self, folder: str | Path):
        """Reads the database in `folder`. Raises UserError where there is none, or it is broken."""
        self._folder = folder
        try:
            self._parts = [_read_part(Path(folder), part) for part in _PARTS]
        except (OSError, ValueError) as error:
            raise UserError(
                f"experiment.wordnet: {folder} is no WordNet 3 database ({error}): run `apt install wordnet-base` and "
                "set it to /usr/share/wordnet, or set it to the `dict` folder of any WordNet 3"
            ) from error
        # Captions use few different words.
        self._synonyms = functools.lru_cache(maxsize=100_000)(self._look_up)

    def __reduce__(self) -> tuple[type["WordNet"], tuple[str | Path]]:
        """Pickles as "read it again": a path goes to a loader worker, not the database."""
        return WordNet, (self._folder,)

    def synonyms(self, word: str) -> list[str]:
        """All other words for each meaning of a word, as any part of speech: lower-case, sorted, each once.

        Upper and lower case do not matter. An unknown word has none. Inflected forms are words of their own: `shoes` is
        not looked up as `shoe`.
        """
        return list(self._synonyms(word.lower()))

    def _look_up(self, word: str) -> tuple[str, ...]:
        lemma = word.replace(" ", "_")
        found = {
            synonym
            for part in self._parts
            for offset in part.offsets.get(lemma, ())
            for synonym in _words(part.data, offset)
        }
        return tuple(sorted(found - {word}))


def _read_part(folder: Path, part: str) -> _Part:
    """Raises OSError or ValueError where the files are missing or do not belong together."""
    index = (folder / f"index.{part}").read_text(encoding="utf-8")
    data = (folder / f"data.{part}").read_bytes()
    offsets = {}
    for line in index.splitlines():
        if line.startswith(_LICENCE):
            continue
        lemma, synsets = _entry(line)
        if not all(_begins(data, synset) for synset in synsets):
            raise ValueError(f"index.{part} says of {lemma!r} what data.{part} does not")
        offsets[lemma] = tuple(int(synset) for synset in synsets)
    if not offsets:
        raise ValueError(f"index.{part} is empty")
    return _Part(offsets, data)


def _entry(line: str) -> tuple[str, list[str]]:
    """A lemma and the offsets of its synsets, which stand at the end of its line."""
    fields = line.split()
    if len(fields) < 3 or not fields[2].isdecimal():
        raise ValueError(f"its index has the line {line!r}")
    return fields[0], fields[-int(fields[2]) :]


def _begins(data: bytes, synset: str) -> bool:
    """Whether the line of a synset begins at its offset, with the offset itself."""
    return synset.isdecimal() and data.startswith(synset.encode() + b" ", int(synset))


def _words(data: bytes, offset: int) -> list[str]:
    """Words of the synset whose line begins at `offset`."""
    fields = data[offset : data.index(b"\n", offset)].decode().split(" ")
    count = int(fields[3], 16)
    lemmas = fields[4 : 4 + 2 * count : 2]
    return [_ADJECTIVE_MARKER.sub("", lemma).replace("_", " ").lower() for lemma in lemmas]
