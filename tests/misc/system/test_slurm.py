"""Ranks that SLURM started: which variables mean what, and a training of two tasks without torchrun."""

import os
import re
import shutil
import socket
import subprocess

import pytest
import torch

from misc.errors import UserError
from misc.system.distributed import _device_of_local_rank, join_ranks, local_rank
from misc.system.slurm import expand_counts, first_host, torchrun_variables
from tests.helpers.fork_server import ROOT, Call
from tests.helpers.ranks import fork_server
from tests.helpers.runs import EVERYTHING, environment, finished, of_dataset, run_main

ALLOCATION = {
    "SLURM_JOB_ID": "4711",
    "SLURM_NTASKS": "5",
    "SLURM_NNODES": "3",
    "SLURM_TASKS_PER_NODE": "2(x2),1",
    "SLURM_JOB_NODELIST": "node[07-08],gpu1",
}
"""What the shell of salloc and a batch script have."""
TASK = ALLOCATION | {
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "5",
    "SLURM_STEP_NUM_NODES": "3",
    "SLURM_STEP_NODELIST": "node[07-08],gpu1",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2),1",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
}
"""What the fourth of five tasks has."""
MACHINE = {
    "SLURM_NODEID": "0",
    "SLURM_STEP_NUM_NODES": "1",
    "SLURM_STEP_TASKS_PER_NODE": "2",
    "SLURM_STEP_NODELIST": "no-such-host",
}


@pytest.mark.parametrize(
    ("hosts", "first"),
    [
        ("node01", "node01"),
        ("node01,node02", "node01"),
        ("node[01-03,7],gpu5", "node01"),
        ("node[7,01-03]", "node7"),
        ("a-b[2-4]-x,c", "a-b2-x"),
        ("rack[1-2]node[003-9]", "rack1node003"),
        ("gpu5.cluster.org,node[1-2]", "gpu5.cluster.org"),
    ],
)
def test_the_first_host_of_a_list(hosts, first):
    assert first_host(hosts) == first


def test_tasks_of_each_node():
    assert expand_counts("2(x3),1") == [2, 2, 2, 1]
    assert expand_counts("4") == [4]


def test_a_task_of_srun_gets_what_torchrun_would_set():
    found = torchrun_variables(TASK)
    port = int(found.pop("MASTER_PORT"))
    assert found == {
        "RANK": "3",
        "WORLD_SIZE": "5",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "node07",
    }
    assert 1024 < port < 32768
    others = [TASK | {"SLURM_JOB_ID": "4712"}, TASK | {"SLURM_STEP_ID": "1"}]
    assert all(int(torchrun_variables(other)["MASTER_PORT"]) != port for other in others)


def test_the_last_node_has_fewer_tasks():
    assert torchrun_variables(TASK | {"SLURM_NODEID": "2"})["LOCAL_WORLD_SIZE"] == "1"


def test_the_users_own_address_and_port_count():
    own = {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}
    assert torchrun_variables(TASK | own).items() >= own.items()


