"""A trace of a few training steps, which shows how long each operation takes. Open it in ui.perfetto.dev."""

import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from misc.files import atomic_file
from misc.run.folder import TRACE
from misc.run.log import RunLog

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

WAIT, WARMUP, ACTIVE = 2, 1, 3
"""Numbers of steps: skipped, because the first ones allocate memory and choose algorithms; warm-up of the profiler;
traced."""


@contextmanager
def traced_steps(folder: Path | None, log: RunLog) -> Iterator[Callable[[], None]]:
    """Writes `trace.json` to the folder of a run. With None, nothing is traced.

    Yields: a function to call after each training step.
    """
    if folder is None:
        yield lambda: None
        return

    def write(profiler: profile) -> None:
        with log.decoration(TRACE), atomic_file(folder / TRACE) as file:
            profiler.export_chrome_trace(file.name)

    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
    with profile(
        activities=activities,
        schedule=schedule(wait=WAIT, warmup=WARMUP, active=ACTIVE, repeat=1),
        on_trace_ready=write,
        record_shapes=True,
    ) as profiler:
        yield profiler.step


def peak_memory_gigabytes(device: torch.device) -> float:
    """Returns the peak memory in 10⁹ bytes: allocated on the GPU, or resident memory of this process on a CPU.

    On a CPU under Windows, it is NaN, as Python cannot measure it there.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    if resource is None:
        return math.nan
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e9 if sys.platform == "darwin" else peak * 1024 / 1e9
