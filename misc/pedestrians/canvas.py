"""Paints shapes, given in centimetres, onto an image in pixels."""

import math

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter

from misc.pedestrians.colours import Colour
from misc.pedestrians.shapes import Point, Shape

CHEST = (0, 115)  # patterns start here, so that they move with the figure

# Opacity of the black over a pixel, by how much of its neighbourhood towards the light is in the same shape (0 to 255).
DARKNESS = np.array([round(0.36 * max(0, 255 - level * 1.3)) for level in range(256)], dtype=np.uint8)


class Canvas:
    """An image on which a figure is painted in centimetres.

    Args:
        image: RGB, painted in place.
        scale: pixels per centimetre.
        origin: the pixel of (0, 0), the point between the feet.
        tilt: of the figure, in radians.
        mirrored: whether x points to the left.
    """

    def __init__(self, image: Image.Image, scale: float, origin: Point, tilt: float, mirrored: bool) -> None:
        self.image, self.scale, self.origin = image, scale, np.array(origin)
        right = -scale if mirrored else scale
        cosine, sine = math.cos(tilt), math.sin(tilt)
        self.matrix = np.array([[right * cosine, right * sine], [scale * sine, -scale * cosine]])

    def paint(self, shape: Shape, colour: Colour, pattern: str = "plain", second: Colour = (0, 0, 0)) -> None:
        """Fills a shape, darker towards its edges and away from the light."""
        points = np.array([point for outline in shape for point in outline]) @ self.matrix + self.origin
        x, y = points.T.tolist()
        margin = round(3 * self.scale) + 2
        left, top = math.floor(min(x)) - margin, math.floor(min(y)) - margin
        size = (math.ceil(max(x)) + margin - left, math.ceil(max(y)) + margin - top)
        corners = (points - (left, top)).ravel().tolist()
        mask = Image.new("L", size)
        draw = ImageDraw.Draw(mask)
        start = 0
        for outline in shape:
            end = start + 2 * len(outline)
            draw.polygon(corners[start:end], fill=255)
            start = end
        surface = Image.new("RGB", size, colour)
        if pattern != "plain":
            chest = np.array(CHEST) @ self.matrix + self.origin - (left, top)
            _print_pattern(surface, pattern, second, self.scale, chest)
        towards_light = -max(1, round(self.scale))
        lit = ImageChops.offset(mask.filter(ImageFilter.BoxBlur(2.6 * self.scale)), towards_light, towards_light)
        surface.paste((0, 0, 0), (0, 0), Image.fromarray(DARKNESS[np.asarray(lit)]))
        self.image.paste(surface, (left, top), mask)


def _print_pattern(surface: Image.Image, pattern: str, colour: Colour, scale: float, anchor: np.ndarray) -> None:
    """Prints stripes, checks or dots over a whole surface, aligned with the anchor (pixels)."""
    draw = ImageDraw.Draw(surface)
    width, height = surface.size
    period = (13 if pattern == "dotted" else 15) * scale
    columns, rows = (
        np.arange(start % period - period, end, period) for start, end in zip(anchor, surface.size, strict=True)
    )
    if pattern == "striped":
        for y in rows:
            draw.rectangle((0, y, width, y + period * 0.5), fill=colour)
    elif pattern == "checked":
        for x in columns:
            draw.rectangle((x, 0, x + period * 0.32, height), fill=colour)
        for y in rows:
            draw.rectangle((0, y, width, y + period * 0.32), fill=colour)
    elif pattern == "dotted":
        radius = 3.1 * scale
        for x, y in [(x + shift, y + shift) for x in columns for y in rows for shift in (0, period / 2)]:
            draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour)
