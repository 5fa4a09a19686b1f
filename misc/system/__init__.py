"""The machine: processes and devices, number formats, random seeds, signals.

Imports only the ground floor. Begin with `distributed.py`.
"""
