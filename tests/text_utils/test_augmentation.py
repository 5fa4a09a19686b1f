import math
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from random import Random

import pytest

from text_utils.augmentation import (
    NEEDS_SYNONYMS,
    TEXT_OPERATIONS,
    augment_caption,
    eda,
    random_deletion,
    random_insertion,
    random_swap,
    synonym_replacement,
)
from text_utils.stop_words import STOP_WORDS

CAPTION = "a man wearing a red shirt and blue jeans"
NUMBERS = [str(i) for i in range(10)]
SYNONYMS = {"red": ["crimson", "scarlet"], "shirt": ["jersey"], "a": ["angstrom"], "and": ["plus"], "the": ["thee"]}


def synonyms(word: str) -> list[str]:
    return SYNONYMS.get(word, [])


def doubled(word: str) -> list[str]:
    """Returns the doubled word as the only synonym of a word of one character, so that replacements can be counted."""
    return [] if len(word) > 1 else [word * 2]


def equally_often(found: list[str], expected: set[str]) -> bool:
    counts = Counter(found)
    return counts.keys() == expected and all(
        within_six_sigma(count, len(found), 1 / len(expected)) for count in counts.values()
    )


def within_six_sigma(count: int, trials: int, probability: float) -> bool:
    """Whether a binomial count is within six standard deviations: correct code fails for one in 10^9 seeds."""
    return abs(count - trials * probability) <= 6 * math.sqrt(trials * probability * (1 - probability))


def apply(
    operation: str | None, random: Random, caption: str = CAPTION, back_translation: str | None = None, **settings
) -> str:
    settings = {"back_translation_probability": 0.0, "alpha": 0.3, "synonyms": synonyms} | settings
    return augment_caption(caption, back_translation, operation=operation, random=random, **settings)


def augment(
    random: Random,
    caption: str = CAPTION,
    back_translation: str | None = None,
    *,
    back: float = 0.0,
    delete: float = 0.0,
) -> str:
    settings = {"back_translation_probability": back, "alpha": delete, "synonyms": None}
    return apply("random_deletion", random, caption, back_translation, **settings)


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


def test_the_back_translation_replaces_the_caption_with_its_probability():
    random = Random(0)
    results = [augment(random, "original", "translated", back=0.1) for _ in range(10_000)]
    assert set(results) == {"original", "translated"}
    assert within_six_sigma(results.count("translated"), 10_000, 0.1)


def test_without_back_translation_the_caption_is_kept():
    assert augment(Random(0), back=1.0) == CAPTION


def test_words_of_the_back_translation_are_deleted_too():
    assert augment(Random(0), "original", "one two three", back=1.0, delete=1.0) in ("one", "two", "three")


def test_only_the_random_state_decides():
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


class Scripted(Random):
    """A generator that returns the given numbers and has no others."""

    def __new__(cls, *numbers: float):  # Python 3.10 would take them for seeds
        return super().__new__(cls)

    def __init__(self, *numbers: float):
        super().__init__()
        self.numbers = list(numbers)

    def random(self) -> float:
        return self.numbers.pop(0)


def test_deletion_draws_once_for_the_back_translation_and_once_for_each_word():
    random = Scripted(0.2, 0.04, 0.05, 0.9, 0.0)
    assert augment(random, "one two three four", "five six", back=0.1, delete=0.05) == "two three"
    random = Scripted(0.09, 0.06, 0.04)
    assert augment(random, "one two three four", "five six", back=0.1, delete=0.05) == "five"


def test_a_word_is_replaced_everywhere_by_one_of_its_synonyms():
    random = Random(0)
    results = [synonym_replacement("red shirts and red shoes", 0.05, random, synonyms) for _ in range(2000)]
    assert equally_often(results, {"crimson shirts and crimson shoes", "scarlet shirts and scarlet shoes"})


@pytest.mark.parametrize(("alpha", "count"), [(0.0, 1), (0.05, 1), (0.1, 1), (0.35, 3), (0.99, 9), (1.0, 10)])
def test_a_share_of_the_words_is_replaced(alpha, count):
    random = Random(0)
    replaced = Counter()
    for _ in range(2000):
        words = synonym_replacement(" ".join(NUMBERS), alpha, random, doubled).split()
        assert [word[0] for word in words] == NUMBERS
        assert sum(len(word) == 2 for word in words) == count
        replaced.update(word[0] for word in words if len(word) == 2)
    assert all(within_six_sigma(replaced[number], 2000, count / 10) for number in NUMBERS)


def test_words_are_counted_with_those_that_cannot_be_replaced():
    """Half of the four words are two words, not one of the two that have a synonym."""
    replaced = synonym_replacement("shirt of red wool", 0.5, Random(0), synonyms)
    assert replaced in ("jersey of crimson wool", "jersey of scarlet wool")


def test_the_replaced_words_are_distinct():
    replaced = {synonym_replacement("red red red shirt", 0.5, Random(seed), synonyms) for seed in range(50)}
    assert replaced == {"crimson crimson crimson jersey", "scarlet scarlet scarlet jersey"}


def test_if_too_few_words_have_a_synonym_all_of_them_are_replaced():
    assert synonym_replacement("The shirt and a hat", 1.0, Random(0), synonyms) == "The jersey and a hat"


@pytest.mark.parametrize("operation", [synonym_replacement, random_insertion])
@pytest.mark.parametrize("caption", ["a and the", "A And THE", "green hat"])
def test_without_a_word_that_has_a_synonym_the_caption_stays(operation, caption):
    every = {**SYNONYMS, "A": ["angstrom"], "And": ["plus"], "THE": ["thee"]}
    assert operation(caption, 1.0, Random(0), lambda word: every.get(word, [])) == caption


