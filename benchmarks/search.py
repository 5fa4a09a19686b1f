"""Measures search in many pictures: build time, memory, latency and recall of exact search and of faiss.

python -m benchmarks.search [--pictures N] [--width D] [--folder DIR] [--json FILE]

The features are random, but clustered like real ones: each is near the centre of a person, and all share a direction,
as CLIP's features do. There are two kinds of queries: "pictures" are as near to a centre as the features, and
"descriptions" are further away. Each engine is measured in its own process, with the code that `search.py` runs.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.options import check_output_file, check_positive
from misc.errors import UserError
from misc.files import is_folder
from misc.search import engines
from misc.search.engine import Engine, EngineChoice
from misc.search.gallery import Encoded, Gallery, Info, held_index, open_gallery, write_generation, write_info
from misc.search.pictures import Picture
from misc.terminal import prepare_streams, report, show

PICTURES_OF_A_PERSON = 50
QUERIES, RESULTS, QUERIES_TOGETHER = 200, 10, 50
ROUNDS = 5
BLOCK = 1 << 15

T = TypeVar("T")


def main() -> int:
    """Measures what the command line asks for. Returns the exit status: 0, or 2 for a mistake of the user."""
    prepare_streams()
    options = _parse()
    try:
        if options.stage:
            show(json.dumps(STAGES[options.stage](options)))
        else:
            measure_stages(options)
    except UserError as error:
        report(f"error: {error}")
        return 2
    return 0


def measure_stages(options: argparse.Namespace) -> None:
    """Runs each stage in its own process, prints its measurements, and writes them as JSON.

    Raises UserError if an option is invalid, or faiss is not installed.
    """
    if options.pictures < PICTURES_OF_A_PERSON:
        raise UserError(f"--pictures {options.pictures}: give {PICTURES_OF_A_PERSON} or more")
    check_positive("--width", options.width)
    if options.folder is not None and not is_folder(options.folder):
        raise UserError(f"--folder {options.folder}: it is not a folder: create it, or give another one")
    check_output_file("--json", options.json)
    engines.require("benchmarks.search", "faiss")
    measured = {}
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        for stage in STAGES:
            command = [sys.executable, "-m", "benchmarks.search", *sys.argv[1:], "--stage", stage, "--folder", folder]
            output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            measured[stage] = json.loads(output.splitlines()[-1])
            show(f"{stage}: " + ", ".join(f"{name} {value}" for name, value in measured[stage].items()))
    if options.json:
        options.json.write_text(json.dumps(measured, indent=1) + "\n", encoding="utf-8")


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m benchmarks.search", description=__doc__.partition("\n")[0])
    parser.add_argument("--pictures", type=int, default=1_000_000, metavar="N", help="number of pictures")
    parser.add_argument("--width", type=int, default=512, metavar="D", help="width of the features")
    parser.add_argument(
        "--folder",
        type=Path,
        metavar="DIR",
        help="folder for a temporary index; needs 4 kB per picture at a width of 512",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="file for the measurements")
    parser.add_argument("--stage", choices=list(STAGES), help=argparse.SUPPRESS)
    return parser.parse_args()


def write_index(options: argparse.Namespace) -> dict[str, float]:
    """Writes random features into an index, and measures how long the generation takes to write."""
    info = Info("none", [], "none", options.width)
    generator = torch.Generator().manual_seed(0)
    with held_index(options.folder):
        encoded = Encoded(options.folder, info.fingerprint, options.width)
        for start in range(0, options.pictures, BLOCK):
            numbers = torch.arange(start, min(start + BLOCK, options.pictures))
            pictures = [Picture(f"{number % 1000:03}/{number:08}.jpg", 0, 0) for number in numbers.tolist()]
            centres = _centres(numbers // PICTURES_OF_A_PERSON, options.width)
            encoded.add(pictures, _about(centres, 0.9, generator))
        started = time.perf_counter()
        info = write_generation(options.folder, info, sorted(encoded.pictures), None, encoded)
        write_info(options.folder, info)
        seconds = time.perf_counter() - started
        encoded.clear()
        encoded.close()
    size = sum(path.stat().st_size for path in options.folder.iterdir())
    return {"build_seconds": round(seconds, 1), "disk_gigabytes": round(size / 1e9, 2)}


def exact(options: argparse.Namespace) -> dict[str, float]:
    """Measures exact search, and saves its results as the reference for `faiss_search`."""
    opening, (gallery, engine) = _timed(lambda: _opened(options.folder))
    found = {kind: _rows(engine, queries) for kind, queries in _queries(gallery, options).items()}
    torch.save(found, options.folder / "exact.pt")
    return {"open_seconds": opening, **_latency(gallery, engine, options), **_memory()}


def faiss(options: argparse.Namespace) -> dict[str, float]:
    """Measures how faiss builds its lists; the memory includes the check of their recall."""
    gallery = open_gallery(options.folder)
    building, (settings, notes) = _timed(lambda: engines.build(gallery, EngineChoice("faiss")))
    write_info(options.folder, Info(**{**vars(gallery.info), "engine": settings}))
    size = next(options.folder.glob("faiss_*")).stat().st_size
    show(" ".join(map(str, notes)))
    return {"build_seconds": building, "disk_gigabytes": round(size / 1e9, 2), **_memory()}


def faiss_search(options: argparse.Namespace) -> dict[str, float]:
    """Measures search with faiss, as `search.py query` and `search.py serve` do it."""
    opening, (gallery, engine) = _timed(lambda: _opened(options.folder))
    expected = torch.load(options.folder / "exact.pt")
    recall = {}
    for kind, queries in _queries(gallery, options).items():
        pairs = zip(_rows(engine, queries), expected[kind], strict=True)
        shares = [torch.isin(wanted, rows).float().mean().item() for rows, wanted in pairs]
        recall[f"recall_{kind}"] = round(statistics.mean(shares), 4)
    return {"open_seconds": opening, **_latency(gallery, engine, options), **recall, **_memory()}


STAGES = {"index": write_index, "exact": exact, "faiss": faiss, "faiss_search": faiss_search}


def _opened(folder: Path) -> tuple[Gallery, Engine]:
    gallery = open_gallery(folder)
    return gallery, engines.open_engine(gallery)


def _timed(function: Callable[[], T]) -> tuple[float, T]:
    started = time.perf_counter()
    result = function()
    return round(time.perf_counter() - started, 2), result


def _rows(engine: Engine, queries: Tensor) -> list[Tensor]:
    return [rows for _, rows in engine.search(queries, RESULTS)]


def _latency(gallery: Gallery, engine: Engine, options: argparse.Namespace) -> dict[str, float]:
    """Measures milliseconds per query, including the paths of its ten results: one at a time, and fifty together."""
    queries = _queries(gallery, options)["descriptions"]

    def milliseconds(block: Tensor) -> float:
        started = time.perf_counter()
        for rows in _rows(engine, block):
            for row in rows.tolist():
                gallery.picture(row)
        return 1000 * (time.perf_counter() - started)

    single = sorted(milliseconds(query[None]) for query in queries)
    together = [milliseconds(queries[:QUERIES_TOGETHER]) / QUERIES_TOGETHER for _ in range(ROUNDS)]
    return {
        "median_ms": round(statistics.median(single), 1),
        "percentile_95_ms": round(single[int(0.95 * len(single))], 1),
        "of_fifty_ms": round(statistics.median(together), 2),
    }


def _memory() -> dict[str, float]:
    """Returns the peak memory of the process, and its current memory without cached pages of files."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    kilobytes = {line.split(":")[0]: int(line.split()[1]) for line in lines if line.endswith("kB")}
    return {
        "peak_gigabytes": round(kilobytes["VmHWM"] / 1e6, 2),
        "own_gigabytes": round(kilobytes["RssAnon"] / 1e6, 2),
    }


