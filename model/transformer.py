"""The transformer of both encoders and of the masked-language head: pre-norm blocks, as in CLIP.

N sequences, L tokens, P tokens of the context, D width, H heads. Parameter names are OpenAI's, so CLIP's weights fit
unchanged.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from model.architecture import GELU, QUICK_GELU


class QuickGELU(nn.Module):
    """The activation of OpenAI's weights: x · sigmoid(1.702 x). It differs from torch's GELU."""

    def forward(self, x: Tensor) -> Tensor:
        # A compiler fuses the formula itself; that of torch 2.4 cannot split a graph with such a function over ranks.
        if x.requires_grad and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            return _QuickGELUWithGradient.apply(x)
        return F.silu(1.702 * x) / 1.702


class _QuickGELUWithGradient(torch.autograd.Function):
    """QuickGELU as silu(1.702 x) / 1.702, whose derivative is silu'(1.702 x).

    Autograd would keep two tensors for x · sigmoid(1.702 x) and would multiply and divide the gradient by 1.702. This
    keeps one, and its backward pass is one kernel.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        scaled = 1.702 * x
        ctx.save_for_backward(scaled)
        return F.silu(scaled).div_(1.702)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (scaled,) = ctx.saved_tensors
        return torch.ops.aten.silu_backward(gradients[0], scaled)


ACTIVATIONS = {QUICK_GELU: QuickGELU, GELU: nn.GELU}


