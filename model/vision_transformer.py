"""CLIP's image encoder: a vision transformer (Dosovitskiy et al., 2021)."""

import torch
from torch import Tensor, nn

from model.architecture import Architecture
from model.transformer import Transformer, project


class VisionTransformer(nn.Module):
    """An encoder from images to features in the shared space. Its random weights are drawn as in OpenAI's code.

    Args:
        architecture: sizes of the model; those of the image encoder are used.
    """

    def __init__(self, architecture: Architecture):
        super().__init__()
        width, patch_size = architecture.vision_width, architecture.patch_size
        self.grid = architecture.grid
        deviation = width**-0.5
        self.conv1 = nn.Conv2d(3, width, kernel_size=patch_size, stride=patch_size, bias=False)
        self.class_embedding = nn.Parameter(deviation * torch.randn(width))
        self.positional_embedding = nn.Parameter(deviation * torch.randn(architecture.patches + 1, width))
        self.ln_pre = nn.LayerNorm(width)
        self.transformer = Transformer(
            width, architecture.vision_layers, architecture.vision_heads, activation=architecture.activation
        )
        self.ln_post = nn.LayerNorm(width)
        self.proj = nn.Parameter(deviation * torch.randn(width, architecture.embed_dim))

    def forward(self, images: Tensor, *, all_tokens: bool = False) -> Tensor:
        """Encodes images.

        Args:
            images: (B, 3, H, W) float, normalised pixels.
            all_tokens: return the output of every token instead of only the class token (needed for MLM).

        Returns: (B, embed_dim), or with `all_tokens` (B, P + 1, embed_dim), the class token first; not L2-normalised.
        """
        patches = self.conv1(images).flatten(2).transpose(1, 2)  # (B, P, D)
        # len(patches) would fix the batch size in an exported graph.
        class_token = self.class_embedding.to(patches.dtype).expand(patches.shape[0], 1, -1)
        x = torch.cat([class_token, patches], dim=1) + self.positional_embedding
        x = self.ln_pre(x)
        if all_tokens:
            x = self.transformer(x)
        else:
            x = self.transformer.pooled(x, torch.zeros(x.shape[0], dtype=torch.int64, device=x.device))
        return project(x, self.ln_post, self.proj)
