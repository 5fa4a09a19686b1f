"""Names of the tensors in OpenAI's CLIP (and open_clip), Hugging Face's `CLIPModel`, the published TBPS-CLIP code and
this project.

D width of an encoder.
"""

import math
import re
from collections.abc import Callable, Collection
from typing import NamedTuple

import torch
from torch import Tensor

from misc.errors import UserError, first_of
from model.architecture import QUICK_GELU
from model.preprocessing import IRRA_PREPROCESSING, TBPS_PREPROCESSING
from model.pretrained.settings import Settings

OURS = (("visual.", "image_encoder."), ("logit_scale", "logit_scale"), ("", "text_encoder."))
"""The beginnings of OpenAI's names, and of ours."""

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
"""The beginnings of the published code's names, and of ours; `logit_scale` is the same."""

ADAPTATIONS = ("prompt.", "image_adapter.")
"""The beginnings of our names for CoOp's context and for CLIP-Adapter. They are evaluated with the encoders."""

HEADS = (
    "simclr_projector.",
    "text_simclr_projector.",
    "masked_language_head.",
    "identity_classifier.",
    *ADAPTATIONS,
)
"""The beginnings of our names for modules that CLIP does not have: training heads and adaptations."""

# OpenAI's and Hugging Face's names outside the blocks, except the projections, which Hugging Face transposes.
_OUTSIDE = {
    "logit_scale": "logit_scale",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",  # Hugging Face's spelling
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
    """Renames the encoders and the temperature of `TBPSCLIP` to OpenAI's names, and leaves out training heads."""
    renamed = {}
    for name, value in state.items():
        for openai, ours in OURS:
            if name.startswith(ours):
                renamed[openai + name.removeprefix(ours)] = value
    return renamed


def to_ours(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Renames tensors from OpenAI's names to those of `TBPSCLIP`."""
    renamed = {}
    for name, value in state.items():
        openai, ours = next(pair for pair in OURS if name.startswith(pair[0]))
        renamed[ours + name.removeprefix(openai)] = value
    return renamed


def ours_from_published(name: str) -> str:
    """Returns our name of a tensor in a checkpoint of the published code."""
    for theirs, ours in PUBLISHED:
        if name.startswith(theirs):
            return ours + name.removeprefix(theirs)
    return name


def to_hugging_face(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Renames all tensors of a CLIP from OpenAI's names to those of Hugging Face's `CLIPModel`. All are contiguous."""
    renamed = {}
    for name, value in state.items():
        if name in _OUTSIDE:
            renamed[_OUTSIDE[name]] = value
        elif name in _TRANSPOSED:
            renamed[_TRANSPOSED[name]] = value.T.contiguous()
        else:
            encoder, number, module, kind = _block(name)
            layer = f"{_BLOCKS[encoder]}.{number}"
            if module == "attn.in_proj":
                for projection, part in zip(_QUERY_KEY_VALUE, value.chunk(3), strict=True):
                    renamed[f"{layer}.self_attn.{projection}.{kind}"] = part.contiguous()
            else:
                renamed[f"{layer}.{_IN_BLOCK[module]}.{kind}"] = value
    return renamed


def _block(name: str) -> tuple[str, str, str, str]:
    """Splits OpenAI's name of a tensor in a block: encoder, number of the block, module, and `weight` or `bias`."""
    found = re.fullmatch(r"((?:visual\.)?transformer\.resblocks)\.(\d+)\.(.+)[._](weight|bias)", name)
    assert found is not None, name
    return found[1], found[2], found[3], found[4]


def from_hugging_face(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Renames tensors from the names of Hugging Face's `CLIPModel` to OpenAI's.

    Raises UserError if `CLIPModel` does not have a name, or an input projection of an attention is missing.
    """
    outside = {theirs: openai for openai, theirs in _OUTSIDE.items()}
    transposed = {theirs: openai for openai, theirs in _TRANSPOSED.items()}
    blocks = {theirs: openai for openai, theirs in _BLOCKS.items()}
    in_block = {theirs: openai for openai, theirs in _IN_BLOCK.items()}
    renamed: dict[str, Tensor] = {}
    parts: dict[tuple[str, str, str], dict[str, Tensor]] = {}
    unknown = []
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
        raise UserError(
            f"not a complete CLIPModel of Hugging Face: {first_of(problems)}: give a file of the whole model"
        )
    for (layers, number, kind), projections in parts.items():
        in_order = [projections[projection] for projection in _QUERY_KEY_VALUE]
        if len({part.shape for part in in_order}) > 1:
            raise UserError(
                f"{layers}.{number}.self_attn: its three input projections have different shapes: get the file again"
            )
        renamed[f"{blocks[layers]}.{number}.attn.in_proj_{kind}"] = torch.cat(in_order)
    return renamed


class Scheme(NamedTuple):
    """A way to name the tensors of a CLIP.

    Attributes:
        title: whose names these are, for messages.
        matches: whether a name shows this scheme.
        convert: returns encoders and temperature under OpenAI's names, and training heads under ours.
        first_layers: names of the first layer of each encoder, by which the encoders are found behind any prefix.
        settings: what the names imply, because they show which code trained the weights; None if nothing.
        is_tbps_clip: whether these are names of TBPS-CLIP, whose checkpoints contain a configuration.
    """

    title: str
    matches: Callable[[str], bool]
    convert: Callable[[dict[str, Tensor]], tuple[dict[str, Tensor], dict[str, Tensor]]]
    first_layers: tuple[str, ...]
    settings: Settings | None = None
    is_tbps_clip: bool = False


def _split_heads(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    heads = {name: value for name, value in state.items() if name.startswith(HEADS)}
    return from_ours({name: value for name, value in state.items() if name not in heads}), heads


OPENAI_TEXT = ("transformer.", "token_embedding.", "ln_final.", "positional_embedding", "text_projection")
HUGGING_FACE = ("vision_model.", "text_model.", "visual_projection.", "text_projection.weight")
SCHEMES: dict[str, Scheme] = {
    "Hugging Face": Scheme(
        "Hugging Face",
        lambda name: name.startswith(HUGGING_FACE),
        lambda state: (from_hugging_face(state), {}),
        ("vision_model.embeddings.patch_embedding.weight", "text_model.embeddings.token_embedding.weight"),
    ),
    "ours": Scheme(
        "this project",
        lambda name: name.startswith(("image_encoder.", "text_encoder.", *HEADS)),
        _split_heads,
        ("image_encoder.conv1.weight", "text_encoder.token_embedding.weight"),
        Settings(preprocessing=TBPS_PREPROCESSING),
        is_tbps_clip=True,
    ),
    "published": Scheme(
        "the published code",
        lambda name: name.startswith(tuple(theirs for theirs, _ in PUBLISHED if theirs != "visual.")),
        lambda state: _split_heads({ours_from_published(name): value for name, value in state.items()}),
        ("visual.conv1.weight", "encode_text.token_embedding.weight"),
        Settings(QUICK_GELU, preprocessing=TBPS_PREPROCESSING),
        is_tbps_clip=True,
    ),
    "OpenAI": Scheme(
        "OpenAI",
        lambda name: name.startswith(("visual.", *OPENAI_TEXT)),
        lambda state: (dict(state), {}),
        ("visual.conv1.weight", "token_embedding.weight"),
    ),
}
"""By name; the first that matches a name counts. open_clip uses OpenAI's names."""

IRRA_PREFIX = "base_model."
"""What the code of IRRA (Jiang and Ye, CVPR 2023) and of its family puts in front of OpenAI's names."""
IRRA_HEADS = ("classifier", "cross_attn", "cross_modal_transformer", "ln_pre_t", "ln_pre_i", "ln_post", "mlm_head")
"""IRRA's training heads."""
RDE_FEATURES = ("visul_emb_layer", "texual_emb_layer")
"""The modules of RDE's second pair of features (Qin et al., CVPR 2024), in its spelling."""
IRRA = SCHEMES["OpenAI"]._replace(
    title="IRRA",
    convert=lambda state: (
        {"logit_scale": torch.tensor(math.log(50)), **state},
        {},
    ),  # a constant temperature of 1 / 50
    settings=Settings(QUICK_GELU, preprocessing=IRRA_PREPROCESSING),
)


def scheme_of(names: Collection[str], prefix: str = "") -> Scheme:
    """Finds the naming scheme of the tensors of one model.

    Args:
        prefix: what was in front of the names.

    Raises UserError if the names belong to no scheme, or to several.
    """
    examples: dict[str, str] = {}
    for name in names:
        if key := _scheme_key(name):
            examples.setdefault(key, name)
    if examples.keys() == {"OpenAI", "published"}:  # they share only the names of the image encoder
        of_text = [name for name in names if _scheme_key(name) == "OpenAI" and not name.startswith("visual.")]
        if not of_text:
            return SCHEMES["published"]
        examples["OpenAI"] = of_text[0]
    if len(examples) > 1:
        mixture = " and ".join(f"of {SCHEMES[key].title} ({name})" for key, name in sorted(examples.items()))
        raise UserError(f"names {mixture} are mixed: save the state dict of one model")
    if not examples:
        raise UserError(f"no tensor of a CLIP, but {first_of(list(names))}: give the weights of a CLIP")
    key = next(iter(examples))
    is_irra = key == "OpenAI" and f".{prefix}".endswith(f".{IRRA_PREFIX}") and "logit_scale" not in names
    return IRRA if is_irra else SCHEMES[key]


def _scheme_key(name: str) -> str | None:
    """Returns the scheme of one name; None if the name does not show it, such as `logit_scale`."""
    return next((key for key, scheme in SCHEMES.items() if scheme.matches(name)), None)
