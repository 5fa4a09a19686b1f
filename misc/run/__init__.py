"""What a run leaves behind: its folder with every file name, its log, its checkpoints, its progress.

Imports only the ground floor and the reader of archives in `model/pretrained/`. Begin with `folder.py`.
"""
