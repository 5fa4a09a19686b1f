"""TBPS-CLIP: CLIP's two encoders, the temperature, and the heads that training needs. Views in, features out.

B samples of this rank, D width of the shared space, L tokens (all captions of a batch are padded to one length),
M tokens picked for masked language modelling.
"""

import math
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

from model.adaptation import ContextPrompt, ImageAdapter
from model.architecture import Architecture
from model.heads import MaskedLanguageHead, identity_classifier, simclr_projector
from model.text_transformer import TextTransformer, valid_tokens
from model.transformer import Transformer
from model.vision_transformer import VisionTransformer
from text_utils.masking import IGNORED_LABEL

Part = TypeVar("Part")

INITIAL_LOGIT_SCALE = math.log(1 / 0.07)
MAXIMUM_SCALE = 100.0


@dataclass
class Views:
    """The inputs of one training step; a view that no enabled loss needs is None.

    Attributes:
        image: (B, 3, H, W) float, the first augmented image.
        token_ids: (B, L) int64, zero-padded.
        second_image: (B, 3, H, W) float, the second augmented image (MVS-I).
        simclr_images: two tensors (B, 3, H, W) float (SS-I).
        second_token_ids: (B, L) int64, the captions with a second augmentation (MVS-T).
        simclr_token_ids: two tensors (B, L) int64 (SS-T).
        masked_token_ids: (B, L) int64, the captions with masked tokens (MLM).
        masked_labels: (B, L) int64, -100 for tokens that are not predicted (MLM).
    """

    image: Tensor
    token_ids: Tensor
    second_image: Tensor | None = None
    simclr_images: tuple[Tensor, Tensor] | None = None
    second_token_ids: Tensor | None = None
    simclr_token_ids: tuple[Tensor, Tensor] | None = None
    masked_token_ids: Tensor | None = None
    masked_labels: Tensor | None = None


@dataclass
class Features:
    """The inputs of the losses; no feature is L2-normalised.

    Attributes:
        image, text: (B, D).
        scale: 0-dim, exp of the temperature parameter, at most 100.
        second_image, second_text: (B, D) (MVS-I, MVS-T).
        simclr, simclr_text: two tensors (B, D) each, outputs of the SimCLR projectors (SS-I, SS-T).
        masked_logits: (M, vocabulary) (MLM).
        identity_logits: (B, identities) for the image, and for the text (ID).
        soft_label_texts: the captions of N-ITC, encoded again with other dropout and without gradient, for its soft
            labels: (B, D) each, in the order text, second_text. None if that would equal `text` and `second_text`.
    """

    image: Tensor
    text: Tensor
    scale: Tensor
    second_image: Tensor | None = None
    second_text: Tensor | None = None
    simclr: tuple[Tensor, Tensor] | None = None
    simclr_text: tuple[Tensor, Tensor] | None = None
    masked_logits: Tensor | None = None
    identity_logits: tuple[Tensor, Tensor] | None = None
    soft_label_texts: tuple[Tensor, ...] | None = None


