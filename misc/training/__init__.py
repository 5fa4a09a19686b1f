"""Training: one step, as a whole or in chunks; one epoch; the optimizer; saving and resuming.

Imports `misc/config/`, `misc/data/`, `misc/run/`, `misc/system/` and `model/`. Begin with `trainer.py`.
"""
