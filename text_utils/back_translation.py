"""Keeps `python -m text_utils.back_translation` working: it starts the command in `misc/data/back_translation.py`."""

import runpy

if __name__ == "__main__":
    runpy.run_module("misc.data.back_translation", run_name="__main__", alter_sys=True)
