"""Exports a model for open_clip, Hugging Face's transformers, and ONNX runtimes.

Each form is a folder with the weights, the model's settings, the preprocessing of images, and the tokenizer.
"""

import errno
import importlib.util
import json
import logging
import warnings
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn

from misc.errors import DISK_FULL, UserError
from misc.files import atomic_folder, check_new_path
from model.architecture import QUICK_GELU, Architecture
from model.preprocessing import INTERPOLATIONS, Preprocessing
from model.pretrained.names import from_ours, to_hugging_face
from model.pretrained.settings import CLEAN_CAPTIONS
from model.tbps_clip import TBPSCLIP
from text_utils.tokenizer import END, SPELLED, START, Tokenizer

OPSET = 18
"""The ONNX operator set, from 2022: recent runtimes support it."""
UNWRITABLE = (errno.EEXIST, errno.ENOTDIR, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG)
"""Error numbers for a path that cannot be written to."""
MAX_SINGLE_FILE_BYTES = 1_800_000_000
"""The size of weights up to which an ONNX model is a single file; the format allows at most 2 GB."""


@dataclass(frozen=True)
class Export:
    """The content of an export.

    Attributes:
        model: the model in evaluation mode, with float32 parameters on any device.
        architecture: sizes of `model`.
        preprocessing: preprocessing of images and captions.
        tokenizer: tokenizer of captions.
    """

    model: TBPSCLIP
    architecture: Architecture
    preprocessing: Preprocessing
    tokenizer: Tokenizer


def export(form: str, folder: Path, content: Export) -> str:
    """Writes a new folder. If this fails, nothing is left.

    Args:
        form: a key of `FORMS`.
        folder: path of the new folder.
        content: what to write.

    Returns: a line for the log.

    Raises UserError if the form is unknown or does not support the model, the folder exists or cannot be written, or a
    package is not installed or too old.
    """
    check_export(form, folder, content.architecture.resolution)
    if content.model.logit_scale.device.type != "cpu":
        content = replace(content, model=deepcopy(content.model).cpu())
    try:
        with atomic_folder(folder) as part:
            FORMS[form](part, content)
            files = sorted(part.iterdir())
            size = sum(file.stat().st_size for file in files) / 1e6
    except OSError as error:
        if error.errno not in (*DISK_FULL, *UNWRITABLE):
            raise
        remedy = "free some space" if error.errno in DISK_FULL else "choose another folder"
        raise UserError(f"--export: {folder} cannot be written ({error.strerror}): {remedy}") from error
    return f"exported for {form} to {folder}: {', '.join(file.name for file in files)} ({size:.1f} MB)"


def check_export(form: str, folder: Path, resolution: tuple[int, int] | None = None) -> None:
    """Checks an export before the weights are read.

    Args:
        resolution: (height, width) of the model in pixels; None if it is not known yet.

    Raises UserError if `export` would refuse it.
    """
    if form not in FORMS:
        raise UserError(f"--export: unknown form {form}: choose one of {', '.join(FORMS)}")
    check_new_path(folder, "--export", "choose another folder")
    if form == "onnx" and not all(importlib.util.find_spec(name) for name in ("onnx", "onnxscript")):
        raise UserError("--export onnx needs two packages that are not installed: pip install onnx onnxscript")
    if form == "onnx" and not supports_onnx():
        raise UserError(
            f"--export onnx needs torch 2.6 or newer, but this is torch {torch.__version__}: "
            "pip install --upgrade torch torchvision"
        )
    if form == "huggingface" and resolution is not None and resolution[0] != resolution[1]:
        raise UserError(
            f"--export huggingface: CLIPModel supports only square images, but this model takes {resolution[0]} × "
            f"{resolution[1]} pixels: export it as openclip or onnx"
        )


def supports_onnx() -> bool:
    """Whether this torch can export to ONNX without TorchScript. Its former exporter knows no `dynamic_shapes`."""
    return hasattr(torch.onnx.ONNXProgram, "optimize")


