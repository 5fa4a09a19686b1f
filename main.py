"""Trains and evaluates TBPS-CLIP: the run, from top to bottom.

python main.py [--config FILE] [--simplified] [key=value ...]
torchrun --standalone --nproc_per_node=4 main.py ...
... main.py --resume
... main.py --evaluate CHECKPOINT [--sheet N] [--against CHECKPOINT]
... main.py --contribution CHECKPOINT
... main.py --study ROW, and python main.py --study {list,report}
python main.py --export {openclip,huggingface,onnx} OUT [model.checkpoint=CHECKPOINT]
"""

import argparse
import sys
import time
import uuid
from pathlib import Path

from misc.build import model as build
from misc.config.loading import DEFAULT_CONFIG, RULES, load_config, plain, save_config
from misc.data.annotations import check_images, few_shot, read_annotations, statistics_table
from misc.errors import DISK_FULL, UserError
from misc.files import whole_folder
from misc.retrieval.evaluation import Evaluator, Retrieval
from misc.retrieval.query_report import (
    COMPARISON,
    compare_queries,
    comparison_lines,
    retrieval_folder,
    write_lines,
    write_retrieval,
)
from misc.run.log import RunLog, hold_run, wandb_project
from misc.run.profiling import traced_steps
from misc.run.progress import Progress
from misc.study.contribution import contribution_folder, contribution_table, measure_contribution, write_contribution
from misc.study.report import write_report
from misc.study.rows import STUDY_FOLDER, find_row, read_study, row_folder, starting_checkpoint, study_list
from misc.system.distributed import Launch, Processes, local_rank, processes
from misc.system.interruption import Interrupted, Interruption
from misc.system.precision import Precision
from misc.training.resume import LAST, Course, Keeper, find_start
from misc.training.trainer import Trainer
from model.pretrained.export import check_export, export
from model.tbps_clip import count_trainable
from text_utils.tokenizer import Tokenizer


def main() -> int:
    arguments = parse_arguments()
    try:
        if arguments.study in STUDY_TABLES:
            return print_study(arguments)
        config = configuration(arguments)
        with (
            Interruption() as interruption,
            processes(config.device, config.distributed.backend, config.distributed.url) as here,
        ):
            if arguments.evaluate:
                evaluate(config, here, arguments.evaluate, arguments.against, looks=arguments.sheet is not None)
            elif arguments.contribution:
                contribution(config, here, arguments.contribution)
            elif arguments.export:
                export_weights(config, here, *arguments.export)
            else:
                train(config, here, interruption, overwrite=arguments.overwrite, resume=arguments.resume)
    except UserError as error:
        return refuse(error)
    except OSError as error:
        if error.errno not in DISK_FULL or arguments.evaluate or arguments.contribution or arguments.export:
            raise
        folder = build.run_folder(config)
        return refuse(UserError(f"{folder}: {error.strerror}: free some space, then go on with --resume"))
    except Interrupted as interrupted:
        if local_rank() == 0:
            print(f"stopped by {interrupted}", file=sys.stderr, flush=True)
        return interrupted.status
    return 0


STUDY_TABLES = {"list": lambda rows, root: study_list(rows), "report": write_report}


def print_study(arguments: argparse.Namespace) -> int:
    """The list of the study's rows, or its report."""
    others = [override for override in arguments.overrides if not override.startswith("model.saved_path=")]
    if others:
        raise UserError(f"--study {arguments.study}: {others[0]} has no part in it: give model.saved_path alone")
    print(STUDY_TABLES[arguments.study](read_study(), study_root(arguments.overrides)))
    return 0


def study_root(overrides: list[str]) -> Path:
    """The folder of the study's runs: `model.saved_path`, where the command line gives it."""
    given = [
        value for key, _, value in (override.partition("=") for override in overrides) if key == "model.saved_path"
    ]
    return Path(given[-1] if given else STUDY_FOLDER)


