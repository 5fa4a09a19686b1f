"""Draws a scene with a figure in it, as one of the cameras renders it."""

from collections.abc import Callable
from random import Random
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from misc.pedestrians.canvas import Canvas
from misc.pedestrians.colours import Colour, shaded
from misc.pedestrians.figure import Figure
from misc.pedestrians.people import Person, Shot
from misc.pedestrians.pose import take_pose
from misc.pedestrians.shapes import Point, arc


class Backdrop:
    """Draws a scene. Coordinates are shares of the frame: x from 0 (left) to 1, y from 0 (top) to 1."""

    def __init__(self, image: Image.Image) -> None:
        self.draw, self.size = ImageDraw.Draw(image), np.array(image.size)

    def fill(self, colour: Colour, *points: Point) -> None:
        self.draw.polygon((np.array(points) * self.size).ravel().tolist(), colour)

    def box(self, colour: Colour, left: float, top: float, right: float, bottom: float) -> None:
        self.fill(colour, (left, top), (right, top), (right, bottom), (left, bottom))

    def disc(self, colour: Colour, x: float, y: float, radius: float) -> None:
        """Draws a disc; its radius is a share of the frame's width."""
        centre = np.array((x, y)) * self.size
        reach = radius * self.size[0]
        self.draw.ellipse([*(centre - reach), *(centre + reach)], colour)


def _street(backdrop: Backdrop, ground: float, rng: Random) -> None:
    """Draws a pavement in front of a house."""
    backdrop.box(rng.choice(((178, 170, 160), (158, 162, 168), (190, 180, 162))), 0, 0, 1, ground)
    start = rng.uniform(-0.55, 0)
    for left, top in [(start + 0.55 * column, row * ground) for column in range(4) for row in (0.08, 0.46)]:
        backdrop.box((208, 206, 200), left - 0.03, top - 0.012, left + 0.33, top + 0.2)
        backdrop.box((116, 132, 146), left, top, left + 0.3, top + 0.18)
        backdrop.box((208, 206, 200), left + 0.14, top, left + 0.16, top + 0.18)
    backdrop.box((150, 148, 146), 0, ground, 1, 1)
    for row in range(4):
        line = ground + (1 - ground) * row / 4
        backdrop.box((134, 132, 130), 0, line, 1, line + 0.006)


def _park(backdrop: Backdrop, ground: float, rng: Random) -> None:
    """Draws a lawn with trees and a path."""
    backdrop.box((200, 214, 224), 0, 0, 1, ground)
    for _ in range(5):
        x, y, radius = rng.random(), ground * rng.uniform(0.2, 0.75), rng.uniform(0.16, 0.3)
        leaves = shaded((124, 150, 116), rng.uniform(0.85, 1.1))
        backdrop.box((124, 106, 90), x - 0.025, y, x + 0.025, ground)
        backdrop.disc(leaves, x, y, radius)
        backdrop.disc(shaded(leaves, 1.08), x - 0.05, y - 0.03, radius * 0.6)
    backdrop.box((150, 170, 128), 0, ground, 1, 1)
    bend = rng.uniform(0.1, 0.7)
    backdrop.fill((200, 190, 170), (bend, ground), (bend + 0.2, ground), (1, 1), (0, 1))


def _corridor(backdrop: Backdrop, ground: float, rng: Random) -> None:
    """Draws a corridor with doors."""
    centre = rng.uniform(0.35, 0.65)
    left, right, top = centre - 0.22, centre + 0.22, ground * 0.25
    backdrop.box((188, 186, 180), 0, 0, 1, 1)
    backdrop.fill((216, 216, 212), (0, 0), (1, 0), (right, top), (left, top))
    backdrop.fill((160, 154, 148), (0, 0.9), (left, ground), (right, ground), (1, 0.9), (1, 1), (0, 1))
    backdrop.box((204, 204, 200), left, top, right, ground)
    backdrop.box((152, 142, 130), centre - 0.1, ground * 0.48, centre + 0.1, ground)
    for edge, inner in ((0.0, left), (1.0, right)):
        near, far = edge + (inner - edge) * 0.2, edge + (inner - edge) * 0.6
        floor = [0.9 + (ground - 0.9) * share for share in (0.2, 0.6)]
        backdrop.fill((148, 138, 126), (near, 0.28), (far, ground * 0.44), (far, floor[1]), (near, floor[0]))


def _brick_wall(backdrop: Backdrop, ground: float, rng: Random) -> None:
    """Draws a brick wall behind paving stones."""
    brick = rng.choice(((170, 134, 120), (162, 142, 130), (178, 154, 134)))
    backdrop.box(shaded(brick, 1.2), 0, 0, 1, ground)
    for row, column in [(row, column) for row in range(14) for column in range(-1, 7)]:
        x, y = (column + row % 2 / 2) * 0.18, ground * row / 14
        backdrop.box(shaded(brick, rng.uniform(0.92, 1)), x, y, x + 0.165, y + ground * 0.058)
    backdrop.box((172, 168, 162), 0, ground, 1, 1)
    for column in range(-4, 11):
        near, far = column / 6, 0.5 + (column / 6 - 0.5) * 0.6
        backdrop.fill((152, 148, 144), (near, 1), (near + 0.012, 1), (far + 0.012, ground), (far, ground))


