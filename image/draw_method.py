"""Draws image/method.png, the README's figure of the method: the path of a training pair, from left to right.

    python image/draw_method.py

Parts of simplified TBPS-CLIP are solid; parts that only the full recipe has are dashed. The person and the caption come
from the demo dataset. Coordinates are pixels, (0, 0) at the top left.
"""

import sys
import textwrap
from pathlib import Path
from random import Random

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.patches import Arc, Circle, FancyBboxPatch, Patch, Rectangle
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor, to_pil_image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the project root, for the imports below
from misc.config.loading import load_config
from misc.data.image_operations import build_operations
from misc.data.views import PoolView, SimCLRView
from misc.pedestrians import draw_pedestrian, imagine_identity
from misc.system.randomness import seeded
from model.preprocessing import IMAGENET_DEVIATION, IMAGENET_MEAN

FILE = Path(__file__).with_name("method.png")
WIDTH, HEIGHT, PIXELS_PER_INCH = 1600, 840, 100
RESOLUTION = (224, 224)  # of the views: height, width
INK, GREY, LIGHT_GREY = "#27303b", "#66707c", "#eceff2"
BLUE, LIGHT_BLUE = "#2f67b1", "#e6eef8"  # images
ORANGE, LIGHT_ORANGE = "#c4661f", "#fcefe3"  # captions
GREEN, LIGHT_GREEN = "#2e7d5b", "#e4f2eb"  # all GPUs
SOLID, DASHED = "-", (0, (4, 2.5))
SIMCLR, SECOND_VIEW, FIRST_VIEW, CYCLIC, CAPTION = 130, 283, 434, 569, 650  # y of each row of the figure
IMAGE_RAIL, TEXT_RAIL = 1146, 1179  # x of the vertical lines from a feature to several losses


def write(x: float, y: float, text: str, size: float = 13, **style) -> None:
    """Writes lines of text, centred at the height y. Their distance does not depend on the letters in them."""
    lines = text.split("\n")
    for row, line in enumerate(lines):
        baseline = y + 0.5 * size + 1.95 * size * (row - (len(lines) - 1) / 2)
        plt.text(x, baseline, line, fontsize=size, **{"ha": "center", "color": INK} | style)


def write_upwards(x: float, y: float, text: str, **style) -> None:
    plt.text(x, y, text, rotation=90, ha="center", va="center", **style)


def add(patch: Patch) -> None:
    plt.gca().add_patch(patch)


def box(left: float, top: float, width: float, height: float, edge: str = INK, fill: str = "white", line=SOLID) -> None:
    add(FancyBboxPatch((left, top), width, height, "round,pad=0,rounding_size=9", lw=2, ls=line, ec=edge, fc=fill))


def wire(*points: tuple[float, float], color: str = INK, line=SOLID, head: bool = True) -> None:
    """Draws straight lines through the points, with an arrowhead to the right at the last one."""
    plt.plot(*zip(*points, strict=True), color=color, ls=line, lw=2, solid_capstyle="butt", zorder=1)
    if head:
        x, y = points[-1]
        plt.fill([x - 13, x, x - 13], [y - 7, y, y + 7], color=color, lw=0)


def picture(image: Image.Image, left: float, middle: float, width: float, height: float, line=SOLID) -> None:
    top = middle - height / 2
    plt.imshow(image, extent=(left, left + width, top + height, top), interpolation="lanczos", aspect="auto", zorder=2)
    add(Rectangle((left, top), width, height, fill=False, ec=BLUE, lw=2, ls=line, zorder=3))


def without_normalisation(normalised: Tensor) -> Image.Image:
    deviation, mean = (torch.tensor(values)[:, None, None] for values in (IMAGENET_DEVIATION, IMAGENET_MEAN))
    return to_pil_image((normalised * deviation + mean).clamp(0, 1))


def draw_image_views(image: Image.Image) -> None:
    picture(image, 54, 282, 126, 252)
    box(240, SIMCLR - 56, 220, 112, BLUE, line=DASHED)
    write(350, SIMCLR - 31, "SimCLR views", weight="bold", color=BLUE)
    write(350, SIMCLR + 16, "crop, colour jitter,\ngrayscale, blur, flip")
    for left, seed in ((486, 38), (574, 1)):
        view = SimCLRView(RESOLUTION)(pil_to_tensor(image), Random(seed))
        picture(without_normalisation(view), left, SIMCLR, 80, 80, DASHED)

    box(240, SECOND_VIEW - 60, 220, 271, BLUE, LIGHT_BLUE)
    write(350, SECOND_VIEW - 34, "Augmentation pool", weight="bold", color=BLUE)
    write(350, SECOND_VIEW - 2, "two drawn per view:", style="italic")
    write(350, FIRST_VIEW - 43, "colour jitter\nrotation\nresized crop\ngrayscale\nflip\nerasing")
    recipe = load_config().experiment
    pool = PoolView(RESOLUTION, build_operations(recipe.image_operations, RESOLUTION), recipe.image_pool)
    for middle, seed, line in ((SECOND_VIEW, 16, DASHED), (FIRST_VIEW, 6, SOLID)):
        with seeded("view", seed):
            view = pool(pool.resize(pil_to_tensor(image)))
        picture(without_normalisation(view), 540, middle, 60, 120, line)


