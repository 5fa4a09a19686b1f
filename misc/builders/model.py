"""The model with its weights: for training, from a checkpoint, and as it was when a run started."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from easydict import EasyDict

from misc.builders.architecture import architecture_of, config_of_weights, grid_of, resolve_architecture
from misc.builders.preprocessing import preprocessing_note, preprocessing_of
from misc.builders.training import build_objectives
from misc.config.loading import flatten, to_plain
from misc.config.rules import AUTO, RULES
from misc.errors import UserError
from misc.files import is_folder
from misc.run.checkpoint import read_checkpoint
from misc.system.distributed import Ranks
from model.objectives import Objectives
from model.pretrained.export import Export
from model.pretrained.loading import load_weights
from model.pretrained.weights import Weights, find_weights, read_weights
from model.tbps_clip import TBPSCLIP
from text_utils.tokenizer import Tokenizer

CONTEXT, ADAPTER_RATIO = "prompt.context", "image_adapter.ratio"
"""Tensors by which a checkpoint shows that its CLIP was adapted (CoOp, CLIP-Adapter)."""


def initial_weights(config: EasyDict, ranks: Ranks) -> Weights | None:
    """Reads the weights that a new run starts from; None if they are drawn at random. Call it on all ranks."""
    if config.model.ckpt_type == "saved":
        if is_folder(config.model.saved_path):
            raise UserError(
                f"model.saved_path: {config.model.saved_path} is a folder; with model.ckpt_type: saved it should be "
                "the file to start from: give that file, or start from the folder with model.checkpoint"
            )
        return read_any_weights(config.model.saved_path, ranks)
    return None if config.model.checkpoint is None else read_any_weights(config.model.checkpoint, ranks)


def read_any_weights(source: str, ranks: Ranks) -> Weights:
    """Reads the weights of a file, folder or tag. Call it on all ranks: one rank of each machine downloads."""
    return read_weights(ranks.local_main_first(lambda: find_weights(source)))


def build_encoders(config: EasyDict, **heads: Any) -> TBPSCLIP:
    """Builds TBPSCLIP as configured, with random weights; `heads` are further arguments of its constructor."""
    return TBPSCLIP(
        architecture_of(config),
        dropout=config.experiment.dropout,
        lock_bottom=config.model.lock_bottom,
        grad_checkpointing=config.model.grad_checkpointing,
        **heads,
    )


def build_model(
    config: EasyDict, objectives: Objectives, identities: int, *, weights: Weights | None, resumed: bool = False
) -> tuple[TBPSCLIP, list[str]]:
    """Builds the model to train, with the heads of the losses that are on, and fills it with its initial weights.

    Everything that `weights` do not fill is drawn from `misc.seed`, so every rank builds the same model. A model that
    is `resumed` gets its weights later.

    Returns: the model, and lines for the log.
    Raises UserError if the context of CoOp leaves no room for a caption.
    """
    context = _context_tokens(config)
    torch.manual_seed(config.misc.seed)
    model = build_encoders(
        config,
        simclr_widths=config.experiment.simclr_mlp if objectives.needs_simclr_views else None,
        text_simclr_widths=config.experiment.simclr_mlp if objectives.needs_simclr_captions else None,
        masked_language_depth=config.experiment.cmt_depth if objectives.needs_masked_captions else None,
        identities=identities if "id" in objectives.weights else None,
        context_length=len(context) or None,
        adapter_ratio=config.model.adapter_ratio if config.model.adaptation == "clip_adapter" else None,
    )
    notes = []
    if weights is not None:
        notes = [*weight_notes(config, weights), *load_weights(model, weights)]
    elif not resumed:
        notes = ["warning: model.checkpoint is null, so all weights are drawn at random"]
    if model.prompt is not None:
        offered = weights.heads.get(CONTEXT) if weights is not None else None
        if weights is not None and offered is not None and offered.shape == model.prompt.context.shape:
            notes.append(f"the context is the one learned in {weights.name}, not model.context")
        else:
            with torch.no_grad():
                model.prompt.context.copy_(model.text_encoder.token_embedding.weight[context])
    if model.image_adapter is not None:
        model.image_adapter.ratio.fill_(config.model.adapter_ratio)  # not the one in the weights
    model.logit_scale.requires_grad_(model.logit_scale.requires_grad and objectives.uses_temperature)
    model.text_encoder.freeze_layers(config.model.frozen_text_layers)
    model.text_encoder.drop_layers(config.model.dropped_text_layers)
    return model, notes


def _context_tokens(config: EasyDict) -> list[int]:
    """Returns the token ids that CoOp's context starts from; empty without CoOp."""
    if config.model.adaptation != "coop":
        return []
    ids = Tokenizer().encode(config.model.context, 1024)[1:-1]
    longest = config.experiment.text_length - 3  # start, a word, end
    if not 0 < len(ids) <= longest:
        raise UserError(
            f"model.context: {config.model.context!r} has {len(ids)} tokens: 1 to {longest} leave room for a caption"
        )
    return ids


