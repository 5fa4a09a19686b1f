"""Reads files of weights. The content decides the form, and code in a file is never run."""

import io
import pickle
import re
import zipfile
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from misc.errors import UserError
from misc.files import CAN_REPLACE_OPEN_FILES, open_regular

# First bytes of a torch.save file from before PyTorch 1.6. Newer files are ZIP archives.
OLD_TORCH_SAVE = pickle.dumps(0x1950A86A20F9469CFC6C, protocol=2)
STORAGES = {
    "BFloat16Storage": torch.bfloat16,
    "BoolStorage": torch.bool,
    "ByteStorage": torch.uint8,
    "CharStorage": torch.int8,
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "IntStorage": torch.int32,
    "LongStorage": torch.int64,
    "ShortStorage": torch.int16,
    "UntypedStorage": torch.uint8,
}
"""The classes of torch by which a pickle names the type of stored elements."""
MOST_CODE = 1 << 26
"""Bytes of an archive that may be compressed, such as the code of TorchScript. Tensors are never compressed."""
_TENSOR = re.compile(r"/data/[^/]+$")
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
        with open_regular(path) as file:
            head = file.read(64)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UserError(f"{error.strerror}: {expected}") from error
    except OSError as error:
        if error.errno is None:
            raise UserError(f"not a file: {expected}") from error
        raise UserError(
            f"cannot be read ({error.strerror}): check the file and its permissions, or give another one"
        ) from error
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
    """What is wrong with an archive: a checksum, or the size of a record."""


class _EasyDict:
    """Replaces the only class in a published checkpoint by a plain dict, so its code is not run either."""

    def __new__(cls) -> OrderedDict:  # type: ignore[misc]
        return OrderedDict()


_EasyDict.__module__, _EasyDict.__name__, _EasyDict.__qualname__ = "easydict", "EasyDict", "EasyDict"


def _stand_in(module: str, name: str) -> type:
    """Returns an empty class, in place of one that training programs save beside the weights."""

    class StandIn:
        def __init__(self, *_arguments: Any):
            pass

        def __setstate__(self, state: Any) -> None:
            pass

    StandIn.__module__, StandIn.__name__, StandIn.__qualname__ = module, name, name
    return StandIn


_STAND_INS = [  # arguments of a program, and numbers such as the best result; nothing reads them
    _stand_in("argparse", "Namespace"),
    _stand_in("_codecs", "encode"),
    _stand_in("numpy", "dtype"),
    _stand_in("numpy.core.multiarray", "scalar"),
    _stand_in("numpy._core.multiarray", "scalar"),
]


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
    with _safe_globals([_EasyDict, *_STAND_INS]):
        if not zipfile.is_zipfile(path):
            with path.open("rb") as file:
                for _ in range(4):  # a magic number, a version, a description of the machine, and the content
                    _Survey(file, path.stat().st_size).load()
            return "torch.save", torch.load(path, map_location="cpu", weights_only=True)
        with zipfile.ZipFile(path) as archive:
            records = _check_records(archive, path.stat().st_size)
            if any(name.endswith("/constants.pkl") for name in records):
                modules = _TorchScriptUnpickler(archive).load()
                return "TorchScript archive", dict(_named_tensors(modules, visited=set()))
            if damaged := archive.testzip():  # torch itself does not check the checksums
                raise _Damaged(f"the checksum of {damaged} is wrong")
            _Survey(io.BytesIO(archive.read(f"{_folder(records)}/data.pkl")), records).load()
        # Memory-mapped, so unused parts (such as the state of an optimizer) take no memory.
        return "torch.save", torch.load(str(path), map_location="cpu", weights_only=True, mmap=CAN_REPLACE_OPEN_FILES)


def _check_records(archive: zipfile.ZipFile, size: int) -> dict[str, int]:
    """Checks what an archive would unpack to, before it is unpacked.

    Args:
        size: size of the file in bytes.

    Returns: the size of each record in bytes.
    Raises _Damaged if a record is there twice, a tensor is compressed, or all of them are larger than the file.
    """
    records: dict[str, int] = {}
    for record in archive.infolist():
        if record.filename in records:
            raise _Damaged(f"{record.filename} is in it twice")
        if _TENSOR.search(record.filename) and record.compress_type != zipfile.ZIP_STORED:
            raise _Damaged(f"{record.filename} is compressed")  # torch would take the compressed bytes
        records[record.filename] = record.file_size
    if sum(records.values()) > size + MOST_CODE:
        raise _Damaged(f"it unpacks to {sum(records.values())} bytes")
    return records


def _folder(records: Iterable[str]) -> str:
    """Returns the folder that all records of an archive are in."""
    return next(iter(records)).partition("/")[0]