# ---- open_clip ------------------------------------------------------------------------------------------------------


def _write_open_clip(folder: Path, content: Export) -> None:
    """Writes a folder for `open_clip.create_model_and_transforms("local-dir:FOLDER")` and `get_tokenizer`."""
    sizes, preprocessing = content.architecture, content.preprocessing
    image_size = (
        list(content.architecture.resolution)
        if content.architecture.resolution[0] != content.architecture.resolution[1]
        else content.architecture.resolution[0]
    )
    model = {
        "embed_dim": sizes.embed_dim,
        "quick_gelu": sizes.activation == QUICK_GELU,
        "vision_cfg": {
            "image_size": image_size,
            "patch_size": sizes.patch_size,
            "width": sizes.vision_width,
            "layers": sizes.vision_layers,
            "head_width": sizes.vision_width // sizes.vision_heads,
        },
        "text_cfg": {
            "context_length": content.architecture.text_length,
            "vocab_size": sizes.vocab_size,
            "width": sizes.text_width,
            "layers": sizes.text_layers,
            "heads": sizes.text_heads,
        },
    }
    preprocess = {
        "mean": list(preprocessing.mean),
        "std": list(preprocessing.deviation),
        "interpolation": preprocessing.interpolation,
        "resize_mode": "squash" if preprocessing.squash else "shortest",
        CLEAN_CAPTIONS: preprocessing.clean_captions,
    }
    _write_json(folder / "open_clip_config.json", {"model_cfg": model, "preprocess_cfg": preprocess})
    _write_tensors(folder / "open_clip_model.safetensors", _state(content.model))


# ---- Hugging Face ---------------------------------------------------------------------------------------------------


def _write_hugging_face(folder: Path, content: Export) -> None:
    """Writes a folder for `CLIPModel.from_pretrained("FOLDER")` and `CLIPProcessor`."""
    sizes = content.architecture
    configs = {
        encoder: {
            "model_type": f"clip_{encoder}_model",
            "hidden_size": getattr(sizes, f"{encoder}_width"),
            "intermediate_size": 4 * getattr(sizes, f"{encoder}_width"),
            "num_hidden_layers": getattr(sizes, f"{encoder}_layers"),
            "num_attention_heads": getattr(sizes, f"{encoder}_heads"),
            "projection_dim": sizes.embed_dim,
            "hidden_act": sizes.activation,
            "layer_norm_eps": 1e-5,
        }
        for encoder in ("vision", "text")
    }
    configs["vision"] |= {
        "image_size": sizes.resolution[0],
        "patch_size": sizes.patch_size,
        "num_channels": 3,
    }
    configs["text"] |= {
        "vocab_size": sizes.vocab_size,
        "max_position_embeddings": content.architecture.text_length,
        "bos_token_id": START,
        "eos_token_id": END,
        "pad_token_id": END,
    }
    config = {
        "model_type": "clip",
        "architectures": ["CLIPModel"],
        "projection_dim": sizes.embed_dim,
        "logit_scale_init_value": content.model.logit_scale.item(),
        "vision_config": configs["vision"],
        "text_config": configs["text"],
    }
    _write_json(folder / "config.json", config)
    _write_tensors(folder / "model.safetensors", to_hugging_face(_state(content.model)))
    _write_image_processor(folder, content)
    _write_tokenizer(folder, content)


def _write_image_processor(folder: Path, content: Export) -> None:
    height, width = content.architecture.resolution
    preprocessing = content.preprocessing
    processor = {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"height": height, "width": width} if preprocessing.squash else {"shortest_edge": min(height, width)},
        "resample": INTERPOLATIONS[preprocessing.interpolation],
        "do_center_crop": not preprocessing.squash,
        "crop_size": {"height": height, "width": width},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(preprocessing.mean),
        "image_std": list(preprocessing.deviation),
        CLEAN_CAPTIONS: preprocessing.clean_captions,
    }
    _write_json(folder / "preprocessor_config.json", processor)