def to_float32(x: Tensor) -> Tensor:
    """Converts bf16 and half precision to float32; wider formats stay as they are."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def project(x: Tensor, norm: nn.LayerNorm, projection: Tensor) -> Tensor:
    """Applies the last layers of an encoder: the final norm, then the projection (D, embed_dim) into the shared space.

    Computes in float32 even under autocast: the rounding of bf16 is larger than the difference of nearly equal cosines.
    """
    with torch.autocast(x.device.type, enabled=False):
        return norm(to_float32(x)) @ projection


class Attention(nn.Module):
    """Multi-head attention. The three input projections are one matrix, as in CLIP's weights.

    Args:
        width: D, a multiple of `heads`.
        heads: H.
        dropout: dropout probability of attention weights in training.
    """

    def __init__(self, width: int, heads: int, dropout: float = 0.0):
        super().__init__()
        self.heads = heads
        self.dropout = dropout
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.zeros_(self.out_proj.bias)

    def forward(self, x: Tensor, *, causal: bool = False, valid: Tensor | None = None) -> Tensor:
        """Computes self-attention.

        Args:
            x: (N, L, D).
            causal: a token attends only to itself and to earlier tokens.
            valid: (N, L) bool, False for padding, which no token attends to.

        Returns: (N, L, D).
        """
        query, key, value = F.linear(x, self.in_proj_weight, self.in_proj_bias).chunk(3, dim=-1)
        return self._attend(query, key, value, causal=causal, valid=valid)

    def cross(self, x: Tensor, context: Tensor, *, valid: Tensor | None = None) -> Tensor:
        """Computes cross-attention from x to the context.

        Args:
            x: (N, L, D).
            context: (N, P, D).
            valid: (N, P) bool, False for context tokens that no token attends to.

        Returns: (N, L, D).
        """
        width = x.shape[-1]
        query = F.linear(x, self.in_proj_weight[:width], self.in_proj_bias[:width])
        key, value = F.linear(context, self.in_proj_weight[width:], self.in_proj_bias[width:]).chunk(2, dim=-1)
        return self._attend(query, key, value, causal=False, valid=valid)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, *, causal: bool, valid: Tensor | None) -> Tensor:
        query, key, value = (
            t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (query, key, value)
        )  # (N, H, L, D/H)
        attended = F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=None if valid is None else valid[:, None, None, :],
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=causal,
        )
        return self.out_proj(attended.transpose(1, 2).flatten(2))  # (N, L, D)


class ResidualBlock(nn.Module):
    """A residual block: x + attention(norm(x)), then x + MLP(norm(x)). The MLP is four times as wide as x."""

    def __init__(self, width: int, heads: int, dropout: float = 0.0, *, activation: str):
        super().__init__()
        self.ln_1 = nn.LayerNorm(width)
        self.attn = Attention(width, heads, dropout)
        self.ln_2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential()
        self.mlp.add_module("c_fc", nn.Linear(width, 4 * width))
        self.mlp.add_module("gelu", ACTIVATIONS[activation]())
        self.mlp.add_module("c_proj", nn.Linear(4 * width, width))

    def forward(self, x: Tensor, *, causal: bool = False, valid: Tensor | None = None) -> Tensor:
        x = x + self.attn(self.ln_1(x), causal=causal, valid=valid)
        return x + self.mlp(self.ln_2(x))

    def pooled(self, x: Tensor, position: Tensor, *, causal: bool = False) -> Tensor:
        """Computes the block's output at only one token of each sequence.

        This token is the query; all tokens are keys and values.

        Args:
            x: (N, L, D).
            position: (N,) int64, position of the token.
            causal: the token attends only to itself and to earlier tokens.

        Returns: (N, D).
        """
        rows = torch.arange(x.shape[0], device=x.device)
        valid = torch.arange(x.shape[1], device=x.device) <= position[:, None] if causal else None
        normed = self.ln_1(x)
        attended = self.attn.cross(normed[rows, position][:, None], normed, valid=valid)
        token = x[rows, position] + attended[:, 0]
        return token + self.mlp(self.ln_2(token))


class Transformer(nn.Module):
    """A stack of `layers` residual blocks over (N, L, D).

    Attributes:
        grad_checkpointing: store only the blocks' inputs for the backward pass, and recompute the rest with the same
            dropout. Gradients stay the same, with less memory and about a third more computation.
    """

    def __init__(self, width: int, layers: int, heads: int, *, activation: str, dropout: float = 0.0):
        super().__init__()
        self.width = width
        self.grad_checkpointing = False
        self._compiled: Callable[..., Tensor] | None = None
        self.resblocks = nn.ModuleList(
            ResidualBlock(width, heads, dropout, activation=activation) for _ in range(layers)
        )

    @property
    def blocks(self) -> list[ResidualBlock]:
        """The residual blocks, from the input to the output."""
        return [cast(ResidualBlock, block) for block in self.resblocks]

    def forward(self, x: Tensor, *, causal: bool = False, valid: Tensor | None = None) -> Tensor:
        for block in self.blocks:
            x = self._run(self._function(block), x, causal=causal, valid=valid)
        return x

    def pooled(self, x: Tensor, position: Tensor, *, causal: bool = False) -> Tensor:
        """Computes the output of `forward` only at one token of each sequence. This saves most of the last block.

        Args:
            x: (N, L, D).
            position: (N,) int64, position of the token.
            causal: a token attends only to itself and to earlier tokens.

        Returns: (N, D).
        """
        *blocks, last = self.blocks
        for block in blocks:
            x = self._run(self._function(block), x, causal=causal)
        return self._run(last.pooled, x, position, causal=causal)

    def compile_blocks(self) -> None:
        """Compiles the blocks for training. Parameter names stay as they are; evaluation and export are not compiled.

        All blocks share one graph for each shape of their input, so compiling takes seconds, not minutes.
        """
        self._compiled = torch.compile(ResidualBlock.forward, dynamic=False)

    def _function(self, block: ResidualBlock) -> Callable[..., Tensor]:
        return block if self._compiled is None or not self.training else partial(self._compiled, block)

    def _run(self, function: Callable[..., Tensor], *inputs: Tensor, **options: Any) -> Tensor:
        if self.grad_checkpointing and torch.is_grad_enabled():
            return checkpoint(function, *inputs, **options, use_reentrant=False)
        return function(*inputs, **options)

    def initialise(self) -> None:
        """Draws the weights as in CLIP's text transformer: normal, with residual branches scaled by depth."""
        projection_deviation = self.width**-0.5 * (2 * len(self.resblocks)) ** -0.5
        for block in self.blocks:
            nn.init.normal_(block.attn.in_proj_weight, std=self.width**-0.5)
            nn.init.normal_(block.attn.out_proj.weight, std=projection_deviation)
            nn.init.normal_(cast(nn.Linear, block.mlp.c_fc).weight, std=(2 * self.width) ** -0.5)
            nn.init.normal_(cast(nn.Linear, block.mlp.c_proj).weight, std=projection_deviation)