def _centres(people: Tensor, width: int) -> Tensor:
    """Returns the centres (B, D) of persons by number: the sum of a common direction and one for each person."""
    rows = [np.random.default_rng(person).standard_normal(width) for person in people.unique().tolist()]
    own = torch.from_numpy(np.stack(rows)).float()[people.unique(return_inverse=True)[1]]
    common = torch.from_numpy(np.random.default_rng(1 << 40).standard_normal(width)).float()
    return F.normalize(F.normalize(own, dim=1) + 0.8 * F.normalize(common, dim=0), dim=1)


def _about(centres: Tensor, spread: float, generator: torch.Generator) -> Tensor:
    """Returns random features (B, D), one near each centre; `spread` is the length of the noise added to it."""
    noise = F.normalize(torch.randn(centres.shape, generator=generator), dim=1)
    return F.normalize(centres + spread * noise, dim=1)


def _queries(gallery: Gallery, options: argparse.Namespace) -> dict[str, Tensor]:
    """Returns queries (Q, D) of both kinds, for the same persons."""
    generator = torch.Generator().manual_seed(1)
    people = torch.randint(len(gallery) // PICTURES_OF_A_PERSON, (QUERIES,), generator=generator)
    centres = _centres(people, options.width)
    return {"pictures": _about(centres, 0.9, generator), "descriptions": _about(centres, 2.0, generator)}


if __name__ == "__main__":
    sys.exit(main())
