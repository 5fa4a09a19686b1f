"""The names of the same tensors in OpenAI's CLIP (and open_clip), in Hugging Face's `CLIPModel`, in the published
TBPS-CLIP code and here. D width of a tower, E width of the shared space.
"""

import re
from collections.abc import Collection

import torch
from torch import Tensor

from misc.errors import UserError, first_of

OURS = (("visual.", "image_encoder."), ("logit_scale", "logit_scale"), ("", "text_encoder."))
"""How names of OpenAI begin, and ours."""

PUBLISHED = (
    ("visual.", "image_encoder."),
    ("encode_text.", "text_encoder."),
    ("simclr_mlp.", "simclr_projector."),
    ("classifier.", "identity_classifier."),
    *(
        (module, f"masked_language_head.{module}")
        for module in ("cross_attn.", "cross_modal_transformer.", "ln_pre_t.", "ln_pre_i.", "ln_post.", "mlm_head.")
    ),
)
"""How names of the published code begin, and ours; `logit_scale` is the same."""

ADAPTATIONS = ("prompt.", "image_adapter.")
"""How our names of CoOp's context and of CLIP-Adapter begin, which are evaluated with the towers."""

HEADS = (
    "simclr_projector.",
    "text_simclr_projector.",
    "masked_language_head.",
    "identity_classifier.",
    *ADAPTATIONS,
)
"""How our names of what CLIP does not have begin: the training heads, and what adapts it."""

TBPS_SCHEMES = ("ours", "published")
"""Whose names, as `scheme_of` tells it, TBPS-CLIP's own checkpoints have."""
WHOSE = {"ours": "this project", "published": "the published code"}
"""In words, where the name of the scheme is none."""

# OpenAI's names and Hugging Face's outside of the blocks, but for the projections, which lie transposed there.
_OUTSIDE = {
    "logit_scale": "logit_scale",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",  # spelled so
    "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "visual.ln_post.weight": "vision_model.post_layernorm.weight",
    "visual.ln_post.bias": "vision_model.post_layernorm.bias",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
}
_TRANSPOSED = {"visual.proj": "visual_projection.weight", "text_projection": "text_projection.weight"}
_BLOCKS = {
    "visual.transformer.resblocks": "vision_model.encoder.layers",
    "transformer.resblocks": "text_model.encoder.layers",
}
_IN_BLOCK = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
_QUERY_KEY_VALUE = ("q_proj", "k_proj", "v_proj")  # one matrix (3 D, D) in OpenAI's names, in this order


