"""The paper's study: every published row as data, the report, and what each module contributes.

Imports `misc/retrieval/`, `misc/config/`, `misc/run/` and below. Begin with `rows.py`.
"""
