"""The command line of `main.py`, and its modes other than training, one file each.

Only `main.py` imports them; they may import every other folder of `misc/` except `search/`. Begin with `evaluate.py`.
"""
