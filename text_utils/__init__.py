"""From captions to token ids: cleaning, augmentation, tokenizer, masking.

Imports only `misc/errors.py`. Begin with `tokenizer.py`.
"""
