"""`make demo`: installs, draws people, trains, and shows the result. It reports progress at least every ten seconds.

It runs before anything is installed, so it only imports modules that need nothing but Python.
"""

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from misc.terminal import prepare_streams, show

WINDOWS = os.name == "nt"
BIN = Path(".venv/Scripts" if WINDOWS else ".venv/bin")
PEOPLE, RUN = Path("data/pedestrians"), Path("runs/demo")
SILENCE = 8
"""Seconds without output after which a line reports that the phase is still running."""
METRICS = {"r1": "R@1", "r5": "R@5", "r10": "R@10", "mAP": "mAP", "mINP": "mINP"}


@dataclass(frozen=True)
class Phase:
    """A part of the demo.

    Attributes:
        name: one word.
        description: what happens, for the user.
        seconds: expected duration on two CPU cores.
        command: what is run.
    """

    name: str
    description: str
    seconds: int
    command: tuple[str, ...]


def phases(python: str, *, make: bool, windows: bool = WINDOWS) -> list[Phase]:
    """Returns the phases of the demo. Their times are between those of a faster and a slower machine.

    Args:
        python: the interpreter that the environment is made with.
        make: whether the system has `make`, whose environment the tests share.
        windows: train without torchrun. Torch for Windows may lack what torchrun needs.
    """
    interpreter = str(BIN / "python")
    # One process: a second one would sum the gradients of 49,408 token embeddings with the first in every step.
    launcher = (interpreter,) if windows else (str(BIN / "torchrun"), "--standalone", "--nproc_per_node=1")
    installed = "installs the packages into .venv (longer if pip must download them: about 3 GB)"
    pip = (interpreter, "-m", "pip", "install", "--quiet", "--disable-pip-version-check")
    if make:
        install = [
            Phase("install", installed, 75, ("make", "--no-print-directory", ".venv/installed", f"PYTHON={python}"))
        ]
    else:
        install = [
            Phase("create", "creates .venv", 10, (python, "-m", "venv", ".venv")),
            Phase("install", installed, 75, (*pip, "-r", "requirements.txt", "-r", "requirements-search.txt")),
        ]
    return [
        *install,
        Phase(
            "draw",
            f"draws four images of each of 1,850 people, with captions, into {PEOPLE}",
            35,
            (interpreter, "-m", "misc.pedestrians", str(PEOPLE)),
        ),
        Phase(
            "train",
            "trains simplified TBPS-CLIP with small encoders from random weights, and evaluates each epoch on people "
            "who are not in the training set",
            115,
            (*launcher, "main.py", "--config", "config/demo.config.yaml", "--simplified", "--overwrite"),
        ),
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs all phases. Returns the exit status: that of the first phase that fails, or 0.

    Args:
        arguments: the name or path of the Python to install with.
    """
    prepare_streams()
    given = sys.argv[1:] if arguments is None else arguments
    make = shutil.which("make") is not None
    return run_demo(phases(given[0] if given else sys.executable, make=make), RUN)


def run_demo(plan: Sequence[Phase], run: Path) -> int:
    """Runs the phases one after another, then prints the results of the run, the times, and what to try next."""
    show(f"The demo takes about {_minutes(sum(phase.seconds for phase in plan))} on two CPU cores. It")
    for number, phase in enumerate(plan, start=1):
        show(f"  {number}. {phase.description}: about {phase.seconds} s")
    took: dict[str, float] = {}
    for number, phase in enumerate(plan, start=1):
        show(f"\n[{number}/{len(plan)}] {phase.name}: {phase.description}{_forecast(plan, took)}")
        started = time.monotonic()
        status = run_phase(phase)
        took[phase.name] = time.monotonic() - started
        if status:
            show(f"error: the phase {phase.name} ended with status {status}; its own message is above")
            return status
        show(f"[{number}/{len(plan)}] {phase.name}: done in {took[phase.name]:.0f} s")
    show("\n" + summary(run, took))
    return 0


def _forecast(plan: Sequence[Phase], took: dict[str, float]) -> str:
    """Corrects the expected time of the remaining phases by the speed of the last one, which computes too."""
    if "draw" not in took:
        return ""
    expected = {phase.name: phase.seconds for phase in plan}
    ratio = took["draw"] / expected["draw"] if took["draw"] > 5 else 1.0  # it is quick if the people are drawn already
    return f" (about {ratio * sum(seconds for name, seconds in expected.items() if name not in took):.0f} s here)"


def run_phase(phase: Phase) -> int:
    """Runs a command. Returns its exit status.

    A terminal shows the command's own progress bars. Elsewhere its lines are passed on, and a line reports the time if
    it prints nothing for a while.
    """
    passed_on = phase.name == "install" or not sys.stdout.isatty()
    process = subprocess.Popen(
        phase.command,
        stdout=subprocess.PIPE if passed_on else None,
        stderr=subprocess.STDOUT if passed_on else None,
        text=True,
        errors="replace",
    )
    last_output = [time.monotonic()]

    def pass_on() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            show(line.removesuffix("\n"))
            last_output[0] = time.monotonic()

    reader = threading.Thread(target=pass_on if passed_on else process.wait, daemon=True)
    reader.start()
    started = time.monotonic()
    try:
        while reader.is_alive():
            reader.join(timeout=1)
            if passed_on and reader.is_alive() and time.monotonic() - last_output[0] >= SILENCE:
                show(f"... {phase.name}: {time.monotonic() - started:.0f} s of about {phase.seconds} s")
                last_output[0] = time.monotonic()
        return process.wait()
    except KeyboardInterrupt:  # the terminal has sent it to the command too
        process.wait()
        return 130


def summary(run: Path, took: dict[str, float]) -> str:
    """Returns the results beside those of the untrained model, the time of each phase, and what to try next."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    best = max(records, key=lambda record: record["r1"])
    rows = {
        "untrained": [records[0][f"initial_{name}"] for name in METRICS],
        "trained": [best[name] for name in METRICS],
    }
    lines = [f"{'percent':<10}" + "".join(f"{title:>8}" for title in METRICS.values())]
    lines += [f"{name:<10}" + "".join(f"{value:8.2f}" for value in values) for name, values in rows.items()]
    times = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in took.items())
    return "\n".join(
        [
            *lines,
            "",
            f"Time: {times}, together {_minutes(sum(took.values()))}.",
            f"Queries with their first ten images: {run / 'retrieval.png'}; the curve: {run / 'curve.png'}",
            "Next, search these people in your browser, at http://127.0.0.1:8000:",
            f"  {BIN / 'python'} search.py index {PEOPLE / 'imgs'} --checkpoint {run / 'checkpoint_best.pth'}",
            f"  {BIN / 'python'} search.py serve {PEOPLE / 'imgs'}",
        ]
    )


def _minutes(seconds: float) -> str:
    return f"{seconds / 60:.1f} minutes"


if __name__ == "__main__":
    sys.exit(main())
