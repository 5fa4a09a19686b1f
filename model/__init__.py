"""TBPS-CLIP itself: views in, features out; the losses; weights in and out (`pretrained/`).

Imports `text_utils/` and the ground floor of `misc/`, and knows no configuration. Begin with `tbps_clip.py`.
"""
