"""What a run leaves behind: log lines, JSON lines, the curve, TensorBoard and wandb. Rank 0 alone writes."""

import importlib.util
import json
import os
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from tqdm import tqdm

from misc.errors import UserError
from misc.files import atomic_file, partial_path
from misc.run.curve import draw_curve
from misc.run.folder import CURVE, LOG, METRICS, RUN_FILES, check_run_folder, open_locked_log, read_records
from misc.run.progress import Progress


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
        self.text = held or open_locked_log(self.folder)
        if resume is None:
            check_run_folder(self.folder, overwrite=overwrite)  # once more: nobody else can change it now
            self._clear()
        else:
            self._keep_epochs(resume.epoch)
        for name in RUN_FILES:
            partial_path(self.folder / name).unlink(missing_ok=True)
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
        with atomic_file(path) as file:
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
        """Draws the epochs in metrics.jsonl as curve.png."""
        if self.folder:
            draw_curve(self.folder / CURVE, read_records(self.folder / METRICS))


def wandb_project(wanted: bool) -> str | None:
    """The wandb project to log to: the environment's WANDB_PROJECT, else `tbps-clip` where wandb is wanted."""
    return os.environ.get("WANDB_PROJECT") or ("tbps-clip" if wanted else None)
