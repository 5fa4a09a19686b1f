"""The weights of a CLIP, from whatever holds them: a file, a folder, or a tag of open_clip."""

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
from misc.files import is_file, is_folder
from model.architecture import QUICK_GELU
from model.preprocessing import CLIP_PREPROCESSING, TBPS_PREPROCESSING, Preprocessing
from model.pretrained import names, registry, settings
from model.pretrained.archives import EXPECTED, open_archive
from model.pretrained.settings import Settings
from model.pretrained.sizes import read_sizes

# Entries that are settings or tables of positions, not weights.
OPENAI_SETTINGS = {"input_resolution", "context_length", "vocab_size"}  # int64 scalars, which its archives alone hold
POSITIONS = ".position_ids"  # of older files of Hugging Face

OPEN_CLIP_FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
HUGGING_FACE_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)


@dataclass(frozen=True)
class Location:
    """Where weights lie, and what is known of them besides.

    Attributes:
        path: file or folder.
        name: for messages: the path, with MODEL/TAG in front where it is that of a tag.
        settings: what a registry told.
    """

    path: Path
    name: str
    settings: Settings = field(default_factory=Settings)


@dataclass(frozen=True)
class Weights:
    """All of a CLIP, checked: every tensor is there, has its shape, and is finite.

    Attributes:
        name: where they come from.
        form: what that is, in words.
        state: tensors under OpenAI's names, float32, on the CPU; nothing depends on the file any more.
        heads: tensors of training heads under our names, where a checkpoint of TBPS-CLIP has some.
        sizes: `patch_size`, `vision_width`, `vision_layers`, `text_width`, `text_layers`, `embed_dim` and `vocab_size`.
        settings: what is written beside the tensors.
        grid: (height, width) in patches that the position embeddings are for, where that is told or, as of CLIP's own
            weights, known to be square; else None.
    """

    name: str
    form: str
    state: dict[str, Tensor]
    heads: dict[str, Tensor]
    sizes: dict[str, int]
    settings: Settings
    grid: tuple[int, int] | None

    @property
    def patches(self) -> int:
        """Of an image."""
        return len(self.state["visual.positional_embedding"]) - 1

    @property
    def text_length(self) -> int:
        """Tokens of a caption that the weights are for."""
        return len(self.state["positional_embedding"])

    @property
    def preprocessing(self) -> Preprocessing:
        """Of the images that they were trained on; OpenAI's where nothing tells."""
        return self.settings.preprocessing or CLIP_PREPROCESSING

    def activation(self, given: str | None) -> str:
        """What the weights tell, else what is `given`.

        Raises: UserError where it is neither told nor given: guessing wrong would cost accuracy without a word.
        """
        chosen = self.settings.activation or given
        if chosen is None:
            raise UserError(
                f"{self.name}: nothing in it tells which activation it was trained with: set "
                "model.activation=quick_gelu (OpenAI, MetaCLIP, DFN) or model.activation=gelu (LAION, DataComp)"
            )
        return chosen


def square_grid(patches: int) -> tuple[int, int] | None:
    """(height, width) of a square of so many patches; None where they form none."""
    side = math.isqrt(max(0, patches))
    return (side, side) if side > 0 and side * side == patches else None


# ---- finding and reading --------------------------------------------------------------------------------------------


def find_weights(source: str | Path) -> Location:
    """Where the weights are that the user named; those of a tag are on this machine then.

    Args:
        source: path of a file or folder, or a tag of open_clip, TAG or MODEL/TAG.

    Raises: UserError, naming the source, where there is nothing of that name, or it cannot be downloaded.
    """
    if is_file(source) or is_folder(source) or not registry.may_be_tag(str(source)):
        return Location(Path(source), str(source))
    with _naming(str(source)):
        entry = registry.find_entry(str(source))
    path = registry.fetch(entry)
    return Location(path, f"{entry.name} ({path})", entry.settings)


