"""What a run leaves behind: log lines, JSON lines, the curve, TensorBoard and wandb. Rank 0 alone writes."""

import fcntl
import importlib.util
import json
import os
import resource
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

import torch
from tqdm import tqdm

from misc.errors import UserError
from misc.files import lock_file, unfinished, whole_file
from misc.run.profiling import TRACE
from misc.run.progress import Progress

LOG = "train.log"
METRICS = "metrics.jsonl"
RUN_FILES = (
    "config.yaml",
    METRICS,
    LOG,
    "curve.png",
    "retrieval.png",
    "queries.jsonl",
    TRACE,
    "checkpoint_last.pth",
    "checkpoint_best.pth",
)
"""All that a run writes into its folder, besides TensorBoard's event files."""


def check_run_folder(folder: Path, *, overwrite: bool) -> None:
    """Raises UserError when the folder already holds a run, unless it may be overwritten, or cannot be a folder."""
    existing = next((parent for parent in (folder, *folder.parents) if parent.exists()), folder)
    if not existing.is_dir():
        raise UserError(f"model.saved_path: {folder} cannot be made, since {existing} is a file: choose another folder")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(f"model.saved_path: {existing} may not be written to: choose another folder")
    held = [name for name in RUN_FILES if (folder / name).exists() and not _is_empty_log(folder / name)]
    if held and not overwrite:
        raise UserError(
            f"model.saved_path: {folder} already holds a run ({', '.join(held)}): choose another model.saved_path, or "
            "give --resume to go on with it, or --overwrite to replace it"
        )


def _is_empty_log(path: Path) -> bool:
    """What is left of a run that was ended before it began."""
    return path.name == LOG and path.stat().st_size == 0


