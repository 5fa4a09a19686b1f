"""Caption cleaning, before anything else is done to a caption."""

import re

_MARKS = re.compile(r'[.!"()*#:;~]')
_WHITE_SPACE_RUN = re.compile(r"\s{2,}")


def clean_caption(caption: str, max_words: int = 77) -> str:
    """Lower-cases, turns each of `. ! " ( ) * # : ; ~` into a space, tidies white space, keeps `max_words` words.

    As published, only runs of two or more white-space characters become one space: a single tab or newline between two
    words stays, and does not separate words that are counted. The tokenizer reads it as white space all the same.
    """
    caption = _MARKS.sub(" ", caption.lower())
    caption = _WHITE_SPACE_RUN.sub(" ", caption).strip()
    return " ".join(caption.split(" ")[:max_words])
