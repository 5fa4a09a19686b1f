"""Noisy correspondence: some training captions belong to other images (Qin et al., RDE, CVPR 2024)."""

import dataclasses
from random import Random

from misc.data.split import Split


def shuffle_captions(split: Split, share: float, seed: int) -> tuple[Split, int]:
    """Shuffles a share of the captions among their images. A back-translation stays with its caption.

    What identity a caption counts as follows from its new image.

    Args:
        share: 0 to 1, of the captions. One of them may get its own image again.
        seed: decides which captions they are, and where they go.

    Returns: the new split, and the number of captions that are now at an image of another person.
    """
    captions = range(len(split))
    random = Random(f"noise {seed}")
    places = random.sample(captions, round(share * len(split)))
    source = list(captions)
    for place, caption in zip(places, random.sample(places, len(places)), strict=True):
        source[place] = caption
    identities = split.caption_identities
    shuffled = dataclasses.replace(
        split,
        captions=[split.captions[caption] for caption in source],
        back_translations=[split.back_translations[caption] for caption in source],
        annotated_captions=[split.annotated_captions[caption] for caption in source],
    )
    return shuffled, sum(identities[place] != identities[source[place]] for place in captions)
