"""Builders: from the configuration to parts. What they build takes named numbers and knows no configuration.

Imports every room that it builds from. Begin with `run.py`, which puts a training run together.
"""
