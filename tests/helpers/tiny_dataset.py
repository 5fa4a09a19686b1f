"""A dataset of a few tiny JPEGs with an annotation in the form of CUHK-PEDES, for tests."""

import colorsys
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

IDENTITIES = {"train": 12, "val": 4, "test": 5}
COLOURS = ("red", "yellow", "green", "cyan", "blue", "magenta")  # evenly around the circle of hues
CLOTHES = ("jacket", "shirt", "coat", "dress", "sweater", "vest", "hoodie")


class TinyDataset(NamedTuple):
    """The paths of the dataset: the folder of `reid_raw.json`, and the folder of the images."""

    anno_dir: Path
    image_dir: Path


def write_tiny_dataset(
    folder: Path,
    *,
    identities: Mapping[str, int] = IDENTITIES,
    images_per_identity: int = 2,
    size: tuple[int, int] = (40, 24),
    extra: Sequence[Mapping[str, Any]] = (),
) -> TinyDataset:
    """Writes JPEGs under `folder/imgs` and their annotation, two captions per image, to `folder/reid_raw.json`.

    An image shows the colour of its identity with a little noise, and its captions name that colour. So a model can
    learn the pairs. The same arguments write the same files.

    Args:
        folder: created if it does not exist.
        identities: number of persons in each split. Ids start at 1 and continue from split to split.
        images_per_identity: number of images of each person.
        size: (height, width) in pixels.
        extra: further entries of the annotation, written unchanged; their images are not created.
    """
    image_dir = folder / "imgs"
    (image_dir / "tiny").mkdir(parents=True)
    noise = np.random.RandomState(0)
    entries: list[Mapping[str, Any]] = []
    identity = 0
    for split, count in identities.items():
        for _ in range(count):
            identity += 1
            for number in range(images_per_identity):
                path = f"tiny/{identity:04}_{number}.jpg"
                _picture(identity, size, noise).save(image_dir / path, quality=95)
                entries.append({"split": split, "id": identity, "file_path": path, "captions": _captions(identity)})
    (folder / "reid_raw.json").write_text(json.dumps([*entries, *extra]), encoding="utf-8")
    return TinyDataset(folder, image_dir)


def spoil(path: Path, how: str) -> None:
    """Replaces an image file.

    Args:
        how: `empty`; `no image`: a web page; `undecodable`: the header of a WebP without its pixels; `cut off`:
            without the last tenth of the file.
    """
    content = path.read_bytes()
    undecodable = b"RIFF\x1c\0\0\0WEBPVP8L\x0f\0\0\0/\x13\xc0\x09\0" + b"\xff" * 11
    kinds = {
        "empty": b"",
        "no image": b"<html>",
        "undecodable": undecodable,
        "cut off": content[: len(content) * 9 // 10],
    }
    path.write_bytes(kinds[how])


def _hue(identity: int) -> float:
    """Returns a hue in [0, 1). The golden ratio spreads consecutive identities over the circle of hues."""
    return identity * 0.618 % 1


def _picture(identity: int, size: tuple[int, int], noise: np.random.RandomState) -> Image.Image:
    colour = np.array(colorsys.hsv_to_rgb(_hue(identity), 0.7, 0.8)) * 255
    pixels = colour + noise.normal(0, 6, (*size, 3))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def _captions(identity: int) -> list[str]:
    colour = COLOURS[round(_hue(identity) * len(COLOURS)) % len(COLOURS)]
    clothes = CLOTHES[identity % len(CLOTHES)]
    return [
        f"A person in a {colour} {clothes}, number {identity}.",
        f"Someone is wearing a {colour} {clothes} and walks to place {identity}.",
    ]
