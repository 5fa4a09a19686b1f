"""Two ways of doing the same work, timed in turn: clocks wander, so a ratio says more than two times."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Comparison:
    """What was measured.

    Attributes:
        name: of the work.
        baseline, ours: medians, in `unit`.
        unit: `s` where less is better, or what is counted.
        ratio: baseline / ours, of medians.
        spread: least and largest ratio of a single round, where there are several.
    """

    name: str
    baseline: float
    ours: float
    unit: str
    ratio: float
    spread: tuple[float, float] | None = None

    def line(self) -> str:
        spread = f"{self.spread[0]:.2f} … {self.spread[1]:.2f}" if self.spread else ""
        return f"{self.name:<44} {self.baseline:>11.4g} {self.ours:>11.4g} {self.unit:<6} {self.ratio:>7.2f}  {spread}"


HEADER = f"{'':<44} {'baseline':>11} {'ours':>11} {'':<6} {'ratio':>7}  of single rounds"


def in_turn(name: str, baseline: Callable[[], object], ours: Callable[[], object], rounds: int) -> Comparison:
    """Runs both once to warm up, then `rounds` times in turn. Whatever they do on a GPU is waited for."""
    times: tuple[list[float], list[float]] = ([], [])
    for number in range(rounds + 1):
        for function, own in zip((baseline, ours), times, strict=True):
            started = time.perf_counter()
            function()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if number > 0:
                own.append(time.perf_counter() - started)
    medians = [statistics.median(own) for own in times]
    ratios = [before / after for before, after in zip(*times, strict=True)]
    return Comparison(name, *medians, "s", medians[0] / medians[1], (min(ratios), max(ratios)))


def counted(name: str, baseline: float, ours: float, unit: str) -> Comparison:
    """Of numbers that are counted, or measured once."""
    return Comparison(name, baseline, ours, unit, baseline / ours)
