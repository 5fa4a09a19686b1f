"""`main.py --contribution`: measures how much each module of a run's checkpoint contributes."""

from collections.abc import Sequence
from pathlib import Path

from easydict import EasyDict

from misc.builders.data import build_evaluator, evaluated_data, read_evaluated_split, with_recorded_data
from misc.builders.model import build_initial_model, build_saved_model, initial_weights_config, read_any_weights
from misc.builders.run import rank_notes
from misc.run.log import RunLog
from misc.study.contribution import contribution_folder, contribution_table, measure_contribution, write_contribution
from misc.system.distributed import Ranks
from misc.system.precision import Precision
from text_utils.tokenizer import Tokenizer


def contribution(config: EasyDict, ranks: Ranks, source: str, *, given: Sequence[str]) -> None:
    """Measures how much each module of the checkpoint `source` contributes.

    Args:
        given: the keys that the user has set; without them, the dataset is that of the checkpoint.
    """
    initial_settings = initial_weights_config(source)
    folder = contribution_folder(Path(source))
    precision = Precision.choose(config.misc.precision, ranks.device)
    weights = read_any_weights(source, ranks)
    config, data_notes = with_recorded_data(config, weights, given)
    model, config, weight_notes = build_saved_model(config, weights)
    initial, initial_notes = build_initial_model(config, ranks, source, initial_settings)
    tokenizer = Tokenizer()
    splits, statistics = read_evaluated_split(config, tokenizer, [config], ranks)
    evaluator = build_evaluator(config, splits, tokenizer, precision, ranks)
    weight_notes += [f"initially: {note}" for note in initial_notes]
    with RunLog(None, is_main=ranks.is_main) as log:
        for line in [*rank_notes(ranks, precision), *weight_notes, *data_notes, *statistics]:
            log.line(line)
        measured = measure_contribution(evaluator, model.to(ranks.device), initial.to(ranks.device).state_dict(), log)
        log.line(contribution_table(measured))
        if ranks.is_main:
            write_contribution(folder, measured, log)
        log.line(f"{source}, {evaluated_data(config)}: written to {folder} after {measured.seconds:.1f} s")
