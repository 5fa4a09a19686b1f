"""Parameter groups, AdamW, and the learning rate as a function of the step."""

import math

import torch
from torch import nn

FAST_HEADS = ("masked_language_head.", "identity_classifier.")
NORMS_AROUND_CROSS_ATTENTION = ("ln_pre_t.", "ln_pre_i.", "ln_post.")


def parameter_groups(model: nn.Module, *, weight_decay: float, head_ratio: float) -> list[dict]:
    """Splits the parameters into at most four groups for AdamW: encoders and heads, with and without weight decay.

    Biases, norms and all parameters with fewer than two dimensions have no weight decay. The heads of MLM and ID have
    `head_ratio` times the learning rate. Only the three norms around the cross-attention keep the base learning rate,
    as in the published code.

    Returns: groups with `params`, `names`, `weight_decay` and `lr_ratio`; frozen parameters are left out.
    """
    groups: dict[tuple[float, float], dict] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        decay = weight_decay if parameter.ndim >= 2 else 0.0
        ratio = head_ratio if _is_fast(name) else 1.0
        group = groups.setdefault((decay, ratio), {"params": [], "names": [], "weight_decay": decay, "lr_ratio": ratio})
        group["params"].append(parameter)
        group["names"].append(name)
    return list(groups.values())


def _is_fast(name: str) -> bool:
    head = next((head for head in FAST_HEADS if name.startswith(head)), None)
    return head is not None and not name.removeprefix(head).startswith(NORMS_AROUND_CROSS_ATTENTION)


def build_optimizer(groups: list[dict], *, betas: tuple[float, float], eps: float) -> torch.optim.AdamW:
    """Builds AdamW for `parameter_groups`. `set_learning_rate` sets the learning rate before each step."""
    settings = [
        {
            "params": group["params"],
            "param_names": group["names"],  # for checkpoints; where torch itself keeps them, from 2.6 on
            "weight_decay": group["weight_decay"],
            "lr_ratio": group["lr_ratio"],
        }
        for group in groups
    ]
    return torch.optim.AdamW(settings, lr=0.0, betas=(betas[0], betas[1]), eps=eps, fused=True)


def learning_rate(
    step: int, *, warmup_steps: int, total_steps: int, lr_start: float, lr: float, lr_end: float
) -> float:
    """Returns the learning rate of iteration `step`, counted from 0 over the whole training.

    It rises linearly from `lr_start` to `lr` in the first `warmup_steps`, both values included. Then it falls along a
    cosine from `lr` to `lr_end`, which it would reach one step after the last.
    """
    if step < warmup_steps:
        return lr_start + (lr - lr_start) * step / max(1, warmup_steps - 1)
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return lr_end + (lr - lr_end) * (1 + math.cos(math.pi * progress)) / 2


def set_learning_rate(optimizer: torch.optim.Optimizer, value: float) -> None:
    """Sets the learning rate of every group to `value` times its `lr_ratio`."""
    for group in optimizer.param_groups:
        group["lr"] = value * group["lr_ratio"]
