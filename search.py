"""Searches a folder of person pictures by description: the command line.

python search.py index FOLDER --checkpoint C [--engine {exact,faiss,qdrant}]
python search.py query FOLDER "a woman in a red coat" [--image FILE]
python search.py serve FOLDER [--port N]
"""

import argparse
import os
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from misc.errors import UserError
from misc.files import is_file, is_folder
from misc.search.encoder import Encoder, load_encoder
from misc.search.engine import EngineChoice
from misc.search.engines import NAMES, require
from misc.search.gallery import default_index, open_gallery
from misc.search.indexing import UNREADABLE, Update, update_index
from misc.search.result_sheet import draw_result_sheet
from misc.search.searcher import Query, Searcher, checked_description
from misc.system.distributed import choose_device

SHOWN = 10
"""Unreadable files that are told one by one."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Does what the arguments say. Returns the exit status: 2 for a mistake of the user, told in one line, and 130 for
    Ctrl-C."""
    options = parse(arguments)
    try:
        options.run(options)
    except UserError as error:
        print(f"error: {printable(str(error))}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped" + (": the same command goes on from here" if options.run is index else ""), file=sys.stderr)
        return 130
    return 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("search.py", description="Search a folder of person pictures by description.")
    commands = parser.add_subparsers(required=True, metavar="{index,query,serve}")
    of_all = argparse.ArgumentParser(add_help=False)
    of_all.add_argument("folder", type=Path, metavar="FOLDER", help="pictures of persons, at any depth")
    of_all.add_argument("--index", type=Path, metavar="DIR", help="where the index lies (default: FOLDER_index)")
    of_all.add_argument("--checkpoint", metavar="C", help="weights in any form that main.py takes; kept in the index")
    of_all.add_argument("--device", default="auto", help="auto (a GPU where there is one) | cpu | cuda | cuda:N")

    make = commands.add_parser("index", parents=[of_all], help="make an index, or bring it up to date")
    make.add_argument(
        "--engine", choices=NAMES, help="who searches: exact (the default), faiss beyond a million, qdrant"
    )
    make.add_argument("--qdrant", metavar="ADDRESS", help="URL of the server, or a folder for its local mode")
    make.add_argument("--collection", metavar="NAME", help="of Qdrant (default: the name of the index)")
    make.add_argument("--batch-size", type=positive, default=64, metavar="N", help="pictures at a time (default: 64)")
    make.add_argument(
        "--workers", type=non_negative, default=min(8, os.cpu_count() or 1), metavar="N", help="processes that decode"
    )
    make.add_argument("--overwrite", action="store_true", help="take the place of an index of another checkpoint")
    make.add_argument(
        "--set", action="append", default=[], metavar="key=value", help="what the weights do not tell of themselves"
    )
    make.set_defaults(run=index)

    ask = commands.add_parser("query", parents=[of_all], help="print the first results, and draw them")
    ask.add_argument("text", nargs="?", metavar="TEXT", help='as in "a woman in a red coat with a black backpack"')
    ask.add_argument("--image", type=Path, metavar="FILE", help="a picture to look for, instead of a text")
    ask.add_argument("--results", type=positive, default=10, metavar="N", help="default: 10")
    ask.add_argument("--threshold", type=cosine, default=-1.0, metavar="S", help="lowest score, from -1 to 1")
    ask.add_argument("--sheet", type=Path, metavar="PNG", help="where the picture of the results goes")
    ask.set_defaults(run=query)

    show = commands.add_parser("serve", parents=[of_all], help="a page to search with")
    show.add_argument(
        "--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1, this machine alone)"
    )
    show.add_argument("--port", type=non_negative, default=8000, metavar="N", help="default: 8000")
    show.add_argument(
        "--allow-host", action="append", default=[], metavar="NAME", help="a name that browsers call this server by"
    )
    show.set_defaults(run=page)
    for command in (ask, show):
        command.add_argument("--engine", choices=("exact",), help="search exactly, whatever the index was built for")
    return parser.parse_args(arguments)


def positive(text: str) -> int:
    """A whole number from 1."""
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text}: give 1 or more")
    return int(text)


def non_negative(text: str) -> int:
    """A whole number from 0."""
    if int(text) < 0:
        raise argparse.ArgumentTypeError(f"{text}: give 0 or more")
    return int(text)


def cosine(text: str) -> float:
    """A number from -1 to 1."""
    if not -1 <= float(text) <= 1:
        raise argparse.ArgumentTypeError(f"{text}: give a number from -1 to 1")
    return float(text)


