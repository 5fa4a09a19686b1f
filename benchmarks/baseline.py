"""The baseline: a training step, a loader and an evaluation that work the published way.

- Every view has its own forward pass, and the soft labels need further passes.
- Captions are padded to 77 tokens, and attention returns its weights.
- All tokens go through the last block, though only one is used.
- All four views are augmented and moved to the device, even if the recipe does not use them.
- Every parameter is its own optimizer group, and each iteration waits for the losses.
- The whole similarity matrix is sorted.

Shapes: B rows, L tokens, D width of an encoder, E width of the shared space.
"""

import random
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image, ImageFilter
from torch import Tensor, nn
from torchvision import transforms as v1

from model import losses
from model.objectives import Objectives
from model.preprocessing import IMAGENET_DEVIATION, IMAGENET_MEAN
from model.pretrained.names import from_ours
from model.tbps_clip import TBPSCLIP, Views

TEXT_LENGTH = 77


class QuickGELU(nn.Module):
    """QuickGELU as it is published, which keeps three tensors for the backward pass."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


class Block(nn.Module):
    """A residual block with torch's own attention, which materialises the attention weights."""

    def __init__(self, width: int, heads: int, dropout: float):
        super().__init__()
        self.ln_1 = nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, heads, dropout=dropout)
        self.ln_2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential()
        self.mlp.add_module("c_fc", nn.Linear(width, 4 * width))
        self.mlp.add_module("gelu", QuickGELU())
        self.mlp.add_module("c_proj", nn.Linear(4 * width, width))

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """(L, B, D) → (L, B, D)."""
        normed = self.ln_1(x)
        x = x + self.attn(normed, normed, normed, attn_mask=mask, need_weights=True)[0]
        return x + self.mlp(self.ln_2(x))


class Blocks(nn.Module):
    """The residual blocks of an encoder."""

    def __init__(self, width: int, layers: int, heads: int, dropout: float = 0.0):
        super().__init__()
        self.resblocks = nn.ModuleList(Block(width, heads, dropout) for _ in range(layers))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, L, D) → (B, L, D)."""
        x = x.transpose(0, 1)
        for block in self.resblocks:
            x = block(x, mask)
        return x.transpose(0, 1)


class ImageEncoder(nn.Module):
    """The image encoder of a TBPSCLIP, with empty weights."""

    def __init__(self, ours: TBPSCLIP):
        super().__init__()
        encoder = ours.image_encoder
        width, patch = encoder.conv1.weight.shape[0], encoder.conv1.kernel_size[0]
        self.conv1 = nn.Conv2d(3, width, patch, patch, bias=False)
        self.class_embedding = nn.Parameter(torch.empty(width))
        self.positional_embedding = nn.Parameter(torch.empty_like(encoder.positional_embedding))
        self.ln_pre = nn.LayerNorm(width)
        blocks = encoder.transformer.resblocks
        self.transformer = Blocks(width, len(blocks), blocks[0].attn.heads)
        self.ln_post = nn.LayerNorm(width)
        self.proj = nn.Parameter(torch.empty_like(encoder.proj))

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) → (B, E)."""
        patches = self.conv1(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_embedding.expand(len(patches), 1, -1).to(patches.dtype), patches], dim=1)
        x = self.transformer(self.ln_pre(x + self.positional_embedding))
        return self.ln_post(x[:, 0]) @ self.proj


