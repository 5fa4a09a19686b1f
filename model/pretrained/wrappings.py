"""Finds the tensors of a CLIP in what a training program has saved around them.

The state dict may be anywhere in the file, for example under `model_state_dict`. Its names may have a prefix, for
example `module.`, `_orig_mod.` or `model.`, and other modules may be beside the CLIP.
"""

import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import Tensor

from misc.errors import UserError, first_of
from model.pretrained.names import SCHEMES

FIRST_LAYERS = sorted((layer for scheme in SCHEMES.values() for layer in scheme.first_layers), key=len, reverse=True)
"""The first layers of the encoders. What precedes them is the prefix of the CLIP. A name that ends with another one
comes before it."""
USUAL_KEYS = ("model", "state_dict", "model_state_dict")
"""Keys of the weights to use, if a file has several state dicts of a CLIP."""
DEEPEST = 3
"""Number of keys that may lead to a state dict."""
_WRAPPER = re.compile(r"(?<![^.])(?:_orig_mod|module)\.")  # of torch.compile and DistributedDataParallel, at any place


class Unwrapped(NamedTuple):
    """The state dict of a CLIP, and where it was.

    Attributes:
        entries: names without prefix to values, of the CLIP only.
        prefix: what was in front of the names, without wrappers.
        keys: the keys that lead to the state dict in the content of the file.
        outside: the other names in the state dict.
        notes: lines for the log: how the state dict was found.
    """

    entries: dict[str, Any]
    prefix: str
    keys: tuple[str, ...]
    outside: list[str]
    notes: list[str]


def unwrap(content: Any) -> Unwrapped | None:
    """Finds the state dict of a CLIP in the content of a file.

    Returns: the state dict; None if the content is no dict of names, and contains none.

    Raises UserError if it contains several CLIPs, or the encoders have different prefixes.
    """
    keys, state, notes = _find_state_dict(content)
    if not _is_named(state):
        return None
    original: dict[str, str] = {}
    for name in state:
        first = original.setdefault(_WRAPPER.sub("", name), name)
        if first != name:
            raise UserError(f"it contains both {first} and {name}: save the state dict of one model")
    renamed = {plain: state[name] for plain, name in original.items()}
    prefixes = _prefixes(renamed)
    if len(prefixes) > 1:
        raise UserError(
            f"its names begin in {len(prefixes)} ways ({', '.join(prefixes.values())}): save the state dict of one CLIP"
        )
    prefix = next(iter(prefixes), "")
    entries = {name.removeprefix(prefix): value for name, value in renamed.items() if name.startswith(prefix)}
    outside = [name for name in renamed if not name.startswith(prefix)]
    temperatures = [name for name in outside if name.rpartition(".")[2] == "logit_scale"]
    if "logit_scale" not in entries and len(temperatures) == 1:  # of a program that keeps it beside the encoders
        entries["logit_scale"] = renamed[temperatures[0]]
        outside.remove(temperatures[0])
    left_out = sorted({wrapper for name in state for wrapper in _WRAPPER.findall(name)})
    if left_out := left_out + ([prefix] if prefix else []):
        notes.append(f"read without {' and '.join(map(repr, left_out))} in its names")
    return Unwrapped(entries, prefix, keys, outside, notes)


def _find_state_dict(content: Any) -> tuple[tuple[str, ...], Any, list[str]]:
    """Returns the keys that lead to the state dict of a CLIP, the state dict, and lines for the log.

    If there is no CLIP, it is the only dict of tensors, or what the usual keys lead to: the caller reports what it is.
    """
    dicts = list(_named_dicts(content))
    found = {keys: state for keys, state in dicts if _prefixes(state)}
    if len(found) > 1:
        usual = [keys for keys in ((), *((key,) for key in USUAL_KEYS)) if keys in found]
        others = first_of([_written(keys) for keys in found if keys not in usual[:1]])
        if not usual:
            raise UserError(f"it contains several state dicts of a CLIP ({others}): save one of them")
        return usual[0], found[usual[0]], [f"warning: only {_written(usual[0])} of the file is read, not {others}"]
    if not found:
        found = {keys: state for keys, state in dicts if all(isinstance(value, Tensor) for value in state.values())}
    if len(found) == 1:
        keys, state = next(iter(found.items()))
        return keys, state, [f"read from {_written(keys)} in the file"] if keys not in ((), ("model",)) else []
    inside = content if isinstance(content, dict) else {}
    key = next((key for key in USUAL_KEYS if isinstance(inside.get(key), dict)), None)
    return ((), content, []) if key is None else ((key,), inside[key], [])


def _named_dicts(content: Any, keys: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], dict[str, Any]]]:
    """Yields the dicts of names in the content of a file, each after the keys that lead to it.

    Only dicts with a tensor count.
    """
    if not isinstance(content, dict):
        return
    if _is_named(content) and any(isinstance(value, Tensor) for value in content.values()):
        yield keys, content
    if len(keys) < DEEPEST:
        for key, value in content.items():
            yield from _named_dicts(value, (*keys, str(key)))


def _written(keys: tuple[str, ...]) -> str:
    return ".".join(keys) or "the outermost dict"


def _is_named(state: Any) -> bool:
    return isinstance(state, dict) and bool(state) and all(isinstance(name, str) for name in state)


def _prefixes(names: dict[str, Any]) -> dict[str, str]:
    """Returns what precedes the first layer of each encoder, with the whole name as an example."""
    prefixes: dict[str, str] = {}
    for name in names:
        plain = _WRAPPER.sub("", name)
        layer = next((layer for layer in FIRST_LAYERS if f".{plain}".endswith(f".{layer}")), None)
        if layer is not None:
            prefixes.setdefault(plain.removesuffix(layer), name)
    return prefixes
