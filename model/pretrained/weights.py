"""Reads the weights of a CLIP from a file, a folder, or a tag of open_clip."""

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from misc.errors import UserError, first_of
from misc.files import find_files, is_file, is_folder
from model.architecture import QUICK_GELU, Sizes
from model.preprocessing import CLIP_PREPROCESSING, Preprocessing
from model.pretrained import names, registry
from model.pretrained.archives import EXPECTED, open_archive
from model.pretrained.settings import (
    Settings,
    settings_from_checkpoint,
    settings_from_hugging_face,
    settings_from_open_clip,
)
from model.pretrained.sizes import read_sizes
from model.pretrained.wrappings import Unwrapped, unwrap

# Entries that are settings or tables of positions, not weights.
OPENAI_SETTINGS = {"input_resolution", "context_length", "vocab_size"}  # int64 scalars, only in OpenAI's archives
POSITIONS = ".position_ids"  # in older files of Hugging Face

FORMATS = (
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.float8_e4m3fnuz,
    torch.float8_e5m2,
    torch.float8_e5m2fnuz,
)
"""The number formats of weights; torch cannot convert numbers of four bits."""

OPEN_CLIP_FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
HUGGING_FACE_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)


@dataclass(frozen=True)
class Location:
    """The location of weights, and the settings that a registry records for them.

    Attributes:
        path: file or folder.
        name: name for messages: the path, after MODEL/TAG if it belongs to a tag.
        settings: settings from the registry; empty for a path.
    """

    path: Path
    name: str
    settings: Settings = field(default_factory=Settings)


@dataclass(frozen=True)
class Weights:
    """The checked weights of a CLIP: every tensor exists, has the right shape, and is finite.

    Attributes:
        name: their source, for messages.
        form: kind of the source, in words.
        state: tensors under OpenAI's names, float32, on the CPU, independent of the file.
        heads: tensors of training heads and adaptations under our names; empty if the source has none.
        sizes: sizes of the encoders.
        settings: settings that are recorded with the tensors.
        grid: (height, width) of the position embeddings in patches. It is recorded, or assumed to be a square as
            in CLIP's own weights or three times as high as wide as in IRRA's; None if it is unknown.
        config: the configuration of the run that trained them; empty if it is not recorded. Its values are unchecked.
        notes: lines for the log: where the tensors were in the file, and which of it were left out.
    """

    name: str
    form: str
    state: dict[str, Tensor]
    heads: dict[str, Tensor]
    sizes: Sizes
    settings: Settings
    grid: tuple[int, int] | None
    config: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def patches(self) -> int:
        """The number of patches of an image."""
        return len(self.state["visual.positional_embedding"]) - 1

    @property
    def text_length(self) -> int:
        """The maximum number of tokens of a caption."""
        return len(self.state["positional_embedding"])

    @property
    def preprocessing(self) -> Preprocessing:
        """The preprocessing of the training images and captions; OpenAI's if it is not recorded."""
        return self.settings.preprocessing or CLIP_PREPROCESSING

    def activation(self, given: str | None) -> str:
        """Returns the activation that is recorded with the weights, otherwise the `given` one.

        Raises UserError if it is neither recorded nor given, because a wrong guess would silently cost accuracy.
        """
        chosen = self.settings.activation or given
        if chosen is None:
            raise UserError(
                f"{self.name}: it does not record the activation that it was trained with: set "
                "model.activation=quick_gelu (OpenAI, MetaCLIP, DFN) or model.activation=gelu (LAION, DataComp)"
            )
        return chosen


def square_grid(patches: int) -> tuple[int, int] | None:
    """Returns (height, width) of a square with this number of patches; None if they form no square."""
    side = math.isqrt(max(0, patches))
    return (side, side) if side > 0 and side * side == patches else None


