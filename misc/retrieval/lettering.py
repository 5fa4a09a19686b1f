"""Text in pictures: fonts that have its characters, and line breaks by its width in pixels."""

import functools
import unicodedata
from bisect import bisect_left
from collections.abc import Iterable

from matplotlib import font_manager
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.ft2font import FT2Font

FONT = "DejaVu Sans"
"""Comes with matplotlib."""
BOX = "□"
"""Stands for characters that no font has."""


class Lettering:
    """Measures and breaks the text of a figure.

    Attributes:
        families: font families for `fontfamily`: `FONT`, then installed fonts with the characters that it lacks.

    Args:
        texts: all texts of the figure.
    """

    def __init__(self, figure: Figure, texts: Iterable[str]):
        self._renderer = FigureCanvasAgg(figure).get_renderer()
        wanted = set("".join(texts))
        self.families = [FONT]
        self._available = _characters(FONT) & wanted
        for name in _installed() if self._lacks(wanted) else ():
            if more := _characters(name) & self._lacks(wanted):
                self.families.append(name)
                self._available |= more

    def _lacks(self, characters: set[str]) -> set[str]:
        return {each for each in characters - self._available if unicodedata.category(each)[0] not in "CMZ"}

    def drawable(self, text: str) -> str:
        """Returns the text on one line, with similar characters, or one box, in place of those that no font has."""
        letters = ""
        for character in " ".join(text.split()):
            if character not in self._available and character != " ":
                similar = [each for each in unicodedata.normalize("NFKD", character) if not unicodedata.combining(each)]
                kept = similar and _characters(FONT).issuperset(similar)
                marks = unicodedata.category(character) in ("Cf", "Mn", "Me")  # which only change another character
                character = "".join(similar) if kept else "" if marks or letters.endswith(BOX) else BOX
            letters += character
        return letters

    def lines(self, text: str, *, size: float, width: float, most: int, keep_end: bool = False) -> list[str]:
        """Breaks a text into lines, between words if possible. An ellipsis replaces what does not fit.

        Args:
            size: in points; width: of a line, in pixels.
            most: number of lines.
            keep_end: shorten the start of the text instead of its end.
        """

        def broken(text: str) -> list[str]:
            return self._broken(text, FontProperties(family=self.families, size=size), width)

        def without(count: int) -> str:
            return "…" + text[count:] if keep_end else text[: len(text) - count] + "…"

        text = self.drawable(text)
        longest = most * int(width)  # in characters, which are wider than a pixel
        text = text[-longest:] if keep_end else text[:longest]
        if len(lines := broken(text)) <= most:
            return lines
        removed = bisect_left(range(len(text)), True, key=lambda count: len(broken(without(count))) <= most)
        return broken(without(removed))

    def _broken(self, text: str, font: FontProperties, width: float) -> list[str]:
        lines = [""]
        for word in text.split(" "):
            longer = f"{lines[-1]} {word}".lstrip()
            if self._width(longer, font) <= width:
                lines[-1] = longer
                continue
            lines += [word] if lines[-1] else []
            while self._width(word, font) > width:  # a word that is longer than a line
                cut = self._fitting(word, font, width)
                lines[-1], word = word[:cut], word[cut:]
                lines.append(word)
            lines[-1] = word
        return lines

    def _fitting(self, word: str, font: FontProperties, width: float) -> int:
        """Returns the number of characters at the start of a word that fit into the width, at least one."""
        lengths = range(2, len(word) + 1)
        return 1 + bisect_left(lengths, True, key=lambda length: self._width(word[:length], font) > width)

    def _width(self, text: str, font: FontProperties) -> float:
        return self._renderer.get_text_width_height_descent(text, font, ismath=False)[0] if text else 0.0


def _installed() -> list[str]:
    """Returns the families of all upright fonts of normal weight and width."""
    normal = {"style": ("normal",), "weight": (400, "normal", "regular", "book"), "stretch": ("normal",)}
    return sorted(
        {
            entry.name
            for entry in font_manager.fontManager.ttflist
            if all(getattr(entry, name) in values for name, values in normal.items()) and "Resort" not in entry.name
        }
    )


@functools.lru_cache(maxsize=1000)
def _characters(family: str) -> frozenset[str]:
    """Returns all characters of a font; none if matplotlib cannot draw it, such as coloured emoji."""
    try:
        font = FT2Font(font_manager.findfont(FontProperties(family=family)))
        font.set_size(10, 100)
    except (OSError, RuntimeError, ValueError):
        return frozenset()
    return frozenset(map(chr, font.get_charmap()))
