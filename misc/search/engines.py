"""The engines by name: which packages they need, how they are built, and how one is opened."""

import importlib.util
from typing import Any

from misc.errors import UserError
from misc.search.engine import Engine, EngineChoice, Exact
from misc.search.gallery import Gallery

REQUIREMENTS = "requirements-search.txt"
NAMES = ("exact", "faiss", "qdrant")
PACKAGES = {"exact": (), "faiss": ("faiss",), "qdrant": ("qdrant_client",)}
"""Modules that each engine imports."""


def require(what: str, *modules: str) -> None:
    """Raises UserError where one of the modules is not installed."""
    if missing := [module for module in modules if importlib.util.find_spec(module) is None]:
        raise UserError(f"{what} needs {' and '.join(missing)}: pip install -r {REQUIREMENTS}")


def check(choice: EngineChoice) -> None:
    """Raises UserError for an engine that could not be built, before anything is encoded for it."""
    require(f"--engine {choice.name}", *PACKAGES[choice.name])
    if choice.name == "qdrant":
        from misc.search import qdrant

        qdrant.check(choice)


def build(gallery: Gallery, choice: EngineChoice) -> tuple[dict[str, Any], list[str]]:
    """Prepares an engine for a generation, once. Returns what `open_engine` needs, and lines to tell."""
    if choice.name == "faiss":
        from misc.search import approximate

        return approximate.build(gallery)
    if choice.name == "qdrant":
        from misc.search import qdrant

        return qdrant.build(gallery, choice)
    return {"name": "exact"}, []


def open_engine(gallery: Gallery, name: str | None = None) -> Engine:
    """The engine that the index was built for; or exact search, which needs no building, by its `name`."""
    settings = gallery.info.engine
    if name not in (None, "exact", settings["name"]):
        raise UserError(f"--engine {name}: {gallery.index} was built for {settings['name']}: index it with that engine")
    name = name or settings["name"]
    require(f"{gallery.index}, built with --engine {name},", *PACKAGES[name])
    if name == "faiss":
        from misc.search import approximate

        return approximate.Approximate(gallery)
    if name == "qdrant":
        from misc.search import qdrant

        return qdrant.Qdrant(gallery, EngineChoice.of(settings))
    return Exact(gallery.features)
