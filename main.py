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

import sys

from easydict import EasyDict

from misc.builders.data import evaluated_data, sheet_options
from misc.builders.run import Run, prepare_run, run_folder
from misc.commands.across import evaluate_across
from misc.commands.command_line import configure, given_keys, parse_arguments, refuse_other_options
from misc.commands.contribution import contribution
from misc.commands.evaluate import evaluate
from misc.commands.export import export_weights
from misc.commands.study import STUDY_TABLES, print_study
from misc.config.loading import save_config
from misc.data.workers import reported_workers
from misc.errors import DISK_FULL, UserError
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
            refuse_other_options(arguments)
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
