"""Sheets: one picture that shows several queries, each with the first images that it retrieved."""

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
    """An image of a sheet, with the label below it and the colour of its label and frame."""

    image: Image.Image
    label: str
    colour: str = NEITHER


def draw_sheet(to: Path | BinaryIO, rows: Sequence[tuple[str, Sequence[Cell]]], *, columns: int = 10) -> None:
    """Draws rows as a PNG. A row is a text and its images.

    Args:
        columns: maximum number of images in a row.
    """
    from matplotlib.figure import Figure  # takes half a second to import, and only rank 0 draws

    figure = Figure(figsize=(3.4 + 0.95 * columns, 2.1 * len(rows)), layout="constrained")
    grid = figure.subplots(
        len(rows), columns + 1, squeeze=False, gridspec_kw={"width_ratios": [3.4] + [0.95] * columns}
    )
    for axes in grid.flat:
        axes.set_axis_off()
    for row_axes, (text, cells) in zip(grid, rows, strict=True):
        row_axes[0].text(0, 0.5, text, va="center", fontsize=9, parse_math=False)
        row_axes[0].set_xlim(0, 1)
        for axes, cell in zip(row_axes[1:], cells, strict=False):
            axes.imshow(cell.image, aspect="equal")
            axes.set_axis_on()
            axes.set(xticks=[], yticks=[])
            axes.set_xlabel(cell.label, fontsize=8, color=cell.colour, parse_math=False)
            for spine in axes.spines.values():
                spine.set(color=cell.colour, linewidth=3)
    figure.savefig(to, format="png", dpi=100)


def wrapped(text: str) -> str:
    """Breaks a text into lines that fit into the text column of a sheet."""
    return textwrap.fill(text, 38)


def draw_retrieval_sheet(
    path: Path, retrieval: Retrieval, split: Split, image_dir: Path, *, queries: list[int], images: int = 10
) -> None:
    """Draws the given queries, one per row, with their first `images` results.

    Correct results have a green frame, wrong ones a red frame.
    """
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
