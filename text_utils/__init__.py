"""Captions to token ids: cleaning, augmentation, tokenizer, masking.

Imports only the ground floor of `misc/`. Begin with `tokenizer.py`.
"""
