"""A trace of a few training steps, to see where the time goes (chrome://tracing or ui.perfetto.dev open it)."""

import resource
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from misc.files import atomic_file
from misc.run.folder import TRACE

WAIT, WARMUP, ACTIVE = 2, 1, 3
"""Steps that are left out, since the first ones allocate memory and choose algorithms; that only warm the profiler up;
and that are traced."""


@contextmanager
def traced_steps(folder: Path | None) -> Iterator[Callable[[], None]]:
    """Writes `trace.json` into the folder of a run; None traces nothing.

    Yields: what is to be called after each training step.
    """
    if folder is None:
        yield lambda: None
        return

    def write(profiler: profile) -> None:
        with atomic_file(folder / TRACE) as file:
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
    """Largest memory so far, in 10⁹ bytes: of the GPU, or resident of this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e9 if sys.platform == "darwin" else peak * 1024 / 1e9
