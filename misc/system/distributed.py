"""Ranks: how they start and stop, their devices, and their collectives. With one rank a collective is the identity.

B rows of this rank, W ranks, G = B · W rows of all ranks.
"""

import os
import re
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from misc.errors import UserError
from misc.files import is_file
from misc.system import slurm
from misc.system.precision import disable_tf32
from misc.terminal import report

Value = TypeVar("Value")

OWN_STORE = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"
"""Environment variable that gives the ranks of each attempt their own store instead of torchrun's."""

# Newer releases of torch have renamed these collectives. The former names are those of torch 2.4.
_all_gather_single = dist.all_gather_single if hasattr(dist, "all_gather_single") else dist.all_gather_into_tensor
_reduce_scatter_single = (
    dist.reduce_scatter_single if hasattr(dist, "reduce_scatter_single") else dist.reduce_scatter_tensor
)

LAUNCH = "start it with torchrun, or unset RANK and WORLD_SIZE to start one process"

SECONDS_TO_RELEASE = 0.1
"""How long gloo's threads get to release the tensors of the last collectives. They need microseconds of CPU time."""

NO_GPU = "device: cuda, but torch finds no GPU on this machine: set device=cpu, or install torch for your GPU"


@dataclass(frozen=True)
class Ranks:
    """The rank of this process, and the collectives of all ranks.

    Attributes:
        rank: 0 … world_size - 1; rank 0 writes files.
        world_size: number of ranks, each with one device.
        device: the device of this rank.
        note: a warning for the log: the requested device was replaced, or restarts will not work.
        control: gloo group of all ranks, which exchanges values between CPUs without waiting for a GPU.
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
        """Calls `function` on rank 0 only, and returns its result on every rank."""
        if self.world_size == 1:
            return function()
        results = [function() if self.is_main else None]
        dist.broadcast_object_list(results, group=self.control)
        return cast(Value, results[0])  # on every rank now the result of rank 0

    def local_main_first(self, function: Callable[[], Value]) -> Value:
        """Calls `function` on the first rank of each machine, then on its other ranks.

        So the other ranks find the files that the first one has written, for example a download.

        Returns: the result of this rank's own call.
        """
        if self.world_size == 1:
            return function()
        if local_rank() == 0:
            value = function()
            self.all_reduce_max(0)
            return value
        self.all_reduce_max(0)
        return function()

    def all_reduce_max(self, number: int) -> int:
        """Returns the largest of all ranks' numbers."""
        if self.world_size == 1:
            return number
        shared = torch.tensor(number)
        dist.all_reduce(shared, dist.ReduceOp.MAX, group=self.control)
        return int(shared)

    def all_gather_list(self, items: list[str]) -> list[str]:
        """Concatenates the lists of all ranks, in rank order."""
        if self.world_size == 1:
            return items
        lists: list[list[str]] = [[] for _ in range(self.world_size)]
        dist.all_gather_object(lists, items, group=self.control)
        return [item for part in lists for item in part]


@dataclass(frozen=True)
class Launch:
    """How this process was launched.

    Attributes:
        name: identifies the launching process: equal for all attempts of one torchrun, different for any other launch.
        attempt: how often torchrun has restarted the processes.
    """

    name: str
    attempt: int

    @classmethod
    def current(cls) -> "Launch":
        process = os.getppid() if under_torchrun() else os.getpid()
        run = os.environ.get("TORCHELASTIC_RUN_ID", "alone")
        # In containers, host names and process ids repeat; start times do not.
        name = f"{run} {socket.gethostname()} {process} {_start_time(process)}"
        return cls(name, slurm.number(os.environ, "TORCHELASTIC_RESTART_COUNT", 0))


def _start_time(process: int) -> str:
    """Returns when a process started, in ticks since the machine started; empty if the system has no /proc."""
    status = Path(f"/proc/{process}/stat")
    return status.read_text(encoding="utf-8").rpartition(")")[2].split()[19] if is_file(status) else ""


