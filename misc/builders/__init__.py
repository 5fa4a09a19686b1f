"""Builders: from the configuration to the parts of a run. The parts take named numbers and know no configuration.

Imports every folder that it builds from. Begin with `run.py`, which builds a whole training run.
"""
