"""The processes that load data: their signals, their batches, and their failures."""

import dataclasses
import multiprocessing
import os
import pickle
import re
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, default_collate, get_worker_info

from misc.errors import UserError
from misc.terminal import report

POLL_SECONDS = 1
"""While a process waits for a batch, it looks this often whether it should stop."""
TIMED_OUT = "DataLoader timed out"
"""How torch's error begins when there is no batch after `POLL_SECONDS`; the next call then waits again."""
LOST_WORKER = re.compile(r"DataLoader worker \(pid\S* [\d, ]+\) (?:is )?([^.]+)")
"""Torch's error when a worker has ended, with the reason."""


def outlive_signals(worker: int) -> None:
    """Makes a loader worker ignore Ctrl-C and SIGTERM, except SIGTERM from its training process.

    The training process finishes its step before it stops, and needs its workers until then. Ctrl-C and torchrun signal
    a whole process group, which the worker leaves here. Schedulers signal every process of a job; the worker survives
    this only if it was forked. Otherwise it already has threads that may receive the signal.

    Windows has neither groups nor SIGTERM from outside, only Ctrl-C. macOS cannot tell who has sent a SIGTERM.
    """
    if not hasattr(os, "setpgrp"):
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        return
    os.setpgrp()
    if hasattr(signal, "sigwaitinfo"):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_exit_on_parent_signal, daemon=True).start()


def _exit_on_parent_signal() -> None:
    parent = multiprocessing.parent_process()  # os.getppid() may be a server that forks the workers
    assert parent is not None
    training = parent.pid
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != training:
        pass
    os._exit(0)


def build_loader(dataset: Any, collate: Callable[[list], Any], *, workers: int, **options: Any) -> DataLoader:
    """Builds a loader whose workers outlive signals and full shared memory. Iterate over it with `received`."""
    return DataLoader(
        dataset,
        collate_fn=_Shared(collate),
        num_workers=workers,
        worker_init_fn=outlive_signals,
        timeout=POLL_SECONDS if workers else 0,
        **options,
    )


def stack(tensors: list[Tensor]) -> Tensor:
    """Stacks tensors like `torch.stack`. In a loader worker, the result is in shared memory if there is enough of it.

    `torch.stack` would need a copy to get there.
    """
    try:
        return default_collate(tensors)
    except RuntimeError:
        return torch.stack(tensors)


class _Unshared(NamedTuple):
    """A batch that a worker sends through its pipe, as there is no shared memory for it, and torch's reason."""

    content: bytes
    reason: str


@dataclasses.dataclass(frozen=True)
class _Shared:
    """Collates samples. A worker also moves the tensors of the batch to shared memory.

    Torch would do this in the thread that sends the batch. An error in that thread loses the batch, and the main
    process would wait for it for ever.
    """

    collate: Callable[[list], Any]

    def __call__(self, samples: list) -> Any:
        batch = self.collate(samples)
        if get_worker_info() is None:
            return batch
        try:
            for tensor in _tensors(batch):
                tensor.share_memory_()
        except RuntimeError as error:
            return _Unshared(pickle.dumps(batch), str(error).splitlines()[0])
        return batch


def _tensors(value: Any) -> Iterator[Tensor]:
    """Returns all tensors in a batch of tuples, lists and dataclasses."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _tensors(item)
    elif dataclasses.is_dataclass(value):
        yield from _tensors([getattr(value, field.name) for field in dataclasses.fields(value)])


def received(loader: DataLoader, stop: Callable[[], bool] = lambda: False) -> Iterator[Any]:
    """Yields the batches of a loader.

    Args:
        stop: called about once per second while there is no batch; True ends the iteration.
    """
    iterator = iter(loader)
    warned = False
    while True:
        try:
            batch = next(iterator)
        except StopIteration:
            return
        except RuntimeError as error:
            if not str(error).startswith(TIMED_OUT):
                raise
            if stop():
                return
            continue
        if isinstance(batch, _Unshared):
            if not warned:
                report(
                    f"warning: loader workers have too little shared memory, so they are slower ({batch.reason}): "
                    "enlarge /dev/shm (docker run --shm-size=8g), or use fewer workers"
                )
            warned, batch = True, pickle.loads(batch.content)
        yield batch


@contextmanager
def reported_workers(option: str) -> Iterator[None]:
    """Reports a loader worker that has ended. Torch raises its error in whatever the main process is doing.

    Args:
        option: how the user sets the number of workers, for the message.

    Raises UserError if a worker has ended.
    """
    try:
        yield
    except RuntimeError as error:
        # If the main process was waiting for the worker, the cause has the reason.
        lost = LOST_WORKER.match(str(error.__cause__)) or LOST_WORKER.match(str(error))
        if lost is None:
            raise
        if hasattr(signal, "SIGCHLD"):  # torch's handler would raise again when the other workers end
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        raise UserError(
            f"a process that decodes images has ended ({lost[1]}): it may have had too little memory; set a lower "
            f"{option}, or {option} 0 to decode without such processes"
        ) from error
