"""Builders: where the configuration stops. What they build takes named numbers and knows no configuration."""

from pathlib import Path
from typing import Any

import torch
from easydict import EasyDict
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from misc.config import loading as configuration
from misc.data.annotations import Split
from misc.data.samples import Augmentation, GlobalBatchSampler, TrainingSet, training_loader
from misc.errors import UserError
from misc.files import is_folder
from misc.retrieval.evaluation import Evaluator
from misc.run.checkpoint import read_checkpoint
from misc.system.distributed import Processes, gather, gather_detached
from misc.system.precision import Precision
from misc.training.optimizer import build_optimizer, learning_rate, parameter_groups
from misc.training.trainer import Trainer
from model.objectives import Objectives
from model.pretrained.architecture import usual_heads
from model.pretrained.export import Export
from model.pretrained.loading import load_weights
from model.pretrained.weights import Weights, find_weights, read_weights, square_grid
from model.tbps_clip import TBPSCLIP
from model.transformer import QUICK_GELU
from text_utils.augmentation import NEEDS_SYNONYMS
from text_utils.tokenizer import VOCABULARY_SIZE, Tokenizer
from text_utils.wordnet import WordNet

RANDOM_ARCHITECTURE = {
    "patch_size": 16,
    "vision_width": 768,
    "vision_layers": 12,
    "vocab_size": VOCABULARY_SIZE,
    "text_width": 512,
    "text_layers": 12,
    "embed_dim": 512,
    "activation": QUICK_GELU,
}
"""What random weights are drawn for where the configuration says nothing: ViT-B/16."""


CONTEXT, ADAPTER_RATIO = "prompt.context", "image_adapter.ratio"
"""What tells, among the tensors of a checkpoint, that its CLIP was adapted."""


def run_folder(config: EasyDict) -> Path:
    """Where the run writes. With `ckpt_type: saved`, `saved_path` is the file to start from, and the run goes into a
    folder beside it of the same name without its suffix."""
    path = Path(config.model.saved_path)
    return path.with_suffix("") if config.model.ckpt_type == "saved" else path


def build_objectives(config: EasyDict, processes: Processes) -> Objectives:
    """The losses that are on. Without `use_gather`, a rank contrasts with its own samples alone."""
    experiment = config.experiment
    together = config.model.use_gather
    gathering = gather if config.model.gather_gradient else gather_detached
    return Objectives(
        gather=gathering if together else lambda rows: rows,
        rank=processes.rank if together else 0,
        nitc=experiment.nitc_ratio,
        ritc=experiment.ritc_ratio if experiment.ritc else 0.0,
        citc=experiment.citc_ratio if experiment.citc else 0.0,
        ss=experiment.ss_ratio if experiment.ss else 0.0,
        mlm=experiment.mlm_ratio if experiment.mlm else 0.0,
        identity=experiment.id_ratio if experiment.id else 0.0,
        ss_text=experiment.ss_ratio if experiment.ss_text else 0.0,
        sdm=experiment.sdm_ratio if experiment.sdm else 0.0,
        pair_labels=experiment.nitc_labels == "pair",
        multi_view=experiment.mvs_image,
        multi_view_text=experiment.mvs_text,
        ritc_epsilon=experiment.ritc_eps,
        citc_in_modal=experiment.citc_lambda1,
        citc_cross_modal=experiment.citc_lambda2,
        ss_temperature=experiment.simclr_temperature,
        sdm_scale=experiment.sdm_scale,
        sdm_epsilon=experiment.sdm_eps,
    )


def build_towers(config: EasyDict, **heads) -> TBPSCLIP:
    """TBPSCLIP as configured, with randomly initialised weights; `heads` as its constructor takes them."""
    return TBPSCLIP(
        resolution=configuration.resolution(config),
        text_length=config.experiment.text_length,
        dropout=config.experiment.dropout,
        lock_bottom=config.model.lock_bottom,
        grad_checkpointing=config.model.grad_checkpointing,
        **{key: config.model[key] for key in configuration.ARCHITECTURE_KEYS},
        **heads,
    )


