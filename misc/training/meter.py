"""Measures an epoch: losses, speed, and time spent waiting for data."""

import math
import time

import torch
from torch import Tensor

from misc.errors import UserError
from misc.run.progress import EpochRecord, Progress
from misc.system.distributed import Ranks, mean_over_ranks


class Meter:
    """Updates the record of the current epoch in `progress`, and a second record since the last log line.

    Losses stay on the device until `synchronise`, because reading them waits for the device.
    """

    def __init__(self, ranks: Ranks, progress: Progress):
        self.ranks = ranks
        self.progress = progress
        self.recent = EpochRecord()
        self._unread: list[tuple[dict[str, Tensor], list[str]]] = []
        self._since = time.perf_counter()

    def waited(self, seconds: float) -> None:
        """Adds time spent waiting for data."""
        for record in self._records():
            record.data_wait += seconds

    def add(self, weighted: dict[str, Tensor], paths: list[str]) -> None:
        """Adds one step.

        Args:
            weighted: its weighted losses on this rank, by name: 0-dim tensors.
            paths: the image files of its batch.
        """
        self._unread.append((weighted, paths))

    @property
    def pending(self) -> bool:
        """Whether there are steps that `synchronise` has not read."""
        return bool(self._unread)

    def synchronise(self) -> None:
        """Reads the steps added since the last call. It waits for the device and for all ranks.

        Raises NonFiniteLoss if a loss is NaN or infinite, for the first such step.
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
        """Returns the record of all steps since the last call; `synchronise` has read them."""
        recent, self.recent = self.recent, EpochRecord()
        return recent

    def _records(self) -> tuple[EpochRecord, EpochRecord]:
        return self.progress.record, self.recent


class NonFiniteLoss(UserError):
    """Reports a step whose loss is NaN or infinite.

    Attributes:
        paths: image files of the batch on all ranks.
    """

    def __init__(self, epoch: int, step: int, losses: dict[str, float], paths: list[str]):
        shown = ", ".join(f"{name} {value:.4g}" for name, value in losses.items())
        more = f" and {len(paths) - 5} more, all of them in train.log" if len(paths) > 5 else ""
        super().__init__(
            f"the loss is not finite at epoch {epoch}, step {step} ({shown}); its batch contains "
            f"{', '.join(paths[:5])}{more}: check these images, lower schedule.lr, or set misc.precision=fp32"
        )
        self.paths = paths
