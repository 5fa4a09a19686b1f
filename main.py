"""Trains and evaluates TBPS-CLIP: the run, from top to bottom.

python main.py [--config FILE] [--simplified] [key=value ...]
torchrun --standalone --nproc_per_node=4 main.py ...
... main.py --resume
... main.py --evaluate CHECKPOINT [--sheet N] [--against CHECKPOINT] [--out FOLDER]
... main.py --evaluate CHECKPOINT [CHECKPOINT ...] --on DATASET [DATASET ...] [--out FOLDER]
... main.py --contribution CHECKPOINT
... main.py --study ROW, and python main.py --study {list,report,acceptance}
python main.py --export {openclip,huggingface,onnx} OUT [model.checkpoint=CHECKPOINT]
"""

import argparse
import re
import sys

from easydict import EasyDict

from misc.builders.data import DATA_KEYS, evaluated_data, sheet_options
from misc.builders.run import Run, prepare_run, run_folder
from misc.commands.across import evaluate_across
from misc.commands.contribution import contribution
from misc.commands.evaluate import evaluate
from misc.commands.export import export_weights
from misc.commands.study import STUDY_TABLES, configure_row, print_study
from misc.config.loading import DEFAULT_CONFIG, load_config, save_config
from misc.config.rules import RULES
from misc.data.workers import reported_workers
from misc.errors import DISK_FULL, UserError
from misc.files import is_file, path_argument
from misc.retrieval.evaluation import Retrieval, result_lines
from misc.retrieval.query_report import draw_queries, write_queries
from misc.run.folder import CONFIG, QUERIES, RETRIEVAL_SHEET
from misc.run.log import RunLog
from misc.run.profiling import traced_steps
from misc.system.distributed import Ranks, join_ranks, local_rank, refuse, under_torchrun
from misc.system.interruption import Interrupted, Interruption
from misc.terminal import prepare_streams, report
from model.tbps_clip import count_trainable


def main() -> int:
    """Runs what the command line asks for. Returns the exit status: 0, or 2 for a mistake of the user."""
    prepare_streams()
    arguments = parse_arguments()
    try:
        if arguments.study in STUDY_TABLES:
            refuse_other_modes(arguments)
            print_study(arguments.study, arguments.overrides)
            return 0
        config = configure(arguments)
        with (
            reported_workers("data.num_workers"),
            Interruption() as interruption,
            join_ranks(config.device, config.distributed.backend, config.distributed.url) as ranks,
        ):
            if arguments.on:
                evaluate_across(config, ranks, arguments.evaluate, arguments.on, out=arguments.out)
            elif arguments.evaluate:
                evaluate(
                    config,
                    ranks,
                    arguments.evaluate[0],
                    against=arguments.against,
                    sheet=arguments.sheet is not None,
                    out=arguments.out,
                    given=given_keys(arguments),
                )
            elif arguments.contribution:
                contribution(config, ranks, arguments.contribution, given=given_keys(arguments))
            elif arguments.export:
                export_weights(config, ranks, *arguments.export)
            else:
                train(config, ranks, interruption, overwrite=arguments.overwrite, resume=arguments.resume)
    except UserError as error:
        return refuse(error)
    except OSError as error:
        if error.errno not in DISK_FULL or arguments.evaluate or arguments.contribution or arguments.export:
            raise
        return refuse(
            UserError(f"{run_folder(config)}: {error.strerror}: free some space, then continue with --resume")
        )
    except Interrupted as interrupted:
        if local_rank() == 0:
            report(f"stopped by {interrupted}" + ("; a traceback below is torchrun's own" if under_torchrun() else ""))
        return interrupted.status
    return 0


def parse_arguments() -> argparse.Namespace:
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
    refuse_other_modes(arguments)
    return configure_row(arguments.study, arguments.config or DEFAULT_CONFIG, overrides, resume=arguments.resume)


def given_keys(arguments: argparse.Namespace) -> tuple[str, ...]:
    """Returns the keys that the user has set: those of the command line, or all of them with --config."""
    return tuple(RULES) if arguments.config else tuple(override.partition("=")[0] for override in arguments.overrides)


def refuse_other_modes(arguments: argparse.Namespace) -> None:
    """Raises UserError if --study is given together with another mode."""
    if arguments.simplified or arguments.evaluate or arguments.on or arguments.contribution or arguments.export:
        raise UserError("--study only works without --simplified and the other modes: leave them out")


def train(config: EasyDict, ranks: Ranks, interruption: Interruption, *, overwrite: bool, resume: bool) -> None:
    """Trains epoch by epoch, evaluates each epoch, and keeps the last and the best checkpoint."""
    run = prepare_run(config, ranks, overwrite=overwrite, resume=resume)  # checks everything before anything is written
    config, progress = run.config, run.progress
    with run.open_log(overwrite=overwrite) as log, traced_steps(run.trace_folder, log) as after_step:
        run.checkpoints.save_last()  # now torchrun can restart the run; a full disk is found before the training
        if ranks.is_main:
            save_config(config, run.folder / CONFIG)
        for line in run.notes:
            log.line(line)
        if config.log.initial_evaluation and not progress.started:
            progress.metrics = evaluate_epoch(run, log, "initial weights").metrics
        while progress.epoch < config.schedule.epoch:
            with interruption.deferred(ranks):
                run.trainer.epoch(
                    run.loader,
                    progress,
                    log,
                    print_period=config.log.print_period,
                    save_period=config.log.checkpoint_period,
                    save=run.checkpoints.save_last,
                    stop=lambda: interruption.agreed(ranks),
                    after_step=after_step,
                )
                run.checkpoints.save_last()
                if interruption.number:
                    log.line(
                        f"stopped in epoch {progress.epoch + 1}, after step {progress.step}: continue with --resume"
                    )
            end_epoch(run, log)
        log.line(f"best R@1 {progress.best:.2f}")


def end_epoch(run: Run, log: RunLog) -> None:
    """Evaluates the epoch and keeps the result. A run that is stopped before this has ended repeats all of it."""
    config, progress, model = run.config, run.progress, run.trainer.bare_model
    record = {
        "epoch": progress.epoch + 1,
        "epochs": config.schedule.epoch,
        "parameters": count_trainable(model),
        "steps": progress.step,
        **run.trainer.summary(progress),
    }
    iterations = (progress.epoch + 1) * progress.step
    if progress.epoch == 0:
        record |= {f"initial_{name}": value for name, value in progress.metrics.items()}
    retrieval = evaluate_epoch(run, log, f"epoch {progress.epoch + 1}")
    better = progress.evaluated(retrieval.metrics)
    log.epoch({**record, **retrieval.metrics, "evaluation_seconds": retrieval.seconds}, iterations)
    log.curve()
    if run.ranks.is_main and config.log.sheet and progress.epoch == config.schedule.epoch:
        with log.decoration(QUERIES):
            write_queries(run.folder / QUERIES, retrieval, run.evaluator)
        with log.decoration(RETRIEVAL_SHEET):
            draw_queries(run.folder / RETRIEVAL_SHEET, retrieval, run.evaluator, **sheet_options(config))
    if better:
        run.checkpoints.save_best()
    run.checkpoints.save_last()


def evaluate_epoch(run: Run, log: RunLog, title: str) -> Retrieval:
    """Evaluates the current weights, and logs the table of results."""
    retrieval = run.evaluator(run.trainer.bare_model)
    for line in result_lines(f"{title}, {evaluated_data(run.config)}", retrieval):
        log.line(line)
    return retrieval


if __name__ == "__main__":
    sys.exit(main())