class RunLog:
    """The run's log; on other ranks than 0, and without a folder, it writes no files.

    The log file is locked as long as the run lives, so that no other run can write into its folder.

    Args:
        folder: of the run, made where it is missing. None writes to the screen alone.
        is_main: whether this process writes at all.
        held: of `hold_run`, where the folder held a run before.
        overwrite: replace a run that the folder holds.
        resume: go on with the run that the folder holds.
        tensorboard, wandb_project: further places to log to.
        run_id: of the run, by which wandb knows one that is resumed.
        config: the merged configuration as plain values, for wandb.

    Raises UserError when another run writes into the folder, and when TensorBoard or wandb is wanted and not installed.
    """

    def __init__(
        self,
        folder: Path | None,
        *,
        is_main: bool = True,
        held: TextIO | None = None,
        overwrite: bool = False,
        resume: Progress | None = None,
        tensorboard: bool = False,
        wandb_project: str | None = None,
        run_id: str | None = None,
        config: dict | None = None,
    ):
        for name, wanted in (("tensorboard", tensorboard), ("wandb", wandb_project)):
            if wanted and importlib.util.find_spec(name) is None:
                raise UserError(f"log.{name}: the package {name} is not installed: pip install {name}, or turn it off")
        self.is_main = is_main
        self.folder = folder if is_main else None
        self.text = self.writer = self.wandb_run = None
        if self.folder is None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        self.text = held or _locked(self.folder / LOG)
        if resume is None:
            check_run_folder(self.folder, overwrite=overwrite)  # once more: nobody else can change it now
            self._clear()
        else:
            self._keep_epochs(resume.epoch)
        for name in RUN_FILES:
            unfinished(self.folder / name).unlink(missing_ok=True)
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter  # an optional package

            self.writer = SummaryWriter(str(self.folder))
        if wandb_project:
            import wandb  # an optional package

            self.wandb_run = wandb.init(
                project=wandb_project, dir=str(self.folder), config=config, id=run_id, resume="allow"
            )

    def _clear(self) -> None:
        for replaced in (*map(self.folder.joinpath, RUN_FILES), *self.folder.glob("events.out.tfevents.*")):
            if replaced.name != LOG:
                replaced.unlink(missing_ok=True)
        self.text.truncate(0)

    def _keep_epochs(self, count: int) -> None:
        """Drops what metrics.jsonl holds beyond the checkpoint: an epoch that is done again, or half a line."""
        path = self.folder / METRICS
        kept = [json.dumps(record) + "\n" for record in read_records(path) if record["epoch"] <= count]
        with whole_file(path) as file:
            file.write("".join(kept).encode())

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, *exception) -> None:
        if self.text:
            self.text.close()
        if self.writer:
            self.writer.close()
        if self.wandb_run:
            self.wandb_run.finish(exit_code=int(exception[0] is not None))

    def line(self, text: str) -> None:
        """Shows a line, above the progress bar if there is one, and keeps it in train.log."""
        if not self.is_main:
            return
        tqdm.write(text, file=sys.stdout)
        sys.stdout.flush()
        if self.text:
            self.text.write(text + "\n")

    @contextmanager
    def progress(self, total: int, done: int, title: str):
        """A progress bar with speed and remaining time, where a terminal shows it."""
        hidden = None if self.is_main else True  # None: tqdm asks whether stderr is a terminal
        with tqdm(total=total, initial=done, desc=title, disable=hidden, leave=False, dynamic_ncols=True) as bar:
            yield bar

    def scalars(self, values: dict[str, float], iteration: int) -> None:
        """Numbers of one iteration, for TensorBoard and wandb."""
        if self.writer:
            for name, value in values.items():
                self.writer.add_scalar(name, value, iteration)
        if self.wandb_run:
            self.wandb_run.log(values, step=iteration)

    def epoch(self, record: dict[str, float], iteration: int) -> None:
        """One line of metrics.jsonl."""
        self.scalars({f"epoch/{name}": value for name, value in record.items()}, iteration)
        if self.folder:
            with (self.folder / METRICS).open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
                file.flush()
                os.fsync(file.fileno())  # the checkpoint that comes next says that this epoch is done

    def curve(self) -> None:
        """Draws loss and retrieval over the epochs of metrics.jsonl as curve.png."""
        if not self.folder:
            return
        from matplotlib.figure import Figure  # takes half a second, and rank 0 alone draws

        records = read_records(self.folder / METRICS)
        epochs = [record["epoch"] for record in records]
        figure = Figure(figsize=(9, 3.5), layout="constrained")
        loss, retrieval = figure.subplots(1, 2)
        for name in records[0]:
            if name.startswith("loss"):
                label = name.removeprefix("loss_") if name != "loss" else "sum"
                loss.plot(epochs, [record[name] for record in records], marker="o", label=label)
        for name, label in (("r1", "R@1"), ("r5", "R@5"), ("r10", "R@10"), ("mAP", "mAP"), ("mINP", "mINP")):
            retrieval.plot(epochs, [record[name] for record in records], marker="o", label=label)
        for axes, title in ((loss, "training loss (weighted)"), (retrieval, "retrieval (%)")):
            axes.set(title=title, xlabel="epoch")
            axes.xaxis.get_major_locator().set_params(integer=True)
            axes.grid(alpha=0.3)
            axes.legend(fontsize="small")
        figure.savefig(self.folder / "curve.png", dpi=120)


def hold_run(folder: Path) -> TextIO | None:
    """Holds the run that is in a folder, so that nobody changes what is read of it. Returns: its log for `RunLog`, None
    where there is no run. Raises UserError while another run is writing there."""
    return _locked(folder / LOG) if (folder / LOG).is_file() else None


def _locked(path: Path) -> TextIO:
    """The file, open to append to, and locked by this process (not by its children) until it ends, however it ends."""
    file = path.open("a", encoding="utf-8", buffering=1)
    try:
        unlocked = lock_file(file, fcntl.lockf)
    except BlockingIOError as error:
        raise UserError(
            f"model.saved_path: another run is writing into {path.parent}: end it, or choose another folder"
        ) from error
    if unlocked:
        tqdm.write(f"warning: {path.parent} cannot be locked ({unlocked}): start no second run into it")
    return file


def read_records(path: Path) -> list[dict[str, float]]:
    """The epochs of a metrics.jsonl, whose last line may have been cut off; none where there is no such file."""
    records = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            records.append(json.loads(line))
        except ValueError:  # the line that was being written when the machine went down
            break
    return records


def wandb_project(wanted: bool) -> str | None:
    """The wandb project to log to: the environment's WANDB_PROJECT, else `tbps-clip` where wandb is wanted."""
    return os.environ.get("WANDB_PROJECT") or ("tbps-clip" if wanted else None)


def peak_memory_gigabytes(device: torch.device) -> float:
    """Largest memory so far, in 10⁹ bytes: of the GPU, or resident of this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e9 if sys.platform == "darwin" else peak * 1024 / 1e9