def read_weights(source: str | Path | Location) -> Weights:
    """Reads a CLIP in any form, told from the content. No code in a file is run.

    Args:
        source: a file: OpenAI's TorchScript archive; a state dict (torch.save or safetensors; also under `state_dict`
            and with the prefix `module.`) in the names of OpenAI, open_clip, Hugging Face, the published code or ours;
            a checkpoint of the published code or of ours. A folder: of Hugging Face's `CLIPModel` or of open_clip. A
            tag of open_clip.

    Raises: UserError, naming the source, for everything else, and for what is damaged or incomplete.
    """
    location = source if isinstance(source, Location) else find_weights(source)
    with _naming(location.name):
        kind, content, recorded = _open(location)
        entries, checkpoint = _state_dict(content)
        state = _tensors(entries)
        scheme = names.scheme_of(state)
        if checkpoint is not None and scheme in names.TBPS_SCHEMES:
            recorded, form = settings.of_checkpoint(checkpoint["config"]), _age(scheme, checkpoint)
        else:
            recorded, form = _complete(recorded, scheme, entries), _form(kind, scheme)
        state, heads = _to_openai_names(state, scheme)
        sizes = read_sizes({name: tuple(tensor.shape) for name, tensor in state.items()})
        recorded.check(sizes)
        grid = _grid(len(state["visual.positional_embedding"]) - 1, sizes["patch_size"], recorded.resolution)
        if grid is None and scheme not in names.TBPS_SCHEMES:
            grid = square_grid(len(state["visual.positional_embedding"]) - 1)
        state, heads = _finite_copies(state), _finite_copies(heads)
    return Weights(location.name, form, state, heads, sizes, recorded, grid)


@contextmanager
def _naming(name: str) -> Iterator[None]:
    """Puts the source in front of the message of a UserError."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{name}: {error}") from error


def _open(location: Location) -> tuple[str, Any, Settings]:
    """What kind of file or folder it is, what it holds, and what is told beside the tensors."""
    folder = location.path
    if not is_folder(folder):
        return *open_archive(folder), location.settings
    if (files := _first_file(folder, OPEN_CLIP_FILES)) and is_file(folder / "open_clip_config.json"):
        config = _read_json(folder / "open_clip_config.json")
        sections = (config.get(key) for key in ("model_cfg", "preprocess_cfg"))
        recorded = settings.of_open_clip(*(section if isinstance(section, dict) else {} for section in sections))
        return "folder of open_clip", _read_parts(files), recorded
    if (files := _first_file(folder, HUGGING_FACE_FILES)) and is_file(folder / "config.json"):
        recorded = settings.of_hugging_face(_read_json(folder / "config.json"), _image_processor(folder))
        return "folder of Hugging Face", _read_parts(files), recorded
    inside = next(iter(sorted(folder.glob("checkpoint_*.pth"))), None)
    either, other = f"config.json and {HUGGING_FACE_FILES[0]}", f"open_clip_config.json and {OPEN_CLIP_FILES[0]}"
    hint = f"give the file {inside}" if inside else f"it should hold {either}, or {other}"
    raise UserError(f"a folder, but none of Hugging Face or open_clip: {hint}")


def _first_file(folder: Path, candidates: tuple[str, ...]) -> Path | None:
    return next((folder / name for name in candidates if is_file(folder / name)), None)


def _image_processor(folder: Path) -> dict[str, Any] | None:
    """Settings of Hugging Face's image processor: a file of its own, or a section of the one of the whole processor."""
    if is_file(folder / "preprocessor_config.json"):
        return _read_json(folder / "preprocessor_config.json")
    if is_file(folder / "processor_config.json"):  # as transformers 5 saves it
        section = _read_json(folder / "processor_config.json").get("image_processor")
        return section if isinstance(section, dict) else None
    return None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path.name} cannot be read ({' '.join(str(error).split())}): get it again") from error
    if not isinstance(content, dict):
        raise UserError(f"{path.name} holds a {type(content).__name__} where keys and values should be: get it again")
    return content


def _read_parts(path: Path) -> dict[str, Any]:
    """The state dict of a file; an index names files that hold a part each."""
    if not path.name.endswith(".index.json"):
        return _state_dict(open_archive(path)[1])[0]
    parts = _read_json(path).get("weight_map")
    if not isinstance(parts, dict) or not all(isinstance(part, str) for part in parts.values()):
        raise UserError(f"{path.name} has no weight_map from names to files: get it again")
    state: dict[str, Any] = {}
    for part in sorted(set(parts.values())):
        if Path(part).name != part or not is_file(path.parent / part):
            raise UserError(f"{part!r}, which {path.name} names, is not in it: get the folder again")
        state |= _state_dict(open_archive(path.parent / part)[1])[0]
    return state


# ---- from content to checked tensors --------------------------------------------------------------------------------


