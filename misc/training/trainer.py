"""One optimizer step, and one epoch of them."""

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from misc.data.batches import Batch, batches
from misc.errors import UserError
from misc.run.log import RunLog
from misc.run.profiling import peak_memory_gigabytes
from misc.run.progress import EpochRecord, Progress
from misc.system.distributed import Ranks
from misc.system.precision import Precision
from misc.system.randomness import derive_seed
from misc.training.gradient_cache import backward_in_chunks
from misc.training.meter import Meter, NonFiniteLoss
from misc.training.optimizer import set_learning_rate
from model.objectives import Objectives, soft_label_ratio_at
from model.tbps_clip import Features, Views


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
        seed: of the dropout.
        chunk_size: rows that are encoded at once; None encodes all B rows of this rank at once.
    """

    model: nn.Module
    objectives: Objectives
    optimizer: torch.optim.Optimizer
    learning_rates: list[float]
    softlabel_ratio: float
    precision: Precision
    scaler: torch.amp.GradScaler
    ranks: Ranks
    seed: int
    chunk_size: int | None = None

    def step(self, batch: Batch, iteration: int, steps_per_epoch: int) -> dict[str, Tensor]:
        """One optimizer step on this rank's B samples of the global batch.

        Args:
            batch: on any device.
            iteration: counted from 0 over the whole training.
            steps_per_epoch: the soft labels' weight grows over the first that many iterations.

        Returns: weighted losses by name, detached 0-dim tensors (reading one waits for the device).
        """
        set_learning_rate(self.optimizer, self.learning_rates[iteration])
        self.optimizer.zero_grad(set_to_none=True)
        soft_label_ratio = soft_label_ratio_at(iteration, steps_per_epoch, self.softlabel_ratio)
        if self.chunk_size is None or self.chunk_size >= len(batch):
            weighted = self._backward(batch, iteration, soft_label_ratio)
        else:
            weighted = backward_in_chunks(
                batch,
                self.chunk_size,
                device=self.ranks.device,
                encode=lambda views, number: self._encode(views, iteration, number),
                objectives=self.objectives,
                soft_label_ratio=soft_label_ratio,
                scale_loss=self.scaler.scale,
                without_reduction=self._without_reduction,
            )
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return weighted

    def _backward(self, batch: Batch, iteration: int, soft_label_ratio: float) -> dict[str, Tensor]:
        """The gradients of the whole batch in one pass. Returns: weighted losses by name, detached."""
        batch = batch.to(self.ranks.device)
        features = self._encode(batch.views, iteration)
        weighted = self.objectives(features, batch.identities, soft_label_ratio, batch.views.masked_labels)
        self.scaler.scale(sum(weighted.values())).backward()
        return {name: loss.detach() for name, loss in weighted.items()}

    def _encode(self, views: Views, iteration: int, chunk: int = 0) -> Features:
        """Dropout depends on (seed, iteration, rank, chunk) alone, so it is the same when a chunk is encoded once more,
        and after a restart."""
        torch.manual_seed(derive_seed(self.seed, "dropout", iteration, self.ranks.rank, chunk))
        with self.precision.autocast():
            return self.model(views)

    def _without_reduction(self) -> AbstractContextManager:
        return self.model.no_sync() if isinstance(self.model, DistributedDataParallel) else nullcontext()

    def epoch(
        self,
        loader: DataLoader,
        progress: Progress,
        log: RunLog,
        *,
        print_period: int,
        save_period: int,
        save: Callable[[], None],
        stop: Callable[[], bool],
        after_step: Callable[[], None],
    ) -> None:
        """What is left of the epoch that `progress` is in; moves `progress` on.

        Args:
            loader: of `len` batches in a whole epoch; its sampler is told where to begin.
            progress: what is done.
            log: gets the progress, and a line every `print_period` iterations.
            save_period: iterations between two calls of `save`; 0 for none.
            save: keeps `progress` and the training state.
            stop: asked after each step, by all ranks and with the same answer; the rest of the epoch is left then.
            after_step: called after each step.

        Raises NonFiniteLoss, before anything is saved after that step. The losses are looked at on every log line and
        before each `save`, since it means waiting for the device.
        """
        self.model.train()
        steps = len(loader)
        loader.batch_sampler.epoch, loader.batch_sampler.first_step = progress.epoch, progress.step
        if progress.step == steps:
            return
        meter = Meter(self.ranks, progress)
        with log.progress(steps, progress.step, f"epoch {progress.epoch + 1}") as bar:
            waiting_since = time.perf_counter()
            for batch in batches(loader):
                meter.waited(time.perf_counter() - waiting_since)
                iteration = progress.epoch * steps + progress.step
                meter.add(self.step(batch, iteration, steps), batch.paths)
                progress.step += 1
                after_step()
                stopping = stop()
                ends = stopping or progress.step == steps
                shows = ends or progress.step % print_period == 0
                saves = not ends and save_period > 0 and progress.step % save_period == 0
                if shows or saves:
                    self._settle(meter, log)
                if shows:
                    bar.set_postfix_str(self._show(log, meter.take_recent(), progress, iteration, steps))
                if saves:
                    save()
                bar.update()
                if stopping:
                    break
                waiting_since = time.perf_counter()

    def _settle(self, meter: Meter, log: RunLog) -> None:
        try:
            meter.settle()
        except NonFiniteLoss as error:
            log.line(f"images of the batch: {', '.join(error.paths)}")
            raise

    def _show(self, log: RunLog, recent: EpochRecord, progress: Progress, iteration: int, steps: int) -> str:
        """Logs what was measured since the last line. Returns: the few words of it for the progress bar."""
        rate, losses, speed = self.learning_rates[iteration], recent.means(), recent.speed()
        log.scalars({"learning_rate": rate, **losses}, iteration)
        parts = " ".join(
            f"{name.removeprefix('loss_')} {value:.4f}" for name, value in losses.items() if name != "loss"
        )
        skipped = self.skipped_steps(iteration + 1)
        remaining = recent.seconds / recent.steps * (steps - progress.step)
        log.line(
            f"epoch {progress.epoch + 1} step {progress.step}/{steps} | loss {losses['loss']:.4f} ({parts}) | "
            f"lr {rate:.2e} | {speed['samples_per_second']:.1f} samples/s, {speed['data_wait']:.0%} waiting for data, "
            f"{peak_memory_gigabytes(self.ranks.device):.2f} GB | {remaining:.0f} s left in this epoch"
            + (f" | {skipped} steps skipped" if skipped else "")
        )
        return f"loss {losses['loss']:.3f}, {speed['samples_per_second']:.0f} samples/s"

    def skipped_steps(self, iterations: int) -> int:
        """How many of the first `iterations` the scaler of fp16 has skipped, since a gradient was beyond fp16's range.

        AdamW does not count a step that it skips.
        """
        if not self.scaler.is_enabled():
            return 0
        return iterations - max((int(state["step"]) for state in self.optimizer.state.values()), default=0)

    def summary(self, progress: Progress) -> dict[str, float]:
        """The epoch that `progress` stands at the end of, for metrics.jsonl.

        Returns: `loss`, `loss_<name>` (means over the epoch and all ranks), `seconds`, `samples_per_second` (of all
            ranks), `data_wait` (share of the time, 0 to 1), `peak_memory_gigabytes`, and with fp16 `skipped_steps`
            (since the training began).
        """
        memory = {"peak_memory_gigabytes": peak_memory_gigabytes(self.ranks.device)}
        skipped = self.skipped_steps((progress.epoch + 1) * progress.step)
        return {
            **progress.record.means(),
            **progress.record.speed(),
            **memory,
            **({"skipped_steps": skipped} if self.scaler.is_enabled() else {}),
        }

    def state(self) -> dict[str, Any]:
        """Weights, optimizer and scaler, for a checkpoint."""
        return {
            "model": self.bare_model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Goes on from what `state` gave, with tensors on any device. Raises UserError where it is another model's."""
        own, saved = (
            [group["param_names"] for group in optimizer["param_groups"]]
            for optimizer in (self.optimizer.state_dict(), state["optimizer"])
        )
        if own != saved:
            raise UserError(
                "the optimizer state of the checkpoint is of other parameters: resume with the code that wrote it, or "
                "start from its weights with model.ckpt_type=saved"
            )
        self.bare_model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])

    @property
    def bare_model(self) -> nn.Module:
        """TBPSCLIP itself."""
        return self.model.module if isinstance(self.model, DistributedDataParallel) else self.model
