"""Sheets: one picture that shows several queries, each with the first images that it retrieved."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from PIL import Image

from misc.data.images import read_dataset_image
from misc.data.split import Split
from misc.files import atomic_file
from misc.retrieval.evaluation import Retrieval

RIGHT, WRONG, NEITHER = "#1a9641", "#d7191c", "#333333"
MARKS = {RIGHT: "✓ ", WRONG: "✗ "}
"""Show what the colours show, for people who cannot distinguish them."""

PIXELS = 100
"""Per inch."""
TEXT_WIDTH, CELL_WIDTH, ROW_HEIGHT, GAP = 340, 95, 216, 20
"""In pixels; a gap separates a cell that is not one of the first images."""
IMAGE_SIZE = (83, 158)
"""Width and height of the box of an image, in pixels."""
TEXT_SIZE, LABEL_SIZE = 9, 8
"""In points."""
TEXT_LINES, NAME_LINES = 11, 2


@dataclass(frozen=True)
class Cell:
    """An image of a sheet.

    Attributes:
        label: a line below the image.
        name: below the label, on up to two lines; only the end of a longer name is shown.
        colour: of the label and of the frame.
        apart: whether a gap separates the image from those before it.
    """

    image: Image.Image
    label: str
    name: str
    colour: str = NEITHER
    apart: bool = False


@dataclass(frozen=True)
class Row:
    """A row of a sheet: the text of a query, a line below it, and images."""

    text: str
    note: str
    cells: Sequence[Cell]


def draw_sheet(file: BinaryIO, rows: Sequence[Row]) -> None:
    """Draws rows as a PNG."""
    from matplotlib.figure import Figure  # takes half a second to import, and only rank 0 draws

    from misc.retrieval.lettering import Lettering  # imports matplotlib

    cells = [cell for row in rows for cell in row.cells]
    columns, gaps = max(len(row.cells) for row in rows), 1 + any(cell.apart for cell in cells)
    width = TEXT_WIDTH + CELL_WIDTH * columns + GAP * gaps
    height = ROW_HEIGHT * len(rows)
    figure = Figure(figsize=(width / PIXELS, height / PIXELS), dpi=PIXELS)
    texts = [text for row in rows for text in (row.text, row.note)]
    lettering = Lettering(figure, [*texts, *(cell.label + cell.name for cell in cells), "…"])
    style: dict[str, Any] = {"fontfamily": lettering.families, "parse_math": False}
    for number, row in enumerate(rows):
        top = height - ROW_HEIGHT * number
        lines = lettering.lines(row.text, size=TEXT_SIZE, width=TEXT_WIDTH - 2 * GAP, most=TEXT_LINES)
        lines += [lettering.drawable(row.note)] if row.note else []
        middle = (top - ROW_HEIGHT / 2) / height
        figure.text(GAP / width, middle, "\n".join(lines), va="center", fontsize=TEXT_SIZE, **style)
        for column, cell in enumerate(row.cells):
            left = TEXT_WIDTH + CELL_WIDTH * column + GAP * cell.apart
            box = (left / width, (top - 6 - IMAGE_SIZE[1]) / height, IMAGE_SIZE[0] / width, IMAGE_SIZE[1] / height)
            axes = figure.add_axes(box, xticks=[], yticks=[], anchor="S")
            axes.imshow(cell.image, aspect="equal")
            name = lettering.lines(cell.name, size=LABEL_SIZE, width=CELL_WIDTH - 5, most=NAME_LINES, keep_end=True)
            label = "\n".join([lettering.drawable(MARKS.get(cell.colour, "") + cell.label), *name])
            axes.set_xlabel(label, fontsize=LABEL_SIZE, color=cell.colour, **style)
            for spine in axes.spines.values():
                spine.set(color=cell.colour, linewidth=3)
    figure.savefig(file, format="png", dpi=PIXELS)


def draw_retrieval_sheet(
    path: Path, retrieval: Retrieval, split: Split, image_dir: Path, *, queries: list[int], images: int = 10
) -> None:
    """Draws the given queries, one per row, with their first `images` results and the rank of the first match.

    Correct results have a green frame and ✓, wrong ones a red frame and ✗. If all are wrong, the first match follows.
    """
    rows = []
    for query in queries:
        identity = split.caption_identities[query]
        first_match = int(retrieval.results.first_match[query])
        scores, numbers = (values.tolist() for values in retrieval.first_images(query, max(images, first_match)))
        cells = []
        for rank in [*range(1, min(images, len(numbers)) + 1), *([first_match] if first_match > images else [])]:
            number, apart = numbers[rank - 1], rank > images
            found = split.image_identities[number]
            cells.append(
                Cell(
                    image=read_dataset_image(image_dir / split.image_paths[number])[0],
                    label=f"rank {rank:,}" if apart else f"{scores[rank - 1]:.2f}",
                    name=str(split.annotated_identity(found)),
                    colour=RIGHT if found == identity else WRONG,
                    apart=apart,
                )
            )
        match = f"first match: rank {first_match:,}" if first_match else "no image in the gallery"
        person = split.annotated_identity(identity)
        rows.append(Row(split.annotated_captions[query], f"(person {person}; {match})", cells))
    with atomic_file(path) as file:
        draw_sheet(file, rows)