def tall_grid(patches: int) -> tuple[int, int] | None:
    """Returns (height, width) in patches of an image that is three times as high as wide; None if there is none."""
    side = square_grid(patches // 3) if patches % 3 == 0 else None
    return None if side is None else (3 * side[0], side[1])


# ---- finding and reading --------------------------------------------------------------------------------------------


def find_weights(source: str | Path) -> Location:
    """Finds the weights that the user named, and downloads those of a tag.

    Args:
        source: path of a file or folder, or a tag of open_clip, TAG or MODEL/TAG.

    Raises UserError, with the source, if it is neither a path nor a tag, or cannot be downloaded.
    """
    if is_file(source) or is_folder(source) or not registry.may_be_tag(str(source)):
        return Location(Path(source), str(source))
    with _source_in_errors(str(source)):
        entry = registry.find_entry(str(source))
    path = registry.fetch(entry)
    return Location(path, f"{entry.name} ({path})", entry.settings)


def read_weights(source: str | Path | Location) -> Weights:
    """Reads the weights of a CLIP. The content decides the form, and code in a file is never run.

    Args:
        source: one of these.
            - A file: OpenAI's TorchScript archive, a state dict (`torch.save` or safetensors), or a checkpoint of the
              published code, ours or IRRA's family. The names are those of OpenAI, open_clip, Hugging Face, the
              published code, ours or IRRA. The state dict can be anywhere in the file, and its names can have a prefix.
            - A folder of Hugging Face's `CLIPModel` or of open_clip.
            - A tag of open_clip.

    Raises UserError, with the source, if it is something else, damaged or incomplete.
    """
    location = source if isinstance(source, Location) else find_weights(source)
    with _source_in_errors(location.name):
        kind, content, settings = _open(location)
        found = unwrap(content)
        if found is None:
            raise UserError(f"not a state dict (names to tensors) but a {type(content).__name__}; {EXPECTED}")
        state = _tensors(found.entries)
        scheme = names.scheme_of(state, found.prefix)
        if scheme.is_tbps_clip and found.keys == ("model",) and isinstance(content.get("config"), dict):
            config = content["config"]
            settings, form = settings_from_checkpoint(config), _describe_checkpoint(scheme, content)
        else:
            config = {}
            settings, form = _implied_settings(settings, scheme, found.entries), _describe_form(kind, scheme)
        state, heads = scheme.convert(state)
        if "logit_scale" in state and state["logit_scale"].numel() == 1:
            state["logit_scale"] = state["logit_scale"].reshape(())  # some tools save it with one dimension
        sizes = read_sizes({name: tuple(tensor.shape) for name, tensor in state.items()})
        settings.check(sizes)
        patches = len(state["visual.positional_embedding"]) - 1
        grid = _grid(patches, sizes.patch_size, settings.resolution)
        if grid is None and not scheme.is_tbps_clip:
            grid = tall_grid(patches) if scheme is names.IRRA else square_grid(patches)
        state, heads = _finite_copies(state), _finite_copies(heads)
    notes = (*found.notes, *_left_out(found, scheme))
    return Weights(location.name, form, state, heads, sizes, settings, grid, config, notes)


@contextmanager
def _source_in_errors(name: str) -> Iterator[None]:
    """Puts the name of the source in front of the message of a UserError."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{name}: {error}") from error


def _open(location: Location) -> tuple[str, Any, Settings]:
    """Returns the kind of file or folder, its content, and the settings that are recorded outside the tensors."""
    folder = location.path
    if not is_folder(folder):
        return *open_archive(folder), location.settings
    if (files := _first_file(folder, OPEN_CLIP_FILES)) and is_file(folder / "open_clip_config.json"):
        config = _read_json(folder / "open_clip_config.json")
        sections = (config.get(key) for key in ("model_cfg", "preprocess_cfg"))
        settings = settings_from_open_clip(*(section if isinstance(section, dict) else {} for section in sections))
        return "folder of open_clip", _read_parts(files), settings
    if (files := _first_file(folder, HUGGING_FACE_FILES)) and is_file(folder / "config.json"):
        settings = settings_from_hugging_face(_read_json(folder / "config.json"), _image_processor(folder))
        return "folder of Hugging Face", _read_parts(files), settings
    inside = next(iter(find_files(folder, "checkpoint_*.pth")), None)
    hugging_face = f"config.json and {HUGGING_FACE_FILES[0]}"
    open_clip = f"open_clip_config.json and {OPEN_CLIP_FILES[0]}"
    hint = f"give the file {inside}" if inside else f"it should contain {hugging_face}, or {open_clip}"
    raise UserError(f"a folder, but not one of Hugging Face or open_clip: {hint}")


def _first_file(folder: Path, candidates: tuple[str, ...]) -> Path | None:
    return next((folder / name for name in candidates if is_file(folder / name)), None)


def _image_processor(folder: Path) -> dict[str, Any] | None:
    """Reads the settings of Hugging Face's image processor: a separate file, or a section of the whole processor's."""
    if is_file(folder / "preprocessor_config.json"):
        return _read_json(folder / "preprocessor_config.json")
    if is_file(folder / "processor_config.json"):  # the format of transformers 5
        section = _read_json(folder / "processor_config.json").get("image_processor")
        return section if isinstance(section, dict) else None
    return None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path.name} cannot be read ({' '.join(str(error).split())}): get it again") from error
    if not isinstance(content, dict):
        raise UserError(f"{path.name} contains a {type(content).__name__} instead of keys and values: get it again")
    return content


def _read_parts(path: Path) -> Any:
    """Reads the content of a file, or of the parts that an index lists."""
    if not path.name.endswith(".index.json"):
        return open_archive(path)[1]
    parts = _read_json(path).get("weight_map")
    if not isinstance(parts, dict) or not all(isinstance(part, str) for part in parts.values()):
        raise UserError(f"{path.name} has no weight_map from names to files: get it again")
    state: dict[str, Any] = {}
    for part in sorted(set(parts.values())):
        if Path(part).name != part or not is_file(path.parent / part):
            raise UserError(f"{part!r}, which {path.name} lists, is not in the folder: get the folder again")
        content = open_archive(path.parent / part)[1]
        if not isinstance(content, dict):
            raise UserError(f"{part} contains no state dict but a {type(content).__name__}: get the folder again")
        state |= content
    return state


# ---- from content to checked tensors --------------------------------------------------------------------------------


def _tensors(entries: dict[str, Any]) -> dict[str, Tensor]:
    """Returns the weights among the entries of a state dict, unchanged."""
    state = {name: value for name, value in entries.items() if name not in OPENAI_SETTINGS}
    state = {name: value for name, value in state.items() if not name.endswith(POSITIONS)}
    unsupported = [f"{name!r} ({_describe_type(value)})" for name, value in state.items() if not _is_dense_float(value)]
    if unsupported:
        raise UserError(f"{first_of(unsupported)} instead of floating point tensors; {EXPECTED}")
    return state


def _is_dense_float(value: Any) -> bool:
    """Whether `value` is a dense floating point tensor whose elements are all stored."""
    return (
        isinstance(value, Tensor)
        and value.dtype in FORMATS
        and value.layout is torch.strided
        and value.device.type == "cpu"
        and not value.is_nested
        and value.numel() * value.element_size() <= value.untyped_storage().nbytes()
    )


def _describe_type(value: Any) -> str:
    if not isinstance(value, Tensor):
        return type(value).__name__
    return str(value.dtype) if value.dtype not in FORMATS else "not a dense tensor"


def _implied_settings(settings: Settings, scheme: names.Scheme, entries: dict[str, Any]) -> Settings:
    """Returns the settings that the names of a bare state dict imply, since they show the code that trained it."""
    if scheme.settings is not None:
        return scheme.settings
    if settings.activation is None and entries.keys() >= OPENAI_SETTINGS:
        return Settings(QUICK_GELU)
    return settings


def _finite_copies(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copies tensors to float32, independent of the file.

    Raises UserError if a value is NaN or infinite.
    """
    copies = {name: value.detach().to(torch.float32, copy=True) for name, value in state.items()}
    broken = [name for name, value in copies.items() if not value.isfinite().all()]
    if broken:
        raise UserError(f"NaN or infinity in {first_of(broken)}: use a checkpoint from before training diverged")
    return copies


def _grid(patches: int, patch_size: int, resolution: tuple[int, int] | None) -> tuple[int, int] | None:
    """Returns (height, width) in patches; None if the resolution in pixels is not recorded.

    Raises UserError if the resolution does not fit the number of patches.
    """
    if resolution is None:
        return None
    grid = (resolution[0] // patch_size, resolution[1] // patch_size)
    if grid[0] * grid[1] != patches:
        raise UserError(
            f"visual.positional_embedding is for {patches} patches, but its settings are for {resolution[0]} × "
            f"{resolution[1]} pixels, {grid[0]} × {grid[1]} patches: they belong to two models"
        )
    return grid


# ---- words for the log -----------------------------------------------------------------------------------------------


def _describe_form(kind: str, scheme: names.Scheme) -> str:
    """Describes the form of the weights, for the log."""
    return kind if kind.startswith("folder") else f"{kind}, names of {scheme.title}"


def _left_out(found: Unwrapped, scheme: names.Scheme) -> list[str]:
    """Names the modules beside the CLIP, which are not read, for the log."""
    outer = found.prefix.removesuffix(names.IRRA_PREFIX)
    modules = list(dict.fromkeys(name.removeprefix(outer).partition(".")[0] for name in found.outside))
    notes = []
    if scheme is names.IRRA:
        notes.append("the file contains no temperature: it is 1/50, IRRA's constant")
        heads, features = ([m for m in modules if m in known] for known in (names.IRRA_HEADS, names.RDE_FEATURES))
        modules = [module for module in modules if module not in heads + features]
        if heads:
            notes.append(f"training heads are left out: {', '.join(heads)}")
        if features:
            notes.append(
                f"warning: {' and '.join(features)} are left out, RDE's second pair of features: its test adds their "
                "cosine, so its published results are not reached"
            )
    if modules:
        notes.append(
            f"warning: {first_of(modules)} beside the CLIP is left out: if its code computes features with it, its "
            "results are not reached"
        )
    return notes


def _describe_checkpoint(scheme: names.Scheme, checkpoint: dict[str, Any]) -> str:
    """Describes a checkpoint and how long it was trained, for the log."""
    if scheme is names.SCHEMES["published"]:
        return "checkpoint of the published code"
    progress = checkpoint.get("progress")
    steps = progress.get("step") if isinstance(progress, dict) else None
    age = f", epoch {checkpoint['epoch']}" if type(checkpoint.get("epoch")) is int else ""
    return f"checkpoint of TBPS-CLIP{age}" + (f" and {steps} steps" if type(steps) is int and steps > 0 else "")