class TBPSCLIP(nn.Module):
    """The two encoders with the heads of the losses that are on.

    Args:
        architecture: sizes of the two encoders.
        dropout: dropout probability of the attention weights in the text encoder.
        lock_bottom: freezes the patch-embedding convolution (the paper's trick "locked bottom layer").
        grad_checkpointing: recomputes every transformer block in the backward pass instead of storing its activations.
        simclr_widths: layer widths of the SimCLR projector, or None without SS-I.
        text_simclr_widths: layer widths of the SimCLR projector for captions, or None without SS-T.
        masked_language_depth: layers of the masked-language head, or None without MLM.
        identities: classes of the identity classifier, or None without ID.
        context_length: number of learned context vectors (CoOp), or None. With a context, only adaptations train.
        adapter_ratio: share of the adapter in the image feature (CLIP-Adapter), or None. With an adapter, only
            adaptations train.
    """

    def __init__(
        self,
        architecture: Architecture,
        *,
        dropout: float = 0.0,
        lock_bottom: bool = True,
        grad_checkpointing: bool = False,
        simclr_widths: list[int] | None = None,
        text_simclr_widths: list[int] | None = None,
        masked_language_depth: int | None = None,
        identities: int | None = None,
        context_length: int | None = None,
        adapter_ratio: float | None = None,
    ):
        super().__init__()
        embed_dim = architecture.embed_dim
        self.embed_dim = embed_dim
        self.image_encoder = VisionTransformer(architecture)
        self.text_encoder = TextTransformer(architecture, dropout=dropout)
        self.logit_scale = nn.Parameter(torch.tensor(INITIAL_LOGIT_SCALE))
        self.simclr_projector = simclr_projector(simclr_widths) if simclr_widths else None
        self.text_simclr_projector = simclr_projector(text_simclr_widths) if text_simclr_widths else None
        self.masked_language_head = (
            MaskedLanguageHead(width=embed_dim, depth=masked_language_depth, vocab_size=architecture.vocab_size)
            if masked_language_depth
            else None
        )
        self.identity_classifier = identity_classifier(embed_dim, identities) if identities else None
        self.prompt = ContextPrompt(context_length, architecture.text_width) if context_length else None
        self.image_adapter = None if adapter_ratio is None else ImageAdapter(embed_dim, adapter_ratio)
        self.image_encoder.conv1.requires_grad_(not lock_bottom)
        adaptations = [adaptation for adaptation in (self.prompt, self.image_adapter) if adaptation is not None]
        if adaptations:
            self.requires_grad_(False)
            for adaptation in adaptations:
                adaptation.requires_grad_(True)
        for module in self.modules():
            if isinstance(module, Transformer):
                module.grad_checkpointing = grad_checkpointing

    def compile_blocks(self) -> None:
        """Compiles the transformer blocks for training (`Transformer.compile_blocks`)."""
        for module in self.modules():
            if isinstance(module, Transformer):
                module.compile_blocks()

    def encode_image(self, images: Tensor) -> Tensor:
        """Encodes images: (B, 3, H, W) normalised pixels → (B, D), not L2-normalised."""
        features = self.image_encoder(images)
        return features if self.image_adapter is None else self.image_adapter(features)

    def encode_text(self, token_ids: Tensor) -> Tensor:
        """Encodes captions: (B, L) int64, zero-padded → (B, D), not L2-normalised."""
        return self.text_encoder(token_ids, prompt=self.prompt)

    def scale(self) -> Tensor:
        """Returns exp of the temperature parameter, at most 100: 0-dim.

        The gradient passes through the bound, so a parameter beyond it can decrease again.
        """
        scale = self.logit_scale.exp()
        return scale - (scale - MAXIMUM_SCALE).clamp(min=0).detach()

    def forward(self, views: Views, *, soft_labels: bool = False) -> Features:
        """Encodes all views of a batch, in one pass over the images and one over the captions.

        Args:
            views: the views that the losses need.
            soft_labels: also compute `Features.soft_label_texts`. Images have no dropout and are not encoded again.
        """
        batch = len(views.image)
        masked_token_ids = views.masked_token_ids
        image_views = _present(views.image, views.second_image, *(views.simclr_images or ()))
        text_views = _present(views.token_ids, views.second_token_ids, *(views.simclr_token_ids or ()))
        if masked_token_ids is not None:  # only MLM needs the features of all tokens
            encoded = self.image_encoder(torch.cat(image_views), all_tokens=True)
            image_rows = encoded[:, 0] if self.image_adapter is None else self.image_adapter(encoded[:, 0])
        else:
            image_rows = self.encode_image(torch.cat(image_views))
        image_features = list(image_rows.split(batch))
        text_features = list(self.encode_text(torch.cat(text_views)).split(batch))

        features = Features(image=image_features.pop(0), text=text_features.pop(0), scale=self.scale())
        if views.second_image is not None:
            features.second_image = image_features.pop(0)
        if views.second_token_ids is not None:
            features.second_text = text_features.pop(0)
        if views.simclr_images is not None:
            features.simclr = tuple(needed(self.simclr_projector)(torch.cat(image_features)).split(batch))
        if views.simclr_token_ids is not None:
            features.simclr_text = tuple(needed(self.text_simclr_projector)(torch.cat(text_features)).split(batch))
        if masked_token_ids is not None:
            features.masked_logits = needed(self.masked_language_head)(
                self.text_encoder(masked_token_ids, all_tokens=True),
                encoded[:batch],
                valid=valid_tokens(masked_token_ids),
                picked=views.masked_labels != IGNORED_LABEL,
            )
        if self.identity_classifier is not None:
            features.identity_logits = (
                self.identity_classifier(features.image),
                self.identity_classifier(features.text),
            )
        if soft_labels and self.training and self.text_encoder.dropout > 0:
            captions = _present(views.token_ids, views.second_token_ids)
            with torch.no_grad():
                features.soft_label_texts = self.encode_text(torch.cat(captions)).split(batch)
        return features


def needed(part: Part | None) -> Part:
    """Returns a view, a feature or a head that an enabled loss needs, and that is therefore there."""
    assert part is not None
    return part


def _present(*views: Tensor | None) -> list[Tensor]:
    return [view for view in views if view is not None]


def count_trainable(model: nn.Module) -> int:
    """Counts the parameters that train."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)
