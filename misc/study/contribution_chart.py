"""The contribution of every module as heat maps: both measures for both encoders, as in the paper."""

from pathlib import Path

ROWS = {"self_attention": "self-attention", "feed_forward": "feed-forward", "layer": "layer"}
"""The label of the row for each kind of module."""
MEASURES = {"c1": "{:.2f}", "c2": "{:.1f}"}
"""The number format of the cells for each measure."""
COLOURS = "viridis"


def draw_contribution_chart(
    path: Path, image: list[dict[str, dict[str, float]]], text: list[dict[str, dict[str, float]]]
) -> None:
    """Draws four heat maps as a PNG, C1 above and C2 below, the image encoder left and the text encoder right.

    Args:
        image, text: for each layer of the encoder and each kind of module, `c1` and `c2`. A negative C1 has the colour
            of 0.
    """
    from matplotlib.figure import Figure  # the import takes half a second, and only rank 0 draws

    figure = Figure(figsize=(5 + 0.5 * (len(image) + len(text)), 5), layout="constrained")
    grid = figure.subplots(2, 2, squeeze=False, gridspec_kw={"width_ratios": [2 + len(image), 2 + len(text)]})
    for row, (measure, form) in zip(grid, MEASURES.items(), strict=True):
        for axes, encoder, layers in zip(row, ("image", "text"), (image, text), strict=True):
            values = [[layer[kind][measure] for layer in layers] for kind in ROWS]
            picture = axes.imshow(values, vmin=0, vmax=1, cmap=COLOURS, aspect="auto")
            figure.colorbar(picture, ax=axes)
            for y, line in enumerate(values):
                for x, value in enumerate(line):
                    colour = "black" if value > 0.6 else "white"  # the higher the value, the lighter its cell
                    axes.text(x, y, form.format(value), ha="center", va="center", fontsize=8, color=colour)
            axes.set_title(f"{measure.upper()}, {encoder} encoder")
            axes.set_xlabel("layer")
            axes.set_xticks(range(len(layers)), [str(number) for number in range(1, len(layers) + 1)])
            axes.set_yticks(range(len(ROWS)), list(ROWS.values()))
    figure.savefig(path, dpi=120)
