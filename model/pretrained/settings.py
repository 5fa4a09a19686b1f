"""The settings of a CLIP that its tensors do not show, as other tools and our checkpoints record them."""

from dataclasses import dataclass, field
from typing import Any, TypeGuard

from misc.errors import UserError, first_of, shown
from model.architecture import GELU, QUICK_GELU, Sizes
from model.preprocessing import CLIP_PREPROCESSING, INTERPOLATIONS, TBPS_PREPROCESSING, Preprocessing
from model.transformer import ACTIVATIONS

CLEAN_CAPTIONS = "clean_captions"
"""Our own key among the settings of images that we export: other tools ignore it."""


@dataclass(frozen=True)
class Settings:
    """The settings that are recorded with the tensors; None if a setting is not recorded.

    Attributes:
        activation: a key of `ACTIVATIONS`.
        vision_heads, text_heads: numbers of attention heads.
        resolution: (height, width) in pixels.
        preprocessing: preprocessing of images and captions.
        sizes: recorded sizes, by the names of `Sizes`, to check the tensors.
    """

    activation: str | None = None
    vision_heads: int | None = None
    text_heads: int | None = None
    resolution: tuple[int, int] | None = None
    preprocessing: Preprocessing | None = None
    sizes: dict[str, int] = field(default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        """Checks the values, because they can come from a file.

        Raises UserError if a value is invalid.
        """
        for unit, values in (("attention heads", (self.vision_heads, self.text_heads)), ("pixels", self.resolution)):
            for value in values or ():
                if value is not None and not _is_count(value):
                    raise UserError(f"its settings record {shown(value)} {unit} instead of a positive integer")
        known = isinstance(self.activation, str) and self.activation in ACTIVATIONS
        if self.activation is not None and not known:
            raise UserError(
                f"its settings record the activation {shown(self.activation)}; it should be {' or '.join(ACTIVATIONS)}"
            )

    def check(self, sizes: Sizes) -> None:
        """Checks the recorded sizes against `sizes`, those of the tensors.

        Raises UserError if they belong to two models.
        """
        differing = {
            key: value
            for key, value in self.sizes.items()
            if not isinstance(value, int | float) or value != getattr(sizes, key)
        }
        if differing:
            recorded = ", ".join(f"{key} {shown(value)}" for key, value in differing.items())
            found = ", ".join(f"{key} {getattr(sizes, key)}" for key in differing)
            raise UserError(f"its settings record {recorded}, but its tensors have {found}: they belong to two models")
        for heads, width in ((self.vision_heads, sizes.vision_width), (self.text_heads, sizes.text_width)):
            if heads and width % heads:
                raise UserError(f"its settings are for {heads} attention heads, which do not divide the width {width}")


def _is_count(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value < 1 << 31


def _as_name(value: Any) -> str:
    return value if isinstance(value, str) else shown(value)


def _section(config: dict[str, Any], key: str) -> dict[str, Any]:
    """Returns the section under a key, or an empty one if the value is no section."""
    value = config.get(key)
    return value if isinstance(value, dict) else {}


def _channels(values: Any, default: tuple[float, ...]) -> tuple[float, ...]:
    return default if values is None else tuple(values) if isinstance(values, list | tuple) else (values,)


def _present(section: dict[str, Any], keys: dict[str, str]) -> dict[str, Any]:
    """Returns the values that a section contains, under our names."""
    return {ours: section[theirs] for ours, theirs in keys.items() if theirs in section}


def _resolution(value: Any) -> tuple[int, int] | None:
    """Returns (height, width) for one integer or two; None for anything else."""
    if isinstance(value, int):
        return value, value
    return (value[0], value[1]) if isinstance(value, list | tuple) and len(value) == 2 else None


# ---- checkpoints of TBPS-CLIP ---------------------------------------------------------------------------------------


def settings_from_checkpoint(config: dict[str, Any]) -> Settings:
    """Reads the configuration in a checkpoint.

    It has no activation in checkpoints of the published code and in old ones of ours: they all use QuickGELU.
    """
    model = _section(config, "model")
    dropped, layers = model.get("dropped_text_layers"), model.get("text_layers")
    if isinstance(dropped, list) and _is_count(layers):  # the configured number includes the dropped layers
        model = model | {"text_layers": layers - len(dropped)}
    return Settings(
        activation=model.get("activation", QUICK_GELU),
        vision_heads=model.get("vision_heads"),
        text_heads=model.get("text_heads"),
        resolution=_resolution(_section(config, "experiment").get("input_resolution")),
        preprocessing=TBPS_PREPROCESSING,
        sizes=_present(model, {key: key for key in Sizes._fields}),
    )


# ---- open_clip ------------------------------------------------------------------------------------------------------


# The keys of a plain CLIP in open_clip's configurations, and other keys with the values that change nothing.
_PLAIN = {
    "": {"embed_dim", "vision_cfg", "text_cfg", "quick_gelu"},
    "vision_cfg": {"image_size", "layers", "width", "head_width", "patch_size", "patch_dropout"},
    "text_cfg": {"context_length", "vocab_size", "width", "heads", "layers"},
}
_NO_CHANGE = {
    "mlp_ratio": (4, 4.0),
    "pool_type": ("tok", "argmax"),
    "proj_type": ("linear",),
    "pos_embed_type": ("learnable",),
}


def settings_from_open_clip(
    model: dict[str, Any], preprocess: dict[str, Any], *, quick_gelu: bool | None = None
) -> Settings:
    """Reads open_clip's configuration of a model.

    Args:
        model: `model_cfg` of an `open_clip_config.json`, or the result of `get_model_config`.
        preprocess: `preprocess_cfg`, or the registry's entry of a tag.
        quick_gelu: the value in the registry's entry, which overrides the one in `model`.

    Raises UserError if it is another kind of model than CLIP.
    """
    vision, text = model.get("vision_cfg"), model.get("text_cfg")
    if not isinstance(vision, dict) or not isinstance(text, dict):
        raise UserError("another kind of model than CLIP (no vision_cfg and text_cfg)")
    unsupported = [] if isinstance(vision.get("layers", 12), int) else [f"vision_cfg.layers: {shown(vision['layers'])}"]
    for section, allowed in _PLAIN.items():
        for key, value in (model[section] if section else model).items():
            if key not in allowed and value and value not in _NO_CHANGE.get(key, ()):
                unsupported.append(f"{section}.{key}".lstrip(".") + f": {shown(value)}")
    if unsupported:
        raise UserError(f"another kind of model than CLIP ({first_of(unsupported)})")
    mode = preprocess.get("resize_mode", "shortest")
    if mode not in ("shortest", "squash"):
        raise UserError(f"its settings resize images in the mode {shown(mode)}; it should be shortest or squash")
    width, head_width = vision.get("width", 768), vision.get("head_width", 64)
    heads: Any = f"{shown(width)} / {shown(head_width)}"  # invalid, which `Settings` reports
    if _is_count(width) and _is_count(head_width):
        heads = width // head_width
    quick = model.get("quick_gelu", False) if quick_gelu is None else quick_gelu
    return Settings(
        activation=QUICK_GELU if quick else GELU,
        vision_heads=heads,
        text_heads=text.get("heads", 8),
        resolution=_resolution(vision.get("image_size", 224)),
        preprocessing=Preprocessing(
            _channels(preprocess.get("mean"), CLIP_PREPROCESSING.mean),
            _channels(preprocess.get("std"), CLIP_PREPROCESSING.deviation),
            squash=mode == "squash",
            interpolation=preprocess.get("interpolation", "bicubic"),
            clean_captions=preprocess.get(CLEAN_CAPTIONS, False),
        ),
        sizes=_present(vision, {"patch_size": "patch_size", "vision_width": "width", "vision_layers": "layers"})
        | _present(text, {"vocab_size": "vocab_size", "text_width": "width", "text_layers": "layers"})
        | _present(model, {"embed_dim": "embed_dim"}),
    )


# ---- Hugging Face ---------------------------------------------------------------------------------------------------


def settings_from_hugging_face(model: dict[str, Any], processor: dict[str, Any] | None) -> Settings:
    """Reads the settings of a `CLIPModel` and of its image processor.

    Args:
        model: `config.json` of the model; its defaults are those of ViT-B/32.
        processor: settings of the image processor, or None.

    Raises UserError if it is another kind of model, or its encoders differ from CLIP's.
    """
    if model.get("model_type") != "clip":
        found = shown(model.get("model_type"))
        raise UserError(f"config.json is for a model of type {found}, not of a CLIPModel (clip)")
    # Old files contain a second section for each encoder, which overrides the first.
    vision, text = (_section(model, f"{t}_config") | _section(model, f"{t}_config_dict") for t in ("vision", "text"))
    activations = {_as_name(encoder.get("hidden_act", QUICK_GELU)) for encoder in (vision, text)}
    if len(activations) > 1 or not activations <= ACTIVATIONS.keys():
        found = " and ".join(map(repr, sorted(activations)))
        raise UserError(f"config.json: hidden_act is {found}; both encoders should have quick_gelu, or both gelu")
    epsilons = [encoder.get("layer_norm_eps", 1e-5) for encoder in (vision, text)]
    if epsilons != [1e-5, 1e-5]:
        raise UserError(f"config.json: layer_norm_eps is {shown(epsilons)}; only CLIP's 1e-05 is supported")
    common = {"width": "hidden_size", "layers": "num_hidden_layers"}
    return Settings(
        activation=activations.pop(),
        vision_heads=vision.get("num_attention_heads", 12),
        text_heads=text.get("num_attention_heads", 8),
        resolution=_resolution(vision.get("image_size", 224)),
        preprocessing=None if processor is None else _preprocessing_of(processor),
        sizes=_present(vision, {"patch_size": "patch_size"} | {f"vision_{key}": name for key, name in common.items()})
        | _present(text, {"vocab_size": "vocab_size"} | {f"text_{key}": name for key, name in common.items()})
        | _present(model, {"embed_dim": "projection_dim"}),
    )


def _preprocessing_of(processor: dict[str, Any]) -> Preprocessing:
    names = {number: name for name, number in INTERPOLATIONS.items()}
    resample = processor.get("resample", INTERPOLATIONS["bicubic"])
    return Preprocessing(
        _channels(processor.get("image_mean"), CLIP_PREPROCESSING.mean),
        _channels(processor.get("image_std"), CLIP_PREPROCESSING.deviation),
        squash=not processor.get("do_center_crop", True) and "height" in _section(processor, "size"),
        interpolation=_as_name(names.get(resample, resample) if isinstance(resample, int) else resample),
        clean_captions=processor.get(CLEAN_CAPTIONS, False),
    )
