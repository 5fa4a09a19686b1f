"""Ranks that SLURM's `srun` started: its environment variables, translated into those that torchrun sets."""

import re
from collections.abc import Mapping

from misc.errors import UserError

RESERVED_STEPS = 0xFFFFFFF0
"""Numbers of steps from here on are not of `srun` in a job, but for example of the shell that `salloc` opens."""
FIRST_PORT, PORTS = 10_000, 20_000
"""Ports for the ranks to meet at: below those that systems give to outgoing connections."""


def number(environment: Mapping[str, str], name: str, default: int) -> int:
    """Returns the number in an environment variable, or the default if it is not set.

    Raises UserError if it is no number.
    """
    text = environment.get(name, str(default))
    if not (text.isascii() and text.isdecimal() and len(text) < 19):
        raise UserError(f"the environment variable {name} is {text!r}, not a number: correct it, or unset it")
    return int(text)


def joined_tasks(environment: Mapping[str, str]) -> int:
    """Returns how many tasks `srun` has started together with this one.

    It is 1 if torchrun or another launcher has set its own variables, which count, and if this process is the only
    task: the shell of `salloc` and a batch script have SLURM's variables too, but no other task joins them.
    """
    step = environment.get("SLURM_STEP_ID", environment.get("SLURM_STEPID", ""))
    if "RANK" in environment or "SLURM_PROCID" not in environment or not step or _step(environment) >= RESERVED_STEPS:
        return 1
    return number(environment, "SLURM_STEP_NUM_TASKS", number(environment, "SLURM_NTASKS", 1))


def _step(environment: Mapping[str, str]) -> int:
    return number(environment, "SLURM_STEP_ID", number(environment, "SLURM_STEPID", 0))


def torchrun_variables(environment: Mapping[str, str]) -> dict[str, str]:
    """Returns what torchrun would have set for this task of `srun`; nothing if it joins no others.

    Raises UserError if SLURM's variables do not say on which machine the first task is.
    """
    tasks = joined_tasks(environment)
    if tasks == 1:
        return {}
    local_tasks = _tasks_of_this_node(environment, tasks)
    hosts = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST", "")
    if local_tasks < tasks and not hosts and "MASTER_ADDR" not in environment:
        raise UserError("SLURM_STEP_NODELIST is not set: set MASTER_ADDR to the machine of the first task")
    # Two steps of a job can run at the same time.
    port = FIRST_PORT + (101 * number(environment, "SLURM_JOB_ID", 0) + _step(environment)) % PORTS
    return {
        "RANK": environment["SLURM_PROCID"],
        "WORLD_SIZE": str(tasks),
        "LOCAL_RANK": environment.get("SLURM_LOCALID", "0"),
        "LOCAL_WORLD_SIZE": str(local_tasks),
        "MASTER_ADDR": environment.get("MASTER_ADDR") or ("127.0.0.1" if local_tasks == tasks else first_host(hosts)),
        "MASTER_PORT": environment.get("MASTER_PORT") or str(port),
    }


def _tasks_of_this_node(environment: Mapping[str, str], tasks: int) -> int:
    listed = environment.get("SLURM_STEP_TASKS_PER_NODE") or environment.get("SLURM_TASKS_PER_NODE")
    if listed:
        counts, node = expand_counts(listed), number(environment, "SLURM_NODEID", 0)
        if node >= len(counts):
            raise UserError(f"SLURM_NODEID is {node}, but SLURM's tasks per node are {listed!r}: start it with srun")
        return counts[node]
    nodes = number(environment, "SLURM_STEP_NUM_NODES", number(environment, "SLURM_NNODES", 1))
    return -(-tasks // max(1, nodes))


def expand_counts(text: str) -> list[int]:
    """Returns the numbers of a list such as `2(x3),1`: 2, 2, 2, 1."""
    parts = [re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part) for part in text.split(",")]
    return [int(part[1]) for part in parts if part for _ in range(int(part[2] or 1))]


def first_host(hosts: str) -> str:
    """Returns the first name of a list such as `rack1-node[01-03,7],gpu5`: rack1-node01."""
    name = re.match(r"(?:[^,\[]|\[[^\]]*\])*", hosts)
    return re.sub(r"\[([^\],-]*)[^\]]*\]", r"\1", name[0]) if name else hosts


def unused_tasks(environment: Mapping[str, str]) -> int:
    """Returns how many tasks a job has, if this process was started in it without `srun`; else 0."""
    tasks = number(environment, "SLURM_NTASKS", 1)
    return tasks if "RANK" not in environment and joined_tasks(environment) == 1 and tasks > 1 else 0


def binds_gpus(environment: Mapping[str, str]) -> bool:
    """Whether SLURM gives each task on this machine its own GPUs, so that it cannot see those of the others."""
    gpus = environment.get("SLURM_GPUS_ON_NODE", "0")
    return gpus.isdigit() and int(gpus) >= number(environment, "LOCAL_WORLD_SIZE", 1)
