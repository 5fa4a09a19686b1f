"""Measures an epoch: losses, speed, and time without data."""

import math
import time

import torch
from torch import Tensor

from misc.errors import UserError
from misc.run.progress import EpochRecord, Progress
from misc.system.distributed import Ranks, mean_over_ranks


class Meter:
    """Adds to the record of the epoch that `progress` is in, and keeps one of what came since the last log line.

    Losses stay on the device until `settle`, since reading one waits for it.
    """

    def __init__(self, ranks: Ranks, progress: Progress):
        self.ranks = ranks
        self.progress = progress
        self.recent = EpochRecord()
        self._unread: list[tuple[dict[str, Tensor], list[str]]] = []
        self._since = time.perf_counter()

    def waited(self, seconds: float) -> None:
        """Counts time in which there was no data."""
        for record in self._records():
            record.data_wait += seconds

    def add(self, weighted: dict[str, Tensor], paths: list[str]) -> None:
        """Counts one step: its weighted losses on this rank, 0-dim tensors, and the image files of its batch."""
        self._unread.append((weighted, paths))

    def settle(self) -> None:
        """Reads what was added since the last time, which waits for the device and for all ranks.

        Raises NonFiniteLoss for the first step at which a loss is NaN or infinite.
        """
        steps = torch.stack([torch.stack(list(weighted.values())) for weighted, _ in self._unread])  # (steps, losses)
        for values, (weighted, paths) in zip(mean_over_ranks(steps).tolist(), self._unread, strict=True):
            losses = dict(zip(weighted, values, strict=True))
            if not all(map(math.isfinite, values)):
                step = self.progress.record.steps + 1
                raise NonFiniteLoss(self.progress.epoch + 1, step, losses, self.ranks.all_gather_list(paths))
            for record in self._records():
                record.steps += 1
                record.samples += len(paths) * self.ranks.world_size
                for name, value in losses.items():
                    record.losses[name] = record.losses.get(name, 0.0) + value
        self._unread = []
        now = time.perf_counter()
        for record in self._records():
            record.seconds += now - self._since
        self._since = now

    def take_recent(self) -> EpochRecord:
        """What was settled since the last call."""
        recent, self.recent = self.recent, EpochRecord()
        return recent

    def _records(self) -> tuple[EpochRecord, EpochRecord]:
        return self.progress.record, self.recent


class NonFiniteLoss(UserError):
    """A loss is NaN or infinite.

    Attributes:
        paths: image files of the batch, of all ranks.
    """

    def __init__(self, epoch: int, step: int, losses: dict[str, float], paths: list[str]):
        shown = ", ".join(f"{name} {value:.4g}" for name, value in losses.items())
        more = f" and {len(paths) - 5} more, all of them in train.log" if len(paths) > 5 else ""
        super().__init__(
            f"the loss is not finite at epoch {epoch}, step {step} ({shown}), whose batch is of "
            f"{', '.join(paths[:5])}{more}: look at these images, lower schedule.lr, or set misc.precision=fp32"
        )
        self.paths = paths
