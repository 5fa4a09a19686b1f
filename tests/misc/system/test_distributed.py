"""The device of a rank, and the errors of a wrong one. The collectives are tested in test_ranks.py."""

import os
import re
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from misc.errors import UserError
from misc.system import distributed
from misc.system.distributed import Ranks, choose_device, join_ranks, refuse
from misc.system.interruption import Interruption
from tests.helpers.fork_server import ROOT, Call
from tests.helpers.ranks import fork_server, run_on_ranks


@pytest.fixture
def gpus(monkeypatch):
    """A function that pretends that the machine has this number of GPUs; none is used."""

    def pretend(count: int) -> None:
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
        monkeypatch.setattr(distributed, "check_gpu", lambda device: None)

    return pretend


def device_alone(device: str | int) -> tuple[str, str | None]:
    with join_ranks(device, "nccl", "env://") as ranks:
        assert (ranks.rank, ranks.world_size, ranks.is_main) == (0, 1, True)
        return str(ranks.device), ranks.note


@pytest.mark.parametrize(
    ("device", "count", "taken"),
    [("auto", 0, "cpu"), ("auto", 2, "cuda:0"), ("cpu", 2, "cpu"), ("cuda", 1, "cuda:0"), (1, 2, "cuda:1")],
)
def test_device_without_torchrun(gpus, device, count, taken):
    gpus(count)
    assert device_alone(device) == (taken, None)


OLD_DRIVER = "The NVIDIA driver on your system is too old (found version 11040).\nPlease update your GPU driver."
NEW = ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "compute_120"]


@pytest.fixture
def one_gpu(monkeypatch):
    """A function that pretends that there is one GPU, and a torch for CUDA with code for some GPUs."""

    def pretend(capability: tuple[int, int], compiled: list[str]) -> None:
        monkeypatch.setattr(torch.version, "cuda", "12.6")
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A GPU")
        monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: compiled)

    return pretend


@pytest.mark.parametrize(
    ("capability", "compiled"),
    [
        ((7, 5), NEW),
        ((8, 9), NEW),  # from sm_86: the same major version
        ((12, 1), NEW),
        ((13, 0), NEW),  # translated from compute_120
        ((9, 0), ["sm_90a"]),
        ((10, 3), ["sm_80", "sm_100"]),
    ],
)
def test_a_torch_with_code_for_the_gpu_is_accepted(one_gpu, capability, compiled):
    one_gpu(capability, compiled)
    assert device_alone("auto") == ("cuda:0", None)
    assert str(choose_device("cuda:0")) == "cuda:0"


@pytest.mark.parametrize(
    ("capability", "compiled"),
    [
        ((6, 1), NEW),  # a GTX 1080 with a torch that begins at Turing
        ((12, 0), ["sm_50", "sm_80", "sm_86", "sm_90"]),  # a new GPU with an old torch
        ((8, 0), ["sm_86", "compute_90"]),  # a later minor version does not run on an earlier one
        ((10, 3), ["sm_100a", "compute_90a"]),
    ],
)
def test_a_torch_without_code_for_the_gpu_is_one_clear_line(one_gpu, capability, compiled):
    one_gpu(capability, compiled)
    version, name = re.escape(torch.__version__), f"sm_{capability[0]}{capability[1]}"
    for choose in (device_alone, choose_device):
        with pytest.raises(UserError, match=rf"torch {version} has no code .*{name}.*{compiled[0]}.*install"):
            choose("cuda")


def test_a_driver_that_is_too_old_is_one_clear_line(one_gpu, monkeypatch):
    def fail(device: torch.device) -> None:
        raise RuntimeError(OLD_DRIVER)

    one_gpu((8, 0), NEW)
    monkeypatch.setattr(torch.cuda, "get_device_capability", fail)
    for choose in (device_alone, choose_device):
        with pytest.raises(UserError, match=r"cannot use cuda.*found version 11040\).*docs/training.md#install"):
            choose("cuda")


