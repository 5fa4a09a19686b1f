"""Copies beside computing: the same items in the same order, on the CPU and, in pretence, on a GPU."""

from contextlib import contextmanager
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from misc.system.prefetch import prefetched, tensors_in


@dataclass
class Pair:
    first: Tensor
    others: tuple[Tensor, Tensor] | None
    name: str


def test_on_a_cpu_items_are_only_moved():
    items = [torch.tensor(1), torch.tensor(2)]
    assert list(prefetched(iter(items), torch.device("cpu"), lambda item: item + 1)) == [2, 3]


def test_every_tensor_in_a_dataclass_is_found():
    tensors = [torch.tensor(number) for number in range(4)]
    nested = (Pair(tensors[0], (tensors[1], tensors[2]), "x"), Pair(tensors[3], None, "y"))
    assert [id(tensor) for tensor in tensors_in(nested)] == [id(tensor) for tensor in tensors]


@pytest.mark.parametrize("moved", [True, False])
def test_on_a_gpu_each_copy_has_its_own_stream_and_computing_waits_for_it(moved, monkeypatch):
    """The calls in their order; an item is asked for only after the one before it is in use.

    A batch that is encoded in chunks is not moved, and torch cannot record a stream for a tensor on the CPU.
    """
    calls = []

    class Stream:
        def __init__(self, name):
            self.name = name

        def wait_stream(self, other):
            calls.append(f"{self.name} waits for {other.name}")

    @contextmanager
    def on(stream):
        calls.append(f"on {stream.name}")
        yield
        calls.append(f"off {stream.name}")

    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream("copying"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream("computing"))
    monkeypatch.setattr(torch.cuda, "stream", on)

    def record_stream(tensor, stream):
        calls.append(f"{int(tensor)} used by {stream.name}")

    monkeypatch.setattr(Tensor, "record_stream", record_stream)
    monkeypatch.setattr(Tensor, "is_cuda", moved)

    def items():
        for number in (1, 2):
            calls.append(f"load {number}")
            yield torch.tensor(number)

    def move(item):
        calls.append(f"copy {int(item)}")
        return item

    for item in prefetched(items(), torch.device("cuda", 0), move):
        calls.append(f"compute {int(item)}")
    assert calls == [
        call.format(n=number)
        for number in (1, 2)
        for call in (
            "load {n}",
            "on copying",
            "copy {n}",
            "off copying",
            "computing waits for copying",
            *(["{n} used by computing"] if moved else []),
            "compute {n}",
        )
    ]
