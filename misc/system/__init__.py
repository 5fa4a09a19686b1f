"""The machine: ranks of torchrun and SLURM, devices, number formats, random seeds, signals.

Imports only `misc/errors.py` and `misc/files.py`. Begin with `distributed.py`.
"""
