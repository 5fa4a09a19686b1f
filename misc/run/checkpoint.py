"""Checkpoints: a dict of tensors and plain values, written whole or not at all, read without running code.

Read here is what a run goes on from; weights to start from or to evaluate come in any form (`model/pretrained/`).
"""

from pathlib import Path
from typing import Any

import torch

from misc.errors import DISK_FULL, UserError
from misc.files import atomic_file
from model.pretrained.archives import open_archive


def write_checkpoint(path: Path, content: dict[str, Any]) -> None:
    """Writes `content`; whatever happens meanwhile, `path` is the file that was there before or the whole new one.

    Raises UserError where the disk is full or refuses it otherwise.
    """
    try:
        with atomic_file(path) as file:
            torch.save(content, file)
    except (OSError, RuntimeError) as error:
        reason = error if isinstance(error, OSError) else error.__context__  # torch tells its own trouble after a write
        if not isinstance(reason, OSError):
            raise
        remedy = "free some space" if reason.errno in DISK_FULL else "see to it"
        raise UserError(
            f"checkpoint {path} cannot be written ({reason.strerror}): {remedy}, then go on with --resume; "
            + ("the one that was saved before is whole" if path.exists() else "nothing was saved before")
        ) from error


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Reads a checkpoint of a run, tensors on the CPU. No code in the file is run.

    Returns: `model` (tensors by name), `config`, and whatever else was written: `epoch` (epochs that are done),
        `metrics` (of the last of them), …
    Raises: UserError, naming the file, where it is damaged, incomplete, something else, or would need code to be run.
    """
    try:
        _, content = open_archive(path)
    except UserError as error:
        raise UserError(f"checkpoint {path} is refused: {error}") from error
    if not isinstance(content, dict) or not _is_state(content.get("model")) or not _is_tree(content.get("config")):
        raise UserError(f"checkpoint {path} is not one of this project: give the path of a checkpoint_*.pth of a run")
    return content


def _is_state(value: Any) -> bool:
    """Whether it is tensors by name."""
    return isinstance(value, dict) and all(
        isinstance(name, str) and isinstance(tensor, torch.Tensor) for name, tensor in value.items()
    )


def _is_tree(value: Any) -> bool:
    """Whether it is a configuration with its sections."""
    return isinstance(value, dict) and isinstance(value.get("experiment", {}), dict)
