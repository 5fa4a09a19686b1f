"""What `--study acceptance` names, and which results it accepts."""

import json
from pathlib import Path

import pytest
import yaml

from misc.errors import UserError
from misc.study.acceptance import acceptance
from misc.study.rows import read_study, row_folder

ROWS = read_study()
PAPER = {
    "CUHK-PEDES_full": (73.54, 88.19, 92.35, 65.38),
    "CUHK-PEDES_simplified": (72.66, 88.14, 92.72, 64.97),
    "ICFG-PEDES_full": (65.05, 80.34, 85.47, 39.83),
    "ICFG-PEDES_simplified": (64.52, 80.03, 85.39, 39.54),
    "RSTPReid_full": (61.95, 83.55, 88.75, 48.26),
    "RSTPReid_simplified": (62.10, 81.90, 87.75, 48.00),
}
"""R@1, R@5, R@10 and mAP of the authors' checkpoints, from the paper."""
TEST = {"CUHK-PEDES": (6_156, 3_074), "ICFG-PEDES": (19_848, 19_848), "RSTPReid": (2_000, 1_000)}
"""Queries and images."""
COLUMNS = ("r1", "r5", "r10", "mAP")
HALF, WHOLE = "half_batch_simplified", "benchmarks/CUHK-PEDES/simplified_vitb16"


def verdicts(root: Path) -> dict[str, str]:
    """Returns the verdict on each run, by a part of its command."""
    found = {}
    for part in acceptance(ROWS, root).split("\n\n")[1:-1]:
        title, command, *_ = part.splitlines()
        words = command.split()
        name = Path(words[words.index("--out") + 1]).name if "--out" in words else words[words.index("--study") + 1]
        found[name] = title.partition(": ")[2]
    return found


def write_evaluation(root: Path, name: str, figures: tuple[float, ...], **changes) -> Path:
    dataset = name.partition("_")[0]
    result = {"tested_on": dataset, "split": "test", "queries": TEST[dataset][0], "images": TEST[dataset][1]}
    result |= dict(zip(COLUMNS, figures, strict=True)) | changes
    path = root / "acceptance" / name / "across_datasets.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"results": [result]}))
    return path


def write_training(root: Path, name: str, figures: tuple[float, ...], *, steps: int, epochs: int = 1, **data) -> None:
    folder = row_folder(root, name, 0)
    folder.mkdir(parents=True)
    record = dict(zip(COLUMNS, figures, strict=True)) | {"epoch": 1, "epochs": epochs, "steps": steps, "seconds": 1}
    (folder / "metrics.jsonl").write_text(json.dumps(record | {"evaluation_seconds": 1}) + "\n")
    config = {"anno_dir": "data/x", "data": {"dataset": "CUHK-PEDES", "evaluate_on": "test"} | data}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))


def test_every_run_is_named_with_what_must_come_out(tmp_path):
    text = acceptance(ROWS, tmp_path)
    assert verdicts(tmp_path) == dict.fromkeys((*PAPER, HALF, WHOLE), "not run")
    for name, figures in PAPER.items():
        dataset = name.partition("_")[0]
        command = f"python main.py --evaluate CHECKPOINT --on {dataset} --out {tmp_path / 'acceptance' / name}"
        (part,) = [part for part in text.split("\n\n") if command in part]
        assert "±0.1" in part and [float(word) for word in part.split("published")[1].split()] == list(figures)
    for row, figures, steps in ((HALF, (71.22, 87.77, 92.19, 63.85), 425), (WHOLE, (72.66, 88.14, 92.72, 64.97), 212)):
        (part,) = [part for part in text.split("\n\n") if f"main.py --study {row} " in part]
        assert "±1.0" in part and f"{steps} steps an epoch" in part and f"model.saved_path={tmp_path}" in part
        assert [float(word) for word in part.split("published")[1].split()] == list(figures)
    assert "212 steps of 320 samples" in text and "567 steps of 120 samples" in text
    assert text.endswith("0 agree, 0 differ, 8 are not run")
    assert "saved_path" not in acceptance(ROWS, Path("runs/study"))  # the usual folder


def test_results_agree_within_their_bounds(tmp_path):
    for name, figures in PAPER.items():
        write_evaluation(tmp_path, name, tuple(figure + 0.1 for figure in figures))
    write_training(tmp_path, HALF, (72.2, 86.8, 92.19, 63.0), steps=425)
    write_training(tmp_path, WHOLE, (71.7, 89.1, 92.72, 65.9), steps=212)
    assert verdicts(tmp_path) == dict.fromkeys((*PAPER, HALF, WHOLE), "agrees")
    assert acceptance(ROWS, tmp_path).endswith("8 agree, 0 differ, 0 are not run")


@pytest.mark.parametrize(
    ("figures", "changes", "verdict"),
    [
        ((62.06, 83.55, 88.75, 48.26), {}, "differs: R@1 by +0.11"),
        ((61.95, 83.55, 88.64, 48.10), {}, "differs: R@10 by -0.11; mAP by -0.16"),
        ((61.95, 83.55, 88.75, 48.26), {"queries": 20}, "differs: 20 queries, published 2,000"),
        ((61.95, 83.55, 88.75, 48.26), {"split": "val"}, "not run: 0 results on RSTPReid test, expected one"),
        (
            (61.95, 83.55, 88.75, 48.26),
            {"tested_on": "CUHK-PEDES"},
            "not run: 0 results on RSTPReid test, expected one",
        ),
    ],
)
def test_what_an_evaluation_differs_in_is_named(tmp_path, figures, changes, verdict):
    write_evaluation(tmp_path, "RSTPReid_full", figures, **changes)
    assert verdicts(tmp_path)["RSTPReid_full"] == verdict


@pytest.mark.parametrize(
    ("r1", "changes", "verdict"),
    [
        (71.65, {"steps": 212}, "differs: R@1 by -1.01"),
        (72.66, {"steps": 213}, "differs: 213 steps an epoch"),
        (72.66, {"steps": 212, "dataset": None}, "differs: measured on test in data/x"),
        (72.66, {"steps": 212, "epochs": 5}, "not run: seed_0 is not finished"),
    ],
)
def test_what_a_training_differs_in_is_named(tmp_path, r1, changes, verdict):
    write_training(tmp_path, WHOLE, (r1, 88.14, 92.72, 64.97), **changes)
    assert verdicts(tmp_path)[WHOLE] == verdict


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"results": [3]}', '{"results": [{"tested_on": "RSTPReid"}]}'])
def test_a_damaged_result_is_named(tmp_path, content):
    path = write_evaluation(tmp_path, "RSTPReid_full", PAPER["RSTPReid_full"])
    path.write_text(content)
    with pytest.raises(UserError, match="is damaged") as caught:
        acceptance(ROWS, tmp_path)
    assert str(path) in str(caught.value)
