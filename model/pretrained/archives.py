"""Reads files of weights. The content decides the form, and code in a file is never run."""

import io
import pickle
import re
import stat
import zipfile
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from misc.errors import UserError
from misc.files import CAN_REPLACE_OPEN_FILES

# First bytes of a torch.save file from before PyTorch 1.6. Newer files are ZIP archives.
OLD_TORCH_SAVE = pickle.dumps(0x1950A86A20F9469CFC6C, protocol=2)
EXPECTED = (
    "expected OpenAI's archive, a state dict in the names of OpenAI, open_clip or Hugging Face, as from "
    "torch.save(model.state_dict(), path) or in safetensors, or a checkpoint of TBPS-CLIP"
)


def open_archive(path: Path) -> tuple[str, Any]:
    """Reads the content of a file of weights.

    Returns: the form of the file (`TorchScript archive`, `torch.save` or `safetensors`) and its content. For
        `torch.save` the content is the saved object, for the others it is names to tensors. Tensors are on the CPU and
        may be backed by the file.

    Raises UserError, without the path, if the file cannot be read, is damaged, contains no weights, or needs code to be
    run.
    """
    head = _read_head(path)
    try:
        if _is_safetensors(head, path.stat().st_size):
            return "safetensors", load_file(path)
        return _open_torch(path)
    except Exception as error:  # a damaged archive or pickle can raise any exception
        if wanted := re.search(r"GLOBAL ([\w.]+)", str(error)):
            reason = f"it asks to run {wanted[1]}, but code in a file of weights is never run: give plain tensors"
        else:
            size = path.stat().st_size
            kind = str(error) if isinstance(error, _Damaged | SafetensorError) else type(error).__name__
            reason = f"damaged, incomplete ({size} bytes) or no checkpoint ({kind}): get it again"
        raise UserError(f"{reason}; {EXPECTED}") from error


def _read_head(path: Path) -> bytes:
    """Reads the first bytes of a file.

    Raises UserError if they show that the file contains no weights.
    """
    expected = "give an existing file or folder of weights, or a tag of open_clip"
    try:
        regular = stat.S_ISREG(path.stat().st_mode)
        head = b""
        if regular:  # opening a pipe would block
            with path.open("rb") as file:
                head = file.read(64)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UserError(f"{error.strerror}: {expected}") from error
    except OSError as error:
        raise UserError(
            f"cannot be read ({error.strerror}): check the file and its permissions, or give another one"
        ) from error
    except ValueError as error:  # an invalid path
        raise UserError(f"{error}: {expected}") from error
    if not regular:
        raise UserError(f"not a file: {expected}")
    if head.startswith((b"PK\x03\x04", OLD_TORCH_SAVE)) or _is_safetensors(head, path.stat().st_size):
        return head
    if not head:
        raise UserError(f"the file is empty: get it again; {EXPECTED}")
    if head.startswith(b"version https://git-lfs"):
        raise UserError("a Git LFS pointer, not the weights: run `git lfs pull` in its repository")
    if head.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"<"):
        raise UserError(f"a web page (such as a login page), not the weights: get it again; {EXPECTED}")
    raise UserError(f"not a known form of checkpoint (it begins with {head[:8]!r}): give another file; {EXPECTED}")


def _is_safetensors(head: bytes, size: int) -> bool:
    """Whether a file begins like safetensors: 8 bytes with the length of a JSON object, then the object.

    A truncated file can be shorter than that length; it still counts as safetensors.
    """
    return head[8:9] == b"{" and int.from_bytes(head[:8], "little") < max(size, 100_000_000)


class _Damaged(Exception):
    """A wrong checksum in an archive."""


class _EasyDict:
    """Replaces the only class in a published checkpoint by a plain dict, so its code is not run either."""

    def __new__(cls) -> OrderedDict:  # type: ignore[misc]
        return OrderedDict()


_EasyDict.__module__, _EasyDict.__name__, _EasyDict.__qualname__ = "easydict", "EasyDict", "EasyDict"


@contextmanager
def _safe_globals(classes: list[Any]) -> Iterator[None]:
    """Lets `torch.load` use these classes for those of the same names, like `torch.serialization` from torch 2.5 on."""
    before = list(torch.serialization.get_safe_globals())
    torch.serialization.add_safe_globals(classes)
    try:
        yield
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(before)


def _open_torch(path: Path) -> tuple[str, Any]:
    with _safe_globals([_EasyDict]):
        if not zipfile.is_zipfile(path):
            return "torch.save", torch.load(path, map_location="cpu", weights_only=True)
        with zipfile.ZipFile(path) as archive:
            if any(name.endswith("/constants.pkl") for name in archive.namelist()):
                return "TorchScript archive", dict(_named_tensors(_TorchScriptUnpickler(archive).load()))
            if damaged := archive.testzip():  # torch itself does not check the checksums
                raise _Damaged(f"the checksum of {damaged} is wrong")
        # Memory-mapped, so unused parts (such as the state of an optimizer) take no memory.
        return "torch.save", torch.load(str(path), map_location="cpu", weights_only=True, mmap=CAN_REPLACE_OPEN_FILES)


class _ScriptModule:
    """A replacement for every class of a TorchScript archive: attributes without code."""


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
        ("torch", "BFloat16Storage"): torch.bfloat16,
        ("torch", "HalfStorage"): torch.float16,
        ("torch", "FloatStorage"): torch.float32,
        ("torch", "DoubleStorage"): torch.float64,
        ("torch", "LongStorage"): torch.int64,
        ("torch", "IntStorage"): torch.int32,
        ("torch", "BoolStorage"): torch.bool,
        ("collections", "OrderedDict"): OrderedDict,  # backward hooks of a tensor, always empty
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