def starting_weights(config: EasyDict, processes: Processes) -> Weights | None:
    """The weights that a new run begins with; None where they are drawn at random. Call it on all ranks."""
    if config.model.ckpt_type == "saved":
        if is_folder(config.model.saved_path):
            raise UserError(
                f"model.saved_path: {config.model.saved_path} is a folder, and with model.ckpt_type: saved it should "
                "be the file to start from: give that, or start from the folder with model.checkpoint"
            )
        return weights_of(config.model.saved_path, processes)
    return None if config.model.checkpoint is None else weights_of(config.model.checkpoint, processes)


def weights_of(source: str, processes: Processes) -> Weights:
    """The weights of a file, folder or tag. Call it on all ranks: one on each machine downloads."""
    return read_weights(processes.first_on_machine(lambda: find_weights(source)))


def settle(config: EasyDict, weights: Weights | None, resumed: dict | None = None) -> EasyDict:
    """The configuration with the architecture of the weights, or of the run that is `resumed`, for every `auto`.

    Raises UserError where the configuration and the weights contradict each other.
    """
    if resumed is not None:
        return configuration.settle(config, resumed["model"])
    if weights is not None:
        return configuration.settle(config, _architecture(config, weights), weights.name)
    given = {key: config.model[key] for key in configuration.ARCHITECTURE_KEYS}
    sizes = RANDOM_ARCHITECTURE | {key: value for key, value in given.items() if value != configuration.AUTO}
    heads = {f"{tower}_heads": usual_heads(sizes[f"{tower}_width"]) for tower in ("vision", "text")}
    return configuration.settle(config, heads | sizes)


def _architecture(config: EasyDict, weights: Weights) -> dict[str, int | str]:
    """What the weights tell; and of what no tensor shows, what the configuration says, if it is for such weights.

    Raises UserError where nothing tells the activation, or heads do not divide a width.
    """
    given = config.model.activation
    architecture = weights.sizes | {"activation": weights.activation(None if given == configuration.AUTO else given)}
    for tower in ("vision", "text"):
        width, heads = weights.sizes[f"{tower}_width"], config.model[f"{tower}_heads"]
        meant = heads != configuration.AUTO and config.model[f"{tower}_width"] in (configuration.AUTO, width)
        chosen = getattr(weights.settings, f"{tower}_heads") or (heads if meant else usual_heads(width))
        if width % chosen:
            raise UserError(
                f"{weights.name}: nothing in it tells how many attention heads share the width {width}, and {chosen} "
                f"do not divide it: set model.{tower}_heads"
            )
        architecture[f"{tower}_heads"] = chosen
    return architecture