@pytest.mark.parametrize(("count", "taken"), [(0, "cpu"), (2, "cuda:0")])
def test_an_index_of_another_machine_falls_back_with_a_note(gpus, count, taken):
    gpus(count)
    device, note = device_alone(5)
    assert device == taken
    assert "5" in note and taken in note


def test_cuda_without_a_gpu_is_refused(gpus):
    gpus(0)
    with pytest.raises(UserError, match="device: cuda.*device=cpu"):
        device_alone("cuda")


@pytest.mark.parametrize(
    ("device", "count", "message"),
    [
        ("auto", 2, "4 processes.*2 GPUs.*--nproc_per_node=2"),
        (0, 3, "4 processes.*3 GPUs.*--nproc_per_node=3"),
        ("cuda", 0, "device: cuda.*device=cpu"),
    ],
)
def test_more_processes_than_gpus_are_refused(gpus, monkeypatch, device, count, message):
    gpus(count)
    for name, value in {"RANK": "0", "WORLD_SIZE": "4", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "4"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=message), join_ranks(device, "nccl", "env://"):
        pass


def test_after_an_error_a_rank_does_not_wait_for_the_others(monkeypatch):
    """With nccl, destroying the group waits for all ranks, which are in another collective by then."""
    destroyed = []
    monkeypatch.setattr(distributed, "_join", lambda device, *_: distributed.Ranks(0, 1, device))
    monkeypatch.setattr(distributed.dist, "destroy_process_group", lambda: destroyed.append(True))
    for name, value in {"RANK": "0", "WORLD_SIZE": "1"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="mine alone"), join_ranks("cpu", "gloo", "env://"):
        raise UserError("mine alone")
    assert not destroyed
    with join_ranks("cpu", "gloo", "env://"):
        pass
    assert destroyed


def test_other_threads_run_before_the_group_is_destroyed(monkeypatch):
    """Destroying it can wait for a thread of gloo that waits for the GIL: without a pause, both wait for ever."""
    order, collective_done, interval = [], threading.Event(), sys.getswitchinterval()
    monkeypatch.setattr(distributed, "_join", lambda device, *_: distributed.Ranks(0, 1, device))
    monkeypatch.setattr(distributed.dist, "destroy_process_group", lambda: order.append("destroyed"))
    for name, value in {"RANK": "0", "WORLD_SIZE": "1"}.items():
        monkeypatch.setenv(name, value)
    thread = threading.Thread(target=lambda: collective_done.wait() and order.append("thread"))
    thread.start()
    sys.setswitchinterval(60)  # no thread gets the GIL until this one gives it up
    try:
        with join_ranks("cpu", "gloo", "env://"):
            collective_done.set()
    finally:
        sys.setswitchinterval(interval)
    thread.join()
    assert order == ["thread", "destroyed"]


@pytest.mark.parametrize(
    ("torchruns", "restarts", "own_store", "warned"),
    [("2", "3", False, True), ("2", "3", True, False), ("2", "0", False, False), ("1", "3", False, False)],
)
def test_a_warning_if_restarts_of_several_torchruns_would_hang(monkeypatch, torchruns, restarts, own_store, warned):
    monkeypatch.setattr(distributed.dist, "rendezvous", lambda *_: iter([(distributed.dist.HashStore(), 0, 2)]))
    monkeypatch.setattr(distributed.dist, "init_process_group", lambda *_, **__: None)
    for name, value in {
        "RANK": "0",
        "WORLD_SIZE": "2",
        "GROUP_WORLD_SIZE": torchruns,
        "TORCHELASTIC_MAX_RESTARTS": restarts,
        "TORCHELASTIC_USE_AGENT_STORE": str(not own_store),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "29500",
    }.items():
        monkeypatch.setenv(name, value)
    note = distributed._join(torch.device("cpu"), "gloo", "env://").note
    assert (note is not None and "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1" in note) == warned


