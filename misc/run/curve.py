"""The curve of a run: loss and retrieval over the epochs."""

import math
from pathlib import Path
from typing import Any

from misc.files import atomic_file

RETRIEVAL = {"r1": "R@1", "r5": "R@5", "r10": "R@10", "mAP": "mAP", "mINP": "mINP"}


def draw_curve(path: Path, records: list[dict[str, Any]]) -> None:
    """Draws the losses and the retrieval metrics of the epochs in `metrics.jsonl` as a PNG.

    Args:
        records: one for each epoch, at least one.
    """
    from matplotlib.figure import Figure  # takes half a second to import, and only rank 0 draws

    epochs = [record["epoch"] for record in records]
    figure = Figure(figsize=(9, 3.5), layout="constrained")
    loss, retrieval = figure.subplots(1, 2)
    for name in records[0]:
        if name.startswith("loss"):
            label = name.removeprefix("loss_") if name != "loss" else "sum"
            loss.plot(epochs, [record.get(name, math.nan) for record in records], marker="o", label=label)
    for name, label in RETRIEVAL.items():
        retrieval.plot(epochs, [record.get(name, math.nan) for record in records], marker="o", label=label)
    for axes, title in ((loss, "training loss (weighted)"), (retrieval, "retrieval (%)")):
        axes.set(title=title, xlabel="epoch")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    with atomic_file(path) as file:
        figure.savefig(file, format="png", dpi=120)
