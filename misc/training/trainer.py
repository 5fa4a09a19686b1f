"""One optimizer step, and one epoch of steps."""

import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from misc.data.batches import Batch, batches
from misc.data.images import damaged_warning
from misc.data.sampler import GlobalBatchSampler
from misc.errors import UserError
from misc.run.log import RunLog
from misc.run.profiling import peak_memory_gigabytes
from misc.run.progress import EpochRecord, Progress, is_number
from misc.system.distributed import Ranks
from misc.system.precision import Precision
from misc.system.prefetch import prefetched
from misc.system.randomness import derive_seed
from misc.training.compilation import pad_captions
from misc.training.gradient_cache import backward_in_chunks
from misc.training.meter import Meter, NonFiniteLoss
from misc.training.optimizer import check_optimizer_state, check_tensors, set_learning_rate
from model.objectives import Objectives, soft_label_ratio_at, total
from model.tbps_clip import TBPSCLIP, Features, Views, needed


@dataclass
class Trainer:
    """Trains a model: everything that a step needs in addition to its batch.

    Attributes:
        model: TBPSCLIP, in DistributedDataParallel if there are several ranks.
        objectives: the losses.
        optimizer: AdamW with `lr_ratio` in its groups.
        learning_rate: the learning rate of an iteration, counted from 0 over the whole training.
        final_soft_label_ratio: α of N-ITC after the first epoch.
        precision, scaler: mixed precision.
        ranks: the rank of this process, and how many there are.
        seed: the seed of the dropout.
        chunk_size: number of rows that are encoded at the same time; None encodes all B rows of this rank.
        caption_multiple: captions are padded to a multiple of this length, so that few shapes are compiled.
        damaged: files of this rank that could only be decoded in part, and whether the log names them already.
    """

    model: TBPSCLIP | DistributedDataParallel
    objectives: Objectives
    optimizer: torch.optim.Optimizer
    learning_rate: Callable[[int], float]
    final_soft_label_ratio: float
    precision: Precision
    scaler: torch.amp.GradScaler
    ranks: Ranks
    seed: int
    chunk_size: int | None = None
    caption_multiple: int = 1
    damaged: dict[str, bool] = field(default_factory=dict)

    def step(self, batch: Batch, iteration: int, steps_per_epoch: int) -> dict[str, Tensor]:
        """Makes one optimizer step with this rank's B samples of the global batch.

        Args:
            batch: on any device.
            iteration: counted from 0 over the whole training.
            steps_per_epoch: in the first `steps_per_epoch` iterations, the weight of the soft labels grows.

        Returns: weighted losses by name, detached 0-dim tensors; reading one waits for the device.
        """
        set_learning_rate(self.optimizer, self.learning_rate(iteration))
        self.optimizer.zero_grad(set_to_none=True)
        soft_label_ratio = soft_label_ratio_at(iteration, steps_per_epoch, self.final_soft_label_ratio)
        if not self._in_chunks(len(batch)):
            weighted = self._backward(batch, iteration, soft_label_ratio)
        else:
            weighted = backward_in_chunks(
                batch,
                needed(self.chunk_size),
                device=self.ranks.device,
                encode=lambda views, number, soft_labels: self._encode(views, iteration, number, soft_labels),
                objectives=self.objectives,
                soft_label_ratio=soft_label_ratio,
                scale_loss=self.scaler.scale,
                without_reduction=self._without_reduction,
            )
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return weighted

    def _backward(self, batch: Batch, iteration: int, soft_label_ratio: float) -> dict[str, Tensor]:
        """Computes the gradients of the whole batch in one pass.

        Returns: weighted losses by name, detached.
        """
        batch = batch.to(self.ranks.device)
        features = self._encode(batch.views, iteration, soft_labels=soft_label_ratio > 0)
        weighted = self.objectives(features, batch.identities, soft_label_ratio, batch.views.masked_labels)
        self.scaler.scale(total(weighted)).backward()
        return {name: loss.detach() for name, loss in weighted.items()}

    def _encode(self, views: Views, iteration: int, chunk: int = 0, soft_labels: bool = False) -> Features:
        """Encodes a chunk; with `soft_labels`, its captions once more with other dropout, for N-ITC.

        Its dropout depends only on (seed, iteration, rank, chunk): it is the same when the chunk is encoded again, and
        after a restart.
        """
        torch.manual_seed(derive_seed(self.seed, "dropout", iteration, self.ranks.rank, chunk))
        longest = len(self.bare_model.text_encoder.positional_embedding)
        views = pad_captions(views, self.caption_multiple, longest)
        with self.precision.autocast():
            return self.model(views, soft_labels=soft_labels and "nitc" in self.objectives.weights)

    def _in_chunks(self, rows: int) -> bool:
        return self.chunk_size is not None and self.chunk_size < rows

    def move(self, batch: Batch) -> Batch:
        """Moves a batch to the device without waiting, if it is not encoded in chunks: they are moved one by one."""
        return batch if self._in_chunks(len(batch)) else batch.to(self.ranks.device)

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
        """Trains the remaining steps of the current epoch, and updates `progress`.

        Args:
            loader: its length is the number of steps in a whole epoch; its sampler is set to the first remaining step.
            progress: the current epoch and step.
            log: shows a progress bar, and a line every `print_period` iterations.
            save_period: iterations between two calls of `save`; 0 never calls it.
            save: saves `progress` and the training state.
            stop: called after each step on all ranks, with the same result on all; True ends the training early. A
                single rank also calls it while it waits for a batch.
            after_step: called after each step.

        Raises NonFiniteLoss if a loss is NaN or infinite, before anything is saved after that step. Losses are read for
        every log line and before each `save`, not at every step, because reading them waits for the device.
        """
        self.model.train()
        steps = len(loader)
        assert isinstance(loader.batch_sampler, GlobalBatchSampler)
        loader.batch_sampler.epoch, loader.batch_sampler.first_step = progress.epoch, progress.step
        if progress.step == steps:
            return
        meter = Meter(self.ranks, progress)
        with log.progress(steps, progress.step, f"epoch {progress.epoch + 1}") as bar:
            waiting_since = time.perf_counter()
            # A signal must end a rank that waits for its data in vain. Several ranks only stop together, after a step.
            loaded = batches(loader, stop if self.ranks.world_size == 1 else lambda: False)
            for batch in prefetched(loaded, self.ranks.device, self.move):
                meter.waited(time.perf_counter() - waiting_since)
                iteration = progress.epoch * steps + progress.step
                meter.add(self.step(batch, iteration, steps), batch.paths)
                for path in batch.damaged:
                    self.damaged.setdefault(path, False)
                progress.step += 1
                after_step()
                stopping = stop()
                ends = stopping or progress.step == steps
                shows = ends or progress.step % print_period == 0
                saves = not ends and save_period > 0 and progress.step % save_period == 0
                if shows or saves:
                    self._synchronise(meter, log)
                if shows:
                    self._warn_of_damaged(log)
                    bar.set_postfix_str(self._show(log, meter.take_recent(), progress, iteration, steps))
                if saves:
                    save()
                bar.update()
                if stopping:
                    break
                waiting_since = time.perf_counter()
            if meter.pending:
                self._synchronise(meter, log)

    def _synchronise(self, meter: Meter, log: RunLog) -> None:
        try:
            meter.synchronise()
        except NonFiniteLoss as error:
            log.line(f"images of the batch: {', '.join(error.paths)}")
            raise

    def _warn_of_damaged(self, log: RunLog) -> None:
        """Logs the damaged files of all ranks that the log does not name yet."""
        new = self.ranks.all_gather_list([path for path, named in self.damaged.items() if not named])
        self.damaged |= dict.fromkeys(new, True)  # another rank may meet the same file in the next epoch
        if new:
            log.line(damaged_warning(list(dict.fromkeys(new))))

    def _show(self, log: RunLog, recent: EpochRecord, progress: Progress, iteration: int, steps: int) -> str:
        """Logs the measurements since the last line. Returns: a short form for the progress bar."""
        rate, losses, speed = self.learning_rate(iteration), recent.means(), recent.speed()
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
        """Returns how many of the first `iterations` the gradient scaler has skipped.

        With fp16, the scaler skips a step if a gradient exceeds fp16's range. AdamW does not count such a step.
        """
        if not self.scaler.is_enabled():
            return 0
        counts = [state["step"] for state in self.optimizer.state.values()]
        return iterations - (int(torch.stack(counts).max()) if counts else 0)

    def summary(self, progress: Progress) -> dict[str, float]:
        """Summarises the epoch that `progress` has just finished, for metrics.jsonl.

        Returns: `loss`, `loss_<name>` (means over the epoch and all ranks), `seconds`, `samples_per_second` (of all
            ranks), `data_wait` (share of the time, 0 to 1), `peak_memory_gigabytes` (unless it is NaN), and with fp16
            `skipped_steps` (since the training began).
        """
        memory = peak_memory_gigabytes(self.ranks.device)
        skipped = self.skipped_steps((progress.epoch + 1) * progress.step)
        return {
            **progress.record.means(),
            **progress.record.speed(),
            **({} if math.isnan(memory) else {"peak_memory_gigabytes": memory}),
            **({"skipped_steps": skipped} if self.scaler.is_enabled() else {}),
        }

    def state(self) -> dict[str, Any]:
        """Returns the state of model, optimizer and scaler, for a checkpoint."""
        return {
            "model": self.bare_model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
        }

    def load_state(self, state: dict[str, Any], *, started: bool = True) -> None:
        """Restores a result of `state`, whose tensors may be on any device. Everything is checked before.

        Args:
            started: whether the state is from after the first step.

        Raises UserError if the state belongs to another model, or a value is invalid.
        """
        own = self.bare_model.state_dict()
        check_tensors("the model", state["model"], own)
        check_optimizer_state(self.optimizer, state["optimizer"], may_be_empty=not started or self.scaler.is_enabled())
        scaler = self.scaler.state_dict()
        if state["scaler"].keys() != scaler.keys() or not all(is_number(each, 0) for each in state["scaler"].values()):
            raise UserError("its scaler has other values than a scaler of this number format")
        self.bare_model.load_state_dict(state["model"])
        # The groups are made from the configuration, which is the same.
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": state["optimizer"]["state"], "param_groups": groups})
        self.scaler.load_state_dict(state["scaler"])

    @property
    def bare_model(self) -> TBPSCLIP:
        """The model without DistributedDataParallel."""
        return self.model.module if isinstance(self.model, DistributedDataParallel) else self.model