class _Storage(NamedTuple):
    """The elements that tensors of a pickle are made of."""

    dtype: torch.dtype
    elements: int


class _Survey(pickle.Unpickler):
    """Reads the pickle of a torch.save file before torch does. Its classes are replaced by containers without code.

    Args:
        file: the pickle.
        sizes: the size in bytes of each record of the archive; or the size of a file that is no archive.

    Raises _Damaged if a record and its elements differ in size, or a tensor has elements beyond its record: torch would
    take any values for these.
    """

    def __init__(self, file: BinaryIO, sizes: dict[str, int] | int):
        super().__init__(file)
        self.sizes = sizes

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name in STORAGES:
            return STORAGES[name]
        found = vars(torch).get(name) if module == "torch" else None  # `getattr` would import modules of torch
        if isinstance(found, torch.dtype):
            return found

        class Container(dict):
            """Stands for one class or function. Each has its own, as a pickle may change it."""

            __hash__, __eq__ = object.__hash__, object.__eq__  # type: ignore[assignment]

            def __init__(self, *arguments: Any):
                for each in (arguments, *arguments):
                    if isinstance(each, tuple) and len(each) >= 4 and isinstance(each[0], _Storage):
                        _check_tensor(*each)

            def __setstate__(self, state: Any) -> None:
                pass

            def append(self, item: Any) -> None:
                pass

            def extend(self, items: Any) -> None:
                pass

        return Container

    def persistent_load(self, identity: tuple) -> _Storage | None:
        _storage, dtype, key, _device, elements, *_view = identity
        if not isinstance(dtype, torch.dtype):
            return None  # of a kind that no weights have
        size = self.sizes if isinstance(self.sizes, int) else self.sizes.get(f"{_folder(self.sizes)}/data/{key}", 0)
        if not 0 <= elements * dtype.itemsize <= size:
            raise _Damaged(f"the record {key} has {size} bytes for {elements} elements of {dtype}")
        return _Storage(dtype, elements)


def _check_tensor(storage: _Storage, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *others: Any) -> None:
    """Checks that all elements of a tensor are in its storage."""
    dtype = next((other for other in others if isinstance(other, torch.dtype)), storage.dtype)
    last = offset + sum((count - 1) * step for count, step in zip(size, stride, strict=True))
    stored = storage.elements * storage.dtype.itemsize // dtype.itemsize
    if min(offset, *size, *stride, 0) < 0 or (0 not in size and last >= stored):
        raise _Damaged(f"a tensor of {tuple(size)} is larger than its {stored} elements")


class _ScriptModule:
    """A replacement for every class of a TorchScript archive: attributes without code."""


def _named_tensors(module: _ScriptModule, prefix: str = "", *, visited: set[int]) -> Iterator[tuple[str, Tensor]]:
    """Returns all tensors of a module tree. A module that is in it several times counts once."""
    if id(module) in visited:
        return
    visited.add(id(module))
    for name, value in vars(module).items():
        if isinstance(value, Tensor):
            yield prefix + name, value
        elif isinstance(value, _ScriptModule):
            yield from _named_tensors(value, f"{prefix}{name}.", visited=visited)


class _TorchScriptUnpickler(pickle.Unpickler):
    """Rebuilds the module tree of a TorchScript archive as plain objects and tensors, and refuses everything else.

    A pickle can change attributes of a class or function, so each archive gets its own.
    """

    def __init__(self, archive: zipfile.ZipFile):
        self.archive = archive
        self.folder = _folder(archive.namelist())
        super().__init__(io.BytesIO(archive.read(f"{self.folder}/data.pkl")))
        self.module_class = type("_ScriptModule", (_ScriptModule,), {})
        self.allowed: dict[tuple[str, str], Any] = {
            **{("torch", name): dtype for name, dtype in STORAGES.items()},
            ("torch._utils", "_rebuild_tensor_v2"): lambda storage, offset, size, stride, *_: storage.as_strided(
                size, stride, offset
            ),
            ("collections", "OrderedDict"): OrderedDict,  # backward hooks of a tensor, always empty
        }
        self.storages: dict[str, Tensor] = {}

    def find_class(self, module: str, name: str) -> Any:
        if module.partition(".")[0] == "__torch__":
            return self.module_class
        if (module, name) not in self.allowed:
            raise pickle.UnpicklingError(f"GLOBAL {module}.{name}")
        return self.allowed[module, name]

    def persistent_load(self, identity: tuple) -> Tensor:
        _storage, dtype, key, _device, _elements = identity
        if key not in self.storages:
            record = self.archive.read(f"{self.folder}/data/{key}")
            self.storages[key] = torch.frombuffer(bytearray(record), dtype=dtype)
        return self.storages[key]
