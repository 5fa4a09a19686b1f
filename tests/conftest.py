"""Fixtures that several test files share."""

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from tests.helpers.runs import EVERYTHING, Outcome, Run, of_dataset, start_forked
from tests.helpers.searching import GELU, write_clip, write_people
from tests.helpers.tiny_dataset import TinyDataset, write_tiny_dataset
from tests.helpers.trainings import Training

# `make test` passes these on, and a `make` that a test starts would then print more than a user's.
for name in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS"):
    os.environ.pop(name, None)


@pytest.fixture
def tiny_dataset(tmp_path) -> TinyDataset:
    """A dataset that the test may change: 12 training, 4 validation and 5 test identities, two images each."""
    return write_tiny_dataset(tmp_path / "dataset")


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> TinyDataset:
    """The same dataset for all tests that do not change it."""
    return write_tiny_dataset(tmp_path_factory.mktemp("data") / "tiny")


@pytest.fixture(scope="session")
def unstopped(data, tmp_path_factory) -> Run:
    """A run with all features on that was never stopped, to compare resumed runs with."""
    folder = tmp_path_factory.mktemp("unstopped") / "run"
    outcome = start_forked(*EVERYTHING, *of_dataset(data), f"model.saved_path={folder}")
    assert outcome.status == 0, outcome.err
    return Run(folder, outcome)


@pytest.fixture(scope="session")
def unstopped_on_two_ranks(data, tmp_path_factory) -> Callable[..., Run]:
    """A function that returns a run of two ranks with the given arguments, which was never stopped."""
    runs = {}

    def run(*arguments: str, seconds: float = 300) -> Run:
        if arguments not in runs:
            folder = tmp_path_factory.mktemp("unstopped") / "run"
            own = (*EVERYTHING, *of_dataset(data), f"model.saved_path={folder}", *arguments)
            outcome = start_forked(*own, ranks=2, seconds=seconds)
            assert outcome.status == 0, outcome.err
            runs[arguments] = Run(folder, outcome)
        return runs[arguments]

    return run


@pytest.fixture
def training(data, tmp_path) -> Iterator[Callable[..., Training]]:
    """Starts trainings in `tmp_path / "run"`, and kills those that still run when the test ends."""
    started = []

    def begin(*arguments: str, **options) -> Training:
        fixed = (*EVERYTHING, *of_dataset(data), f"model.saved_path={tmp_path / 'run'}")
        started.append(Training((*fixed, *arguments), output=tmp_path / "output.txt", **options))
        return started[-1]

    yield begin
    for each in started:
        if each.process.poll() is None:
            each.kill_all()


@pytest.fixture
def resume(data, tmp_path) -> Callable[..., None]:
    """Continues the training in `tmp_path / "run"` to its end."""

    def go_on(*arguments: str, ranks: int = 1) -> None:
        fixed = (*EVERYTHING, *of_dataset(data), f"model.saved_path={tmp_path / 'run'}")
        outcome = start_forked(*fixed, *arguments, "--resume", ranks=ranks)
        assert outcome.status == 0, outcome.err

    return go_on


@pytest.fixture
def run(monkeypatch, capfd) -> Iterator[Callable[..., Outcome]]:
    """Runs `main.py` in this process, because importing torch again would take most of the time."""
    monkeypatch.delenv("WANDB_PROJECT", raising=False)

    import main  # only for tests of whole runs

    def call(*arguments: str) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["main.py", *map(str, arguments)])
        capfd.readouterr()
        return Outcome(main.main(), *capfd.readouterr())

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # with so little work, several threads only wait for each other
    yield call
    torch.set_num_threads(threads)


@pytest.fixture
def full_disk() -> Iterator[Callable[..., None]]:
    """A function that limits the size of every file that this process writes, in bytes, or ends the limit."""
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size=limits[0]: resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.fixture(scope="session")
def clip(tmp_path_factory) -> Path:
    """Weights of a tiny CLIP, for images of 32 × 32 pixels."""
    return write_clip(tmp_path_factory.mktemp("clip") / "clip.pt")


@pytest.fixture
def people(tmp_path) -> Path:
    """A folder of seven images."""
    return write_people(tmp_path / "people")


@pytest.fixture
def call_search(capfd) -> Callable[..., Outcome]:
    """Runs `search.py` in this process."""
    import search  # only for tests of the whole search

    def call(*arguments) -> Outcome:
        capfd.readouterr()
        return Outcome(search.main([str(argument) for argument in arguments]), *capfd.readouterr())

    return call


@pytest.fixture
def make_index(call_search, clip) -> Callable[..., Outcome]:
    """Runs `search.py index`, with the tiny CLIP unless other weights are given."""

    def index(folder: Path, *arguments) -> Outcome:
        weights = () if "--checkpoint" in arguments else ("--checkpoint", clip, "--set", GELU)
        return call_search("index", folder, *weights, "--workers", 0, "--batch-size", 2, *arguments)

    return index
