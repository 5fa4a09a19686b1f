"""The command line of the demo dataset.

python -m misc.pedestrians FOLDER [--train-identities N] [--val-identities N] [--test-identities N]
                                  [--images-per-identity N] [--height N] [--width N] [--seed N] [--workers N]
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from misc.errors import UserError
from misc.files import path_argument
from misc.pedestrians.dataset import draw_dataset
from misc.terminal import prepare_streams, report


def main(arguments: Sequence[str] | None = None) -> None:
    """Draws the dataset that the arguments describe. A mistake of the user exits with one line and status 2."""
    prepare_streams()
    parser = argparse.ArgumentParser("python -m misc.pedestrians", description="Draw synthetic pedestrians.")
    described = "a new or empty folder, or one that already contains this dataset"
    parser.add_argument("folder", type=path_argument, help=described)
    defaults = draw_dataset.__kwdefaults__
    assert defaults is not None
    for name, default in defaults.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default, metavar="N")
    try:
        options = vars(parser.parse_args(arguments))
        draw_dataset(**options | {"folder": Path(options["folder"])})
    except UserError as error:
        report(f"error: {error}")
        sys.exit(2)


if __name__ == "__main__":
    main()
