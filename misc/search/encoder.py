"""A checkpoint as two functions: pictures to features, descriptions to features.

B pictures or descriptions, D width of the shared space.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from misc.build import model as build
from misc.config import loading as config
from misc.data.samples import pad_tokens
from misc.data.views import EvaluationView
from misc.errors import UserError
from misc.system.distributed import Processes
from misc.system.precision import Precision
from model.tbps_clip import TBPSCLIP
from text_utils.tokenizer import Tokenizer

ALLOWED = ("model.activation=", "model.vision_heads=", "model.text_heads=", "experiment.input_resolution=")
"""What some weights do not tell of themselves, so that it is given."""


@dataclass(frozen=True)
class Encoder:
    """Both towers of a CLIP, ready to encode. Features are float32, L2-normalised, on the CPU.

    Attributes:
        view: how a picture becomes pixels.
        fingerprint: the same for what encodes to the same features, whatever file it comes from.
    """

    model: TBPSCLIP
    tokenizer: Tokenizer
    text_length: int
    view: EvaluationView
    device: torch.device
    precision: Precision
    fingerprint: str

    @property
    def width(self) -> int:
        """D."""
        return self.model.embed_dim

    def encode_pictures(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) of `view` → (B, D)."""
        return self._encode(self.model.encode_image, pixels)

    def encode_descriptions(self, descriptions: Sequence[str]) -> Tensor:
        """B descriptions → (B, D); what goes beyond the length of the text encoder is cut off."""
        ids = pad_tokens([self.tokenizer.encode(description, self.text_length) for description in descriptions])
        return self._encode(self.model.encode_text, ids)

    @torch.inference_mode()
    def _encode(self, encode: Any, batch: Tensor) -> Tensor:
        with self.precision.autocast():
            features = encode(batch.to(self.device))
        return F.normalize(features.float(), dim=1).cpu()


def load_encoder(source: str, overrides: Sequence[str], device: torch.device) -> Encoder:
    """The encoder of weights in any form that `model.checkpoint` takes.

    Args:
        overrides: `key=value` of the configuration, for what the weights do not tell.

    Raises UserError for weights that cannot be read, and for overrides that have no part in it.
    """
    if others := [override for override in overrides if not override.startswith(ALLOWED)]:
        raise UserError(f"{others[0]} has no part in a search: {', '.join(ALLOWED)} may be given")
    weights = build.weights_of(source, Processes(0, 1, device))
    model, saved, _ = build.build_saved_model(config.load_config(overrides=tuple(overrides)), weights)
    preprocessing = weights.preprocessing
    # Whole people are looked for: no picture is cut to a square, even for weights that were trained on such.
    view = EvaluationView(config.resolution(saved), mean=preprocessing.mean, deviation=preprocessing.deviation)
    architecture = {key: saved.model[key] for key in config.ARCHITECTURE_KEYS}
    return Encoder(
        model=model.to(device).eval(),
        tokenizer=Tokenizer(),
        text_length=saved.experiment.text_length,
        view=view,
        device=device,
        precision=Precision.choose("auto", device),
        fingerprint=_fingerprint(weights.state | weights.heads, repr((architecture, vars(view), preprocessing))),
    )


def _fingerprint(tensors: dict[str, Tensor], settings: str) -> str:
    digest = hashlib.sha256(settings.encode())
    for name in sorted(tensors):
        digest.update(f"{name} {tuple(tensors[name].shape)}".encode())
        digest.update(tensors[name].contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
