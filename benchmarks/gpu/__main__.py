"""Runs `python -m benchmarks.gpu`. First it checks that the packages are there, because a GPU machine may lack some."""

import importlib.util
import sys

NEEDED = {
    "torch": "torch",
    "torchvision": "torchvision",
    "numpy": "numpy",
    "yaml": "pyyaml",
    "easydict": "easydict",
    "ftfy": "ftfy",
    "regex": "regex",
    "tqdm": "tqdm",
    "PIL": "pillow",
    "safetensors": "safetensors",
    "filelock": "filelock",
}
"""Modules that every part imports, with the packages that contain them."""

missing = [package for module, package in NEEDED.items() if importlib.util.find_spec(module) is None]
if missing:
    print(f"error: packages are missing: run `pip install {' '.join(missing)}`", file=sys.stderr)
    sys.exit(2)

from benchmarks.gpu.report import main  # noqa: E402  # only after the check

sys.exit(main())
