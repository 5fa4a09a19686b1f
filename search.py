"""The command line that searches a folder of person pictures by description.

python search.py index FOLDER --checkpoint C [--engine {exact,faiss,qdrant}]
python search.py query FOLDER "a woman in a red coat" [--image FILE]
python search.py serve FOLDER [--port N]
"""

import argparse
import ipaddress
import os
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from misc.errors import UserError
from misc.files import is_file, is_folder, path_argument, resolved
from misc.search.encoder import Encoder, load_encoder
from misc.search.engine import NAMES, EngineChoice
from misc.search.engines import require
from misc.search.gallery import SHEETS, UNREADABLE, default_index, open_gallery
from misc.search.indexing import Update, update_index
from misc.search.result_sheet import draw_result_sheet
from misc.search.searcher import Query, Searcher, checked_description
from misc.system.distributed import choose_device
from misc.terminal import prepare_streams, report, show

MAX_SKIPPED_SHOWN = 10
"""Skipped files that are listed one by one on the terminal."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command that the arguments specify.

    Returns: the exit status: 0, 2 for a mistake of the user (with a one-line message), or 130 for Ctrl-C.
    """
    prepare_streams()
    options = parse(arguments)
    try:
        options.run(options)
    except UserError as error:
        report(f"error: {error}")
        return 2
    except KeyboardInterrupt:
        report("stopped" + (": run the same command again to continue" if options.run is index else ""))
        return 130
    return 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parses the command line; `run` of the result is the function of the chosen command."""
    parser = argparse.ArgumentParser("search.py", description="Search a folder of person pictures by description.")
    commands = parser.add_subparsers(required=True, metavar="{index,query,serve}")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument(
        "folder", type=path, metavar="FOLDER", help="folder of person pictures; subfolders are included"
    )
    common.add_argument("--index", type=path, metavar="DIR", help="folder of the index (default: FOLDER_index)")
    common.add_argument(
        "--checkpoint",
        type=path_argument,
        metavar="C",
        help="weights in any form that main.py accepts; the index records them",
    )
    common.add_argument("--device", default="auto", help="auto (a GPU if there is one) | cpu | cuda | cuda:N")

    index_parser = commands.add_parser("index", parents=[common], help="build or update an index")
    index_parser.add_argument(
        "--engine",
        choices=NAMES,
        help="search engine: exact (default), faiss (more than a million pictures) or qdrant (a server)",
    )
    index_parser.add_argument(
        "--qdrant", type=path_argument, metavar="ADDRESS", help="URL of the server, or a folder for the local mode"
    )
    index_parser.add_argument(
        "--collection", metavar="NAME", help="name of the Qdrant collection (default: the name of the index)"
    )
    index_parser.add_argument(
        "--batch-size", type=positive, default=64, metavar="N", help="number of pictures per batch (default: 64)"
    )
    index_parser.add_argument(
        "--workers",
        type=non_negative,
        default=min(8, os.cpu_count() or 1),
        metavar="N",
        help="number of decoding processes",
    )
    index_parser.add_argument(
        "--overwrite", action="store_true", help="replace an index that was built with another checkpoint"
    )
    index_parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="key=value",
        help="setting that the weights file does not record, for example model.activation=gelu",
    )
    index_parser.set_defaults(run=index)

    query_parser = commands.add_parser("query", parents=[common], help="print the best results and draw them")
    query_parser.add_argument(
        "text", nargs="?", metavar="TEXT", help='description, for example "a woman in a red coat with a black backpack"'
    )
    query_parser.add_argument("--image", type=path, metavar="FILE", help="picture of the person, instead of a text")
    query_parser.add_argument(
        "--results", type=positive, default=10, metavar="N", help="largest number of results (default: 10)"
    )
    query_parser.add_argument(
        "--threshold", type=cosine, default=-1.0, metavar="S", help="lowest score to show, from -1 to 1"
    )
    query_parser.add_argument("--sheet", type=path, metavar="PNG", help="where to save the results image")
    query_parser.set_defaults(run=query)

    serve_parser = commands.add_parser("serve", parents=[common], help="serve the search page for your browser")
    serve_parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1, this machine only)"
    )
    serve_parser.add_argument(
        "--port", type=non_negative, default=8000, metavar="N", help="port to listen on (default: 8000)"
    )
    serve_parser.add_argument(
        "--allow-host",
        action="append",
        default=[],
        metavar="NAME",
        help="host name that visitors use for this server, unless it is a name or an address of this machine",
    )
    serve_parser.set_defaults(run=page)
    for command in (query_parser, serve_parser):
        command.add_argument("--engine", choices=("exact",), help="search exactly, whichever engine the index uses")
        command.add_argument(
            "--qdrant",
            type=path_argument,
            metavar="ADDRESS",
            help="URL or folder of Qdrant, if the index was built for it",
        )
    return parser.parse_args(arguments)


def path(text: str) -> Path:
    """Parses a path."""
    return Path(path_argument(text))


def positive(text: str) -> int:
    """Parses an integer that is at least 1."""
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text}: give 1 or more")
    return int(text)


def non_negative(text: str) -> int:
    """Parses an integer that is at least 0."""
    if int(text) < 0:
        raise argparse.ArgumentTypeError(f"{text}: give 0 or more")
    return int(text)


def cosine(text: str) -> float:
    """Parses a number from -1 to 1."""
    if not -1 <= float(text) <= 1:
        raise argparse.ArgumentTypeError(f"{text}: give a number from -1 to 1")
    return float(text)


def index(options: argparse.Namespace) -> None:
    """Builds or updates the index."""
    device = choose_device(options.device)
    if (options.qdrant or options.collection) and options.engine != "qdrant":
        option = "--qdrant" if options.qdrant else "--collection"
        raise UserError(f"{option} {options.qdrant or options.collection}: it only works together with --engine qdrant")
    if options.set and options.checkpoint is None:
        raise UserError(f"--set {options.set[0]}: it only works together with --checkpoint")
    engine = EngineChoice(options.engine, qdrant_address(options), options.collection) if options.engine else None
    done = update_index(
        options.folder,
        index_folder(options),
        lambda source, overrides: load_encoder(source, overrides, device),
        checkpoint=absolute_checkpoint(options.checkpoint),
        overrides=options.set,
        engine=engine,
        overwrite=options.overwrite,
        batch_size=options.batch_size,
        workers=options.workers,
    )
    for line in summary_lines(done, index_folder(options)):
        show(line)


def qdrant_address(options: argparse.Namespace) -> str | None:
    """Returns the address of Qdrant that the user gives; that of a folder is absolute."""
    address = options.qdrant
    return address if address is None or "://" in address else str(resolved(address))


def absolute_checkpoint(checkpoint: str | None) -> str | None:
    """Returns the absolute path of a checkpoint file or folder; any other name, such as a tag, stays as it is."""
    if checkpoint is not None and (is_file(checkpoint) or is_folder(checkpoint)):
        return str(resolved(checkpoint))
    return checkpoint


def summary_lines(done: Update, folder: Path) -> list[str]:
    """Returns the lines that report an update on the terminal."""
    lines = [f"skipped: {path}: {reason}" for path, reason in done.unreadable[:MAX_SKIPPED_SHOWN]]
    if len(done.unreadable) > MAX_SKIPPED_SHOWN:
        more = len(done.unreadable) - MAX_SKIPPED_SHOWN
        lines.append(f"skipped: {more:,} more; the complete list is {folder / UNREADABLE}")
    return [
        *lines,
        *done.notes,
        f"{done.pictures:,} pictures in {folder}: {done.encoded:,} new or changed, {done.removed:,} removed, "
        f"{len(done.unreadable):,} skipped",
    ]


def query(options: argparse.Namespace) -> None:
    """Prints the best results and draws them."""
    if (options.text is None) == (options.image is None):
        raise UserError("give either TEXT or --image FILE: a query has exactly one of them")
    if options.sheet is not None and not options.sheet.name:
        raise UserError(f"--sheet {options.sheet}: give the name of a PNG file, for example --sheet results.png")
    description = None if options.text is None else checked_description(options.text)
    wanted = Query(description, file=options.image, count=options.results)
    searcher = open_searcher(options)
    started = time.perf_counter()
    (answer,) = searcher.search([wanted])
    milliseconds = 1000 * (time.perf_counter() - started)
    if isinstance(answer, UserError):
        raise answer
    found = [result for result in answer if result.score >= options.threshold]
    if notice := searcher.notice(wanted):
        report(f"note: {notice}")
    best = "" if found or not answer else f"; the best score is {answer[0].score:.4f}"
    report(f"{len(found)} of {len(searcher.gallery):,} pictures{best}, in {milliseconds:.0f} ms")
    for rank, result in enumerate(found, start=1):
        show(f"{rank}\t{result.score:.4f}\t{result.path}")
    sheet = options.sheet or default_sheet(index_folder(options), wanted)
    missing = draw_result_sheet(sheet, options.folder, wanted, found)
    report(f"sheet: {sheet}{f' (without {missing} that cannot be read now)' if missing else ''}")


def default_sheet(folder: Path, wanted: Query) -> Path:
    """Returns the path of the results image: in the index, with a name made from the query.

    Raises UserError if the folder for results images cannot be created.
    """
    sheets = folder / SHEETS
    try:
        sheets.mkdir(exist_ok=True)
    except OSError as error:
        raise UserError(
            f"{sheets} cannot be created ({error.strerror}): give another file for the results image with --sheet PNG"
        ) from error
    label = f"like {wanted.file.name}" if wanted.file is not None else wanted.description or ""
    name = re.sub(r"[^\w]+", "_", label).strip("_")[:60] or "query"
    return sheets / f"{name}.png"


def page(options: argparse.Namespace) -> None:
    """Serves the search page."""
    require("search.py serve", "fastapi", "uvicorn")
    from misc.search.server import serve

    searcher = open_searcher(options)
    if not is_loopback(options.host):
        report(f"warning: everybody who reaches {options.host} can see all pictures of {options.folder}")
    serve(
        searcher,
        options.host,
        options.port,
        options.allow_host,
        announce=lambda address: show(f"{len(searcher.gallery):,} pictures at {address} (Ctrl-C stops the server)"),
    )


def is_loopback(host: str) -> bool:
    """Returns whether only programs of this machine reach an address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:  # a name
        return host == "localhost"


def open_searcher(options: argparse.Namespace) -> Searcher:
    """Opens the index of the folder, and loads the encoder that it was built with.

    Raises UserError if there is no such folder or index, or the encoder does not match the index.
    """
    device = choose_device(options.device)
    if not is_folder(options.folder):
        raise UserError(f"{options.folder} is not a folder: give the folder of pictures that was indexed")
    info = open_gallery(index_folder(options)).info
    encoder: Encoder = load_encoder(options.checkpoint or info.checkpoint, info.overrides, device)
    if options.checkpoint is None and encoder.fingerprint != info.fingerprint:
        raise UserError(
            f"{info.checkpoint} has changed since {index_folder(options)} was built with it: give the earlier weights "
            "with --checkpoint, or index the folder again with --overwrite"
        )
    return Searcher(options.folder, index_folder(options), encoder, options.engine, qdrant_address(options))


def index_folder(options: argparse.Namespace) -> Path:
    """Returns the folder of the index."""
    return options.index or default_index(options.folder)


if __name__ == "__main__":
    sys.exit(main())
