"""The paper's study: every published row as data, the report, and the contribution of each module.

Imports `misc/retrieval/`, `misc/config/`, `misc/run/` and below. Begin with `rows.py`.
"""
