import math
from random import Random

import pytest

from text_utils.augmentation import augment_caption, random_deletion

CAPTION = "a man wearing a red shirt and blue jeans"


def within_six_sigma(count: int, trials: int, probability: float) -> bool:
    """Six standard deviations of a binomial count: wrong for a right implementation once in 10^9 seeds."""
    return abs(count - trials * probability) <= 6 * math.sqrt(trials * probability * (1 - probability))


def augment(
    random: Random,
    caption: str = CAPTION,
    back_translation: str | None = None,
    *,
    back: float = 0.0,
    delete: float = 0.0,
) -> str:
    return augment_caption(
        caption, back_translation, back_translation_probability=back, deletion_probability=delete, random=random
    )


def test_each_word_is_dropped_with_its_probability():
    words = [str(i) for i in range(20)]
    random = Random(0)
    counts = dict.fromkeys(words, 0)
    for _ in range(5000):
        kept = random_deletion(" ".join(words), 0.05, random).split()
        assert kept == sorted(kept, key=int)
        for word in kept:
            counts[word] += 1
    assert all(within_six_sigma(count, 5000, 0.95) for count in counts.values())


def test_probability_zero_drops_nothing():
    assert random_deletion(CAPTION, 0.0, Random(0)) == CAPTION


def test_one_word_at_random_is_left():
    random = Random(0)
    left = [random_deletion("red green blue", 1.0, random) for _ in range(3000)]
    assert set(left) == {"red", "green", "blue"}
    assert all(within_six_sigma(left.count(word), 3000, 1 / 3) for word in set(left))


@pytest.mark.parametrize("caption, expected", [("", ""), ("   ", ""), ("shirt", "shirt")])
def test_empty_and_one_word_captions_survive(caption, expected):
    for probability in (0.0, 0.05, 1.0):
        assert random_deletion(caption, probability, Random(0)) == expected
        assert augment(Random(0), caption, back=1.0, delete=probability) == expected


def test_the_back_translation_takes_the_place_of_the_caption_at_its_probability():
    random = Random(0)
    results = [augment(random, "original", "translated", back=0.1) for _ in range(10_000)]
    assert set(results) == {"original", "translated"}
    assert within_six_sigma(results.count("translated"), 10_000, 0.1)


def test_without_back_translation_the_caption_is_kept():
    assert augment(Random(0), back=1.0) == CAPTION


def test_words_of_the_back_translation_are_deleted_too():
    assert augment(Random(0), "original", "one two three", back=1.0, delete=1.0) in ("one", "two", "three")


def test_the_random_state_alone_decides():
    first, again = (
        [augment(random, CAPTION, "a man in red", back=0.5, delete=0.3) for _ in range(50)]
        for random in (Random(7), Random(7))
    )
    assert first == again
    assert len(set(first)) > 10


def test_a_missing_back_translation_changes_no_other_draw():
    for seed in range(50):
        with_one = augment(Random(seed), CAPTION, CAPTION, back=0.5, delete=0.3)
        assert with_one == augment(Random(seed), CAPTION, None, back=0.5, delete=0.3)
