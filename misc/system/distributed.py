"""Processes: start and stop, rank, device, and what they tell each other. In one process a collective is the identity.

B rows of this rank, W ranks, G = B · W rows of all ranks.
"""

import os
import signal
import socket
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from misc.errors import UserError

Value = TypeVar("Value")

OWN_STORE = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"
"""Makes the processes of each attempt meet at a store of their own instead of torchrun's."""

NO_GPU = "device: cuda, but torch sees no GPU here: set device=cpu, or install torch for your GPU"


@dataclass(frozen=True)
class Ranks:
    """Where this process stands among all.

    Attributes:
        rank: 0 … world_size - 1; rank 0 writes files.
        world_size: number of processes, each with one device.
        device: what this process computes on.
        note: a warning for the log: another device than the one that was asked for, or restarts that will not work.
        control: gloo group of all processes for what their CPUs tell each other, so that no GPU is waited for.
    """

    rank: int
    world_size: int
    device: torch.device
    note: str | None = None
    control: dist.ProcessGroup | None = None

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def broadcast_from_main(self, function: Callable[[], Value]) -> Value:
        """What `function` gives on rank 0, on every rank; the other ranks do not call it and wait."""
        if self.world_size == 1:
            return function()
        box = [function() if self.is_main else None]
        dist.broadcast_object_list(box, group=self.control)
        return box[0]

    def local_main_first(self, function: Callable[[], Value]) -> Value:
        """What `function` gives, on every rank; the first rank of each machine calls it before the others do, which so
        find done what it leaves on the disk."""
        if self.world_size == 1:
            return function()
        value = function() if local_rank() == 0 else None
        self.all_reduce_max(0)
        return value if local_rank() == 0 else function()

    def all_reduce_max(self, number: int) -> int:
        """The largest of all ranks' numbers."""
        if self.world_size == 1:
            return number
        shared = torch.tensor(number)
        dist.all_reduce(shared, dist.ReduceOp.MAX, group=self.control)
        return int(shared)

    def all_gather_list(self, items: list[str]) -> list[str]:
        """The lists of all ranks, one after another."""
        if self.world_size == 1:
            return items
        lists: list[list[str] | None] = [None] * self.world_size
        dist.all_gather_object(lists, items, group=self.control)
        return [item for part in lists for item in part]


@dataclass(frozen=True)
class Launch:
    """How this process was launched.

    Attributes:
        name: of the launching process: the same for all attempts of one torchrun, and another for any other launch.
        attempt: 0, and one more each time that torchrun started the processes anew.
    """

    name: str
    attempt: int

    @classmethod
    def current(cls) -> "Launch":
        process = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else os.getpid()
        run = os.environ.get("TORCHELASTIC_RUN_ID", "alone")
        # In containers, names and numbers of processes repeat; the time at which they were started does not.
        name = f"{run} {socket.gethostname()} {process} {_start_time(process)}"
        return cls(name, int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)))


def _start_time(process: int) -> str:
    """In ticks since the machine was started; empty where the system has no /proc."""
    status = Path(f"/proc/{process}/stat")
    return status.read_text().rpartition(")")[2].split()[19] if status.is_file() else ""


def local_rank() -> int:
    """Number of this process on its machine; 0 without torchrun."""
    return int(os.environ.get("LOCAL_RANK", 0))


@contextmanager
def join_ranks(device: str | int, backend: str, url: str):
    """Starts this process as one of torchrun's, or alone, and stops it in the end.

    Args:
        device: `auto` (a GPU where there is one), `cpu`, `cuda`, or the index of a GPU; under torchrun each process
            takes the GPU of its local rank.
        backend: `nccl` or `gloo`; processes on the CPU always use gloo.
        url: where the processes meet (torchrun: `env://`).

    Raises UserError when there are more processes than GPUs on this machine, or `cuda` without one.
    """
    distributed = "RANK" in os.environ and "WORLD_SIZE" in os.environ
    if not distributed:
        chosen, note = _single_device(device)
        _select(chosen)
        yield Ranks(0, 1, chosen, note)
        return

    chosen = _device_of_local_rank(device, local_rank(), int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    _select(chosen)
    try:
        yield _join(chosen, backend, url)
    except RuntimeError:
        # Often a collective that lost its peer. The peer tells why, and the launcher ends this process meanwhile.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(10)
        raise
    # After success alone: with nccl this waits for all ranks, and after an error the others are in another collective.
    dist.destroy_process_group()


def _join(device: torch.device, backend: str, url: str) -> Ranks:
    """Meets the other processes."""
    with_nccl = device.type == "cuda" and backend == "nccl"
    store, rank, world_size = next(dist.rendezvous(url, int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])))
    note = None
    if int(os.environ.get("GROUP_WORLD_SIZE", 1)) == 1:
        # torchrun keeps one store for all its attempts: without a name of its own, an attempt reads the addresses that
        # the processes of the one before have left there.
        store = dist.PrefixStore(f"attempt {Launch.current().attempt}", store)
    elif (
        int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)) and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    ):
        # Several torchruns count their attempts differently, so these give no name that is the same on all.
        note = f"restarts need {OWN_STORE}=1 in the environment of every torchrun, else they hang"
    dist.init_process_group(
        "nccl" if with_nccl else "gloo",
        store=store,
        rank=rank,
        world_size=world_size,
        device_id=device if with_nccl else None,
    )
    control = dist.new_group(backend="gloo") if with_nccl else dist.group.WORLD
    return Ranks(rank, world_size, device, note, control)


