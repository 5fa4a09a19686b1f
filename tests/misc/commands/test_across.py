"""`main.py --evaluate … --on …`: checkpoints of several training sets on several test sets."""

import json
import shutil
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import yaml

from misc.builders.architecture import resolve_architecture
from misc.builders.model import build_model
from misc.builders.training import build_objectives
from misc.config import loading
from misc.config.loading import load_config, to_plain
from misc.run.checkpoint import write_checkpoint
from misc.system.distributed import Ranks
from tests.helpers.ranks import fork_ranks
from tests.helpers.runs import ARCHITECTURE, METRICS, QUICK, environment, only_error, run_main
from tests.helpers.tiny_dataset import TinyDataset, write_tiny_dataset

NAMES = ("CUHK-PEDES", "ICFG-PEDES", "RSTPReid")
GIVEN = tuple(word for word in QUICK if not word.startswith("data.dataset"))


class Place(NamedTuple):
    """Three datasets under the names of the real ones, and a checkpoint that was trained on each of the first two."""

    datasets: dict[str, TinyDataset]
    file: Path
    checkpoints: list[Path]


def write_weights(path: Path, seed: int, recorded: dict[str, str]) -> Path:
    """Writes the checkpoint of a run that was not trained."""
    overrides = (*ARCHITECTURE, *QUICK, f"misc.seed={seed}", *(f"{key}={value}" for key, value in recorded.items()))
    config = resolve_architecture(load_config(overrides=overrides), None)
    model, _ = build_model(config, build_objectives(config, Ranks(0, 1, torch.device("cpu"))), 1, weights=None)
    write_checkpoint(path, {"model": model.state_dict(), "config": to_plain(config), "epoch": 1, "metrics": {}})
    return path


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Place:
    folder = tmp_path_factory.mktemp("across")
    datasets = {
        name: write_tiny_dataset(folder / name, identities={"train": 2, "test": 4 + number}, size=(40, 24 + number))
        for number, name in enumerate(NAMES)
    }
    # one image of a test split is a training image of another dataset
    shutil.copy(
        datasets["ICFG-PEDES"].image_dir / "tiny/0001_0.jpg", datasets["RSTPReid"].image_dir / "tiny/0004_1.jpg"
    )
    file = folder / "datasets.yaml"
    folders = {name: {key: str(path) for key, path in data._asdict().items()} for name, data in datasets.items()}
    file.write_text(yaml.safe_dump(folders))
    checkpoints = [
        write_weights(folder / f"{number}.pth", number, {"data.dataset": name, "anno_dir": "x", "image_dir": "x"})
        for number, name in enumerate(NAMES[:2])
    ]
    return Place(datasets, file, checkpoints)


@pytest.fixture
def evaluate(run, place, monkeypatch):
    monkeypatch.setattr(loading, "DATASETS", place.file)
    return lambda *arguments: run("--evaluate", *arguments, *GIVEN)


def with_datasets(file: Path, words: list[str]) -> int:
    """Runs `main.py` with another list of datasets."""
    loading.DATASETS = file
    return run_main(words)


def read(folder: Path) -> dict:
    return json.loads((folder / "across_datasets.json").read_text(encoding="utf-8"))


def table_of(text: str, first: str) -> list[str]:
    """Returns the lines of a text from the first one that begins so, without spaces, to an empty one."""
    lines = ["".join(line.split()) for line in text.splitlines()]
    start = next(number for number, line in enumerate(lines) if line.startswith(first))
    return lines[start:]


