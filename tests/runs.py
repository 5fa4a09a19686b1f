"""Whole runs of main.py on a tiny dataset: arguments, ways to start them, and what they leave."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from tests.tiny_dataset import TinyDataset

ROOT = Path(__file__).parent.parent
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
METRICS = ("r1", "r5", "r10", "mAP", "mINP")


class Outcome(NamedTuple):
    """Exit status, and what was written to the screen."""

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


def start(*arguments: str, ranks: int = 1, seconds: float = 300) -> Outcome:
    """`main.py` in a process of its own, under torchrun where there are several ranks."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks > 1 else []
    environment = {name: value for name, value in os.environ.items() if name != "WANDB_PROJECT"}
    finished = subprocess.run(
        [sys.executable, *torchrun, "main.py", *map(str, arguments)],
        cwd=ROOT,
        env=environment | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=seconds,
    )
    return Outcome(finished.returncode, finished.stdout, finished.stderr)


def only_error(outcome: Outcome) -> str:
    """The one line of a refusal."""
    assert outcome.status == 2, outcome
    (line,) = outcome.err.splitlines()
    assert line.startswith("error: ") and "Traceback" not in outcome.out
    return line