def draw_text_view(caption: str) -> None:
    box(20, CAPTION - 98, 194, 196, ORANGE)
    write(117, CAPTION, textwrap.fill(caption, 20))
    box(240, CAPTION - 98, 220, 196, ORANGE, LIGHT_ORANGE)
    write(350, CAPTION - 70, "Text augmentation", weight="bold", color=ORANGE)
    write(350, CAPTION + 14, "back-translation\n(p = 0.1)\nrandom deletion\n(p = 0.05)")
    write(570, CAPTION - 98, "byte-pair tokens")
    for row, token in enumerate(["start", *caption.lower().split()[:3], "…"]):
        add(Rectangle((515, CAPTION - 77 + 33 * row), 110, 28, fc=LIGHT_ORANGE, ec=ORANGE, lw=1.2))
        write(570, CAPTION - 63 + 33 * row, token)


def draw_encoders_and_features() -> None:
    box(690, 74, 190, 420, BLUE, LIGHT_BLUE)
    add(Rectangle((704, 88), 38, 392, fc="#d3d9df", ec=GREY, lw=1.4))
    add(Arc((723, 108), 12, 18, theta1=180, theta2=360, lw=2.4, ec=INK))  # a padlock
    add(Rectangle((714, 108), 18, 14, fc=INK))
    write_upwards(723, 300, "locked patch embedding", fontsize=14, color=INK)
    write(811, 262, "CLIP\nimage\nencoder", 16, weight="bold", color=BLUE)
    write(811, 332, "ViT-B/16", 14)
    box(690, CAPTION - 98, 190, 196, ORANGE, LIGHT_ORANGE)
    write(785, CAPTION - 50, "CLIP\ntext encoder", 16, weight="bold", color=ORANGE)
    write(785, CAPTION + 38, "causal transformer\nattention dropout\n(p = 0.05)")

    box(902, SIMCLR - 38, 132, 76, BLUE, line=DASHED)
    write(968, SIMCLR, "Projector\n512–128–512")
    write(1160, SIMCLR - 22, r"$z_1,\ z_2$", 16, color=BLUE)
    for middle, name, color, line in (
        (SECOND_VIEW, r"$f_I^{\,\prime}$", BLUE, DASHED),
        (FIRST_VIEW, "$f_I$", BLUE, SOLID),
        (CAPTION, "$f_T$", ORANGE, SOLID),
    ):
        box(935, middle - 24, 66, 48, color, line=line)
        write(968, middle, name, 18, color=color)
    for shift in (12, 6, 0):  # one sheet per GPU
        box(1060 + shift, 86 - shift, 44, 662, GREEN, LIGHT_GREEN)
    write_upwards(1082, 417, "gathered from all GPUs, with gradient", fontsize=15, weight="bold", color=GREEN)


def draw_losses() -> None:
    nt_xent = "NT-Xent of $z_1$ and $z_2$,\ntemperature 0.1"
    soft_labels = "cross-entropy, soft labels\n" r"$α\,\bar p + (1-α)\,\hat q$"
    cyclic = r"$f_I\;f_I^{\,⊤} \; ≈ \; f_T\;f_T^{\,⊤}$" "\n" r"$f_I\;f_T^{\,⊤} \; ≈ \; f_T\;f_I^{\,⊤}$"
    for middle, half, name, meaning, formula, size, weight, line in (
        (SIMCLR, 56, "SS-I", "self-supervision", nt_xent, 14, "0.4", DASHED),
        (SECOND_VIEW, 77, "N-ITC", "normalised contrast", soft_labels, 14, "1", SOLID),
        (FIRST_VIEW, 54, "R-ITC", "reversed contrast", r"KL( $p$  ‖  $\hat q + ε$ )", 16, "1", SOLID),
        (CYCLIC, 61, "C-ITC", "cyclic contrast", cyclic, 16, "0.1", DASHED),
    ):
        box(1212, middle - half, 290, 2 * half, INK, LIGHT_GREY if line == SOLID else "white", line)
        write(1228, middle - half + 25, name, 16, weight="bold", ha="left")
        write(1488, middle - half + 26, meaning, ha="right", color=GREY)
        write(1357, middle - half + 72, formula, size)
        write(1534, middle - 18, f"× {weight}", 14)
    box(1226, SECOND_VIEW + 32, 262, 35, line=DASHED)
    write(1357, SECOND_VIEW + 49, r"MVS-I: mean of $f_I$ and $f_I^{\,\prime}$", 14)
    add(Circle((1566, CAPTION + 20), 20, fc="white", ec=INK, lw=2))
    write(1566, CAPTION + 20, "+", 20)
    write(1566, CAPTION + 60, "loss", 14, weight="bold")
    notation = (
        r"$p$ = softmax($s\;f_I\;f_T^{\,⊤}$), both ways",
        r"$\bar p$ = $p$ without gradient",
        r"$\hat q$: same person, rows sum to 1",
        "$α$: 0 to 0.5 over the first epoch",
    )
    write(1216, CAPTION + 48, "\n".join(notation), ha="left", color=GREY)


