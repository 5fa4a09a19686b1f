from random import Random

import pytest

from tests.text_utils.test_augmentation import within_six_sigma
from text_utils.masking import IGNORED_LABEL, mask_tokens
from text_utils.tokenizer import END, MASK, START

TOKENS = 200_000
ORDINARY = 1000
"""Every token of the long caption below. A random token equals it only once in 49,405 draws."""


@pytest.fixture(scope="module")
def picked() -> list[int]:
    """The results of masking for the picked tokens of a long caption."""
    ids = [START, *[ORDINARY] * TOKENS, END]
    masked, labels = mask_tokens(ids, Random(0))
    assert len(masked) == len(labels) == len(ids)
    assert set(labels) == {ORDINARY, IGNORED_LABEL}
    return [read for read, label in zip(masked, labels, strict=True) if label != IGNORED_LABEL]


def test_share_of_picked_tokens(picked):
    assert within_six_sigma(len(picked), TOKENS, 0.15)


def test_shares_of_masked_replaced_and_kept_tokens(picked):
    masked, kept = picked.count(MASK), picked.count(ORDINARY)
    assert within_six_sigma(masked, len(picked), 0.8)
    assert within_six_sigma(kept, len(picked), 0.1)
    assert within_six_sigma(len(picked) - masked - kept, len(picked), 0.1)


def test_random_tokens_are_ordinary_and_uniform(picked):
    drawn = [token for token in picked if token not in (MASK, ORDINARY)]
    assert min(drawn) >= 0
    assert max(drawn) < MASK
    for quarter in range(4):
        count = sum(quarter * MASK / 4 <= token < (quarter + 1) * MASK / 4 for token in drawn)
        assert within_six_sigma(count, len(drawn), 0.25)


def test_tokens_that_were_not_picked_stay_and_labels_are_the_original_ids():
    ids = [START, *range(100, 400), END]
    masked, labels = mask_tokens(ids, Random(1))
    for token, read, label in zip(ids, masked, labels, strict=True):
        assert label in (token, IGNORED_LABEL)
        assert label == token or read == token


def test_start_and_end_are_never_picked():
    random = Random(0)
    for _ in range(2000):
        masked, labels = mask_tokens([START, 5, END], random)
        assert (masked[0], masked[2]) == (START, END)
        assert (labels[0], labels[2]) == (IGNORED_LABEL, IGNORED_LABEL)


def test_an_empty_caption_has_nothing_to_pick():
    assert mask_tokens([START, END], Random(0)) == ([START, END], [IGNORED_LABEL, IGNORED_LABEL])


def test_the_given_ids_do_not_change_and_the_random_state_decides():
    ids = [START, *range(300), END]
    first = mask_tokens(ids, Random(3))
    assert ids == [START, *range(300), END]
    assert mask_tokens(ids, Random(3)) == first
    assert mask_tokens(ids, Random(4)) != first
