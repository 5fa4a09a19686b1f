"""Runs a function on several gloo ranks of this machine, for tests."""

import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as multiprocessing


def run_on_ranks(world_size: int, function: Callable[..., Any], folder: Path, *arguments: Any) -> list[Any]:
    """Calls `function(ranks, *arguments)` on each rank of a gloo group. Returns: the results in rank order.

    Args:
        function: defined at the top level of a module, so that it can be sent to another process.
        folder: temporary folder for the results.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    multiprocessing.spawn(_run, (world_size, port, function, str(folder), arguments), nprocs=world_size)
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(world_size)]


def _run(rank: int, world_size: int, port: int, function: Callable, folder: str, arguments: tuple) -> None:
    from misc.system.distributed import join_ranks

    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    with join_ranks("cpu", "gloo", "env://") as ranks:
        torch.save(function(ranks, *arguments), Path(folder) / f"rank{rank}.pt")
