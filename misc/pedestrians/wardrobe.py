"""Clothes, hats, hair and things to carry, as layers that are painted over the body.

Everything is designed for a body of average breadth that looks to the right in the side view. In the other views,
things on one side of the body are on the right of the image.
"""

import math
from typing import Final, Literal

import numpy as np

from misc.pedestrians.colours import Colour
from misc.pedestrians.shapes import Shape, arc, box, ellipse, limb, line, moved, rounded, symmetric

SKIN: Final = "skin"
METAL, DARK, GOLD = (72, 72, 78), (34, 30, 32), (235, 205, 90)
# A shade of the thing's colour (1.0 is the colour itself), another colour, or SKIN.
Tone = float | Colour | Literal["skin"]
Layer = tuple[Shape, Tone]
Wardrobe = dict[str, dict[str, list[Layer]]]  # kind → view → layers; those of view "any" come first


def _mirrored(*layers: Layer) -> list[Layer]:
    return [(moved(shape, flip=-1), tone) for shape, tone in layers]


def _pair(*layers: Layer) -> list[Layer]:
    """Returns layers for the right half of the figure, and the same for the left half."""
    return [side for layer in layers for side in (layer, *_mirrored(layer))]


def _belt(half: float) -> Layer:
    return line([(-half, 104), (half, 104)], 4), 0.7


# --- details on the cloth of a garment ---

STAR: Shape = [
    [
        (radius * math.cos(angle), 124 + radius * math.sin(angle))
        for radius, angle in [((11, 5.5)[corner % 2], math.radians(90 + 36 * corner)) for corner in range(10)]
    ]
]
NECKLINE: Layer = ([arc(0, 147, 7, 5.5, 180, 360)], SKIN)
DETAILS: Wardrobe = {
    "t-shirt": {"front": [NECKLINE]},
    "sweater": {"front": [(ellipse(0, 147.5, 8, 5), 0.8), (ellipse(0, 149, 6.5, 4), SKIN)]},
    "dress": {"front": [NECKLINE, _belt(12)], "back": [_belt(12)], "side": [_belt(8)]},
    "logo": {"front": [(STAR, 1.0)]},
    "shirt": {
        "front": [
            (line([(0, 144), (0, 86)], 1), 0.7),
            *[(ellipse(0, y, 1.5, 1.5), 0.6) for y in (132, 120, 108, 96)],
            *_pair(([[(0, 143), (7, 150), (10, 144), (5, 137)]], 1.3)),
        ],
        "back": [(ellipse(0, 148, 7.5, 3), 1.25)],
        "side": [(ellipse(0, 148, 7, 3), 1.25)],
    },
    "inner shirt": {
        "front": [([[(-7, 147), (7, 147), (8.5, 83), (-8.5, 83)]], 1.0), ([arc(0, 147, 6, 4, 180, 360)], SKIN)],
        "side": [([[(5, 147), (12, 130), (12.5, 84), (6.5, 84), (6, 125)]], 1.0)],
    },
    "jacket": {
        "front": _pair(([[(4, 150), (13, 143), (12, 128), (7.5, 119)]], 0.82)),
        "back": [(line([(-12, 134), (12, 134)], 1), 0.8)],
    },
    "coat": {
        "front": [
            (line([(0, 140), (0, 54)], 1.2), 0.7),
            *_pair(*[(ellipse(5, y, 1.9, 1.9), 0.62) for y in (128, 116, 92, 80)]),
            *_pair(([[(2, 150), (12, 146), (11, 132), (0, 138)]], 0.86)),
            _belt(14),
        ],
        "back": [_belt(14)],
        "side": [_belt(9.5), (ellipse(0, 147, 8, 4), 0.86)],
    },
    "hoodie": {
        "front": [
            (rounded([(-10, 106), (10, 106), (15, 90), (-15, 90)]), 0.85),
            *_pair((line([(4, 142), (4, 126)], 1.6), (236, 236, 234))),
        ],
    },
    "hood down": {
        "front": [(ellipse(0, 147, 13, 6), 0.85), (ellipse(0, 149, 7, 4.5), SKIN)],
        "back": [(rounded([(-14, 150), (14, 150), (13, 136), (0, 124), (-13, 136)]), 0.85)],
        "side": [(ellipse(-8, 144, 9, 7), 0.85)],
    },
}

# --- hats, scarves, and things to carry ---