def test_each_checkpoint_is_evaluated_on_each_dataset(evaluate, place, tmp_path):
    out = tmp_path / "out"
    outcome = evaluate(*place.checkpoints, "--on", *NAMES, "--out", out)
    assert outcome.status == 0, outcome
    results = read(out)["results"]
    titles = [f"{name} test in {place.datasets[name].anno_dir}:" for name in NAMES]
    assert [line for line in outcome.out.splitlines() if line in titles] == titles  # above the statistics of each
    pairs = [(each["method"], each["trained_on"], each["tested_on"]) for each in results]
    assert pairs == [(str(path), NAMES[n], name) for n, path in enumerate(place.checkpoints) for name in NAMES]
    assert [(each["queries"], each["images"]) for each in results[:3]] == [(16, 8), (20, 10), (24, 12)]
    for each in results:
        preprocessing = each["preprocessing"]
        assert (preprocessing["resolution"], preprocessing["interpolation"]) == ([32, 16], "bicubic")
        assert (preprocessing["mean"], preprocessing["clean_captions"]) == ([0.485, 0.456, 0.406], True)
        assert each["rSum"] == pytest.approx(each["r1"] + each["r5"] + each["r10"])
    # the figures are those of an evaluation on one dataset
    alone = evaluate(place.checkpoints[1], "data.dataset=RSTPReid")
    assert "warning: ICFG-PEDES and RSTPReid are both cut from MSMT17" in alone.out
    (line,) = [line for line in alone.out.splitlines() if line.startswith("  ") and "R@1" not in line]
    assert line.split() == [f"{results[5][name]:.2f}" for name in METRICS]
    assert len({tuple(each[name] for name in METRICS) for each in results}) > 3  # or nothing could be mixed up

    for text in (outcome.out, (out / "across_datasets.md").read_text(encoding="utf-8").replace("|", " ")):
        table = table_of(text, "trainedontestedon")
        assert f"CUHK-PEDESICFG-PEDES{place.checkpoints[0]}{results[1]['r1']:.2f}" in "\n".join(table)
        assert "CUHK-PEDESICFG-PEDESITSELF(published)50.58––27.32––" in table
        assert "ICFG-PEDESICFG-PEDESTBPS-CLIP(published)65.0580.3485.4739.83–230.86" in table  # the paper's
        matrix = table_of(text, "trainedonweights")
        figures = "".join(f"{each['r1']:.2f}/{each['mAP']:.2f}" for each in results[3:])
        assert f"ICFG-PEDES{place.checkpoints[1]}{figures}" in matrix


def test_people_and_files_that_training_and_test_data_share_are_told(evaluate, place, tmp_path):
    out = tmp_path / "out"
    outcome = evaluate(place.checkpoints[1], "--on", "CUHK-PEDES", "RSTPReid", "--out", out)
    warnings = [line for line in outcome.out.splitlines() if "MSMT17" in line or "same image files" in line]
    people, files = warnings
    assert people.startswith("warning: ICFG-PEDES and RSTPReid are both cut from MSMT17")
    one, other = (place.datasets[name].image_dir for name in ("RSTPReid", "ICFG-PEDES"))
    pictures = f"{one / 'tiny/0004_1.jpg'} and {other / 'tiny/0001_0.jpg'}"
    assert files == f"warning: the same image files in RSTPReid test and in ICFG-PEDES train: 1, for example {pictures}"
    assert read(out)["warnings"] == warnings
    assert all(line in (out / "across_datasets.md").read_text(encoding="utf-8") for line in warnings)


def test_one_dataset_and_weights_that_record_no_data(evaluate, place, tmp_path):
    """Only the folder of the annotation is recorded, as in the published code; it has the name of a dataset."""
    recorded = {"data.dataset": "null", "anno_dir": tmp_path / "CUHK-PEDES", "image_dir": tmp_path / "none"}
    named = write_weights(tmp_path / "named.pth", 0, recorded)
    other = write_weights(tmp_path / "other.pth", 0, recorded | {"anno_dir": tmp_path / "processed"})
    outcome = evaluate(named, other, "--on", "RSTPReid")
    assert outcome.status == 0, outcome
    found = read(tmp_path / "named_retrieval")
    assert [each["trained_on"] for each in found["results"]] == ["CUHK-PEDES", str(tmp_path / "processed")]
    published = {(each["method"], each["trained_on"]) for each in found["published"]}
    assert {("ITSELF (published)", name) for name in NAMES} <= published  # beside the weights without a known dataset
    assert {each["tested_on"] for each in found["published"]} == {"RSTPReid"}
    (note,) = found["warnings"]  # those of CUHK-PEDES are where datasets.yaml says
    assert f"the images that {tmp_path / 'processed'} has for training are not compared" in note


