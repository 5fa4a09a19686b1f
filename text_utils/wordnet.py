"""Synonyms from the database files of WordNet 3; `man 5 wndb` describes their format."""

import functools
import re
from pathlib import Path
from typing import NamedTuple

from misc.errors import UserError

_PARTS = ("noun", "verb", "adj", "adv")
_LICENCE = "  "
# Positions of an adjective: after a verb (p), before its noun (a), directly after its noun (ip).
_ADJECTIVE_MARKER = re.compile(r"\((?:p|a|ip)\)$")


class _Part(NamedTuple):
    """One part of speech.

    Attributes:
        offsets: for each lemma, the positions in `data` at which its synsets begin.
        data: content of the file `data.*`.
    """

    offsets: dict[str, tuple[int, ...]]
    data: bytes


class WordNet:
    """The synonyms of a WordNet 3 database. It is read into memory once (about half a second, 50 MB)."""

    def __init__(self, folder: str | Path):
        """Reads the database in `folder`.

        Raises UserError if there is none, or it is damaged.
        """
        self._folder = folder
        try:
            self._parts = [_read_part(Path(folder), part) for part in _PARTS]
        except (OSError, ValueError) as error:
            raise UserError(
                f"experiment.wordnet: {folder} is not a WordNet 3 database ({error}): run `apt install wordnet-base` "
                "and set it to /usr/share/wordnet, or set it to the `dict` folder of any WordNet 3"
            ) from error
        # Captions use few different words.
        self._synonyms = functools.lru_cache(maxsize=100_000)(self._look_up)

    def __reduce__(self) -> tuple[type["WordNet"], tuple[str | Path]]:
        """Pickles only the path of the database, so that sending it to a loader worker is cheap."""
        return WordNet, (self._folder,)

    def synonyms(self, word: str) -> list[str]:
        """Returns the synonyms of a word, for all meanings and parts of speech: lower-case, sorted, without duplicates.

        Upper and lower case do not matter. An unknown word has no synonyms. Inflected forms are separate words: `shoes`
        is not looked up as `shoe`.
        """
        return list(self._synonyms(word.lower()))

    def _look_up(self, word: str) -> tuple[str, ...]:
        lemma = word.replace(" ", "_")
        found = {
            synonym
            for part in self._parts
            for offset in part.offsets.get(lemma, ())
            for synonym in _synset_words(part.data, offset)
        }
        return tuple(sorted(found - {word}))


def _read_part(folder: Path, part: str) -> _Part:
    """Reads the files of one part of speech.

    Raises OSError or ValueError if they are missing, damaged, or do not belong together.
    """
    index = (folder / f"index.{part}").read_text(encoding="utf-8")
    data = (folder / f"data.{part}").read_bytes()
    offsets = {}
    for line in index.splitlines():
        if line.startswith(_LICENCE):
            continue
        lemma, synsets = _parse_index_line(line)
        if not all(_is_synset_start(data, synset) for synset in synsets):
            raise ValueError(f"index.{part} lists a synset of {lemma!r} that data.{part} does not contain")
        offsets[lemma] = tuple(int(synset) for synset in synsets)
    if not offsets:
        raise ValueError(f"index.{part} is empty")
    return _Part(offsets, data)


def _parse_index_line(line: str) -> tuple[str, list[str]]:
    """Returns a lemma and the offsets of its synsets, which are at the end of its line."""
    fields = line.split()
    if len(fields) < 3 or not fields[2].isdecimal():
        raise ValueError(f"its index has the line {line!r}")
    return fields[0], fields[-int(fields[2]) :]


def _is_synset_start(data: bytes, synset: str) -> bool:
    """Whether the line of a synset begins at its offset. Such a line begins with the offset itself."""
    return synset.isdecimal() and data.startswith(synset.encode() + b" ", int(synset))


def _synset_words(data: bytes, offset: int) -> list[str]:
    """Returns the words of the synset whose line begins at `offset`."""
    fields = data[offset : data.index(b"\n", offset)].decode().split(" ")
    count = int(fields[3], 16)
    lemmas = fields[4 : 4 + 2 * count : 2]
    return [_ADJECTIVE_MARKER.sub("", lemma).replace("_", " ").lower() for lemma in lemmas]
