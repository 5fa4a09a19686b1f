import gzip
import html
import importlib.util
import itertools
import json
import multiprocessing
import pickle
import subprocess
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from random import Random

import ftfy
import pytest

from misc.errors import UserError
from text_utils.tokenizer import _SYMBOL_OF_BYTE, END, MASK, START, VOCABULARY_SIZE, Tokenizer, _repair

ROWS = json.loads((Path(__file__).parents[1] / "golden" / "captions.json").read_text(encoding="utf-8"))
LITERAL_SPECIALS = [row["text"] for row in ROWS if "<|" in row["text"]]
"""Captions that contain special tokens. The published code interprets them; ours must read them as text."""


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer()


@pytest.mark.parametrize("row", [row for row in ROWS if row["text"] not in LITERAL_SPECIALS])
def test_golden_captions(tokenizer, row):
    assert tokenizer.encode(row["text"]) == row["ids_77"]
    assert tokenizer.encode(row["text"], 24) == row["ids_24"]
    assert tokenizer.decode(row["ids_77"]) == row["decoded"]


def test_golden_file_is_complete():
    assert len(ROWS) == 140
    assert len(LITERAL_SPECIALS) == 2


@pytest.mark.parametrize("text", LITERAL_SPECIALS)
def test_literal_special_tokens_are_text(tokenizer, text):
    start, *inside, end = tokenizer.encode(text)
    assert (start, end) == (START, END)
    assert max(inside) < MASK
    assert tokenizer.decode(inside).replace(" ", "") == text.replace(" ", "")


def test_special_ids_are_spelled_out(tokenizer):
    assert (MASK, START, END, VOCABULARY_SIZE) == (49405, 49406, 49407, 49408)
    assert tokenizer.decode([START, MASK, END]) == "<|startoftext|><|mask|><|endoftext|>"


def test_the_word_whose_token_the_mask_token_replaces(tokenizer):
    assert tokenizer.encode("Dr Jekyll")[-3:] == [43893, 865, END]
    assert tokenizer.decode([43893, 865]) == "jekyll "


@pytest.mark.parametrize("length", [2, 3, 5, 77])
def test_a_long_caption_is_cut_and_keeps_its_end(tokenizer, length):
    whole = tokenizer.encode("red shirt " * 100, 1000)
    assert len(whole) == 202
    assert tokenizer.encode("red shirt " * 100, length) == whole[: length - 1] + [END]


def test_a_caption_that_just_fits_is_not_cut(tokenizer):
    assert tokenizer.encode("red shirt", 4) == tokenizer.encode("red shirt")


def test_the_ids_of_a_whole_caption_are_counted(tokenizer):
    random = Random(0)
    odd = ["a\x1cb\x1d \x1e", "a\u3000b\x85c\u2028d", "İ ﬁ'S 12", "a &amp;nbsp; b &lt; c", "", " "]
    odd += ["".join(chr(random.randint(1, 0x2FFF)) for _ in range(30)) for _ in range(100)]
    for text in (*(row["text"] for row in ROWS), *odd, "red shirt " * 100):
        assert tokenizer.count(text) == len(tokenizer.encode(text, sys.maxsize)), repr(text)


def test_characters_that_cannot_be_shown_are_dropped(tokenizer):
    assert tokenizer.encode("\x00red\x07 \x1b[31mshirt\x7f") == tokenizer.encode("red shirt")


def test_html_entities_are_decoded_twice(tokenizer):
    """ftfy does not decode entities in a text that contains a `<`."""
    assert tokenizer.encode("a < b &amp;amp; c") == tokenizer.encode("a < b & c")


def test_what_is_not_repaired_needs_no_repair():
    """Plain captions skip the search for broken encodings and HTML entities, with the same result."""
    random = Random(0)
    characters = [*map(chr, range(32, 127)), "&", "&amp;", "&quot;", "é", "Ã©", "\u2019", "\x07", "\t", " "]
    texts = ["".join(random.choices(characters, k=random.randint(0, 40))) for _ in range(3000)]
    texts += ["".join(random.choices(characters[:95], k=40)).replace("&", "") for _ in range(3000)]
    assert sum(text.isascii() and text.isprintable() and "&" not in text for text in texts) > 3000
    assert [_repair(text) for text in texts] == [html.unescape(html.unescape(ftfy.fix_text(text))) for text in texts]


