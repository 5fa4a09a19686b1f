"""Parameter groups, AdamW, and the learning rate as a function of the step."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from misc.errors import UserError, first_of

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


def check_optimizer_state(optimizer: torch.optim.Optimizer, state: dict[str, Any], *, may_be_empty: bool) -> None:
    """Checks the state of an AdamW in a checkpoint: torch would take tensors of any shape.

    Args:
        optimizer: an AdamW of the same parameters.
        state: `state_dict` of an AdamW, with unchecked values.
        may_be_empty: whether the AdamW may not have made a step.

    Raises UserError if its parameters differ, or a value is missing or invalid.
    """
    groups, saved = state.get("param_groups"), state.get("state")
    own = optimizer.state_dict()["param_groups"]
    keys = ("params", "param_names")
    same = (
        isinstance(groups, list)
        and len(groups) == len(own)
        and all(
            isinstance(group, dict) and all(_equal(group.get(key), ours[key]) for key in keys)
            for group, ours in zip(groups, own, strict=True)
        )
    )
    if not same or not isinstance(saved, dict):
        raise UserError("its optimizer state is for other parameters")
    if not saved and may_be_empty:
        return
    numbered = dict(enumerate(parameter for group in optimizer.param_groups for parameter in group["params"]))
    if saved.keys() != numbered.keys():
        raise UserError("its optimizer state is not that of all parameters")
    for number, parameter in numbered.items():
        wanted = {"step": torch.zeros(()), "exp_avg": parameter, "exp_avg_sq": parameter}
        check_tensors("the optimizer", saved[number], wanted)


def check_tensors(owner: str, found: Any, wanted: dict[str, Tensor]) -> None:
    """Checks tensors of a checkpoint.

    Args:
        owner: what they belong to, for the message.
        found: tensors by name, unchecked.
        wanted: tensors of the same names, shapes and types.

    Raises UserError if a tensor is missing, unknown, of another shape or type, or not finite.
    """
    if not isinstance(found, dict) or found.keys() != wanted.keys():
        differing = found.keys() ^ wanted.keys() if isinstance(found, dict) else {"all"}
        raise UserError(f"{owner} has missing or unknown tensors ({first_of(sorted(map(str, differing)))})")
    wrong = [name for name, tensor in wanted.items() if not _fits(found[name], tensor)]
    if wrong:
        raise UserError(f"{owner} has tensors of another shape or type, or not finite ({first_of(wrong)})")


def _equal(found: Any, wanted: list) -> bool:
    """Whether a value is this list of names or numbers. It may contain tensors, which cannot be compared with them."""
    return isinstance(found, list) and [(type(a), str(a)) for a in found] == [(type(a), str(a)) for a in wanted]


def _fits(found: Any, wanted: Tensor) -> bool:
    return (
        isinstance(found, Tensor)
        and (found.shape, found.dtype, found.layout) == (wanted.shape, wanted.dtype, wanted.layout)
        and found.device.type != "meta"
        and bool(found.sum().isfinite() or found.isfinite().all())  # a sum is 25 times as fast
    )


def set_learning_rate(optimizer: torch.optim.Optimizer, value: float) -> None:
    """Sets the learning rate of every group to `value` times its `lr_ratio`."""
    for group in optimizer.param_groups:
        group["lr"] = value * group["lr_ratio"]
