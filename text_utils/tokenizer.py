"""From captions to token ids and back: CLIP's byte-pair encoding (Radford et al., 2021), with a mask token."""

import functools
import gzip
import heapq
import html
import importlib.util
import itertools
from collections.abc import Iterable
from pathlib import Path

import ftfy
import regex

from misc.errors import UserError
from misc.files import is_file

MASK = 49405
START = 49406
END = 49407
VOCABULARY_SIZE = 49408
SPELLED = {MASK: "<|mask|>", START: "<|startoftext|>", END: "<|endoftext|>"}

_MERGES_FILE = "bpe_simple_vocab_16e6.txt.gz"
_WORD_END = "</w>"

# CLIP's words: English contractions, runs of letters, single digits, runs of other characters. CLIP also matches
# special tokens here. We do not, so `<|endoftext|>` in a caption is ordinary text.
_WORD = regex.compile(r"'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+", regex.IGNORECASE)


def _byte_symbols() -> dict[int, str]:
    """Returns a visible character per byte, in the order of CLIP's vocabulary: printable bytes first, unchanged."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}


_SYMBOL_OF_BYTE = _byte_symbols()
_BYTE_OF_SYMBOL = {symbol: byte for byte, symbol in _SYMBOL_OF_BYTE.items()}


def _read_merges(count: int) -> list[tuple[str, ...]]:
    """Reads the first `count` merges, in order of priority, from the file in open_clip_torch.

    Finds the package without importing it, because the import takes seconds.
    """
    package = importlib.util.find_spec("open_clip")
    folders = (package.submodule_search_locations if package else None) or []
    path = next((path for folder in folders if is_file(path := Path(folder) / _MERGES_FILE)), None)
    if path is None:
        raise UserError(
            f"CLIP's vocabulary {_MERGES_FILE} was not found in the package open_clip_torch: "
            "run `pip install open_clip_torch`"
        )
    with gzip.open(path, "rt", encoding="utf-8") as file:
        next(file)  # the version
        return [tuple(line.split()) for line in itertools.islice(file, count)]


class Tokenizer:
    """CLIP's tokenizer. Ids: 0 to 49404 are ordinary tokens, then come `MASK`, `START`, `END`.

    As in the published code, the mask token replaces the token of CLIP's last merge, so the vocabulary keeps its size.
    That merge is not used: no caption contains `MASK`, and the word of that token is encoded as two tokens.
    """

    def __init__(self) -> None:
        """Reads the vocabulary.

        Raises UserError if open_clip_torch, which contains it, is not installed.
        """
        byte_symbols = list(_SYMBOL_OF_BYTE.values())
        symbols = byte_symbols + [symbol + _WORD_END for symbol in byte_symbols]
        merges = _read_merges(MASK - len(symbols))
        symbols += ["".join(merge) for merge in merges]
        self._merge_ranks = {merge: rank for rank, merge in enumerate(merges)}
        self._id_of_symbol = {symbol: i for i, symbol in enumerate(symbols)}
        self._symbols = symbols + [SPELLED[i] for i in (MASK, START, END)]
        # Captions use few different words; the limit matters for a server that runs for months.
        self._word_ids = functools.lru_cache(maxsize=100_000)(self._encode_word)
        self._lengths = functools.lru_cache(maxsize=100_000)(lambda text: len(self._encode_repaired(text)))

    def __reduce__(self) -> tuple[type["Tokenizer"], tuple[()]]:
        """Pickles only the class, so that sending the tokenizer to a loader worker is cheap."""
        return Tokenizer, ()

    @property
    def vocabulary(self) -> dict[str, int]:
        """The id of each symbol, including special tokens. A symbol has one visible character per byte."""
        return {symbol: i for i, symbol in enumerate(self._symbols)}

    @property
    def merges(self) -> list[tuple[str, ...]]:
        """The pairs of symbols that are merged, in order of priority."""
        return list(self._merge_ranks)

    def encode(self, caption: str, length: int = 77) -> list[int]:
        """Encodes a caption as `START`, its tokens, `END`, without padding.

        A caption with more than `length` (>= 2) ids is truncated and keeps `END`. Every text is accepted: control
        characters are dropped, broken encodings and HTML entities are fixed. An empty caption has two ids.
        """
        return [START, *self._encode_repaired(_repair(caption))][: length - 1] + [END]

    def count(self, caption: str) -> int:
        """Returns the number of ids of a whole caption, faster than `encode`: captions share most of their words."""
        return 2 + sum(map(self._lengths, _repair(caption).split()))  # no word of CLIP contains white space

    def _encode_repaired(self, text: str) -> list[int]:
        return [i for word in _WORD.findall(text.lower()) for i in self._word_ids(word)]

    def decode(self, ids: Iterable[int]) -> str:
        """Decodes ids to text, with a space after each word. Special tokens are written out (`<|startoftext|>`)."""
        symbols = "".join(self._symbols[i] for i in ids)
        return bytes(_BYTE_OF_SYMBOL[symbol] for symbol in symbols).decode(errors="replace").replace(_WORD_END, " ")

    def _encode_word(self, word: str) -> list[int]:
        """Encodes one word: starts from its UTF-8 bytes and merges the pair of highest priority until none is left.

        All pairs of a priority are merged together, from left to right. A heap finds the next priority, so the time is
        nearly proportional to the length of the word.
        """
        symbols = [_SYMBOL_OF_BYTE[byte] for byte in word.encode()]
        symbols[-1] += _WORD_END
        last = len(symbols) - 1
        following, preceding = list(range(1, last + 2)), list(range(-1, last))
        heap: list[tuple[int, int]] = []

        def add_pair(place: int) -> None:
            """Adds the symbol at a place and the next one, if they can be merged."""
            if place >= 0 and following[place] <= last:
                rank = self._merge_ranks.get((symbols[place], symbols[following[place]]))
                if rank is not None:
                    heapq.heappush(heap, (rank, place))

        for place in range(last):
            add_pair(place)
        while heap:
            best, merged = heap[0][0], []
            while heap and heap[0][0] == best:
                _, place = heapq.heappop(heap)
                after = following[place]
                if after > last or self._merge_ranks.get((symbols[place], symbols[after])) != best:
                    continue  # one of the two has been merged meanwhile
                symbols[place] += symbols[after]
                symbols[after] = ""
                following[place] = following[after]
                if following[after] <= last:
                    preceding[following[after]] = place
                merged.append(place)
            for place in merged:
                add_pair(preceding[place])
                add_pair(place)
        return [self._id_of_symbol[symbol] for symbol in symbols if symbol]


def _repair(text: str) -> str:
    """Fixes broken encodings and HTML entities, as CLIP does. Plain English has none; to look for them takes longer."""
    if text.isascii() and text.isprintable() and "&" not in text:
        return text
    return html.unescape(html.unescape(ftfy.fix_text(text)))
