"""The modes of `main.py` other than training, one file each.

Only `main.py` imports them; they may import every other folder of `misc/` except `search/`. Begin with `evaluate.py`.
"""
