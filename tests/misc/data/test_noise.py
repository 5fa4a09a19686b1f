"""Noisy correspondence: captions at other images."""

from collections import Counter

import pytest

from misc.data.noise import shuffle_captions
from misc.data.split import Split

PEOPLE, IMAGES, CAPTIONS = 50, 2, 2
TOTAL = PEOPLE * IMAGES * CAPTIONS
SPLIT = Split(
    image_paths=[f"{image}.jpg" for image in range(PEOPLE * IMAGES)],
    image_identities=[image // IMAGES for image in range(PEOPLE * IMAGES)],
    captions=[f"caption {number}" for number in range(TOTAL)],
    back_translations=[None if number % 3 else f"translation {number}" for number in range(TOTAL)],
    caption_images=[number // CAPTIONS for number in range(TOTAL)],
    annotated_captions=[f"Caption {number}." for number in range(TOTAL)],
)


def rows(split: Split) -> list[tuple]:
    return list(zip(split.captions, split.back_translations, split.annotated_captions, strict=True))


@pytest.mark.parametrize("share", [0.2, 0.5, 0.8, 1])
def test_a_share_of_the_captions_is_shuffled_among_images(share):
    noisy, moved = shuffle_captions(SPLIT, share, seed=1)
    before, after = rows(SPLIT), rows(noisy)
    assert Counter(after) == Counter(before)  # none is lost, and each keeps its translation
    changed = sum(one != other for one, other in zip(before, after, strict=True))
    assert 0.9 * share * TOTAL < changed <= share * TOTAL  # some get their own place again
    # the number of a caption tells whom it describes
    described = [int(caption.split()[1]) // (IMAGES * CAPTIONS) for caption in noisy.captions]
    assert moved == sum(one != other for one, other in zip(described, noisy.caption_identities, strict=True))
    assert 0.85 * changed < moved <= changed


def test_images_and_identities_stay():
    noisy, _ = shuffle_captions(SPLIT, 0.5, seed=1)
    for name in ("image_paths", "image_identities", "caption_images", "caption_identities", "counts"):
        assert getattr(noisy, name) == getattr(SPLIT, name), name


def test_the_seed_decides_which_captions_are_shuffled():
    noisy, again, other = (shuffle_captions(SPLIT, 0.2, seed)[0] for seed in (1, 1, 2))
    assert noisy == again != other
    changed = [
        {number for number, caption in enumerate(split.captions) if caption != SPLIT.captions[number]}
        for split in (noisy, other)
    ]
    assert changed[0] != changed[1]


def test_nothing_is_shuffled_without_noise():
    noisy, moved = shuffle_captions(SPLIT, 0, seed=1)
    assert (noisy, moved) == (SPLIT, 0) and noisy.fingerprint == SPLIT.fingerprint