def test_a_synonym_is_inserted_at_any_place():
    random = Random(0)
    results = [random_insertion("a shirt", 0.05, random, synonyms) for _ in range(3000)]
    assert equally_often(results, {"jersey a shirt", "a jersey shirt", "a shirt jersey"})


def test_the_inserted_word_is_a_random_synonym_of_a_random_word():
    random = Random(0)
    inserted = Counter()
    for _ in range(3000):
        words = random_insertion("red shirt", 0.5, random, synonyms).split()
        assert len(words) == 3
        inserted.update(set(words) - {"red", "shirt"})
    assert inserted.keys() == {"jersey", "crimson", "scarlet"}
    assert within_six_sigma(inserted["jersey"], 3000, 1 / 2)
    assert within_six_sigma(inserted["crimson"], 3000, 1 / 4)


@pytest.mark.parametrize(("alpha", "count"), [(0.0, 1), (0.05, 1), (0.35, 3), (1.0, 10)])
def test_as_many_words_as_a_share_of_the_caption_are_inserted(alpha, count):
    for seed in range(100):
        words = random_insertion(" ".join(NUMBERS), alpha, Random(seed), doubled).split()
        assert [word for word in words if len(word) == 1] == NUMBERS
        assert sum(len(word) == 2 for word in words) == count


def test_two_words_swap_their_places():
    random = Random(0)
    results = [random_swap("one two three", 0.05, random) for _ in range(3000)]
    assert equally_often(results, {"two one three", "three two one", "one three two"})


@pytest.mark.parametrize(
    ("alpha", "expected"), [(0.0, "shirt red"), (0.5, "shirt red"), (0.99, "shirt red"), (1.0, "red shirt")]
)
def test_swaps_are_as_many_as_a_share_of_the_caption(alpha, expected):
    """An odd number of swaps exchanges the two words, an even number restores their order."""
    assert random_swap("red shirt", alpha, Random(0)) == expected


def test_eda_is_one_of_the_four_equally_often():
    """With strength 1, the result shows the operation: two swaps restore the order of two words."""
    random = Random(0)
    kinds = []
    for _ in range(4000):
        words = eda("shirt wool", 1.0, random, synonyms).split()
        if words == ["jersey", "wool"]:
            kinds.append("replacement")
        elif words == ["shirt", "wool"]:
            kinds.append("swap")
        else:
            kinds.append({1: "deletion", 4: "insertion"}[len(words)])
    assert equally_often(kinds, {"replacement", "swap", "deletion", "insertion"})


@pytest.mark.parametrize("operation", [None, *TEXT_OPERATIONS])
@pytest.mark.parametrize("caption", ["", "shirts", "a"])
def test_captions_of_one_word_or_none_survive_every_operation(operation, caption):
    for seed in range(20):
        for alpha in (0.0, 0.05, 1.0):
            assert apply(operation, Random(seed), caption, alpha=alpha) == caption


def test_without_an_operation_the_caption_is_kept():
    assert {apply(None, Random(seed), alpha=1.0) for seed in range(20)} == {CAPTION}
    assert apply(None, Random(0), CAPTION, "translated", back_translation_probability=1.0) == "translated"


@pytest.mark.parametrize(
    ("operation", "function"),
    [
        ("random_deletion", random_deletion),
        ("synonym_replacement", synonym_replacement),
        ("random_insertion", random_insertion),
        ("random_swap", random_swap),
        ("eda", eda),
    ],
)
def test_an_operation_is_chosen_by_its_name(operation, function):
    """The draw for the back-translation comes first. Operations that need no synonyms accept None."""
    arguments = (synonyms,) if operation in ("synonym_replacement", "random_insertion", "eda") else ()
    assert (operation in NEEDS_SYNONYMS) == bool(arguments)
    for seed in range(20):
        random = Random(seed)
        random.random()
        expected = function(CAPTION, 0.3, random, *arguments)
        assert apply(operation, Random(seed), synonyms=arguments[0] if arguments else None) == expected


def test_no_operation_is_left_out():
    assert set(TEXT_OPERATIONS) == {"random_deletion", "synonym_replacement", "random_insertion", "random_swap", "eda"}
    assert set(TEXT_OPERATIONS) >= NEEDS_SYNONYMS


@pytest.mark.parametrize("operation", TEXT_OPERATIONS)
def test_the_order_of_a_set_of_words_decides_nothing(operation):
    """The order differs between processes."""
    program = (
        "from random import Random; from text_utils.augmentation import augment_caption\n"
        f"arguments = dict(back_translation_probability=0.1, operation={operation!r}, alpha=0.3)\n"
        "arguments['synonyms'] = lambda word: [word + 's', word + 't']\n"
        f"print([augment_caption({CAPTION!r}, None, random=Random(seed), **arguments) for seed in range(50)])"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", program],
            env=os.environ | {"PYTHONHASHSEED": seed},
            cwd=Path(__file__).parents[2],
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        for seed in ("1", "2", "3")
    }
    assert len(outputs) == 1


def test_stop_words_are_lower_case_words_of_grammar():
    assert {"a", "the", "is", "with", "and", "her", "in"} <= STOP_WORDS
    assert not {"man", "red", "wearing", "shirt", "left", "back"} & STOP_WORDS
    assert all(word.isalpha() and word == word.lower() for word in STOP_WORDS)
