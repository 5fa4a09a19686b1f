"""Checkpoints: a dict of tensors and plain values, written completely or not at all, and read without running code.

This file reads checkpoints to resume from. `model/pretrained/` reads weights of any form, to start from or to evaluate.
"""

from pathlib import Path
from typing import Any

import torch

from misc.errors import DISK_FULL, UserError
from misc.files import atomic_file, exists
from model.pretrained.archives import open_archive


def write_checkpoint(path: Path, content: dict[str, Any]) -> None:
    """Writes a checkpoint. After an error, `path` is still the old file.

    Raises UserError if the disk is full or the file cannot be written for another reason.
    """
    try:
        with atomic_file(path) as file:
            torch.save(content, file)
    except (OSError, RuntimeError) as error:
        reason = error if isinstance(error, OSError) else error.__context__  # torch raises its own error
        if not isinstance(reason, OSError):
            raise
        remedy = "free some space" if reason.errno in DISK_FULL else "fix this"
        raise UserError(
            f"checkpoint {path} cannot be written ({reason.strerror}): {remedy}, then continue with --resume; "
            + ("the previous checkpoint is still there" if exists(path) else "there is no previous checkpoint")
        ) from error


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Reads a checkpoint of a run, tensors on the CPU. No code in the file is run.

    Returns: `model` (tensors by name), `config`, and the other values that were written: `epoch` (number of finished
        epochs), `metrics` (of the last one), …
    Raises UserError if the file is damaged, incomplete or not a checkpoint, or if it needs code to be run.
    """
    try:
        _, content = open_archive(path)
    except UserError as error:
        raise UserError(f"checkpoint {path} is refused: {error}") from error
    if not isinstance(content, dict) or not _is_state(content.get("model")) or not _is_tree(content.get("config")):
        raise UserError(f"{path} is not a checkpoint of this project: give the checkpoint_*.pth of a run")
    return content


def _is_state(value: Any) -> bool:
    """Whether a value is a dict of tensors by name."""
    return isinstance(value, dict) and all(
        isinstance(name, str) and isinstance(tensor, torch.Tensor) for name, tensor in value.items()
    )


def _is_tree(value: Any) -> bool:
    """Whether a value is a configuration with its sections."""
    return isinstance(value, dict) and isinstance(value.get("experiment", {}), dict)
