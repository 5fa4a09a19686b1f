"""Few-shot ways to adapt a frozen CLIP: CoOp's learned context (Zhou et al., 2022) and CLIP-Adapter (Gao et al., 2021).

B samples, L tokens, C context vectors, W width of the text encoder, D width of the shared space.
"""

import torch
from torch import Tensor, nn

ADAPTER_REDUCTION = 4
"""How many times narrower the adapter is in its middle than at its ends."""


class ContextPrompt(nn.Module):
    """CoOp: vectors that are learned, between a caption's start token and its first word.

    Args:
        length: C.
        width: W.
    """

    def __init__(self, length: int, width: int):
        super().__init__()
        self.context = nn.Parameter(torch.empty(length, width))
        nn.init.normal_(self.context, std=0.02)

    def room(self, token_ids: Tensor, text_length: int) -> Tensor:
        """Captions cut to what fits beside the context, the end-of-text token kept.

        Args:
            token_ids: (B, L) int64, zero-padded; the end-of-text token has the highest id.
            text_length: longest sequence of the text encoder.

        Returns: (B, L') int64, L' at most text_length - C.
        """
        longest = text_length - len(self.context)
        if token_ids.shape[1] <= longest:
            return token_ids
        end, cut = token_ids.max(dim=1), token_ids[:, :longest]
        whole = end.indices < longest
        last = torch.where(whole, cut[:, -1], end.values)
        return torch.cat([cut[:, :-1], last[:, None]], dim=1)

    def insert(self, embedded: Tensor) -> Tensor:
        """(B, L, W) token embeddings → (B, L + C, W), the context behind the first."""
        context = self.context.to(embedded.dtype).expand(embedded.shape[0], -1, -1)
        return torch.cat([embedded[:, :1], context, embedded[:, 1:]], dim=1)


class ImageAdapter(nn.Module):
    """CLIP-Adapter: ratio · MLP(f) + (1 - ratio) · f on the image feature.

    Args:
        width: D.
        ratio: share of what is learned (paper: 0.4).
    """

    def __init__(self, width: int, ratio: float):
        super().__init__()
        self.register_buffer("ratio", torch.tensor(ratio))  # goes into checkpoints: features depend on it
        narrow = max(1, width // ADAPTER_REDUCTION)
        self.mlp = nn.Sequential(
            nn.Linear(width, narrow, bias=False), nn.ReLU(), nn.Linear(narrow, width, bias=False), nn.ReLU()
        )

    def forward(self, features: Tensor) -> Tensor:
        """(B, D) → (B, D)."""
        return self.ratio * self.mlp(features) + (1 - self.ratio) * features
