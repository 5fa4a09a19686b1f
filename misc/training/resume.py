"""The checkpoints of a run: their contents, writing them, and resuming from one."""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from misc.config.loading import flatten
from misc.config.rules import AUTO, ENCODER_KEYS, RULES
from misc.errors import UserError, first_of
from misc.files import check_possible, exists, is_file, partial_path
from misc.run.checkpoint import read_checkpoint, write_checkpoint
from misc.run.folder import BEST_CHECKPOINT, CONFIG, LAST_CHECKPOINT, check_run_folder
from misc.run.progress import Progress, is_count
from misc.system.distributed import Launch, Ranks
from misc.training.trainer import Trainer
from model.architecture import QUICK_GELU
from model.pretrained.names import from_ours
from model.pretrained.settings import settings_from_checkpoint
from model.pretrained.sizes import read_sizes

NOT_RESUMED = "it is damaged or of other code: start a new run, from its weights with model.checkpoint=FILE"


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
        remedy = "set model.saved_path to the folder of a run, or leave out --resume"
        check_possible(path, "--resume", remedy)
        if not is_file(path):
            raise UserError(f"--resume: there is no {path}: {remedy}")
        content = read_checkpoint(path)
        if "progress" not in content:
            raise UserError(
                f"--resume: {path} contains only weights, no training state: start a new run from them with "
                f"model.checkpoint={path} and another model.saved_path"
            )
        _check_state(content, path)
        return content
    if launch.attempt > 0 and is_file(path):
        content = read_checkpoint(path)
        if content.get("launch") == launch.name:
            _check_state(content, path)
            return content
    check_run_folder(folder, overwrite=overwrite)
    return None


def _check_state(content: dict[str, Any], path: Path) -> None:
    """Checks everything in a training state, read from `path`, except its tensors, which `load_state` compares."""
    model = content["config"].get("model")
    if isinstance(model, dict):
        model.setdefault("activation", QUICK_GELU)  # old checkpoints do not record it: there was no other
    config = flatten(content["config"])
    if missing := [key for key in ENCODER_KEYS if config.get(f"model.{key}", AUTO) == AUTO]:
        raise UserError(f"{path}: its configuration has no model.{missing[0]}: start a new run")
    valid = {
        f"config.{key}": rule.values.accepts(config[key])
        for key, rule in RULES.items()
        if key in config and not rule.may_change
    }
    valid |= {
        "optimizer": isinstance(content.get("optimizer"), dict),
        "scaler": isinstance(content.get("scaler"), dict),
        "batch": is_count(content.get("batch")),
        **{name: isinstance(content.get(name), str) for name in ("precision", "training_set", "run_id")},
    }
    if invalid := [name for name, is_valid in valid.items() if not is_valid]:
        raise UserError(f"{path} has no valid {invalid[0]}: {NOT_RESUMED}")
    try:
        Progress.from_state(content.get("progress"))
        shapes = {name: tuple(tensor.shape) for name, tensor in from_ours(content["model"]).items()}
        settings_from_checkpoint(content["config"]).check(read_sizes(shapes))
    except UserError as error:
        raise UserError(f"{path}: {error}: {NOT_RESUMED}") from error


def load_state(trainer: Trainer, saved: dict[str, Any], epochs: int, steps: int, path: Path) -> None:
    """Restores the model, the optimizer and the scaler of a checkpoint.

    Args:
        saved: the checkpoint, which was read from `path`.
        epochs, steps: epochs of the run, and steps of an epoch.

    Raises UserError if the position is not one of the run, or a tensor does not belong to it.
    """
    progress = Progress.from_state(saved["progress"])
    if progress.epoch > epochs or progress.step > (steps if progress.epoch < epochs else 0):
        raise UserError(
            f"{path}: it was saved in epoch {progress.epoch + 1}, after step {progress.step}, and the run has {epochs} "
            f"epochs of {steps} steps: {NOT_RESUMED}"
        )
    try:
        trainer.load_state(saved, started=progress.epoch > 0 or progress.step > 0)
    except UserError as error:
        raise UserError(f"{path}: {error}: {NOT_RESUMED}") from error


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
            wanted, rest = divmod(saved["batch"] * own["data.batch_size"], self.batch)
            remedy = "use another number of processes" if rest else f"data.batch_size={wanted} makes them equal"
            differences.append(f"{product} is {self.batch} now and {saved['batch']} in the checkpoint ({remedy})")
        if self.precision != saved["precision"]:
            differences.append(f"misc.precision is {self.precision} now and {saved['precision']} in the checkpoint")
        if differences:
            raise UserError(
                f"the run of {path} cannot be resumed: {'; '.join(sorted(differences))}: use its own configuration, "
                f"--config {path.parent / CONFIG}, or start a new run"
            )
        if self.training_set != saved["training_set"]:
            raise UserError(
                f"the run of {path} cannot be resumed: it was started with other training captions: set its "
                "anno_dir, data.back_translation_file and data.skip_unreadable, or start a new run"
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
        existing = next(parent for parent in (self.folder, *self.folder.absolute().parents) if exists(parent))
        own = [self.folder / LAST_CHECKPOINT, self.folder / BEST_CHECKPOINT]
        replaced = sum(path.stat().st_size for path in (*own, *map(partial_path, own)) if is_file(path))
        free = shutil.disk_usage(existing).free + replaced
        if free < needed:
            raise UserError(
                f"model.saved_path: {existing} has {free / 1e9:.1f} GB free, and the checkpoints of this run need "
                f"{needed / 1e9:.1f} GB: free some space or choose another folder"
            )