HATS: Wardrobe = {
    "cap": {
        "any": [([arc(1, 170, 14.5, 14.5, 0, 180)], 1.0), (ellipse(1, 184.5, 1.6, 1.2), 0.75)],
        "front": [(ellipse(0, 171, 14.5, 3.8), 0.75)],
        "side": [(rounded([(5, 174), (16, 173), (27, 168.5), (5, 169)]), 0.75)],
    },
    "beanie": {
        "any": [
            ([arc(1, 170, 14.5, 17, 0, 180)], 1.0),
            (ellipse(1, 188, 4.8, 4.8), 1.3),
            (box(-16, 18, 168, 176), 0.8),
        ]
    },
    "hat": {
        "any": [
            (rounded([(-12, 172), (-11, 190), (13, 190), (14, 172)]), 1.0),
            (box(-12, 14, 174, 179), 0.65),
            (ellipse(1, 172.5, 23, 4.2), 1.0),
        ]
    },
    "hood": {
        "any": [(rounded(symmetric([(7, 187), (17, 178), (18.5, 162), (14, 146), (4, 141)])), 1.0)],
        "front": [(ellipse(0, 163, 12.8, 16), 0.55), (ellipse(0, 162.5, 11, 14), SKIN)],
        "side": [(ellipse(8, 163, 9.5, 15.5), 0.55), (ellipse(8, 162.5, 8.3, 13.5), SKIN)],
    },
}
SCARF: Wardrobe = {
    "scarf": {
        "any": [(ellipse(0, 146.5, 13, 6.5), 1.0), (line([(-10, 146), (0, 143), (10, 146)], 1.2), 0.7)],
        "front": [
            (rounded([(-11, 145), (-1, 145), (0, 114), (-10, 114)]), 0.92),
            (line([(-10, 119), (-1, 119)], 2), 0.7),
        ],
        "side": [(rounded([(2, 145), (11, 145), (13, 116), (4, 116)]), 0.92), (line([(4, 120), (12, 120)], 2), 0.7)],
    }
}
STRAP: Layer = (limb([(-12, 145), (17, 94)], (2.3, 2.3)), 0.85)
SUITCASE: list[Layer] = [
    (line([(31, 46), (27, 87)], 1.8), METAL),
    (line([(41, 46), (29, 87)], 1.8), METAL),
    *[(ellipse(x, 2.5, 3.2, 3.2), DARK) for x in (28, 44)],
    (box(22, 50, 3, 52), 1.0),
    *[(line([(x, 45), (x, 10)], 1.6), 0.7) for x in (31, 36, 41)],
]
CANOPY_EDGE = [(9 + x, 190 + 4 * abs(math.sin(x * math.pi / 20))) for x in range(40, -42, -2)]
CARRIED: Wardrobe = {
    "backpack": {
        "front": _pair((limb([(11, 145), (12, 126), (15, 108)], (3.4, 3.4, 2.8)), 1.0)),
        "back": [
            (rounded(symmetric([(13, 147), (17, 138), (17.5, 98), (13, 94)])), 1.0),
            (box(-12, 12, 98, 117), 0.84),
            (line([(-12, 130), (12, 130)], 1.4), 0.6),
        ],
        "side": [
            (rounded([(-8, 145), (-20, 145), (-28, 132), (-28, 100), (-20, 94), (-8, 96)]), 1.0),
            (line([(-26, 118), (-13, 118)], 1.4), 0.6),
            (limb([(-7, 143), (4, 138), (5, 125), (-6, 108)], (2.4, 2.6, 2.6, 2.4)), 0.85),
        ],
    },
    "shoulder bag": {  # only its strap; the bag itself is the satchel
        "front": [STRAP],
        "back": [STRAP],
        "side": [(limb([(-2, 146), (-3, 96)], (2.3, 2.3)), 0.85)],
    },
    "satchel": {  # around (0, 0)
        "any": [(box(-14, 14, -14, 14), 1.0), (box(-14, 14, 0, 14), 0.82), (ellipse(0, 1, 1.9, 1.9), GOLD)]
    },
    "handbag": {  # the hand is at (0, 0)
        "any": [
            (line(arc(0, -9, 7, 9, 0, 180), 2), 0.6),
            (rounded([(-12, -9), (12, -9), (16, -31), (-16, -31)]), 1.0),
            (ellipse(0, -16, 2.3, 2.3), GOLD),
        ]
    },
    "shopping bag": {  # the hand is at (0, 0)
        "any": [
            (line([(-6, -12), (0, 0), (6, -12)], 1.7), 0.6),
            ([[(-12, -11), (12, -11), (12, -43), (-12, -43)]], 1.0),
            (line([(-8, -22), (8, -22)], 2), 0.7),
        ]
    },
    "suitcase": {"front": SUITCASE, "back": SUITCASE, "side": _mirrored(*SUITCASE)},
    "umbrella": {
        "any": [
            (line([(23, 128), (9, 192)], 1.8), METAL),
            (line([(9, 212), (9, 220)], 1.8), METAL),
            ([CANOPY_EDGE + arc(9, 190, 40, 25, 180, 0)], 1.0),
            *[(line([(9, 214), (9 + x, 194)], 1), 0.72) for x in (-19, 0, 19)],
        ]
    },
}
WARDROBE: Wardrobe = DETAILS | HATS | SCARF | CARRIED