def _select(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.set_device(device)


def _single_device(device: str | int) -> tuple[torch.device, str | None]:
    gpus = torch.cuda.device_count()
    if device == "cpu" or (device == "auto" and gpus == 0):
        return torch.device("cpu"), None
    if device == "cuda" and gpus == 0:
        raise UserError(NO_GPU)
    if isinstance(device, int) and device >= gpus:
        # Published configurations name a GPU of their authors' machine; they shall run unchanged on any other.
        fallback = torch.device("cuda", 0) if gpus else torch.device("cpu")
        return fallback, f"device: {device} is not among the {gpus} GPUs of this machine; {fallback} is used instead"
    return torch.device("cuda", device if isinstance(device, int) else 0), None


def _device_of_local_rank(device: str | int, rank: int, local_world_size: int) -> torch.device:
    gpus = torch.cuda.device_count()
    if device == "cpu" or (gpus == 0 and device != "cuda"):
        return torch.device("cpu")
    if gpus == 0:
        raise UserError(NO_GPU)
    if local_world_size > gpus:
        raise UserError(
            f"{local_world_size} processes on a machine with {gpus} GPUs: start torchrun with "
            f"--nproc_per_node={gpus}, or set device=cpu"
        )
    return torch.device("cuda", rank)


class _GatherWithGradient(torch.autograd.Function):
    """Rows of all ranks; the gradient of a row is the sum of what every rank found for it ("global gradients")."""

    @staticmethod
    def forward(context, rows: Tensor) -> Tensor:
        return _all_gather(rows)

    @staticmethod
    def backward(context, gradient: Tensor) -> Tensor:
        own = gradient.new_empty(len(gradient) // dist.get_world_size(), *gradient.shape[1:])
        dist.reduce_scatter_single(own, gradient.contiguous())
        return own


def gather(rows: Tensor) -> Tensor:
    """(B, …) of this rank → (G, …) of all ranks, in rank order, with gradient to every rank; B is equal on all."""
    if not _several():
        return rows
    return _GatherWithGradient.apply(rows)


def gather_detached(rows: Tensor) -> Tensor:
    """`gather` with gradient to this rank's own rows alone, as CLIP is usually trained."""
    if not _several():
        return rows
    gathered, start = _all_gather(rows.detach()), dist.get_rank() * len(rows)
    return torch.cat([gathered[:start], rows, gathered[start + len(rows) :]])


def gather_strided(rows: Tensor, total: int) -> Tensor:
    """Puts together what was dealt out in turn: rank r holds items r, r + W, r + 2W, … of `total`.

    Args:
        rows: (n, …) this rank's items, n differing by at most one between ranks.
        total: number of items of all ranks.

    Returns: (total, …) in the original order, without gradient.
    """
    if not _several():
        return rows
    world_size = dist.get_world_size()
    longest = -(-total // world_size)
    padded = torch.cat([rows, rows.new_zeros(longest - len(rows), *rows.shape[1:])])
    gathered = _all_gather(padded).unflatten(0, (world_size, longest))
    return gathered.transpose(0, 1).flatten(0, 1)[:total]


def _all_gather(rows: Tensor) -> Tensor:
    gathered = rows.new_empty(dist.get_world_size() * len(rows), *rows.shape[1:])
    dist.all_gather_single(gathered, rows.contiguous())
    return gathered


def mean_over_ranks(values: Tensor) -> Tensor:
    """Elementwise mean of a tensor over all ranks, without gradient."""
    if not _several():
        return values
    total = values.detach().clone()
    dist.all_reduce(total)
    return total / dist.get_world_size()


def _several() -> bool:
    return dist.is_initialized() and dist.get_world_size() > 1


def choose_device(name: str) -> torch.device:
    """The device of a script's option `--device`: `auto` (a GPU where there is one), `cpu`, `cuda` or `cuda:N`.

    Raises UserError for others, and where there is no such GPU.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"--device {name}: give auto, cpu, cuda or cuda:N") from error
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"--device {name}: give auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"--device {name}: torch sees {torch.cuda.device_count()} GPUs here: give another, or cpu")
    return device
