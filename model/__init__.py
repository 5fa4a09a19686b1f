"""The model: encoders from views to features, losses, and reading and writing weights (`pretrained/`).

Imports `text_utils/`, `misc/errors.py` and `misc/files.py`, and knows no configuration. Begin with `tbps_clip.py`.
"""
