"""From an annotation to batches: entries, images, views, samples, the sampler, loaders.

Imports `model/` for the views that it encodes, `text_utils/` and `misc/system/`. Begin with `samples.py`.
"""
