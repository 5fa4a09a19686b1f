"""The encoder of a checkpoint: pictures and descriptions to features.

B pictures or descriptions, D width of the shared space.
"""

import hashlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from misc.builders.architecture import architecture_of
from misc.builders.model import build_saved_model, read_any_weights
from misc.builders.preprocessing import preprocessing_of
from misc.config.loading import load_config
from misc.config.rules import ENCODER_KEYS, RULES
from misc.data.batches import pad_tokens
from misc.data.views import EvaluationView
from misc.errors import UserError
from misc.system.distributed import Ranks
from misc.system.precision import Precision
from model.architecture import Architecture
from model.preprocessing import Preprocessing
from model.tbps_clip import TBPSCLIP
from text_utils.cleaning import clean_caption
from text_utils.tokenizer import Tokenizer


@dataclass(frozen=True)
class Encoder:
    """Both encoders of a CLIP. Features are float32, L2-normalised, on the CPU.

    Attributes:
        view: converts a picture to pixels.
        clean_captions: whether descriptions are cleaned before they are tokenized.
        fingerprint: a hash of the weights and settings; it is equal for the same encoder read from another file.
        notes: lines for the user: the weights, their architecture and preprocessing.
    """

    model: TBPSCLIP
    tokenizer: Tokenizer
    text_length: int
    view: EvaluationView
    clean_captions: bool
    device: torch.device
    precision: Precision
    fingerprint: str
    notes: list[str]

    @property
    def width(self) -> int:
        """The width of the shared space, D."""
        return self.model.embed_dim

    def encode_pictures(self, pixels: Tensor) -> Tensor:
        """Encodes pixels (B, 3, H, W), as `view` returns them, to features (B, D)."""
        return self._encode(self.model.encode_image, pixels)

    def encode_descriptions(self, descriptions: Sequence[str]) -> Tensor:
        """Encodes B descriptions to features (B, D); longer descriptions are truncated to `text_length` tokens."""
        ids = pad_tokens([self._tokens(description, self.text_length) for description in descriptions])
        return self._encode(self.model.encode_text, ids)

    def read_part(self, description: str) -> str | None:
        """Returns the part of a description that is not truncated, or None if that is all of it."""
        ids = self._tokens(description, sys.maxsize)
        return self.tokenizer.decode(ids[1 : self.text_length - 1]) if len(ids) > self.text_length else None

    def _tokens(self, description: str, length: int) -> list[int]:
        cleaned = clean_caption(description, max_words=sys.maxsize) if self.clean_captions else description
        return self.tokenizer.encode(cleaned, length)

    @torch.inference_mode()
    def _encode(self, encode: Any, batch: Tensor) -> Tensor:
        with self.precision.autocast():
            features = encode(batch.to(self.device))
        return F.normalize(features.float(), dim=1).cpu()


def load_encoder(source: str, overrides: Sequence[str], device: torch.device) -> Encoder:
    """Loads the encoder from weights in any form that `model.checkpoint` accepts.

    Args:
        overrides: `key=value` of the configuration, for settings that the weights file does not record.

    Raises UserError if the weights cannot be read, or an override has no effect on a search.
    """
    allowed = [key for key, rule in RULES.items() if rule.for_search]
    if others := [override for override in overrides if override.partition("=")[0] not in allowed]:
        raise UserError(f"{others[0]} has no effect on a search: only {', '.join(allowed)} can be set")
    weights = read_any_weights(source, Ranks(0, 1, device))
    model, saved, notes = build_saved_model(load_config(overrides=tuple(overrides)), weights)
    architecture, preprocessing = architecture_of(saved), preprocessing_of(saved, weights.preprocessing)
    view = EvaluationView(architecture.resolution, preprocessing)
    return Encoder(
        model=model.to(device).eval(),
        tokenizer=Tokenizer(),
        text_length=architecture.text_length,
        view=view,
        clean_captions=preprocessing.clean_captions,
        device=device,
        precision=Precision.choose("auto", device),
        fingerprint=_fingerprint(weights.state | weights.heads, _settings(architecture, preprocessing)),
        notes=notes,
    )


def _settings(architecture: Architecture, preprocessing: Preprocessing) -> str:
    """Returns what decides the features of pictures, besides the weights.

    These words are part of every index: if they change, all pictures are encoded again.
    """
    sizes = {key: getattr(architecture, key) for key in ENCODER_KEYS}
    mean, deviation, interpolation = preprocessing.mean, preprocessing.deviation, preprocessing.interpolation
    view: dict[str, Any] = {"resolution": list(architecture.resolution), "mean": mean, "deviation": deviation}
    if interpolation != "bicubic":  # earlier versions resized all pictures in this way
        view["interpolation"] = interpolation
    recorded = (
        f"Preprocessing(mean={mean}, deviation={deviation}, squash={preprocessing.squash}, "
        f"interpolation={interpolation!r})"
    )
    return f"({sizes}, {view}, {recorded})"


def _fingerprint(tensors: dict[str, Tensor], settings: str) -> str:
    """Returns the SHA-256 of the settings and of all tensors with their names and shapes, in hexadecimal."""
    digest = hashlib.sha256(settings.encode())
    for name in sorted(tensors):
        digest.update(f"{name} {tuple(tensors[name].shape)}".encode())
        content = tensors[name].contiguous().reshape(-1).view(torch.uint8).numpy()
        digest.update(content)  # type: ignore[arg-type]  # numpy's stub declares the buffer for Python 3.12 and later
    return digest.hexdigest()