ONE = {"RANK": "0", "WORLD_SIZE": "1"}
WHOLE = ONE | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        (ONE, "RANK and WORLD_SIZE are set, but MASTER_ADDR and MASTER_PORT not: start it with torchrun, or unset"),
        (ONE | {"MASTER_PORT": "29500"}, "but MASTER_ADDR not"),
        (WHOLE | {"MASTER_ADDR": ""}, "but MASTER_ADDR not"),
        (WHOLE | {"MASTER_PORT": ""}, "but MASTER_PORT not"),
        (WHOLE | {"MASTER_PORT": "http"}, "MASTER_PORT is 'http', not a number"),
        (WHOLE | {"MASTER_PORT": "70000"}, "MASTER_PORT is 70000"),
        *((WHOLE | {name: ""}, f"{name} is '', not a number") for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")),
        (WHOLE | {"RANK": "-1"}, "RANK is '-1', not a number"),
        (WHOLE | {"RANK": "9" * 9999}, "RANK is '9"),
        (WHOLE | {"LOCAL_WORLD_SIZE": "two"}, "LOCAL_WORLD_SIZE is 'two', not a number"),
        (WHOLE | {"RANK": "2", "WORLD_SIZE": "2"}, "RANK is 2 and WORLD_SIZE is 2: start it with torchrun"),
        (WHOLE | {"WORLD_SIZE": "0"}, "RANK is 0 and WORLD_SIZE is 0"),
        ({"SLURM_PROCID": "0", "SLURM_STEP_ID": "batch"}, "SLURM_STEP_ID is 'batch', not a number"),
        ({"SLURM_PROCID": "0", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": ""}, "SLURM_STEP_NUM_TASKS is ''"),
        ({"SLURM_NTASKS": "many"}, "SLURM_NTASKS is 'many'"),
    ],
)
def test_an_environment_variable_of_a_launcher_that_is_missing_or_wrong_is_one_line(monkeypatch, environment, message):
    launchers = ("SLURM_", "MASTER_", "TORCHELASTIC_", "LOCAL_")
    for name in [name for name in os.environ if name.startswith(launchers) or name in ONE]:
        monkeypatch.delenv(name)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=message) as caught, join_ranks("cpu", "gloo", "env://"):
        pass
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    assert refuse(caught.value) == 2


@pytest.mark.parametrize("url", ["here", "tcp://127.0.0.1", "pigeon://127.0.0.1:29500", "tcp://127.0.0.1:http"])
def test_an_address_of_another_form_is_one_line(monkeypatch, url):
    for name, value in ONE.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="distributed.url: .*env://"), join_ranks("cpu", "gloo", url):
        pass


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "Ctrl-C"])
def test_a_signal_ends_a_rank_that_waits_for_the_others_in_vain(number):
    """torch waits for minutes, and Python's handlers do not run meanwhile."""
    (ended,) = fork_server()([Call(wait_in_vain, (number,), dict(os.environ), ROOT)], seconds=60).statuses
    assert ended == -number


def wait_in_vain(number: int) -> None:
    threading.Timer(1.0, os.kill, (os.getpid(), number)).start()
    os.environ.update(WHOLE | {"RANK": "1", "WORLD_SIZE": "2", "MASTER_PORT": "1"})
    with Interruption(), join_ranks("cpu", "gloo", "env://"):
        pass


def find_or_make(ranks: Ranks, path: Path) -> str:
    """Stands for a download of the same file by every rank."""

    def find() -> str:
        if path.exists():
            return "found"
        time.sleep(0.5)  # enough time for another rank to find nothing either
        path.touch()
        return "made"

    return ranks.local_main_first(find)


@pytest.mark.slow
def test_one_rank_of_a_machine_downloads_and_the_others_find_it(tmp_path):
    assert run_on_ranks(3, find_or_make, tmp_path, tmp_path / "file") == ["made", "found", "found"]
    assert find_or_make(Ranks(0, 1, torch.device("cpu")), tmp_path / "alone") == "made"
