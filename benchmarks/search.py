"""Search in many pictures: time to build, memory, latency and recall of exact search and of faiss.

python -m benchmarks.search [--pictures N] [--width D] [--folder DIR] [--json FILE]

Features are clustered, as those of people are: each lies about a person's centre, and all share a direction, as
CLIP's do. Queries come in two kinds: like pictures, and like descriptions, which lie further away. Each engine is
measured in a process of its own, by the code that `search.py` runs.
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

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from misc.search import engines
from misc.search.engine import Engine, EngineChoice
from misc.search.gallery import Encoded, Gallery, Info, held_index, open_gallery, write_generation, write_info
from misc.search.pictures import Picture

PICTURES_OF_A_PERSON = 50
QUERIES, RESULTS, TOGETHER = 200, 10, 50
ROUNDS = 5
BLOCK = 1 << 15


def main() -> None:
    """Measures, prints a table, and writes JSON."""
    options = _parse()
    if options.stage:
        print(json.dumps(STAGES[options.stage](options)))
        return
    measured = {}
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        for stage in STAGES:
            command = [sys.executable, "-m", "benchmarks.search", *sys.argv[1:], "--stage", stage, "--folder", folder]
            output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            measured[stage] = json.loads(output.splitlines()[-1])
            print(f"{stage}: " + ", ".join(f"{name} {value}" for name, value in measured[stage].items()), flush=True)
    if options.json:
        options.json.write_text(json.dumps(measured, indent=1) + "\n")


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m benchmarks.search", description=__doc__.partition("\n")[0])
    parser.add_argument("--pictures", type=int, default=1_000_000, metavar="N")
    parser.add_argument("--width", type=int, default=512, metavar="D")
    parser.add_argument("--folder", type=Path, metavar="DIR", help="for the index; 4 kB a picture at 512")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--stage", choices=list(STAGES), help=argparse.SUPPRESS)
    return parser.parse_args()


def write_index(options: argparse.Namespace) -> dict[str, float]:
    """Features into an index, as if they were encoded. What is timed is the writing of the generation."""
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
    """Exact search; its results are what those of others are compared with."""
    opening, (gallery, engine) = _timed(lambda: _opened(options.folder))
    found = {kind: _rows(engine, queries) for kind, queries in _queries(gallery, options).items()}
    torch.save(found, options.folder / "exact.pt")
    return {"open_seconds": opening, **_latency(gallery, engine, options), **_memory()}


def faiss(options: argparse.Namespace) -> dict[str, float]:
    """Built and searched in one process, so the memory is that of building too."""
    gallery = open_gallery(options.folder)
    building, (settings, notes) = _timed(lambda: engines.build(gallery, EngineChoice("faiss")))
    write_info(options.folder, Info(**{**vars(gallery.info), "engine": settings}))
    size = next(options.folder.glob("faiss_*")).stat().st_size
    print(*notes)
    return {"build_seconds": building, "disk_gigabytes": round(size / 1e9, 2), **_memory()}


def faiss_search(options: argparse.Namespace) -> dict[str, float]:
    """What `query` and `serve` do."""
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


def _timed(function: Callable) -> tuple[float, object]:
    started = time.perf_counter()
    result = function()
    return round(time.perf_counter() - started, 2), result


def _rows(engine: Engine, queries: Tensor) -> list[Tensor]:
    return [rows for _, rows in engine.search(queries, RESULTS)]


def _latency(gallery: Gallery, engine: Engine, options: argparse.Namespace) -> dict[str, float]:
    """Milliseconds of a query for ten paths: the first, alone (median and 95th percentile), and of fifty at once."""
    queries = _queries(gallery, options)["descriptions"]

    def milliseconds(block: Tensor) -> float:
        started = time.perf_counter()
        for rows in _rows(engine, block):
            for row in rows.tolist():
                gallery.picture(row)
        return 1000 * (time.perf_counter() - started)

    alone = sorted(milliseconds(query[None]) for query in queries)
    together = [milliseconds(queries[:TOGETHER]) / TOGETHER for _ in range(ROUNDS)]
    return {
        "median_ms": round(statistics.median(alone), 1),
        "percentile_95_ms": round(alone[int(0.95 * len(alone))], 1),
        "of_fifty_ms": round(statistics.median(together), 2),
    }


def _memory() -> dict[str, float]:
    """Peak of the process; and what is left of it without the pages of files, which the system takes back at need."""
    lines = Path("/proc/self/status").read_text().splitlines()
    kilobytes = {line.split(":")[0]: int(line.split()[1]) for line in lines if line.endswith("kB")}
    return {
        "peak_gigabytes": round(kilobytes["VmHWM"] / 1e6, 2),
        "own_gigabytes": round(kilobytes["RssAnon"] / 1e6, 2),
    }


def _centres(people: Tensor, width: int) -> Tensor:
    """(B, D) of persons by number: a common direction, and one of their own."""
    rows = [np.random.default_rng(person).standard_normal(width) for person in people.unique().tolist()]
    own = torch.from_numpy(np.stack(rows)).float()[people.unique(return_inverse=True)[1]]
    common = torch.from_numpy(np.random.default_rng(1 << 40).standard_normal(width)).float()
    return F.normalize(F.normalize(own, dim=1) + 0.8 * F.normalize(common, dim=0), dim=1)


def _about(centres: Tensor, spread: float, generator: torch.Generator) -> Tensor:
    """(B, D), each about its centre; `spread` is the length of what is added to it."""
    noise = F.normalize(torch.randn(centres.shape, generator=generator), dim=1)
    return F.normalize(centres + spread * noise, dim=1)


def _queries(gallery: Gallery, options: argparse.Namespace) -> dict[str, Tensor]:
    """(Q, D) of both kinds, for the same persons."""
    generator = torch.Generator().manual_seed(1)
    people = torch.randint(len(gallery) // PICTURES_OF_A_PERSON, (QUERIES,), generator=generator)
    centres = _centres(people, options.width)
    return {"pictures": _about(centres, 0.9, generator), "descriptions": _about(centres, 2.0, generator)}


if __name__ == "__main__":
    main()
