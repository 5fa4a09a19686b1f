"""What two splits share: people, if both are cut from the same images, and files that are the same byte for byte."""

import hashlib
from collections import defaultdict
from collections.abc import Hashable, Iterable, Mapping
from itertools import combinations
from pathlib import Path
from typing import TypeVar

Name = TypeVar("Name", bound=Hashable)

SOURCES = {"ICFG-PEDES": "MSMT17", "RSTPReid": "MSMT17"}
"""The dataset whose images a dataset was cut from. Identities are numbered anew, so people cannot be recognised."""


def shared_source(one: str | None, other: str | None) -> str | None:
    """Returns the dataset that two different datasets were cut from; None if they have no images in common."""
    source = SOURCES.get(one or "")
    return source if one != other and source is not None and source == SOURCES.get(other or "") else None


def identical_files(groups: Mapping[Name, Iterable[Path]]) -> list[list[tuple[Name, Path]]]:
    """Finds the same content in several groups of files. Only files of the same size are read.

    A file that is missing or cannot be read is skipped.

    Args:
        groups: files by the name of their group.

    Returns: for each content, its files with their groups: at least two files, of at least two groups.
    """
    by_size: dict[int, list[tuple[Name, Path]]] = defaultdict(list)
    for name, paths in groups.items():
        for path in dict.fromkeys(paths):
            try:
                by_size[path.stat().st_size].append((name, path))
            except OSError:  # images are checked where they are needed
                continue
    found = []
    for candidates in by_size.values():
        if not _several_groups(candidates):
            continue
        by_content: dict[bytes, list[tuple[Name, Path]]] = defaultdict(list)
        for name, path in candidates:
            try:
                content = path.read_bytes()
            except OSError:
                continue
            by_content[hashlib.blake2b(content).digest()].append((name, path))
        found += [files for files in by_content.values() if _several_groups(files)]
    return found


def _several_groups(files: list[tuple[Name, Path]]) -> bool:
    return len({name for name, _ in files}) > 1


def overlap_lines(groups: Mapping[str, Iterable[Path]]) -> list[str]:
    """Returns a warning for each two groups that have files in common, with their number and an example."""
    pairs: dict[tuple[str, str], list[tuple[Path, Path]]] = defaultdict(list)
    for files in identical_files(groups):
        firsts = dict(reversed(files))  # the first file of each group
        for one, other in combinations(sorted(firsts, key=list(groups).index), 2):
            pairs[one, other].append((firsts[one], firsts[other]))
    return [
        f"warning: the same image files in {one} and in {other}: {len(examples):,}, for example {examples[0][0]} and "
        f"{examples[0][1]}"
        for (one, other), examples in pairs.items()
    ]
