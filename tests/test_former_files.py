"""Files that an earlier version wrote still load: a stopped run, its configuration, its checkpoint, and an index.

`former/` was written by commit c9c5209. The run was stopped two steps into the second of two epochs. It has a dropped
text layer, identity classification, and `input_resolution` as one integer. The index contains seven pictures.
"""

import gzip
import shutil
from pathlib import Path

import numpy as np
import pytest

from misc.builders.architecture import architecture_of
from misc.config.loading import load_config
from misc.run.checkpoint import read_checkpoint
from tests.helpers.runs import Run, finished
from tests.helpers.searching import NAMES, write_people
from tests.helpers.tiny_dataset import write_tiny_dataset

FORMER = Path(__file__).parent / "former"


@pytest.fixture
def former(tmp_path, monkeypatch) -> Path:
    """The former run and its dataset, in a folder of their own that is the current one."""
    shutil.copytree(FORMER, tmp_path / "former")
    checkpoint = tmp_path / "former" / "run" / "checkpoint_last.pth"
    checkpoint.write_bytes(gzip.decompress(checkpoint.with_suffix(".pth.gz").read_bytes()))
    write_tiny_dataset(tmp_path / "former" / "tiny")
    monkeypatch.chdir(tmp_path / "former")
    return tmp_path / "former"


def test_a_stopped_run_continues(run, former):
    before = finished(former / "run").records
    outcome = run("--config", "run/config.yaml", "--resume")
    assert outcome.status == 0, outcome.err
    assert "resumed in epoch 2, after step 2 of 6" in outcome.out
    records = Run(former / "run", outcome).records
    assert records[0] == before[0] and [record["epoch"] for record in records] == [1, 2]
    assert read_checkpoint(former / "run" / "checkpoint_last.pth")["epoch"] == 2


def test_a_resolution_of_one_integer_is_not_a_change(run, former):
    outcome = run("--config", "run/config.yaml", "--resume", "experiment.input_resolution=[32, 32]")
    assert outcome.status == 0, outcome.err


def test_another_resolution_is_a_change(run, former):
    outcome = run("--config", "run/config.yaml", "--resume", "experiment.input_resolution=48")
    assert outcome.status == 2 and "experiment.input_resolution" in outcome.err


def test_its_configuration_loads(former):
    config = load_config("run/config.yaml")
    assert config.experiment.input_resolution == [32, 32]
    assert architecture_of(config).text_layers == 2


def test_its_checkpoint_is_evaluated(run, former):
    outcome = run("--evaluate", "run/checkpoint_last.pth", "--config", "run/config.yaml")
    assert outcome.status == 0, outcome.err
    assert "checkpoint of TBPS-CLIP, epoch 1 and 2 steps" in outcome.out and "20 queries, 10 images" in outcome.out


@pytest.mark.parametrize(
    "start",
    [
        ("model.checkpoint=run/checkpoint_last.pth", "model.saved_path=next"),
        ("model.ckpt_type=saved", "model.saved_path=run/checkpoint_last.pth"),
    ],
    ids=["checkpoint", "the published key"],
)
def test_another_run_starts_from_its_weights(run, former, start):
    outcome = run(
        "--config", "run/config.yaml", *start, "schedule.epoch=1", "model.dropped_text_layers=[]", "model.text_layers=1"
    )
    assert outcome.status == 0, outcome.err
    folder = former / ("next" if "model.saved_path=next" in start else "run/checkpoint_last")
    assert (folder / "checkpoint_best.pth").is_file()


def test_its_index_is_searched_and_updated(call_search, former):
    """A search refuses an index of another encoder, so the encoder's fingerprint has not changed either."""
    write_people(former / "people")
    checkpoint = ("--index", "index", "--checkpoint", "run/checkpoint_last.pth")
    outcome = call_search("query", "people", "a person in red", *checkpoint)
    assert outcome.status == 0, outcome.err
    assert {line.split("\t")[2] for line in outcome.out.splitlines()} == set(NAMES)

    outcome = call_search("index", "people", *checkpoint, "--workers", "0")
    assert outcome.status == 0, outcome.err
    new, old = (np.load(folder / "index" / f"features_{n}.npy") for folder, n in ((former, 2), (FORMER, 1)))
    # Encoded again, as the files are newer. The features were written in bf16, which rounds by up to 2^-9.
    assert np.allclose(new, old, atol=2**-9)
