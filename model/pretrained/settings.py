"""What the tensors of a CLIP do not tell, and what is written beside them in the forms that have a place for it."""

from dataclasses import dataclass
from typing import Any

from misc.errors import UserError, first_of
from misc.transforms import IMAGENET_DEVIATION, IMAGENET_MEAN

QUICK_GELU, GELU = "quick_gelu", "gelu"


@dataclass(frozen=True)
class Preprocessing:
    """How an image becomes pixels of the size that a model wants.

    Attributes:
        mean, deviation: of the three channels of images with values 0 … 1.
        squash: height and width are resized each for itself; otherwise the shorter side is resized and the middle cut
            out.
    """

    mean: tuple[float, ...]
    deviation: tuple[float, ...]
    squash: bool


OF_CLIP = Preprocessing((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711), squash=False)
"""OpenAI's and open_clip's."""
OF_TBPS = Preprocessing(tuple(IMAGENET_MEAN), tuple(IMAGENET_DEVIATION), squash=True)
"""What TBPS-CLIP is trained with, here and in the published code."""


@dataclass(frozen=True)
class Settings:
    """What is told beside the tensors; None where nothing is.

    Attributes:
        activation: `quick_gelu` or `gelu`.
        vision_heads, text_heads: attention heads.
        resolution: (height, width) in pixels.
        preprocessing: of images.
    """

    activation: str | None = None
    vision_heads: int | None = None
    text_heads: int | None = None
    resolution: tuple[int, int] | None = None
    preprocessing: Preprocessing | None = None

    def __post_init__(self) -> None:
        """Raises UserError for values that no model can have: they come from files of others."""
        counts = {"attention heads": (self.vision_heads, self.text_heads), "pixels": self.resolution or ()}
        for what, values in counts.items():
            for value in values:
                if value is not None and not (isinstance(value, int) and value > 0):
                    raise UserError(f"its settings tell of {value!r} {what}, where a number must be")
        if self.activation not in (None, QUICK_GELU, GELU):
            raise UserError(f"its settings tell of the activation {self.activation!r}, not of {QUICK_GELU} or {GELU}")
        if self.preprocessing is not None:
            for values in (self.preprocessing.mean, self.preprocessing.deviation):
                if len(values) != 3 or not all(isinstance(value, int | float) for value in values):
                    raise UserError(f"its settings tell of {list(values)} for three channels of an image")


def _section(config: dict[str, Any], key: str) -> dict[str, Any]:
    """What lies under a key, or nothing where that is no section."""
    value = config.get(key)
    return value if isinstance(value, dict) else {}


def _three(values: Any, default: tuple[float, ...]) -> tuple[float, ...]:
    return tuple(values) if isinstance(values, list | tuple) else default


def as_resolution(value: Any) -> tuple[int, int] | None:
    """(height, width) from one integer or two; None from anything else."""
    if isinstance(value, int):
        return value, value
    whole = isinstance(value, list | tuple) and len(value) == 2 and all(isinstance(side, int) for side in value)
    return (value[0], value[1]) if whole else None


def of_checkpoint(config: dict[str, Any]) -> Settings:
    """Of a checkpoint of TBPS-CLIP, from its configuration; the published code knows QuickGELU alone."""
    model = _section(config, "model")
    return Settings(
        activation=model.get("activation", QUICK_GELU),
        vision_heads=model.get("vision_heads"),
        text_heads=model.get("text_heads"),
        resolution=as_resolution(_section(config, "experiment").get("input_resolution")),
        preprocessing=OF_TBPS,
    )


# What else open_clip's configurations may hold and still be a plain CLIP.
_PLAIN = {
    "": {"embed_dim", "vision_cfg", "text_cfg", "quick_gelu"},
    "vision_cfg": {"image_size", "layers", "width", "head_width", "patch_size"},
    "text_cfg": {"context_length", "vocab_size", "width", "heads", "layers"},
}
_NO_CHANGE = {"mlp_ratio": 4.0, "pool_type": ("tok", "argmax"), "proj_type": "linear", "pos_embed_type": "learnable"}


