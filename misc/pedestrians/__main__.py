"""The command line of the demo dataset.

python -m misc.pedestrians FOLDER [--train-identities N] [--val-identities N] [--test-identities N]
                                  [--images-per-identity N] [--height N] [--width N] [--seed N] [--workers N]
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from misc.errors import UserError
from misc.pedestrians.dataset import draw_dataset
from misc.terminal import prepare_streams, report


def main(arguments: Sequence[str] | None = None) -> None:
    """Draws the dataset that the arguments describe. A mistake of the user exits with one line and status 2."""
    prepare_streams()
    parser = argparse.ArgumentParser("python -m misc.pedestrians", description="Draw synthetic pedestrians.")
    parser.add_argument("folder", type=Path, help="a new or empty folder, or one that already contains this dataset")
    defaults = draw_dataset.__kwdefaults__
    assert defaults is not None
    for name, default in defaults.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default, metavar="N")
    try:
        draw_dataset(**vars(parser.parse_args(arguments)))
    except UserError as error:
        report(f"error: {error}")
        sys.exit(2)


if __name__ == "__main__":
    main()