class Baseline(nn.Module):
    """The encoders, the temperature and the SimCLR projector of a TBPSCLIP, with its weights."""

    def __init__(self, ours: TBPSCLIP):
        super().__init__()
        encoder = ours.text_encoder
        blocks = encoder.transformer.resblocks
        width = encoder.positional_embedding.shape[1]
        self.visual = ImageEncoder(ours)
        self.token_embedding = nn.Embedding(*encoder.token_embedding.weight.shape)
        self.positional_embedding = nn.Parameter(torch.empty_like(encoder.positional_embedding))
        self.transformer = Blocks(width, len(blocks), blocks[0].attn.heads, blocks[0].attn.dropout)
        self.ln_final = nn.LayerNorm(width)
        self.text_projection = nn.Parameter(torch.empty_like(encoder.text_projection))
        self.logit_scale = nn.Parameter(torch.empty(()))
        self.load_state_dict(from_ours(ours.state_dict()), strict=True)
        self.simclr_projector = None
        if ours.simclr_projector is not None:
            self.simclr_projector = nn.Sequential(
                *(
                    nn.Linear(layer.in_features, layer.out_features) if isinstance(layer, nn.Linear) else nn.ReLU()
                    for layer in ours.simclr_projector
                )
            )
            self.simclr_projector.load_state_dict(ours.simclr_projector.state_dict())
        self.visual.conv1.requires_grad_(ours.image_encoder.conv1.weight.requires_grad)
        self.register_buffer("mask", torch.full((TEXT_LENGTH, TEXT_LENGTH), float("-inf")).triu(1), persistent=False)

    def encode_image(self, images: Tensor) -> Tensor:
        return self.visual(images)

    def encode_text(self, token_ids: Tensor) -> Tensor:
        """(B, L) int64 → (B, E). Pads the captions to 77 tokens."""
        token_ids = F.pad(token_ids, (0, TEXT_LENGTH - token_ids.shape[1]))
        x = self.token_embedding(token_ids) + self.positional_embedding
        x = self.transformer(x, self.mask)
        return self.ln_final(x)[torch.arange(len(x), device=x.device), token_ids.argmax(dim=1)] @ self.text_projection


