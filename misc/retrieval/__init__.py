"""Text-to-image retrieval: encoding and ranking a split, metrics, and reports on single queries.

Imports `misc/data/`, `misc/run/`, `misc/system/` and their dependencies. Begin with `evaluation.py`.
"""