def _state_dict(content: Any) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Names and tensors inside what a file holds, and the rest of what may be a checkpoint of TBPS-CLIP."""
    checkpoint = None
    if isinstance(content, dict) and isinstance(content.get("model"), dict):
        checkpoint = content if isinstance(content.get("config"), dict) else None
        content = content["model"]
    elif isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    if not isinstance(content, dict) or not content or not all(isinstance(name, str) for name in content):
        raise UserError(f"no state dict (names to tensors) but a {type(content).__name__}; {EXPECTED}")
    if all(name.startswith("module.") for name in content):
        content = {name.removeprefix("module."): value for name, value in content.items()}
    return content, checkpoint


def _tensors(entries: dict[str, Any]) -> dict[str, Tensor]:
    """The weights among the entries of a state dict, as they lie in the file."""
    state = {name: value for name, value in entries.items() if name not in OPENAI_SETTINGS}
    state = {name: value for name, value in state.items() if not name.endswith(POSITIONS)}
    strange = [f"{name!r} ({_kind(value)})" for name, value in state.items() if not _is_plain(value)]
    if strange:
        raise UserError(f"{first_of(strange)}, where floating point tensors must be; {EXPECTED}")
    return state


def _is_plain(value: Any) -> bool:
    """Whether it is a dense tensor of floating point numbers that are all stored."""
    return (
        isinstance(value, Tensor)
        and value.is_floating_point()
        and value.layout is torch.strided
        and value.device.type == "cpu"
        and not value.is_nested
        and value.numel() * value.element_size() <= value.untyped_storage().nbytes()
    )


def _kind(value: Any) -> str:
    if not isinstance(value, Tensor):
        return type(value).__name__
    return str(value.dtype) if not value.is_floating_point() else "not a dense tensor"


def _complete(recorded: Settings, scheme: str, entries: dict[str, Any]) -> Settings:
    """What a bare state dict tells by its names: whose code it was trained with."""
    if scheme == "published":
        return Settings(QUICK_GELU, preprocessing=TBPS_PREPROCESSING)
    if scheme == "ours":
        return Settings(preprocessing=TBPS_PREPROCESSING)
    if recorded.activation is None and entries.keys() >= OPENAI_SETTINGS:
        return Settings(QUICK_GELU)
    return recorded


def _to_openai_names(state: dict[str, Tensor], scheme: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Towers and temperature under OpenAI's names, and training heads under ours."""
    heads: dict[str, Tensor] = {}
    if scheme == "published":
        state = {names.ours_from_published(name): value for name, value in state.items()}
    if scheme in names.TBPS_SCHEMES:
        heads = {name: value for name, value in state.items() if name.startswith(names.HEADS)}
        state = names.from_ours({name: value for name, value in state.items() if name not in heads})
    elif scheme == "Hugging Face":
        state = names.from_hugging_face(state)
    if "logit_scale" in state and state["logit_scale"].numel() == 1:
        state["logit_scale"] = state["logit_scale"].reshape(())  # some write it with one dimension
    return state, heads


def _finite_copies(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """In float32 and independent of the file."""
    copies = {name: value.detach().to(torch.float32, copy=True) for name, value in state.items()}
    broken = [name for name, value in copies.items() if not value.isfinite().all()]
    if broken:
        raise UserError(f"NaN or infinity in {first_of(broken)}; use weights from before the training broke down")
    return copies


def _grid(patches: int, patch_size: int, resolution: tuple[int, int] | None) -> tuple[int, int] | None:
    """(height, width) in patches, where the resolution in pixels is told."""
    if resolution is None:
        return None
    grid = (resolution[0] // patch_size, resolution[1] // patch_size)
    if grid[0] * grid[1] != patches:
        raise UserError(
            f"visual.positional_embedding is for {patches} patches, its settings are for {resolution[0]} × "
            f"{resolution[1]} pixels, {grid[0]} × {grid[1]} patches: they are of two models"
        )
    return grid


# ---- in words -------------------------------------------------------------------------------------------------------


def _form(kind: str, scheme: str) -> str:
    """What was read, for the log."""
    return kind if kind.startswith("folder") else f"{kind}, names of {names.WHOSE.get(scheme, scheme)}"


def _age(scheme: str, checkpoint: dict[str, Any]) -> str:
    """What kind of checkpoint was read and how long it has been trained, for the log."""
    if scheme == "published":
        return "checkpoint of the published code"
    progress = checkpoint.get("progress")
    steps = progress.get("step", 0) if isinstance(progress, dict) else 0
    age = f", epoch {checkpoint['epoch']}" if checkpoint.get("epoch") is not None else ""
    return f"checkpoint of TBPS-CLIP{age}" + (f" and {steps} steps" if steps else "")
