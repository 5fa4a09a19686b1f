"""`main.py --evaluate`: evaluates weights on a dataset, and compares two checkpoints query by query."""

from collections.abc import Sequence
from pathlib import Path

from easydict import EasyDict

from misc.builders.data import (
    build_evaluator,
    evaluated_data,
    read_evaluated_split,
    sheet_options,
    with_recorded_data,
)
from misc.builders.model import build_saved_model, read_any_weights
from misc.builders.run import rank_notes
from misc.commands.across import shared_people, training_data
from misc.errors import UserError
from misc.retrieval.evaluation import Evaluator, Retrieval, result_lines
from misc.retrieval.query_report import (
    COMPARISON,
    check_new_files,
    compare_queries,
    comparison_lines,
    draw_queries,
    retrieval_folder,
    write_lines,
    write_queries,
)
from misc.run.folder import QUERIES, RETRIEVAL_SHEET
from misc.run.log import RunLog
from misc.system.distributed import Ranks
from misc.system.precision import Precision
from text_utils.tokenizer import Tokenizer


def evaluate(
    config: EasyDict,
    ranks: Ranks,
    source: str,
    *,
    against: str | None,
    sheet: bool,
    out: str | None,
    given: Sequence[str],
) -> None:
    """Evaluates weights; their architecture is used, not the configured one.

    Args:
        source: the weights, in any form that `model.checkpoint` accepts.
        against: other weights to evaluate too and to compare with, query by query.
        sheet: whether queries are drawn and written.
        out: folder for the files of `against` and `sheet`; None for the one beside the weights.
        given: the keys that the user has set; without them, the dataset is that of the weights.
    """
    folder = Path(out) if out is not None else retrieval_folder(source)
    names = [*((RETRIEVAL_SHEET,) if sheet and config.log.sheet else ()), *((QUERIES,) if sheet else ())]
    check_new_files(folder, [*names, *((COMPARISON,) if against else ())])
    precision = Precision.choose(config.misc.precision, ranks.device)
    tokenizer = Tokenizer()
    weights = [read_any_weights(name, ranks) for name in (source, *((against,) if against else ()))]
    config, data_notes = with_recorded_data(config, weights[0], given)
    data_notes += shared_people((training_data(each).title, config.data.dataset) for each in weights)
    models = [build_saved_model(config, each) for each in weights]
    splits, statistics = read_evaluated_split(config, tokenizer, [saved for _, saved, _ in models], ranks)
    with RunLog(None, is_main=ranks.is_main) as log:
        for line in [*rank_notes(ranks, precision), *data_notes, *statistics]:
            log.line(line)
        evaluations = []
        for name, (model, saved, weight_notes) in zip((source, against), models, strict=False):
            for line in weight_notes:
                log.line(line)
            evaluator = build_evaluator(saved, splits, tokenizer, precision, ranks)
            retrieval = evaluator(model.to(ranks.device))
            for line in result_lines(f"{name}, {evaluated_data(config)}", retrieval):
                log.line(line)
            evaluations.append((evaluator, retrieval))
        if not ranks.is_main or not (sheet or against):
            return
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if sheet:
                write_sheet(folder, *evaluations[0], config, log)
            if against:
                write_comparison(folder / COMPARISON, evaluations[1], evaluations[0], log)
        except OSError as error:
            raise UserError(f"--evaluate {source}: {folder} cannot be written ({error.strerror})") from error
        log.line(f"query by query: {folder}")


def write_sheet(folder: Path, evaluator: Evaluator, retrieval: Retrieval, config: EasyDict, log: RunLog) -> None:
    """Writes all queries, and draws those that the configuration chooses."""
    write_queries(folder / QUERIES, retrieval, evaluator)
    with log.decoration(RETRIEVAL_SHEET):
        draw_queries(folder / RETRIEVAL_SHEET, retrieval, evaluator, **sheet_options(config))


def write_comparison(
    path: Path, before: tuple[Evaluator, Retrieval], after: tuple[Evaluator, Retrieval], log: RunLog
) -> None:
    """Writes how each query changes from one evaluation to another, and logs the largest changes."""
    compared = compare_queries(before[1], after[1], after[0].split)
    write_lines(path, compared)
    for line in comparison_lines(compared):
        log.line(line)
