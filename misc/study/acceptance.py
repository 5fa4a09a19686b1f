"""Acceptance: what to run with the real datasets and weights, what must come out, and within which bounds it agrees."""

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path

from misc.data.statistics import PUBLISHED_COUNTS
from misc.errors import UserError
from misc.files import is_file
from misc.study.across import ACROSS_JSON, text_table
from misc.study.report import measured
from misc.study.rows import COLUMNS, STUDY_FOLDER, Row

DATASETS = ("CUHK-PEDES", "ICFG-PEDES", "RSTPReid")
RECIPES = {"tbps_clip": "full", "simplified": "simplified"}
CHECKPOINTS = tuple(f"benchmarks/{dataset}/{recipe}_vitb16" for dataset in DATASETS for recipe in RECIPES)
"""Rows whose checkpoint the authors publish."""
TRAININGS = ("half_batch_simplified", "benchmarks/CUHK-PEDES/simplified_vitb16")
CHECKPOINT_BOUND, TRAINING_BOUND = 0.1, 1.0
"""Largest difference from the published figures in points: of the same weights, and of a training of one's own."""
GPUS, OTHER_BATCH = 4, 120
STEPS = "steps"
VERDICTS = {"agrees": "agree", "differs": "differ", "not run": "are not run"}


@dataclass(frozen=True)
class Check:
    """One run to make.

    Attributes:
        title: what it checks.
        command: makes the run.
        row: has the published figures.
        bound: largest difference from them, in points.
        figures: the measured ones, by column; empty if it has not been run.
        problems: anything else that differs from what must come out.
    """

    title: str
    command: str
    row: Row
    bound: float
    figures: dict[str, float] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    @property
    def differences(self) -> list[str]:
        """What does not agree, in words."""
        gaps = {
            column: round(self.figures[column] - published, 2)
            for column, published in zip(self.row.columns, self.row.published, strict=True)
            if column in self.figures
        }
        return [
            *(f"{COLUMNS[column].title} by {gap:+.2f}" for column, gap in gaps.items() if abs(gap) > self.bound),
            *self.problems,
        ]

    @property
    def verdict(self) -> str:
        if not self.figures:
            return "not run" + (f": {'; '.join(self.problems)}" if self.problems else "")
        return f"differs: {'; '.join(self.differences)}" if self.differences else "agrees"


def acceptance(rows: dict[str, Row], root: Path) -> str:
    """Compares the runs that are found in the study's folder with what must come out, and names those to make.

    Raises UserError if a file with results is damaged.
    """
    captions = PUBLISHED_COUNTS["CUHK-PEDES"]["train"].captions
    checks = [*(_checkpoint(rows[name], root) for name in CHECKPOINTS), *(_training(rows[n], root) for n in TRAININGS)]
    batches = [GPUS * batch for batch in (80, 40)]
    parts = [
        "Get the datasets (config/datasets.yaml has their folders) and the authors' checkpoints, and run each command. "
        "CHECKPOINT is the authors' file.\n"
        f"CUHK-PEDES has {captions:,} training captions, so an epoch has "
        + ", ".join(f"{captions // batch} steps of {batch} samples" for batch in (*batches, OTHER_BATCH))
        + ".",
        *map(_text, checks),
    ]
    verdicts = [check.verdict.partition(":")[0] for check in checks]
    parts.append(", ".join(f"{verdicts.count(verdict)} {words}" for verdict, words in VERDICTS.items()))
    return "\n\n".join(parts)


def _text(check: Check) -> str:
    cells = [
        ["", *(COLUMNS[column].title for column in check.row.columns)],
        ["published", *(f"{figure:.2f}" for figure in check.row.published)],
    ]
    if check.figures:
        figures = (check.figures.get(column) for column in check.row.columns)
        cells.append(["measured", *("–" if figure is None else f"{figure:.2f}" for figure in figures)])
    table = text_table(cells)
    return f"{check.title}, ±{check.bound}: {check.verdict}\n{check.command}\n{table}"


def _checkpoint(row: Row, root: Path) -> Check:
    """Checks the evaluation of an authors' checkpoint, which `--out` has put into the study's folder."""
    _, dataset, recipe = row.name.removesuffix("_vitb16").split("/")
    folder = root / "acceptance" / f"{dataset}_{RECIPES[recipe]}"
    check = Check(
        f"authors' checkpoint, {dataset}, {RECIPES[recipe]}",
        f"python main.py --evaluate CHECKPOINT --on {dataset} --out {folder}",
        row,
        CHECKPOINT_BOUND,
    )
    if not is_file(folder / ACROSS_JSON):
        return check
    try:
        results = json.loads((folder / ACROSS_JSON).read_bytes())["results"]
        found = [result for result in results if (result["tested_on"], result["split"]) == (dataset, "test")]
        if len(found) != 1:
            return dataclasses.replace(check, problems=[f"{len(found)} results on {dataset} test, expected one"])
        counts = PUBLISHED_COUNTS[dataset]["test"]
        sizes = {"queries": counts.captions, "images": counts.images}
        problems = [f"{found[0][name]:,} {name}, published {n:,}" for name, n in sizes.items() if found[0][name] != n]
        figures = {column: float(found[0][column]) for column in row.columns}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{folder / ACROSS_JSON} is damaged ({type(error).__name__}): remove it, and evaluate again"
        ) from error
    return dataclasses.replace(check, figures=figures, problems=problems)


def _training(row: Row, root: Path) -> Check:
    """Checks the mean of a row's trainings."""
    batch = row.settings.get("data.batch_size", 80)
    steps = PUBLISHED_COUNTS["CUHK-PEDES"]["train"].captions // (GPUS * batch)
    place = "" if root == Path(STUDY_FOLDER) else f" model.saved_path={root}"
    check = Check(
        f"training, CUHK-PEDES, simplified, {GPUS} × {batch}, {steps} steps an epoch",
        f"torchrun --standalone --nproc_per_node={GPUS} main.py --study {row.name}{place}",
        row,
        TRAINING_BOUND,
    )
    runs = measured(root, dataclasses.replace(row, columns=(*row.columns, STEPS)))
    if runs is None:
        return check
    figures = {column: runs.mean(column) for column in row.columns if runs.figures[column]}
    problems = [f"{int(found)} steps an epoch" for found in dict.fromkeys(runs.figures[STEPS]) if found != steps]
    problems += [f"measured on {title}" for title, dataset in dict.fromkeys(runs.data) if dataset != "CUHK-PEDES"]
    problems += [f"{folder} is not finished" for folder in runs.unfinished if not figures]
    return dataclasses.replace(check, figures=figures, problems=problems)
