"""The geometry of the figure, in centimetres: x to the right, y up."""

import math
from collections.abc import Sequence
from functools import cache

Point = tuple[float, float]
Outline = list[Point]
Shape = list[Outline]  # everything inside any of the outlines, so + unites two shapes


def arc(x: float, y: float, radius_x: float, radius_y: float, start: float = 0, end: float = 360) -> Outline:
    """Returns the outline of an ellipse from one angle to another (degrees, counter-clockwise from the right)."""
    return [(x + radius_x * cosine, y + radius_y * sine) for cosine, sine in _directions(start, end)]


@cache
def _directions(start: float, end: float) -> list[Point]:
    """Returns the cosine and sine of 25 angles, evenly spaced from one angle to another (degrees)."""
    angles = [math.radians(start + (end - start) * step / 24) for step in range(25)]
    return [(math.cos(angle), math.sin(angle)) for angle in angles]


def ellipse(x: float, y: float, radius_x: float, radius_y: float) -> Shape:
    """Returns a whole ellipse."""
    return [arc(x, y, radius_x, radius_y)]


def limb(joints: Sequence[Point], radii: Sequence[float]) -> Shape:
    """Returns a chain of joints with flesh around it: a disc at each joint, a quadrilateral between neighbours."""
    shape = [arc(x, y, radius, radius) for (x, y), radius in zip(joints, radii, strict=True)]
    for first in range(len(joints) - 1):
        (x, y), (end_x, end_y) = joints[first : first + 2]
        thick, thin = radii[first : first + 2]
        length = math.dist((x, y), (end_x, end_y)) or 1
        across_x, across_y = (y - end_y) / length, (end_x - x) / length
        shape.append(
            [
                (x + across_x * thick, y + across_y * thick),
                (end_x + across_x * thin, end_y + across_y * thin),
                (end_x - across_x * thin, end_y - across_y * thin),
                (x - across_x * thick, y - across_y * thick),
            ]
        )
    return shape


def line(points: Sequence[Point], width: float) -> Shape:
    """Returns a line through all points, with round ends."""
    return limb(points, [width / 2] * len(points))


def rounded(outline: Outline) -> Shape:
    """Returns the shape inside the outline, its corners cut twice (Chaikin, 1974)."""
    for _ in range(2):
        edges = list(zip(outline, outline[1:] + outline[:1], strict=True))
        outline = [between(start, end, share) for start, end in edges for share in (0.25, 0.75)]
    return [outline]


def box(left: float, right: float, bottom: float, top: float) -> Shape:
    """Returns a rectangle with rounded corners."""
    return rounded([(left, bottom), (right, bottom), (right, top), (left, top)])


def symmetric(half: Outline) -> Outline:
    """Returns a symmetric outline, given its right half from top to bottom."""
    return half + [(-x, y) for x, y in reversed(half)]


def moved(shape: Shape, to: Point = (0, 0), flip: int = 1) -> Shape:
    """Returns the shape with its origin moved to a point, mirrored there if flip is -1."""
    return [[(flip * x + to[0], y + to[1]) for x, y in outline] for outline in shape]


def between(start: Point, end: Point, share: float) -> Point:
    """Returns the point at a share of the way from start to end; the share may be below 0 or above 1."""
    return start[0] + (end[0] - start[0]) * share, start[1] + (end[1] - start[1]) * share


def turned(start: Point, angle: float, length: float) -> Point:
    """Returns the point at a distance from start, `angle` radians from straight down, positive to the right."""
    return start[0] + length * math.sin(angle), start[1] - length * math.cos(angle)
