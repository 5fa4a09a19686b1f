"""The modes of `main.py` besides training, one file each.

They stand above all rooms but `main.py`. Begin with `evaluate.py`.
"""
