"""A picture of what a query found."""

from collections.abc import Sequence
from pathlib import Path

from misc.data.images import read_image
from misc.errors import UserError
from misc.files import atomic_file
from misc.retrieval.sheet import Cell, draw_sheet, wrapped
from misc.search.searcher import Query, Result

IN_A_ROW = 10
MOST = 100
"""Results that are drawn."""
LABEL_WIDTH = 16


def draw_result_sheet(path: Path, folder: Path, query: Query, results: Sequence[Result]) -> int:
    """Draws a query and its first hundred results, ten in a row, as a PNG. Returns how many could not be drawn, as
    they are gone or have changed since they were indexed.

    Raises UserError where the file cannot be written.
    """
    cells, missing = [], 0
    for rank, (name, score) in enumerate(results[:MOST], start=1):
        try:
            picture = read_image(folder / name, upright=True)
        except UserError:  # the picture may be gone, and the others shall be seen all the same
            missing += 1
            continue
        cells.append(Cell(picture, f"{rank}.  {score:.3f}\n{_short(Path(name).name)}"))
    first = wrapped(query.description or f"like {query.file}")
    rows = [(first if start == 0 else "", cells[start : start + IN_A_ROW]) for start in range(0, len(cells), IN_A_ROW)]
    try:
        with atomic_file(path) as file:
            draw_sheet(file, rows or [(first, [])], columns=min(IN_A_ROW, max(1, len(cells))))
    except OSError as error:
        raise UserError(f"--sheet {path} cannot be written ({error.strerror}): give another place") from error
    return missing


def _short(name: str) -> str:
    """The end of a name, which tells most."""
    return name if len(name) <= LABEL_WIDTH else f"…{name[1 - LABEL_WIDTH :]}"
