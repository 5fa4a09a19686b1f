"""The sheet with queries and their first results."""

import itertools

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from misc.data.annotations import read_annotations
from misc.retrieval import lettering
from misc.retrieval.evaluation import Retrieval
from misc.retrieval.metrics import rank_queries, summarise
from misc.retrieval.sheet import RIGHT, WRONG, Cell, Row, draw_retrieval_sheet, draw_sheet


def hand_made_retrieval(split) -> Retrieval:
    """Ranks the own image of each caption first, then the others in the order of the gallery."""
    gallery = torch.eye(len(split.image_paths))
    queries = gallery[split.caption_images]
    results = rank_queries(
        queries, gallery, torch.tensor(split.caption_identities), torch.tensor(split.image_identities)
    )
    return Retrieval(summarise(results), 0, results, queries, gallery)


def colour_share(path, colour: str) -> float:
    wanted = tuple(int(colour[start : start + 2], 16) for start in (1, 3, 5))
    pixels = np.asarray(Image.open(path).convert("RGB"))
    return float((pixels == wanted).all(axis=2).mean())


def test_right_results_are_framed_green_and_wrong_ones_red(tiny_dataset, tmp_path):
    split = read_annotations(*tiny_dataset)["test"]
    retrieval = hand_made_retrieval(split)
    draw_retrieval_sheet(tmp_path / "first.png", retrieval, split, tiny_dataset.image_dir, queries=[0, 4, 7], images=1)
    assert colour_share(tmp_path / "first.png", RIGHT) > 0
    assert colour_share(tmp_path / "first.png", WRONG) == 0
    draw_retrieval_sheet(tmp_path / "all.png", retrieval, split, tiny_dataset.image_dir, queries=[0, 4, 7])
    assert colour_share(tmp_path / "all.png", WRONG) > colour_share(tmp_path / "all.png", RIGHT)


@pytest.fixture
def drawn(monkeypatch) -> list[Figure]:
    """The figures that are drawn."""
    figures = []
    savefig = Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda figure, *rest, **more: (figures.append(figure), savefig(figure, *rest, **more))
    )
    return figures


def labels(figure: Figure) -> list[str]:
    return [axes.get_xlabel() for axes in figure.axes]


def test_right_and_wrong_are_marked_beside_the_colour(tiny_dataset, tmp_path, drawn):
    split = read_annotations(*tiny_dataset)["test"]
    draw_retrieval_sheet(
        tmp_path / "s.png", hand_made_retrieval(split), split, tiny_dataset.image_dir, queries=[0], images=3
    )
    own, other = split.image_identities[0], split.image_identities[2]
    assert labels(drawn[0]) == [f"✓ 1.00\n{own}", f"✓ 0.00\n{own}", f"✗ 0.00\n{other}"]
    (text,) = drawn[0].texts
    assert (
        split.annotated_captions[0] in " ".join(text.get_text().split()) and "first match: rank 1)" in text.get_text()
    )


def test_the_first_match_follows_where_all_shown_images_are_wrong(tiny_dataset, tmp_path, drawn):
    split = read_annotations(*tiny_dataset)["test"]
    gallery = torch.eye(len(split.image_paths))
    queries = torch.arange(10.0, 0, -1).repeat(len(split), 1)  # always the order of the gallery
    identities = torch.tensor(split.caption_identities)
    results = rank_queries(queries, gallery, identities, torch.tensor(split.image_identities))
    retrieval = Retrieval(summarise(results), 0, results, queries, gallery)
    last = len(split) - 1  # its two images have the ranks 9 and 10
    draw_retrieval_sheet(tmp_path / "s.png", retrieval, split, tiny_dataset.image_dir, queries=[last, 0], images=2)
    *wrong, match, first, second = labels(drawn[0])
    assert match == f"✓ rank 9\n{split.caption_identities[last]}"
    assert all(label.startswith("✗ ") for label in wrong) and first.startswith("✓ ") and second.startswith("✓ ")
    assert "first match: rank 9)" in drawn[0].texts[0].get_text()


