"""From an annotation to batches: entries, images, views, samples, the sampler, the data loaders.

Imports `model/` (for the views that the model encodes), `text_utils/` and `misc/system/`. Begin with `samples.py`.
"""
