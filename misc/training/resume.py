"""The checkpoints of a run: what they hold, when they are written, and how a run goes on from one."""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from misc.config.loading import flatten
from misc.config.rules import RULES, TOWER_KEYS
from misc.errors import UserError, first_of
from misc.files import partial_path
from misc.run.checkpoint import read_checkpoint, write_checkpoint
from misc.run.folder import BEST_CHECKPOINT, LAST_CHECKPOINT, check_run_folder
from misc.run.progress import Progress
from misc.system.distributed import Launch, Ranks
from misc.training.trainer import Trainer
from model.architecture import QUICK_GELU


def find_start(folder: Path, *, resume: bool, overwrite: bool, launch: Launch) -> dict[str, Any] | None:
    """The checkpoint to go on from, or None where a new run begins.

    A run goes on where that is asked for, and where torchrun has started the processes anew after one of them died.

    Args:
        folder: of the run; nothing is changed in it.
        resume, overwrite: what the user asked for.
        launch: of this process.

    Raises UserError where there is nothing to resume, the checkpoint is broken, or the folder holds another run.
    """
    path = folder / LAST_CHECKPOINT
    if resume:
        if not path.is_file():
            raise UserError(
                f"--resume: there is no {path}: set model.saved_path to the folder of a run, or leave --resume out"
            )
        content = _read(path)
        if "progress" not in content:
            raise UserError(
                f"--resume: {path} holds no state of a training: start from its weights with model.ckpt_type=saved "
                f"model.saved_path={path}"
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
        model.setdefault("activation", QUICK_GELU)  # the only one, when there was no choice yet
        if missing := [key for key in TOWER_KEYS if key not in model]:
            raise UserError(f"{path}: its configuration has no model.{missing[0]}: begin another run")
    return content


@dataclass(frozen=True)
class RunIdentity:
    """What decides the steps of a run; a run may only go on where it is the same.

    Attributes:
        config: merged, as plain values.
        batch: samples that are contrasted with each other in a step.
        precision: number format of the encoders.
        training_set: fingerprint of the training split.
    """

    config: dict[str, Any]
    batch: int
    precision: str
    training_set: str

    def state(self) -> dict[str, Any]:
        """Plain values for a checkpoint, besides `config`."""
        return {"batch": self.batch, "precision": self.precision, "training_set": self.training_set}

    def check(self, saved: dict[str, Any], path: Path) -> None:
        """Raises UserError where the checkpoint `saved`, which lies at `path`, is of another course."""
        own, other = flatten(self.config), flatten(saved["config"])
        differences = [
            f"{key} is {own[key]} here and {other[key]} there"
            for key, rule in RULES.items()
            if key in other and own[key] != rule.values.convert(other[key]) and not rule.may_change
        ]
        if self.batch != saved["batch"]:
            product = "processes × data.batch_size" if self.config["model"]["use_gather"] else "data.batch_size"
            differences.append(f"{product} is {self.batch} here and {saved['batch']} there")
        if self.precision != saved["precision"]:
            differences.append(f"misc.precision comes to {self.precision} here and to {saved['precision']} there")
        if differences:
            raise UserError(
                f"the run of {path} cannot go on: {'; '.join(sorted(differences))}: resume it with its own "
                f"configuration, --config {path.parent / 'config.yaml'}, or begin another run"
            )
        if self.training_set != saved["training_set"]:
            raise UserError(
                f"the run of {path} cannot go on: the training captions are not those that it began with: give its "
                "anno_dir and data.back_translation_file, or begin another run"
            )


@dataclass(frozen=True)
class CheckpointWriter:
    """Keeps a run on the disk. Rank 0 writes, and the others wait for it.

    Attributes:
        folder: of the run.
        trainer, progress: what is kept.
        course: what decides the steps.
        launch: of this process.
        run_id: of the run, for loggers that go on with it.
        processes: where this process stands.
    """

    folder: Path
    trainer: Trainer
    progress: Progress
    identity: RunIdentity
    launch: Launch
    run_id: str
    ranks: Ranks

    def save_last(self) -> None:
        """Writes `checkpoint_last.pth`, from which the run can go on. Call it on all ranks."""
        if self.ranks.is_main:
            own = {
                "progress": self.progress.state(),
                **self.identity.state(),
                "launch": self.launch.name,
                "run_id": self.run_id,
            }
            self._write(LAST_CHECKPOINT, self.trainer.state() | own)
        self.ranks.all_reduce_max(0)  # no rank ends, which would end the others, before the file is there

    def save_best(self) -> None:
        """Writes `checkpoint_best.pth`: weights to evaluate and to start from."""
        if self.ranks.is_main:
            self._write(BEST_CHECKPOINT, {"model": self.trainer.state()["model"]})

    def _write(self, name: str, content: dict[str, Any]) -> None:
        broken = [key for key, tensor in content["model"].items() if not tensor.isfinite().all()]
        if broken:
            raise UserError(
                f"the weights are not finite after epoch {self.progress.epoch + 1}, step {self.progress.step} "
                f"({first_of(broken)}): {self.folder / name} is left as it is; lower schedule.lr, or set "
                "misc.precision=fp32"
            )
        common = {"config": self.identity.config, "epoch": self.progress.epoch, "metrics": self.progress.metrics}
        write_checkpoint(self.folder / name, content | common)

    def check_space(self) -> None:
        """Raises UserError, on rank 0, where the disk has no room for the checkpoints to come."""
        if not self.ranks.is_main:
            return
        parameters = list(self.trainer.bare_model.parameters())
        weights = sum(p.nbytes for p in parameters)
        last = weights + 2 * sum(p.nbytes for p in parameters if p.requires_grad)  # AdamW keeps two numbers for each
        needed = 2 * last + weights  # a new file is complete before the old one goes
        existing = next(parent for parent in (self.folder, *self.folder.absolute().parents) if parent.exists())
        own = [self.folder / LAST_CHECKPOINT, self.folder / BEST_CHECKPOINT]
        replaced = sum(path.stat().st_size for path in (*own, *map(partial_path, own)) if path.is_file())
        free = shutil.disk_usage(existing).free + replaced
        if free < needed:
            raise UserError(
                f"model.saved_path: {existing} has {free / 1e9:.1f} GB free, and the checkpoints of this run need "
                f"{needed / 1e9:.1f} GB: free some space or choose another folder"
            )
