"""The progress of a run: the state that resuming needs in addition to weights, optimizer and scaler."""

from dataclasses import asdict, dataclass, field
from typing import Any


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
    def from_state(cls, state: dict[str, Any]) -> "Progress":
        return cls(**state | {"record": EpochRecord(**state["record"])})
