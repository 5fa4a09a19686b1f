"""TBPS-CLIP: CLIP's dual encoder with a temperature and the heads that training needs. Views in, features out.

B samples of this rank, D width of the shared space, L tokens (all captions of a batch are padded to the same), M tokens
picked for masked language modelling.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from model.adaptation import ContextPrompt, ImageAdapter
from model.architecture import Architecture
from model.heads import MaskedLanguageHead, identity_classifier, simclr_projector
from model.text_transformer import TextTransformer, valid_tokens
from model.transformer import Transformer
from model.vision_transformer import VisionTransformer
from text_utils.masking import IGNORED_LABEL

INITIAL_LOGIT_SCALE = math.log(1 / 0.07)
MAXIMUM_SCALE = 100.0


@dataclass
class Views:
    """What one training step encodes; a view that no enabled loss needs is None.

    Attributes:
        image: (B, 3, H, W) float, the first pool view.
        token_ids: (B, L) int64, zero-padded.
        second_image: (B, 3, H, W), the second pool view (MVS-I).
        simclr_images: two times (B, 3, H, W) (SS-I).
        second_token_ids: (B, L) int64, the captions augmented once more (MVS-T).
        simclr_token_ids: two times (B, L) int64 (SS-T).
        masked_token_ids: (B, L) int64, and masked_labels: (B, L) int64, -100 where nothing is predicted (MLM).
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
    """All that the losses need; no feature is L2-normalised.

    Attributes:
        image, text: (B, D).
        scale: 0-dim, exp of the temperature parameter, at most 100.
        second_image: (B, D) (MVS-I), and second_text: (B, D) (MVS-T).
        simclr: two times (B, D), behind the projector (SS-I), and simclr_text: two times (B, D), behind its own (SS-T).
        masked_logits: (M, vocabulary) (MLM).
        identity_logits: image's and text's (B, identities) (ID).
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


class TBPSCLIP(nn.Module):
    """The dual encoder with the heads of the losses that are on.

    Args:
        architecture: sizes of the two encoders.
        dropout: of the attention weights in the text encoder.
        lock_bottom: freezes the patch-embedding convolution (paper's trick "locked bottom layer").
        grad_checkpointing: computes every transformer block once more in the backward pass instead of keeping it.
        simclr_widths: layer widths of the SimCLR projector, or None without SS-I.
        text_simclr_widths: the same of the captions' projector, or None without SS-T.
        masked_language_depth: layers of the masked-language head, or None without MLM.
        identities: classes of the identity classifier, or None without ID.
        context_length: learned vectors in front of each caption (CoOp), or None; then they alone train.
        adapter_ratio: share of the image feature that an adapter makes (CLIP-Adapter), or None; then that alone trains.
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
        if adaptations := [module for module in (self.prompt, self.image_adapter) if module is not None]:
            self.requires_grad_(False)
            for module in adaptations:
                module.requires_grad_(True)
        for module in self.modules():
            if isinstance(module, Transformer):
                module.grad_checkpointing = grad_checkpointing

    def encode_image(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) normalised pixels → (B, D), not L2-normalised."""
        features = self.image_encoder(images)
        return features if self.image_adapter is None else self.image_adapter(features)

    def encode_text(self, token_ids: Tensor) -> Tensor:
        """(B, L) int64, zero-padded → (B, D), not L2-normalised."""
        return self.text_encoder(token_ids, prompt=self.prompt)

    def scale(self) -> Tensor:
        """exp of the temperature parameter, never above 100. The gradient passes through the bound, so that the
        parameter can come back from beyond it."""
        scale = self.logit_scale.exp()
        return scale - (scale - MAXIMUM_SCALE).clamp(min=0).detach()

    def forward(self, views: Views) -> Features:
        """Encodes all views of a batch: one pass over the images, one over the captions."""
        batch = len(views.image)
        masked = views.masked_token_ids is not None
        image_views = _present(views.image, views.second_image, *(views.simclr_images or ()))
        text_views = _present(views.token_ids, views.second_token_ids, *(views.simclr_token_ids or ()))
        if masked:  # the one loss that looks at every token
            encoded = self.image_encoder(torch.cat(image_views), all_tokens=True)
            of_images = encoded[:, 0] if self.image_adapter is None else self.image_adapter(encoded[:, 0])
        else:
            of_images = self.encode_image(torch.cat(image_views))
        image_features = list(of_images.split(batch))
        text_features = list(self.encode_text(torch.cat(text_views)).split(batch))

        features = Features(image=image_features.pop(0), text=text_features.pop(0), scale=self.scale())
        if views.second_image is not None:
            features.second_image = image_features.pop(0)
        if views.second_token_ids is not None:
            features.second_text = text_features.pop(0)
        if views.simclr_images is not None:
            features.simclr = tuple(self.simclr_projector(torch.cat(image_features)).split(batch))
        if views.simclr_token_ids is not None:
            features.simclr_text = tuple(self.text_simclr_projector(torch.cat(text_features)).split(batch))
        if masked:
            features.masked_logits = self.masked_language_head(
                self.text_encoder(views.masked_token_ids, all_tokens=True),
                encoded[:batch],
                valid=valid_tokens(views.masked_token_ids),
                picked=views.masked_labels != IGNORED_LABEL,
            )
        if self.identity_classifier is not None:
            features.identity_logits = (
                self.identity_classifier(features.image),
                self.identity_classifier(features.text),
            )
        return features


def _present(*views: Tensor | None) -> list[Tensor]:
    return [view for view in views if view is not None]


def count_trainable(model: nn.Module) -> int:
    """Number of parameters that train."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)