def under_torchrun() -> bool:
    """Returns whether torchrun has started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def local_rank() -> int:
    """Returns the number of this process on its machine; 0 without torchrun and SLURM.

    Raises UserError if an environment variable of theirs is invalid.
    """
    variable = "SLURM_LOCALID" if slurm.joined_tasks(os.environ) > 1 else "LOCAL_RANK"
    return slurm.number(os.environ, variable, 0)


def refuse(error: UserError) -> int:
    """Prints one line, once: all ranks of a machine meet the same mistake, and the first of them reports it.

    The others wait for the launcher to end them. If it does not, the mistake is theirs only, and they report it.

    Returns: the exit status.
    """
    with suppress(UserError):  # perhaps the mistake to report
        if local_rank() > 0:
            time.sleep(5)
    report(f"error: {error}")
    return 2


@contextmanager
def join_ranks(device: str | int, backend: str, url: str) -> Iterator[Ranks]:
    """Joins the ranks that torchrun or SLURM's srun started, and leaves them at the end. Otherwise there is one rank.

    Args:
        device: `auto` (a GPU if there is one), `cpu`, `cuda`, or the index of a GPU. Under torchrun and srun, each rank
            takes the GPU of its local rank.
        backend: `nccl` or `gloo`; ranks on the CPU always use gloo.
        url: address at which the ranks meet (torchrun: `env://`).

    Raises UserError if this machine has more ranks than GPUs, if `device` is `cuda` and there is no GPU, if torch
    cannot use the GPU, or if the port of the address is in use.
    """
    if tasks := slurm.unused_tasks(os.environ):
        alone = f"SLURM gives this job {tasks} tasks, but only one runs: start it with `srun python main.py`"
    else:
        alone = None
    os.environ.update(slurm.torchrun_variables(os.environ))
    distributed = "RANK" in os.environ and "WORLD_SIZE" in os.environ
    if not distributed:
        chosen, note = _single_device(device)
        _select(chosen)
        yield Ranks(0, 1, chosen, "; ".join(filter(None, (note, alone))) or None)
        return

    chosen = _device_of_local_rank(device, local_rank(), slurm.number(os.environ, "LOCAL_WORLD_SIZE", 1))
    _select(chosen)
    try:
        yield _join(chosen, backend, url)
    except RuntimeError:
        # Often a collective whose peer failed. The peer reports why, and the launcher ends this process meanwhile.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(10)
        raise
    # After a collective, gloo's thread releases the tensors; it needs the GIL if Python has dropped them. In torch 2.6,
    # the main thread holds the GIL while the group's destructor waits for that thread, so both wait for ever: in two of
    # twelve evaluations on a busy machine. Sleeping gives up the GIL, so the thread finishes first. 2.14 does not hang.
    time.sleep(SECONDS_TO_RELEASE)
    # Only after success: with nccl this waits for all ranks, which after an error are in another collective.
    dist.destroy_process_group()


def _join(device: torch.device, backend: str, url: str) -> Ranks:
    """Creates the process group of all ranks."""
    with_nccl = device.type == "cuda" and backend == "nccl"
    rank, world_size = (slurm.number(os.environ, name, 0) for name in ("RANK", "WORLD_SIZE"))
    if rank >= world_size:
        raise UserError(f"RANK is {rank} and WORLD_SIZE is {world_size}: {LAUNCH}")
    if url.startswith("env://"):
        if missing := [name for name in ("MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]:
            raise UserError(f"RANK and WORLD_SIZE are set, but {' and '.join(missing)} not: {LAUNCH}")
        if slurm.number(os.environ, "MASTER_PORT", 0) > 65535:
            raise UserError(f"MASTER_PORT is {os.environ['MASTER_PORT']}: set it to at most 65535")
    try:
        with _signals_end_this_process():  # torch waits for rank 0 for minutes, in code that runs no handler of Python
            store, rank, world_size = next(dist.rendezvous(url, rank, world_size))
    except (RuntimeError, ValueError) as error:
        if "EADDRINUSE" in str(error):
            port = os.environ.get("MASTER_PORT")
            raise UserError(
                f"port {port} is in use on this machine: set another MASTER_PORT for all processes"
            ) from error
        if isinstance(error, ValueError) or "rendezvous handler" in str(error):
            raise UserError(f"distributed.url: {url} is no address ({error}): set it to env://") from error
        raise
    note = None
    if slurm.number(os.environ, "GROUP_WORLD_SIZE", 1) == 1:
        # torchrun keeps one store for all its attempts. Without its own prefix, an attempt would read the addresses
        # that the previous attempt left there.
        store = dist.PrefixStore(f"attempt {Launch.current().attempt}", store)
    elif (
        slurm.number(os.environ, "TORCHELASTIC_MAX_RESTARTS", 0)
        and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    ):
        # Several torchruns count their attempts differently, so the attempt gives no prefix that is equal on all.
        note = f"restarts hang without {OWN_STORE}=1: set it in the environment of every torchrun"
    dist.init_process_group(
        "nccl" if with_nccl else "gloo",
        store=store,
        rank=rank,
        world_size=world_size,
        device_id=device if with_nccl else None,
    )
    control = dist.new_group(backend="gloo") if with_nccl else dist.group.WORLD
    # Never None, because every rank is in the group.
    return Ranks(rank, world_size, device, note, cast(dist.ProcessGroup, control))


@contextmanager
def _signals_end_this_process() -> Iterator[None]:
    """Makes Ctrl-C and SIGTERM end this process at once, as it has nothing to save."""
    numbers = (signal.SIGINT, signal.SIGTERM)
    handlers = {number: signal.signal(number, signal.SIG_DFL) for number in numbers}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler or signal.SIG_DFL)


def _select(device: torch.device) -> None:
    if device.type == "cuda":
        check_gpu(device)
        torch.cuda.set_device(device)
        disable_tf32()


def check_gpu(device: torch.device) -> None:
    """Checks that the installed torch can use a GPU, before any data is read.

    Raises UserError if torch contains no code for this GPU, or if the driver is too old for torch.
    """
    remedy = "install a torch for your GPU and driver (docs/training.md#install), or compute on the CPU with device=cpu"
    if torch.version.cuda is None:  # ROCm names its code in another way
        return
    try:
        capability = torch.cuda.get_device_capability(device)
    except RuntimeError as error:  # for example an old driver
        reason = str(error).partition("\n")[0]
        raise UserError(f"torch {torch.__version__} cannot use {device} ({reason}): {remedy}") from error
    compiled = torch.cuda.get_arch_list()
    if not _runs_on(compiled, capability):
        raise UserError(
            f"torch {torch.__version__} has no code for {device}, {torch.cuda.get_device_name(device)} "
            f"(sm_{capability[0]}{capability[1]}), only for {' '.join(compiled)}: {remedy}"
        )


def _runs_on(compiled: list[str], capability: tuple[int, int]) -> bool:
    """Whether code runs on a GPU of a compute capability.

    Binary code (`sm_86`) runs on the same major version from its minor version on. PTX (`compute_86`) is translated for
    every later GPU. Code with a letter (`sm_90a`) is only for that version.
    """
    for kind, number, letter in re.findall(r"\b(sm|compute)_(\d+)([a-z]?)", " ".join(compiled)):
        version = (int(number[:-1]), int(number[-1]))
        if version == capability or (not letter and version <= capability and kind == "compute"):
            return True
        if not letter and version[0] == capability[0] and version <= capability:
            return True
    return False


def _single_device(device: str | int) -> tuple[torch.device, str | None]:
    gpus = torch.cuda.device_count()
    if device == "cpu" or (device == "auto" and gpus == 0):
        return torch.device("cpu"), None
    if device == "cuda" and gpus == 0:
        raise UserError(NO_GPU)
    if isinstance(device, int) and device >= gpus:
        # Published configurations name a GPU of their authors' machine; they must run unchanged on any other.
        fallback = torch.device("cuda", 0) if gpus else torch.device("cpu")
        return fallback, f"device: {device} is not among the {gpus} GPUs of this machine; {fallback} is used instead"
    return torch.device("cuda", device if isinstance(device, int) else 0), None


def _device_of_local_rank(device: str | int, rank: int, local_world_size: int) -> torch.device:
    gpus = torch.cuda.device_count()
    if device == "cpu" or (gpus == 0 and device != "cuda"):
        return torch.device("cpu")
    if gpus == 0:
        raise UserError(NO_GPU)
    if local_world_size > gpus and not slurm.binds_gpus(os.environ):
        raise UserError(
            f"{local_world_size} processes on a machine with {gpus} GPUs: start torchrun with "
            f"--nproc_per_node={gpus} (srun: --ntasks-per-node={gpus}), or set device=cpu"
        )
    return torch.device("cuda", rank % gpus)


class _GatherWithGradient(torch.autograd.Function):
    """Gathers the rows of all ranks. The gradient of a row is the sum of its gradients on all ranks."""

    @staticmethod
    def forward(context, rows: Tensor) -> Tensor:
        return _all_gather(rows)

    @staticmethod
    def backward(context, gradient: Tensor) -> Tensor:
        own = gradient.new_empty(len(gradient) // dist.get_world_size(), *gradient.shape[1:])
        _reduce_scatter_single(own, gradient.contiguous())
        return own


def gather(rows: Tensor) -> Tensor:
    """Gathers (B, …) of each rank to (G, …) in rank order, with gradient to every rank. B is equal on all ranks."""
    if not _several_ranks():
        return rows
    return _GatherWithGradient.apply(rows)


def gather_detached(rows: Tensor) -> Tensor:
    """Gathers like `gather`, but with gradient to this rank's own rows only, as CLIP is usually trained."""
    if not _several_ranks():
        return rows
    gathered, start = _all_gather(rows.detach()), dist.get_rank() * len(rows)
    return torch.cat([gathered[:start], rows, gathered[start + len(rows) :]])


