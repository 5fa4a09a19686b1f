"""The log of a run: log lines, JSON lines, the curve, TensorBoard and wandb. Only rank 0 writes."""

import importlib.util
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TextIO

from tqdm import tqdm

from misc.errors import UserError, first_of, printable
from misc.files import atomic_file, find_files, partial_path
from misc.run.curve import draw_curve
from misc.run.folder import CURVE, LOG, METRICS, RUN_FILES, check_run_folder, lock_folder, read_lines, read_records
from misc.run.progress import Progress
from misc.terminal import report, show, try_to_print


class RunLog:
    """The log of a run. It writes files only on rank 0, and only if there is a folder.

    The folder is locked until the log is closed, so that no other run can write to it.

    Args:
        folder: folder of the run, created if it is missing. None writes to the screen only.
        is_main: whether this process writes at all.
        lock: the lock that `lock_run` returned, if the folder already contained a run.
        overwrite: replace the run in the folder.
        resume: progress of the run in the folder, to continue it; None starts a new run.
        tensorboard: also log to TensorBoard.
        wandb_project: also log to this wandb project.
        run_id: identifies the run, so that wandb continues the record of a resumed run.
        config: the merged configuration as plain values, for wandb.

    Raises UserError if another run is writing to the folder, if the folder already contains a run, or if TensorBoard or
    wandb is requested but not installed.
    """

    def __init__(
        self,
        folder: Path | None,
        *,
        is_main: bool = True,
        lock: IO | None = None,
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
        self._lock: IO | None = None
        self.text: TextIO | None = None
        self.writer = self.wandb_run = None
        self._failed: set[str] = set()
        if self.folder is None:
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"model.saved_path: {self.folder} cannot be created ({error.strerror}): choose another folder"
            ) from error
        self._lock = lock or lock_folder(self.folder)
        if resume is None:
            try:
                check_run_folder(self.folder, overwrite=overwrite)  # again, because the lock was not held before
            except UserError:
                self._lock.close()
                raise
            _clear(self.folder)
            notes = []
        else:
            notes = _keep_epochs(self.folder / METRICS, resume.epoch)
        self.text = (self.folder / LOG).open("a", encoding="utf-8", buffering=1)
        for name in RUN_FILES:
            partial_path(self.folder / name).unlink(missing_ok=True)
        for note in notes:
            self.line(note)
        if tensorboard:
            with self.decoration("TensorBoard"):
                from torch.utils.tensorboard import SummaryWriter  # an optional package

                self.writer = SummaryWriter(str(self.folder))
        if wandb_project:
            with self.decoration("wandb"):
                import wandb  # an optional package

                self.wandb_run = wandb.init(
                    project=wandb_project, dir=str(self.folder), config=config, id=run_id, resume="allow"
                )

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, *exception: object) -> None:
        if self.writer:
            with self.decoration("TensorBoard"):
                self.writer.close()
        if self.wandb_run:
            with self.decoration("wandb"):
                self.wandb_run.finish(exit_code=int(exception[0] is not None))
        if self.text:
            self.text.close()
        if self._lock:
            self._lock.close()

    def line(self, text: str) -> None:
        """Prints a line, above the progress bar if there is one, and appends it to train.log.

        A run continues without a standard output that is closed or full.

        Raises UserError if standard output is full and there is no train.log.
        """
        if not self.is_main:
            return
        if self.text is None:
            show(text)
            return
        error = try_to_print(text, sys.stdout)
        self.text.write(printable(text) + "\n")
        if error is not None:
            warning = f"warning: standard output cannot be written to ({error.strerror}): the log continues in {LOG}"
            self.text.write(warning + "\n")
            report(warning)

    @contextmanager
    def decoration(self, name: str) -> Iterator[None]:
        """Continues the run if an exception is raised within this context, and warns once for each name.

        It is for everything that a run can do without: pictures, TensorBoard, wandb, a trace.
        """
        try:
            yield
        except Exception as error:  # of any package: the training is worth more
            if name not in self._failed:
                self._failed.add(name)
                reason = str(error).partition("\n")[0]
                self.line(f"warning: the run continues without {name} ({type(error).__name__}: {reason})")

    @contextmanager
    def progress(self, total: int, done: int, title: str) -> Iterator[tqdm]:
        """Shows a progress bar with speed and remaining time, if stderr is a terminal."""
        hidden = None if self.is_main else True  # None: tqdm checks whether stderr is a terminal
        with tqdm(total=total, initial=done, desc=title, disable=hidden, leave=False, dynamic_ncols=True) as bar:
            yield bar

    def scalars(self, values: dict[str, float], iteration: int) -> None:
        """Logs the numbers of one iteration to TensorBoard and wandb."""
        if self.writer:
            with self.decoration("TensorBoard"):
                for name, value in values.items():
                    self.writer.add_scalar(name, value, iteration)
        if self.wandb_run:
            with self.decoration("wandb"):
                self.wandb_run.log(values, step=iteration)

    def epoch(self, record: dict[str, float], iteration: int) -> None:
        """Logs the numbers of one epoch, as a line of metrics.jsonl and to TensorBoard and wandb."""
        self.scalars({f"epoch/{name}": value for name, value in record.items()}, iteration)
        if self.folder:
            with (self.folder / METRICS).open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
                file.flush()
                os.fsync(file.fileno())  # before the next checkpoint records this epoch as finished

    def curve(self) -> None:
        """Draws the epochs in metrics.jsonl as curve.png."""
        if self.folder:
            with self.decoration(CURVE):
                draw_curve(self.folder / CURVE, read_records(self.folder / METRICS))


def _clear(folder: Path) -> None:
    """Removes the files of the run in a folder."""
    for replaced in (*map(folder.joinpath, RUN_FILES), *find_files(folder, "events.out.tfevents.*")):
        replaced.unlink(missing_ok=True)


def _keep_epochs(metrics: Path, count: int) -> list[str]:
    """Removes the epochs of metrics.jsonl that are newer than the checkpoint, as they are trained again.

    A damaged line may be any epoch, so it stays. Only the start of a line that was never completed is removed, if all
    epochs of the checkpoint are there.

    Returns: lines for the log.
    """
    lines = read_lines(metrics)
    old = [number for number, (_, record) in enumerate(lines) if record is not None and record["epoch"] <= count]
    if lines and lines[-1][1] is None and not lines[-1][0].endswith(b"\n") and len(old) == count:
        del lines[-1]
    newer = max(old, default=-1) + 1
    kept = lines[:newer] + [(line, record) for line, record in lines[newer:] if record is None]
    with atomic_file(metrics) as file:
        file.write(b"".join(line.rstrip(b"\n") + b"\n" for line, _ in kept))
    damaged = [str(number) for number, (line, record) in enumerate(kept, start=1) if record is None and line.strip()]
    if not damaged:
        return []
    return [f"warning: {metrics} is damaged in line {first_of(damaged)}: it is kept there, but its epoch is not shown"]


def wandb_project(wanted: bool) -> str | None:
    """Returns the wandb project to log to: the environment's WANDB_PROJECT, else `tbps-clip` if wandb is wanted."""
    return os.environ.get("WANDB_PROJECT") or ("tbps-clip" if wanted else None)
