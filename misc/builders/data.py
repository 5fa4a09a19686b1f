"""The dataset, the training loader and the evaluator."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from easydict import EasyDict
from torch.utils.data import DataLoader

from misc.builders.preprocessing import preprocessing_of
from misc.config.loading import FOLDERS, flatten, to_plain
from misc.config.rules import AUTO, RULES
from misc.data.annotations import read_annotations
from misc.data.audit import audit_line
from misc.data.batches import training_loader
from misc.data.image_checks import check_images
from misc.data.noise import shuffle_captions
from misc.data.sampler import GlobalBatchSampler
from misc.data.samples import Augmentation, TrainingSet
from misc.data.split import Split, few_shot
from misc.data.statistics import PUBLISHED_COUNTS, cut_captions_note, data_title, image_notes, statistics_table
from misc.errors import UserError
from misc.files import is_file, is_folder
from misc.retrieval.evaluation import Evaluator
from misc.system.distributed import Ranks
from misc.system.precision import Precision
from model.objectives import Objectives
from model.pretrained.weights import Weights
from text_utils.augmentation import NEEDS_SYNONYMS
from text_utils.cleaning import MAX_WORDS
from text_utils.tokenizer import Tokenizer
from text_utils.wordnet import WordNet

DATA_KEYS = ("anno_dir", "image_dir", "data.dataset")
"""The keys that decide which dataset is read."""


def evaluated_data(config: EasyDict) -> str:
    """Returns the dataset, the split and the folder of the evaluations of a configuration."""
    return data_title(config.data.dataset, config.data.evaluate_on, config.anno_dir)


def with_recorded_data(config: EasyDict, weights: Weights, given: Sequence[str]) -> tuple[EasyDict, list[str]]:
    """Returns a copy of the configuration with the dataset that the weights were trained on, if it is here.

    Args:
        given: the keys that the user has set; they stay as they are. A given `anno_dir`, or another name than the
            recorded one, means another dataset.

    Returns: the configuration, and lines for the log.
    """
    recorded = {"data.dataset": None, **flatten(weights.config)}
    usable = all(key in recorded and RULES[key].values.accepts(recorded[key]) for key in DATA_KEYS)
    renamed = "data.dataset" in given and config.data.dataset not in (None, recorded["data.dataset"])
    if "anno_dir" in given or renamed or not usable:
        return config, []
    own = EasyDict(to_plain(config))
    for key in DATA_KEYS:
        section, _, name = key.rpartition(".")
        if key not in given:
            (own[section] if section else own)[name] = recorded[key]
    annotated = is_folder(own.anno_dir) or is_file(own.anno_dir)
    if annotated and is_folder(own.image_dir):
        return own, []
    if own.anno_dir == config.anno_dir:
        return config, []
    missing = f"folder {own.image_dir}" if annotated else f"annotation {own.anno_dir}"
    return config, [
        f"warning: {weights.name} was trained on {own.anno_dir}, but there is no {missing}: evaluated on the "
        "configured dataset instead"
    ]


def read_evaluated_split(
    config: EasyDict, tokenizer: Tokenizer, models: Sequence[EasyDict], ranks: Ranks
) -> tuple[dict[str, Split], list[str]]:
    """Reads and checks only the split that `data.evaluate_on` names.

    Args:
        models: configurations of the models to evaluate, from `build_saved_model`: they take captions of their own
            length, cleaned or not.

    Returns: the same as `read_dataset`.
    """
    name = config.data.evaluate_on
    _check_folders(config)
    captions = sorted({(model.experiment.text_length, preprocessing_of(model).clean_captions) for model in models})
    splits = read_annotations(
        config.anno_dir, config.image_dir, splits=(name,), required=(name,), max_words=max_words(captions[-1][0])
    )
    table, warnings = statistics_table(splits, _compared_with(config), compared=(name,))
    splits, image_lines = check_images(splits, config.image_dir, ranks, skip_unreadable=config.data.skip_unreadable)
    cut = [cut_captions_note(splits, tokenizer, length, cleaned=cleaned) for length, cleaned in captions]
    cut.append(audit_line(splits, config.anno_dir))
    notes = [table, *image_notes(splits), *image_lines, *cut, *(f"warning: {warning}" for warning in warnings)]
    return splits, notes


def _check_folders(config: EasyDict) -> None:
    if missing := [key for key in FOLDERS if config[key] == AUTO]:
        raise UserError(
            f"{missing[0]}: auto needs data.dataset: set it to a name in config/datasets.yaml, or set {missing[0]}"
        )


def _compared_with(config: EasyDict) -> str | None:
    """Returns the dataset whose published counts the data is compared with; None if there are none."""
    return config.data.dataset if config.data.dataset in PUBLISHED_COUNTS else None


def max_words(text_length: int) -> int:
    """Returns how many words of a caption are kept: the paper's 77, or one for each of more than 77 tokens.

    A word has at least one token, so only the limit of tokens counts, except for what text augmentation can use.
    """
    return max(MAX_WORDS, text_length)


def read_dataset(config: EasyDict, tokenizer: Tokenizer, ranks: Ranks) -> tuple[dict[str, Split], list[str]]:
    """Reads and checks the dataset of a training.

    Returns: the splits, and lines for the log: their statistics and how they differ from the published ones.
    """
    used = ("train", config.data.evaluate_on)
    _check_folders(config)
    splits = read_annotations(
        config.anno_dir,
        config.image_dir,
        required=used,
        back_translation_file=config.data.back_translation_file,
        max_words=max_words(config.experiment.text_length),
    )
    table, warnings = statistics_table(splits, _compared_with(config))
    checked, image_lines = check_images(
        {name: splits[name] for name in used}, config.image_dir, ranks, skip_unreadable=config.data.skip_unreadable
    )
    splits |= checked
    cut = cut_captions_note({name: splits[name] for name in used}, tokenizer, config.experiment.text_length)
    audited = audit_line(splits, config.anno_dir)
    notes = [table, *image_notes(splits), *image_lines, cut, audited, *(f"warning: {warning}" for warning in warnings)]
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
    if config.data.noise > 0:
        total, share = len(splits["train"]), config.data.noise
        splits["train"], moved = shuffle_captions(splits["train"], share, config.misc.seed)
        notes.append(
            f"noise: {round(share * total):,} of {total:,} training captions ({share:.0%}) are shuffled among images; "
            f"{moved:,} are now at another person"
        )
    return splits, notes


def build_loader(
    config: EasyDict, split: Split, objectives: Objectives, tokenizer: Tokenizer, ranks: Ranks
) -> DataLoader:
    """Builds the loader of this rank's training batches. `Trainer.epoch` sets its sampler to an epoch and a step.

    Raises UserError if the training set has too few samples for a global batch, or if synonyms are needed and WordNet
    is missing.
    """
    experiment = config.experiment
    sampler = GlobalBatchSampler(
        len(split),
        config.data.batch_size,
        seed=config.misc.seed,
        rank=ranks.rank,
        world_size=ranks.world_size,
        mixgen_probability=experiment.mixgen_p if experiment.mixgen else 0.0,
        mixgen_ratio=experiment.mixgen_ratio,
    )
    if len(sampler) == 0:
        most, share = len(split) // ranks.world_size, config.data.train_share
        remedy = f"set data.batch_size to at most {most}" if most else "use a larger training set"
        raise UserError(
            f"data.batch_size: {config.data.batch_size} on {ranks.world_size} processes is more than the training "
            f"set's {len(split)} samples: {remedy}" + (f", or raise data.train_share: {share}" if share < 1 else "")
        )
    synonyms = None
    if experiment.text_operation in NEEDS_SYNONYMS and experiment.eda_alpha > 0:
        synonyms = WordNet(Path(experiment.wordnet)).synonyms
    on_device = config.data.simclr_on_device
    augmentation = Augmentation(
        resolution=tuple(config.experiment.input_resolution),
        text_length=experiment.text_length,
        second_view=objectives.needs_second_view,
        second_caption=objectives.needs_second_caption,
        simclr_views=objectives.needs_simclr_views,
        simclr_captions=objectives.needs_simclr_captions,
        masked_captions=objectives.needs_masked_captions,
        image_operations=experiment.image_operations,
        image_pool=experiment.image_pool,
        back_translation_probability=experiment.backtrans_p if experiment.back_trans else 0.0,
        text_operation=experiment.text_operation if experiment.eda_alpha > 0 else None,
        text_strength=experiment.eda_alpha,
        synonyms=synonyms,
        mixgen=experiment.mixgen_type if experiment.mixgen else None,
        simclr_on_device=ranks.device.type == "cuda" if on_device == AUTO else on_device,
    )
    dataset = TrainingSet(split, Path(config.image_dir), tokenizer, augmentation, config.misc.seed)
    return training_loader(dataset, sampler, workers=config.data.num_workers, pin_memory=ranks.device.type == "cuda")


def build_evaluator(
    config: EasyDict, splits: dict[str, Split], tokenizer: Tokenizer, precision: Precision, ranks: Ranks
) -> Evaluator:
    """Builds the evaluator of the split that `data.evaluate_on` names.

    It prepares images and captions as the recipe does, unless `config` comes from `build_saved_model`.
    """
    return Evaluator(
        split=splits[config.data.evaluate_on],
        image_dir=Path(config.image_dir),
        tokenizer=tokenizer,
        text_length=config.experiment.text_length,
        resolution=tuple(config.experiment.input_resolution),
        preprocessing=preprocessing_of(config),
        batch_size=config.data.test_batch_size,
        workers=config.data.num_workers,
        ranks=ranks,
        precision=precision,
    )


def sheet_options(config: EasyDict) -> dict[str, Any]:
    """Returns the options of `write_retrieval`, which choose the queries that are drawn."""
    return {"count": config.log.sheet, "choice": config.log.sheet_choice, "seed": config.misc.seed}
