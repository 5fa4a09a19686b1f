"""Text augmentation of the training captions: back-translation, then one of the operations of EDA (Wei & Zou, 2019).

The operations work on the words between white space, and join them with single spaces.
"""

from collections.abc import Callable
from random import Random

from text_utils.stop_words import STOP_WORDS

Synonyms = Callable[[str], list[str]]
"""From a word to its synonyms, without the word itself; empty where there is none."""


def random_deletion(caption: str, probability: float, random: Random) -> str:
    """Drops each word with `probability`; where none would be left, one of them is kept at random.

    An empty caption stays empty.
    """
    words = caption.split()
    if not words:
        return ""
    kept = [word for word in words if random.random() >= probability]
    return " ".join(kept or [random.choice(words)])


def synonym_replacement(caption: str, alpha: float, random: Random, synonyms: Synonyms) -> str:
    """Replaces a share `alpha` of the words, at least one: each everywhere it stands, by a random synonym of it.

    Only words that are no stop words and have a synonym are replaced; where there are fewer of them, all are.
    """
    words = caption.split()
    # Not a set: its order differs from process to process, and the draws with it.
    candidates = list(dict.fromkeys(_replaceable(words, synonyms)))
    chosen = random.sample(candidates, min(_changes(words, alpha), len(candidates)))
    replacements = {word: random.choice(synonyms(word)) for word in chosen}
    return " ".join(replacements.get(word, word) for word in words)


def random_insertion(caption: str, alpha: float, random: Random, synonyms: Synonyms) -> str:
    """Inserts as many words as a share `alpha` of the caption, at least one, each at a random place, ends included.

    Each is a random synonym of a random word of `caption` that is no stop word; without such a word none is inserted.
    """
    words = caption.split()
    candidates = _replaceable(words, synonyms)
    if not candidates:
        return " ".join(words)
    for _ in range(_changes(words, alpha)):
        synonym = random.choice(synonyms(random.choice(candidates)))
        words.insert(random.randint(0, len(words)), synonym)
    return " ".join(words)


def random_swap(caption: str, alpha: float, random: Random) -> str:
    """Swaps the words at two random places, as often as a share `alpha` of the caption has words, at least once."""
    words = caption.split()
    if len(words) < 2:
        return " ".join(words)
    for _ in range(_changes(words, alpha)):
        first, second = random.sample(range(len(words)), 2)
        words[first], words[second] = words[second], words[first]
    return " ".join(words)


def eda(caption: str, alpha: float, random: Random, synonyms: Synonyms) -> str:
    """One of the four operations above, at random, each as likely as the others."""
    operation = random.choice(("synonym_replacement", "random_insertion", "random_swap", "random_deletion"))
    return _operate(operation, caption, alpha, random, synonyms)


TEXT_OPERATIONS: dict[str, Callable[..., str]] = {
    "random_deletion": random_deletion,
    "synonym_replacement": synonym_replacement,
    "random_insertion": random_insertion,
    "random_swap": random_swap,
    "eda": eda,
}
"""By name. Each takes (caption, alpha, random), and the `NEEDS_SYNONYMS` among them `synonyms` as the fourth."""

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
    """The training caption of one sample: its back-translation now and then (where there is one), then an operation.

    All draws come from `random`, so the result depends on the arguments and its state alone.

    Args:
        operation: a name in `TEXT_OPERATIONS`, or None for none.
        alpha: strength of the operation.
        synonyms: may be None where the operation is not in `NEEDS_SYNONYMS`.
    """
    # Drawn even where there is no back-translation, so that giving one to a caption changes no other draw.
    if random.random() < back_translation_probability and back_translation is not None:
        caption = back_translation
    return caption if operation is None else _operate(operation, caption, alpha, random, synonyms)


def _operate(operation: str, caption: str, alpha: float, random: Random, synonyms: Synonyms | None) -> str:
    arguments = (synonyms,) if operation in NEEDS_SYNONYMS else ()
    return TEXT_OPERATIONS[operation](caption, alpha, random, *arguments)


def _changes(words: list[str], alpha: float) -> int:
    return max(1, int(alpha * len(words)))


def _replaceable(words: list[str], synonyms: Synonyms) -> list[str]:
    return [word for word in words if word.lower() not in STOP_WORDS and synonyms(word)]
