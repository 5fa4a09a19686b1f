"""Everything around the model: data, training, evaluation, the study, search.

Each folder is a room, and a room imports only rooms below it (tests/test_imports.py). The ground floor is here:
`errors.py` (mistakes of the user) and `files.py` (files that are written whole or not at all).
"""
