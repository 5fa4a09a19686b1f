"""An image with the results of a query."""

from collections.abc import Sequence
from pathlib import Path

from misc.data.images import read_image
from misc.errors import UserError
from misc.files import atomic_file
from misc.retrieval.sheet import Cell, Row, draw_sheet
from misc.search.searcher import Query, Result

PER_ROW = 10
MAX_DRAWN = 100
"""Number of results that are drawn."""


def draw_result_sheet(path: Path, folder: Path, query: Query, results: Sequence[Result]) -> int:
    """Draws a query and its first hundred results, ten per row, as a PNG.

    Returns: the number of results that cannot be drawn, because their files have been removed or changed.

    Raises UserError if the file cannot be written.
    """
    cells, missing = [], 0
    for rank, (name, score) in enumerate(results[:MAX_DRAWN], start=1):
        try:
            picture = read_image(folder / name, upright=True)
        except UserError:  # one removed file must not prevent drawing the others
            missing += 1
            continue
        cells.append(Cell(picture, f"{rank}. {score:.3f}", Path(name).name))
    first = query.description or f"like {query.file}"
    starts = range(0, max(1, len(cells)), PER_ROW)
    rows = [Row("" if start else first, "", cells[start : start + PER_ROW]) for start in starts]
    try:
        with atomic_file(path) as file:
            draw_sheet(file, rows)
    except OSError as error:
        raise UserError(f"--sheet {path} cannot be written ({error.strerror}): give another file") from error
    return missing
