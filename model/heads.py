"""Heads that only training needs: SimCLR projector, masked-language head, identity classifier.

B captions, L tokens, P image tokens, D width of the shared space, M tokens picked for masked language modelling.
"""

from torch import Tensor, nn

from model.architecture import QUICK_GELU
from model.transformer import Attention, QuickGELU, Transformer, to_float32


def simclr_projector(widths: list[int]) -> nn.Sequential:
    """Builds Linear – ReLU – Linear with the widths of input, hidden layer and output (paper: 512, 128, 512)."""
    into, hidden, out = widths
    return nn.Sequential(nn.Linear(into, hidden), nn.ReLU(), nn.Linear(hidden, out))


def identity_classifier(width: int, identities: int) -> nn.Linear:
    """Builds one linear layer over the training identities, with weights drawn from N(0, 0.001²)."""
    classifier = nn.Linear(width, identities)
    nn.init.normal_(classifier.weight, std=0.001)
    nn.init.zeros_(classifier.bias)
    return classifier


def attention_heads(width: int) -> int:
    """Returns the number of attention heads of the masked-language head.

    It has one per 64 channels, as in CLIP, and at least one.
    """
    return max(1, width // 64)


class MaskedLanguageHead(nn.Module):
    """A head that predicts masked tokens from the caption and the image.

    The text tokens attend to the image, then pass `depth` transformer layers. Parameter names are those of published
    checkpoints.
    """

    def __init__(self, *, width: int, depth: int, vocab_size: int):
        super().__init__()
        heads = attention_heads(width)
        self.cross_attn = Attention(width, heads)
        self.cross_modal_transformer = Transformer(width, depth, heads, activation=QUICK_GELU)
        self.ln_pre_t = nn.LayerNorm(width)
        self.ln_pre_i = nn.LayerNorm(width)
        self.ln_post = nn.LayerNorm(width)
        dense, fc = nn.Linear(width, width), nn.Linear(width, vocab_size)
        self.mlm_head = nn.Sequential()
        self.mlm_head.add_module("dense", dense)
        self.mlm_head.add_module("gelu", QuickGELU())
        self.mlm_head.add_module("ln", nn.LayerNorm(width))
        self.mlm_head.add_module("fc", fc)
        self.cross_modal_transformer.initialise()
        nn.init.normal_(self.cross_attn.in_proj_weight, std=width**-0.5)
        residual_deviation = width**-0.5 * (2 * depth) ** -0.5
        nn.init.normal_(self.cross_attn.out_proj.weight, std=residual_deviation)
        nn.init.normal_(dense.weight, std=(2 * width) ** -0.5)
        nn.init.normal_(fc.weight, std=residual_deviation)

    def forward(self, text_tokens: Tensor, image_tokens: Tensor, valid: Tensor, picked: Tensor) -> Tensor:
        """Computes logits over the vocabulary for the picked tokens.

        Args:
            text_tokens: (B, L, D) text features of the masked captions.
            image_tokens: (B, P + 1, D) image features.
            valid: (B, L) bool, False for padding. No token attends to padding, so it has no effect.
            picked: (B, L) bool, the M tokens to predict.

        Returns: (M, vocab_size), the picked tokens row by row.
        """
        x = self.cross_attn.cross(self.ln_pre_t(text_tokens), self.ln_pre_i(image_tokens))
        x = to_float32(x)  # the residual stream stays in float32, as in the encoders
        x = self.cross_modal_transformer(x, valid=valid)
        return self.mlm_head(self.ln_post(x)[picked])