def step_losses(
    model: Baseline, views: Views, identities: Tensor, alpha: float, objectives: Objectives
) -> dict[str, Tensor]:
    """Returns the weighted losses of one process.

    Args:
        views: all four image views and the captions, on the device.
        identities: (B,) int64.
        alpha: weight of the soft labels.
        objectives: the losses that are on, and their weights.
    """
    scale = model.logit_scale.exp().clamp(max=100)
    targets = losses.matching_distribution(identities, identities, torch.float32)
    text = F.normalize(model.encode_text(views.token_ids).float(), dim=1)
    with torch.no_grad():
        soft_text = F.normalize(model.encode_text(views.token_ids).float(), dim=1)

    def logits_and_soft(images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        encoded = F.normalize(model.encode_image(images).float(), dim=1)
        with torch.no_grad():
            soft = F.normalize(model.encode_image(images).float(), dim=1)
            soft_logits = scale * soft @ soft_text.T
        return encoded, scale * encoded @ text.T, soft_logits

    def contrast(logits: Tensor, soft_logits: Tensor) -> Tensor:
        cross_entropies = []
        for scores, soft in ((logits, soft_logits), (logits.T, soft_logits.T)):
            labels = alpha * soft.softmax(dim=1) + (1 - alpha) * targets
            cross_entropies.append(-(labels * scores.log_softmax(dim=1)).sum(dim=1).mean())
        return sum(cross_entropies) / 2

    image, logits, soft_logits = logits_and_soft(views.image)
    nitc = contrast(logits, soft_logits)
    if objectives.mvs_image:
        nitc = (nitc + contrast(*logits_and_soft(views.second_image)[1:])) / 2
    weighted = {"nitc": objectives.nitc_ratio * nitc}
    if "ritc" in objectives.weights:
        parts = [losses.reversed_contrastive(scores, targets, objectives.ritc_eps) for scores in (logits, logits.T)]
        weighted["ritc"] = objectives.ritc_ratio * sum(parts) / 2
    if "citc" in objectives.weights:
        lambdas = (objectives.citc_lambda1, objectives.citc_lambda2)
        weighted["citc"] = objectives.citc_ratio * losses.cyclic_contrastive(image, text, *lambdas)
    if "ss" in objectives.weights:
        first, second = (
            F.normalize(model.simclr_projector(model.encode_image(view)).float(), dim=1) for view in views.simclr_images
        )
        weighted["ss"] = objectives.ss_ratio * losses.nt_xent(
            first, second, first, second, 0, objectives.simclr_temperature
        )
    return weighted


def optimizer(model: nn.Module, *, weight_decay: float, betas: tuple[float, float], eps: float) -> torch.optim.AdamW:
    """Returns AdamW with one group per parameter."""
    groups = [
        {"params": [parameter], "weight_decay": weight_decay if parameter.ndim >= 2 else 0.0}
        for parameter in model.parameters()
        if parameter.requires_grad
    ]
    return torch.optim.AdamW(groups, lr=1e-5, betas=betas, eps=eps)


class PublishedAugmentation:
    """All four views of an image, which is decoded once.

    Uses version 1 of torchvision's transforms. SimCLR views stay Pillow images, in bytes, until they are normalised.
    Pool views are resized as Pillow images; their operations work on float tensors.
    """

    def __init__(self, resolution: tuple[int, int]):
        size = list(resolution)
        self.resize = v1.Compose([v1.Resize(size, v1.InterpolationMode.BILINEAR), v1.ToTensor()])
        self.normalise = v1.Normalize(IMAGENET_MEAN, IMAGENET_DEVIATION)
        self.pool = [
            v1.ColorJitter(brightness=0.1, contrast=0.1, saturation=0.1, hue=0),
            v1.RandomRotation(15),
            v1.RandomResizedCrop(size, scale=(0.9, 1.0), antialias=True),
            v1.RandomGrayscale(p=0.1),
            v1.RandomHorizontalFlip(p=0.5),
            v1.RandomErasing(p=0.5, scale=(0.10, 0.20), ratio=(0.3, 3.3), value=0),
        ]
        self.simclr = v1.Compose(
            [
                v1.RandomResizedCrop(size, scale=(0.2, 1.0)),
                v1.RandomApply([v1.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8),
                v1.RandomGrayscale(p=0.2),
                v1.RandomApply([PillowBlur(0.1, 2.0)], p=0.5),
                v1.RandomHorizontalFlip(),
                v1.ToTensor(),
                self.normalise,
            ]
        )

    def __call__(self, path: Path) -> list[Tensor]:
        """Returns two pool views and two SimCLR views, each (3, H, W)."""
        with Image.open(path) as file:
            image = file.convert("RGB")
        return [self.pool_view(image), self.pool_view(image), self.simclr(image), self.simclr(image)]

    def pool_view(self, image: Image.Image) -> Tensor:
        view = self.resize(image)
        for operation in random.choices(self.pool, k=2):
            view = operation(view)
        return self.normalise(view)


class PillowBlur:
    """Pillow's Gaussian blur, which approximates a Gaussian by box blurs. Sigma in pixels is drawn uniformly."""

    def __init__(self, low: float, high: float):
        self.low, self.high = low, high

    def __call__(self, image: Image.Image) -> Image.Image:
        return image.filter(ImageFilter.GaussianBlur(random.uniform(self.low, self.high)))


def rank_metrics(
    queries: Tensor, gallery: Tensor, query_identities: Tensor, gallery_identities: Tensor
) -> dict[str, float]:
    """Returns R@1, R@5, R@10 and mAP in percent, by sorting the whole (Q, N) similarity matrix."""
    order = (queries @ gallery.T).argsort(dim=1, descending=True, stable=True)
    matches = gallery_identities[order] == query_identities[:, None]
    found = matches.cumsum(dim=1)
    precision = (found / torch.arange(1, matches.shape[1] + 1) * matches).sum(dim=1) / matches.sum(dim=1).clamp(min=1)
    recall = {f"r{k}": 100 * (found[:, k - 1] > 0).double().mean().item() for k in (1, 5, 10)}
    return recall | {"mAP": 100 * precision.double().mean().item()}
