"""CLIP weights in: any supported file becomes OpenAI's key names in float32, then goes strictly into our model.

Two steps, so that a new kind of file touches only the first:

1. `read_clip` recognises a file by its content and reads it without running code that may be in it.
2. `load_clip` checks every name and shape, resizes the position embeddings and copies. All or nothing.
"""

import io
import math
import pickle
import re
import zipfile
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from misc.errors import UserError

# OpenAI's prefix and ours.
RENAMES = (("visual.", "image_encoder."), ("logit_scale", "logit_scale"), ("", "text_encoder."))

# Entries of OpenAI's archive that are settings (int64 scalars), not weights.
SETTINGS = {"input_resolution", "context_length", "vocab_size"}

# The dimensions of OpenAI's tensors that each configuration key decides.
SIZES = {
    "model.patch_size": (("visual.conv1.weight", 2), ("visual.conv1.weight", 3)),
    "model.vision_width": (("visual.conv1.weight", 0), ("visual.proj", 0)),
    "model.text_width": (("token_embedding.weight", 1), ("text_projection", 0)),
    "model.embed_dim": (("visual.proj", 1), ("text_projection", 1)),
    "model.vocab_size": (("token_embedding.weight", 0),),
}
LAYERS = {
    "model.vision_layers": re.compile(r"visual\.transformer\.resblocks\.(\d+)\."),
    "model.text_layers": re.compile(r"transformer\.resblocks\.(\d+)\."),
}

# How torch.save began a file before PyTorch 1.6; since then it is a ZIP archive.
OLD_TORCH_SAVE = pickle.dumps(0x1950A86A20F9469CFC6C, protocol=2)
EXPECTED = "expected OpenAI's ViT-B-16.pt, or a state dict saved with torch.save(model.state_dict(), path)"


# ---- step 1: a file becomes a state dict under OpenAI's names -------------------------------------------------------


def read_clip(path: str | Path) -> tuple[str, dict[str, Tensor]]:
    """Reads CLIP weights from OpenAI's TorchScript archive or from a state dict with the same keys.

    A state dict may lie under `state_dict` and carry a `module.` prefix. No code in the file is run.

    Returns: the form of the file in words, and its tensors under OpenAI's key names, float32, on the CPU, all finite;
        OpenAI's three settings are dropped.
    Raises: UserError for a file that cannot be read, is damaged, is something else, or holds more than tensors.
    """
    path = Path(path)
    with _naming(path):
        _check_beginning(path)
        try:
            form, content = _open(path)
        except Exception as error:  # a damaged archive or pickle can fail in every way
            if wanted := re.search(r"GLOBAL ([\w.]+)", str(error)):
                reason = f"loading it would need {wanted[1]}, and only tensors are read from a file"
            else:
                size = path.stat().st_size
                reason = f"damaged, incomplete ({size} bytes) or no checkpoint ({type(error).__name__}), get it again"
            raise UserError(f"{reason}; {EXPECTED}") from error
        return form, _weights(content)


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Puts the path in front of the message of a UserError."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def _check_beginning(path: Path) -> None:
    """Refuses what is no checkpoint at all, with what it is instead."""
    try:
        with path.open("rb") as file:
            head = file.read(64)
    except OSError as error:
        raise UserError(f"{error.strerror}; set model.checkpoint to the path of the CLIP weights") from error
    if head.startswith((b"PK\x03\x04", OLD_TORCH_SAVE)):
        return
    if not head:
        raise UserError(f"the file is empty, get it again; {EXPECTED}")
    if head.startswith(b"version https://git-lfs"):
        raise UserError("a Git LFS pointer, not the weights; run `git lfs pull` in its repository")
    if head.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"<"):
        raise UserError(f"a web page (such as a login page), not the weights, get it again; {EXPECTED}")
    raise UserError(f"not a known form of checkpoint (it begins with {head[:8]!r}); {EXPECTED}")


def _open(path: Path) -> tuple[str, Any]:
    """The form of a checkpoint, told from its content, and what it holds. Runs no code of the file."""
    if not zipfile.is_zipfile(path):
        return "state dict", torch.load(path, map_location="cpu", weights_only=True)
    with zipfile.ZipFile(path) as archive:
        if any(name.endswith("/constants.pkl") for name in archive.namelist()):
            return "TorchScript archive", dict(_named_tensors(_TorchScriptUnpickler(archive).load()))
    # Mapped, so that what is not used (such as an optimizer's state) is never read.
    return "state dict", torch.load(str(path), map_location="cpu", weights_only=True, mmap=True)


class _ScriptModule:
    """Stands for every class of a TorchScript archive: attributes without code."""