def configuration(arguments: argparse.Namespace):
    """What the command line asks for, merged and checked."""
    overrides = (*arguments.overrides, *([] if arguments.sheet is None else [f"log.sheet={arguments.sheet}"]))
    if arguments.against and not arguments.evaluate:
        raise UserError(f"--against {arguments.against}: it goes with --evaluate CHECKPOINT, which is compared with it")
    if arguments.sheet is not None and (arguments.contribution or arguments.export):
        raise UserError(f"--sheet {arguments.sheet}: it goes with training and --evaluate, which retrieve")
    if arguments.study is None:
        return load_config(arguments.config, simplified=arguments.simplified, overrides=overrides)
    if arguments.simplified or arguments.evaluate or arguments.contribution or arguments.export:
        raise UserError("--study trains a row of the paper: leave --simplified and the other modes out")
    row, root = find_row(read_study(), arguments.study), study_root(arguments.overrides)
    config = load_config(arguments.config, row=row, overrides=overrides)
    config.model.saved_path = str(row_folder(root, row.name, config.misc.seed))
    goes_on = (Path(config.model.saved_path) / LAST).is_file() and (arguments.resume or Launch.current().attempt > 0)
    if row.start and not goes_on and not any(override.startswith("model.checkpoint=") for override in overrides):
        config.model.checkpoint = str(starting_checkpoint(root, row, config.misc.seed))
    return config


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Trains and evaluates TBPS-CLIP for text-based person search.",
        epilog="Any key of the configuration can be set, as in: main.py data.batch_size=40 experiment.ss=false",
    )
    parser.add_argument("--config", default=DEFAULT_CONFIG, metavar="FILE", help="default: config/config.yaml")
    parser.add_argument("--simplified", action="store_true", help="N-ITC and R-ITC alone (config/s.config.yaml)")
    parser.add_argument(
        "--study",
        metavar="ROW",
        help="a row of the paper, as in losses/ss_i; list: all of them; report: what was run, beside what is published",
    )
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument(
        "--evaluate", metavar="CHECKPOINT", help="evaluate weights in any form that model.checkpoint takes; no training"
    )
    mode.add_argument(
        "--contribution",
        metavar="CHECKPOINT",
        help="measure what each module of a run's checkpoint contributes, into the new folder CHECKPOINT_contribution",
    )
    mode.add_argument(
        "--export",
        nargs=2,
        metavar=("FORM", "OUT"),
        help="write the weights of model.checkpoint into the new folder OUT (FORM: openclip, huggingface, onnx)",
    )
    mode.add_argument("--resume", action="store_true", help="go on with the stopped run that model.saved_path holds")
    mode.add_argument("--overwrite", action="store_true", help="replace a run that model.saved_path already holds")
    parser.add_argument(
        "--sheet",
        metavar="N",
        help="draw N queries with their first ten images (log.sheet); with --evaluate, into CHECKPOINT_retrieval",
    )
    parser.add_argument(
        "--against", metavar="CHECKPOINT", help="with --evaluate: which queries are better or worse than with this one"
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="as in schedule.epoch=10")
    return parser.parse_intermixed_args()  # options may stand between overrides


def train(config, here: Processes, interruption: Interruption, *, overwrite: bool, resume: bool) -> None:
    """Everything that can be wrong is checked before the run's folder is touched and before anything is trained."""
    folder, launch = build.run_folder(config), Launch.current()
    held = hold_run(folder) if here.is_main else None
    saved = here.from_main(lambda: find_start(folder, resume=resume, overwrite=overwrite, launch=launch))
    resumed = saved is not None
    progress = Progress.from_state(saved["progress"]) if resumed else Progress()
    precision = Precision.choose(config.misc.precision, here.device)
    tokenizer = Tokenizer()
    splits, statistics = read_dataset(config)
    weights = None if resumed else build.starting_weights(config, here)
    config = build.settle(config, weights, saved["config"] if resumed else None)
    contrasted = config.data.batch_size * (here.world_size if config.model.use_gather else 1)
    course = Course(plain(config), contrasted, precision.name, splits["train"].fingerprint)
    if resumed:
        course.check(saved, folder / LAST)
    objectives = build.build_objectives(config, here)
    evaluator = build.build_evaluator(config, splits, tokenizer, precision, here)
    loader = build.build_loader(config, splits["train"], objectives, tokenizer, here)
    identities = splits["train"].counts.identities
    model, weight_notes = build.build_model(config, objectives, identities, weights=weights, resumed=resumed)
    del weights
    trainer = build.build_trainer(config, model, objectives, len(loader), precision, here)
    run_id = saved["run_id"] if resumed else uuid.uuid4().hex
    keeper = Keeper(folder, trainer, progress, course, launch, run_id, here)
    keeper.check_space()
    if resumed:
        trainer.load_state(saved)
    del saved  # three times the weights

    profiled = folder if config.log.profile and here.is_main else None
    with (
        RunLog(
            folder,
            is_main=here.is_main,
            held=held,
            overwrite=overwrite,
            resume=progress if resumed else None,
            tensorboard=config.log.tensorboard,
            wandb_project=wandb_project(config.log.wandb),
            run_id=run_id,
            config=plain(config),
        ) as log,
        traced_steps(profiled) as after_step,
    ):
        keeper.save_last()  # from here on torchrun can restart the run, and a full disk is found before the training
        if here.is_main:
            save_config(config, folder / "config.yaml")
        for line in [*run_notes(here, precision), *weight_notes, *statistics]:
            log.line(line)
        log.line(f"{count_trainable(model) / 1e6:.1f} M parameters train; the run is written to {folder}")
        if resumed:
            log.line(f"resumed after epoch {progress.epoch} and {progress.step} of {len(loader)} steps of the next")

        while progress.epoch < config.schedule.epoch:
            with interruption.deferred(here):
                trainer.epoch(
                    loader,
                    progress,
                    log,
                    print_period=config.log.print_period,
                    save_period=config.log.checkpoint_period,
                    save=keeper.save_last,
                    stop=lambda: interruption.agreed(here),
                    after_step=after_step,
                )
                keeper.save_last()
                if interruption.number:
                    log.line(f"stopped at step {progress.step} of epoch {progress.epoch + 1}: go on with --resume")
            end_epoch(config, here, log, trainer, evaluator, progress, keeper)

        log.line(f"best R@1 {progress.best:.2f}")


