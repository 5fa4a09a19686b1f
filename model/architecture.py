"""The sizes of a model's encoders, without the heads that only training needs."""

from dataclasses import dataclass
from typing import NamedTuple

from text_utils.tokenizer import VOCABULARY_SIZE

QUICK_GELU, GELU = "quick_gelu", "gelu"
"""Names of activations. OpenAI, MetaCLIP and DFN trained with QuickGELU, LAION and DataComp with GELU."""


class Sizes(NamedTuple):
    """The fields of `Architecture` that the shapes of the tensors show."""

    patch_size: int
    vision_width: int
    vision_layers: int
    text_width: int
    text_layers: int
    embed_dim: int
    vocab_size: int


@dataclass(frozen=True)
class Architecture:
    """Sizes of CLIP's two encoders. The defaults are ViT-B/16 at 224 × 224 pixels.

    Attributes:
        resolution: (height, width) of an image in pixels, multiples of `patch_size`.
        patch_size: side of a square patch in pixels.
        vision_width, vision_layers, vision_heads: width, residual blocks and attention heads of the image encoder.
        text_length: maximum number of tokens of a caption, including start and end.
        vocab_size: number of token ids; the end-of-text token has the highest id.
        text_width, text_layers, text_heads: width, residual blocks and attention heads of the text encoder.
        embed_dim: width of the shared image-text space.
        activation: activation function of the MLPs in both encoders, `QUICK_GELU` or `GELU`.
    """

    resolution: tuple[int, int] = (224, 224)
    patch_size: int = 16
    vision_width: int = 768
    vision_layers: int = 12
    vision_heads: int = 12
    text_length: int = 77
    vocab_size: int = VOCABULARY_SIZE
    text_width: int = 512
    text_layers: int = 12
    text_heads: int = 8
    embed_dim: int = 512
    activation: str = QUICK_GELU

    @property
    def grid(self) -> tuple[int, int]:
        """The size of an image in patches: (height, width)."""
        return self.resolution[0] // self.patch_size, self.resolution[1] // self.patch_size

    @property
    def patches(self) -> int:
        """The number of patches of an image."""
        return self.grid[0] * self.grid[1]
