"""Runs `python -m benchmarks`. The code is in `suite.py`, which the processes that measure memory can import."""

import sys

from benchmarks.suite import main

sys.exit(main())
