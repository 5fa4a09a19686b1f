"""The progress of a run: the state that resuming needs in addition to weights, optimizer and scaler."""

import sys
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from misc.errors import UserError, first_of


@dataclass
class EpochRecord:
    """Measurements of an epoch so far.

    Attributes:
        losses: each weighted loss by name, summed over the steps and averaged over ranks.
        steps: number of optimizer steps.
        samples: number of samples of all ranks.
        seconds: duration of the training.
        data_wait: seconds of it that were spent waiting for data.
    """

    losses: dict[str, float] = field(default_factory=dict)
    steps: int = 0
    samples: int = 0
    seconds: float = 0.0
    data_wait: float = 0.0

    def means(self) -> dict[str, float]:
        """Returns `loss` and `loss_<name>`, averaged over the steps."""
        parts = {f"loss_{name}": value / self.steps for name, value in self.losses.items()}
        return {"loss": sum(parts.values()), **parts}

    def speed(self) -> dict[str, float]:
        """Returns `seconds`, `samples_per_second` of all ranks, and `data_wait` as a share of the time, 0 to 1."""
        return {
            "seconds": self.seconds,
            "samples_per_second": self.samples / self.seconds,
            "data_wait": self.data_wait / self.seconds,
        }


@dataclass
class Progress:
    """The position of a run.

    It contains no random state: order, augmentation and dropout depend only on the seed and on this position.

    Attributes:
        epoch: number of epochs that are trained and evaluated.
        step: number of finished steps of the next epoch; may be all of them.
        record: measurements of these steps.
        metrics: results of the last evaluation; empty before the first one.
        best: highest R@1 so far; -1 before the first evaluation.
    """

    epoch: int = 0
    step: int = 0
    record: EpochRecord = field(default_factory=EpochRecord)
    metrics: dict[str, float] = field(default_factory=dict)
    best: float = -1.0

    @property
    def started(self) -> bool:
        """Whether the run has made a step, or evaluated its initial weights."""
        return self.epoch > 0 or self.step > 0 or bool(self.metrics)

    def evaluated(self, metrics: dict[str, float]) -> bool:
        """Ends the epoch with the results of its evaluation. Returns: whether they are the best so far."""
        better = metrics["r1"] > self.best
        self.epoch, self.step, self.record = self.epoch + 1, 0, EpochRecord()
        self.metrics, self.best = metrics, max(self.best, metrics["r1"])
        return better

    def state(self) -> dict[str, Any]:
        """Returns the progress as plain values, for a checkpoint."""
        return asdict(self)

    @classmethod
    def from_state(cls, state: Any) -> "Progress":
        """Returns the progress of a checkpoint.

        Raises UserError if a value is missing, of a wrong type or impossible.
        """
        record = state.get("record") if isinstance(state, dict) else None
        if not isinstance(record, dict) or record.keys() != {each.name for each in fields(EpochRecord)}:
            raise UserError("its progress has no valid record")
        if state.keys() != {each.name for each in fields(cls)}:
            raise UserError(f"its progress has the values {', '.join(map(str, state))}")
        progress = cls(**state | {"record": EpochRecord(**record)})
        if invalid := [name for name, valid in progress._checks().items() if not valid]:
            raise UserError(f"its progress has an invalid value for {first_of(invalid)}")
        measured = progress.record
        if measured.steps != progress.step or (progress.step > 0 and min(measured.samples, measured.seconds) == 0):
            raise UserError(f"its progress is at step {progress.step}, and its record of {measured.steps} steps")
        return progress

    def _checks(self) -> dict[str, bool]:
        """Returns for each value whether it is valid."""
        record = self.record
        return {
            **{f"record.{name}": is_count(getattr(record, name)) for name in ("steps", "samples")},
            **{f"record.{name}": is_number(getattr(record, name), 0) for name in ("seconds", "data_wait")},
            "record.losses": _are_numbers(record.losses),
            "epoch": is_count(self.epoch),
            "step": is_count(self.step),
            "metrics": _are_numbers(self.metrics),
            "best": is_number(self.best, -1, 100),
        }


def is_count(value: Any) -> bool:
    """Whether a value of a file is an integer that a run can count to."""
    return type(value) is int and 0 <= value < 1 << 62  # isinstance would accept true and false


def is_number(value: Any, low: float = -sys.float_info.max, high: float = sys.float_info.max) -> bool:
    """Whether a value of a file is a finite number, at least `low` and at most `high`."""
    return type(value) in (int, float) and low <= value <= high


def _are_numbers(values: Any) -> bool:
    return isinstance(values, dict) and all(isinstance(name, str) and is_number(each) for name, each in values.items())
