"""The README's figure of the method can be drawn again."""

import runpy

from PIL import Image

from tests.helpers.runs import ROOT


def test_the_figure_is_drawn(tmp_path):
    draw_method = runpy.run_path(str(ROOT / "image" / "draw_method.py"))
    draw_method["main"](tmp_path / "method.png")
    with Image.open(tmp_path / "method.png") as drawn, Image.open(ROOT / "image" / "method.png") as published:
        assert (drawn.format, drawn.size) == ("PNG", (1600, 840)) and published.size == drawn.size
