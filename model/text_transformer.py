"""CLIP's text encoder: a causal transformer over byte-pair tokens (Radford et al., 2021)."""

import torch
from torch import Tensor, nn

from model.adaptation import ContextPrompt
from model.architecture import Architecture
from model.transformer import Transformer, project


class TextTransformer(nn.Module):
    """An encoder from token ids to features in the shared space.

    Args:
        architecture: sizes of the model; those of the text encoder are used.
        dropout: dropout probability of attention weights in training (paper: 0.05).
    """

    def __init__(self, architecture: Architecture, *, dropout: float = 0.0):
        super().__init__()
        self.dropout = dropout
        width = architecture.text_width
        self.token_embedding = nn.Embedding(architecture.vocab_size, width)
        self.positional_embedding = nn.Parameter(torch.empty(architecture.text_length, width))
        self.transformer = Transformer(
            width,
            architecture.text_layers,
            architecture.text_heads,
            activation=architecture.activation,
            dropout=dropout,
        )
        self.ln_final = nn.LayerNorm(width)
        self.text_projection = nn.Parameter(torch.empty(width, architecture.embed_dim))
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.positional_embedding, std=0.01)
        nn.init.normal_(self.text_projection, std=width**-0.5)
        self.transformer.initialise()

    def forward(self, token_ids: Tensor, *, all_tokens: bool = False, prompt: ContextPrompt | None = None) -> Tensor:
        """Encodes captions. Tokens after the end-of-text token have no effect, because attention is causal.

        Args:
            token_ids: (B, L) int64, zero-padded, L at most `architecture.text_length`.
            all_tokens: return the output of every token instead of only the end-of-text token.
            prompt: a context to insert in front of each caption, or None.

        Returns: (B, embed_dim), or with `all_tokens` (B, L + context, embed_dim); not L2-normalised.
        """
        context = 0
        if prompt is not None:
            token_ids, context = prompt.truncate(token_ids, len(self.positional_embedding)), len(prompt.context)
        x = self.token_embedding(token_ids)
        if prompt is not None:
            x = prompt.insert(x)
        x = x + self.positional_embedding[: x.shape[1]]
        if all_tokens:
            x = self.transformer(x, causal=True)
        else:
            x = self.transformer.pooled(x, end_positions(token_ids) + context, causal=True)
        return project(x, self.ln_final, self.text_projection)

    def drop_layers(self, numbers: list[int]) -> None:
        """Removes residual blocks, counted from 1. The other blocks are renumbered without gaps."""
        blocks = self.transformer.resblocks
        remaining = [block for number, block in enumerate(blocks, start=1) if number not in numbers]
        self.transformer.resblocks = nn.ModuleList(remaining)

    def freeze_layers(self, numbers: list[int]) -> None:
        """Freezes residual blocks, counted from 1."""
        for number in numbers:
            self.transformer.resblocks[number - 1].requires_grad_(False)


def end_positions(token_ids: Tensor) -> Tensor:
    """Finds the end-of-text token, the highest id of a caption: (B, L) int64 → positions (B,) int64."""
    return token_ids.argmax(dim=-1)


def valid_tokens(token_ids: Tensor) -> Tensor:
    """Marks the tokens that are no padding: (B, L) int64 → (B, L) bool.

    Padding is everything after the end-of-text token. The id 0 is not enough: it is also the token "!".
    """
    positions = torch.arange(token_ids.shape[1], device=token_ids.device)
    return positions <= end_positions(token_ids)[:, None]
