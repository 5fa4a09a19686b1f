"""The preprocessing of images and captions: combines the configuration and the weights."""

from dataclasses import replace
from typing import Any

from easydict import EasyDict

from misc.config.loading import to_plain
from misc.config.rules import AUTO
from misc.errors import UserError
from model.preprocessing import PREPROCESSINGS, TBPS_PREPROCESSING, Preprocessing
from model.pretrained.weights import Weights

VALUES = ("interpolation", "mean", "deviation", "clean_captions")
"""The keys of the section `preprocessing` that are attributes of `Preprocessing`."""
TITLES = {"tbps_clip": "TBPS-CLIP", "clip": "CLIP", "irra": "IRRA"}


def preprocessing_of(config: EasyDict, recorded: Preprocessing = TBPS_PREPROCESSING) -> Preprocessing:
    """Returns the preprocessing that a configuration specifies.

    Args:
        recorded: replaces every `auto`. The default is that of the recipe.
    """
    section = to_plain(config.preprocessing)
    base = recorded if section["kind"] == AUTO else PREPROCESSINGS[section["kind"]]
    given = {key: section[key] for key in VALUES if section[key] != AUTO}
    values: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in given.items()}
    return replace(base, **values)


def preprocessing_values(config: EasyDict, weights: Weights) -> dict[str, Any]:
    """Returns the preprocessing to use weights with, as values of the section `preprocessing` without `auto`."""
    used = preprocessing_of(config, weights.preprocessing)
    return {key: to_plain(getattr(used, key)) for key in VALUES}


def preprocessing_record(config: EasyDict) -> dict[str, Any]:
    """Returns the preprocessing of an evaluation, for a file of results; `config` comes from `build_saved_model`."""
    used = preprocessing_of(config)
    resolution = to_plain(config.experiment.input_resolution)
    return {"resolution": resolution, **{key: to_plain(getattr(used, key)) for key in VALUES}}


def preprocessing_note(config: EasyDict, weights: Weights) -> str:
    """Returns a line for the log: the preprocessing to use weights with, and who decides it."""
    used = preprocessing_of(config, weights.preprocessing)
    source = "recorded with the weights"
    for kind, usual in PREPROCESSINGS.items():
        if weights.preprocessing == usual:
            source = f"as usual for {TITLES[kind]}"
    if weights.settings.preprocessing is None:
        source += ", because the weights record none: see preprocessing.kind"
    given = [f"preprocessing.{key}" for key, value in config.preprocessing.items() if value != AUTO]
    if given:
        source = f"given as {', '.join(given)}; otherwise {source}"
    mean, deviation = (" ".join(f"{value:.3f}" for value in values) for values in (used.mean, used.deviation))
    captions = "cleaned as in TBPS-CLIP" if used.clean_captions else "as annotated"
    return f"images: {used.interpolation}, mean {mean}, deviation {deviation}; captions: {captions} ({source})"


def check_no_preprocessing(config: EasyDict) -> None:
    """Checks the configuration of a training, which prepares images and captions as the recipe says.

    Raises UserError if it specifies another preprocessing.
    """
    for key, value in config.preprocessing.items():
        if value != AUTO:
            raise UserError(
                f"preprocessing.{key}: {value} has no effect on a training, which prepares images and captions as the "
                f"recipe does: leave it out, and give it to --evaluate, --contribution, --export or search.py"
            )