def _write_tokenizer(folder: Path, content: Export) -> None:
    """Writes the tokenizer for `CLIPTokenizer`.

    It returns the same ids as ours, but does not fix broken encodings and HTML entities.
    """
    start, end = SPELLED[START], SPELLED[END]
    specials = {"bos_token": start, "eos_token": end, "unk_token": end, "pad_token": end}
    _write_json(folder / "vocab.json", content.tokenizer.vocabulary, indent=None)
    merges = "\n".join(" ".join(pair) for pair in content.tokenizer.merges)
    (folder / "merges.txt").write_text(f"#version: 0.2\n{merges}\n", encoding="utf-8")
    _write_json(folder / "special_tokens_map.json", specials)
    tokenizer = {
        "tokenizer_class": "CLIPTokenizer",
        "do_lower_case": True,
        "model_max_length": content.architecture.text_length,
    }
    _write_json(folder / "tokenizer_config.json", tokenizer | specials)


# ---- ONNX -----------------------------------------------------------------------------------------------------------


def _write_onnx(folder: Path, content: Export) -> None:
    """Writes `image_encoder.onnx` and `text_encoder.onnx`, for any batch size, and the files of a `CLIPProcessor`.

    Features are not L2-normalised. The metadata of both models contains `logit_scale`, before its exponential.
    """
    height, width = content.architecture.resolution
    # Any number is a limit that suffices. Without one, torch 2.6 fixes the batch size to that of the example.
    batch = torch.export.Dim("batch", max=2**31 - 1)
    length = torch.export.Dim("length", min=2, max=content.architecture.text_length)
    images = torch.zeros(2, 3, height, width)
    token_ids = torch.tensor([[START, END, *[0] * (content.architecture.text_length - 2)]] * 2)
    settings = {"logit_scale": repr(content.model.logit_scale.item()), "activation": content.architecture.activation}
    for name, encoder, inputs, dimensions in (
        ("image", content.model.image_encoder, {"images": images}, {0: batch}),
        ("text", content.model.text_encoder, {"token_ids": token_ids}, {0: batch, 1: length}),
    ):
        _write_onnx_model(folder / f"{name}_encoder.onnx", encoder, inputs, dimensions, settings)
    _write_image_processor(folder, content)
    _write_tokenizer(folder, content)


def _write_onnx_model(
    path: Path, encoder: nn.Module, inputs: dict[str, Tensor], dimensions: dict[int, Any], settings: dict[str, str]
) -> None:
    size = sum(parameter.nbytes for parameter in encoder.parameters())
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")  # torch's exporter uses deprecated functions
            program = torch.onnx.export(
                encoder,
                tuple(inputs.values()),
                input_names=list(inputs),
                output_names=["features"],
                dynamic_shapes=(dimensions,),
                opset_version=OPSET,
                dynamo=True,
                verbose=False,
            )
    finally:
        logger.setLevel(level)
    assert program is not None  # only without `dynamo`
    program.model.metadata_props.update(settings)
    program.save(str(path), external_data=size > MAX_SINGLE_FILE_BYTES)


# ---------------------------------------------------------------------------------------------------------------------


def _state(model: TBPSCLIP) -> dict[str, Tensor]:
    """Returns the tensors of the encoders and the temperature, under OpenAI's names."""
    return {name: value.contiguous() for name, value in from_ours(model.state_dict()).items()}


def _write_tensors(path: Path, state: dict[str, Tensor]) -> None:
    # Written by Python, so that a full disk raises OSError and the file gets the usual permissions.
    path.write_bytes(save(state, metadata={"format": "pt"}))


def _write_json(path: Path, content: dict[str, Any], indent: int | None = 2) -> None:
    path.write_text(json.dumps(content, indent=indent, ensure_ascii=False) + "\n", encoding="utf-8")


FORMS: dict[str, Callable[[Path, Export], None]] = {
    "openclip": _write_open_clip,
    "huggingface": _write_hugging_face,
    "onnx": _write_onnx,
}