def build_saved_model(config: EasyDict, weights: Weights) -> tuple[TBPSCLIP, EasyDict, list[str]]:
    """Builds the model of given weights, to evaluate, search with or export.

    Returns: the model, the configuration with the architecture and the preprocessing of the weights, and lines for the
        log.
    """
    saved = config_of_weights(config, weights)
    weights = replace(weights, grid=grid_of(config, weights))
    context, ratio = weights.heads.get(CONTEXT), weights.heads.get(ADAPTER_RATIO)
    model = build_encoders(
        saved,
        context_length=None if context is None else len(context),
        adapter_ratio=None if ratio is None else float(ratio),
    )
    notes = [
        *weight_notes(saved, weights),
        "for {} × {} pixels, {} tokens".format(*saved.experiment.input_resolution, saved.experiment.text_length),
        preprocessing_note(config, weights),
        *load_weights(model, weights),
    ]
    if config.model.activation not in (AUTO, saved.model.activation):
        notes.append(
            f"warning: model.activation: {config.model.activation} is not used, because the weights need "
            f"{saved.model.activation}"
        )
    return model, saved, notes


def weight_notes(config: EasyDict, weights: Weights) -> list[str]:
    """Returns lines for the log: the source of the weights, and the architecture of the model."""
    model = config.model
    source = "given as model.activation" if weights.settings.activation is None else "known from the weights"
    return [
        f"weights of {weights.name} ({weights.form})",
        *weights.notes,
        f"architecture: patches of {model.patch_size} pixels; image encoder {model.vision_layers} layers, width "
        f"{model.vision_width}, {model.vision_heads} heads; text encoder {model.text_layers} layers, width "
        f"{model.text_width}, {model.text_heads} heads; shared space {model.embed_dim}",
        f"activation: {model.activation} ({source})",
    ]


def initial_weights_config(source: str) -> dict[str, Any]:
    """Reads from a run's checkpoint the settings that decide which weights the run started from.

    Raises UserError if `source` is no checkpoint of a run, or does not record these settings.
    """
    needed = "--contribution needs the checkpoint of a run, because only that records the run's initial weights"
    try:
        config = {"model.dropped_text_layers": []} | flatten(read_checkpoint(Path(source))["config"])
    except UserError as error:
        raise UserError(f"{needed}: {error}") from error
    keys = ("misc.seed", "model.ckpt_type", "model.checkpoint", "model.saved_path", "model.dropped_text_layers")
    invalid = [key for key in keys if key not in config or not RULES[key].values.accepts(config[key])]
    if invalid:
        raise UserError(f"{needed}: {source} has no valid {invalid[0]}: give another checkpoint")
    return {key: config[key] for key in keys}


def build_initial_model(
    config: EasyDict, ranks: Ranks, source: str, settings: dict[str, Any]
) -> tuple[TBPSCLIP, list[str]]:
    """Builds the encoders as they were before the training that `source` comes from.

    Args:
        settings: result of `initial_weights_config`.

    Returns: the model, and lines for the log.
    """
    config = EasyDict(to_plain(config))
    for key, value in settings.items():
        section, name = key.split(".")
        config[section][name] = value
    config.model.text_layers += len(config.model.dropped_text_layers)
    # The heads are drawn after the encoders, and are not needed.
    config.experiment.update(ss=False, ss_text=False, mlm=False, id=False)
    config.model.update(adaptation=None, frozen_text_layers=[])
    try:
        weights = initial_weights(config, ranks)
        config = resolve_architecture(config, weights)
    except UserError as error:
        raise UserError(f"the initial weights of the run of {source}: {error}") from error
    return build_model(config, build_objectives(config, ranks), identities=0, weights=weights)


def build_export(config: EasyDict, model: TBPSCLIP, weights: Weights, tokenizer: Tokenizer) -> Export:
    """Collects what an export writes; `config` and `model` come from `build_saved_model`."""
    if model.prompt is not None or model.image_adapter is not None:
        raise UserError(
            f"--export: {weights.name} is adapted (model.adaptation), which no other tool can read: evaluate it with "
            "--evaluate instead"
        )
    return Export(model, architecture_of(config), preprocessing_of(config, weights.preprocessing), tokenizer)
