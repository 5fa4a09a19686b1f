"""The architecture of a model: combines the configuration and the weights into one record."""

from typing import Any

from easydict import EasyDict

from misc.builders.preprocessing import preprocessing_values
from misc.config.loading import flatten, to_plain
from misc.config.rules import AUTO, ENCODER_KEYS, contradictions
from misc.errors import UserError
from model.architecture import Architecture
from model.pretrained.sizes import usual_heads
from model.pretrained.weights import Weights, square_grid


def architecture_of(config: EasyDict) -> Architecture:
    """Returns the architecture that a configuration specifies; it has no `auto` any more."""
    return Architecture(
        resolution=tuple(config.experiment.input_resolution),
        text_length=config.experiment.text_length,
        **{key: config.model[key] for key in ENCODER_KEYS},
    )


def resolve_architecture(
    config: EasyDict, weights: Weights | None, resumed_config: dict[str, Any] | None = None
) -> EasyDict:
    """Returns a copy of the configuration with a value in place of every `auto`.

    Args:
        config: as loaded; it stays as it is.
        weights: the weights that the run starts from; their architecture is used. None: random weights, and ViT-B/16
            for every `auto`.
        resumed_config: the configuration of the run that is resumed; its architecture is used.

    Raises UserError if the configuration contradicts the weights, or itself.
    """
    if resumed_config is not None:
        return _fill_in(config, resumed_config["model"])
    if weights is not None:
        return _fill_in(config, _encoders_of(config, weights), weights.name)
    defaults = Architecture()
    encoders = {key: getattr(defaults, key) if config.model[key] == AUTO else config.model[key] for key in ENCODER_KEYS}
    for encoder in ("vision", "text"):
        if config.model[f"{encoder}_heads"] == AUTO:
            encoders[f"{encoder}_heads"] = usual_heads(encoders[f"{encoder}_width"])
    return _fill_in(config, encoders)


def config_of_weights(config: EasyDict, weights: Weights) -> EasyDict:
    """Returns a copy of the configuration with the architecture, text length and preprocessing of the weights.

    These are the settings to evaluate and export the weights with. The preprocessing, with the resolution, is that of
    the weights where the configuration has `auto`.

    Raises UserError if neither the weights nor the configuration specify their activation or resolution, or if the
    given resolution does not fit.
    """
    saved = EasyDict(to_plain(config))
    saved.model.update(_encoders_of(config, weights))
    patch, resolution = saved.model.patch_size, saved.preprocessing.resolution
    if resolution == AUTO:
        resolution = [side * patch for side in grid_of(config, weights)]
    if any(side % patch for side in resolution):
        raise UserError(
            f"preprocessing.resolution: {resolution} should be multiples of {patch}, the patch size of {weights.name}"
        )
    saved.experiment.update(input_resolution=resolution, text_length=weights.text_length)
    saved.preprocessing.update(preprocessing_values(config, weights))
    return saved


def grid_of(config: EasyDict, weights: Weights) -> tuple[int, int]:
    """Returns (height, width) of the position embeddings of weights, in patches.

    Raises UserError if neither the weights nor the configuration specify it.
    """
    patch = weights.sizes.patch_size
    configured = tuple(side // patch for side in config.experiment.input_resolution)
    fits = configured[0] * configured[1] == weights.patches
    grid = weights.grid or (configured if fits else square_grid(weights.patches))
    if grid is None:
        raise UserError(
            f"{weights.name}: it does not record its resolution, and its {weights.patches} patches of {patch} pixels "
            "form no square: set experiment.input_resolution=[height, width] to the resolution of these weights"
        )
    return grid


def _encoders_of(config: EasyDict, weights: Weights) -> dict[str, int | str]:
    """Reads `ENCODER_KEYS` from the weights.

    Heads that the weights do not record come from the configuration, if its width is this one or `auto`.

    Raises UserError if the activation is not specified anywhere, or heads do not divide a width.
    """
    given = config.model.activation
    encoders: dict[str, int | str] = {
        **weights.sizes._asdict(),
        "activation": weights.activation(None if given == AUTO else given),
    }
    for encoder in ("vision", "text"):
        width, heads = getattr(weights.sizes, f"{encoder}_width"), config.model[f"{encoder}_heads"]
        meant = heads != AUTO and config.model[f"{encoder}_width"] in (AUTO, width)
        chosen = getattr(weights.settings, f"{encoder}_heads") or (heads if meant else usual_heads(width))
        if width % chosen:
            raise UserError(
                f"{weights.name}: it does not record how many attention heads share the width {width}, and {chosen} "
                f"do not divide it: set model.{encoder}_heads"
            )
        encoders[f"{encoder}_heads"] = chosen
    return encoders


def _fill_in(config: EasyDict, encoders: dict[str, Any], source: str | None = None) -> EasyDict:
    """Replaces every `auto` by its value in `encoders`, which has all `ENCODER_KEYS`.

    Args:
        source: the name of the weights that have this architecture; None if it is only a default.
    """
    resolved = EasyDict(to_plain(config))
    resolved.model.update({key: encoders[key] for key in ENCODER_KEYS if config.model[key] == AUTO})
    if config.experiment.simclr_mlp == AUTO:
        width = resolved.model.embed_dim
        resolved.experiment.simclr_mlp = [width, 128, width]  # paper: 512, 128, 512
    problems = list(contradictions(flatten(resolved)))
    differing = [key for key in ENCODER_KEYS if resolved.model[key] != encoders[key]]
    if source is not None and differing:
        configured = ", ".join(f"model.{key}: {config.model[key]}" for key in differing)
        found = ", ".join(f"{key} {encoders[key]}" for key in differing)
        remedy = " ".join(f"model.{key}={AUTO}" for key in differing)
        problems.append(f"{configured} does not fit {source}, which has {found}: set {remedy}")
    if problems:
        raise UserError("configuration: " + "; ".join(problems))
    return resolved
