"""Runs a function on several gloo ranks of this machine, for tests."""

import atexit
import os
import socket
import uuid
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch

from tests.helpers.fork_server import ROOT, Call, Ended, ForkServer


@cache
def fork_server() -> ForkServer:
    """The server for all tests of this process."""
    server = ForkServer(ROOT)
    atexit.register(server.close)
    return server


def run_on_ranks(world_size: int, function: Callable[..., Any], folder: Path, *arguments: Any) -> list[Any]:
    """Calls `function(ranks, *arguments)` on each rank of a gloo group. Returns: the results in rank order.

    Args:
        function: defined at the top level of a module, so that it can be sent to another process.
        folder: temporary folder for the results.
    """
    ended = fork_ranks(world_size, _run, (function, folder, arguments), dict(os.environ))
    assert not any(ended.statuses), f"exit statuses {ended.statuses}:\n{ended.out}\n{ended.err}"
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(world_size)]


def fork_ranks(
    world_size: int,
    function: Callable[..., int | None],
    arguments: tuple,
    environment: dict[str, str],
    seconds: float = 300,
) -> Ended:
    """Calls `function(*arguments)` in a forked process for each rank, with the environment variables of torchrun."""
    calls = [
        Call(function, arguments, environment | variables | {"OMP_NUM_THREADS": "1"}, ROOT)
        for variables in rank_variables(world_size)
    ]
    return fork_server()(calls, seconds=seconds)


def rank_variables(world_size: int) -> list[dict[str, str]]:
    """Returns what torchrun sets for each rank of one machine, if it does not restart them."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = {
        "GROUP_RANK": 0,
        "GROUP_WORLD_SIZE": 1,
        "WORLD_SIZE": world_size,
        "LOCAL_WORLD_SIZE": world_size,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "TORCHELASTIC_RUN_ID": uuid.uuid4(),
        "TORCHELASTIC_RESTART_COUNT": 0,
        "TORCHELASTIC_MAX_RESTARTS": 0,
    }
    ranks = [common | {"RANK": rank, "LOCAL_RANK": rank} for rank in range(world_size)]
    return [{name: str(value) for name, value in variables.items()} for variables in ranks]


def _run(function: Callable, folder: Path, arguments: tuple) -> None:
    from misc.system.distributed import join_ranks

    with join_ranks("cpu", "gloo", "env://") as ranks:
        torch.save(function(ranks, *arguments), folder / f"rank{ranks.rank}.pt")
