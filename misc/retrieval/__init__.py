"""Text-to-image retrieval: encoding and ranking a split, metrics, and what each query retrieved.

Imports `misc/data/`, `misc/run/`, `misc/system/` and below. Begin with `evaluation.py`.
"""
