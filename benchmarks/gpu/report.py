"""Runs the parts of `make gpu` one after another, and writes what they find.

python -m benchmarks.gpu [--only PART ...] [--seconds N] [--json FILE]

A result is written as soon as it is known, the most important part first. So a run that is cut off is still useful.
"""

import argparse
import importlib.util
import json
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import torch

from benchmarks.gpu import correctness, runs, speed
from benchmarks.gpu.context import Context, Row
from benchmarks.options import check_output_file, check_positive
from misc.errors import UserError
from misc.files import atomic_file
from misc.system.distributed import choose_device
from misc.system.precision import disable_tf32

SECONDS = 520
"""The time for all parts; the start of Python and torch comes in addition."""
VOCABULARY, PYTEST = "open_clip", "pytest"
PACKAGES = {VOCABULARY: "open_clip_torch", PYTEST: "pytest"}
"""Modules that some parts need, with the packages that contain them."""


class Part(NamedTuple):
    """A part of the report.

    Attributes:
        run: yields rows.
        seconds: the longest time that it may take; on an H100 it should need less.
        needs: modules that it needs in addition; they are not on every GPU machine.
    """

    run: Callable[[Context], Iterator[Row]]
    seconds: int
    needs: tuple[str, ...] = ()


PARTS = {
    "machine": Part(speed.machine, 30),
    "reference": Part(correctness.reference_values, 60, (PYTEST,)),
    "reference_step": Part(correctness.reference_step, 30, (PYTEST, VOCABULARY)),
    "formats": Part(correctness.number_formats, 30),
    "chunks": Part(correctness.chunks, 90),
    "waiting": Part(correctness.waiting, 30),
    "steps": Part(speed.steps, 100),
    "one_rank": Part(runs.one_rank, 60),
    "resume": Part(runs.resume, 40, (VOCABULARY,)),
    "evaluation": Part(runs.evaluation, 30, (VOCABULARY,)),
    "levers": Part(speed.levers, 150),
    "loading": Part(speed.loading, 60, (VOCABULARY,)),
    "demo": Part(runs.demo, 150, (VOCABULARY,)),
    "chunk_sizes": Part(speed.chunk_sizes, 90),
    "encoding": Part(speed.encoding, 20),
    "several_ranks": Part(runs.several_ranks, 90),
    "exports": Part(runs.exports, 40, (VOCABULARY,)),
}
"""The parts by name, in the order in which they run."""


class OutOfTime(Exception):
    """A part took longer than it may."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the parts of the command line. Returns the exit status: 0, 1 if a part failed, or 2 for a user's mistake."""
    options = parse_arguments(arguments)
    try:
        if options.rank_result:
            file, rows, device = options.rank_result
            runs.write_rank_result(Path(file), int(rows), device)
            return 0
        check_positive("--seconds", options.seconds)
        check_output_file("--json", options.json)
        device = choose_device(options.device)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    names = dict.fromkeys(["machine", *options.only])  # other parts need its rates
    return run_parts(list(names), device, options.seconds, options.json)


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m benchmarks.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--device", default="auto", help="auto (a GPU if there is one) | cpu | cuda | cuda:N")
    parser.add_argument("--seconds", type=int, default=SECONDS, metavar="N", help=f"for all parts (default: {SECONDS})")
    parser.add_argument("--json", type=Path, default=Path("gpu.json"), metavar="FILE", help="default: gpu.json")
    parser.add_argument("--rank-result", nargs=3, help=argparse.SUPPRESS)  # what `runs.launch` starts under torchrun
    return parser.parse_args(arguments)


def run_parts(names: Sequence[str], device: torch.device, seconds: int, file: Path) -> int:
    """Runs parts until the time is used up, and writes the JSON file after every result. Returns the exit status."""
    if device.type == "cuda":
        device = torch.device("cuda", device.index or 0)
        torch.cuda.set_device(device)
        disable_tf32()
    report: dict[str, dict[str, Any]] = {name: {"status": "not started", "rows": []} for name in names}
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        context = Context(device, Path(folder), started + seconds)
        for name in names:
            _run_part(PARTS[name], report[name], context, lambda: _write(file, report))
            _write(file, report)
            print("\n".join([f"{name}: {report[name]['status']}", *map(_line, report[name]["rows"])]), flush=True)
    failed = [name for name, part in report.items() if part["status"] == "failed"]
    print(f"{len(report)} parts in {time.monotonic() - started:.0f} s; failed: {', '.join(failed) or 'none'}; {file}")
    return int(bool(failed))


def _run_part(part: Part, result: dict[str, Any], context: Context, write: Callable[[], None]) -> None:
    """Runs a part and updates its result. An exception ends only this part; it is part of the result."""
    missing = [PACKAGES[module] for module in part.needs if importlib.util.find_spec(module) is None]
    if missing:
        result["status"] = f"skipped: install {' '.join(missing)}"
        return
    allowed = min(part.seconds, context.seconds_left()) if context.on_gpu else context.seconds_left()
    if allowed <= 0:
        result["status"] = "skipped: the time is used up"
        return
    result["status"] = "running"
    write()
    started = time.monotonic()
    try:
        with _time_limit(allowed):
            for row in part.run(context):
                result["rows"].append(row)
                write()
        passed = all(row.get("passed", True) for row in result["rows"])
        result["status"] = "passed" if passed else "failed"
    except OutOfTime:
        result["status"] = f"cut off after {allowed:.0f} s"
    except Exception as error:  # the next part goes on, and this one fails
        traceback.print_exc()
        result |= {"status": "failed", "error": repr(error), "traceback": traceback.format_exc()}
    result["seconds"] = round(time.monotonic() - started, 1)
    if context.on_gpu:
        torch.cuda.empty_cache()


@contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    """Raises OutOfTime in this context after some seconds."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise OutOfTime

    previous = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


def _write(file: Path, report: dict[str, dict[str, Any]]) -> None:
    with atomic_file(file) as opened:
        opened.write((json.dumps(report, indent=1) + "\n").encode())


def _line(row: Row) -> str:
    """Returns a row of the table: its name, then its values."""
    values = (
        f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
        for name, value in row.items()
        if name != "name"
    )
    return f"  {row['name']:<44} {', '.join(values)}"
