"""Checkpoints: a dict of tensors and plain values, written whole or not at all, read without running code."""

import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

from misc.config import plain
from misc.errors import UserError
from model.pretrained import first_of, misfits

HEADS = ("simclr_projector.", "masked_language_head.", "identity_classifier.")


def save_checkpoint(path: Path, model: nn.Module, config: dict, epoch: int, metrics: dict[str, float]) -> None:
    """Writes `model`, `config`, `epoch` (from 1) and `metrics`; a crash leaves the file that was there before."""
    content = {"model": model.state_dict(), "config": plain(config), "epoch": epoch, "metrics": metrics}
    temporary = path.with_name(path.name + ".part")
    with temporary.open("wb") as file:
        torch.save(content, file)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Reads a checkpoint of `save_checkpoint`, tensors on the CPU. Raises UserError where the file is not one."""
    if not path.is_file():
        raise UserError(f"checkpoint {path} does not exist: give the path of a checkpoint_*.pth of a run")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged archive or pickle can fail in every way
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"checkpoint {path} cannot be read ({reason}): it is cut off, or not a checkpoint of this project"
        ) from error
    if not (isinstance(content, dict) and {"model", "config", "epoch", "metrics"} <= content.keys()):
        raise UserError(f"checkpoint {path} is not one of this project: give the path of a checkpoint_*.pth of a run")
    return content


def load_weights(model: nn.Module, state: dict[str, torch.Tensor], path: Path) -> list[str]:
    """Loads towers and temperature strictly; a head that fits is loaded, another one starts afresh.

    Args:
        model: TBPSCLIP, changed in place.
        state: the `model` entry of a checkpoint; heads that the model does not have are left out.
        path: for messages.

    Returns: a line for the log for each head that the checkpoint does not fill.

    Raises UserError naming tensors that are missing, unknown or of another shape; the model is unchanged then.
    """
    wanted = model.state_dict()
    notes, loaded = [], {name: tensor for name, tensor in state.items() if not name.startswith(HEADS)}
    for head in HEADS:
        own = {name: tensor.shape for name, tensor in wanted.items() if name.startswith(head)}
        offered = {name: tensor for name, tensor in state.items() if name.startswith(head)}
        if own == {name: tensor.shape for name, tensor in offered.items()}:
            loaded |= offered
        elif own:
            notes.append(f"{head.removesuffix('.')} starts afresh: {path} holds none of its shape")
            loaded |= {name: wanted[name] for name in own}
    shapes = ({name: tuple(tensor.shape) for name, tensor in tensors.items()} for tensors in (loaded, wanted))
    if problems := misfits(*shapes):
        raise UserError(
            f"checkpoint {path} does not fit the configured model: {first_of(problems)}; give its run's "
            "config.yaml to --config"
        )
    model.load_state_dict(loaded, strict=True)
    return notes