# --- hair, in front of the body (HAIR) and behind it (HAIR_BEHIND) ---

FRINGE: Layer = ([[*arc(0, 165.5, 13.7, 15.8, 8, 172), (-11, 170), (-5, 174.5), (3, 175), (11, 171)]], 1.0)
BACK_OF_HEAD: Layer = (ellipse(0, 165.5, 13.5, 15.5), 1.0)
CROWN: Layer = ([[*arc(1.5, 165.5, 13.5, 16, 40, 235), (-1, 156), (-1, 166), (7, 173)]], 1.0)
CURLS: Layer = (
    [arc(1, 170, 15, 13)]
    + [arc(1 + 14 * math.cos(turn), 169 + 13 * math.sin(turn), 6.5, 6.5) for turn in np.linspace(-0.4, 3.54, 9)],
    1.0,
)
HAIR: Wardrobe = {
    "bald": {},
    "short": {"front": [FRINGE], "back": [BACK_OF_HEAD], "side": [CROWN]},
    "curly": {"front": [FRINGE], "back": [CURLS, BACK_OF_HEAD], "side": [CROWN]},
    "bob": {
        "front": [([[*arc(0, 165.5, 13.7, 15.8, 8, 172), (-12, 171), (12, 171)]], 1.0)],
        "back": [BACK_OF_HEAD, (rounded(symmetric([(9, 182), (15.5, 172), (17, 150), (16, 145), (5, 144)])), 1.0)],
        "side": [CROWN, (rounded([(0, 178), (-11, 172), (-15, 158), (-14, 147), (0, 147), (2, 158)]), 1.0)],
    },
    "long": {
        "front": [FRINGE, *_pair((limb([(13, 168), (15, 148), (13, 131)], (3, 4.5, 3)), 1.0))],
        "back": [BACK_OF_HEAD, (rounded(symmetric([(9, 182), (15.5, 172), (16.5, 150), (15, 122), (5, 119)])), 1.0)],
        "side": [CROWN, (rounded([(0, 178), (-11, 172), (-15, 158), (-14, 124), (-2, 124), (2, 158)]), 1.0)],
    },
    "ponytail": {
        "front": [FRINGE],
        "back": [
            BACK_OF_HEAD,
            (limb([(0, 172), (0, 158), (0, 132)], (5.5, 7, 3)), 0.85),
            (line([(-4, 171), (4, 171)], 3), 0.5),
        ],
        "side": [CROWN, (limb([(-10, 173), (-17, 164), (-18, 142)], (4, 6, 3)), 0.95)],
    },
    "bun": {
        "front": [(ellipse(0, 184, 7.5, 6.5), 1.0), FRINGE],
        "back": [BACK_OF_HEAD, (ellipse(0, 183, 7.5, 6.5), 0.95)],
        "side": [CROWN, (ellipse(-8, 181, 7.5, 6.5), 0.95)],
    },
}
HAIR_BEHIND: Wardrobe = {
    "curly": {"front": [CURLS], "side": [CURLS]},
    "long": {"front": [(rounded(symmetric([(8, 182), (16, 172), (17.5, 150), (17, 130), (8, 127)])), 0.85)]},
    "bob": {"front": [(rounded(symmetric([(8, 183), (17, 173), (18, 152), (12, 146)])), 0.85)]},
}
BEARD: Wardrobe = {
    "beard": {
        "front": [(rounded([(-13, 164), (-8, 158.5), (8, 158.5), (13, 164), (10, 150), (0, 145), (-10, 150)]), 1.0)],
        "side": [(rounded([(-3, 164), (4, 158), (15, 156.5), (14, 148), (5, 146), (-3, 152)]), 1.0)],
    }
}
