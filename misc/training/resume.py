"""The checkpoints of a run: their contents, writing them, and resuming from one."""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from misc.config.loading import flatten
from misc.config.rules import RULES, TOWER_KEYS
from misc.errors import UserError, first_of
from misc.files import partial_path
from misc.run.checkpoint import read_checkpoint, write_checkpoint
from misc.run.folder import BEST_CHECKPOINT, CONFIG, LAST_CHECKPOINT, check_run_folder
from misc.run.progress import Progress
from misc.system.distributed import Launch, Ranks
from misc.training.trainer import Trainer
from model.architecture import QUICK_GELU


def find_start(folder: Path, *, resume: bool, overwrite: bool, launch: Launch) -> dict[str, Any] | None:
    """Returns the checkpoint to continue from, or None if a new run starts.

    A run continues if the user asks for it. It also continues if torchrun restarted the processes because one died.

    Args:
        folder: the folder of the run; nothing is changed in it.
        resume, overwrite: the user's options.
        launch: how this process was launched.

    Raises UserError if there is nothing to resume, the checkpoint is broken, or the folder contains another run.
    """
    path = folder / LAST_CHECKPOINT
    if resume:
        if not path.is_file():
            raise UserError(
                f"--resume: there is no {path}: set model.saved_path to the folder of a run, or leave out --resume"
            )
        content = _read(path)
        if "progress" not in content:
            raise UserError(
                f"--resume: {path} contains only weights, no training state: start a new run from them with "
                f"model.checkpoint={path} and another model.saved_path"
            )
        return content
    if launch.attempt > 0 and path.is_file():
        content = _read(path)
        if content.get("launch") == launch.name:
            return content
    check_run_folder(folder, overwrite=overwrite)
    return None


def _read(path: Path) -> dict[str, Any]:
    content = read_checkpoint(path)
    model = content["config"].get("model")
    if "progress" in content and isinstance(model, dict):
        model.setdefault("activation", QUICK_GELU)  # old checkpoints do not record it: there was no other
        if missing := [key for key in TOWER_KEYS if key not in model]:
            raise UserError(f"{path}: its configuration has no model.{missing[0]}: start a new run")
    return content


@dataclass(frozen=True)
class RunIdentity:
    """The settings and data that decide the steps of a run. A run may only continue if they are the same.

    Attributes:
        config: the merged configuration as plain values.
        batch: number of samples that are contrasted with each other in a step.
        precision: number format of the encoders.
        training_set: fingerprint of the training split.
    """

    config: dict[str, Any]
    batch: int
    precision: str
    training_set: str

    def state(self) -> dict[str, Any]:
        """Returns plain values for a checkpoint, without `config`."""
        return {"batch": self.batch, "precision": self.precision, "training_set": self.training_set}

    def check(self, saved: dict[str, Any], path: Path) -> None:
        """Checks that this run can continue from the checkpoint `saved`, which was read from `path`.

        Raises UserError if its settings or its data differ.
        """
        own, other = flatten(self.config), flatten(saved["config"])
        differences = [
            f"{key} is {own[key]} now and {other[key]} in the checkpoint"
            for key, rule in RULES.items()
            if key in other and own[key] != rule.values.convert(other[key]) and not rule.may_change
        ]
        if self.batch != saved["batch"]:
            product = "processes × data.batch_size" if self.config["model"]["use_gather"] else "data.batch_size"
            differences.append(f"{product} is {self.batch} now and {saved['batch']} in the checkpoint")
        if self.precision != saved["precision"]:
            differences.append(f"misc.precision is {self.precision} now and {saved['precision']} in the checkpoint")
        if differences:
            raise UserError(
                f"the run of {path} cannot be resumed: {'; '.join(sorted(differences))}: use its own configuration, "
                f"--config {path.parent / CONFIG}, or start a new run"
            )
        if self.training_set != saved["training_set"]:
            raise UserError(
                f"the run of {path} cannot be resumed: it was started with other training captions: set its anno_dir "
                "and data.back_translation_file, or start a new run"
            )


@dataclass(frozen=True)
class CheckpointWriter:
    """Writes the checkpoints of a run. Rank 0 writes, and the other ranks wait for it.

    Attributes:
        folder: the folder of the run.
        trainer, progress: the state that is saved.
        identity: the settings and data that decide the steps.
        launch: how this process was launched.
        run_id: identifies the run, for loggers that continue it.
        ranks: the rank of this process, and how many there are.
    """

    folder: Path
    trainer: Trainer
    progress: Progress
    identity: RunIdentity
    launch: Launch
    run_id: str
    ranks: Ranks

    def save_last(self) -> None:
        """Writes `checkpoint_last.pth`, from which the run can be resumed. Call it on all ranks."""
        if self.ranks.is_main:
            own = {
                "progress": self.progress.state(),
                **self.identity.state(),
                "launch": self.launch.name,
                "run_id": self.run_id,
            }
            self._write(LAST_CHECKPOINT, self.trainer.state() | own)
        self.ranks.all_reduce_max(0)  # a rank that ends would stop the others, so all wait for the file

    def save_best(self) -> None:
        """Writes `checkpoint_best.pth`: weights to evaluate, or to start another run from."""
        if self.ranks.is_main:
            self._write(BEST_CHECKPOINT, {"model": self.trainer.state()["model"]})

    def _write(self, name: str, content: dict[str, Any]) -> None:
        broken = [key for key, tensor in content["model"].items() if not tensor.isfinite().all()]
        if broken:
            raise UserError(
                f"the weights are not finite after epoch {self.progress.epoch + 1}, step {self.progress.step} "
                f"({first_of(broken)}), so {self.folder / name} is not overwritten: lower schedule.lr, or set "
                "misc.precision=fp32"
            )
        common = {"config": self.identity.config, "epoch": self.progress.epoch, "metrics": self.progress.metrics}
        write_checkpoint(self.folder / name, content | common)

    def check_space(self) -> None:
        """Checks on rank 0 that the disk has room for the checkpoints of this run.

        Raises UserError if it has not.
        """
        if not self.ranks.is_main:
            return
        parameters = list(self.trainer.bare_model.parameters())
        weights = sum(p.nbytes for p in parameters)
        last = weights + 2 * sum(p.nbytes for p in parameters if p.requires_grad)  # AdamW keeps two numbers for each
        needed = 2 * last + weights  # a new file is complete before the old one is deleted
        existing = next(parent for parent in (self.folder, *self.folder.absolute().parents) if parent.exists())
        own = [self.folder / LAST_CHECKPOINT, self.folder / BEST_CHECKPOINT]
        replaced = sum(path.stat().st_size for path in (*own, *map(partial_path, own)) if path.is_file())
        free = shutil.disk_usage(existing).free + replaced
        if free < needed:
            raise UserError(
                f"model.saved_path: {existing} has {free / 1e9:.1f} GB free, and the checkpoints of this run need "
                f"{needed / 1e9:.1f} GB: free some space or choose another folder"
            )