def index(options: argparse.Namespace) -> None:
    """Makes the index, or brings it up to date."""
    device = choose_device(options.device)
    if (options.qdrant or options.collection) and options.engine != "qdrant":
        raise UserError(f"--qdrant {options.qdrant or options.collection}: it goes with --engine qdrant")
    if options.set and options.checkpoint is None:
        raise UserError(f"--set {options.set[0]}: it goes with --checkpoint")
    address = options.qdrant
    if address is not None and "://" not in address:
        address = str(Path(address).resolve())
    engine = EngineChoice(options.engine, address, options.collection) if options.engine else None
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
        print(printable(line))


def absolute_checkpoint(checkpoint: str | None) -> str | None:
    """A path of this folder as one from everywhere; a tag as it is."""
    if checkpoint is not None and (is_file(checkpoint) or is_folder(checkpoint)):
        return str(Path(checkpoint).resolve())
    return checkpoint


def summary_lines(done: Update, folder: Path) -> list[str]:
    """What was done, for the terminal."""
    lines = [f"skipped: {path}: {reason}" for path, reason in done.unreadable[:SHOWN]]
    if len(done.unreadable) > SHOWN:
        lines.append(f"skipped: {len(done.unreadable) - SHOWN:,} more, all in {folder / UNREADABLE}")
    return [
        *lines,
        *done.notes,
        f"{done.pictures:,} pictures in {folder}: {done.encoded:,} new or changed, {done.removed:,} gone, "
        f"{len(done.unreadable):,} skipped",
    ]


def query(options: argparse.Namespace) -> None:
    """Prints the first results, and draws them."""
    if (options.text is None) == (options.image is None):
        raise UserError("give one of a TEXT and --image FILE: what is looked for")
    if options.sheet is not None and not options.sheet.name:
        raise UserError(f"--sheet {options.sheet}: give the name of a PNG file")
    description = None if options.text is None else checked_description(options.text)
    wanted = Query(description, file=options.image, count=options.results, threshold=options.threshold)
    searcher = open_searcher(options)
    started = time.perf_counter()
    (found,) = searcher.search([wanted])
    milliseconds = 1000 * (time.perf_counter() - started)
    if isinstance(found, UserError):
        raise found
    print(f"{len(found)} of {len(searcher.gallery):,} pictures, in {milliseconds:.0f} ms", file=sys.stderr)
    for rank, result in enumerate(found, start=1):
        print(f"{rank}\t{result.score:.4f}\t{printable(result.path)}")
    sheet = options.sheet or default_sheet(index_folder(options), wanted)
    missing = draw_result_sheet(sheet, options.folder, wanted, found)
    print(
        printable(f"sheet: {sheet}{f' (without {missing} that cannot be read now)' if missing else ''}"),
        file=sys.stderr,
    )


def default_sheet(folder: Path, wanted: Query) -> Path:
    """In the index, named by the query."""
    sheets = folder / "sheets"
    try:
        sheets.mkdir(exist_ok=True)
    except OSError as error:
        raise UserError(
            f"{sheets} cannot be made ({error.strerror}): give a place for the sheet, --sheet PNG"
        ) from error
    name = re.sub(r"[^\w]+", "_", wanted.description or f"like {wanted.file.name}").strip("_")[:60] or "query"
    return sheets / f"{name}.png"


def page(options: argparse.Namespace) -> None:
    """Serves the page to search with."""
    require("search.py serve", "fastapi", "uvicorn")
    from misc.search.server import LOOPBACK, serve

    searcher = open_searcher(options)
    if options.host not in LOOPBACK:
        print(f"warning: whoever reaches {options.host} can see all pictures of {options.folder}", file=sys.stderr)
    serve(
        searcher,
        options.host,
        options.port,
        options.allow_host,
        tell=lambda address: print(f"{len(searcher.gallery):,} pictures at {address} (Ctrl-C ends it)", flush=True),
    )


def open_searcher(options: argparse.Namespace) -> Searcher:
    """The index of the folder, with the encoder that it was made with."""
    device = choose_device(options.device)
    if not is_folder(options.folder):
        raise UserError(f"{options.folder} is not a folder: give the folder that was indexed")
    info = open_gallery(index_folder(options)).info
    encoder: Encoder = load_encoder(options.checkpoint or info.checkpoint, info.overrides, device)
    return Searcher(options.folder, index_folder(options), encoder, options.engine)


def index_folder(options: argparse.Namespace) -> Path:
    """Where the index lies."""
    return options.index or default_index(options.folder)


def printable(text: str) -> str:
    """What the terminal cannot show, replaced."""
    return text.encode(errors="backslashreplace").decode()


if __name__ == "__main__":
    sys.exit(main())
