"""Times two ways of doing the same work in turn. Clock rates vary, so the ratio is more reliable than the times."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Comparison:
    """The result of one measurement.

    Attributes:
        name: of the work.
        baseline, ours: medians, in `unit`.
        unit: `s`, or the unit of a count.
        ratio: baseline / ours, of the medians.
        spread: smallest and largest ratio of a single round; None without rounds.
    """

    name: str
    baseline: float
    ours: float
    unit: str
    ratio: float
    spread: tuple[float, float] | None = None

    def line(self) -> str:
        """Returns a row of the table below `HEADER`."""
        spread = f"{self.spread[0]:.2f} … {self.spread[1]:.2f}" if self.spread else ""
        return f"{self.name:<44} {self.baseline:>11.4g} {self.ours:>11.4g} {self.unit:<6} {self.ratio:>7.2f}  {spread}"


HEADER = f"{'':<44} {'baseline':>11} {'ours':>11} {'':<6} {'ratio':>7}  range over rounds"


def in_turn(
    name: str,
    baseline: Callable[[], object],
    ours: Callable[[], object],
    rounds: int,
    clock: Callable[[], float] = time.perf_counter,
) -> Comparison:
    """Runs both once to warm up, then times them in turn, `rounds` times. Waits until their work on a GPU is done."""
    times: tuple[list[float], list[float]] = ([], [])
    for number in range(rounds + 1):
        for function, seconds in zip((baseline, ours), times, strict=True):
            started = clock()
            function()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if number > 0:
                seconds.append(clock() - started)
    medians = [statistics.median(seconds) for seconds in times]
    ratios = [before / after for before, after in zip(*times, strict=True)]
    return Comparison(name, *medians, "s", medians[0] / medians[1], (min(ratios), max(ratios)))


def counted(name: str, baseline: float, ours: float, unit: str) -> Comparison:
    """Compares two numbers that are counted, or measured once."""
    return Comparison(name, baseline, ours, unit, baseline / ours)
