"""Checkpoints: a dict of tensors and plain values, written whole or not at all, read without running code.

Those of the published TBPS-CLIP code are read too, and come out in the form of ours.
"""

import re
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from misc.config import plain
from misc.errors import DISK_FULL, UserError
from misc.files import whole_file
from model.pretrained import architecture, first_of, misfits

HEADS = ("simclr_projector.", "masked_language_head.", "identity_classifier.")

PUBLISHED_NAMES = (
    ("visual.", "image_encoder."),
    ("encode_text.", "text_encoder."),
    ("simclr_mlp.", "simclr_projector."),
    ("classifier.", "identity_classifier."),
    *(
        (module, f"masked_language_head.{module}")
        for module in ("cross_attn.", "cross_modal_transformer.", "ln_pre_t.", "ln_pre_i.", "ln_post.", "mlm_head.")
    ),
)
"""How names of the published code begin, and ours; `logit_scale` is the same."""


def write_checkpoint(path: Path, content: dict[str, Any]) -> None:
    """Writes `content`; whatever happens meanwhile, `path` is the file that was there before or the whole new one.

    Raises UserError where the disk is full or refuses it otherwise.
    """
    try:
        with whole_file(path) as file:
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
    """Reads a checkpoint of ours or of the published code, tensors on the CPU. No code in the file is run.

    Returns: `model` (tensors by name), `config`, `epoch` (epochs that are done), `metrics` (of the last of them), and
        whatever else was written. Of a published checkpoint, `config` holds the architecture alone, `epoch` is None and
        `metrics` is empty.
    Raises: UserError, naming the file, where it is damaged, incomplete, something else, or would need code to be run.
    """
    if not path.is_file():
        raise UserError(f"checkpoint {path} does not exist: give the path of a checkpoint_*.pth of a run")
    try:
        _check_content(path)
        # The one class in a published checkpoint. A plain dict is put in its place, so that not even its code is run.
        with torch.serialization.safe_globals([(OrderedDict, "easydict.EasyDict")]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UserError(
            f"checkpoint {path} cannot be read ({error.strerror}): see to it, or give another one"
        ) from error
    except Exception as error:  # a damaged archive or pickle can fail in every way
        if wanted := re.search(r"GLOBAL ([\w.]+)", str(error)):
            reason = f"it asks to run {wanted[1]}, and code in a checkpoint is never run"
        else:
            first_line = str(error).splitlines()[0] if str(error) else type(error).__name__
            reason = f"{first_line}; it is cut off, damaged, or not a checkpoint of this project"
        raise UserError(f"checkpoint {path} is refused: {reason}") from error
    if not isinstance(content, dict) or not _is_state(content.get("model")) or not _is_tree(content.get("config")):
        raise UserError(f"checkpoint {path} is not one of this project: give the path of a checkpoint_*.pth of a run")
    return content if content.keys() >= {"epoch", "metrics"} else _from_published(path, content)


def _is_state(value: Any) -> bool:
    """Whether it is tensors by name."""
    return isinstance(value, dict) and all(
        isinstance(name, str) and isinstance(tensor, torch.Tensor) for name, tensor in value.items()
    )


def _is_tree(value: Any) -> bool:
    """Whether it is a configuration with its sections."""
    return isinstance(value, dict) and isinstance(value.get("experiment", {}), dict)


def _check_content(path: Path) -> None:
    """Raises ValueError where a record of the archive is not what was written; torch does not look at the checksums."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if damaged := archive.testzip():
                raise ValueError(f"the checksum of {damaged} is wrong")


def _from_published(path: Path, content: dict[str, Any]) -> dict[str, Any]:
    """A checkpoint of the published code, `{model, optimizer, config}`, in the form of ours."""
    published = content["model"]
    sizes = architecture({name.removeprefix("encode_text."): tuple(t.shape) for name, t in published.items()})
    experiment = plain(content["config"].get("experiment", {}))
    settings = {key: experiment.get(key) for key in ("input_resolution", "text_length")}
    if missing := [key for key, value in (sizes | settings).items() if value is None]:
        raise UserError(f"checkpoint {path} is not one of TBPS-CLIP: it does not tell {first_of(missing)}")
    model = {_our_name(name): tensor for name, tensor in published.items()}
    return {"model": model, "config": {"model": sizes, "experiment": settings}, "epoch": None, "metrics": {}}


def _our_name(published: str) -> str:
    for theirs, ours in PUBLISHED_NAMES:
        if published.startswith(theirs):
            return ours + published.removeprefix(theirs)
    return published


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
