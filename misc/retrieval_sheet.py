"""A picture of queries with the first images that each retrieved: right ones framed green, wrong ones red."""

import textwrap
from pathlib import Path

from misc.datasets import Split
from misc.evaluation import Retrieval
from misc.loader import read_image

RIGHT, WRONG = "#1a9641", "#d7191c"


def draw_retrieval_sheet(
    path: Path, retrieval: Retrieval, split: Split, image_dir: Path, *, queries: list[int], images: int = 10
) -> None:
    """Draws the captions with these numbers, a row each, with their first `images` results as a PNG."""
    from matplotlib.figure import Figure  # takes half a second, and rank 0 alone draws

    figure = Figure(figsize=(3.4 + 0.95 * images, 2.1 * len(queries)), layout="constrained")
    grid = figure.subplots(
        len(queries), images + 1, squeeze=False, gridspec_kw={"width_ratios": [3.4] + [0.95] * images}
    )
    for axes in grid.flat:
        axes.set_axis_off()
    for row, query in zip(grid, queries, strict=True):
        identity = split.caption_identities[query]
        caption = textwrap.fill(split.captions[query], 38)
        row[0].text(0, 0.5, f"{caption}\n(person {identity})", va="center", fontsize=9, parse_math=False)
        row[0].set_xlim(0, 1)
        scores, numbers = (values.tolist() for values in retrieval.first_images(query, images))
        for axes, score, number in zip(row[1:], scores, numbers, strict=False):  # a gallery may have fewer images
            found = split.image_identities[number]
            colour = RIGHT if found == identity else WRONG
            axes.imshow(read_image(image_dir / split.image_paths[number]), aspect="equal")
            axes.set_axis_on()
            axes.set(xticks=[], yticks=[])
            axes.set_xlabel(f"{score:.2f}\n{found}", fontsize=8, color=colour)
            for spine in axes.spines.values():
                spine.set(color=colour, linewidth=3)
    figure.savefig(path, dpi=100)
