"""Fixtures that several test files share."""

import resource
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from tests.helpers.runs import EVERYTHING, Outcome, Run, of_dataset, start
from tests.helpers.searching import GELU, write_clip, write_people
from tests.helpers.tiny_dataset import TinyDataset, write_tiny_dataset


@pytest.fixture
def tiny_dataset(tmp_path) -> TinyDataset:
    """12 persons to train, 4 to validate and 5 to test on, two images each, in a folder that the test may change."""
    return write_tiny_dataset(tmp_path / "dataset")


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> TinyDataset:
    """The same, for tests that leave it as it is."""
    return write_tiny_dataset(tmp_path_factory.mktemp("data") / "tiny")


@pytest.fixture(scope="session")
def unstopped(data, tmp_path_factory) -> Run:
    """A run with everything on that nobody disturbed, for those that go on to be compared with."""
    folder = tmp_path_factory.mktemp("unstopped") / "run"
    outcome = start(*EVERYTHING, *of_dataset(data), f"model.saved_path={folder}")
    assert outcome.status == 0, outcome.err
    return Run(folder, outcome)


@pytest.fixture
def run(monkeypatch, capfd) -> Iterator[Callable[..., Outcome]]:
    """`main.py` in this process: importing torch again would take most of the time."""
    monkeypatch.delenv("WANDB_PROJECT", raising=False)

    import main  # not for tests of a part alone

    def call(*arguments: str) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["main.py", *map(str, arguments)])
        capfd.readouterr()
        return Outcome(main.main(), *capfd.readouterr())

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # several would only wait for each other on so little work
    yield call
    torch.set_num_threads(threads)


@pytest.fixture
def full_disk() -> Iterator[Callable[[int], None]]:
    """A function: from now on, a file of this process may hold so many bytes."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.fixture(scope="session")
def clip(tmp_path_factory) -> Path:
    """Weights of a tiny CLIP, for pictures of 32 × 32."""
    return write_clip(tmp_path_factory.mktemp("clip") / "clip.pt")


@pytest.fixture
def people(tmp_path) -> Path:
    """A folder of seven pictures."""
    return write_people(tmp_path / "people")


@pytest.fixture
def call_search(capfd) -> Callable[..., Outcome]:
    """`search.py` in this process."""
    import search  # not for tests of a part alone

    def call(*arguments) -> Outcome:
        capfd.readouterr()
        return Outcome(search.main([str(argument) for argument in arguments]), *capfd.readouterr())

    return call


@pytest.fixture
def make_index(call_search, clip) -> Callable[..., Outcome]:
    """`search.py index`, with the tiny CLIP unless another is given."""

    def index(folder: Path, *arguments) -> Outcome:
        weights = () if "--checkpoint" in arguments else ("--checkpoint", clip, "--set", GELU)
        return call_search("index", folder, *weights, "--workers", 0, "--batch-size", 2, *arguments)

    return index
