"""Caption cleaning, the first step of text processing."""

import re

MAX_WORDS = 77
"""Number of words that the paper keeps of a caption."""

_MARKS = re.compile(r'[.!"()*#:;~]')
_WHITE_SPACE_RUN = re.compile(r"\s{2,}")


def clean_caption(caption: str, max_words: int = MAX_WORDS) -> str:
    """Lower-cases a caption, replaces `. ! " ( ) * # : ; ~` by spaces, and keeps the first `max_words` words.

    As in the published code, only runs of two or more white-space characters become one space. A single tab or newline
    between two words stays: the tokenizer reads it as white space, but the two words count as one.
    """
    caption = _MARKS.sub(" ", caption.lower())
    caption = _WHITE_SPACE_RUN.sub(" ", caption).strip()
    return " ".join(caption.split(" ")[:max_words])