def test_labels_of_ordinary_file_names_do_not_overlap(tmp_path, drawn):
    names = ["0001_c1s1_001051_00.jpg", "camera_07_2024-05-01_12-30-59_person.png", "MMMMMMMMMMMMMMMMMMMMMM.jpg"]
    cells = [Cell(Image.new("RGB", (20, 40)), f"{rank}. 0.123", names[rank % 3]) for rank in range(1, 11)]
    with (tmp_path / "sheet.png").open("wb") as file:
        draw_sheet(file, [Row("word " * 400, "a note", cells), Row("x" * 2000, "", [])])
    boxes = [axes.xaxis.label.get_window_extent() for axes in drawn[0].axes]
    assert all(left.x1 < right.x0 for left, right in itertools.pairwise(boxes))
    assert boxes[0].y0 > drawn[0].bbox.height / 2  # above the next row
    for text in drawn[0].texts:
        assert text.get_window_extent().x1 < drawn[0].axes[0].get_window_extent().x0
        assert text.get_window_extent().height < drawn[0].bbox.height / 2
    assert labels(drawn[0])[0].replace("\n", "").endswith("person.png")  # the end distinguishes names
    assert labels(drawn[0])[2].replace("\n", "") == f"3. 0.123{names[0]}"  # 23 characters are shown completely


def test_characters_that_no_font_has_are_replaced_without_warnings(tmp_path, drawn, recwarn, caplog, monkeypatch):
    monkeypatch.setattr("misc.retrieval.lettering._installed", list)
    odd = "Ｆｕｌｌ é 丁丁丁 \ud800\x07 a\u0336 ﬁ"
    with (tmp_path / "sheet.png").open("wb") as file:
        draw_sheet(file, [Row(odd, "", [Cell(Image.new("RGB", (20, 40)), "1", "丁_1.jpg")])])
    assert drawn[0].texts[0].get_text().startswith("Full é □ □ a") and labels(drawn[0]) == ["1\n□_1.jpg"]
    assert not recwarn.list and not caplog.records


def test_another_font_is_used_for_characters_that_the_first_one_lacks(tmp_path, drawn, recwarn, monkeypatch):
    characters = lettering._characters("DejaVu Sans")
    serif = {"DejaVu Sans": characters - {"山"}, "DejaVu Serif": characters | {"山"}}
    monkeypatch.setattr(lettering, "_characters", lambda family: serif.get(family, frozenset()))
    monkeypatch.setattr(lettering, "_installed", lambda: ["DejaVu Sans Mono", "DejaVu Serif"])
    figure = Figure()
    assert lettering.Lettering(figure, ["a 山"]).families == ["DejaVu Sans", "DejaVu Serif"]
    assert lettering.Lettering(figure, ["a 山"]).drawable("a 山") == "a 山"
    assert lettering.Lettering(figure, ["a"]).families == ["DejaVu Sans"]


def test_more_images_requested_than_there_are(tiny_dataset, tmp_path):
    split = read_annotations(*tiny_dataset)["test"]
    draw_retrieval_sheet(
        tmp_path / "sheet.png",
        hand_made_retrieval(split),
        split,
        tiny_dataset.image_dir,
        queries=[0, 13],
        images=12,
    )
    assert Image.open(tmp_path / "sheet.png").width > 100


def test_dollars_in_a_caption_are_text(tiny_dataset, tmp_path):
    split = read_annotations(*tiny_dataset)["test"]
    split.captions[:] = ["a shirt that says $$ and $x^2 _ \\frac"] * len(split)
    draw_retrieval_sheet(
        tmp_path / "sheet.png", hand_made_retrieval(split), split, tiny_dataset.image_dir, queries=[1, 2], images=2
    )
    assert (tmp_path / "sheet.png").is_file()
