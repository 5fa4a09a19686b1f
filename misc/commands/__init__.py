"""The modes of `main.py` other than training, one file each.

Only `main.py` imports this room; it may import every other. Begin with `evaluate.py`.
"""