def of_open_clip(model: dict[str, Any], preprocess: dict[str, Any], *, quick_gelu: bool | None = None) -> Settings:
    """From open_clip's configuration of a model.

    Args:
        model: `model_cfg` of an `open_clip_config.json`, or what `get_model_config` gives.
        preprocess: `preprocess_cfg`, or the entry of a tag.
        quick_gelu: what the tag says, whose word counts.

    Raises: UserError where it is another kind of model than CLIP.
    """
    vision, text = model.get("vision_cfg"), model.get("text_cfg")
    if not isinstance(vision, dict) or not isinstance(text, dict):
        raise UserError("another kind of model than CLIP (no vision_cfg and text_cfg)")
    strange = [] if isinstance(vision.get("layers", 12), int) else [f"vision_cfg.layers: {vision['layers']}"]
    for section, allowed in _PLAIN.items():
        for key, value in (model[section] if section else model).items():
            if key not in allowed and value and value not in _as_tuple(_NO_CHANGE.get(key)):
                strange.append(f"{section}.{key}".lstrip(".") + f": {value}")
    if strange:
        raise UserError(f"another kind of model than CLIP ({first_of(strange)})")
    quick = model.get("quick_gelu", False) if quick_gelu is None else quick_gelu
    return Settings(
        activation=QUICK_GELU if quick else GELU,
        vision_heads=_quotient(vision.get("width", 768), vision.get("head_width", 64)),
        text_heads=text.get("heads", 8),
        resolution=as_resolution(vision.get("image_size", 224)),
        preprocessing=Preprocessing(
            _three(preprocess.get("mean"), OF_CLIP.mean),
            _three(preprocess.get("std"), OF_CLIP.deviation),
            squash=preprocess.get("resize_mode") == "squash",
        ),
    )


def _quotient(width: Any, head_width: Any) -> Any:
    whole = isinstance(width, int) and isinstance(head_width, int) and head_width > 0
    return width // head_width if whole else f"{width} / {head_width}"


def _as_tuple(value: Any) -> tuple:
    return value if isinstance(value, tuple) else (value,)


def of_hugging_face(model: dict[str, Any], preprocessor: dict[str, Any] | None) -> Settings:
    """From a `config.json` of a `CLIPModel`, whose defaults are ViT-B/32's, and its `preprocessor_config.json`.

    Raises: UserError where it is another kind of model, or its towers are computed in another way than CLIP's.
    """
    if model.get("model_type") != "clip":
        raise UserError(f"config.json is of a model of type {model.get('model_type')}, not of a CLIPModel (clip)")
    vision, text = _section(model, "vision_config"), _section(model, "text_config")
    activations = {str(tower.get("hidden_act", QUICK_GELU)) for tower in (vision, text)}
    if len(activations) > 1 or not activations <= {QUICK_GELU, GELU}:
        found = " and ".join(sorted(activations))
        raise UserError(f"config.json: hidden_act is {found}, where both towers should have quick_gelu, or both gelu")
    epsilons = [tower.get("layer_norm_eps", 1e-5) for tower in (vision, text)]
    if epsilons != [1e-5, 1e-5]:
        raise UserError(f"config.json: layer_norm_eps {epsilons}, where CLIP has 1e-05")
    preprocessing = None
    if preprocessor is not None:
        preprocessing = Preprocessing(
            _three(preprocessor.get("image_mean"), OF_CLIP.mean),
            _three(preprocessor.get("image_std"), OF_CLIP.deviation),
            squash=not preprocessor.get("do_center_crop", True) and "height" in _section(preprocessor, "size"),
        )
    return Settings(
        activation=activations.pop(),
        vision_heads=vision.get("num_attention_heads", 12),
        text_heads=text.get("num_attention_heads", 8),
        resolution=as_resolution(vision.get("image_size", 224)),
        preprocessing=preprocessing,
    )
