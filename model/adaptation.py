"""Few-shot adaptation of a frozen CLIP: CoOp's learned context (Zhou et al., 2022) and CLIP-Adapter (Gao et al., 2021).

B samples, L tokens, C context vectors, W width of the text encoder, D width of the shared space.
"""

import torch
from torch import Tensor, nn

ADAPTER_REDUCTION = 4
"""Width of the adapter at its input and output, divided by its width in the middle."""


class ContextPrompt(nn.Module):
    """CoOp's context: learned vectors between the start token and the first word of a caption.

    Args:
        length: number of context vectors, C.
        width: width of the text encoder, W.
    """

    def __init__(self, length: int, width: int):
        super().__init__()
        self.context = nn.Parameter(torch.empty(length, width))
        nn.init.normal_(self.context, std=0.02)

    def truncate(self, token_ids: Tensor, text_length: int) -> Tensor:
        """Truncates captions so that the context fits too, and keeps the end-of-text token.

        Args:
            token_ids: (B, L) int64, zero-padded; the end-of-text token has the highest id.
            text_length: length of the longest sequence that the text encoder accepts.

        Returns: (B, L') int64, L' at most text_length - C.
        """
        longest = text_length - len(self.context)
        if token_ids.shape[1] <= longest:
            return token_ids
        end, cut = token_ids.max(dim=1), token_ids[:, :longest]
        fits = end.indices < longest
        last = torch.where(fits, cut[:, -1], end.values)
        return torch.cat([cut[:, :-1], last[:, None]], dim=1)

    def insert(self, embedded: Tensor) -> Tensor:
        """Inserts the context after the first token: (B, L, W) token embeddings → (B, L + C, W)."""
        context = self.context.to(embedded.dtype).expand(embedded.shape[0], -1, -1)
        return torch.cat([embedded[:, :1], context, embedded[:, 1:]], dim=1)


class ImageAdapter(nn.Module):
    """CLIP-Adapter: computes ratio · MLP(f) + (1 - ratio) · f from the image feature f.

    Args:
        width: width of the shared space, D.
        ratio: share of the MLP in the result (paper: 0.4).
    """

    ratio: Tensor

    def __init__(self, width: int, ratio: float):
        super().__init__()
        self.register_buffer("ratio", torch.tensor(ratio))  # saved in checkpoints, because the features depend on it
        narrow = max(1, width // ADAPTER_REDUCTION)
        self.mlp = nn.Sequential(
            nn.Linear(width, narrow, bias=False), nn.ReLU(), nn.Linear(narrow, width, bias=False), nn.ReLU()
        )

    def forward(self, features: Tensor) -> Tensor:
        """Adapts image features: (B, D) → (B, D)."""
        return self.ratio * self.mlp(features) + (1 - self.ratio) * features
