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
from model.pretrained import names, registry, settings
from model.pretrained.architecture import read_sizes, usual_heads
from model.pretrained.archives import EXPECTED, open_archive
from model.pretrained.settings import OF_CLIP, QUICK_GELU, Preprocessing, Settings

# Entries that are settings or tables of positions, not weights.
OF_OPENAI = {"input_resolution", "context_length", "vocab_size"}  # int64 scalars that its archives alone hold
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
        name: for the log: the path, or MODEL/TAG.
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
        settings: what is told beside the tensors.
        grid: (height, width) in patches that the position embeddings are for; None where they form no square and
            nothing tells.
    """

    name: str
    form: str
    state: dict[str, Tensor]
    heads: dict[str, Tensor]
    sizes: dict[str, int]
    settings: Settings
    grid: tuple[int, int] | None

    @property
    def resolution(self) -> tuple[int, int] | None:
        """(height, width) in pixels that the weights are for."""
        patch = self.sizes["patch_size"]
        return None if self.grid is None else (self.grid[0] * patch, self.grid[1] * patch)

    @property
    def text_length(self) -> int:
        """Tokens of a caption that the weights are for."""
        return len(self.state["positional_embedding"])

    @property
    def preprocessing(self) -> Preprocessing:
        """Of the images that they were trained on; OpenAI's where nothing is told."""
        return self.settings.preprocessing or OF_CLIP

    def architecture(self, activation: str | None = None) -> dict[str, int | str]:
        """Sizes, heads and activation: what `TBPSCLIP` is built from.

        Args:
            activation: for weights of which nothing tells it.

        Raises: UserError where it is neither told nor given: guessing wrong would cost accuracy without a word.
        """
        chosen = self.settings.activation or activation
        if chosen is None:
            raise UserError(
                f"{self.name}: nothing in it tells which activation it was trained with: set "
                "model.activation=quick_gelu (OpenAI, MetaCLIP, DFN) or model.activation=gelu (LAION, DataComp)"
            )
        return self.sizes | {
            "vision_heads": self.settings.vision_heads or usual_heads(self.sizes["vision_width"]),
            "text_heads": self.settings.text_heads or usual_heads(self.sizes["text_width"]),
            "activation": chosen,
        }


def find_weights(source: str | Path) -> Location:
    """Where the weights are that the user named; those of a tag are on this machine then.

    Args:
        source: path of a file or folder, or a tag of open_clip, TAG or MODEL/TAG.

    Raises: UserError, naming the source, where there is nothing of that name, or it cannot be downloaded.
    """
    path = Path(source)
    if not path.exists() and registry.may_be_tag(str(source)):
        with _naming(str(source)):
            entry = registry.find_entry(str(source))
        return Location(registry.fetch(entry), entry.name, entry.settings)
    return Location(path, str(path))


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
        if location.path.is_dir():
            kind, content, told = _open_folder(location.path)
        else:
            kind, content = open_archive(location.path)
            told = location.settings
        content, checkpoint = _state_dict(content)
        state = _checked(content)
        scheme = names.scheme_of(state)
        if checkpoint is not None and scheme in ("ours", "published"):
            told = settings.of_checkpoint(checkpoint["config"])
        elif scheme == "published":
            told = Settings(QUICK_GELU, preprocessing=settings.OF_TBPS)
        elif content.keys() >= OF_OPENAI and told.activation is None:
            told = Settings(QUICK_GELU)
        heads: dict[str, Tensor] = {}
        if scheme == "published":
            state = {names.ours_from_published(name): value for name, value in state.items()}
        if scheme == "Hugging Face":
            state = names.from_hugging_face(state)
        elif scheme != "OpenAI":
            heads = {name: value for name, value in state.items() if name.startswith(names.HEADS)}
            state = names.from_ours({name: value for name, value in state.items() if name not in heads})
        if "logit_scale" in state and state["logit_scale"].numel() == 1:
            state["logit_scale"] = state["logit_scale"].reshape(())  # some write it with one dimension
        sizes = read_sizes(state)
        for heads_told, width in ((told.vision_heads, sizes["vision_width"]), (told.text_heads, sizes["text_width"])):
            if heads_told and width % heads_told:
                raise UserError(
                    f"its settings are for {heads_told} attention heads, which do not divide the width {width}"
                )
        grid = _grid(len(state["visual.positional_embedding"]) - 1, sizes["patch_size"], told.resolution)
    form = _form(kind, scheme, checkpoint)
    return Weights(location.name, form, state, heads, sizes, told, grid)