def _crossing(backdrop: Backdrop, ground: float, rng: Random) -> None:
    """Draws a zebra crossing, with houses far away."""
    backdrop.box((206, 214, 220), 0, 0, 1, ground)
    left = rng.uniform(-0.2, 0)
    while left < 1:
        width, roof = rng.uniform(0.25, 0.4), ground * rng.uniform(0.2, 0.55)
        backdrop.box(
            rng.choice(((174, 166, 158), (160, 162, 168), (188, 178, 164), (152, 148, 146))),
            left,
            roof,
            left + width,
            ground,
        )
        for share, row in [(share, row) for share in (0.18, 0.58) for row in range(5)]:
            window, top = left + width * share, roof + ground * (0.05 + 0.12 * row)
            backdrop.box((126, 136, 148), window, top, window + width * 0.24, min(top + ground * 0.06, ground))
        left += width
    backdrop.box((130, 130, 132), 0, ground, 1, 1)
    shift = rng.uniform(0, 0.3)
    top, bottom = ground + (1 - ground) * 0.25, ground + (1 - ground) * 0.9
    for x in [column * 0.3 + shift for column in range(-2, 5)]:
        backdrop.fill((208, 208, 206), (x + 0.05, top), (x + 0.17, top), (x + 0.15, bottom), (x, bottom))


class Camera(NamedTuple):
    """A place, and how its camera renders it."""

    scene: Callable[[Backdrop, float, Random], None]
    cast: tuple[float, float, float]  # factors of red, green, blue
    blur: float  # in pixels of a frame that is 128 pixels high


# By the names of the image folders of CUHK-PEDES.
CAMERAS = {
    "cam_a": Camera(_street, (1.0, 1.0, 1.0), 0.0),
    "cam_b": Camera(_park, (1.03, 1.01, 0.96), 0.15),
    "CUHK01": Camera(_corridor, (1.04, 1.0, 0.95), 0.2),
    "CUHK03": Camera(_brick_wall, (0.97, 1.0, 1.04), 0.0),
    "Market": Camera(_crossing, (0.98, 1.02, 1.0), 0.3),
}
SUPERSAMPLING = 3
HAT_TOPS = {"beanie": 193, "hat": 191, "hood": 188, "cap": 186}  # height of the upper end, cm


def draw_pedestrian(person: Person, shot: Shot, height: int = 128, width: int = 64) -> Image.Image:
    """Returns the RGB image of one shot, `height` × `width` pixels."""
    rng = Random(shot.seed)
    image = Image.new("RGB", (width * SUPERSAMPLING, height * SUPERSAMPLING))
    backdrop = Backdrop(image)
    CAMERAS[shot.camera].scene(backdrop, rng.uniform(0.68, 0.8), rng)
    x, y = 0.5 + shot.shift[0], 0.965 + shot.shift[1]
    for grey, reach in ((128, 0.28), (116, 0.25), (104, 0.22), (92, 0.19)):  # the shadow on the ground
        backdrop.fill((grey, grey, grey + 3), *arc(x, y, reach, reach / 12))
    image = image.filter(ImageFilter.BoxBlur(image.height / 192))

    scale = image.height * shot.size / _height_to_fit(person) * min(1.0, person.height / 182)
    canvas = Canvas(image, scale, (x * image.width, y * image.height), shot.tilt, mirrored=shot.view == "left")
    Figure(canvas, person, take_pose(person, shot)).paint()
    return _expose(image.resize((width, height), Image.Resampling.BOX), shot)


def _height_to_fit(person: Person) -> float:
    """Returns the height in centimetres that must fit into the frame."""
    if person.umbrella:
        return 222
    if person.bag and person.bag.kind == "suitcase":
        return 205  # a smaller figure, so that the suitcase fits into the width
    hat_top = HAT_TOPS.get(person.hat.kind, 0) if person.hat else 0
    return max(hat_top, 191 if person.hair.kind in ("bun", "curly") else 182)


def _expose(image: Image.Image, shot: Shot) -> Image.Image:
    """Applies the light, contrast, colour cast, blur and noise of the shot and its camera."""
    camera = CAMERAS[shot.camera]
    blurred = image.filter(ImageFilter.GaussianBlur((shot.blur + camera.blur) * image.height / 128))
    pixels = (np.asarray(blurred, dtype=np.float32) * camera.cast * shot.light - 128) * shot.contrast + 128
    pixels += np.random.default_rng(shot.seed).normal(0, shot.noise, pixels.shape)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
