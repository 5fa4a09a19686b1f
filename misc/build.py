"""Builders: where the configuration stops. What they build takes named numbers and knows no configuration."""

from pathlib import Path

import torch
from easydict import EasyDict
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from misc import config as configuration
from misc.checkpoint import load_weights, read_checkpoint
from misc.datasets import Split
from misc.distributed import Processes, gather
from misc.errors import UserError
from misc.evaluation import Evaluator
from misc.loader import Augmentation, GlobalBatchSampler, TrainingSet, training_loader
from misc.optimizer import build_optimizer, learning_rate, parameter_groups
from misc.precision import Precision
from misc.training import Trainer
from model.objectives import Objectives
from model.pretrained import load_clip
from model.tbps_clip import TBPSCLIP
from text_utils.tokenizer import Tokenizer

ARCHITECTURE_KEYS = (
    "patch_size",
    "vision_width",
    "vision_layers",
    "vision_heads",
    "vocab_size",
    "text_width",
    "text_layers",
    "text_heads",
    "embed_dim",
)
"""Keys of the section `model` that decide the shapes of the towers."""


def run_folder(config: EasyDict) -> Path:
    """Where the run writes. With `ckpt_type: saved`, `saved_path` is the file to start from, and the run goes into a
    folder beside it of the same name without its suffix."""
    path = Path(config.model.saved_path)
    return path.with_suffix("") if config.model.ckpt_type == "saved" else path


def build_objectives(config: EasyDict, processes: Processes) -> Objectives:
    """The losses that are on. Without `use_gather`, a rank contrasts with its own samples alone."""
    experiment = config.experiment
    together = config.model.use_gather
    return Objectives(
        gather=gather if together else lambda rows: rows,
        rank=processes.rank if together else 0,
        nitc=experiment.nitc_ratio,
        ritc=experiment.ritc_ratio if experiment.ritc else 0.0,
        citc=experiment.citc_ratio if experiment.citc else 0.0,
        ss=experiment.ss_ratio if experiment.ss else 0.0,
        mlm=experiment.mlm_ratio if experiment.mlm else 0.0,
        identity=experiment.id_ratio if experiment.id else 0.0,
        multi_view=experiment.mvs_image,
        ritc_epsilon=experiment.ritc_eps,
        citc_in_modal=experiment.citc_lambda1,
        citc_cross_modal=experiment.citc_lambda2,
        ss_temperature=experiment.simclr_temperature,
    )


def build_towers(config: EasyDict, **heads) -> TBPSCLIP:
    """TBPSCLIP as configured, with randomly initialised weights; `heads` as its constructor takes them."""
    return TBPSCLIP(
        resolution=configuration.resolution(config),
        text_length=config.experiment.text_length,
        dropout=config.experiment.dropout,
        lock_bottom=config.model.lock_bottom,
        grad_checkpointing=config.model.grad_checkpointing,
        **{key: config.model[key] for key in ARCHITECTURE_KEYS},
        **heads,
    )


def build_model(
    config: EasyDict, objectives: Objectives, identities: int, *, resumed: bool
) -> tuple[TBPSCLIP, list[str]]:
    """The model with the heads of the losses that are on and its starting weights, and lines for the log.

    Drawn from `misc.seed`, so every rank builds the same. One that is `resumed` gets its weights later.
    """
    torch.manual_seed(config.misc.seed)
    model = build_towers(
        config,
        simclr_widths=config.experiment.simclr_mlp if objectives.ss > 0 else None,
        masked_language_depth=config.experiment.cmt_depth if objectives.mlm > 0 else None,
        identities=identities if objectives.identity > 0 else None,
    )
    if resumed:
        return model, []
    if config.model.ckpt_type == "saved":
        path = Path(config.model.saved_path)
        content = read_checkpoint(path)
        return model, [f"weights of {path}{_age(content)}", *load_weights(model, content["model"], path)]
    if config.model.checkpoint is None:
        return model, [
            "warning: model.checkpoint is null, so all weights are drawn at random, as CLIP's were before its training"
        ]
    return model, load_clip(
        model, config.model.checkpoint, grid=model.image_encoder.grid, text_length=config.experiment.text_length
    )


def build_saved_model(path: Path, config: EasyDict) -> tuple[TBPSCLIP, EasyDict, str]:
    """The towers of a checkpoint, the configuration with the checkpoint's architecture, and a line for the log."""
    content = read_checkpoint(path)
    saved = EasyDict(content["config"])
    config = EasyDict(configuration.plain(config))
    config.model.update({key: saved.model[key] for key in ARCHITECTURE_KEYS})
    config.experiment.update({key: saved.experiment[key] for key in ("input_resolution", "text_length")})
    model = build_towers(config)
    load_weights(model, content["model"], path)
    height, width = configuration.resolution(config)
    size = f"{height} × {width} pixels, {config.experiment.text_length} tokens"
    return model, config, f"weights of {path}{_age(content)}, and its architecture ({size})"


def _age(content: dict) -> str:
    """How long the weights of a checkpoint have been trained, in words."""
    if content["epoch"] is None:
        return " (published code)"
    steps = content.get("progress", {}).get("step", 0)
    return f", epoch {content['epoch']}" + (f" and {steps} steps" if steps else "")


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
        raise UserError(
            f"data.batch_size: {config.data.batch_size} on {processes.world_size} processes is more than the training "
            f"set's {len(split)} samples: set data.batch_size to at most {len(split) // processes.world_size}"
        )
    augmentation = Augmentation(
        resolution=configuration.resolution(config),
        text_length=experiment.text_length,
        second_view=objectives.needs_second_view,
        simclr_views=objectives.needs_simclr_views,
        masked_captions=objectives.needs_masked_captions,
        back_translation_probability=experiment.backtrans_p if experiment.back_trans else 0.0,
        deletion_probability=experiment.eda_alpha,
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
