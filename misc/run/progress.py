"""How far a run has come: what resuming needs besides weights, optimizer and scaler."""

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass
class EpochRecord:
    """What has been measured of an epoch so far.

    Attributes:
        losses: sum over the steps of each weighted loss, by name, mean over ranks.
        steps: of the optimizer; samples: of all ranks.
        seconds: of training; data_wait: of those, waiting for data.
    """

    losses: dict[str, float] = field(default_factory=dict)
    steps: int = 0
    samples: int = 0
    seconds: float = 0.0
    data_wait: float = 0.0

    def means(self) -> dict[str, float]:
        """`loss` and `loss_<name>`, mean over the steps."""
        parts = {f"loss_{name}": value / self.steps for name, value in self.losses.items()}
        return {"loss": sum(parts.values()), **parts}

    def speed(self) -> dict[str, float]:
        """`seconds`, `samples_per_second` of all ranks, and `data_wait` as a share of the time, 0 to 1."""
        return {
            "seconds": self.seconds,
            "samples_per_second": self.samples / self.seconds,
            "data_wait": self.data_wait / self.seconds,
        }


@dataclass
class Progress:
    """Where a run stands.

    There is no random state in it: order, augmentation and dropout are functions of the seed and of this position.

    Attributes:
        epoch: epochs that are trained and evaluated.
        step: steps done of the epoch after those, up to all of them.
        record: of these steps.
        metrics: of the last evaluation; empty before the first.
        best: highest R@1 so far, -1 before the first evaluation.
    """

    epoch: int = 0
    step: int = 0
    record: EpochRecord = field(default_factory=EpochRecord)
    metrics: dict[str, float] = field(default_factory=dict)
    best: float = -1.0

    def evaluated(self, metrics: dict[str, float]) -> bool:
        """Ends the epoch with its evaluation. Returns whether it is the best so far."""
        better = metrics["r1"] > self.best
        self.epoch, self.step, self.record = self.epoch + 1, 0, EpochRecord()
        self.metrics, self.best = metrics, max(self.best, metrics["r1"])
        return better

    def state(self) -> dict[str, Any]:
        """Plain values for a checkpoint."""
        return asdict(self)

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> "Progress":
        return cls(**state | {"record": EpochRecord(**state["record"])})