def from_ours(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The towers and the temperature of `TBPSCLIP` under OpenAI's names; training heads are left out."""
    renamed = {}
    for name, value in state.items():
        for openai, ours in OURS:
            if name.startswith(ours):
                renamed[openai + name.removeprefix(ours)] = value
    return renamed


def to_ours(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors under OpenAI's names under those of `TBPSCLIP`."""
    renamed = {}
    for name, value in state.items():
        openai, ours = next(pair for pair in OURS if name.startswith(pair[0]))
        renamed[ours + name.removeprefix(openai)] = value
    return renamed


def ours_from_published(name: str) -> str:
    """Our name of a tensor in a checkpoint of the published code."""
    for theirs, ours in PUBLISHED:
        if name.startswith(theirs):
            return ours + name.removeprefix(theirs)
    return name


def to_hugging_face(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors under OpenAI's names, all of one CLIP, under those of Hugging Face's `CLIPModel`; contiguous."""
    renamed = {}
    for name, value in state.items():
        if name in _OUTSIDE:
            renamed[_OUTSIDE[name]] = value
        elif name in _TRANSPOSED:
            renamed[_TRANSPOSED[name]] = value.T.contiguous()
        else:
            tower, number, module, kind = _block(name)
            layer = f"{_BLOCKS[tower]}.{number}"
            if module == "attn.in_proj":
                for projection, part in zip(_QUERY_KEY_VALUE, value.chunk(3), strict=True):
                    renamed[f"{layer}.self_attn.{projection}.{kind}"] = part.contiguous()
            else:
                renamed[f"{layer}.{_IN_BLOCK[module]}.{kind}"] = value
    return renamed


def _block(name: str) -> tuple[str, str, str, str]:
    """OpenAI's name of a tensor in a block: tower, number of the block, module, and `weight` or `bias`."""
    tower, number, rest = re.fullmatch(r"((?:visual\.)?transformer\.resblocks)\.(\d+)\.(.+)", name).groups()
    module, kind = re.fullmatch(r"(.+)[._](weight|bias)", rest).groups()
    return tower, number, module, kind


def from_hugging_face(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors under the names of Hugging Face's `CLIPModel` under OpenAI's.

    Raises: UserError for names that `CLIPModel` does not have, and where a part of an attention's input is missing.
    """
    outside = {theirs: openai for openai, theirs in _OUTSIDE.items()}
    transposed = {theirs: openai for openai, theirs in _TRANSPOSED.items()}
    blocks = {theirs: openai for openai, theirs in _BLOCKS.items()}
    in_block = {theirs: openai for openai, theirs in _IN_BLOCK.items()}
    renamed, parts, unknown = {}, {}, []
    for name, value in state.items():
        found = re.fullmatch(r"((?:vision|text)_model\.encoder\.layers)\.(\d+)\.(.+)\.(weight|bias)", name)
        if name in outside:
            renamed[outside[name]] = value
        elif name in transposed:
            renamed[transposed[name]] = value.T if value.dim() == 2 else value
        elif found and found[3] in in_block:
            renamed[f"{blocks[found[1]]}.{found[2]}.{in_block[found[3]]}.{found[4]}"] = value
        elif found and found[3].removeprefix("self_attn.") in _QUERY_KEY_VALUE:
            parts.setdefault((found[1], found[2], found[4]), {})[found[3].removeprefix("self_attn.")] = value
        else:
            unknown.append(name)
    missing = [
        f"{layers}.{number}.self_attn.{projection}.{kind}"
        for (layers, number, kind), found in parts.items()
        for projection in _QUERY_KEY_VALUE
        if projection not in found
    ]
    if unknown or missing:
        problems = [f"{name} is missing" for name in missing] + [f"{name} is unknown" for name in unknown]
        raise UserError(f"no whole CLIPModel of Hugging Face: {first_of(problems)}")
    for (layers, number, kind), found in parts.items():
        in_order = [found[projection] for projection in _QUERY_KEY_VALUE]
        if len({part.shape for part in in_order}) > 1:
            raise UserError(f"{layers}.{number}.self_attn: its three inputs have different shapes")
        renamed[f"{blocks[layers]}.{number}.attn.in_proj_{kind}"] = torch.cat(in_order)
    return renamed


def scheme_of(names: Collection[str]) -> str:
    """Whose names these are: `OpenAI` (and open_clip), `Hugging Face`, `published` or `ours`.

    Raises: UserError where they are nobody's, or those of several.
    """
    examples: dict[str, str] = {}
    for name in names:
        if scheme := _scheme(name):
            examples.setdefault(scheme, name)
    if examples.keys() == {"OpenAI", "published"}:  # they share the names of the image encoder alone
        of_text = [name for name in names if _scheme(name) == "OpenAI" and not name.startswith("visual.")]
        if not of_text:
            return "published"
        examples["OpenAI"] = of_text[0]
    if len(examples) > 1:
        mixture = " and ".join(f"of {WHOSE.get(scheme, scheme)} ({name})" for scheme, name in sorted(examples.items()))
        raise UserError(f"names {mixture} are mixed: save the state dict of one model")
    if not examples:
        raise UserError(f"no tensor of a CLIP, but {first_of(list(names))}")
    return next(iter(examples))


def _scheme(name: str) -> str | None:
    """Whose name it is, where it tells; `logit_scale` is everybody's."""
    if name.startswith(("vision_model.", "text_model.", "visual_projection.")) or name == "text_projection.weight":
        return "Hugging Face"
    if name.startswith(("image_encoder.", "text_encoder.", *HEADS)):
        return "ours"
    if name.startswith(tuple(theirs for theirs, _ in PUBLISHED if theirs != "visual.")):
        return "published"
    of_text = ("transformer.", "token_embedding.", "ln_final.", "positional_embedding", "text_projection")
    return "OpenAI" if name.startswith(("visual.", *of_text)) else None
