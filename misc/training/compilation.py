"""Compiled training (`misc.compile`): compiles the transformer blocks, and keeps the number of shapes small."""

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor

from misc.errors import UserError
from model.tbps_clip import TBPSCLIP, Views
from text_utils.masking import IGNORED_LABEL

CAPTION_MULTIPLE = 8
"""Captions are padded to a multiple of this length, because each length is compiled separately."""
SHAPES = 64
"""The number of shapes that torch may compile; beyond its default of 8, it would silently stop compiling. There are at
most ten lengths of captions, each with and without gradients, and as many again for the last chunk of a batch."""


def compile_model(model: TBPSCLIP, device: torch.device) -> None:
    """Compiles the transformer blocks of a model for training. It happens at the first step of each shape.

    Raises UserError if torch cannot compile on this machine.
    """
    settings = torch._dynamo.config  # torch imports it now, which takes seconds
    limit = "recompile_limit" if hasattr(settings, "recompile_limit") else "cache_size_limit"  # before torch 2.6
    setattr(settings, limit, max(SHAPES, getattr(settings, limit)))
    try:
        torch.compile(torch.sin)(torch.zeros(2, device=device))
    except Exception as error:  # torch documents no type; usually a compiler, Triton or Python's headers are missing
        raise UserError(
            f"misc.compile: torch cannot compile on this machine ({str(error).partition(chr(10))[0]}): install a C++ "
            "compiler, or set misc.compile=false"
        ) from error
    model.compile_blocks()


def pad_captions(views: Views, multiple: int, longest: int) -> Views:
    """Pads the captions to a multiple of tokens, at most `longest`. This changes no feature and no loss.

    Args:
        views: captions (B, L) int64, zero-padded.
        multiple: 1 changes nothing.
        longest: the longest caption that the text encoder accepts.
    """

    def pad(ids: Tensor, padding: int = 0) -> Tensor:
        tokens = ids.shape[1]
        more = min(-tokens % multiple, longest - tokens)
        return F.pad(ids, (0, more), value=padding) if more > 0 else ids

    pair, second, masked = views.simclr_token_ids, views.second_token_ids, views.masked_token_ids
    return dataclasses.replace(
        views,
        token_ids=pad(views.token_ids),
        second_token_ids=None if second is None else pad(second),
        simclr_token_ids=None if pair is None else (pad(pair[0]), pad(pair[1])),
        masked_token_ids=None if masked is None else pad(masked),
        masked_labels=None if views.masked_labels is None else pad(views.masked_labels, IGNORED_LABEL),
    )
