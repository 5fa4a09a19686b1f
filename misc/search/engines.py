"""The engines by name: the packages they need, how they are built, and how one is opened."""

import importlib.util
from dataclasses import replace
from pathlib import Path
from typing import Any

from misc.errors import UserError
from misc.search.engine import Engine, EngineChoice, Exact
from misc.search.gallery import Gallery

REQUIREMENTS = "requirements-search.txt"
PACKAGES = {"exact": (), "faiss": ("faiss",), "qdrant": ("qdrant_client",)}
"""Modules that each engine imports, in addition to those of `requirements.txt`."""


def require(what: str, *modules: str) -> None:
    """Checks that modules are installed.

    Args:
        what: the command or index that needs them, for the message.

    Raises UserError if one of them is missing.
    """
    if missing := [module for module in modules if importlib.util.find_spec(module) is None]:
        raise UserError(f"{what} needs {' and '.join(missing)}: pip install -r {REQUIREMENTS}")


def check(choice: EngineChoice) -> None:
    """Checks that an engine can be built, before any picture is encoded for it.

    Raises UserError if a package is missing, or a Qdrant server cannot be reached.
    """
    require(f"--engine {choice.name}", *PACKAGES[choice.name])
    if choice.name == "qdrant":
        from misc.search import qdrant

        qdrant.check(choice)


def build(gallery: Gallery, choice: EngineChoice) -> tuple[dict[str, Any], list[str]]:
    """Builds an engine for a generation of the index.

    Returns: the settings that `open_engine` needs, and lines for the user.

    Raises UserError if Qdrant cannot be reached, or its collection belongs to another index.
    """
    if choice.name == "faiss":
        from misc.search import approximate

        return approximate.build(gallery)
    if choice.name == "qdrant":
        from misc.search import qdrant

        return qdrant.build(gallery, choice)
    return {"name": "exact"}, []


def unconfirmed(index: Path, address: str, option: str) -> UserError:
    """Returns the error for an index whose Qdrant address the user has not given.

    Args:
        option: the options that give it.
    """
    return UserError(
        f"{index} was built for Qdrant at {address}: give the address yourself with {option} ADDRESS, if you trust it, "
        "or search exactly with --engine exact"
    )


def open_engine(gallery: Gallery, name: str | None = None, address: str | None = None) -> Engine:
    """Opens the engine that the index was built for.

    Args:
        name: `exact` for exact search, which every index allows. None: the engine of the index.
        address: address of Qdrant, from the user. The one that the index records is never used: an index may come from
            another person, whose server would get the key, and whose folder could run code in the client's local mode.

    Raises UserError if the index was not built for the engine, or the engine cannot be opened.
    """
    settings = gallery.info.engine
    if name not in (None, "exact", settings["name"]):
        raise UserError(
            f"--engine {name}: {gallery.index} was built for {settings['name']}: index the folder with --engine {name}"
        )
    name = name or settings["name"]
    require(f"{gallery.index}, built with --engine {name},", *PACKAGES[name])
    if name == "faiss":
        from misc.search import approximate

        return approximate.Approximate(gallery)
    if name == "qdrant":
        if address is None:
            raise unconfirmed(gallery.index, settings["address"], "--qdrant")
        from misc.search import qdrant

        return qdrant.Qdrant(gallery, replace(EngineChoice.of(settings), address=address))
    return Exact(gallery.features)
