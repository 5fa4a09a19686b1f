"""The files of a run: its folder with every file name, its log, its checkpoints, its progress.

Imports only `misc/errors.py`, `misc/files.py` and the archive reader in `model/pretrained/`. Begin with `folder.py`.
"""
