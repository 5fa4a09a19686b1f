"""The configuration: the table of all keys, and reading YAML files and arguments into one checked configuration.

Imports `misc/data/`, `model/` and `text_utils/` only for the names that a key accepts. Begin with `rules.py`.
"""
