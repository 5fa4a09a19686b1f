"""Sheets: pictures of queries with the first images that each retrieved."""

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from PIL import Image

from misc.data.annotations import Split
from misc.data.images import read_image
from misc.retrieval.evaluation import Retrieval

RIGHT, WRONG, NEITHER = "#1a9641", "#d7191c", "#333333"


@dataclass(frozen=True)
class Cell:
    """An image of a sheet: what stands under it, and the colour of that and of its frame."""

    image: Image.Image
    label: str
    colour: str = NEITHER


def draw_sheet(to: Path | BinaryIO, rows: Sequence[tuple[str, Sequence[Cell]]], *, columns: int = 10) -> None:
    """Draws rows of a text and its images as a PNG.

    Args:
        columns: images that a row has room for; it may have fewer.
    """
    from matplotlib.figure import Figure  # takes half a second, and rank 0 alone draws

    figure = Figure(figsize=(3.4 + 0.95 * columns, 2.1 * len(rows)), layout="constrained")
    grid = figure.subplots(
        len(rows), columns + 1, squeeze=False, gridspec_kw={"width_ratios": [3.4] + [0.95] * columns}
    )
    for axes in grid.flat:
        axes.set_axis_off()
    for line, (text, cells) in zip(grid, rows, strict=True):
        line[0].text(0, 0.5, text, va="center", fontsize=9, parse_math=False)
        line[0].set_xlim(0, 1)
        for axes, cell in zip(line[1:], cells, strict=False):
            axes.imshow(cell.image, aspect="equal")
            axes.set_axis_on()
            axes.set(xticks=[], yticks=[])
            axes.set_xlabel(cell.label, fontsize=8, color=cell.colour, parse_math=False)
            for spine in axes.spines.values():
                spine.set(color=cell.colour, linewidth=3)
    figure.savefig(to, format="png", dpi=100)


def wrapped(text: str) -> str:
    """A text in lines as long as the place for it on a sheet is wide."""
    return textwrap.fill(text, 38)


def draw_retrieval_sheet(
    path: Path, retrieval: Retrieval, split: Split, image_dir: Path, *, queries: list[int], images: int = 10
) -> None:
    """Draws the captions with these numbers, a row each, with their first `images` results: right ones framed green,
    wrong ones red."""
    rows = []
    for query in queries:
        identity = split.caption_identities[query]
        cells = []
        for score, number in zip(*(values.tolist() for values in retrieval.first_images(query, images)), strict=True):
            found = split.image_identities[number]
            image = read_image(image_dir / split.image_paths[number])
            cells.append(Cell(image, f"{score:.2f}\n{found}", RIGHT if found == identity else WRONG))
        rows.append((f"{wrapped(split.captions[query])}\n(person {identity})", cells))
    draw_sheet(path, rows, columns=images)