def gather_strided(rows: Tensor, total: int) -> Tensor:
    """Gathers items that were dealt out in turn: rank r has items r, r + W, r + 2W, … of `total`.

    Args:
        rows: (n, …) this rank's items; n differs by at most one between ranks.
        total: number of items of all ranks.

    Returns: (total, …) in the original order, without gradient.
    """
    if not _several_ranks():
        return rows
    world_size = dist.get_world_size()
    longest = -(-total // world_size)
    padded = torch.cat([rows, rows.new_zeros(longest - len(rows), *rows.shape[1:])])
    gathered = _all_gather(padded).unflatten(0, (world_size, longest))
    return gathered.transpose(0, 1).flatten(0, 1)[:total]


def _all_gather(rows: Tensor) -> Tensor:
    gathered = rows.new_empty(dist.get_world_size() * len(rows), *rows.shape[1:])
    _all_gather_single(gathered, rows.contiguous())
    return gathered


def mean_over_ranks(values: Tensor) -> Tensor:
    """Returns the elementwise mean of a tensor over all ranks, without gradient."""
    if not _several_ranks():
        return values
    total = values.detach().clone()
    dist.all_reduce(total)
    return total / dist.get_world_size()


def _several_ranks() -> bool:
    return dist.is_initialized() and dist.get_world_size() > 1


def choose_device(name: str) -> torch.device:
    """Returns the device of a script's option `--device`: `auto` (a GPU if there is one), `cpu`, `cuda` or `cuda:N`.

    Raises UserError if the name is another one, if there is no such GPU, or if torch cannot use it.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"--device {name}: give auto, cpu, cuda or cuda:N") from error
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"--device {name}: give auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"--device {name}: torch finds {torch.cuda.device_count()} GPUs: give another one, or cpu")
    if device.type == "cuda":
        check_gpu(device)
    return device
