"""`main.py --evaluate`: evaluates weights on the configured dataset, and compares two checkpoints query by query."""

from easydict import EasyDict

from misc.builders.data import build_evaluator, read_dataset, sheet_options
from misc.builders.model import build_saved_model, read_any_weights
from misc.builders.run import rank_notes
from misc.errors import UserError
from misc.files import atomic_folder
from misc.retrieval.evaluation import result_lines
from misc.retrieval.query_report import (
    COMPARISON,
    compare_queries,
    comparison_lines,
    retrieval_folder,
    write_lines,
    write_retrieval,
)
from misc.run.log import RunLog
from misc.system.distributed import Ranks
from misc.system.precision import Precision
from text_utils.tokenizer import Tokenizer


def evaluate(config: EasyDict, ranks: Ranks, source: str, against: str | None, *, write_queries: bool) -> None:
    """Evaluates weights; their architecture is used, not the configured one.

    Args:
        source: the weights, in any form that `model.checkpoint` accepts.
        against: other weights to evaluate too and to compare with, query by query.
        write_queries: whether queries are drawn and written.
    """
    out = retrieval_folder(source) if write_queries or against else None
    precision = Precision.choose(config.misc.precision, ranks.device)
    tokenizer = Tokenizer()
    sources = [source] if against is None else [source, against]
    models = [build_saved_model(config, read_any_weights(name, ranks)) for name in sources]
    splits, statistics = read_dataset(config)
    with RunLog(None, is_main=ranks.is_main) as log:
        for line in [*rank_notes(ranks, precision), *statistics]:
            log.line(line)
        evaluations = []
        for name, (model, saved, weight_notes) in zip(sources, models, strict=True):
            for line in weight_notes:
                log.line(line)
            evaluator = build_evaluator(saved, splits, tokenizer, precision, ranks)
            retrieval = evaluator(model.to(ranks.device))
            for line in result_lines(f"{name}, {config.data.evaluate_on}", retrieval):
                log.line(line)
            evaluations.append((evaluator, retrieval))
        if out is None or not ranks.is_main:
            return
        evaluator, retrieval = evaluations[0]
        compared = compare_queries(evaluations[1][1], retrieval, evaluator.split) if against else None
        for line in comparison_lines(compared) if compared is not None else []:
            log.line(line)
        try:
            with atomic_folder(out) as folder:
                write_retrieval(folder, retrieval, evaluator, **sheet_options(config))
                if compared is not None:
                    write_lines(folder / COMPARISON, compared)
        except OSError as error:
            raise UserError(f"--evaluate {source}: {out} cannot be written ({error.strerror})") from error
        log.line(f"query by query: {out}")
