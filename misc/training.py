"""One optimizer step, and one epoch of them."""

import math
import time
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from misc.distributed import Processes, mean_over_ranks
from misc.errors import UserError
from misc.loader import Batch, batches
from misc.optimizer import set_learning_rate
from misc.precision import Precision
from misc.run_log import RunLog, peak_memory_gigabytes
from model.objectives import Objectives, soft_label_ratio_at


@dataclass
class Trainer:
    """What a step needs besides its batch.

    Attributes:
        model: TBPSCLIP, in DistributedDataParallel where there are several processes.
        objectives: the losses.
        optimizer: AdamW with `lr_ratio` in its groups.
        learning_rates: learning rate of every iteration of the whole training.
        softlabel_ratio: α of N-ITC after the first epoch.
        precision, scaler: mixed precision.
        processes: where this process stands.
    """

    model: nn.Module
    objectives: Objectives
    optimizer: torch.optim.Optimizer
    learning_rates: list[float]
    softlabel_ratio: float
    precision: Precision
    scaler: torch.amp.GradScaler
    processes: Processes

    def step(self, batch: Batch, iteration: int, steps_per_epoch: int) -> dict[str, Tensor]:
        """One optimizer step on this rank's B samples of the global batch.

        Args:
            batch: on this process's device.
            iteration: counted from 0 over the whole training.
            steps_per_epoch: the soft labels' weight grows over the first that many iterations.

        Returns: weighted losses by name, detached 0-dim tensors (reading one waits for the device).
        """
        set_learning_rate(self.optimizer, self.learning_rates[iteration])
        with self.precision.autocast():
            features = self.model(batch.views)
        weighted = self.objectives(
            features,
            batch.identities,
            soft_label_ratio_at(iteration, steps_per_epoch, self.softlabel_ratio),
            batch.views.masked_labels,
        )
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(sum(weighted.values())).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return {name: loss.detach() for name, loss in weighted.items()}

    def epoch(self, loader: Iterable, epoch: int, log: RunLog, print_period: int) -> dict[str, float]:
        """One epoch.

        Args:
            loader: of `len` batches.
            epoch: counted from 0.
            log: gets the progress, and a line every `print_period` iterations.

        Returns: `loss`, `loss_<name>` (means over the epoch and all ranks), `seconds`, `samples_per_second` (of all
        ranks), `data_wait` (share of the time, 0 to 1) and `peak_memory_gigabytes`.

        Raises UserError when the loss is not finite; it is looked at on every log line.
        """
        self.model.train()
        steps = len(loader)
        meter = Meter(self.processes)
        with log.progress(steps, f"epoch {epoch + 1}") as bar:
            waiting_since = time.perf_counter()
            for step, batch in enumerate(batches(loader)):
                meter.data_wait += time.perf_counter() - waiting_since
                batch = batch.to(self.processes.device)
                iteration = epoch * steps + step
                meter.add(self.step(batch, iteration, steps), len(batch.paths))
                if (step + 1) % print_period == 0 or step + 1 == steps:
                    losses = meter.recent_losses()
                    _refuse_non_finite(losses, epoch, step, batch)
                    log.scalars({"learning_rate": self.learning_rates[iteration], **losses}, iteration)
                    log.line(_line(epoch, step, steps, self.learning_rates[iteration], losses, meter))
                    bar.set_postfix_str(f"loss {losses['loss']:.3f}, {meter.samples_per_second():.0f} samples/s")
                bar.update()
                waiting_since = time.perf_counter()
        return meter.summary()


class Meter:
    """Speed and mean losses of an epoch. Losses are added up on the device and read only for a log line."""

    def __init__(self, processes: Processes):
        self.processes = processes
        self.started = time.perf_counter()
        self.data_wait = 0.0
        self.samples = 0
        self.steps = 0
        self.recent: dict[str, Tensor] = {}
        self.recent_steps = 0
        self.totals: dict[str, float] = {}

    def add(self, weighted: dict[str, Tensor], samples: int) -> None:
        """Counts one step of `samples` samples on this rank."""
        for name, loss in weighted.items():
            self.recent[name] = self.recent[name] + loss if name in self.recent else loss
        self.recent_steps += 1
        self.steps += 1
        self.samples += samples * self.processes.world_size

    def recent_losses(self) -> dict[str, float]:
        """`loss` and `loss_<name>`, means over the steps since the last call and all ranks. Waits for the device."""
        sums = mean_over_ranks(torch.stack(list(self.recent.values()))).tolist()
        sums = {f"loss_{name}": value for name, value in zip(self.recent, sums, strict=True)}
        sums["loss"] = sum(sums.values())
        for name, value in sums.items():
            self.totals[name] = self.totals.get(name, 0.0) + value
        means = {name: value / self.recent_steps for name, value in sums.items()}
        self.recent, self.recent_steps = {}, 0
        return means

    def seconds(self) -> float:
        return time.perf_counter() - self.started

    def samples_per_second(self) -> float:
        return self.samples / self.seconds()

    def summary(self) -> dict[str, float]:
        """Means over the epoch; call it when `recent_losses` has read the last step."""
        return {name: value / self.steps for name, value in self.totals.items()} | {
            "seconds": self.seconds(),
            "samples_per_second": self.samples_per_second(),
            "data_wait": self.data_wait / self.seconds(),
            "peak_memory_gigabytes": peak_memory_gigabytes(self.processes.device),
        }


def _refuse_non_finite(losses: dict[str, float], epoch: int, step: int, batch: Batch) -> None:
    if not all(map(math.isfinite, losses.values())):
        shown = ", ".join(f"{name} {value:.4g}" for name, value in losses.items())
        raise UserError(
            f"the loss is not finite at or before epoch {epoch + 1}, step {step + 1} ({shown}; images of that step: "
            f"{', '.join(batch.paths[:5])}, …): lower schedule.lr, or set misc.precision=fp32"
        )


def _line(epoch: int, step: int, steps: int, rate: float, losses: dict[str, float], meter: Meter) -> str:
    remaining = meter.seconds() / (step + 1) * (steps - step - 1)
    parts = " ".join(f"{name.removeprefix('loss_')} {value:.4f}" for name, value in losses.items() if name != "loss")
    return (
        f"epoch {epoch + 1} step {step + 1}/{steps} | loss {losses['loss']:.4f} ({parts}) | lr {rate:.2e} | "
        f"{meter.samples_per_second():.1f} samples/s, {meter.data_wait / meter.seconds():.0%} waiting for data, "
        f"{peak_memory_gigabytes(meter.processes.device):.2f} GB | {remaining:.0f} s left in this epoch"
    )
