"""A training run: all its parts, built and checked before anything is trained or written."""

import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from easydict import EasyDict
from torch.utils.data import DataLoader

from misc.builders.architecture import resolve_architecture
from misc.builders.data import build_evaluator, build_loader, read_dataset
from misc.builders.model import build_model, initial_weights
from misc.builders.preprocessing import check_no_preprocessing
from misc.builders.training import build_objectives, build_trainer
from misc.config.loading import to_plain
from misc.retrieval.evaluation import Evaluator
from misc.run.folder import LAST_CHECKPOINT, lock_run
from misc.run.log import RunLog, wandb_project
from misc.run.progress import Progress
from misc.system.distributed import Launch, Ranks
from misc.system.precision import Precision
from misc.training.resume import CheckpointWriter, RunIdentity, find_start, load_state
from misc.training.trainer import Trainer
from model.tbps_clip import count_trainable
from text_utils.tokenizer import Tokenizer


@dataclass(frozen=True)
class Run:
    """A training run that can start.

    Attributes:
        config: merged, without any `auto`.
        ranks: the rank of this process, and how many there are.
        folder: the run writes all its files here.
        resumed: whether it continues a run that the folder contains.
        lock: the lock of that run's folder; None on other ranks than 0 and if there is no such run.
        run_id: identifies the run, so that wandb continues it when it is resumed.
        progress: how far the run has come.
        loader: the training batches of this rank.
        trainer: trains an epoch; evaluator: evaluates the model after it.
        checkpoints: writes the checkpoints.
        notes: lines for the start of the log.
    """

    config: EasyDict
    ranks: Ranks
    folder: Path
    resumed: bool
    lock: IO | None
    run_id: str
    progress: Progress
    loader: DataLoader
    trainer: Trainer
    evaluator: Evaluator
    checkpoints: CheckpointWriter
    notes: list[str]

    def open_log(self, *, overwrite: bool) -> RunLog:
        """Opens the log. From here on the folder belongs to this run."""
        return RunLog(
            self.folder,
            is_main=self.ranks.is_main,
            lock=self.lock,
            overwrite=overwrite,
            resume=self.progress if self.resumed else None,
            tensorboard=self.config.log.tensorboard,
            wandb_project=wandb_project(self.config.log.wandb),
            run_id=self.run_id,
            config=to_plain(self.config),
        )

    @property
    def trace_folder(self) -> Path | None:
        """The folder for a profiler trace; None if this process writes none."""
        return self.folder if self.config.log.profile and self.ranks.is_main else None


def run_folder(config: EasyDict) -> Path:
    """Returns the folder that a run writes into: `model.saved_path`.

    With `ckpt_type: saved`, as in the published code, `model.saved_path` is the file to start from. The run then goes
    into a folder beside it, named like the file without its suffix.
    """
    path = Path(config.model.saved_path)
    return path.with_suffix("") if config.model.ckpt_type == "saved" else path


def prepare_run(config: EasyDict, ranks: Ranks, *, overwrite: bool, resume: bool) -> Run:
    """Builds and checks all parts of a run. Nothing is written.

    Raises UserError if anything is wrong with the configuration, the data, the weights or the folder.
    """
    check_no_preprocessing(config)
    folder, launch = run_folder(config), Launch.current()
    lock = lock_run(folder) if ranks.is_main else None
    saved = ranks.broadcast_from_main(lambda: find_start(folder, resume=resume, overwrite=overwrite, launch=launch))
    progress = Progress() if saved is None else Progress.from_state(saved["progress"])
    precision = Precision.choose(config.misc.precision, ranks.device)
    tokenizer = Tokenizer()
    splits, statistics = read_dataset(config, tokenizer, ranks)
    weights = initial_weights(config, ranks) if saved is None else None
    config = resolve_architecture(config, weights, None if saved is None else saved["config"])
    contrasted = config.data.batch_size * (ranks.world_size if config.model.use_gather else 1)
    identity = RunIdentity(to_plain(config), contrasted, precision.name, splits["train"].fingerprint)
    if saved is not None:
        identity.check(saved, folder / LAST_CHECKPOINT)
    objectives = build_objectives(config, ranks)
    evaluator = build_evaluator(config, splits, tokenizer, precision, ranks)
    loader = build_loader(config, splits["train"], objectives, tokenizer, ranks)
    identities = len(set(splits["train"].image_identities))
    model, weight_notes = build_model(config, objectives, identities, weights=weights, resumed=saved is not None)
    del weights
    trainer = build_trainer(config, model, objectives, len(loader), precision, ranks)
    run_id = uuid.uuid4().hex if saved is None else saved["run_id"]
    checkpoints = CheckpointWriter(folder, trainer, progress, identity, launch, run_id, ranks)
    checkpoints.check_space()
    notes = [
        *rank_notes(ranks, precision),
        *weight_notes,
        *statistics,
        f"{count_trainable(model) / 1e6:.1f} M parameters are trained; the run is written to {folder}",
    ]
    if saved is not None:
        load_state(trainer, saved, config.schedule.epoch, len(loader), folder / LAST_CHECKPOINT)
        finished = f"the run is finished: all {progress.epoch} epochs are trained, so there is nothing to continue"
        position = f"resumed in epoch {progress.epoch + 1}, after step {progress.step} of {len(loader)}"
        notes.append(position if progress.epoch < config.schedule.epoch else finished)
    resumed = saved is not None
    return Run(config, ranks, folder, resumed, lock, run_id, progress, loader, trainer, evaluator, checkpoints, notes)


def rank_notes(ranks: Ranks, precision: Precision) -> list[str]:
    """Returns lines for the log: processes, device and number format."""
    notes = [f"{ranks.world_size} process(es), this one on {ranks.device}, encoders in {precision.name}"]
    return [*notes, f"warning: {ranks.note}"] if ranks.note else notes