def test_contractions_are_found_in_any_case(tokenizer):
    """The long s matches s in any case, though `lower` does not change it: there are two words, not three."""
    assert tokenizer.decode(tokenizer.encode("it'\u017f")[1:-1]) == "it '\u017f "


def test_any_text_is_accepted(tokenizer):
    random = Random(0)
    for _ in range(300):
        # Every code point, also lone surrogates, which JSON can contain.
        text = "".join(chr(random.randrange(random.choice([0x80, 0x3000, 0x110000]))) for _ in range(30))
        start, *inside, end = tokenizer.encode(text, 1000)
        assert (start, end) == (START, END)
        assert all(0 <= token < MASK for token in inside)


def merged_step_by_step(ranks: dict[tuple[str, ...], int], word: str) -> list[str]:
    """Byte-pair encoding as it is defined: merges every occurrence of the best pair, and begins again."""
    symbols = [_SYMBOL_OF_BYTE[byte] for byte in word.encode()]
    symbols[-1] += "</w>"
    while pairs := [pair for pair in itertools.pairwise(symbols) if pair in ranks]:
        best, merged = min(pairs, key=ranks.__getitem__), []
        for symbol in symbols:
            if merged and (merged[-1], symbol) == best:
                merged[-1] += symbol
            else:
                merged.append(symbol)
        symbols = merged
    return symbols


def test_words_are_merged_as_byte_pair_encoding_is_defined(tokenizer):
    random, names, ranks = Random(0), list(tokenizer.vocabulary), {pair: n for n, pair in enumerate(tokenizer.merges)}
    words = ["a" * 60, "hah" * 30, "ing" * 20, "éa山" * 7]
    for alphabet in ("ab", "aab", "theing", "etaoinshrdlu", "abcdefghijklmnopqrstuvwxyz", "éa山ß"):
        words += ["".join(random.choices(alphabet, k=random.randint(1, 30))) for _ in range(150)]
    for word in words:
        assert [names[i] for i in tokenizer._encode_word(word)] == merged_step_by_step(ranks, word), word


def test_the_work_grows_with_the_length_of_a_word_and_not_with_its_square(monkeypatch):
    """A file may contain a word of 20,000 letters."""

    class CountedRanks(dict):
        found = 0

        def get(self, *arguments):
            CountedRanks.found += 1
            return super().get(*arguments)

    tokenizer, work = Tokenizer(), []
    tokenizer._merge_ranks = CountedRanks(tokenizer._merge_ranks)
    for length in (2_000, 20_000):
        CountedRanks.found = 0
        tokenizer.encode("".join(Random(0).choices("abcdefghijklmnopqrstuvwxyz", k=length)))
        work.append(CountedRanks.found)
    assert work[0] > 2_000 and work[1] < 12 * work[0]


def test_pickles_small_and_works_in_a_spawned_process(tokenizer):
    assert len(pickle.dumps(tokenizer)) < 200
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(tokenizer.encode, ("red shirt",)) == tokenizer.encode("red shirt")


def test_open_clip_is_not_imported():
    code = "import sys, text_utils.tokenizer as t; t.Tokenizer(); sys.exit('open_clip' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])


def test_open_clip_not_installed(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install open_clip_torch"):
        Tokenizer()


def test_open_clip_without_its_vocabulary(monkeypatch, tmp_path):
    package = ModuleSpec("open_clip", None, is_package=True)
    package.submodule_search_locations = [str(tmp_path)]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: package)
    with pytest.raises(UserError, match="pip install open_clip_torch"):
        Tokenizer()


def test_merges_are_applied_best_first(monkeypatch, tmp_path):
    """Worked out by hand: in `a b c`, the merge `b c` has priority, so `a b` is not possible any more."""
    with gzip.open(tmp_path / "bpe_simple_vocab_16e6.txt.gz", "wt", encoding="utf-8") as file:
        file.write("version\nb c</w>\na b\n")
    package = ModuleSpec("open_clip", None, is_package=True)
    package.submodule_search_locations = [str(tmp_path)]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: package)
    letter_a, merge_bc = ord("a") - ord("!"), 512
    assert Tokenizer().encode("abc") == [START, letter_a, merge_bc, END]