def as_saved(config: EasyDict, weights: Weights) -> EasyDict:
    """The configuration with all that the weights decide: what a model of them is evaluated and exported with.

    Raises UserError where nothing tells their activation or resolution.
    """
    saved = EasyDict(configuration.plain(config))
    saved.model.update(_architecture(config, weights))
    patch = saved.model.patch_size
    configured = tuple(side // patch for side in configuration.resolution(config))
    fits = configured[0] * configured[1] == weights.patches
    grid = weights.grid or (configured if fits else square_grid(weights.patches))
    if grid is None:
        raise UserError(
            f"{weights.name}: nothing in it tells its resolution, and its {weights.patches} patches of {patch} pixels "
            "form no square: set experiment.input_resolution=[height, width] to that of these weights"
        )
    saved.experiment.update(input_resolution=[side * patch for side in grid], text_length=weights.text_length)
    return saved


def weight_notes(config: EasyDict, weights: Weights) -> list[str]:
    """Lines for the log: where the weights come from, and what they make of the model."""
    model = config.model
    told = weights.settings.activation is not None
    return [
        f"weights of {weights.name} ({weights.form})",
        f"architecture: patches of {model.patch_size} pixels; image encoder {model.vision_layers} layers, width "
        f"{model.vision_width}, {model.vision_heads} heads; text encoder {model.text_layers} layers, width "
        f"{model.text_width}, {model.text_heads} heads; shared space {model.embed_dim}",
        f"activation: {model.activation} ({'as they tell' if told else 'given as model.activation'})",
    ]


def build_model(
    config: EasyDict, objectives: Objectives, identities: int, *, weights: Weights | None, resumed: bool = False
) -> tuple[TBPSCLIP, list[str]]:
    """The model with the heads of the losses that are on and its starting weights, and lines for the log.

    What `weights` do not fill is drawn from `misc.seed`, so every rank builds the same. A model that is `resumed` gets
    its weights later.

    Raises UserError where the context of CoOp leaves no room for a caption.
    """
    context = _context(config)
    torch.manual_seed(config.misc.seed)
    model = build_towers(
        config,
        simclr_widths=config.experiment.simclr_mlp if objectives.ss > 0 else None,
        text_simclr_widths=config.experiment.simclr_mlp if objectives.ss_text > 0 else None,
        masked_language_depth=config.experiment.cmt_depth if objectives.mlm > 0 else None,
        identities=identities if objectives.identity > 0 else None,
        context_length=len(context) or None,
        adapter_ratio=config.model.adapter_ratio if config.model.adaptation == "clip_adapter" else None,
    )
    notes = []
    if weights is not None:
        notes = [*weight_notes(config, weights), *load_weights(model, weights)]
    elif not resumed:
        notes = [
            "warning: model.checkpoint is null, so all weights are drawn at random, as CLIP's were before its training"
        ]
    offered = weights.heads.get(CONTEXT) if weights is not None else None
    if context and (offered is None or offered.shape != model.prompt.context.shape):
        with torch.no_grad():
            model.prompt.context.copy_(model.text_encoder.token_embedding.weight[context])
    elif context:
        notes.append(f"context as learned in {weights.name}, not model.context")
    if model.image_adapter is not None:
        model.image_adapter.ratio.fill_(config.model.adapter_ratio)  # not that of the weights
    model.logit_scale.requires_grad_(model.logit_scale.requires_grad and objectives.uses_temperature)
    model.text_encoder.freeze_layers(config.model.frozen_text_layers)
    model.text_encoder.drop_layers(config.model.dropped_text_layers)
    return model, notes


def _context(config: EasyDict) -> list[int]:
    """Token ids that CoOp's context begins as; none without CoOp."""
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
    """The towers of the weights, the configuration with what they decide, and lines for the log."""
    saved = as_saved(config, weights)
    context, ratio = weights.heads.get(CONTEXT), weights.heads.get(ADAPTER_RATIO)
    model = build_towers(
        saved,
        context_length=None if context is None else len(context),
        adapter_ratio=None if ratio is None else float(ratio),
    )
    notes = [
        *weight_notes(saved, weights),
        "for {} × {} pixels, {} tokens".format(*configuration.resolution(saved), saved.experiment.text_length),
        *load_weights(model, weights),
    ]
    if config.model.activation not in (configuration.AUTO, saved.model.activation):
        notes.append(f"warning: model.activation: {config.model.activation} is not used, the weights tell otherwise")
    return model, saved, notes


def beginning(source: str) -> dict[str, Any]:
    """What in the configuration of a run's checkpoint decides the weights that the run began with.

    Raises UserError where `source` is none, or does not tell.
    """
    needed = "--contribution needs the checkpoint of a run, which alone tells the weights that the run began with"
    try:
        config = {"model.dropped_text_layers": []} | configuration.flatten(read_checkpoint(Path(source))["config"])
    except UserError as error:
        raise UserError(f"{needed}: {error}") from error
    keys = ("misc.seed", "model.ckpt_type", "model.checkpoint", "model.saved_path", "model.dropped_text_layers")
    if unknown := [key for key in keys if key not in config or not configuration.RULES[key].accepts(config[key])]:
        raise UserError(f"{needed}: {source} has no valid {unknown[0]}: give another one")
    return {key: config[key] for key in keys}


def build_initial_model(
    config: EasyDict, processes: Processes, source: str, began: dict[str, Any]
) -> tuple[TBPSCLIP, list[str]]:
    """The towers as they were before the training that `source` comes from, and lines for the log."""
    config = EasyDict(configuration.plain(config))
    for key, value in began.items():
        section, name = key.split(".")
        config[section][name] = value
    config.model.text_layers += len(config.model.dropped_text_layers)
    # What is not part of the towers is drawn after them, and not needed.
    config.experiment.update(ss=False, ss_text=False, mlm=False, id=False)
    config.model.update(adaptation=None, frozen_text_layers=[])
    try:
        weights = starting_weights(config, processes)
        config = settle(config, weights)
    except UserError as error:
        raise UserError(f"the weights that the run of {source} began with: {error}") from error
    return build_model(config, build_objectives(config, processes), identities=0, weights=weights)


def build_export(config: EasyDict, model: TBPSCLIP, weights: Weights, tokenizer: Tokenizer) -> Export:
    """What is written for other tools; `config` and `model` come from `build_saved_model`."""
    if model.prompt is not None or model.image_adapter is not None:
        raise UserError(
            f"--export: {weights.name} is adapted (model.adaptation), which no other tool reads: evaluate it here"
        )
    return Export(
        model=model,
        architecture={key: config.model[key] for key in configuration.ARCHITECTURE_KEYS},
        resolution=configuration.resolution(config),
        text_length=config.experiment.text_length,
        preprocessing=weights.preprocessing,
        tokenizer=tokenizer,
    )


def build_loader(
    config: EasyDict, split: Split, objectives: Objectives, tokenizer: Tokenizer, processes: Processes
) -> DataLoader:
    """The training batches of this rank; the `epoch` of its batch sampler is to be set before each epoch."""
    experiment = config.experiment
    sampler = GlobalBatchSampler(
        len(split),
        config.data.batch_size,
        seed=config.misc.seed,
        rank=processes.rank,
        world_size=processes.world_size,
        mixgen_probability=experiment.mixgen_p if experiment.mixgen else 0.0,
        mixgen_ratio=experiment.mixgen_ratio,
    )
    if len(sampler) == 0:
        most, share = len(split) // processes.world_size, config.data.train_share
        remedy = f"set data.batch_size to at most {most}" if most else "give it more samples"
        raise UserError(
            f"data.batch_size: {config.data.batch_size} on {processes.world_size} processes is more than the training "
            f"set's {len(split)} samples: {remedy}" + (f", or raise data.train_share: {share}" if share < 1 else "")
        )
    synonyms = None
    if experiment.text_operation in NEEDS_SYNONYMS and experiment.eda_alpha > 0:
        synonyms = WordNet(Path(experiment.wordnet)).synonyms
    augmentation = Augmentation(
        resolution=configuration.resolution(config),
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
    )
    dataset = TrainingSet(split, Path(config.image_dir), tokenizer, augmentation, config.misc.seed)
    return training_loader(
        dataset, sampler, workers=config.data.num_workers, pin_memory=processes.device.type == "cuda"
    )


def build_trainer(
    config: EasyDict, model: TBPSCLIP, objectives: Objectives, steps: int, precision: Precision, processes: Processes
) -> Trainer:
    """The model on its device (in DistributedDataParallel where there are several processes), with its optimizer."""
    model = model.to(processes.device)
    schedule = config.schedule
    groups = parameter_groups(model, weight_decay=schedule.weight_decay, head_ratio=schedule.ratio_factor)
    return Trainer(
        model=_distributed(model, processes),
        objectives=objectives,
        optimizer=build_optimizer(groups, betas=schedule.betas, eps=schedule.eps),
        learning_rates=[
            learning_rate(
                step,
                warmup_steps=schedule.epoch_warmup * steps,
                total_steps=schedule.epoch * steps,
                lr_start=schedule.lr_start,
                lr=schedule.lr,
                lr_end=schedule.lr_end,
            )
            for step in range(schedule.epoch * steps)
        ],
        softlabel_ratio=config.model.softlabel_ratio,
        precision=precision,
        scaler=precision.scaler(),
        processes=processes,
        seed=config.misc.seed,
        chunk_size=config.data.chunk_size,
    )


def _distributed(model: TBPSCLIP, processes: Processes) -> nn.Module:
    if processes.world_size == 1:
        return model
    device_ids = [processes.device.index] if processes.device.type == "cuda" else None
    return DistributedDataParallel(model, device_ids=device_ids, gradient_as_bucket_view=True)


def build_evaluator(
    config: EasyDict, splits: dict[str, Split], tokenizer: Tokenizer, precision: Precision, processes: Processes
) -> Evaluator:
    """Evaluation of the split that `data.evaluate_on` names. Raises UserError where the dataset has no such split."""
    name = config.data.evaluate_on
    if name not in splits:
        raise UserError(f"data.evaluate_on: the dataset in {config.anno_dir} has no {name} split: set it to test")
    return Evaluator(
        split=splits[name],
        image_dir=Path(config.image_dir),
        tokenizer=tokenizer,
        text_length=config.experiment.text_length,
        resolution=configuration.resolution(config),
        batch_size=config.data.test_batch_size,
        workers=config.data.num_workers,
        processes=processes,
        precision=precision,
    )