def test_published_figures_are_of_the_test_split(evaluate, place, tmp_path):
    for data in place.datasets.values():
        assert not any(entry["split"] == "val" for entry in json.loads((data.anno_dir / "reid_raw.json").read_text()))
    message = only_error(evaluate(place.checkpoints[0], "--on", "RSTPReid", "data.evaluate_on=val"))
    assert "--on RSTPReid: " in message and "no val entries" in message


def test_overrides_may_follow_the_names(evaluate, place, tmp_path):
    first = ("log.print_period=7", "data.test_batch_size=0")
    for arguments in (
        (place.checkpoints[0], *first, "--on", "RSTPReid"),
        (place.checkpoints[0], "--on", "RSTPReid", *first),
        (place.checkpoints[0], place.checkpoints[1], *first, "--on", "RSTPReid"),
        (place.checkpoints[0], *first),
    ):
        assert "data.test_batch_size: 0" in only_error(evaluate(*arguments))
    odd = tmp_path / "lr=1.pth"
    shutil.copy(place.checkpoints[0], odd)
    outcome = evaluate(place.checkpoints[0], odd, "--on", "RSTPReid", "--out", tmp_path / "out")
    assert outcome.status == 0 and len(read(tmp_path / "out")["results"]) == 2


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["{0}", "{1}"], ["several checkpoints", "--on", "--against"]),
        (["{0}", "--on", "RSTPReid", "--sheet", "2"], ["--on RSTPReid", "--sheet"]),
        (["{0}", "--on", "RSTPReid", "--against", "{1}"], ["--on RSTPReid", "--against"]),
        (["{0}", "--on", "RSTPReid", "anno_dir=x"], ["--on RSTPReid", "anno_dir=x"]),
        (["{0}", "--on", "RSTPReid", "data.dataset=ICFG-PEDES"], ["data.dataset=ICFG-PEDES has no effect"]),
        (["{0}", "--on", "data.num_workers=0"], ["--on", "names of datasets"]),
        (["{0}", "--on", "RSTPReid", "RSTPreid"], ["--on RSTPreid", "CUHK-PEDES, ICFG-PEDES, RSTPReid"]),
        (["{0}", "nowhere.pth", "--on", "RSTPReid"], ["nowhere.pth", "No such file"]),
        (["{0}", "--on", "RSTPReid", "--out", "{file}"], ["--evaluate", "is not a folder"]),
        (["{0}", "--on", "RSTPReid", "--study", "losses/itc"], ["--study only works without"]),
    ],
)
def test_a_mistake_is_one_line(evaluate, place, tmp_path, arguments, words):
    arguments = [text.format(*place.checkpoints, file=place.file) for text in arguments]
    message = only_error(evaluate(*arguments))
    assert all(word in message for word in words), message


def test_datasets_without_weights_are_refused(run):
    assert "--on RSTPReid: only works together with --evaluate" in only_error(run("--on", "RSTPReid"))
    assert "--study only works without" in only_error(run("--study", "list", "--on", "RSTPReid"))


def test_a_table_that_exists_is_kept(evaluate, place, tmp_path):
    (tmp_path / "across_datasets.md").write_text("mine")
    message = only_error(evaluate(place.checkpoints[0], "--on", "RSTPReid", "--out", tmp_path))
    assert "across_datasets.md already exists" in message and "--out" in message


def test_several_ranks_write_one_table(evaluate, place, tmp_path):
    own = (*map(str, place.checkpoints), "--on", *NAMES)
    assert evaluate(*own, "--out", tmp_path / "one").status == 0
    words = ["main.py", "--evaluate", *own, "--out", str(tmp_path / "two"), *GIVEN]
    ended = fork_ranks(2, with_datasets, (place.file, words), environment())
    assert ended.statuses == [0, 0], ended.err
    one, two = (read(tmp_path / name) for name in ("one", "two"))
    assert two["warnings"] == one["warnings"] and two["published"] == one["published"]
    for found, expected in zip(two["results"], one["results"], strict=True):
        assert found == {key: pytest.approx(v) if isinstance(v, float) else v for key, v in expected.items()}
    assert ended.out.count("trained on  ") == 2  # the table and the matrix, once each
