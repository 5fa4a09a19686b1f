"""Text augmentation of training captions: back-translation, then an operation of EDA (Wei & Zou, 2019).

The operations split a caption at white space and join the words with single spaces.
"""

from collections.abc import Callable
from random import Random

from text_utils.stop_words import STOP_WORDS

Synonyms = Callable[[str], list[str]]
"""A function from a word to its synonyms, without the word itself; empty if there are none."""


def random_deletion(caption: str, probability: float, random: Random) -> str:
    """Drops each word with `probability`. If no word is left, one random word of the caption is kept.

    An empty caption stays empty.
    """
    words = caption.split()
    if not words:
        return ""
    remaining = [word for word in words if random.random() >= probability]
    return " ".join(remaining or [random.choice(words)])


def synonym_replacement(caption: str, alpha: float, random: Random, synonyms: Synonyms) -> str:
    """Replaces a share `alpha` of the words, at least one, by a random synonym, each wherever it appears.

    Only words that have a synonym and are no stop words are replaced. If there are too few of them, all are replaced.
    """
    words = caption.split()
    # Not a set: its order differs between processes, and so would the draws.
    candidates = list(dict.fromkeys(_replaceable_words(words, synonyms)))
    chosen = random.sample(candidates, min(_number_of_changes(words, alpha), len(candidates)))
    replacements = {word: random.choice(synonyms(word)) for word in chosen}
    return " ".join(replacements.get(word, word) for word in words)


def random_insertion(caption: str, alpha: float, random: Random, synonyms: Synonyms) -> str:
    """Inserts synonyms at random positions, including both ends: a share `alpha` of the number of words, at least one.

    Each is a random synonym of a random word of `caption` that is no stop word. Without such a word, nothing is
    inserted.
    """
    words = caption.split()
    candidates = _replaceable_words(words, synonyms)
    if not candidates:
        return " ".join(words)
    for _ in range(_number_of_changes(words, alpha)):
        synonym = random.choice(synonyms(random.choice(candidates)))
        words.insert(random.randint(0, len(words)), synonym)
    return " ".join(words)


def random_swap(caption: str, alpha: float, random: Random) -> str:
    """Swaps the words at two random positions. The number of swaps is a share `alpha` of the words, at least one."""
    words = caption.split()
    if len(words) < 2:
        return " ".join(words)
    for _ in range(_number_of_changes(words, alpha)):
        first, second = random.sample(range(len(words)), 2)
        words[first], words[second] = words[second], words[first]
    return " ".join(words)


def eda(caption: str, alpha: float, random: Random, synonyms: Synonyms) -> str:
    """Applies one of the four operations above at random, all with equal probability."""
    operation = random.choice(("synonym_replacement", "random_insertion", "random_swap", "random_deletion"))
    return _apply_operation(operation, caption, alpha, random, synonyms)


TEXT_OPERATIONS: dict[str, Callable[..., str]] = {
    "random_deletion": random_deletion,
    "synonym_replacement": synonym_replacement,
    "random_insertion": random_insertion,
    "random_swap": random_swap,
    "eda": eda,
}
"""Operations by name. Each takes (caption, alpha, random); those in `NEEDS_SYNONYMS` take `synonyms` as the fourth."""

NEEDS_SYNONYMS = frozenset({"synonym_replacement", "random_insertion", "eda"})


def augment_caption(
    caption: str,
    back_translation: str | None,
    *,
    back_translation_probability: float,
    operation: str | None,
    alpha: float,
    synonyms: Synonyms | None,
    random: Random,
) -> str:
    """Augments a training caption: sometimes replaces it by its back-translation, then applies an operation.

    All draws come from `random`, so the result depends only on the arguments and the state of `random`.

    Args:
        back_translation: None if the caption has none.
        back_translation_probability: probability of using the back-translation.
        operation: a name in `TEXT_OPERATIONS`, or None for no operation.
        alpha: strength of the operation.
        synonyms: can be None if the operation is not in `NEEDS_SYNONYMS`.
    """
    # Drawn even without a back-translation, so that adding one to a caption changes no other draw.
    if random.random() < back_translation_probability and back_translation is not None:
        caption = back_translation
    return caption if operation is None else _apply_operation(operation, caption, alpha, random, synonyms)


def _apply_operation(operation: str, caption: str, alpha: float, random: Random, synonyms: Synonyms | None) -> str:
    arguments = (synonyms,) if operation in NEEDS_SYNONYMS else ()
    return TEXT_OPERATIONS[operation](caption, alpha, random, *arguments)


def _number_of_changes(words: list[str], alpha: float) -> int:
    return max(1, int(alpha * len(words)))


def _replaceable_words(words: list[str], synonyms: Synonyms) -> list[str]:
    return [word for word in words if word.lower() not in STOP_WORDS and synonyms(word)]
