import json
from pathlib import Path

import pytest

from text_utils.cleaning import clean_caption

ROWS = json.loads((Path(__file__).parents[1] / "golden" / "captions.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("row", ROWS)
def test_golden_captions(row):
    assert clean_caption(row["text"]) == row["clean_77"]
    assert clean_caption(row["text"], 10) == row["clean_10"]


@pytest.mark.parametrize("mark", '.!"()*#:;~')
def test_each_mark_becomes_a_space(mark):
    assert clean_caption(f"A red{mark}shirt{mark}") == "a red shirt"


def test_other_marks_stay():
    assert clean_caption("T-shirt, 3/4 & 'x'?") == "t-shirt, 3/4 & 'x'?"


def test_white_space():
    assert clean_caption("\n a \t red\n\nshirt \n") == "a red shirt"
    assert clean_caption("a\tred") == "a\tred"


@pytest.mark.parametrize("caption", ["", "   ", "...", "\n"])
def test_nothing_left(caption):
    assert clean_caption(caption) == ""


def test_the_first_words_are_kept():
    assert clean_caption("a b c d", 3) == "a b c"
    assert clean_caption("a b c", 3) == "a b c"
    assert clean_caption("word " * 100) == " ".join(["word"] * 77)


def test_control_characters_are_data():
    assert clean_caption("A\x00 \x1b[31mRED") == "a\x00 \x1b[31mred"
