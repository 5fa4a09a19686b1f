"""Loader workers: batches without shared memory, workers that end, and workers that never answer."""

import os
import re
import signal
import time
from collections.abc import Callable
from contextlib import closing

import pytest
import torch
from torch.utils.data import Dataset

from misc.data.workers import build_loader, received, reported_workers, stack
from misc.errors import UserError
from misc.system.distributed import Ranks
from tests.helpers.ranks import run_on_ranks

SIZE = 100_000
"""Bytes of a tensor."""


class Tensors(Dataset):
    """Ten tensors, whose values are their numbers."""

    def __len__(self) -> int:
        return 10

    def __getitem__(self, number: int) -> torch.Tensor:
        return torch.full((SIZE,), number, dtype=torch.uint8)


class Killed(Tensors):
    """Its worker is killed, as by a system that has no memory left."""

    def __getitem__(self, number: int) -> torch.Tensor:
        if number == 4:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(number)


class Stuck(Tensors):
    """Its worker does not answer for some seconds, as on a network disk whose server has gone."""

    def __getitem__(self, number: int) -> torch.Tensor:
        time.sleep(3 * (number == 4))
        return super().__getitem__(number)


def collate(tensors: list[torch.Tensor]) -> tuple[list[int], torch.Tensor]:
    return [int(tensor[0]) for tensor in tensors], torch.stack(tensors)


def collate_shared(tensors: list[torch.Tensor]) -> tuple[list[int], torch.Tensor]:
    return [int(tensor[0]) for tensor in tensors], stack(tensors)


def loader(dataset: Dataset, workers: int = 2, collate: Callable = collate):
    return build_loader(dataset, collate, workers=workers, batch_size=2)


def check(batches: list) -> None:
    assert [numbers for numbers, _ in batches] == [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9]]
    assert all((tensors == torch.tensor(numbers)[:, None]).all() for numbers, tensors in batches)


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_the_number_of_workers_does_not_matter(workers, capfd):
    check(list(received(loader(Tensors(), workers))))
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("collate", [collate, collate_shared])
def test_batches_that_do_not_fit_into_shared_memory_arrive(full_disk, capfd, collate):
    full_disk(SIZE // 2)  # shared memory consists of files
    check(list(received(loader(Tensors(), collate=collate))))
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("warning: loader workers have too little shared memory") and "--shm-size" in line


def lose_a_worker(ranks: Ranks) -> str:
    """Returns the message about a killed worker."""
    try:
        with reported_workers("data.num_workers"):
            list(received(loader(Killed())))
    except UserError as error:
        time.sleep(0.5)  # the other worker ends too, and the system reports it
        return str(error)
    return ""


def test_a_worker_that_has_ended_is_reported(tmp_path):
    """In a process of its own, because torch reports a worker in whatever the process is doing."""
    (message,) = run_on_ranks(1, lose_a_worker, tmp_path)
    assert re.search(r"has ended \(killed by signal: Killed\).*data.num_workers 0", message), message


def test_other_errors_of_a_worker_keep_their_traceback():
    class Broken(Tensors):
        def __getitem__(self, number: int) -> torch.Tensor:
            raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug") as raised, reported_workers("data.num_workers"):
        list(received(loader(Broken())))
    assert not isinstance(raised.value, UserError)


def test_waiting_for_a_worker_can_be_stopped():
    asked = []
    with closing(received(loader(Stuck()), lambda: asked.append(1) or len(asked) == 2)) as batches:
        assert [numbers for numbers, _ in batches] == [[0, 1], [2, 3]]
    assert len(asked) == 2