def draw_wires() -> None:
    for middle, line in ((SIMCLR, DASHED), ((SECOND_VIEW + FIRST_VIEW) / 2, SOLID)):
        wire((180, 282), (212, 282), (212, middle), (240, middle), color=BLUE, line=line)
    for middle, color, line, spans in (
        (SIMCLR, BLUE, DASHED, ((460, 486), (654, 690), (880, 902), (1034, 1060), (1116, 1212))),
        (SECOND_VIEW, BLUE, DASHED, ((460, 540), (600, 690), (880, 935), (1001, 1060))),
        (FIRST_VIEW, BLUE, SOLID, ((460, 540), (600, 690), (880, 935), (1001, 1060))),
        (CAPTION, ORANGE, SOLID, ((214, 240), (460, 515), (625, 690), (880, 935), (1001, 1060))),
    ):
        for start, end in spans:
            wire((start, middle), (end, middle), color=color, line=line)

    # To the right of the gathering, each dot connects a feature to a loss.
    wire((1116, SECOND_VIEW), (IMAGE_RAIL, SECOND_VIEW), color=BLUE, line=DASHED, head=False)
    wire((1116, FIRST_VIEW), (IMAGE_RAIL, FIRST_VIEW), (IMAGE_RAIL, SECOND_VIEW), color=BLUE, head=False)
    wire((IMAGE_RAIL, FIRST_VIEW), (IMAGE_RAIL, CYCLIC), color=BLUE, line=DASHED, head=False)
    wire((1116, CAPTION), (TEXT_RAIL, CAPTION), (TEXT_RAIL, SECOND_VIEW), color=ORANGE, head=False)
    for middle, line in ((SECOND_VIEW, SOLID), (FIRST_VIEW, SOLID), (CYCLIC, DASHED)):
        wire((IMAGE_RAIL, middle), (1212, middle), line=line)
        wire((1502, middle), (1566, middle), line=line, head=False)
        add(Circle((IMAGE_RAIL, middle), 6, fc=BLUE, ec="white", lw=1, zorder=3))
        add(Circle((TEXT_RAIL, middle), 6, fc=ORANGE, ec="white", lw=1, zorder=3))
    wire((1502, SIMCLR), (1566, SIMCLR), (1566, SECOND_VIEW), line=DASHED, head=False)
    wire((1566, SECOND_VIEW), (1566, CAPTION), head=False)


def draw_titles_and_legend() -> None:
    titles = {117: "Training pair", 350: "Augmentation", 570: "Views", 785: "Encoders", 968: "Features"}
    for x, title in (titles | {1357: "Losses"}).items():
        write(x, 34, title, 16, color=GREY)
    box(20, 782, 60, 28, INK, LIGHT_GREY)
    write(94, 796, "simplified TBPS-CLIP: N-ITC and R-ITC", 14, ha="left")
    box(560, 782, 60, 28, line=DASHED)
    write(634, 796, "added by full TBPS-CLIP: MVS-I, SS-I and C-ITC", 14, ha="left")


def main(output: Path = FILE) -> None:
    """Draws the figure into a PNG file."""
    plt.switch_backend("agg")  # needs no screen
    with plt.rc_context({"font.family": "DejaVu Sans", "mathtext.fontset": "dejavuserif"}):
        figure = plt.figure(figsize=(WIDTH / PIXELS_PER_INCH, HEIGHT / PIXELS_PER_INCH), dpi=PIXELS_PER_INCH)
        plt.axes((0, 0, 1, 1)).axis("off")
        person, portraits = imagine_identity(13, images=1, seed=0)
        draw_image_views(draw_pedestrian(person, portraits[0].shot, 448, 224))
        draw_text_view(portraits[0].captions[0])
        draw_encoders_and_features()
        draw_losses()
        draw_wires()
        draw_titles_and_legend()
        plt.axis((0, WIDTH, HEIGHT, 0))
        figure.canvas.draw()
    pixels = Image.fromarray(np.asarray(figure.canvas.buffer_rgba())).convert("RGB")
    plt.close(figure)
    pixels.quantize(256).save(output, optimize=True)  # 256 colours: a third of the size


if __name__ == "__main__":
    main()
