"""Colours by name, and functions that vary and mix them."""

from random import Random

import numpy as np

Colour = tuple[int, int, int]  # red, green, blue, each 0 to 255

COLOURS: dict[str, Colour] = {
    "black": (30, 30, 34),
    "white": (242, 242, 240),
    "grey": (140, 143, 147),
    "red": (208, 28, 40),
    "orange": (248, 132, 24),
    "yellow": (252, 218, 42),
    "green": (32, 146, 64),
    "blue": (30, 72, 190),
    "light blue": (128, 198, 242),
    "purple": (122, 52, 165),
    "pink": (246, 138, 186),
    "brown": (116, 70, 36),
}
HAIR_COLOURS: dict[str, Colour] = {
    "black": (30, 26, 26),
    "brown": (98, 60, 32),
    "blond": (232, 198, 110),
    "ginger": (190, 84, 30),
    "grey": (172, 172, 176),
}
SKIN_COLOURS: tuple[Colour, ...] = ((252, 220, 194), (240, 196, 160), (214, 160, 118), (160, 106, 70), (108, 70, 48))


def contrasting(name: str, rng: Random) -> str:
    """Returns the name of a colour that clearly differs from the given one."""
    given = np.array(COLOURS[name])
    return rng.choice([other for other, colour in COLOURS.items() if np.abs(given - colour).sum() > 200])


def tinted(colour: Colour, rng: Random) -> Colour:
    """Returns a slightly different colour that still has the same name."""
    red, green, blue = (min(255, max(0, round(channel + rng.uniform(-9, 9)))) for channel in colour)
    return red, green, blue


def shaded(colour: Colour, tone: float) -> Colour:
    """Returns a darker colour for a tone below 1, a lighter one above 1. Nearly black colours always get lighter."""
    if tone < 1 and sum(colour) < 150:
        tone = 2 - tone
    return mixed(colour, (0, 0, 0) if tone < 1 else (255, 255, 255), abs(1 - tone))


def mixed(colour: Colour, other: Colour, share: float) -> Colour:
    """Returns a mixture of two colours; `share`, 0 to 1, is the part of the other one."""
    red, green, blue = (round(a + (b - a) * share) for a, b in zip(colour, other, strict=True))
    return red, green, blue
