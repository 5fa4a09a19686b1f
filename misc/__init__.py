"""Everything around the model: data, training, evaluation, the study, search.

Each folder imports only folders below it (tests/test_imports.py). At the bottom are two files: `errors.py` (mistakes of
the user) and `files.py` (files that are written completely or not at all).
"""
