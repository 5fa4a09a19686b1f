"""What the tensors of a CLIP do not tell, and what is written beside them in the forms that have a place for it."""

from dataclasses import dataclass, field
from typing import Any

from misc.errors import UserError, first_of
from model.architecture import GELU, QUICK_GELU
from model.preprocessing import CLIP_PREPROCESSING, INTERPOLATIONS, TBPS_PREPROCESSING, Preprocessing
from model.transformer import ACTIVATIONS


@dataclass(frozen=True)
class Settings:
    """What is written beside the tensors; None where nothing is.

    Attributes:
        activation: a key of `ACTIVATIONS`.
        vision_heads, text_heads: attention heads.
        resolution: (height, width) in pixels.
        preprocessing: of images.
        sizes: what the tensors tell themselves, as a check; named as in the configuration's section `model`.
    """

    activation: str | None = None
    vision_heads: int | None = None
    text_heads: int | None = None
    resolution: tuple[int, int] | None = None
    preprocessing: Preprocessing | None = None
    sizes: dict[str, int] = field(default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        """Raises UserError for values that cannot be: they come from files of others."""
        for what, values in (("attention heads", (self.vision_heads, self.text_heads)), ("pixels", self.resolution)):
            for value in values or ():
                if value is not None and not _is_count(value):
                    raise UserError(f"its settings tell of {value!r} {what}, where a number must be")
        if self.activation is not None and self.activation not in ACTIVATIONS:
            raise UserError(
                f"its settings tell of the activation {self.activation!r}, not of {' or '.join(ACTIVATIONS)}"
            )

    def check(self, sizes: dict[str, int]) -> None:
        """Raises UserError where they are of another model than the tensors, whose sizes these are."""
        differing = [f"{key} {value!r}" for key, value in self.sizes.items() if value != sizes[key]]
        if differing:
            found = ", ".join(f"{key} {sizes[key]}" for key, value in self.sizes.items() if value != sizes[key])
            raise UserError(
                f"its settings tell of {', '.join(differing)}, its tensors of {found}: they are of two models"
            )
        for heads, width in ((self.vision_heads, sizes["vision_width"]), (self.text_heads, sizes["text_width"])):
            if heads and width % heads:
                raise UserError(f"its settings are for {heads} attention heads, which do not divide the width {width}")


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _section(config: dict[str, Any], key: str) -> dict[str, Any]:
    """What lies under a key, or nothing where that is no section."""
    value = config.get(key)
    return value if isinstance(value, dict) else {}


def _channels(values: Any, default: tuple[float, ...]) -> tuple[float, ...]:
    return default if values is None else tuple(values) if isinstance(values, list | tuple) else (values,)


def _present(section: dict[str, Any], keys: dict[str, str]) -> dict[str, Any]:
    """The values of a section under our names, where it has them."""
    return {ours: section[theirs] for ours, theirs in keys.items() if theirs in section}


def _resolution(value: Any) -> tuple[int, int] | None:
    """(height, width) from one integer or two; None from anything else."""
    if isinstance(value, int):
        return value, value
    return (value[0], value[1]) if isinstance(value, list | tuple) and len(value) == 2 else None


# ---- checkpoints of TBPS-CLIP ---------------------------------------------------------------------------------------


def of_checkpoint(config: dict[str, Any]) -> Settings:
    """From the configuration in a checkpoint; the published code, and ours at first, knew QuickGELU alone."""
    model = _section(config, "model")
    sizes = ("patch_size", "vision_width", "vision_layers", "text_width", "text_layers", "embed_dim", "vocab_size")
    dropped, layers = model.get("dropped_text_layers"), model.get("text_layers")
    if isinstance(dropped, list) and _is_count(layers):  # counted before they were dropped
        model = model | {"text_layers": layers - len(dropped)}
    return Settings(
        activation=model.get("activation", QUICK_GELU),
        vision_heads=model.get("vision_heads"),
        text_heads=model.get("text_heads"),
        resolution=_resolution(_section(config, "experiment").get("input_resolution")),
        preprocessing=TBPS_PREPROCESSING,
        sizes=_present(model, {key: key for key in sizes}),
    )


# ---- open_clip ------------------------------------------------------------------------------------------------------


# What open_clip's configurations may hold of a plain CLIP, and further keys with the value that changes nothing.
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
    strange = [] if isinstance(vision.get("layers", 12), int) else [f"vision_cfg.layers: {vision['layers']!r}"]
    for section, allowed in _PLAIN.items():
        for key, value in (model[section] if section else model).items():
            if key not in allowed and value and value not in _NO_CHANGE.get(key, ()):
                strange.append(f"{section}.{key}".lstrip(".") + f": {value!r}")
    if strange:
        raise UserError(f"another kind of model than CLIP ({first_of(strange)})")
    mode = preprocess.get("resize_mode", "shortest")
    if mode not in ("shortest", "squash"):
        raise UserError(f"its settings resize images in the mode {mode!r}, not in shortest or squash")
    width, head_width = vision.get("width", 768), vision.get("head_width", 64)
    recorded = _is_count(width) and _is_count(head_width)
    quick = model.get("quick_gelu", False) if quick_gelu is None else quick_gelu
    return Settings(
        activation=QUICK_GELU if quick else GELU,
        vision_heads=width // head_width if recorded else f"{width!r} / {head_width!r}",
        text_heads=text.get("heads", 8),
        resolution=_resolution(vision.get("image_size", 224)),
        preprocessing=Preprocessing(
            _channels(preprocess.get("mean"), CLIP_PREPROCESSING.mean),
            _channels(preprocess.get("std"), CLIP_PREPROCESSING.deviation),
            squash=mode == "squash",
            interpolation=preprocess.get("interpolation", "bicubic"),
        ),
        sizes=_present(vision, {"patch_size": "patch_size", "vision_width": "width", "vision_layers": "layers"})
        | _present(text, {"vocab_size": "vocab_size", "text_width": "width", "text_layers": "layers"})
        | _present(model, {"embed_dim": "embed_dim"}),
    )


# ---- Hugging Face ---------------------------------------------------------------------------------------------------


def of_hugging_face(model: dict[str, Any], processor: dict[str, Any] | None) -> Settings:
    """From the `config.json` of a `CLIPModel`, whose defaults are ViT-B/32's, and the settings of its image processor.

    Raises: UserError where it is another kind of model, or its towers are computed in another way than CLIP's.
    """
    if model.get("model_type") != "clip":
        raise UserError(f"config.json is of a model of type {model.get('model_type')!r}, not of a CLIPModel (clip)")
    # Files of old hold a second section for each tower, which overrules the first.
    vision, text = (_section(model, f"{t}_config") | _section(model, f"{t}_config_dict") for t in ("vision", "text"))
    activations = {str(tower.get("hidden_act", QUICK_GELU)) for tower in (vision, text)}
    if len(activations) > 1 or not activations <= ACTIVATIONS.keys():
        found = " and ".join(map(repr, sorted(activations)))
        raise UserError(f"config.json: hidden_act is {found}, where both towers should have quick_gelu, or both gelu")
    epsilons = [tower.get("layer_norm_eps", 1e-5) for tower in (vision, text)]
    if epsilons != [1e-5, 1e-5]:
        raise UserError(f"config.json: layer_norm_eps is {epsilons!r}, where CLIP has 1e-05")
    common = {"width": "hidden_size", "layers": "num_hidden_layers"}
    return Settings(
        activation=activations.pop(),
        vision_heads=vision.get("num_attention_heads", 12),
        text_heads=text.get("num_attention_heads", 8),
        resolution=_resolution(vision.get("image_size", 224)),
        preprocessing=None if processor is None else _of_image_processor(processor),
        sizes=_present(vision, {"patch_size": "patch_size"} | {f"vision_{key}": name for key, name in common.items()})
        | _present(text, {"vocab_size": "vocab_size"} | {f"text_{key}": name for key, name in common.items()})
        | _present(model, {"embed_dim": "projection_dim"}),
    )


def _of_image_processor(processor: dict[str, Any]) -> Preprocessing:
    names = {number: name for name, number in INTERPOLATIONS.items()}
    resample = processor.get("resample", INTERPOLATIONS["bicubic"])
    return Preprocessing(
        _channels(processor.get("image_mean"), CLIP_PREPROCESSING.mean),
        _channels(processor.get("image_std"), CLIP_PREPROCESSING.deviation),
        squash=not processor.get("do_center_crop", True) and "height" in _section(processor, "size"),
        interpolation=names.get(resample, str(resample)) if isinstance(resample, int) else str(resample),
    )
