"""The command line of `main.py`: its options, and the configuration that they ask for."""

import argparse
import re
import sys

from easydict import EasyDict

from misc.builders.data import DATA_KEYS
from misc.commands.study import STUDY_TABLES, configure_row
from misc.config.loading import DEFAULT_CONFIG, load_config
from misc.config.rules import RULES
from misc.errors import UserError
from misc.files import is_file, path_argument


def parse_arguments() -> argparse.Namespace:
    """Reads the command line. Mistakes end the program with status 2, as argparse does."""
    parser = argparse.ArgumentParser(
        description="Trains and evaluates TBPS-CLIP for text-based person search.",
        epilog="Any key of the configuration can be set, for example: main.py data.batch_size=40 experiment.ss=false",
    )
    parser.add_argument("--config", type=path_argument, metavar="FILE", help="default: config/config.yaml")
    parser.add_argument("--simplified", action="store_true", help="only N-ITC and R-ITC (config/s.config.yaml)")
    parser.add_argument(
        "--study",
        metavar="ROW",
        help="train a row of the paper, for example losses/ss_i; list: show all rows; report: compare the measured "
        "results with the published ones; acceptance: what to run on the real datasets, and whether it agrees",
    )
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument(
        "--evaluate",
        type=path_argument,
        nargs="+",
        metavar="CHECKPOINT",
        help="evaluate weights, in any form that model.checkpoint accepts; several only with --on",
    )
    mode.add_argument(
        "--contribution",
        type=path_argument,
        metavar="CHECKPOINT",
        help="measure how much each module of a run's checkpoint contributes; writes the new folder "
        "CHECKPOINT_contribution",
    )
    mode.add_argument(
        "--export",
        nargs=2,
        type=path_argument,
        metavar=("FORM", "OUT"),
        help="write the weights of model.checkpoint to the new folder OUT (FORM: openclip, huggingface, onnx)",
    )
    mode.add_argument("--resume", action="store_true", help="continue the stopped run in model.saved_path")
    mode.add_argument("--overwrite", action="store_true", help="replace the run that model.saved_path contains")
    parser.add_argument(
        "--on",
        nargs="+",
        metavar="DATASET",
        help="with --evaluate: datasets of config/datasets.yaml to evaluate on, in one table with published results",
    )
    parser.add_argument(
        "--sheet",
        metavar="N",
        help="draw N queries with their first ten images (log.sheet); with --evaluate, into the folder --out",
    )
    parser.add_argument(
        "--against",
        type=path_argument,
        metavar="CHECKPOINT",
        help="with --evaluate: compare query by query with this checkpoint",
    )
    parser.add_argument(
        "--out",
        type=path_argument,
        metavar="FOLDER",
        help="with --evaluate: folder for the files of --on, --sheet and --against (default: CHECKPOINT_retrieval)",
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for example schedule.epoch=10")
    arguments = parser.parse_intermixed_args()  # allows options between overrides
    _separate_overrides(arguments)
    return arguments


def _separate_overrides(arguments: argparse.Namespace) -> None:
    """Moves overrides that follow the names of --evaluate and --on to the others, in the order of the command line."""
    checkpoints = (arguments.evaluate or [])[1:]  # the first one is certain
    names = (*checkpoints, *(arguments.on or []))
    follow = [word for word in names if re.match(r"[^/\\]+=", word) and not is_file(word)]
    arguments.evaluate = arguments.evaluate and [word for word in arguments.evaluate if word not in follow]
    arguments.on = arguments.on and [word for word in arguments.on if word not in follow]
    given = {*arguments.overrides, *follow}
    arguments.overrides = [word for word in sys.argv[1:] if word in given]


def configure(arguments: argparse.Namespace) -> EasyDict:
    """Returns the checked configuration that the command line asks for."""
    overrides = (*arguments.overrides, *([] if arguments.sheet is None else [f"log.sheet={arguments.sheet}"]))
    if arguments.against and not arguments.evaluate:
        raise UserError(f"--against {arguments.against}: only works together with --evaluate CHECKPOINT")
    if arguments.on == []:
        raise UserError(f"--on {arguments.overrides[0]}: give the names of datasets after --on")
    if arguments.on and not arguments.evaluate:
        raise UserError(f"--on {arguments.on[0]}: only works together with --evaluate CHECKPOINT")
    if arguments.on and (arguments.sheet is not None or arguments.against):
        raise UserError(f"--on {arguments.on[0]}: only works without --sheet and --against: leave them out")
    if arguments.on and (data := [word for word in overrides if word.partition("=")[0] in DATA_KEYS]):
        raise UserError(f"--on {arguments.on[0]}: {data[0]} has no effect: --on names the datasets")
    if arguments.evaluate and len(arguments.evaluate) > 1 and not arguments.on:
        raise UserError(
            f"--evaluate {' '.join(arguments.evaluate)}: several checkpoints only work together with --on; --against "
            "compares two"
        )
    written = arguments.sheet is not None or arguments.against or arguments.on
    if arguments.out is not None and not (arguments.evaluate and written):
        raise UserError(f"--out {arguments.out}: only works together with --evaluate and --on, --sheet or --against")
    if arguments.sheet is not None and (arguments.contribution or arguments.export):
        raise UserError(f"--sheet {arguments.sheet}: only works together with training or --evaluate")
    if arguments.study is None:
        return load_config(arguments.config or DEFAULT_CONFIG, simplified=arguments.simplified, overrides=overrides)
    refuse_other_options(arguments)
    return configure_row(arguments.study, arguments.config or DEFAULT_CONFIG, overrides, resume=arguments.resume)


def given_keys(arguments: argparse.Namespace) -> tuple[str, ...]:
    """Returns the keys that the user has set: those of the command line, or all of them with --config."""
    return tuple(RULES) if arguments.config else tuple(override.partition("=")[0] for override in arguments.overrides)


def refuse_other_options(arguments: argparse.Namespace) -> None:
    """Raises UserError if --study is given together with another mode, or with an option that it does not use."""
    if arguments.simplified or arguments.evaluate or arguments.on or arguments.contribution or arguments.export:
        raise UserError("--study only works without --simplified and the other modes: leave them out")
    unused = [
        name for name in ("config", "resume", "overwrite", "sheet") if getattr(arguments, name) not in (None, False)
    ]
    if arguments.study in STUDY_TABLES and unused:
        raise UserError(f"--study {arguments.study}: --{unused[0]} has no effect: only model.saved_path can be set")
