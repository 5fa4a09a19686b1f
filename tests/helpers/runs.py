"""Whole runs of main.py on a tiny dataset: arguments, ways to start them, and checks of their results."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from misc.run.checkpoint import read_checkpoint
from misc.training.trainer import Trainer
from tests.helpers.fork_server import ROOT, Call
from tests.helpers.ranks import fork_ranks, fork_server
from tests.helpers.tiny_dataset import TinyDataset

ARCHITECTURE = (
    "experiment.input_resolution=[32, 16]",
    "experiment.simclr_mlp=[32, 16, 32]",
    "model.checkpoint=null",
    "model.embed_dim=32",
    "model.vision_width=32",
    "model.vision_layers=1",
    "model.vision_heads=2",
    "model.text_width=32",
    "model.text_layers=1",
    "model.text_heads=2",
)
QUICK = (
    "device=cpu",
    "misc.precision=fp32",
    "data.dataset=null",
    "data.batch_size=4",
    "data.test_batch_size=7",
    "data.num_workers=0",
)
EVERYTHING = (
    *ARCHITECTURE,
    *QUICK,
    "experiment.dropout=0.3",
    "experiment.mlm=true",
    "experiment.cmt_depth=1",
    "experiment.id=true",
    "experiment.mixgen=true",
    "experiment.mixgen_p=0.5",
    "experiment.mixgen_ratio=0.25",
    "schedule.epoch=2",
    "schedule.lr=1e-3",
    "log.sheet=2",
    "log.checkpoint_period=5",
    "log.print_period=3",
)
"""The full recipe with MLM, ID, MixGen and much dropout."""
TIMES = ("seconds", "samples_per_second", "data_wait", "peak_memory_gigabytes", "evaluation_seconds")
"""Fields of metrics.jsonl that differ from run to run."""
METRICS = ("r1", "r5", "r10", "mAP", "mINP")


class Outcome(NamedTuple):
    """Exit status, standard output and standard error of a command."""

    status: int
    out: str
    err: str


class Run(NamedTuple):
    """A finished run: its folder, and how it ended."""

    folder: Path
    outcome: Outcome

    @property
    def records(self) -> list[dict]:
        return [json.loads(line) for line in (self.folder / "metrics.jsonl").read_text().splitlines()]

    @property
    def log(self) -> str:
        return (self.folder / "train.log").read_text(encoding="utf-8")


def of_dataset(dataset: TinyDataset) -> list[str]:
    return [f"anno_dir={dataset.anno_dir}", f"image_dir={dataset.image_dir}"]


def environment() -> dict[str, str]:
    """Returns the environment variables of a run: those of this process, and one thread."""
    return {name: value for name, value in os.environ.items() if name != "WANDB_PROJECT"} | {"OMP_NUM_THREADS": "1"}


def command(arguments: tuple[str, ...], ranks: int, *torchrun_options: str) -> dict[str, Any]:
    """Returns the arguments of `subprocess` to run `main.py`, under torchrun if there are several ranks."""
    torchrun = ("-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", *torchrun_options)
    return {
        "args": [sys.executable, *(torchrun if ranks > 1 else ()), "main.py", *map(str, arguments)],
        "cwd": ROOT,
        "env": environment(),
    }


def start(*arguments: str, ranks: int = 1, seconds: float = 300) -> Outcome:
    """Runs `main.py` in its own process, under torchrun if there are several ranks, and waits for it."""
    finished = subprocess.run(**command(arguments, ranks), capture_output=True, text=True, timeout=seconds)
    return Outcome(finished.returncode, finished.stdout, finished.stderr)


def start_forked(*arguments: str, ranks: int = 1, seconds: float = 300) -> Outcome:
    """Runs `main.py` like `start`, but in forks of a process that has already imported it, and without torchrun."""
    words = ["main.py", *map(str, arguments)]
    if ranks == 1:
        ended = fork_server()([Call(run_main, (words,), environment(), ROOT)], seconds=seconds)
        return Outcome(ended.statuses[0], ended.out, ended.err)
    ended = fork_ranks(ranks, run_main, (words,), environment(), seconds)
    return Outcome(int(any(ended.statuses)), ended.out, ended.err)  # 1 if a rank failed, as torchrun


def run_main(words: list[str]) -> int:
    """Runs `main.py` with these words of a command line in this process."""
    import main

    sys.argv = words
    return main.main()


def only_error(outcome: Outcome) -> str:
    """Checks that a command ended with exactly one error line, and returns the line."""
    assert outcome.status == 2, outcome
    (line,) = outcome.err.splitlines()
    assert line.startswith("error: ") and "Traceback" not in outcome.out
    return line


def finished(folder: Path) -> Run:
    return Run(folder, Outcome(0, "", ""))


def assert_same_run(folder: Path, expected: Run) -> None:
    """Checks that weights, optimizer, losses and metrics of two runs are bit-identical."""
    for name in ("checkpoint_last.pth", "checkpoint_best.pth"):
        found, wanted = read_checkpoint(folder / name), read_checkpoint(expected.folder / name)
        assert found["model"].keys() == wanted["model"].keys()
        for key, tensor in wanted["model"].items():
            assert torch.equal(found["model"][key], tensor), (name, key)
        assert (found["epoch"], found["metrics"]) == (wanted["epoch"], wanted["metrics"])
        if "optimizer" in wanted:
            for number, state in wanted["optimizer"]["state"].items():
                for key, tensor in state.items():
                    assert torch.equal(found["optimizer"]["state"][number][key], tensor), (number, key)
    untimed = [
        [{key: value for key, value in record.items() if key not in TIMES} for record in each.records]
        for each in (finished(folder), expected)
    ]
    assert untimed[0] == untimed[1]
    assert (folder / "retrieval.png").read_bytes() == (expected.folder / "retrieval.png").read_bytes()


def at_step(monkeypatch, number: int, action: Callable[[], None]) -> None:
    """Calls `action` in the training step `number`, counted from 1 over all epochs."""
    step, count = Trainer.step, 0

    def counted(*arguments, **options):
        nonlocal count
        count += 1
        if count == number:
            action()
        return step(*arguments, **options)

    monkeypatch.setattr(Trainer, "step", counted)
