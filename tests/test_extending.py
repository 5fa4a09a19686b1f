"""The worked examples of docs/extending.md: put into a copy of the project, they train, export and evaluate."""

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.helpers.fork_server import Call, ForkServer
from tests.helpers.runs import ARCHITECTURE, QUICK, ROOT, Outcome, run_main
from tests.helpers.tiny_dataset import write_tiny_dataset

DOCUMENT = ROOT / "docs" / "extending.md"
CODE = ("main.py", "config", "model", "text_utils", "misc")
TESTS = ("tests/__init__.py", "tests/helpers")
"""What the fork server of the copy needs."""
INSERTION = re.compile(
    r"<!-- insert: (?P<file>\S+) \| (?P<place>after|before|end)(?: \| (?P<anchor>.+?))? -->\n"
    r"```\w+\n(?P<code>.*?)```\n",
    re.DOTALL,
)


class Insertion(NamedTuple):
    """Code of the document, and where it goes: after or before the one line with `anchor` in it, or at the end."""

    file: str
    place: str
    anchor: str | None
    code: str

    def apply(self, root: Path) -> None:
        path = root / self.file
        text = path.read_text(encoding="utf-8")
        if self.place == "end":
            path.write_text(text + self.code, encoding="utf-8")
            return
        lines = text.splitlines(keepends=True)
        (number,) = [number for number, line in enumerate(lines) if self.anchor in line]
        lines.insert(number + (self.place == "after"), self.code)
        path.write_text("".join(lines), encoding="utf-8")


def insertions() -> list[Insertion]:
    return [Insertion(**found.groupdict()) for found in INSERTION.finditer(DOCUMENT.read_text(encoding="utf-8"))]


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    """A copy of the project with every example of the document in it."""
    root = tmp_path_factory.mktemp("extended")
    (root / "tests").mkdir()
    for name in (*CODE, *TESTS):
        source = ROOT / name
        copy = shutil.copytree if source.is_dir() else shutil.copy
        copy(source, root / name)
    for insertion in insertions():
        insertion.apply(root)
    write_tiny_dataset(root / "data" / "campus", identities={"train": 12, "test": 5})
    return root


@pytest.fixture(scope="module")
def call(project) -> Iterator[Callable[..., Outcome]]:
    """`main.py` of the copy."""
    server = ForkServer(project)

    def run_copy(*arguments: str) -> Outcome:
        ended = server([Call(run_main, (["main.py", *arguments],), dict(os.environ), project)])
        return Outcome(ended.statuses[0], ended.out, ended.err)

    yield run_copy
    server.close()


@pytest.fixture(scope="module")
def trained(project, call) -> Path:
    """A run of two steps with the new loss, the new augmentation and the new dataset."""
    outcome = call(
        *ARCHITECTURE,
        *QUICK,
        "data.dataset=Campus-PEDES",
        "data.batch_size=24",
        "data.chunk_size=16",
        "experiment.triplet=true",
        "experiment.triplet_margin=0.5",
        "experiment.image_operations={random_perspective: 0.3}",
        "schedule.epoch=1",
        "model.saved_path=run",
    )
    assert outcome.status == 0, outcome.err
    assert "step 2/2" in outcome.out and "triplet 0." in outcome.out
    assert "published" not in outcome.out  # the counts of the new dataset are the annotation's
    return project / "run"


def test_the_document_has_an_example_for_each_addition():
    files = {insertion.file for insertion in insertions()}
    assert files == {
        "config/config.yaml",
        "config/datasets.yaml",
        "config/study.yaml",
        "misc/config/rules.py",
        "misc/data/statistics.py",
        "misc/data/image_operations.py",
        "model/losses.py",
        "model/objectives.py",
        "model/pretrained/export.py",
        "model/pretrained/names.py",
    }


@pytest.mark.slow
def test_two_steps_train_with_the_new_loss(trained):
    (record,) = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    assert 0 < record["loss_triplet"] < 2.5  # at most the margin and the largest difference of two cosines


@pytest.mark.slow
def test_a_misspelt_key_of_the_new_loss_is_refused(call):
    outcome = call("experiment.triplet_margn=0.5")
    assert outcome.status == 2 and "did you mean 'experiment.triplet_margin'" in outcome.err


@pytest.mark.slow
def test_the_new_row_of_the_study_is_listed(call):
    outcome = call("--study", "list")
    assert outcome.status == 0 and any(line.startswith("losses/triplet") for line in outcome.out.splitlines())


@pytest.mark.slow
def test_the_new_forms_of_weights_are_written_and_read(call, project, trained):
    outcome = call("--export", "safetensors", "out", "model.checkpoint=run/checkpoint_best.pth")
    assert outcome.status == 0, outcome.err
    state = load_file(project / "out" / "clip.safetensors")
    assert "visual.proj" in state

    theirs = {
        name.replace("visual.", "picture.") if name.startswith(("visual.", "logit_scale")) else f"words.{name}": tensor
        for name, tensor in state.items()
    }
    save_file({f"model.{name}": tensor for name, tensor in theirs.items()}, project / "wrapped.safetensors")
    weights = (
        "model.checkpoint=wrapped.safetensors",
        "model.activation=quick_gelu",
        "experiment.input_resolution=[32, 16]",
    )
    outcome = call("--export", "safetensors", "again", *weights)
    assert outcome.status == 0, outcome.err
    assert "names of another tool" in outcome.out
    again = load_file(project / "again" / "clip.safetensors")
    assert again.keys() == state.keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in state.items())