@pytest.mark.parametrize(
    "environment",
    [
        {},
        ALLOCATION,
        ALLOCATION | {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"},  # a batch script
        # The shell of a newer salloc is a step of its own, with a reserved number.
        TASK | {"SLURM_STEP_ID": "4294967290", "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"},
        TASK | {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"},  # srun --ntasks=1
        TASK | {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"},  # torchrun, started by srun
    ],
    ids=["no SLURM", "salloc", "batch script", "interactive step", "one task", "torchrun"],
)
def test_nothing_is_taken_from_slurm_where_no_other_task_joins(environment):
    assert torchrun_variables(environment) == {}


def test_without_a_list_of_hosts_the_address_is_asked_for():
    unknown = {name: value for name, value in TASK.items() if "NODELIST" not in name}
    with pytest.raises(UserError, match="SLURM_STEP_NODELIST .*set MASTER_ADDR"):
        torchrun_variables(unknown)
    assert torchrun_variables(unknown | {"MASTER_ADDR": "node07"})["MASTER_ADDR"] == "node07"


@pytest.fixture
def slurm(monkeypatch):
    """A function that sets environment variables, in place of those of another launcher."""
    for name in [name for name in os.environ if name.startswith(("SLURM_", "TORCHELASTIC_"))]:
        monkeypatch.delenv(name)

    def pretend(variables: dict[str, str]) -> None:
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return pretend


def test_without_srun_a_process_runs_alone_and_says_so(slurm):
    slurm(ALLOCATION)
    with join_ranks("cpu", "gloo", "env://") as ranks:
        assert (ranks.rank, ranks.world_size) == (0, 1)
        assert "5 tasks" in ranks.note and "srun python main.py" in ranks.note


def test_the_local_rank_is_known_before_the_ranks_join(slurm):
    slurm(TASK)
    assert local_rank() == 1


def test_a_port_that_is_in_use_is_one_clear_line(slurm):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1])
        slurm({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port})
        with pytest.raises(UserError, match=f"port {port} is in use.*MASTER_PORT"), join_ranks("cpu", "gloo", "env://"):
            pass


def test_a_task_that_sees_only_its_own_gpu_takes_it(slurm, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(UserError, match="2 processes on a machine with 1 GPUs.*--ntasks-per-node=1"):
        _device_of_local_rank("auto", 1, 2)
    slurm({"SLURM_GPUS_ON_NODE": "2", "LOCAL_WORLD_SIZE": "2"})
    assert _device_of_local_rank("auto", 1, 2) == torch.device("cuda", 0)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_the_batch_script_of_the_documents_resumes_and_is_queued_again(tmp_path):
    """With an srun that a signal stops in the first job, while the shell gets the signal too."""
    (script,) = re.findall(r"```bash\n(#!/bin/bash\n.*?)```", (ROOT / "docs/training.md").read_text("utf-8"), re.DOTALL)
    srun = """#!/bin/bash
echo srun "$@"
[ -f runs/full/checkpoint_last.pth ] && exit 0
mkdir -p runs/full && touch runs/full/checkpoint_last.pth
kill -TERM $PPID
exit 143
"""
    stubs = {"job": script, "srun": srun, "scontrol": '#!/bin/bash\necho scontrol "$@"\n', ".venv/bin/activate": ""}
    for name, content in stubs.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content, encoding="utf-8")
        path.chmod(0o755)
    own = os.environ | {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}", "SLURM_JOB_ID": "4711"}
    ended = [subprocess.run(["./job"], cwd=tmp_path, env=own, capture_output=True, text=True) for _ in range(2)]
    assert [(job.returncode, job.stderr) for job in ended] == [(143, ""), (0, "")]
    first, second = (job.stdout.splitlines() for job in ended)
    assert first[0] + " --resume" == second[0] and "main.py" in first[0]
    assert (first[1:], second[1:]) == (["scontrol requeue 4711"], [])


@pytest.mark.slow
def test_two_tasks_of_srun_train_together(data, tmp_path):
    words = ["main.py", *EVERYTHING, *of_dataset(data), f"model.saved_path={tmp_path / 'run'}", "schedule.epoch=1"]
    job = {"SLURM_JOB_ID": str(os.getpid()), "SLURM_NTASKS": "2", "SLURM_STEP_NUM_TASKS": "2"}
    tasks = [{"SLURM_PROCID": str(number), "SLURM_LOCALID": str(number)} for number in (1, 0)]
    calls = [Call(run_main, (words,), environment() | TASK | MACHINE | job | task, ROOT) for task in tasks]
    ended = fork_server()(calls)
    assert ended.statuses == [0, 0], ended.err
    (record,) = finished(tmp_path / "run").records
    assert record["loss"] > 0
    assert ended.out.count("2 process(es)") == 1  # only the first task reports


@pytest.mark.slow
def test_a_mistake_under_srun_is_one_line(data):
    words = ["main.py", *EVERYTHING, *of_dataset(data), "data.batch_size=0"]
    tasks = [{"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)} for rank in (0, 1)]
    calls = [Call(run_main, (words,), environment() | TASK | MACHINE | task, ROOT) for task in tasks]
    ended = fork_server()(calls)  # ends the other task as `srun --kill-on-bad-exit` does
    assert ended.statuses[0] == 2, ended.err
    (line,) = ended.err.splitlines()
    assert "data.batch_size: 0" in line