def end_epoch(
    config, here: Processes, log: RunLog, trainer: Trainer, evaluator: Evaluator, progress: Progress, keeper: Keeper
) -> None:
    """Evaluates what was trained and keeps the result. A run that is ended before the last line does it all again."""
    record = {
        "epoch": progress.epoch + 1,
        "epochs": config.schedule.epoch,
        "parameters": count_trainable(trainer.bare_model),
        **trainer.summary(progress),
    }
    iterations = (progress.epoch + 1) * progress.step
    retrieval, seconds = timed_evaluation(evaluator, trainer.bare_model)
    report(log, f"epoch {progress.epoch + 1}, {config.data.evaluate_on}", retrieval, seconds)
    better = progress.evaluated(retrieval.metrics)
    log.epoch({**record, **retrieval.metrics, "evaluation_seconds": seconds}, iterations)
    log.curve()
    if here.is_main and config.log.sheet and progress.epoch == config.schedule.epoch:
        write_retrieval(keeper.folder, retrieval, evaluator, **looks_of(config))
    if better:
        keeper.save_best()
    keeper.save_last()


def evaluate(config, here: Processes, source: str, against: str | None, *, looks: bool) -> None:
    """Evaluates weights on the configured dataset; the architecture is theirs.

    Args:
        against: other weights, that are evaluated too and compared with, query by query.
        looks: whether queries are drawn and written.
    """
    out = retrieval_folder(source) if looks or against else None
    precision = Precision.choose(config.misc.precision, here.device)
    tokenizer = Tokenizer()
    models = [build.build_saved_model(config, build.weights_of(name, here)) for name in (source, against) if name]
    splits, statistics = read_dataset(config)
    with RunLog(None, is_main=here.is_main) as log:
        for line in [*run_notes(here, precision), *statistics]:
            log.line(line)
        found = []
        for name, (model, saved, weight_notes) in zip((source, against), models, strict=False):
            for line in weight_notes:
                log.line(line)
            evaluator = build.build_evaluator(saved, splits, tokenizer, precision, here)
            retrieval, seconds = timed_evaluation(evaluator, model.to(here.device))
            report(log, f"{name}, {config.data.evaluate_on}", retrieval, seconds)
            found.append((evaluator, retrieval))
        if here.is_main and out:
            compared = compare_queries(found[1][1], found[0][1], found[0][0].split) if against else []
            for line in comparison_lines(compared) if against else []:
                log.line(line)
            try:
                with whole_folder(out) as unfinished:
                    write_retrieval(unfinished, found[0][1], found[0][0], **looks_of(config))
                    if against:
                        write_lines(unfinished / COMPARISON, compared)
            except OSError as error:
                raise UserError(f"--evaluate {source}: {out} cannot be written ({error.strerror})") from error
            log.line(f"query by query: {out}")


