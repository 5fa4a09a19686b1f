"""The losses, and the trainer with its optimizer."""

from dataclasses import fields
from functools import partial

from easydict import EasyDict
from torch.nn.parallel import DistributedDataParallel

from misc.system.distributed import Ranks, gather, gather_detached
from misc.system.precision import Precision
from misc.training.compilation import CAPTION_MULTIPLE, compile_model
from misc.training.optimizer import build_optimizer, learning_rate, parameter_groups
from misc.training.trainer import Trainer
from model.objectives import Objectives
from model.tbps_clip import TBPSCLIP


def build_objectives(config: EasyDict, ranks: Ranks) -> Objectives:
    """Builds the losses. Every field of `Objectives` is a key of `experiment`, except the two about ranks.

    Without `use_gather`, a rank only contrasts its own samples.
    """
    names = [field.name for field in fields(Objectives) if field.name not in ("gather", "rank")]
    settings = {name: config.experiment[name] for name in names}
    if not config.model.use_gather:
        return Objectives(gather=lambda rows: rows, rank=0, **settings)
    gathering = gather if config.model.gather_gradient else gather_detached
    return Objectives(gather=gathering, rank=ranks.rank, **settings)


def build_trainer(
    config: EasyDict, model: TBPSCLIP, objectives: Objectives, steps: int, precision: Precision, ranks: Ranks
) -> Trainer:
    """Builds the trainer: the model on its device, with its optimizer and learning rates.

    Args:
        steps: number of steps in an epoch.
    """
    model = model.to(ranks.device)
    if config.misc.compile:
        compile_model(model, ranks.device)
    schedule = config.schedule
    groups = parameter_groups(model, weight_decay=schedule.weight_decay, head_ratio=schedule.ratio_factor)
    return Trainer(
        model=_distributed(model, ranks),
        objectives=objectives,
        optimizer=build_optimizer(groups, betas=schedule.betas, eps=schedule.eps),
        learning_rate=partial(
            learning_rate,
            warmup_steps=schedule.epoch_warmup * steps,
            total_steps=schedule.epoch * steps,
            lr_start=schedule.lr_start,
            lr=schedule.lr,
            lr_end=schedule.lr_end,
        ),
        final_soft_label_ratio=config.model.softlabel_ratio,
        precision=precision,
        scaler=precision.scaler(),
        ranks=ranks,
        seed=config.misc.seed,
        chunk_size=config.data.chunk_size,
        caption_multiple=CAPTION_MULTIPLE if config.misc.compile else 1,
    )


def _distributed(model: TBPSCLIP, ranks: Ranks) -> TBPSCLIP | DistributedDataParallel:
    if ranks.world_size == 1:
        return model
    device_ids = [ranks.device.index] if ranks.device.type == "cuda" else None
    return DistributedDataParallel(model, device_ids=device_ids, gradient_as_bucket_view=True)
