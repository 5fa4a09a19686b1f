"""Proves and measures the whole path on a GPU (`make gpu`); without a GPU, a small version runs on the CPU.

Imports what `benchmarks/` imports, and the reference values of `tests/`. Begin with `report.py`.
"""