def contribution(config, here: Processes, source: str) -> None:
    """Measures what each module of a run's checkpoint contributes on the configured dataset."""
    began = build.beginning(source)
    folder = contribution_folder(Path(source))
    precision = Precision.choose(config.misc.precision, here.device)
    tokenizer = Tokenizer()
    model, config, weight_notes = build.build_saved_model(config, build.weights_of(source, here))
    initial, initial_notes = build.build_initial_model(config, here, source, began)
    splits, statistics = read_dataset(config)
    evaluator = build.build_evaluator(config, splits, tokenizer, precision, here)
    weight_notes += [f"initially: {note}" for note in initial_notes]
    with RunLog(None, is_main=here.is_main) as log:
        for line in [*run_notes(here, precision), *weight_notes, *statistics]:
            log.line(line)
        measured = measure_contribution(evaluator, model.to(here.device), initial.to(here.device).state_dict(), log)
        log.line(contribution_table(measured))
        if here.is_main:
            write_contribution(folder, measured)
        log.line(f"{source}, {config.data.evaluate_on}: written to {folder} after {measured.seconds:.1f} s")


def export_weights(config, here: Processes, form: str, out: str) -> None:
    """Writes the weights that a run would begin with for another tool, at their own resolution and text length."""
    if out.partition("=")[0] in RULES:
        raise UserError(f"--export {form} {out}: {out} is a setting: name the folder to write, --export FORM OUT")
    check_export(form, Path(out))
    weights = build.starting_weights(config, here)
    if weights is None:
        raise UserError("--export: model.checkpoint is null: set it to the weights to export")
    model, config, weight_notes = build.build_saved_model(config, weights)
    with RunLog(None, is_main=here.is_main) as log:
        for line in weight_notes:
            log.line(line)
        if here.is_main:
            log.line(export(form, Path(out), build.build_export(config, model.eval(), weights, Tokenizer())))


def read_dataset(config):
    """The splits, and lines for the log: their statistics and how they differ from the published ones."""
    splits = read_annotations(
        config.anno_dir, config.image_dir, back_translation_file=config.data.back_translation_file
    )
    check_images(splits, config.image_dir)
    table, warnings = statistics_table(splits, config.data.dataset)
    notes = [table, *(f"warning: {warning}" for warning in warnings)]
    translated = any(text is not None for text in splits["train"].back_translations)
    if config.experiment.back_trans and config.experiment.backtrans_p > 0 and not translated:
        notes.append(
            "warning: experiment.back_trans is on, and no training caption has a back-translation: set "
            "data.back_translation_file, or turn it off"
        )
    if config.data.train_share < 1:
        splits["train"] = few_shot(splits["train"], config.data.train_share, config.misc.seed)
        counts = splits["train"].counts
        notes.append(
            f"few-shot: {config.data.train_share:.0%} of the training images are used: {counts.identities:,} "
            f"identities, {counts.images:,} images, {counts.captions:,} captions"
        )
    return splits, notes


def looks_of(config) -> dict:
    """Which queries are drawn, as `write_retrieval` takes it."""
    return {"count": config.log.sheet, "choice": config.log.sheet_choice, "seed": config.misc.seed}


def run_notes(here: Processes, precision: Precision) -> list[str]:
    notes = [f"{here.world_size} process(es), this one on {here.device}, encoders in {precision.name}"]
    return [*notes, f"warning: {here.note}"] if here.note else notes


def timed_evaluation(evaluator, model) -> tuple[Retrieval, float]:
    started = time.perf_counter()
    retrieval = evaluator(model)
    return retrieval, time.perf_counter() - started


def report(log: RunLog, title: str, retrieval: Retrieval, seconds: float) -> None:
    """The table of results that a reader looks for."""
    log.line(f"{title}: {len(retrieval.queries)} queries, {len(retrieval.gallery)} images, {seconds:.1f} s")
    log.line("    R@1    R@5   R@10    mAP   mINP")
    log.line("".join(f"{value:7.2f}" for value in retrieval.metrics.values()))
    if retrieval.without_match:
        log.line(f"warning: {retrieval.without_match} queries ask for a person whom the gallery does not show")


def refuse(error: UserError) -> int:
    """One line, once: the ranks of a machine meet the same mistake, and the first of them tells it.

    The others wait for the launcher to end them. If it does not, the mistake is theirs alone, and they tell it.
    """
    if local_rank() > 0:
        time.sleep(5)
    print(f"error: {error}", file=sys.stderr, flush=True)
    return 2


if __name__ == "__main__":
    sys.exit(main())
