"""`main.py --evaluate … --on …`: evaluates checkpoints on several datasets, and compares with published results."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from easydict import EasyDict

from misc.builders.data import build_evaluator, evaluated_data, read_evaluated_split
from misc.builders.model import build_saved_model, read_any_weights
from misc.builders.preprocessing import preprocessing_record
from misc.builders.run import rank_notes
from misc.config.loading import FOLDERS, flatten, known_datasets, read_datasets, to_plain
from misc.data.annotations import read_annotations
from misc.data.overlap import overlap_lines, shared_source
from misc.data.split import Split
from misc.errors import UserError
from misc.files import atomic_file
from misc.retrieval.evaluation import Retrieval, result_lines
from misc.retrieval.query_report import check_new_files, retrieval_folder
from misc.run.log import RunLog
from misc.study.across import (
    ACROSS_JSON,
    ACROSS_MARKDOWN,
    Result,
    markdown_table,
    matrix_table,
    published_results,
    result_table,
    text_table,
    with_sum,
)
from misc.study.rows import read_study
from misc.system.distributed import Ranks
from misc.system.precision import Precision
from model.pretrained.weights import Weights
from text_utils.tokenizer import Tokenizer


class TrainingData(NamedTuple):
    """The dataset that weights were trained on, as far as they record it.

    Attributes:
        title: its name, or the folder of its annotation.
        anno_dir, image_dir: its folders.
    """

    title: str | None
    anno_dir: str | None
    image_dir: str | None


def evaluate_across(
    config: EasyDict, ranks: Ranks, sources: Sequence[str], names: Sequence[str], *, out: str | None
) -> None:
    """Evaluates each of the weights on each dataset. Logs one table, and writes it as JSON and Markdown.

    Args:
        sources: weights, in any form that `model.checkpoint` accepts.
        names: datasets of `config/datasets.yaml`.
        out: folder for the two files; None for the one beside the first weights.

    Raises UserError if a name is unknown, before anything is read, or if data or weights are wrong, before anything is
    evaluated.
    """
    folder = Path(out) if out is not None else retrieval_folder(sources[0])
    check_new_files(folder, [ACROSS_JSON, ACROSS_MARKDOWN])
    sources, names = list(dict.fromkeys(sources)), list(dict.fromkeys(names))
    datasets = read_datasets()
    if unknown := [name for name in names if name not in datasets]:
        raise UserError(
            f"--on {unknown[0]}: config/datasets.yaml has no such dataset: give one of {', '.join(datasets)}, or add it"
        )
    configs = {name: _with_dataset(config, name, datasets[name]) for name in names}
    precision, tokenizer = Precision.choose(config.misc.precision, ranks.device), Tokenizer()
    trained: dict[str, TrainingData] = {}
    models = []
    for source in sources:  # all are checked before the first one is evaluated, and read again then
        weights = read_any_weights(source, ranks)
        models.append(build_saved_model(config, weights)[1])
        trained[source] = training_data(weights)
    tests = {}
    for name, own in configs.items():
        try:
            tests[name] = read_evaluated_split(own, tokenizer, models, ranks)
        except UserError as error:
            raise UserError(f"--on {name}: {error}") from error
    with RunLog(None, is_main=ranks.is_main) as log:
        for line in rank_notes(ranks, precision):
            log.line(line)
        for name, (_, statistics) in tests.items():
            for line in [f"{evaluated_data(configs[name])}:", *statistics]:
                log.line(line)
        results = []
        for source in sources:
            model, saved, notes = build_saved_model(config, read_any_weights(source, ranks))
            for line in notes:
                log.line(line)
            model.to(ranks.device)
            for name, (splits, _) in tests.items():
                own = _with_dataset(saved, name, datasets[name])
                retrieval = build_evaluator(own, splits, tokenizer, precision, ranks)(model)
                for line in result_lines(f"{source}, {evaluated_data(own)}", retrieval):
                    log.line(line)
                results.append(_result(source, trained[source].title, own, retrieval))
        if not ranks.is_main:
            return
        people = shared_people((result.trained_on, result.tested_on) for result in results)
        warnings = [*people, *_shared_files(configs, tests, trained)]
        for line in warnings:
            log.line(line)
        published = published_results(results, read_study()) if config.data.evaluate_on == "test" else []
        tables = [result_table(results, published), *([matrix_table(results)] if len(sources) > 1 else [])]
        for table in tables:
            log.line(text_table(table))
        content = {
            "results": [result.record() for result in results],
            "published": [result.record() for result in published],
            "warnings": warnings,
        }
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with atomic_file(folder / ACROSS_JSON) as file:
                file.write((json.dumps(content, indent=2) + "\n").encode())
            with atomic_file(folder / ACROSS_MARKDOWN) as file:
                parts = [*map(markdown_table, tables), *warnings]
                file.write(("\n\n".join(parts) + "\n").encode(errors="replace"))
        except OSError as error:
            raise UserError(f"--evaluate {sources[0]}: {folder} cannot be written ({error.strerror})") from error
        log.line(f"written to {folder}: {ACROSS_JSON}, {ACROSS_MARKDOWN}")


def _with_dataset(config: EasyDict, name: str, folders: dict[str, str]) -> EasyDict:
    """Returns a copy of the configuration with another dataset."""
    own = EasyDict(to_plain(config))
    own.update(folders)
    own.data.dataset = name
    return own


def training_data(weights: Weights) -> TrainingData:
    """Returns the dataset that weights record. Without a name, a folder that is named like a dataset counts as it."""
    recorded = flatten(weights.config)
    name, folder = recorded.get("data.dataset"), recorded.get("anno_dir")
    if not isinstance(name, str) and isinstance(folder, str):
        name = Path(folder).name if Path(folder).name in known_datasets(read_datasets()) else folder
    title = name if isinstance(name, str) else None
    folders = read_datasets().get(title or "", recorded)
    anno_dir, image_dir = (folders.get(key) if isinstance(folders.get(key), str) else None for key in FOLDERS)
    return TrainingData(title, anno_dir, image_dir)


def _result(source: str, trained_on: str | None, config: EasyDict, retrieval: Retrieval) -> Result:
    details: dict[str, Any] = {
        "split": config.data.evaluate_on,
        "anno_dir": config.anno_dir,
        "queries": len(retrieval.queries),
        "images": len(retrieval.gallery),
        "preprocessing": preprocessing_record(config),
    }
    return Result(source, trained_on, config.data.dataset, with_sum(retrieval.metrics), details)


def shared_people(pairs: Iterable[tuple[str | None, str | None]]) -> list[str]:
    """Returns a warning for each training set and test set that may show the same people."""
    return [
        f"warning: {one} and {other} are both cut from {source}, so the same people may be in training and test data"
        for one, other in dict.fromkeys(pairs)
        if (source := shared_source(one, other))
    ]


def _shared_files(
    configs: dict[str, EasyDict],
    tests: dict[str, tuple[dict[str, Split], list[str]]],
    trained: dict[str, TrainingData],
) -> list[str]:
    """Compares the images of all test splits, and of the training splits that are here."""
    groups = {}
    for name, (splits, _) in tests.items():
        for split, content in splits.items():
            groups[f"{name} {split}"] = [Path(configs[name].image_dir, path) for path in content.image_paths]
    notes = []
    for title, anno_dir, image_dir in dict.fromkeys(trained.values()):
        if anno_dir is None or image_dir is None:
            continue
        try:
            training = read_annotations(anno_dir, image_dir, splits=("train",), required=("train",))["train"]
        except UserError as error:  # the training data need not be here
            notes.append(f"the images that {title} has for training are not compared with the others: {error}")
            continue
        groups[f"{title} train"] = [Path(image_dir, path) for path in training.image_paths]
    return [*notes, *overlap_lines(groups)]