@contextmanager
def _naming(name: str) -> Iterator[None]:
    """Puts the source in front of the message of a UserError."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{name}: {error}") from error


def _open_folder(folder: Path) -> tuple[str, dict[str, Tensor], Settings]:
    """What kind of folder it is, its tensors under their own names, and its settings."""
    if (folder / "open_clip_config.json").is_file():
        told = _read_json(folder / "open_clip_config.json")
        sections = (told.get(key) for key in ("model_cfg", "preprocess_cfg"))
        told = settings.of_open_clip(*(section if isinstance(section, dict) else {} for section in sections))
        return "folder of open_clip", _read_parts(folder, OPEN_CLIP_FILES), told
    if (folder / "config.json").is_file():
        preprocessor = folder / "preprocessor_config.json"
        told = settings.of_hugging_face(
            _read_json(folder / "config.json"), _read_json(preprocessor) if preprocessor.is_file() else None
        )
        return "folder of Hugging Face", _read_parts(folder, HUGGING_FACE_FILES), told
    inside = next((name for name in ("checkpoint_best.pth", "checkpoint_last.pth") if (folder / name).is_file()), None)
    hint = f"give the file {folder / inside}" if inside else "give a folder with config.json or open_clip_config.json"
    raise UserError(f"a folder, but none of Hugging Face or open_clip: {hint}, or a file")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path.name} cannot be read ({' '.join(str(error).split())}): get it again") from error
    if not isinstance(content, dict):
        raise UserError(f"{path.name} holds a {type(content).__name__} where keys and values should be: get it again")
    return content


def _read_parts(folder: Path, candidates: tuple[str, ...]) -> dict[str, Tensor]:
    """The tensors of the first of the files that is there; an index names files that hold a part each."""
    name = next((name for name in candidates if (folder / name).is_file()), None)
    if name is None:
        raise UserError(f"none of {', '.join(candidates)} is in it: get the folder again")
    if not name.endswith(".index.json"):
        return _state_dict(open_archive(folder / name)[1])[0]
    state: dict[str, Tensor] = {}
    parts = _read_json(folder / name).get("weight_map")
    for part in sorted(set(parts.values())) if isinstance(parts, dict) else []:
        if Path(part).name != part or not (folder / part).is_file():
            raise UserError(f"{part}, which {name} names, is not in it: get the folder again")
        state |= _state_dict(open_archive(folder / part)[1])[0]
    return state


def _state_dict(content: Any) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """Names and tensors inside what a file holds, and the rest of a checkpoint of TBPS-CLIP."""
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


def _checked(content: dict[str, Any]) -> dict[str, Tensor]:
    """The weights among the entries of a state dict, in float32 and independent of the file."""
    content = {name: value for name, value in content.items() if name not in OF_OPENAI and not name.endswith(POSITIONS)}
    strange = [
        f"{name} ({value.dtype if isinstance(value, Tensor) else type(value).__name__})"
        for name, value in content.items()
        if not (isinstance(value, Tensor) and value.is_floating_point())
    ]
    if strange:
        raise UserError(f"{first_of(strange)}, where floating point tensors must be; {EXPECTED}")
    state = {name: value.detach().to(torch.float32, copy=True) for name, value in content.items()}
    broken = [name for name, value in state.items() if not value.isfinite().all()]
    if broken:
        raise UserError(f"NaN or infinity in {first_of(broken)}; use weights from before the training broke down")
    return state


def _grid(patches: int, patch_size: int, resolution: tuple[int, int] | None) -> tuple[int, int] | None:
    """(height, width) in patches."""
    if resolution is not None:
        grid = (resolution[0] // patch_size, resolution[1] // patch_size)
        if grid[0] * grid[1] != patches:
            raise UserError(
                f"visual.positional_embedding is for {patches} patches, its settings are for {resolution[0]} × "
                f"{resolution[1]} pixels, {grid[0]} × {grid[1]} patches; the file mixes models or is damaged"
            )
        return grid
    side = math.isqrt(patches)
    return (side, side) if side > 0 and side * side == patches else None


def _form(kind: str, scheme: str, checkpoint: dict[str, Any] | None) -> str:
    """What was read, in words for the log."""
    if checkpoint is None:
        whose = {"ours": "TBPS-CLIP", "published": "the published code"}.get(scheme, scheme)
        return kind if kind.startswith("folder") else f"{kind}, names of {whose}"
    if scheme == "published":
        return "checkpoint of the published code"
    steps = (checkpoint.get("progress") or {}).get("step", 0)
    age = f", epoch {checkpoint['epoch']}" if checkpoint.get("epoch") is not None else ""
    return f"checkpoint of TBPS-CLIP{age}" + (f" and {steps} steps" if steps else "")
