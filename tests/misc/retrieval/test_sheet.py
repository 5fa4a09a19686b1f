"""The sheet with queries and their first results."""

import numpy as np
import torch
from PIL import Image

from misc.data.annotations import read_annotations
from misc.retrieval.evaluation import Retrieval
from misc.retrieval.metrics import rank_queries, summarise
from misc.retrieval.sheet import RIGHT, WRONG, draw_retrieval_sheet


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
