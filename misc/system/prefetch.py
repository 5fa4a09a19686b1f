"""Copies data to the device while the device still computes."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor

Item = TypeVar("Item")


def prefetched(items: Iterable[Item], device: torch.device, move: Callable[[Item], Item]) -> Iterator[Item]:
    """Moves items to a GPU one after another, on a stream of its own. On another device it only moves them.

    Python runs ahead of the GPU. So it asks for the next item while the GPU still computes with the previous one, and a
    copy on its own stream need not wait for that. Only copies from pinned memory overlap.

    Args:
        items: tensors, or dataclasses of tensors.
        device: where to move them.
        move: moves an item to the device without waiting; it may leave an item where it is.
    """
    if device.type != "cuda":
        yield from map(move, items)
        return
    copying = torch.cuda.Stream(device)
    for item in items:
        with torch.cuda.stream(copying):
            moved = move(item)
        computing = torch.cuda.current_stream(device)
        computing.wait_stream(copying)
        for tensor in tensors_in(moved):
            if tensor.is_cuda:
                tensor.record_stream(computing)  # otherwise its memory could be used for the next copy too early
        yield moved


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Returns the tensors in a dataclass, with those in the dataclasses and tuples in it."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple):
        for item in value:
            yield from tensors_in(item)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            yield from tensors_in(getattr(value, field.name))