def _named_tensors(module: _ScriptModule, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    for name, value in vars(module).items():
        if isinstance(value, Tensor):
            yield prefix + name, value
        elif isinstance(value, _ScriptModule):
            yield from _named_tensors(value, f"{prefix}{name}.")


def _rebuild_tensor(storage: Tensor, offset: int, size: tuple, stride: tuple, *_unused: Any) -> Tensor:
    return storage.as_strided(size, stride, offset)


class _TorchScriptUnpickler(pickle.Unpickler):
    """Rebuilds the module tree of a TorchScript archive as plain objects and tensors, and refuses everything else."""

    ALLOWED = {
        ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
        ("torch", "HalfStorage"): torch.float16,
        ("torch", "FloatStorage"): torch.float32,
        ("torch", "LongStorage"): torch.int64,
        ("collections", "OrderedDict"): OrderedDict,  # a tensor's backward hooks, always empty
    }

    def __init__(self, archive: zipfile.ZipFile):
        self.archive = archive
        self.folder = archive.namelist()[0].partition("/")[0]
        super().__init__(io.BytesIO(archive.read(f"{self.folder}/data.pkl")))

    def find_class(self, module: str, name: str) -> Any:
        if module.partition(".")[0] == "__torch__":
            return _ScriptModule
        if (module, name) not in self.ALLOWED:
            raise pickle.UnpicklingError(f"GLOBAL {module}.{name}")
        return self.ALLOWED[module, name]

    def persistent_load(self, identity: tuple) -> Tensor:
        _storage, dtype, key, _device, _elements = identity
        return torch.frombuffer(bytearray(self.archive.read(f"{self.folder}/data/{key}")), dtype=dtype)


def _weights(content: Any) -> dict[str, Tensor]:
    """The state dict inside what a file holds, checked and in float32."""
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    if not isinstance(content, dict) or not content or not all(isinstance(name, str) for name in content):
        raise UserError(f"no state dict (names to tensors) but a {type(content).__name__}; {EXPECTED}")
    if all(name.startswith("module.") for name in content):
        content = {name.removeprefix("module."): value for name, value in content.items()}
    content = {name: value for name, value in content.items() if name not in SETTINGS}

    strange = [
        f"{name} ({value.dtype if isinstance(value, Tensor) else type(value).__name__})"
        for name, value in content.items()
        if not (isinstance(value, Tensor) and value.is_floating_point())
    ]
    if strange:
        raise UserError(f"{first_of(strange)}, where floating point tensors must be; {EXPECTED}")
    # Copied, so that nothing depends on the file any more.
    state = {name: value.detach().to(torch.float32, copy=True) for name, value in content.items()}
    broken = [name for name, value in state.items() if not value.isfinite().all()]
    if broken:
        raise UserError(f"NaN or infinity in {first_of(broken)}; use weights from before the training broke down")
    return state


def first_of(items: list[str], shown: int = 3) -> str:
    """The first few of a list, and how many more there are."""
    return ", ".join(items[:shown]) + (f" and {len(items) - shown} more" if len(items) > shown else "")


# ---- step 2: the state dict goes into the model ---------------------------------------------------------------------


def to_openai_names(model_state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The towers and the temperature of `TBPSCLIP` under OpenAI's names; training heads, which CLIP does not have, are
    left out."""
    renamed = {}
    for name, value in model_state.items():
        for openai, ours in RENAMES:
            if name.startswith(ours):
                renamed[openai + name.removeprefix(ours)] = value
    return renamed


def resize_image_position_embedding(embedding: Tensor, grid: tuple[int, int]) -> Tensor:
    """Bilinear resizing on the grid of patches; the class token's row is kept.

    Args:
        embedding: (P + 1, D) float, the class token first, then the rows of a square grid (or of `grid` itself).
        grid: (height, width) in patches.

    Returns: (height * width + 1, D).
    Raises: UserError if the P patches form no square grid and are not already those of `grid`.
    """
    source = _image_grid(embedding, grid)
    patches = embedding[1:].T.reshape(1, -1, *source)  # (1, D, height, width)
    patches = F.interpolate(patches, size=grid, mode="bilinear", align_corners=False)
    return torch.cat([embedding[:1], patches[0].flatten(1).T])


def _image_grid(embedding: Tensor, grid: tuple[int, int]) -> tuple[int, int]:
    patches = len(embedding) - 1
    side = math.isqrt(max(patches, 0))
    if side > 0 and side * side == patches:
        return side, side
    if patches == grid[0] * grid[1]:
        return grid
    raise UserError(
        f"visual.positional_embedding {tuple(embedding.shape)} is for {patches} patches, which form no square grid and "
        f"are not the {grid[0]} x {grid[1]} of the model; set experiment.input_resolution to that of these weights"
    )


def resize_text_position_embedding(embedding: Tensor, length: int) -> Tensor:
    """Linear resizing of what lies between the first and the last row; these two are kept.

    Args:
        embedding: (L, D) float.
        length: tokens wanted.

    Returns: (length, D).
    Raises: UserError if there is nothing between first and last to resize from or to.
    """
    if len(embedding) == length:
        return embedding
    if min(len(embedding), length) < 3:
        raise UserError(
            f"positional_embedding {tuple(embedding.shape)} cannot be resized to {length} tokens, both need 3 or more; "
            f"set experiment.text_length={len(embedding)}"
        )
    between = F.interpolate(embedding[1:-1].T[None], size=length - 2, mode="linear", align_corners=False)
    return torch.cat([embedding[:1], between[0].T, embedding[-1:]])


def load_clip(model: nn.Module, path: str | Path, *, grid: tuple[int, int], text_length: int) -> list[str]:
    """Loads CLIP weights into the two encoders and the temperature of `model`, in place; its heads stay as they are.

    Args:
        model: a `TBPSCLIP` whose position embeddings are for `grid` and `text_length`.
        path: any file that `read_clip` reads.
        grid: (height, width) of the image encoder in patches.
        text_length: tokens of the text encoder.

    Returns: lines for the log: the file and its form, and what was resized.
    Raises: UserError, with the model unchanged, for what `read_clip` refuses and for a missing, unknown or misshapen
        tensor.
    """
    path = Path(path)
    form, state = read_clip(path)
    targets = to_openai_names(model.state_dict())  # these share the memory of the model's parameters
    lines = [f"CLIP weights from {path} ({form})"]
    with _naming(path):
        _check_fit(state, targets)
        image, text = state["visual.positional_embedding"], state["positional_embedding"]
        source = _image_grid(image, grid)
        state["visual.positional_embedding"] = resize_image_position_embedding(image, grid)
        state["positional_embedding"] = resize_text_position_embedding(text, text_length)
    if source != grid:
        lines.append("image position embeddings resized from {} x {} to {} x {} patches".format(*source, *grid))
    if len(text) != text_length:
        lines.append(f"text position embeddings resized from {len(text)} to {text_length} tokens")
    assert all(state[name].shape == target.shape for name, target in targets.items()), "grid or length not the model's"
    for name, target in targets.items():
        target.copy_(state[name])
    return lines


def _check_fit(state: dict[str, Tensor], targets: dict[str, Tensor]) -> None:
    """Refuses a missing, unknown or misshapen tensor; position embeddings may have any length."""
    found = {name: tuple(value.shape) for name, value in state.items()}
    wanted = {name: tuple(value.shape) for name, value in targets.items()}
    resizable = {name: found[name] for name in found.keys() & wanted.keys() if _differs_in_length(name, found, wanted)}
    problems = misfits(found, wanted | resizable)
    if not problems:
        return
    remedy = "use the weights of a CLIP vision transformer of the configured size, under OpenAI's names"
    if all(
        "resblocks" in name for name in found.keys() ^ wanted.keys()
    ):  # else it is another kind of model, not another size
        own = _sizes(wanted)
        changes = [f"{key}={size}" for key, size in _sizes(found).items() if size != own.get(key)]
        remedy = f"set {' '.join(changes)}" if changes else remedy
    count = f"{len(problems)} tensor{'s do' if len(problems) > 1 else ' does'}"
    raise UserError(f"{count} not fit the model: {first_of(problems)}; {remedy}")


def misfits(found: dict[str, tuple[int, ...]], wanted: dict[str, tuple[int, ...]]) -> list[str]:
    """What is wrong with the shapes found, by name: misshapen, missing and unknown tensors, in words."""
    misshapen = [
        f"{name} is {found[name]}, the model's is {shape}"
        for name, shape in wanted.items()
        if name in found and found[name] != shape
    ]
    missing = [f"{name} is missing" for name in wanted if name not in found]
    return misshapen + missing + [f"{name} is unknown" for name in found if name not in wanted]


def _differs_in_length(name: str, found: dict[str, tuple[int, ...]], wanted: dict[str, tuple[int, ...]]) -> bool:
    """Whether resizing makes it fit: position embeddings are resized along their first dimension."""
    return name.endswith("positional_embedding") and found[name][1:] == wanted[name][1:]


def architecture(shapes: dict[str, tuple[int, ...]]) -> dict[str, int | None]:
    """Sizes of the towers, named as in the configuration's section `model`, from tensors under OpenAI's names.

    What the tensors do not tell is None. The number of heads leaves no trace in them; as in CLIP, each has 64 channels.
    """
    told = _sizes(shapes)
    sizes = {key.removeprefix("model."): told.get(key) for key in (*SIZES, *LAYERS)}
    for tower in ("vision", "text"):
        width = sizes[f"{tower}_width"]
        sizes[f"{tower}_heads"] = None if width is None else max(1, width // 64)
    return sizes


def _sizes(shapes: dict[str, tuple[int, ...]]) -> dict[str, int]:
    """The configuration that a state dict was made with; a key on which its tensors disagree is left out."""
    sizes = {}
    for key, witnesses in SIZES.items():
        values = {shapes[name][dim] if len(shapes.get(name, ())) > dim else None for name, dim in witnesses}
        if len(values) == 1 and None not in values:
            sizes |= {key: values.pop()}
    for key, pattern in LAYERS.items():
        indices = [int(block[1]) for name in shapes if (block := pattern.match(name))]
        if indices:
            sizes[key] = max(indices) + 1
    return sizes
